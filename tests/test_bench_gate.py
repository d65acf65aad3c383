"""The gate for CI: through the command line, on real ONNX files and a real data set."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from edgekd.artifact import sha256_file
from edgekd.bench.accuracy import evaluate
from edgekd.bench.baseline import Baseline, Pair, read_baseline
from edgekd.bench.gate import EXIT_REGRESSED, Gate, Limits, judge
from edgekd.bench.saved import Saved, SavedRow, read_saved, save
from edgekd.cli import app
from edgekd.types import Detections
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, NAMES, POOR_SCORES, make_dataset, write_detector


def edgekd(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set in YOLO's layout, a good, a slow and an inaccurate detector, and a baseline of the first."""
    folder = tmp_path_factory.mktemp("gate")
    write_yolo(folder / "data", 24)
    write_detector(folder / "good.onnx", GOOD_BOXES, GOOD_SCORES, width=16)
    write_detector(folder / "slow.onnx", GOOD_BOXES, GOOD_SCORES, width=2000)
    write_detector(folder / "poor.onnx", GOOD_BOXES, POOR_SCORES, width=16)
    (folder / "old").mkdir()
    shutil.copy(folder / "good.onnx", folder / "old" / "student.onnx")
    result = bench(folder, f"student={folder / 'old' / 'student.onnx'}", out=folder / "old" / "result.json")
    assert result.exit_code == 0, result.output
    return folder


def write_yolo(folder: Path, images: int) -> None:
    made = make_dataset(folder / "made", images)
    for kind in ("images", "labels"):
        (folder / kind / "val").mkdir(parents=True)
    for record in made.records:
        height, width = record.image_hw
        cv2.imwrite(str(folder / "images" / "val" / f"{record.image_id}.png"), cv2.imread(str(record.path)))
        centre, size = (
            record.boxes_xyxy[:, :2] + record.boxes_xyxy[:, 2:],
            np.diff(record.boxes_xyxy.reshape(-1, 2, 2), axis=1)[:, 0],
        )
        rows = np.concatenate([centre / 2 / (width, height), size / (width, height)], 1)
        lines = [f"{label} " + " ".join(map(str, row)) for label, row in zip(record.labels, rows, strict=True)]
        (folder / "labels" / "val" / f"{record.image_id}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(f"val: images/val\nnames: {list(NAMES)}\n")
    shutil.rmtree(folder / "made")


def bench(place: Path, *artifacts: object, out: Path, options: tuple[object, ...] = ()) -> Result:
    fixed = ("--data", place / "data", "--split", "val", "--samples", 20, "--warmup", 0, "--threads", 1)
    return edgekd("bench", *artifacts, *fixed, "--energy-seconds", 0, "--out", out, *options)


def gated(place: Path, name: str, out: Path, *options: object, baseline: Path | None = None) -> tuple[Result, dict]:
    baseline = baseline or place / "old" / "result.json"
    given = ("--baseline", baseline, "--max-slowdown", "50%", "--max-map-drop", 0.5, *options)
    result = bench(place, f"student={place / name}", out=out, options=given)
    return result, json.loads(out.read_text()) if out.is_file() else {}


@pytest.mark.parametrize(
    ("name", "limit", "code", "slower", "worse"),
    [
        # The very file of the baseline: two runs, of which one may be disturbed.
        ("good.onnx", "2000%", 0, False, False),
        ("slow.onnx", "50%", 3, True, False),
        ("poor.onnx", "50%", 3, False, True),
    ],
)
def test_regressions_are_found_side_by_side(
    place: Path,
    tmp_path: Path,
    name: str,
    limit: str,
    code: int,
    slower: bool,
    worse: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = tmp_path / "steps.md"
    steps.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(steps))
    options = ("--max-slowdown", limit, "--summary", tmp_path / "gate.md")
    result, data = gated(place, name, tmp_path / "new.json", *options)
    assert result.exit_code == code, result.output
    gate = data["gate"]
    (pair,) = gate["pairs"]
    assert gate["passed"] is (code == 0)
    assert (pair["latency"]["regressed"], pair["map"]["regressed"]) == (slower, worse)
    text = (tmp_path / "gate.md").read_text()
    assert text.partition("<details>")[0] in result.stdout
    assert "<details>" in text
    assert "<details>" not in result.stdout  # a terminal gets the table as text
    assert steps.read_text() == "before\n" + text
    assert ("❌" in text) is (code != 0)
    if name != "good.onnx":
        assert pair["how"] == "side by side"
        assert [row["role"] for row in data["rows"]] == ["student", "baseline"]
        assert pair["latency"]["low"] <= pair["latency"]["change"] <= pair["latency"]["high"]
    if worse:
        assert pair["map"]["basis"] == "paired bootstrap over images"
        assert pair["map"]["high"] < -0.005
    assert EXIT_REGRESSED == 3


def test_another_name_and_fitness_to_publish_are_told(place: Path, tmp_path: Path) -> None:
    options = ("--baseline", place / "old" / "result.json", "--max-map-drop", 100, "--publish", "--seconds", 0)
    result = bench(place, f"other={place / 'poor.onnx'}", out=tmp_path / "new.json", options=options)
    assert result.exit_code == 0, result.output
    assert "- **other** against student: latency" in result.stdout
    assert "not fit to publish: " in result.stdout


def moved(place: Path, folder: Path, *, detections: bool = True, **changes: object) -> Path:
    """The baseline without the file that it measured, with changed facts; returns its result.json."""
    folder.mkdir()
    data = json.loads((place / "old" / "result.json").read_text())
    data["rows"][0]["artifact"] = "gone.onnx"
    for key, value in changes.items():
        section, _, name = key.partition("__")
        data[section][name] = value
    (folder / "result.json").write_text(json.dumps(data))
    if detections:
        shutil.copy(place / "old" / "detections.npz", folder)
    return folder / "result.json"


def test_stored_figures_count_where_nothing_differs(place: Path, tmp_path: Path) -> None:
    baseline = moved(place, tmp_path / "old")
    result, data = gated(place, "poor.onnx", tmp_path / "new.json", baseline=baseline)
    assert result.exit_code == 3, result.output
    (pair,) = data["gate"]["pairs"]
    assert pair["how"] == "stored"
    assert pair["map"]["basis"] == "paired bootstrap over images"
    assert "does not hold what changed in between" in pair["latency"]["basis"]


def test_without_its_answers_the_baseline_is_compared_unpaired_and_that_is_said(place: Path, tmp_path: Path) -> None:
    baseline = moved(place, tmp_path / "old", detections=False)
    result, data = gated(place, "poor.onnx", tmp_path / "new.json", baseline=baseline)
    assert result.exit_code == 3, result.output
    (pair,) = data["gate"]["pairs"]
    assert "unpaired" in pair["map"]["basis"]
    assert pair["map"]["low"] < pair["map"]["change"] < pair["map"]["high"] < 0
    assert "detections.npz does not lie beside result.json" in result.stdout


@pytest.mark.parametrize(
    "change",
    [
        {"device__cpu": "another processor"},
        {"settings__threads": 7},
        {"settings__latency_images": 3},
        {"device__gpu": {"name": "a GPU"}},
        {"data__fingerprint": "0" * 64},
        {"settings__score_threshold": 0.2},
        {"settings__box_voting": 0.6},
    ],
)
def test_other_conditions_are_refused_unless_the_old_file_is_there(place: Path, tmp_path: Path, change: dict) -> None:
    baseline = moved(place, tmp_path / "old", **change)
    result, data = gated(place, "poor.onnx", tmp_path / "new.json", baseline=baseline)
    assert result.exit_code == 2, result.output
    assert not data, "nothing is measured for a comparison that cannot be made"
    assert "--baseline-files" in result.output
    found, data = gated(place, "poor.onnx", tmp_path / "new.json", "--baseline-files", place, baseline=baseline)
    assert found.exit_code == 3, found.output
    assert data["gate"]["pairs"][0]["how"] == "side by side"
    assert data["gate"]["conditions"]


def test_old_files_are_looked_for_in_folders_that_exist(place: Path, tmp_path: Path) -> None:
    result, data = gated(place, "good.onnx", tmp_path / "new.json", "--baseline-files", tmp_path / "none")
    assert result.exit_code == 2
    assert "none: there is no such folder" in result.stderr
    assert not data


def test_across_conditions_compares_and_says_so(place: Path, tmp_path: Path) -> None:
    baseline = moved(place, tmp_path / "old", device__cpu="another processor")
    result, data = gated(place, "poor.onnx", tmp_path / "new.json", "--across-conditions", baseline=baseline)
    assert result.exit_code == 3
    assert "under other conditions" in data["gate"]["pairs"][0]["latency"]["basis"]
    assert "another processor" in result.stdout


def test_a_baseline_from_before_box_voting_had_none(place: Path, tmp_path: Path) -> None:
    baseline = moved(place, tmp_path / "old")
    data = json.loads(baseline.read_text())
    assert data["settings"].pop("box_voting") is None
    baseline.write_text(json.dumps(data))
    result, data = gated(place, "good.onnx", tmp_path / "new.json", "--box-voting", 0.6, baseline=baseline)
    assert result.exit_code == 2, result.output
    assert "box_voting: none, now 0.6" in " ".join(result.output.split())
    assert not data


def test_another_runtime_is_refused(place: Path, tmp_path: Path) -> None:
    baseline = moved(place, tmp_path / "old")
    data = json.loads(baseline.read_text())
    data["rows"][0]["provider"] = "CUDAExecutionProvider"
    baseline.write_text(json.dumps(data))
    result, _ = gated(place, "poor.onnx", tmp_path / "new.json", baseline=baseline)
    assert result.exit_code == 2
    assert "provider: CUDAExecutionProvider, now CPUExecutionProvider" in result.output


def test_a_gate_that_would_compare_nothing_does_not_pass(place: Path, tmp_path: Path) -> None:
    """The very file of the baseline, on another machine: nothing was shown, unless stored figures may count."""
    baseline = moved(place, tmp_path / "old", device__cpu="another processor")
    result, data = gated(place, "good.onnx", tmp_path / "new.json", baseline=baseline)
    assert result.exit_code == 2, result.output
    assert not data
    result, data = gated(place, "good.onnx", tmp_path / "new.json", "--across-conditions", baseline=baseline)
    assert data["gate"]["pairs"][0]["how"] == "same file"
    assert "change" in data["gate"]["pairs"][0]["latency"]


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [("latency_ms", {"median": 0.01, "p90": 0.02, "samples": 20}, "latency"), ("map", {"ap50": 1.0}, "map")],
)
def test_the_baseline_s_own_figures_count(place: Path, tmp_path: Path, key: str, value: dict, part: str) -> None:
    """Where they were changed, or come from elsewhere, what lies beside them does not speak for them."""
    baseline = moved(place, tmp_path / "old")
    data = json.loads(baseline.read_text())
    data["rows"][0][key].update(value)
    baseline.write_text(json.dumps(data))
    result, data = gated(place, "good.onnx", tmp_path / "new.json", baseline=baseline)
    assert result.exit_code == 3, result.output
    assert data["gate"]["pairs"][0][part]["regressed"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-slowdown", "5%"), "--baseline"),
        (("--max-map-drop", 1), "--baseline"),
        (("--baseline", "old/result.json"), "without a limit"),
        (("--baseline", "old/result.json", "--max-slowdown", "5"), "not a share"),
        (("--baseline", "old/result.json", "--max-slowdown", "fast"), "not a share"),
        (("--baseline", "no.json", "--max-slowdown", "5%"), "no such file"),
        (("--baseline", "data/data.yaml", "--max-slowdown", "5%"), "not a readable result"),
        (("--quick", "--publish"), "exclude"),
        (("--pin", "9999"), "may not use"),
        (("--pin", "a-b"), "not a list of CPUs"),
    ],
)
def test_mistakes(
    place: Path, tmp_path: Path, options: tuple[object, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    result = bench(place, "good.onnx", out=tmp_path / "r.json", options=options)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    ("place_of", "value", "says"),
    [
        (("device",), None, "no device"),
        (("settings",), None, "no settings"),
        (("data",), [], "no data"),
        (("files",), "x", "files is no mapping"),
        (("device", "versions"), 3, "device.versions is no mapping"),
        (("settings", "affinity"), 3, "settings.affinity is no list"),
        (("rows",), [], "no rows"),
        (("rows",), ["a"], "row 1 is no mapping"),
        (("rows", 0, "sha256"), None, "row 1: no sha256"),
        (("rows", 0, "latency_ms"), None, "row 1: latency_ms.median is no time"),
        (("rows", 0, "latency_ms", "median"), float("nan"), "row 1: latency_ms.median is no time"),
        (("rows", 0, "latency_ms", "median"), 0, "row 1: latency_ms.median is no time"),
        (
            ("rows", 0, "latency_ms", "median_interval"),
            [1, float("nan")],
            "row 1: latency_ms.median_interval is no interval",
        ),
        (("rows", 0, "map"), {}, "row 1: map.ap50 is no accuracy"),
        (("rows", 0, "map", "ap50"), float("nan"), "row 1: map.ap50 is no accuracy"),
        (("rows", 0, "map", "ap50_interval"), ["a"], "row 1: map.ap50_interval is no interval"),
    ],
)
def test_a_damaged_baseline_is_refused_before_anything_is_measured(
    place: Path, tmp_path: Path, place_of: tuple[str | int, ...], value: object, says: str
) -> None:
    baseline = moved(place, tmp_path / "old")
    data = inner = json.loads(baseline.read_text())
    for key in place_of[:-1]:
        inner = inner[key]
    inner[place_of[-1]] = value
    baseline.write_text(json.dumps(data))
    result, written = gated(place, "poor.onnx", tmp_path / "new.json", baseline=baseline)
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.split())
    assert not written


def test_a_baseline_of_an_ensemble_alone(place: Path, tmp_path: Path) -> None:
    baseline = moved(place, tmp_path / "old")
    data = json.loads(baseline.read_text())
    data["rows"][0]["role"] = "ensemble"
    baseline.write_text(json.dumps(data))
    result, _ = gated(place, "poor.onnx", tmp_path / "new.json", baseline=baseline)
    assert result.exit_code == 2
    assert "a row of one detector" in result.output


def test_samples_that_are_no_numbers_are_not_the_baseline_s(place: Path, tmp_path: Path) -> None:
    baseline = moved(place, tmp_path / "old")
    file = baseline.parent / "detections.npz"
    found = read_saved(file)
    save(file, replace(found, rows=(replace(found.rows[0], stages_ms=np.full_like(found.rows[0].stages_ms, np.nan)),)))
    data = json.loads(baseline.read_text())
    data["files"]["detections_sha256"] = sha256_file(file)
    baseline.write_text(json.dumps(data))
    assert "does not hold the samples" in str(read_baseline(baseline).missing)


def test_nothing_of_the_baseline_is_overwritten(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "old")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    options = ("--baseline", "result.json", "--max-slowdown", "5%")
    assert bench(place, "student.onnx", out=Path("result.json"), options=options).exit_code == 2
    shutil.copy("result.json", "main.json")  # its answers still lie in detections.npz
    again = ("--baseline", "main.json", "--max-slowdown", "500%")
    assert bench(place, "student.onnx", out=Path("result.json"), options=again).exit_code == 2
    assert bench(place, "student.onnx", out=Path("new.json"), options=again).exit_code == 0
    assert all(path.read_bytes() == data for path, data in before.items())
    assert Path("new.detections.npz").is_file()


def judged(
    folder: Path, new: dict, old: dict, limits: Limits, *, again: bool, stored: bool = True
) -> tuple[dict, dict]:
    """What the gate says of two rows {"times": round medians in ms, "answers": detections}: (latency, map)."""
    dataset = make_dataset(folder)
    kept, rows = [], []
    for name, one in (("student", new), ("student (baseline)", old)):
        samples = np.repeat(np.array(one["times"], float), 6).reshape(-1, 2, 3) / 3
        kept.append(SavedRow(name, one["answers"], samples, {}))
        ap50 = evaluate(dataset.records, one["answers"], dataset.class_names).ap50
        latency = {"median": float(np.median(one["times"])), "median_interval": one.get("interval_ms")}
        figures = {"ap50": one.get("ap50", ap50), "ap50_interval": one.get("interval")}
        rows.append({"name": name, "latency_ms": latency, "map": figures})
    before = {**rows[1], "name": "student"}
    saved = Saved((), dataset.class_names, (replace(kept[1], name="student"),)) if stored else None
    baseline = Baseline(Path("old.json"), {"rows": [before], "device": {}}, saved, None)
    pair = Pair("student", before, rows[1]["name"] if again else None, False)
    gate = Gate(baseline, limits, (pair,), (), (), (), False, ())
    found = judge(
        gate, {"rows": rows, "device": {"versions": {}}}, Saved((), dataset.class_names, tuple(kept)), dataset
    )
    (one,) = found["pairs"]
    assert found["passed"] is not (one["latency"]["regressed"] or one["map"]["regressed"])
    return one["latency"], one["map"]


def whole(folder: Path, without: tuple[int, ...] = ()) -> list[Detections]:
    """Every object is found, but for the first of these images'."""
    records = make_dataset(folder).records
    found = [Detections(r.boxes_xyxy, np.full(len(r.labels), 0.9, np.float32), r.labels) for r in records]
    return [f.take(f.labels != 0) if i in without else f for i, f in enumerate(found)]


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize(
    ("times", "regressed"),
    [
        ([11.0] * 10, True),
        ([10.4] * 10, False),
        ([10.0] * 5 + [12.0] * 5, False),  # 10 % slower in the median, but what varies reaches from 0 to 20
        ([9.0] * 10, False),
    ],
)
def test_a_slowdown_fails_only_with_its_whole_interval(
    tmp_path: Path, times: list[float], regressed: bool, again: bool
) -> None:
    answers = whole(tmp_path)
    old = {"times": [10.0] * 10, "answers": answers}
    latency, accuracy = judged(tmp_path, {"times": times, "answers": answers}, old, Limits(0.05, 0.005), again=again)
    assert latency["regressed"] is regressed
    assert latency["change"] == pytest.approx(np.median(times) / 10)
    assert (accuracy["change"], accuracy["regressed"]) == (0.0, False)


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize(("lost", "regressed"), [((), False), ((3,), False), (tuple(range(9)), True)])
def test_a_loss_fails_only_with_its_whole_interval(
    tmp_path: Path, lost: tuple[int, ...], regressed: bool, again: bool
) -> None:
    now, before = ({"times": [10.0] * 4, "answers": whole(tmp_path, without)} for without in (lost, ()))
    for new, old, sign in ((now, before, -1), (before, now, 1)):
        _, accuracy = judged(tmp_path, new, old, Limits(None, 0.005), again=again)
        assert accuracy["regressed"] is (regressed and sign < 0)
        assert sign * accuracy["change"] >= (
            0.02 if lost else 0.0
        )  # one image alone is over the limit, not its interval


def test_stored_figures_alone_are_compared_end_against_end(tmp_path: Path) -> None:
    answers = whole(tmp_path)
    new = {"times": [11.0] * 4, "answers": answers, "interval_ms": [10.8, 11.2], "ap50": 0.6, "interval": [0.5, 0.65]}
    old = {"times": [10.0] * 4, "answers": answers, "interval_ms": [9.8, 10.2], "ap50": 0.7, "interval": [0.66, 0.78]}
    for slower, worse, regressed in ((0.05, 0.03, True), (0.06, 0.04, False)):
        latency, accuracy = judged(tmp_path, new, old, Limits(slower, worse), again=False, stored=False)
        assert (latency["change"], latency["low"], latency["high"]) == pytest.approx((1.1, 10.8 / 10.2, 11.2 / 9.8))
        ends = -0.1 - np.hypot(0.1, 0.08), -0.1 + np.hypot(0.05, 0.04)
        assert (accuracy["change"], accuracy["low"], accuracy["high"]) == pytest.approx((-0.1, *ends), abs=1e-5)
        assert (latency["regressed"], accuracy["regressed"]) == (regressed, regressed)
