"""The parity gate, and `export_run` from a checkpoint to files that passed it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import edgekd.checkpoint
import edgekd.export.job
from edgekd.checkpoint import save_detector
from edgekd.data import read_dataset
from edgekd.data.scenes import make_scenes
from edgekd.errors import ArtifactError, DataError, ParityError, UserError
from edgekd.export import ExportData, export_run
from edgekd.export.float16 import to_float16
from edgekd.export.gate import MapMeter, make_gate
from edgekd.export.graph import copy_of, metadata_of, open_session
from edgekd.export.job import complete_path
from edgekd.export.lint import INT8_KEY, lint_qdq
from edgekd.export.parity import TOLERANCES, compare, match_detections, onnx_run, torch_run, with_map, worst_layer
from edgekd.recipe import ExportConfig
from edgekd.selection import Selection
from edgekd.types import Detections, PreprocessSpec
from tests.bench_doubles import make_dataset
from tests.export_double import ToyDetector, traced

IMAGES = [np.random.default_rng(seed).normal(size=(1, 3, 64, 64)).astype(np.float32) for seed in range(3)]
NAMES = ["one.png", "two.png", "three.png"]


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([], [], (0, 0)),
        ([(0, 0, 10, 10, 0.9, 1)], [(0, 0, 10, 10, 0.8, 1)], (2, 2)),
        ([(0, 0, 10, 10, 0.9, 1)], [(0, 0, 10, 10, 0.8, 2)], (2, 0)),  # another class
        ([(0, 0, 10, 10, 0.9, 1)], [(5, 0, 15, 10, 0.8, 1)], (2, 0)),  # elsewhere
        ([(0, 0, 10, 10, 0.31, 1)], [(0, 0, 10, 10, 0.25, 1)], (1, 1)),  # a partner just below the line
        ([(0, 0, 10, 10, 0.9, 1)], [], (1, 0)),  # lost
        ([], [(0, 0, 10, 10, 0.9, 1)], (1, 0)),  # invented
    ],
)
def test_matching(one, other, expected):
    assert match_detections(detections(*one), detections(*other), 0.9) == expected


def fixed(boxes: np.ndarray, scores: np.ndarray):
    return lambda image: {"boxes": boxes[None], "scores": scores[None]}


BOXES = np.float32([[0, 0, 100, 100], [50, 50, 60, 60], [20, 20, 200, 40]])
SCORES = np.float32([[0.9, 0.1], [0.2, 0.8], [0.01, 0.02]])


def judge(boxes: np.ndarray = BOXES, scores: np.ndarray = SCORES, precision: str = "fp32"):
    return compare(
        fixed(BOXES, SCORES),
        fixed(boxes, scores),
        IMAGES[:2],
        NAMES[:2],
        precision=precision,
        against="torch",
        thresholds=Selection(),
    )


def test_equal_outputs_pass():
    report = judge()
    assert report.ok
    assert (report.images, report.confident, report.matched) == (2, 8, 8)
    report.check()
    json.dumps(report.to_dict(), allow_nan=False)


def changed(values: np.ndarray, index: tuple[int, int], by: float) -> np.ndarray:
    values = values.copy()
    values[index] += by
    return values


@pytest.mark.parametrize(
    ("precision", "difference", "named"),
    [
        ("fp32", {"scores": changed(SCORES, (2, 1), 0.01)}, r"scores\[2, 1\] of one.png"),
        ("fp32", {"boxes": changed(BOXES, (1, 3), 0.5)}, r"boxes\[1, 3\] of one.png"),
        ("fp32", {"scores": changed(SCORES, (0, 0), np.nan)}, r"scores\[0, 0\] of one.png: nan"),
        ("fp16", {"scores": changed(SCORES, (0, 1), 0.2)}, r"scores\[0, 1\]"),
        ("int8", {"boxes": changed(BOXES, (1, 2), 9)}, "confident detections"),
        ("int8", {"scores": changed(SCORES, (0, 0), np.inf)}, r"scores\[0, 0\]"),
    ],
)
def test_differences_beyond_tolerance_fail_and_are_named(precision: str, difference: dict, named: str):
    report = judge(precision=precision, **difference)
    assert not report.ok
    with pytest.raises(ParityError, match=named):
        report.check()


@pytest.mark.parametrize(
    ("precision", "difference"),
    [
        ("fp32", {"scores": changed(SCORES, (2, 1), 1e-4), "boxes": changed(BOXES, (0, 0), 0.01)}),
        ("fp16", {"scores": changed(SCORES, (2, 1), 0.01), "boxes": changed(BOXES, (0, 0), 0.5)}),
        ("int8", {"scores": changed(SCORES, (2, 1), 0.2), "boxes": changed(BOXES, (0, 0), 8)}),
    ],
)
def test_differences_within_tolerance_pass(precision: str, difference: dict):
    assert judge(precision=precision, **difference).ok


@pytest.mark.parametrize(
    ("precision", "lost", "budget", "ok"),
    [("int8", 0.009, 1.0, True), ("int8", 0.011, 1.0, False), ("int8", -0.05, 0.0, True), ("fp32", 0.002, 1.0, False)],
)
def test_map_budget(precision: str, lost: float, budget: float, ok: bool):
    report = with_map(judge(precision=precision), 0.8, 0.8 - lost, 50, budget)
    assert report.ok is ok
    assert report.map_images == 50
    if not ok:
        with pytest.raises(ParityError, match=f"{100 * lost:.2f} AP50 points lost on 50 images"):
            report.check()


def test_scores_that_change_places_by_rounding_fail_no_export(tmp_path: Path):
    """As of a student that has hardly been trained: 24 objects on 12 images, and no score above 0.0051."""
    dataset = make_dataset(tmp_path, images=12)
    meter = MapMeter(dataset, PreprocessSpec((64, 64)), Selection())
    objects = [sum(record.labels.tolist().count(label) for record in dataset.records) for label in (0, 1)]
    assert meter.one_object == pytest.approx(100 / (2 * min(objects)))
    lost = 0.9 * meter.one_object / 100
    assert not with_map(judge(), 0.5, 0.5 - lost, 12, 1.0).ok
    assert with_map(judge(), 0.5, 0.5 - lost, 12, 1.0, meter.one_object).ok
    assert not with_map(judge(), 0.5, 0.5 - 2 * lost, 12, 1.0, meter.one_object).ok
    assert not with_map(judge(precision="int8"), 0.5, 0.5 - lost, 12, 1.0, meter.one_object).ok, (
        "a budget is the user's"
    )


def test_images_without_objects_measure_no_map(tmp_path: Path):
    detector, dataset = ToyDetector(), make_dataset(tmp_path, images=2)
    empty = tuple(
        replace(record, **{name: getattr(record, name)[:0] for name in ("boxes_xyxy", "labels", "difficult", "crowd")})
        for record in dataset.records
    )
    dataset = replace(dataset, class_names=detector.spec.class_names, records=empty)
    gate = make_gate(detector, dataset, Selection(), 1.0)
    assert gate.meter is None
    assert gate.notes == ["mAP was not compared: there is no object on the images to compare on"]


def test_another_shape_is_an_error():
    with pytest.raises(ParityError, match="shape"):
        judge(boxes=BOXES[:2], scores=SCORES[:2])


def spoil(model: onnx.ModelProto, position: int, factor: float) -> str:
    """Scale one convolution's weights; returns the name of its output."""
    conv = [node for node in model.graph.node if node.op_type == "Conv"][position]
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == conv.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    return conv.output[0]


def test_worst_layer_is_found():
    detector = ToyDetector()
    reference = traced(detector)
    broken = copy_of(reference)
    tensor = spoil(broken, 2, 3.0)
    worst = worst_layer(reference, broken, IMAGES[0])
    assert worst is not None
    assert worst[0] == tensor
    report = compare(
        torch_run(detector), onnx_run(broken), IMAGES, NAMES, precision="fp32", against="torch", thresholds=Selection()
    )
    assert not report.ok


def test_the_reference_leaves_the_detector_in_its_mode():
    detector = ToyDetector().train()
    torch_run(detector)(IMAGES[0])
    assert detector.training


# -- export_run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ExportData:
    root = make_scenes(tmp_path_factory.mktemp("scenes") / "set", counts={"train": 6, "val": 4}, image_hw=(96, 128))
    return ExportData(read_dataset(root, "train"), read_dataset(root, "val"))


@pytest.fixture(scope="module")
def toy() -> ToyDetector:
    return ToyDetector()


@pytest.fixture
def checkpoint(tmp_path: Path, toy: ToyDetector, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with the toy in it; tracing, which takes seconds, is done once."""
    monkeypatch.setattr(edgekd.checkpoint, "build_detector", lambda spec: ToyDetector())
    monkeypatch.setattr(edgekd.export.job, "trace", traced)
    folder = tmp_path / "run"
    save_detector(folder / "model.pt", toy, {"seed": 3, "metrics": {"ap50": 0.5}})
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


LOOSE = ExportConfig(map_budget=100.0, calibration_images=4)
"""The toy is untrained: what is tested here is the road, not the detector."""


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained toy answers with hundreds of boxes near the line; int8 moves many across it."""
    monkeypatch.setitem(TOLERANCES, "int8", replace(TOLERANCES["int8"], matched=0.3))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.usefixtures("lenient")
def test_export_run(checkpoint: Path, data: ExportData, tmp_path: Path, precision: str):
    out = tmp_path / "out" / f"toy.{precision}.onnx"
    said: list[str] = []
    config = LOOSE.model_copy(update={"nms": True})
    result = export_run(checkpoint, out, precision=precision, config=config, data=data, say=said.append)
    assert files(out.parent) == [f"toy.{precision}.nms.onnx", f"toy.{precision}.onnx"]
    assert (result.path, result.complete) == (out, complete_path(out))
    assert [report.precision for report in result.parity] == (["fp32"] if precision == "fp32" else ["fp32", precision])
    assert all(
        report.ok and report.images == len(data.train or ()) and not report.generated for report in result.parity
    )
    metadata = metadata_of(onnx.load(out))
    assert metadata["edgekd.precision"] == precision
    assert json.loads(metadata["edgekd.provenance"])["run"] == {"seed": 3, "metrics": {"ap50": 0.5}}
    assert str(tmp_path) not in json.dumps(metadata)
    assert len(json.loads(metadata["edgekd.parity"])) == len(result.parity)
    assert json.loads(metadata_of(onnx.load(result.complete))["edgekd.output"]) == {"kind": "detections"}
    json.dumps(result.to_dict(), allow_nan=False)
    assert said
    if precision == "int8":
        assert lint_qdq(onnx.load(out)) == []
        assert json.loads(metadata[INT8_KEY])["calibration_images"] == 4


@pytest.mark.usefixtures("lenient")
def test_target_is_recorded(checkpoint: Path, data: ExportData, tmp_path: Path):
    out = tmp_path / "t.onnx"
    config = LOOSE.model_copy(update={"target": "tensorrt"})
    result = export_run(checkpoint, out, precision="int8", config=config, data=data)
    assert result.target == "tensorrt"
    assert metadata_of(onnx.load(out))["edgekd.target"] == "tensorrt"
    assert lint_qdq(onnx.load(out), "tensorrt") == []


def test_without_data_generated_scenes_serve_and_it_says_so(checkpoint: Path, tmp_path: Path):
    result = export_run(checkpoint, tmp_path / "toy.onnx")
    assert result.parity[0].generated
    assert any("generated scenes" in note for note in result.notes)
    with pytest.raises(DataError, match="calibrate"):
        export_run(checkpoint, tmp_path / "int8.onnx", precision="int8")
    assert files(tmp_path) == ["toy.onnx"]


def test_a_failing_gate_leaves_nothing_and_names_the_worst(
    checkpoint: Path, toy: ToyDetector, data: ExportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = traced(toy)
    spoil(broken, 1, 1.5)
    monkeypatch.setattr(edgekd.export.job, "trace", lambda *_, **__: broken)
    out = tmp_path / "out" / "toy.onnx"
    with pytest.raises(ParityError, match=r"(boxes|scores)\[\d+, \d\] of .*\.png") as caught:
        export_run(checkpoint, out, data=data)
    assert caught.value.exit_code == 1
    assert not out.parent.exists() or files(out.parent) == []


def test_a_failing_conversion_names_the_layer_and_keeps_the_old_file(
    checkpoint: Path, data: ExportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = edgekd.export.job.to_float16

    def broken(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
        half = original(model, kept)
        for tensor in half.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT16 and len(tensor.dims) == 4:
                value = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array((value * 4).astype(np.float16), tensor.name))
        return half

    for module in ("job", "sensitivity"):
        monkeypatch.setattr(f"edgekd.export.{module}.to_float16", broken)
    out = tmp_path / "toy.onnx"
    out.write_text("from yesterday")
    with pytest.raises(ParityError, match="part most at tensor"):
        export_run(checkpoint, out, precision="fp16", config=LOOSE, data=data)
    assert out.read_text() == "from yesterday"
    assert files(tmp_path) == ["toy.onnx"]


def test_what_float16_cannot_hold_stays_float32(checkpoint: Path, data: ExportData, tmp_path: Path):
    """The pointwise convolution gives out 200,000 and has a bias of 86,000; what `down` reads overflows too."""
    large = ToyDetector()
    with torch.no_grad():
        for tensor in (large.pointwise[1].weight, large.pointwise[1].bias):
            tensor *= 2e4
        large.down[0].weight /= 2e4
    save_detector(checkpoint / "model.pt", large, {})
    result = export_run(checkpoint, tmp_path / "toy.onnx", precision="fp16", config=LOOSE, data=data)
    (note,) = [note for note in result.notes if "float32" in note]
    assert note.startswith("2 convolutions stay in float32")
    kinds = [tensor.data_type for tensor in onnx.load(result.path).graph.initializer if len(tensor.dims) == 4]
    assert sorted(kinds) == sorted([onnx.TensorProto.FLOAT] * 2 + [onnx.TensorProto.FLOAT16] * 4)
    assert result.parity[-1].ok


def test_a_value_that_overflows_float16_is_found_though_this_cpu_would_not(toy: ToyDetector, data: ExportData):
    """ONNX Runtime computes float16 in float32 on a CPU; a GPU would give out infinities."""
    base = traced(toy)
    half = to_float16(base)
    gate = make_gate(toy, data.for_parity, Selection(), 100.0)
    gate.against_fp32(base, half, "fp16", None)
    conv = next(node for node in base.graph.node if node.op_type == "Conv" and "pointwise" in node.input[1])
    gate._peaks[conv.output[0]] = 70_000.0
    with pytest.raises(ParityError, match=f"tensor {conv.output[0]} reaches 70000, and float16 no more than 65504"):
        gate.against_fp32(base, half, "fp16", None)


def test_nms_that_differs_is_an_error(
    checkpoint: Path, data: ExportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = edgekd.export.job.detections_form
    other = Selection(nms_iou=0.2)
    monkeypatch.setattr(edgekd.export.job, "detections_form", lambda model, _: original(model, other))
    with pytest.raises(ParityError, match="NMS inside"):
        export_run(checkpoint, tmp_path / "toy.onnx", config=ExportConfig(nms=True), data=data)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["toy.pt", "toy", "toy.onnx/"])
def test_out_has_to_be_an_onnx_file(checkpoint: Path, tmp_path: Path, name: str):
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"\.onnx"):
        export_run(checkpoint, tmp_path / name)


def test_no_detector_at_the_source(tmp_path: Path):
    with pytest.raises(ArtifactError):
        export_run(tmp_path / "nowhere", tmp_path / "toy.onnx")


def test_other_classes_are_compared_without_map(checkpoint: Path, data: ExportData, tmp_path: Path):
    assert data.val is not None
    other = replace(data.val, class_names=("a", "b", "c", "d"))
    result = export_run(checkpoint, tmp_path / "toy.onnx", data=ExportData(None, other))
    assert result.parity[0].ap50 is None
    assert any("classes" in note for note in result.notes)


def test_the_runs_own_data_is_used(checkpoint: Path, data: ExportData, tmp_path: Path):
    assert data.train is not None
    recipe = {"name": "toy", "data": {"root": str(data.train.root)}, "student": {"model": "yolo-nano"}}
    (checkpoint / "recipe.yaml").write_text(json.dumps(recipe))
    result = export_run(checkpoint, tmp_path / "toy.onnx")
    assert not result.parity[0].generated
    assert result.parity[0].ap50 is not None or result.notes
    recipe["data"]["root"] = str(tmp_path / "gone")
    (checkpoint / "recipe.yaml").write_text(json.dumps(recipe))
    result = export_run(checkpoint, tmp_path / "toy.onnx")
    assert result.parity[0].generated
    assert any("cannot be used" in note for note in result.notes)


def test_exported_file_runs_alone(checkpoint: Path, data: ExportData, tmp_path: Path):
    export_run(checkpoint, tmp_path / "toy.onnx", data=data)
    boxes, scores = open_session((tmp_path / "toy.onnx").read_bytes()).run(None, {"images": IMAGES[0]})
    with torch.no_grad():
        assert boxes.shape == (1, 512, 4)
    assert scores.shape == (1, 512, 3)
