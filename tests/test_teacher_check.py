from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edgekd.bench.entries import BenchArtifact
from edgekd.cli import app
from edgekd.cli.bench_entries import doubts
from edgekd.errors import UserError
from edgekd.recipe import ModuleTeacher, OnnxTeacher
from edgekd.runtimes.output_format import OutputFormat
from edgekd.teacher_check import (
    _better,
    called_otherwise,
    check_reading,
    examine,
    other_colours,
    other_forms,
    other_sizes,
    to_declare,
)
from edgekd.teachers import build_teacher
from edgekd.types import Dataset, Detections, ImageRecord, PreprocessSpec
from tests.data_layouts import make_voc
from tests.toy_onnx import write_constant_detector

BOX = (8.0, 8.0, 40.0, 40.0)


def labelled(root: Path, label: int = 0, count: int = 10) -> Dataset:
    """Black pictures, each with the same white square."""
    none = np.zeros(1, np.bool_)
    records = []
    for index in range(count):
        image = np.zeros((64, 64, 3), np.uint8)
        image[8:40, 8:40] = 255
        path = root / f"{index}.png"
        cv2.imwrite(str(path), image)
        records.append(
            ImageRecord(f"{index}", path, (64, 64), np.array([BOX], np.float32), np.array([label]), none, none)
        )
    return Dataset(root, "voc", "train", ("square", "ring"), tuple(records))


def detector_file(path: Path, below: float, box: tuple[float, ...] = BOX) -> Path:
    """A detector that is sure of `box` where its darkest pixel lies below `below`, and otherwise of a corner."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, kinds = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    constants = {
        "limit": np.array(below, np.float32),
        "both": np.array([[box, (50, 50, 60, 60)]], np.float32),
        "seen": np.array([[[0.9, 0.0], [0.3, 0.0]]], np.float32),
        "missed": np.array([[[0.1, 0.0], [0.8, 0.0]]], np.float32),
    }
    nodes = [
        helper.make_node("ReduceMin", ["images"], ["darkest"], keepdims=0),
        helper.make_node("Less", ["darkest", "limit"], ["right"]),
        helper.make_node("Where", ["right", "seen", "missed"], ["scores"]),
        helper.make_node("Identity", ["both"], ["boxes"]),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", kinds.FLOAT, [1, 3, 64, 64])],
        [
            helper.make_tensor_value_info("boxes", kinds.FLOAT, [1, 2, 4]),
            helper.make_tensor_value_info("scores", kinds.FLOAT, [1, 2, 2]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


def check(dataset: Dataset, config: OnnxTeacher, folder: Path) -> tuple[list[str], list[str]]:
    teacher = build_teacher(config, dataset.class_names)
    try:
        found = check_reading(dataset, config, teacher, {"sha256": config.onnx}, folder, "data")
        return ([], [found["says"]]) if found["doubtful"] else ([found["says"]], [])
    finally:
        teacher.close()


def config_of(path: Path, **declared: object) -> OnnxTeacher:
    fixed = {"class_names": ("square", "ring"), "box_format": "xyxy", "resize": "stretch"}
    return OnnxTeacher(name="t", onnx=str(path), **{**fixed, **declared})


def test_a_teacher_that_wants_other_pixels_is_found_out(tmp_path: Path) -> None:
    dataset = labelled(tmp_path)
    path = detector_file(
        tmp_path / "t.onnx", below=-1.5
    )  # black is -2.1 by ImageNet's mean and std, -1 in the symmetric scale
    notes, warnings = check(dataset, config_of(path), tmp_path / "answers")
    assert not notes
    assert len(warnings) == 1
    assert "AP50 50" in warnings[0]
    assert "but 100.0 with `mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]`" in warnings[0]


def test_a_teacher_declared_wrongly_is_found_out_too(tmp_path: Path) -> None:
    path = detector_file(tmp_path / "t.onnx", below=-1.5)
    config = config_of(path, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    _, warnings = check(labelled(tmp_path), config, tmp_path / "answers")
    assert "ImageNet" in warnings[0] or "0.485" in warnings[0]


def test_a_teacher_read_rightly_is_left_in_peace(tmp_path: Path) -> None:
    path = detector_file(tmp_path / "t.onnx", below=-1.5)
    config = config_of(path, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    notes, warnings = check(labelled(tmp_path), config, tmp_path / "answers")
    assert not warnings
    assert notes == [
        "teacher t: AP50 100.0 on 10 of the images of train; 9 other ways to prepare its pictures do no better"
    ]


def test_a_slow_teacher_is_tried_on_pictures_from_all_over_a_sorted_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = labelled(tmp_path, count=60)
    elsewhere = np.array([(50, 50, 60, 60)], np.float32)
    later = tuple(replace(record, boxes_xyxy=elsewhere) for record in dataset.records[32:])
    monkeypatch.setattr("edgekd.teacher_check.SECONDS", 0.0)
    path = detector_file(tmp_path / "t.onnx", below=10.0)
    notes, warnings = check(
        replace(dataset, records=dataset.records[:32] + later), config_of(path), tmp_path / "answers"
    )
    (said,) = notes + warnings
    assert "on 8 of the images" in said
    assert "AP50 100" not in said, "only the first pictures were looked at"


def test_a_teacher_that_agrees_with_nothing_is_named(tmp_path: Path) -> None:
    path = detector_file(tmp_path / "t.onnx", below=10.0, box=(44.0, 0.0, 60.0, 16.0))
    _, warnings = check(labelled(tmp_path), config_of(path), tmp_path / "answers")
    assert "agrees with hardly any label: AP50 0.0 on 10 of the images of train" in warnings[0]


def test_a_class_that_no_picture_shows_proves_nothing(tmp_path: Path) -> None:
    path = detector_file(tmp_path / "t.onnx", below=10.0)
    config = config_of(path, class_names=("ring", "other"))
    notes, warnings = check(labelled(tmp_path), config, tmp_path / "answers")
    assert not warnings
    assert notes == ["teacher t: no image shows a class that it knows"]


class Adapter:
    """Finds the square, and says so in boxes of another format."""

    preprocess = PreprocessSpec((64, 64), "stretch", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    class_names = ("square", "ring")
    box = BOX

    def __call__(self, images: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.array([self.box], np.float32), np.array([[0.9, 0.0]], np.float32)) for _ in images]


@pytest.mark.parametrize(
    ("box", "says"),
    [
        (BOX, "AP50 100.0 on 10 of the images of train"),
        ((24.0, 24.0, 32.0, 32.0), "but 100.0 where they are read as cxcywh; its adapter must give them as xyxy"),
        ((0.125, 0.125, 0.625, 0.625), "but 100.0 where they are read as xyxy-normalised"),
        ((44.0, 0.0, 60.0, 16.0), "agrees with hardly any label"),
    ],
)
def test_boxes_of_a_module_that_are_no_corners_in_pixels_are_found_out(
    box: tuple[float, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "box", box)
    dataset = labelled(tmp_path)
    teacher = build_teacher(ModuleTeacher(name="t", module=f"{__name__}:Adapter"), dataset.class_names)
    assert says in examine(dataset, "teacher t", teacher.predictor, teacher.known, searched=False)["says"]


def test_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, config = labelled(tmp_path), config_of(detector_file(tmp_path / "t.onnx", below=10.0))
    first = check(dataset, config, tmp_path / "answers")

    def never(*_: object, **__: object) -> None:
        raise UserError("examined again")

    monkeypatch.setattr("edgekd.teacher_check.examine", never)
    assert check(dataset, config, tmp_path / "answers") == first
    with pytest.raises(UserError, match="again"):
        check(dataset, config_of(Path(config.onnx), resize="letterbox"), tmp_path / "elsewhere")


def test_every_other_reading_differs_from_the_present_one() -> None:
    now = PreprocessSpec((64, 64), "letterbox", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    others = [*other_colours(now), *other_sizes(now)]
    assert len({now, *others}) == 10
    assert {spec.channels for spec in others} == {"rgb", "bgr"}
    declared = [to_declare(spec, now) for spec in others]
    assert "channels: bgr, mean: [0.406, 0.456, 0.485], std: [0.003922, 0.003922, 0.003922]" in declared
    assert declared[-2:] == ["resize: stretch", "resize: letterbox-corner"]


def test_bench_doubts_foreign_files_alone_and_each_once(tmp_path: Path, checkpoint: Path) -> None:
    dataset, path = labelled(tmp_path), detector_file(tmp_path / "wrong.onnx", below=-1.5)
    right = config_of(path, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    entry = BenchArtifact(path, "wrong", options=config_of(path))
    (found,) = doubts(
        [entry, BenchArtifact(path, "again", options=config_of(path)), BenchArtifact(checkpoint, "ours")], dataset
    )
    assert found.startswith("wrong may be read wrongly: AP50 50")
    assert doubts([BenchArtifact(path, "right", options=right)], dataset) == []


@pytest.mark.parametrize("quick", [False, True])
def test_bench_says_so_unless_it_is_to_be_quick(tmp_path: Path, quick: bool) -> None:
    make_voc(tmp_path / "data", {"val": {f"p{index}": [("square", (7, 6, 30, 30))] for index in range(10)}})
    # (6, 5, 30, 30) counted from 0, in a picture of 40 x 60 that is stretched to 64 x 64
    path = detector_file(
        tmp_path / "wrong.onnx", below=-1.5, box=(6 * 64 / 60, 5 * 64 / 40, 30 * 64 / 60, 30 * 64 / 40)
    )
    options = [
        "--classes",
        "square,ring",
        "--declare",
        "box_format=xyxy",
        "--declare",
        "resize=stretch",
        "--threads",
        "1",
    ]
    where = ["--data", tmp_path / "data", "--split", "val", "--out", tmp_path / "result.json", "--samples", "20"]
    given = ["bench", path, *options, *where, "--warmup", "0", *(["--quick"] if quick else [])]
    result = CliRunner().invoke(app, [str(argument) for argument in given])
    assert result.exit_code == 0, result.output
    assert ("wrong may be read wrongly" in result.output) is not quick


def test_names_in_another_order_are_found_out(tmp_path: Path) -> None:
    path = detector_file(tmp_path / "t.onnx", below=10.0)
    _, warnings = check(labelled(tmp_path), config_of(path, class_names=("ring", "square")), tmp_path / "answers")
    assert "teacher t may have its classes wrong: AP50 0.0 on 10 of the images of train" in warnings[0]
    assert "of the 10 objects labelled square that it finds it calls 10 ring" in warnings[0]


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        ([1, 1, 1, 1, 1, 1], "of the 6 objects labelled square that it finds it calls 6 ring"),
        ([1, 1, 1, 1, 1, 0], "of the 6 objects labelled square that it finds it calls 5 ring"),
        ([1, 1, 1, 1, 0, 0], ""),
        ([1, 1, 1, 1], ""),
        ([], ""),
    ],
)
def test_what_most_of_a_class_is_taken_for(calls: list[int], says: str, tmp_path: Path) -> None:
    records = labelled(tmp_path, count=len(calls)).records
    boxes = np.array([BOX, BOX, (50, 50, 60, 60)], np.float32)
    found = [
        Detections(boxes, np.array([0.9, 0.8, 0.7], np.float32), np.array([label, 1 - label, 1])) for label in calls
    ]
    assert called_otherwise(records, found, ("square", "ring"), {0, 1}) == says
    assert called_otherwise(records, found, ("square", "ring"), {1}) == "", "a class that it does not know"
    doubtful = [replace(detections, scores=detections.scores * 0.2) for detections in found]
    assert called_otherwise(records, doubtful, ("square", "ring"), {0, 1}) == ""


@pytest.mark.parametrize(
    ("box", "first", "declared", "word"),
    [
        ((4.0, 8.0, 44.0, 20.0), 1, {"background": "none"}, "background: first"),
        ((8.0, 4.0, 20.0, 44.0), 0, {"background": "none"}, "box_format: yxyx"),
    ],
    ids=["labels from 1", "y before x"],
)
def test_outputs_read_wrongly_are_found_out(
    box: tuple[float, ...], first: int, declared: dict[str, str], word: str, tmp_path: Path
) -> None:
    """Pictures with a wide square each; the detector says its box, in labels or axes that nobody told edgekd."""
    dataset = labelled(tmp_path)
    wide = np.array([[4.0, 8.0, 44.0, 20.0]], np.float32)
    dataset = replace(dataset, records=tuple(replace(record, boxes_xyxy=wide) for record in dataset.records))
    arrays = {
        "boxes": np.array([box], np.float32),
        "scores": np.array([0.9], np.float32),
        "labels": np.array([first], np.int64),
    }
    path = write_constant_detector(tmp_path / "t.onnx", arrays, (1, 3, 64, 64))
    config = OnnxTeacher(name="t", onnx=str(path), class_names=("square", "ring"), resize="stretch", **declared)
    _, warnings = check(dataset, config, tmp_path / "answers")
    assert f"AP50 0.0 on 10 of the images of train, but 100.0 with `{word}`" in warnings[0]


def test_pixels_and_outputs_read_wrongly_are_found_out_at_once(tmp_path: Path) -> None:
    dataset = labelled(tmp_path)
    wide = np.array([[4.0, 8.0, 44.0, 20.0]], np.float32)
    dataset = replace(dataset, records=tuple(replace(record, boxes_xyxy=wide) for record in dataset.records))
    path = detector_file(tmp_path / "t.onnx", below=-1.5, box=(8.0, 4.0, 20.0, 44.0))  # y before x, ImageNet's scale
    _, warnings = check(dataset, config_of(path), tmp_path / "answers")
    both = "`mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], box_format: yxyx`"
    assert f"AP50 0.0 on 10 of the images of train, but 100.0 with {both}" in warnings[0]
    alone = config_of(path, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    _, warnings = check(dataset, alone, tmp_path / "again")
    assert "but 100.0 with `box_format: yxyx`" in warnings[0]


def test_the_least_change_that_agrees_is_named() -> None:
    now = PreprocessSpec((64, 64), "letterbox", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    stretch, corner = (replace(now, resize=mode) for mode in ("stretch", "letterbox-corner"))
    present, form = (now, ""), "box_format: yxyx"
    assert _better({present: [0.5], (stretch, ""): [0.54], (stretch, form): [0.54]}, present) is None
    assert _better({present: [0.5], (corner, ""): [0.56]}, present) is None, "a corner by chance"
    assert _better({present: [0.5], (corner, ""): [0.58]}, present) == (corner, "")
    assert _better({present: [0.0], (now, form): [0.6], (stretch, form): [0.63]}, present) == (now, form)
    assert _better({present: [0.0], (now, form): [0.3], (stretch, form): [0.63]}, present) == (stretch, form)
    assert _better({present: [0.0], (now, form): [0.1]}, present) is None
    bgr = replace(stretch, channels="bgr")
    assert _better({present: [0.5], (bgr, ""): [0.9], (stretch, ""): [0.87]}, present) == (stretch, "")


@pytest.mark.parametrize(("halves", "named"), [((0.6, 0.6), True), ((0.7, 0.5), False), ((0.54, 0.66), False)])
def test_a_reading_must_do_better_on_each_half_of_the_images(halves: tuple[float, float], named: bool) -> None:
    now = PreprocessSpec((64, 64), "letterbox")
    present, other = (now, ""), (replace(now, channels="bgr"), "")
    assert _better({present: [0.5, 0.5, 0.5], other: [0.6, *halves]}, present) == (other if named else None)


def test_pixels_and_names_taken_wrongly_are_told_at_once(tmp_path: Path) -> None:
    dataset = labelled(tmp_path)
    mixed = [replace(r, labels=np.array([index % 2])) for index, r in enumerate(dataset.records)]
    path = detector_file(tmp_path / "t.onnx", below=-1.5)
    _, warnings = check(replace(dataset, records=tuple(mixed)), config_of(path), tmp_path / "answers")
    assert "with `mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]`" in warnings[0]
    assert (
        "Even so, of the 5 objects labelled ring that it finds it calls 5 square: check its class names" in warnings[0]
    )


def test_readings_that_only_labels_can_tell_apart() -> None:
    finished = OutputFormat("detections", ("b", "s", "l"), 3, "xyxy-normalised", background="first", unit_unseen=True)
    found = other_forms(finished)
    assert list(found) == ["background: none", *(f"box_format: {c}-normalised" for c in ("yxyx", "cxcywh", "xywh"))]
    assert found["box_format: xywh-normalised"].box_format == "xywh-normalised"
    assert not found["box_format: xywh-normalised"].unit_unseen
    assert found["background: none"].box_format == "xyxy-normalised"
    assert list(other_forms(OutputFormat("boxes-scores", ("b", "s"), 3, "yxyx"))) == ["box_format: xyxy"]
    assert other_forms(OutputFormat("yolo", ("o",), 3, "grid-distances")) == {}
    detr = OutputFormat("boxes-scores", ("dets", "labels"), 3, "cxcywh-normalised", "sigmoid", "last")
    assert other_forms(detr)["background: first"] == replace(detr, background="first")
    assert list(other_forms(replace(detr, activation="softmax"))) == ["box_format: xywh-normalised"]
    assert list(other_forms(OutputFormat("yolo", ("o",), 3, "cxcywh"))) == ["box_format: xywh"]
    raw = OutputFormat("yolo-objectness", ("a", "b"), 3, "grid-anchors", anchors=(1.0, 2.0), anchors_squared=True)
    assert other_forms(raw) == {"anchors: {yolov3: [...]}": replace(raw, anchors_squared=False)}


def test_a_corner_that_stays_counts_as_much_as_any_other() -> None:
    now = PreprocessSpec((64, 64), "letterbox-corner")
    colours = replace(now, channels="bgr")
    tried = {(now, ""): [0.3], (colours, ""): [1.0], (replace(colours, resize="stretch"), ""): [1.0]}
    assert _better(tried, (now, "")) == (colours, "")


def test_pixels_that_do_better_on_one_image_by_chance_are_not_named(tmp_path: Path) -> None:
    dataset = labelled(tmp_path)
    for record in dataset.records[1:]:  # without black, the square is seen in no scale
        cv2.imwrite(str(record.path), np.full((64, 64, 3), 255, np.uint8))
    notes, _ = check(dataset, config_of(detector_file(tmp_path / "t.onnx", below=-1.5)), tmp_path / "answers")
    assert "other ways to prepare its pictures do no better" in notes[0]
