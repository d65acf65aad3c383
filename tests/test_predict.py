"""Predicting over photographs, and drawing what was found."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.cli.artifacts import foreign_options, provider_of
from edgekd.data.images import load_image
from edgekd.data.layout import IMAGE_SUFFIXES
from edgekd.draw import class_colour, draw_detections
from edgekd.errors import DataError, EdgeKDError, RecipeError, UserError
from edgekd.labels import NAMED_LABEL_SETS
from edgekd.predict import _write_picture, find_images, output_names
from edgekd.types import Detections
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, write_detector
from tests.toy_onnx import write_constant_detector


def picture(path: Path, hw: tuple[int, int] = (40, 60), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*hw, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def predict(*arguments: object) -> tuple[int, dict[str, object], str]:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments), "--json", "--score", "0.1"])
    return result.exit_code, json.loads(result.stdout), result.stderr


def test_a_file_s_own_voting_is_used_unless_told_otherwise(tmp_path: Path) -> None:
    import onnx

    from edgekd.export.graph import set_metadata

    boxes, scores = GOOD_BOXES.repeat(2, 0).astype(np.float32), GOOD_SCORES.repeat(2, 0)
    boxes[1::2] += 2  # beside each box another one, which NMS takes away
    scores[1::2] *= 0.9
    plain, voting = (write_detector(tmp_path / f"{name}.onnx", boxes, scores) for name in ("plain", "voting"))
    model = onnx.load(str(voting))
    set_metadata(model, {"edgekd.thresholds": {"nms_iou": 0.5, "max_detections": 100, "box_voting": 0.6}})
    onnx.save(model, str(voting))
    photo = picture(tmp_path / "x.png")

    def boxes_of(file: Path, *options: object) -> list[list[float]]:
        _, body, _ = predict(file, photo, "--out", tmp_path / "out", *options)
        return [found["box_xyxy"] for found in body["images"][0]["detections"]]  # type: ignore[index]

    usual = boxes_of(plain)
    assert boxes_of(voting) == boxes_of(plain, "--box-voting", 0.6) != usual
    assert boxes_of(voting, "--box-voting", 0) == usual


def test_nothing_found_is_told_with_the_score_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    words = ["predict", str(checkpoint), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--score", "1"]
    result = CliRunner().invoke(app, words)
    assert "0 objects in 1 images; nothing scored 1 or more (--score)" in result.stdout


def test_pictures_and_json(checkpoint: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    picture(photos / "a" / "x.jpg", (40, 60))
    picture(photos / "b" / "x.jpg", (70, 30), seed=1)
    picture(photos / "y.png")
    (photos / "notes.txt").write_text("not an image")
    code, body, _ = predict(checkpoint, photos, "--out", tmp_path / "out")
    assert code == 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert body == written
    entries = {Path(entry["image"]).relative_to(photos).as_posix(): entry for entry in written["images"]}
    assert set(entries) == {"a/x.jpg", "b/x.jpg", "y.png"}
    assert len({entry["picture"] for entry in entries.values()}) == 3, "pictures of the same name are kept apart"
    for entry in entries.values():
        drawn = Image.open(tmp_path / "out" / entry["picture"])
        assert drawn.size == (entry["width"], entry["height"])
        assert entry["detections"]
        for found in entry["detections"]:
            assert found["class"] == ("cat", "dog")[found["label"]]
            assert 0.1 < found["score"] <= 1
            x1, y1, x2, y2 = found["box_xyxy"]
            assert 0 <= x1 <= x2 <= entry["width"]
            assert 0 <= y1 <= y2 <= entry["height"]


def test_unreadable_images_are_told_and_the_rest_go_on(checkpoint: Path, tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png")
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    code, body, stderr = predict(checkpoint, bad, good, tmp_path / "gone.png", "--out", tmp_path / "out")
    assert code == 2
    assert [Path(entry["image"]) for entry in body["images"]] == [good]  # type: ignore[attr-defined, index]
    assert set(body["failures"]) == {str(bad), str(tmp_path / "gone.png")}  # type: ignore[call-overload]
    assert "2 of 3 images are not in the result" in stderr


def test_links_that_lead_nowhere_are_told_like_any_unreadable_image(checkpoint: Path, tmp_path: Path) -> None:
    photos = picture(tmp_path / "photos" / "good.png").parent
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "gone.png").symlink_to("nowhere.png")
    (photos / "folder.png").mkdir()
    code, body, _ = predict(checkpoint, photos, "--out", tmp_path / "out")
    assert code == 2
    assert [Path(entry["image"]).name for entry in body["images"]] == ["good.png"]  # type: ignore[attr-defined]
    assert sorted(Path(name).name for name in body["failures"]) == ["gone.png", "loop.png"]  # type: ignore[attr-defined]


def test_a_full_disk_is_not_taken_for_bad_images(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise EdgeKDError("x.jpg cannot be written", got="No space left on device")

    picture(tmp_path / "good.png")
    monkeypatch.setattr("edgekd.predict._write_picture", full)
    code, body, _ = predict(checkpoint, tmp_path / "good.png", "--out", tmp_path / "out")
    assert code == 1
    assert "cannot be written" in body["error"]["message"]  # type: ignore[index]


def test_a_picture_that_is_cut_off_never_gets_its_name(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: a write ends short, which Pillow's own writer takes for success."""
    pixels = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(EdgeKDError, match=r"x\.jpg cannot be written") as caught:
            _write_picture(tmp_path / "x.jpg", pixels)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ulimit" in (caught.value.fix or "")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_nothing_could_be_read(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    code, body, _ = predict(checkpoint, tmp_path / "gone.png", tmp_path / "gone", "--out", out)
    assert code == 2
    assert "no such file" in body["error"]["message"]  # type: ignore[index]
    code, body, _ = predict(checkpoint, bad, tmp_path / "gone.png", "--out", out)
    assert code == 2
    assert "none of 2 images could be read" in body["error"]["message"]  # type: ignore[index]
    assert not out.exists()
    assert predict(checkpoint, good, "--out", out)[0] == 0
    before = (out / "predictions.json").read_bytes()
    assert predict(checkpoint, tmp_path / "gone.png", "--out", out)[0] == 2
    assert (out / "predictions.json").read_bytes() == before


def test_a_file_is_no_folder_for_results(checkpoint: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("dear diary")
    code, body, _ = predict(checkpoint, picture(tmp_path / "x.png"), "--out", mine)
    assert code == 2
    assert "mine.txt is a file" in body["error"]["message"]  # type: ignore[index]
    assert mine.read_text() == "dear diary"


def test_annotated_pictures_are_not_looked_at_again(checkpoint: Path, tmp_path: Path) -> None:
    photos = picture(tmp_path / "photos" / "x.png").parent
    for _ in range(2):
        code, body, _ = predict(checkpoint, photos, "--out", photos / "found")
        assert code == 0
        assert [entry["image"] for entry in body["images"]] == [str(photos / "x.png")]  # type: ignore[attr-defined, index]
    code, body, _ = predict(checkpoint, photos, "--out", photos)
    assert code == 2
    assert "is the folder of the images" in body["error"]["message"]  # type: ignore[index]
    inside = picture(photos / "found" / "mine" / "y.png")
    assert find_images([photos / "found" / "mine", photos], photos / "found")[0] == [inside, photos / "x.png"]


def test_folders_are_read_as_data_sets_are(tmp_path: Path) -> None:
    real = picture(tmp_path / "elsewhere" / "a.jpg")
    photos = picture(tmp_path / "photos" / "b.jpg").parent
    (photos / "linked").symlink_to(real.parent)
    (photos / "back").symlink_to(photos)
    picture(photos / "._b.jpg")
    picture(photos / ".thumbs" / "b.jpg")
    assert find_images([photos])[0] == [photos / "b.jpg", photos / "linked" / "a.jpg"]


def test_photographs_are_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    photo = picture(tmp_path / "x.jpg")
    before = photo.read_bytes()
    code, body, _ = predict(checkpoint, photo, "--out", tmp_path)
    assert code == 2
    assert "would overwrite" in body["error"]["message"]  # type: ignore[index]
    assert photo.read_bytes() == before


def test_a_photograph_that_is_not_looked_at_is_not_overwritten_either(checkpoint: Path, tmp_path: Path) -> None:
    given, beside = picture(tmp_path / "x.png"), picture(tmp_path / "x.jpg", seed=1)
    before = beside.read_bytes()
    code, body, _ = predict(checkpoint, given, "--out", tmp_path)
    assert code == 2
    assert "did not write" in body["error"]["message"]  # type: ignore[index]
    assert beside.read_bytes() == before
    out = tmp_path / "out"
    assert predict(checkpoint, given, "--out", out)[0] == 0
    (out / "predictions.json").unlink()  # as when it was cut off
    assert predict(checkpoint, given, "--out", out)[0] == 0
    picture(out / "x.jpg")  # as they were written without a comment
    assert predict(checkpoint, given, "--out", out)[0] == 0
    picture(out / "x.jpg")
    (out / "predictions.json").unlink()
    assert predict(checkpoint, given, "--out", out)[0] == 2


def test_a_folder_without_images_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, body, _ = predict(checkpoint, tmp_path / "empty", "--out", tmp_path / "out")
    assert code == 2
    assert "no images" in body["error"]["message"]  # type: ignore[index]


def test_each_image_once(tmp_path: Path) -> None:
    image = picture(tmp_path / "in" / "x.jpg")
    assert find_images([tmp_path / "in", image, image]) == ([image], [])


def test_a_folder_gives_all_that_data_sets_take_for_images(tmp_path: Path) -> None:
    for suffix in IMAGE_SUFFIXES:
        (tmp_path / f"x{suffix.upper()}").touch()
    assert len(find_images([tmp_path])[0]) == len(IMAGE_SUFFIXES)


def test_photographs_of_a_kind_that_is_not_read_are_told(checkpoint: Path, tmp_path: Path) -> None:
    photos = picture(tmp_path / "photos" / "good.png").parent
    for name in ("phone.HEIC", "good.nef"):  # the second is the camera's own copy of good.png
        (photos / name).write_bytes(b"\0\0\0\x18ftypheic")
    code, body, stderr = predict(checkpoint, photos, "--out", tmp_path / "out")
    assert code == 2
    assert [Path(entry["image"]).name for entry in body["images"]] == ["good.png"]  # type: ignore[attr-defined]
    assert set(body["failures"]) == {str(photos / "phone.HEIC")}  # type: ignore[call-overload]
    assert "phone.HEIC is of a kind that is not read: convert it" in stderr
    (photos / "good.png").unlink()
    _, body, _ = predict(checkpoint, photos, "--out", tmp_path / "out")
    assert "2 images of a kind that is not read" in body["error"]["message"]  # type: ignore[index]
    with pytest.raises(DataError, match="convert it to JPEG"):
        load_image(photos / "phone.HEIC")


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (["x.jpg", "y.jpg"], ["x", "y"]),
        (["a/x.jpg", "b/x.jpg", "y.jpg"], ["a_x", "b_x", "y"]),
        (["p/a/x.jpg", "q/a/x.jpg"], ["p_a_x", "q_a_x"]),
        (["a/x.jpg", "a/x.png"], ["x_jpg", "x_png"]),
        (["a/X.jpg", "b/x.jpg"], ["a_X", "b_x"]),
        (["a/b.jpg", "b.jpg", "a_b.jpg"], None),
    ],
)
def test_names_tell_images_apart(images: list[str], names: list[str] | None) -> None:
    found = output_names([Path("/data") / image for image in images])
    assert len({name.lower() for name in found}) == len(images)
    assert not any("/" in name for name in found)
    if names is not None:
        assert found == names


# -- drawing ------------------------------------------------------------------------------------------------------


def boxes(*rows: tuple[float, ...]) -> Detections:
    return Detections(np.array(rows, np.float32), np.linspace(0.9, 0.5, len(rows)), np.arange(len(rows)) % 2)


def test_names_beyond_ascii_are_drawn_where_the_system_has_a_font() -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    try:
        ImageFont.truetype("DejaVuSans.ttf", 10)
    except OSError:
        pytest.skip("no such font here")
    one, other = (draw_detections(image, boxes((100, 80, 200, 160)), (name,)) for name in ("Tür", "Tör"))
    assert (one != other).any()


def test_a_box_is_drawn_where_it_is_and_the_source_stays() -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    drawn = draw_detections(image, boxes((100, 80, 200, 160)), ("cat", "dog"))
    assert (image == 128).all()
    assert drawn.shape == image.shape
    for y, x in ((120, 100), (120, 200), (160, 150), (80, 190)):
        assert tuple(drawn[y, x]) == class_colour(0), (y, x)
    assert (drawn[90:150, 110:190] == 128).all(), "the inside is left alone"


@pytest.mark.parametrize(
    "box",
    [(0, 0, 300, 200), (0, 0, 5, 5), (290, 190, 300, 200), (-20, -20, 320, 220), (150, 100, 150, 100)],
)
def test_labels_stay_inside_the_picture(box: tuple[float, ...]) -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    drawn = draw_detections(image, boxes(box), ("a rather long class name", "dog"))
    label = (drawn == class_colour(0)).all(-1).sum()
    assert label > 500, "the label's ground is seen"


def test_labels_of_equal_boxes_do_not_cover_each_other() -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    drawn = draw_detections(image, boxes((50, 60, 250, 150), (50, 60, 250, 150)), ("cat", "dog"))
    one, other = ((drawn == class_colour(label)).all(-1).sum() for label in (0, 1))
    assert one > 400
    assert other > 400


@pytest.mark.parametrize("hw", [(1, 1), (8, 8), (3000, 20)])
def test_any_size_can_be_drawn_on(hw: tuple[int, int]) -> None:
    image = np.zeros((*hw, 3), np.uint8)
    assert draw_detections(image, boxes((0, 0, hw[1], hw[0])), ()).shape == image.shape
    assert (draw_detections(image, Detections.empty(), ()) == image).all()


def test_neighbouring_classes_differ_in_colour() -> None:
    colours = np.array([class_colour(label) for label in range(20)], float)
    assert (np.abs(np.diff(colours, axis=0)).sum(1) > 100).all()
    assert len({tuple(colour) for colour in colours}) == 20


# -- what is declared of a foreign file ---------------------------------------------------------------------------


def test_nothing_can_be_declared_of_what_says_it_itself(checkpoint: Path, tmp_path: Path) -> None:
    photo, out = picture(tmp_path / "x.png"), tmp_path / "out"
    ours = write_detector(tmp_path / "ours.onnx", GOOD_BOXES, GOOD_SCORES)
    rows = np.array([[[4, 4, 20, 20, 0.9, 1]]], np.float32)
    foreign = write_constant_detector(tmp_path / "foreign.onnx", {"out": rows}, metadata={"names": "{0: 'a', 1: 'b'}"})
    declared = ("--classes", "x,y", "--declare", "channels=bgr")
    for artifact in (checkpoint, ours):
        code, body, _ = predict(artifact, photo, "--out", out, *declared)
        assert code == 2
        assert "--classes, --declare do nothing here" in body["error"]["message"]  # type: ignore[index]
        for command in (["bench", artifact, "--data", tmp_path], ["bundle", artifact]):
            told = CliRunner().invoke(app, [*map(str, command), "--out", str(out), *declared])
            assert told.exit_code == 2
            assert "do nothing here" in told.output
    assert not out.exists()
    assert predict(foreign, photo, "--out", out, *declared)[0] == 0
    told = CliRunner().invoke(
        app, ["bench", str(ours), str(foreign), "--data", str(tmp_path), "--split", "val", *declared]
    )
    assert "do nothing here" not in told.output, "they speak of the foreign one"


def test_declared_options() -> None:
    assert foreign_options(Path("x.onnx"), None, None, None, None) is None
    options = foreign_options(Path("x.onnx"), "cat, dog", "yolo", 320, None)
    assert options is not None
    assert (options.class_names, options.output, options.input_size) == (("cat", "dog"), "yolo", 320)
    for name in NAMED_LABEL_SETS:
        named = foreign_options(Path("x.onnx"), name, None, None, None)
        assert named is not None
        assert named.class_names == name
    with pytest.raises(RecipeError, match="--classes: name 3 of 3 is blank"):
        foreign_options(Path("x.onnx"), "cat, dog,", None, None, None)
    with pytest.raises(RecipeError, match="--output"):
        foreign_options(Path("x.onnx"), None, "yolo9", None, None)
    said = foreign_options(
        Path("x.onnx"), None, None, None, ["resize=stretch", "mean = [0.5, 0.4, 0.3]", "background=last"]
    )
    assert said is not None
    assert (said.resize, said.mean, said.background) == ("stretch", (0.5, 0.4, 0.3), "last")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resiz=stretch", r"KEY=VALUE(?s:.*)did you mean resize"),
        ("class_names=a", r"KEY=VALUE(?s:.*)did you mean --classes"),
        ("name=x", "KEY=VALUE"),
        ("mean", "KEY=VALUE"),
        ("resize=squash", "--declare resize: "),
        ("mean=[1, 2]", "--declare mean: "),
        (
            "mean=[123.7, 116.3, 103.5]",
            "--declare mean: of pixels from 0 to 1",
        ),  # as MMDetection's configurations have them
        ("std=[58.4, 57.1, 57.4]", "--declare std: .*by 255"),
        ("std=[0, 1, 1]", "--declare std: .*above 0"),
        ("box_format=corners", "--declare box_format: "),
        ("mean=[1, 2", "--declare mean: not a value"),
    ],
)
def test_what_cannot_be_declared(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        foreign_options(Path("x.onnx"), None, None, None, [text])


@pytest.mark.parametrize(
    ("artifact", "device", "expected"),
    [("a.onnx", None, None), ("a.onnx", "auto", None), ("a.onnx", "cuda:1", "cuda"), ("run", "cuda:1", "cuda:1")],
)
def test_what_runtimes_are_told(artifact: str, device: str | None, expected: str | None) -> None:
    assert provider_of(Path(artifact), device) == expected
