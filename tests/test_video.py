"""Videos as sources of frames, and detectors over them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgekd import predict_video as predict_video_module
from edgekd.bench.entries import BenchArtifact
from edgekd.bench.video import bench_video, video_table
from edgekd.cli import app
from edgekd.errors import EdgeKDError, UserError
from edgekd.recipe import BenchConfig
from edgekd.types import ImageArray
from edgekd.video import Video, is_video, shown_name, video_stems
from edgekd.video_writer import CODECS, written_video

HW = (48, 64)


def shade(index: int) -> int:
    return 20 + 10 * (index % 20)


def frame(index: int) -> ImageArray:
    """A picture from which its number can be read back, whatever a codec does to it."""
    return np.full((*HW, 3), shade(index), np.uint8)


def make_video(path: Path, count: int = 12, fps: float = 20.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_video(path, fps, HW) as writer:
        for index in range(count):
            writer.write(frame(index))
    return path


def edgekd(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


# -- sources ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", CODECS)
def test_every_codec_that_is_offered_can_be_written_and_read(tmp_path: Path, suffix: str) -> None:
    path = make_video(tmp_path / f"vidéo of mine{suffix}")
    with Video(str(path)) as video:
        assert (video.hw, video.fps, video.live) == (HW, 20.0, False)
        found = list(video.frames())
    assert [one.index for one in found] == list(range(12))
    assert np.allclose([one.time_s for one in found], np.arange(12) / 20, atol=0.002)
    assert all(abs(int(one.rgb()[9, 9, 0]) - shade(one.index)) < 6 for one in found)
    assert video.dropped == 0
    assert video.notes() == []
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "nothing temporary stays"


def test_colours_are_rgb(tmp_path: Path) -> None:
    red = np.zeros((*HW, 3), np.uint8)
    red[..., 0] = 255
    with written_video(tmp_path / "red.avi", 10, HW) as writer:
        writer.write(red)
    with Video(str(tmp_path / "red.avi")) as video:
        (only,) = video.frames()
    assert only.rgb()[9, 9, 0] > 240
    assert only.rgb()[9, 9, 2] < 15


def test_the_first_frame_s_latency_begins_when_it_is_asked_for(tmp_path: Path) -> None:
    """A benchmark warms its detector up between opening a video and reading it."""
    with Video(str(make_video(tmp_path / "v.mp4"))) as video:
        asked = time.perf_counter_ns()
        assert next(video.frames()).ready_ns >= asked


def test_a_name_with_colons_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As recorders name what they record by the hour."""
    monkeypatch.chdir(tmp_path)
    make_video(Path("12:30:00.avi"), count=2)
    with Video("12:30:00.avi") as video:
        assert len(list(video.frames())) == 2


def test_a_limit_is_kept(tmp_path: Path) -> None:
    with Video(str(make_video(tmp_path / "v.mp4"))) as video:
        assert [one.index for one in video.frames(limit=5)] == [0, 1, 2, 3, 4]
        assert video.notes(5) == []


def test_in_real_time_a_slow_reader_gets_the_newest_frame_and_loses_the_rest(tmp_path: Path) -> None:
    with Video(str(make_video(tmp_path / "v.avi", count=20, fps=40))) as video:
        start, seen = time.perf_counter(), []
        for one in video.frames(realtime=True):
            waited_ms = (time.perf_counter_ns() - one.ready_ns) / 1e6
            seen.append((one.index, waited_ms))
            assert abs(int(one.rgb()[9, 9, 0]) - shade(one.index)) < 6, "the picture is the one of its number"
            time.sleep(0.11)
        seconds = time.perf_counter() - start
    indices = [index for index, _ in seen]
    assert indices == sorted(set(indices))
    assert 2 <= len(indices) <= 10, "a frame each 25 ms, a reader each 110 ms"
    assert video.dropped == 20 - len(indices)
    assert indices[-1] == 19, "the last frame waits for whoever comes"
    assert seconds > 19 / 40, "not faster than the source"


def test_in_real_time_a_fast_reader_loses_nothing(tmp_path: Path) -> None:
    with Video(str(make_video(tmp_path / "v.avi", count=10, fps=10))) as video:
        start = time.perf_counter()
        assert [one.index for one in video.frames(realtime=True)] == list(range(10))
        assert video.dropped == 0
        assert time.perf_counter() - start >= 1, "the last frame lasts its tenth of a second too"


def test_a_reader_that_leaves_early_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with Video(str(make_video(tmp_path / "v.avi"))) as video:
        frames: Iterator[Any] = video.frames(realtime=True)
        next(frames)
        frames.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_cut_video_is_noted(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "v.avi", count=40)
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with Video(str(cut)) as video:
        assert 0 < len(list(video.frames())) < 40
        assert "damaged or cut off" in video.notes()[0]


def test_a_camera_that_goes_away_is_noted(tmp_path: Path) -> None:
    with Video(str(make_video(tmp_path / "v.avi", 9))) as video:
        video.live = True
        taken = sum(1 for _ in video.frames(limit=100))
        assert 1 <= taken <= 9
        assert any("gave no more after 9 frames" in note for note in video.notes(100))
        assert video.notes(9) == []


def empty(folder: Path) -> Path:
    (folder / "v.mp4").touch()
    return folder / "v.mp4"


def text(folder: Path) -> Path:
    (folder / "v.mp4").write_text("not a video\n" * 50)
    return folder / "v.mp4"


def without_frames(folder: Path) -> Path:
    with written_video(folder / "v.avi", 10, HW):
        pass
    return folder / "v.avi"


def without_index(folder: Path) -> Path:
    data = make_video(folder / "v.mp4").read_bytes()
    (folder / "v.mp4").write_bytes(data[: len(data) // 2])  # the index stands at the end
    return folder / "v.mp4"


BAD = {
    "absent": (lambda folder: folder / "none.mp4", "there is no such video"),
    "of zero bytes": (empty, r"empty \(0 bytes\)"),
    "of text": (text, "not a video"),
    "without frames": (without_frames, "not a single frame|not a video"),
    "without index": (without_index, "not a video, damaged"),
    "camera": (lambda folder: "93", "camera 93 cannot be opened"),
    "device": (lambda folder: "/dev/video93", "camera /dev/video93 cannot be opened"),
    "stream": (lambda folder: "rtsp://me:secret@127.0.0.1:9/x", "rtsp://127.0.0.1:9/x cannot be reached"),
    "scheme": (lambda folder: "concat://a", "unknown kind of stream"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_is_a_clean_error(
    tmp_path: Path, checkpoint: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[name]
    source = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        Video(str(source))
    assert "secret" not in str(caught.value)
    assert capfd.readouterr().err == "", "FFmpeg's own words are kept away"
    code, _, stderr = edgekd("predict", checkpoint, source, "--out", tmp_path / "out")
    assert code == 2
    assert "Traceback" not in stderr
    assert not (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [("a.MP4", True), ("0", True), ("rtsp://x/y", True), ("/dev/video0", True), ("a.jpg", False), ("folder", False)],
)
def test_what_counts_as_video(source: str, expected: bool) -> None:
    assert is_video(source) is expected


def test_a_file_or_folder_that_is_called_like_a_video_or_camera(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "x.mp4").mkdir()
    assert not is_video("7")
    assert not is_video("x.mp4")


def test_names_of_results_differ_and_hold_no_password() -> None:
    sources = ["a/v.mp4", "b/V.avi", "0", "rtsp://me:secret@cam.local:554/live?x=1"]
    assert video_stems(sources) == ["v", "V-2", "camera-0", "cam-local-554-live-x-1"]
    assert shown_name(sources[3]) == "rtsp://cam.local:554/live?x=1"


# -- writing ------------------------------------------------------------------------------------------------------


def test_an_unknown_kind_of_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown kind"), written_video(tmp_path / "v.gif", 10, HW):
        pass


def test_a_frame_of_another_size_is_fitted(tmp_path: Path) -> None:
    with written_video(tmp_path / "v.avi", 10, HW) as writer:
        writer.write(frame(0))
        writer.write(np.full((20, 90, 3), shade(7), np.uint8))
    with Video(str(tmp_path / "v.avi")) as video:
        assert [round(int(one.rgb()[9, 9, 0]) / 10) for one in video.frames()] == [2, 9]


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_full_disk_is_noticed(tmp_path: Path, suffix: str) -> None:
    """OpenCV says nothing: a limit on the file's size stands for the disk."""
    code = (
        "import resource, sys\nimport numpy as np\nfrom pathlib import Path\nfrom edgekd.video_writer import written_video\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "pictures = np.random.default_rng(0).integers(0, 255, (30, 120, 160, 3), np.uint8)\n"
        "with written_video(Path(sys.argv[1]), 10, (120, 160)) as writer:\n    [writer.write(p) for p in pictures]"
    )
    path = tmp_path / f"v{suffix}"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "could not be written whole" in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing that looks finished is left"


# -- predict ------------------------------------------------------------------------------------------------------


def test_predict_writes_a_video_and_a_line_for_each_frame(checkpoint: Path, tmp_path: Path) -> None:
    video, out = make_video(tmp_path / "my clips" / "v.avi"), tmp_path / "out"
    code, stdout, stderr = edgekd("predict", checkpoint, video, "--out", out, "--score", 0.1, "--json", "--quiet")
    assert (code, stderr) == (0, "")
    body = json.loads(stdout)
    assert body == json.loads((out / "predictions.json").read_text())
    (made,) = body["videos"]
    assert (made["frames"], made["dropped"], made["source_fps"]) == (12, 0, 20.0)
    assert (made["width"], made["height"]) == (64, 48)
    lines = [json.loads(line) for line in (out / "v.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(12))
    assert sum(len(line["detections"]) for line in lines) == made["objects"] > 0
    found = lines[0]["detections"][0]
    assert found["class"] in ("cat", "dog")
    assert 0 <= found["box_xyxy"][0] < found["box_xyxy"][2] <= 64
    with Video(str(out / "v.mp4")) as drawn:
        pictures = [one.rgb() for one in drawn.frames()]
    assert len(pictures) == 12
    assert any(np.ptp(picture.astype(int)) > 60 for picture in pictures), "boxes are drawn on plain ground"


def test_predict_agrees_with_predict_on_the_same_picture(checkpoint: Path, tmp_path: Path) -> None:
    from edgekd.predictor import load_predictor

    video = make_video(tmp_path / "v.avi")
    assert edgekd("predict", checkpoint, video, "--out", tmp_path / "out", "--score", 0.1)[0] == 0
    line = json.loads((tmp_path / "out" / "v.jsonl").read_text().splitlines()[4])
    with Video(str(video)) as source, load_predictor(checkpoint, score_threshold=0.1) as predictor:
        picture = list(source.frames())[4].rgb()
        found = predictor.detect(picture)
    assert len(line["detections"]) == len(found)
    assert np.allclose([entry["box_xyxy"] for entry in line["detections"]], found.boxes_xyxy, atol=0.01)


def test_max_frames_and_several_videos(checkpoint: Path, tmp_path: Path) -> None:
    videos = [make_video(tmp_path / folder / "v.avi") for folder in ("a", "b")]
    code, stdout, _ = edgekd(
        "predict", checkpoint, *videos, "--out", tmp_path / "out", "--max-frames", 3, "--json", "--video-format", "avi"
    )
    assert code == 0
    assert [(made["video"], made["frames"]) for made in json.loads(stdout)["videos"]] == [("v.avi", 3), ("v-2.avi", 3)]


def test_dropped_frames_have_no_line_and_the_video_keeps_its_length(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = predict_video_module.draw_detections
    monkeypatch.setattr(predict_video_module, "draw_detections", lambda *a: (time.sleep(0.12), real(*a))[1])
    video = make_video(tmp_path / "v.avi", count=20, fps=40)
    code, stdout, _ = edgekd("predict", checkpoint, video, "--out", tmp_path / "out", "--realtime", "--json")
    assert code == 0
    (made,) = json.loads(stdout)["videos"]
    assert made["dropped"] > 5
    assert made["frames"] + made["dropped"] == 20
    assert len((tmp_path / "out" / "v.jsonl").read_text().splitlines()) == made["frames"]
    with Video(str(tmp_path / "out" / "v.mp4")) as drawn:
        assert drawn.length == 20


def test_ctrl_c_keeps_what_is_done(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = predict_video_module.draw_detections, []

    def draw(*arguments: Any) -> ImageArray:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(predict_video_module, "draw_detections", draw)
    code, stdout, _ = edgekd("predict", checkpoint, make_video(tmp_path / "v.avi"), "--out", tmp_path / "out", "--json")
    assert code == 130
    assert json.loads(stdout)["videos"][0]["interrupted"] is True
    assert len((tmp_path / "out" / "v.jsonl").read_text().splitlines()) == 4
    with Video(str(tmp_path / "out" / "v.mp4")) as drawn:
        assert drawn.length == 4


def test_the_source_is_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    video = make_video(tmp_path / "v.mp4")
    before = video.read_bytes()
    code, _, stderr = edgekd("predict", checkpoint, video, "--out", tmp_path)
    assert code == 2
    assert "would overwrite" in stderr
    assert video.read_bytes() == before
    same = make_video(tmp_path / "v.avi")  # of another kind, so that what is made of it would be v.mp4 too
    code, _, stderr = edgekd("predict", checkpoint, same, "--out", tmp_path)
    assert code == 2
    assert "did not write" in stderr
    assert video.read_bytes() == before
    for _ in range(2):
        assert edgekd("predict", checkpoint, same, "--out", tmp_path / "out")[0] == 0


def test_images_and_videos_do_not_mix(checkpoint: Path, tmp_path: Path) -> None:
    code, _, stderr = edgekd("predict", checkpoint, tmp_path, "0", "--out", tmp_path / "out")
    assert code == 2
    assert "images and videos in one command" in stderr


# -- bench --------------------------------------------------------------------------------------------------------


def bench(checkpoint: Path, video: Path, **options: Any) -> dict[str, Any]:
    entries = [BenchArtifact(checkpoint, name) for name in ("one", "two")]
    return bench_video(entries, str(video), config=BenchConfig(), out=video.with_suffix(".json"), **options)


def test_bench_of_a_file_takes_every_frame(checkpoint: Path, tmp_path: Path) -> None:
    result = bench(checkpoint, make_video(tmp_path / "v.avi"))
    assert json.loads((tmp_path / "v.json").read_text()) == result
    assert [row["name"] for row in result["rows"]] == ["one", "two"]
    for row in result["rows"]:
        assert (row["frames"], row["offered"], row["dropped"]) == (12, 12, 0)
        assert row["latency_ms"]["samples"] == 12
        assert row["latency_ms"]["p99"] is None, "12 samples have no 99th percentile"
        assert row["stages_ms"]["infer"] > 0
        assert sum(row["stages_ms"].values()) <= row["latency_ms"]["max"]
        assert row["fps"] <= 1000 / row["latency_ms"]["median"] * 2
    assert "p99 needs" in video_table(result)


def test_bench_in_real_time_counts_what_a_slow_detector_drops(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd.predictor import Predictor

    real = Predictor.infer
    monkeypatch.setattr(Predictor, "infer", lambda self, tensor: (time.sleep(0.06), real(self, tensor))[1])
    monkeypatch.setattr("edgekd.bench.video.WARM_RUNS", 1)
    result = bench(checkpoint, make_video(tmp_path / "v.avi", count=20, fps=40), realtime=True)
    for row in result["rows"]:
        assert row["dropped"] >= 8
        assert row["frames"] + row["dropped"] == row["offered"] == 20
        assert row["fps"] < 17
        assert row["latency_ms"]["median"] > 60
    assert "%" in video_table(result)


def test_bench_by_command(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ["bench", f"teacher:t={checkpoint}", "--video", make_video(tmp_path / "v.mp4"), "--out", out]
    code, stdout, _ = edgekd(*words, "--max-frames", 4)
    assert code == 0
    assert f"result: {out}" in stdout
    row = json.loads(out.read_text())["rows"][0]
    assert (row["name"], row["role"], row["frames"]) == ("t", "teacher", 4)
    code, stdout, stderr = edgekd(*words, "--quiet")
    assert (code, stdout, stderr) == (0, "", "")
    assert edgekd("bench", checkpoint, "--video", tmp_path / "none.mp4", "--out", out)[0] == 2


def test_a_writer_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, ".mp4", "ZZZZ")
    with pytest.raises(EdgeKDError, match="cannot write ZZZZ"), written_video(tmp_path / "v.mp4", 10, HW):
        pass
