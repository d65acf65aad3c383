"""One truth, written in every format that detectors are exported in, must be read back the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekd.boxes import cxcywh_from_xyxy
from edgekd.errors import ArtifactError, RuntimeFailure, UserError
from edgekd.labels import COCO_CLASSES
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.outputs import decode
from edgekd.runtimes.probe import Probe
from edgekd.runtimes.recognise import recognise
from tests.onnx_zoo import mxnet_misses

HW = (64, 96)
NAMES = ("cat", "dog", "cow")
SHARES = np.array([HW[1], HW[0], HW[1], HW[0]], np.float32)


def truth(classes: int = 3, rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Boxes all over the picture with low scores, as a raw head gives them on noise."""
    rng = np.random.default_rng(0)
    centre = rng.uniform(0, 1, (rows, 2)) * SHARES[:2]
    extent = rng.uniform(4, 30, (rows, 2))
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], 1).astype(np.float32)
    return boxes, (rng.random((rows, classes)) ** 4 * 0.2 + 1e-4).astype(np.float32)


BOXES, SCORES = truth()
CENTRES = cxcywh_from_xyxy(BOXES)
LOGITS = np.log(SCORES / (1 - SCORES))
WITH_BACKGROUND = np.concatenate([1 - SCORES.sum(1, keepdims=True), SCORES], 1)  # rows sum to 1
YOLO = np.concatenate([CENTRES, SCORES], 1)[None]
OBJECTNESS = np.random.default_rng(1).uniform(0.3, 0.9, (len(BOXES), 1)).astype(np.float32)
YOLOV5 = np.concatenate([CENTRES, OBJECTNESS, SCORES / OBJECTNESS], 1)[None]


def read(arrays: dict[str, np.ndarray], names: Any = NAMES, **declared: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    options = OnnxTeacher(name="t", onnx="t.onnx", **declared)
    found = recognise(Probe("t.onnx", arrays, HW), options, names)
    return found, *decode(arrays, found.form, HW)


RAW = {
    "yolov8": ({"output0": YOLO.transpose(0, 2, 1)}, {}),
    "yolov8 rows": ({"output0": YOLO}, {}),
    "yolov8 without batch": ({"output0": YOLO[0].T}, {}),
    "yolov8 rows without batch, as wide as rows that name their image": ({"output0": YOLO[0]}, {}),
    "yolov8 rows in four axes": ({"output0": YOLO[None]}, {}),
    "yolov8 normalised": ({"o": (np.concatenate([CENTRES / SHARES, SCORES], 1)[None]).transpose(0, 2, 1)}, {}),
    "yolov8 logits": ({"o": np.concatenate([CENTRES, LOGITS], 1)[None]}, {}),
    "yolo with corners": ({"o": np.concatenate([BOXES, SCORES], 1)[None]}, {}),
    "yolov5": ({"output": YOLOV5}, {}),
    "yolov5 beside its raw maps": (
        {"output": YOLOV5, "a": np.zeros((1, 3, 8, 12, 8)), "b": np.zeros((1, 3, 4, 6, 8))},
        {},
    ),
    "boxes and scores": ({"boxes": BOXES[None], "scores": SCORES[None]}, {}),
    "scores and boxes": ({"a": SCORES[None], "b": BOXES[None]}, {}),
    "channels first": ({"a": SCORES.T[None], "b": BOXES.T[None]}, {}),
    "with a single axis": ({"confs": SCORES[None], "boxes": BOXES[None, :, None]}, {}),
    "normalised corners": ({"boxes": BOXES[None] / SHARES, "scores": SCORES[None]}, {}),
    "normalised centres": ({"scores": SCORES[None], "boxes": CENTRES[None] / SHARES}, {}),
    "pixel centres": ({"scores": SCORES[None], "boxes": CENTRES[None]}, {}),
    "sigmoid logits (RT-DETR)": ({"logits": LOGITS[None], "pred_boxes": CENTRES[None] / SHARES}, {}),
    "background first": ({"boxes": BOXES[None], "scores": WITH_BACKGROUND[None]}, {}),
    "background last": ({"boxes": BOXES[None], "scores": np.roll(WITH_BACKGROUND, -1, 1)[None]}, {}),
    "softmax logits, background first (SSD)": ({"boxes": BOXES[None], "s": np.log(WITH_BACKGROUND)[None] + 3}, {}),
    "softmax logits, background last (DETR)": (
        {
            "logits": np.roll(np.log(WITH_BACKGROUND), -1, 1)[None],
            "boxes": CENTRES[None] / SHARES,
            "hidden": np.zeros((1, 300, 64)),
        },
        {},
    ),
}


@pytest.mark.parametrize("case", RAW)
def test_raw_formats_are_recognised_and_read(case: str) -> None:
    arrays, declared = RAW[case]
    found, boxes, scores = read({name: a.astype(np.float32) for name, a in arrays.items()}, **declared)
    np.testing.assert_allclose(boxes, BOXES, atol=1e-3)
    np.testing.assert_allclose(scores, SCORES, atol=1e-5)
    assert found.class_names == NAMES
    assert found.notes


FINISHED_BOXES = np.array([[10, 20, 40, 50], [5, 6, 90, 60], [1, 1, 8, 9]], np.float32)
FINISHED_SCORES = np.array([0.9, 0.5, 0.3], np.float32)
LABELS = np.array([2, 0, 1], np.int64)
ROWS = np.concatenate([FINISHED_BOXES, FINISHED_SCORES[:, None], LABELS[:, None]], 1).astype(np.float32)
PADDED = np.concatenate([ROWS, np.zeros((4, 6), np.float32)])
BATCHED = np.concatenate([np.zeros((3, 1)), FINISHED_BOXES, LABELS[:, None], FINISHED_SCORES[:, None]], 1)
FINISHED: dict[str, dict[str, np.ndarray]] = {
    "Detectron2, traced without names": {
        "value": FINISHED_BOXES,
        "value.3": LABELS,
        "value.7": FINISHED_SCORES,
        "onnx::Split_98": np.array(HW),
    },
    "beside other boxes": {
        "pred_boxes": FINISHED_BOXES,
        "anchors": FINISHED_BOXES + 1,
        "scores": FINISHED_SCORES,
        "labels": LABELS.astype(np.float32),
    },
    "torchvision": {"boxes": FINISHED_BOXES, "labels": LABELS + 1, "scores": FINISHED_SCORES},
    "any order, other types": {
        "c": LABELS.astype(np.int32)[None],
        "b": FINISHED_BOXES[None],
        "a": FINISHED_SCORES[None],
    },
    "names that say nothing, labels as floats": {  # TensorFlow's combined NMS
        "Identity": FINISHED_BOXES[None],
        "Identity_1": FINISHED_SCORES[None],
        "Identity_2": LABELS[None].astype(np.float32),
        "Identity_3": np.array([3], np.int32),
    },
    "boxes as whole numbers": {
        "boxes": FINISHED_BOXES.astype(np.int32)[None],
        "scores": FINISHED_SCORES[None],
        "labels": LABELS[None],
    },
    "labels as floats": {"boxes": FINISHED_BOXES, "scores": FINISHED_SCORES, "classes": LABELS.astype(np.float32)},
    "with a count and padding": {
        "num_dets": np.array([[3]], np.int32),
        "det_boxes": np.concatenate([FINISHED_BOXES, np.full((2, 4), 7, np.float32)])[None],
        "det_scores": np.concatenate([FINISHED_SCORES, [0.8, 0.8]]).astype(np.float32)[None],
        "det_classes": np.concatenate([LABELS, [1, 1]])[None],
    },
    "mmdetection": {"dets": ROWS[None, :, :5], "labels": LABELS[None]},
    "yolov10": {"output0": PADDED[None]},
    "yolov7 end to end": {"output": BATCHED.astype(np.float32)},
    "normalised": {"boxes": FINISHED_BOXES / SHARES, "labels": LABELS + 1, "scores": FINISHED_SCORES},
    "single axes": {
        "boxes": FINISHED_BOXES[None],
        "labels": LABELS[None, :, None],
        "scores": FINISHED_SCORES[None, :, None],
    },
}


@pytest.mark.parametrize("case", FINISHED)
def test_finished_detections_are_recognised_and_read(case: str) -> None:
    found, boxes, scores = read(FINISHED[case])
    assert found.form.is_finished
    np.testing.assert_allclose(boxes, FINISHED_BOXES, atol=1e-4)
    np.testing.assert_array_equal(scores.argmax(1), LABELS)
    np.testing.assert_allclose(scores.max(1), FINISHED_SCORES, atol=1e-6)
    assert (scores > 0).sum() == 3


@pytest.mark.parametrize("case", ["torchvision", "mmdetection", "yolov10", "yolov7 end to end"])
def test_a_probe_that_finds_nothing_still_shows_the_format(case: str) -> None:
    empty = {name: array[..., :0] if array.ndim == 1 else array[..., :0, :] for name, array in FINISHED[case].items()}
    if case == "mmdetection":
        empty["labels"] = LABELS[None, :0]
    found, boxes, scores = read(empty)
    assert boxes.shape == (0, 4)
    assert scores.shape == (0, 3)
    _, full, _ = found, *decode(FINISHED[case], found.form, HW)
    np.testing.assert_allclose(full, FINISHED_BOXES)


def test_labels_that_start_at_one() -> None:
    arrays = {"boxes": FINISHED_BOXES, "labels": LABELS + 1, "scores": FINISHED_SCORES}
    _, _, scores = read(arrays, background="first")
    np.testing.assert_array_equal(scores.argmax(1), LABELS)


@pytest.mark.parametrize(
    ("labels", "background", "outside"),
    [([3, 0, 1], "none", True), ([3, 0, 1], "last", False), ([4, 0, 1], "last", True), ([-1, 0, 1], "none", False)],
)
def test_labels_without_a_name_are_refused_and_padding_is_not(
    labels: list[int], background: str, outside: bool
) -> None:
    arrays = {"boxes": FINISHED_BOXES, "labels": np.array(labels), "scores": FINISHED_SCORES}
    if not outside:
        assert len(read(arrays, background=background)[1]) == 2
        return
    with pytest.raises(ArtifactError, match=f"label {labels[0]}"):
        read(arrays, background=background)
    assert len(read(arrays | {"scores": np.array([0, 0.5, 0.3], np.float32)}, background=background)[1]) == 2


@pytest.mark.parametrize("columns", [91, 92])
def test_coco_by_category_id(columns: int) -> None:
    """torchvision's and DETR's 91 ids, the latter with a column for no object at the end."""
    boxes, scores = truth(columns)
    if columns == 92:
        scores[:, 91] = 0.9
    for names in ("coco", "auto"):
        found, _, read_scores = read({"boxes": boxes[None], "scores": scores[None]}, None, class_names=names)
        assert found.class_names[1] == "person"
        assert found.class_names[90] == "toothbrush"
        np.testing.assert_array_equal(read_scores, scores[:, :91])


def test_a_detector_that_is_sure_of_an_unused_category_id_was_read_wrongly() -> None:
    arrays = {"boxes": FINISHED_BOXES, "labels": np.array([12, 3, 1]), "scores": np.array([0.9, 0.5, 0.3], np.float32)}
    with pytest.raises(ArtifactError, match="label 12"):
        read(arrays, None, class_names="coco")
    _, _, scores = read(arrays | {"scores": np.array([0.1, 0.5, 0.3], np.float32)}, None, class_names="coco")
    assert scores.argmax(1).tolist() == [12, 3, 1]  # noise on it is no evidence
    _, _, scores = read(arrays, None, class_names="coco", background="first")
    assert scores.argmax(1).tolist() == [11, 2, 0]


def test_eighty_columns_are_coco_where_nothing_else_is_known() -> None:
    boxes, scores = truth(80)
    head = np.concatenate([cxcywh_from_xyxy(boxes), scores], 1).T[None]
    found, _, _ = read({"output0": head}, None)
    assert found.class_names == COCO_CLASSES
    assert any("COCO" in note for note in found.notes)


@pytest.mark.parametrize("classes", [1, 2])
def test_six_columns_of_a_raw_head_are_not_taken_for_detections(classes: int) -> None:
    boxes, scores = truth(classes)
    extra = [np.ones((len(boxes), 1), np.float32)] if classes == 1 else []
    head = np.concatenate([cxcywh_from_xyxy(boxes), *extra, scores], 1)[None]
    found, read_boxes, read_scores = read({"output0": head}, NAMES[:classes])
    assert found.form.kind == ("yolo-objectness" if classes == 1 else "yolo")
    np.testing.assert_allclose(read_boxes, boxes, atol=1e-3)
    np.testing.assert_allclose(read_scores, scores, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 17])
def test_scores_that_are_all_zero_are_not_taken_for_labels(classes: int) -> None:
    boxes, _ = truth(rows=126)  # one a cell, of a quantised model
    head = np.concatenate([boxes, np.zeros((126, classes), np.float32)], 1)[None]
    found, read_boxes, scores = read({"output0": head}, tuple(f"class {label}" for label in range(classes)))
    assert found.form.kind == "yolo"
    assert scores.shape == (126, classes)
    np.testing.assert_allclose(read_boxes, boxes)


def test_many_rows_with_labels_are_detections() -> None:
    rows = np.tile(ROWS[1:], (600, 1))[None]
    found, _, _ = read({"output0": rows}, NAMES[:2])
    assert (found.form.kind, found.form.columns) == ("detections", (0, 1, 2, 3, 4, 5))
    assert not found.form.is_finished


@pytest.mark.parametrize("classes", [1, 3])
def test_rows_of_every_candidate_s_best_class_are_still_to_be_thinned(classes: int) -> None:
    """What the exporters of DeepStream-Yolo write: x1, y1, x2, y2, score, label of each cell, and no NMS."""
    boxes, scores = truth(classes, 126)
    rows = np.concatenate([boxes, scores.max(1)[:, None], scores.argmax(1)[:, None]], 1).astype(np.float32)
    found, read_boxes, read_scores = read({"output": rows[None]}, NAMES[:classes])
    assert (found.form.kind, found.form.is_finished) == ("detections", False)
    assert any("no NMS" in note for note in found.notes)
    np.testing.assert_allclose(read_boxes, boxes)
    np.testing.assert_array_equal(read_scores.argmax(1), scores.argmax(1))
    np.testing.assert_allclose(read_scores.max(1), scores.max(1))


def test_more_classes_than_candidates() -> None:
    boxes, scores = truth(400)
    classes = tuple(f"class {label}" for label in range(400))
    found, read_boxes, read_scores = read({"o": np.concatenate([cxcywh_from_xyxy(boxes), scores], 1)[None]}, classes)
    assert not found.form.channels_first
    np.testing.assert_allclose(read_boxes, boxes, atol=1e-3)
    np.testing.assert_allclose(read_scores, scores, atol=1e-6)


def test_logits_over_cocos_ids_are_of_a_softmax_where_the_first_wins_everywhere() -> None:
    boxes, scores = truth(91)
    scores[:, 0] = 9
    probabilities = scores / scores.sum(1, keepdims=True)
    found, _, read_scores = read({"boxes": boxes[None], "scores": np.log(probabilities)[None] + 3}, None)
    assert (found.form.activation, found.form.background) == ("softmax", "first")
    assert (found.class_names[0], len(found.class_names)) == ("person", 90)
    np.testing.assert_allclose(read_scores, probabilities[:, 1:], rtol=1e-4)


def test_distances_in_maps_of_twice_as_many_values_as_an_anchor_has() -> None:
    """54 classes: 64 + 54 = 2 (5 + 54)."""
    rng = np.random.default_rng(0)
    maps = {f"o{index}": rng.normal(size=(1, 118, 8 >> index, 12 >> index)) for index in range(3)}
    found, boxes, _ = read({n: a.astype(np.float32) for n, a in maps.items()}, tuple(f"c{i}" for i in range(54)))
    assert found.form.box_format == "grid-distances"
    assert len(boxes) == 126


NOISE = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
THREE_A_CELL = np.tile(YOLOV5[:, :126], (1, 3, 1))
MANY_CLASSES = np.concatenate([CENTRES[:126], truth(31, 126)[1]], 1)[None]
ONE_BOX = np.array([[[20, 20, 40, 40]]], np.float32)
CODED = np.random.default_rng(0).normal(0, 2, (1, 252, 4)).astype(np.float32)
FACES = {"loc": CODED, "conf": np.tile(np.array([0.99, 0.01], np.float32), (1, 252, 1))}
UNCLEAR: dict[str, tuple[dict[str, np.ndarray], Any, dict[str, Any], str]] = {
    "no names": ({"o": YOLO}, None, {}, r"in label order: 3 of them, or 2 if"),
    "no names for a head in levels": (
        {f"{k}{n}": np.zeros((1, 96 >> 2 * n, w), np.float32) for n in range(3) for k, w in (("s", 3), ("d", 32))},
        None,
        {},
        "3 scores a candidate, and no names",
    ),
    "names that do not fit a head": ({"o": YOLO}, (*NAMES, "a", "b"), {}, "class_names"),
    "names that do not fit scores": ({"boxes": BOXES[None], "s": SCORES[None]}, ("a",), {}, "class names"),
    "no background column stands out": ({"boxes": BOXES[None], "s": SCORES[None]}, ("a", "b"), {}, "background"),
    "a background that would be an objectness": (
        {"o": np.concatenate([BOXES, WITH_BACKGROUND], 1)[None]},
        NAMES,
        {},
        "name that one among the classes",
    ),
    "offsets from priors": (FACES, ("face",), {}, "declare `anchors: retinaface`"),
    "priors that are not as many": (
        FACES,
        ("face",),
        {"anchors": {"retinaface": ((16, 16), (32, 32), (64, 64))}},
        "252 boxes are not those of 3 priors",
    ),
    "priors of rows for maps": (
        {name: np.zeros((1, 16, 8 >> n, 12 >> n), np.float32) for n, name in enumerate("abc")},
        NAMES,
        {"anchors": "retinaface"},
        "stand in maps",
    ),
    "rotated boxes with labels": (  # MMRotate's: centre, extent, angle, score
        {
            "dets": np.concatenate([CENTRES[:40], NOISE[:40, :1], SCORES[:40, :1]], 1)[None],
            "labels": np.zeros((1, 40), np.int64),
        },
        NAMES[:2],
        {},
        "'labels' has a label for each row",
    ),
    "rows of a box and a score": (
        {"dets": np.array([[[10, 10, 50, 40, 0.9], [20, 12, 60, 40, 0.8]] * 3], np.float32)},
        NAMES[:1],
        {},
        "box_format",
    ),
    "both readings of boxes": ({"boxes": ONE_BOX, "s": SCORES[None, :1]}, NAMES, {}, "box_format"),
    "offsets that are not decoded": (
        {"boxes": NOISE[None], "s": SCORES[None]},
        NAMES,
        {},
        "decoded",
    ),
    "a head that is not decoded (YOLOX)": (
        {"o": np.concatenate([NOISE, SCORES], 1)[None]},
        NAMES,
        {},
        "decoded",
    ),
    "a classifier": ({"logits": np.zeros((1, 1000), np.float32)}, None, {}, "output"),
    "nothing like boxes": (
        {"a": np.zeros((1, 50, 10), np.float32), "b": np.zeros((1, 50, 9), np.float32)},
        NAMES,
        {},
        "output",
    ),
    "detections without names": (FINISHED["torchvision"], None, {}, "class_names"),
    "declared detections that are none": (
        {"boxes": BOXES[None], "s": SCORES[None]},
        NAMES,
        {"output": "detections"},
        "output",
    ),
    "labels beyond the names": ({"o": PADDED[None]}, ("a",), {}, "labels up to 2"),
    "detections as centres, of two classes": (
        {"o": np.concatenate([CENTRES, OBJECTNESS, np.arange(300)[:, None] % 2], 1)[None]},
        NAMES[:2],
        {},
        "labels",
    ),
    "detections in percent": ({"o": np.tile(ROWS * [1, 1, 1, 1, 99.5, 1], (3, 1))[None]}, NAMES[:2], {}, "labels"),
    "a name too many for a head with objectness": ({"o": THREE_A_CELL}, (*NAMES, "background"), {}, "objectness"),
    "distances that are scores of more classes than names": ({"o": MANY_CLASSES}, NAMES, {}, "class_names"),
    "scores that are called classes": (
        {"boxes": BOXES[None], "conf": OBJECTNESS.T, "class": SCORES[None, :, 0]},
        NAMES[:1],
        {},
        "output",
    ),
    "objectness apart": (
        {"boxes": BOXES[None], "objectness": OBJECTNESS[None], "class_probs": SCORES[None]},
        NAMES,
        {},
        "'objectness'",
    ),
    "declared yolo that is none": ({"boxes": BOXES[None], "s": SCORES[None]}, NAMES, {"output": "yolo"}, "output"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_unclear_says_what_to_declare(case: str) -> None:
    arrays, names, declared, word = UNCLEAR[case]
    with pytest.raises(UserError) as caught:
        read(arrays, names, **declared)
    assert word in str(caught.value)
    for name, array in arrays.items():
        assert f"{name} {array.shape}" in str(caught.value)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_sigmoids_over_a_first_column_that_is_never_used(classes: int) -> None:
    """Deformable DETR's and DINO's heads: no column is background, whichever wins most often."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-4, 0.5, (300, classes + 1)).astype(np.float32)
    logits[:, 0] = -9
    logits[:, -1] += 1.5  # the commonest class stands last
    logits[5, 1] = 3
    arrays = {"pred_logits": logits[None], "pred_boxes": CENTRES[None] / SHARES}
    with pytest.raises(UserError, match="background: first"):
        read(arrays, NAMES[:classes])
    found, _, scores = read(arrays, NAMES[:classes], background="first")
    assert found.form.activation == "sigmoid"
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits[:, 1:])), rtol=1e-5)
    probs = {"scores": 1 / (1 + np.exp(-logits))[None], "boxes": BOXES[None]}
    with pytest.raises(UserError, match="background: first"):
        read(probs, NAMES[:classes])


@pytest.mark.parametrize("names", [("N/A", *NAMES), ("N/A", *NAMES, "no-object"), ("background", *NAMES)])
def test_detr_s_unused_first_column_is_no_background(names: tuple[str, ...]) -> None:
    """Fine-tuned on COCO's ids, which start at 1: a column that is never used, the classes, and one of no object."""
    unused = np.full((len(BOXES), 1), 1e-7, np.float32)
    scores = np.concatenate([unused, SCORES, 1 - SCORES.sum(1, keepdims=True)], 1)
    arrays = {"logits": np.log(scores)[None], "pred_boxes": CENTRES[None] / SHARES}
    found, _, read_scores = read(arrays, names)
    assert (found.form.background, found.class_names) == ("last", names[:4])
    np.testing.assert_allclose(read_scores[:, 1:], SCORES, atol=1e-5)
    assert read(arrays, None, class_names=names)[0].form.background == "last"
    first = {**arrays, "logits": arrays["logits"][..., [4, 1, 2, 3, 0]]}
    if len(names) == 4:  # a name for background at the end where it is, and one too few
        with pytest.raises(UserError, match="3 class names and background do not fit 5") as caught:
            read(first, names)
        assert "never used needs a name" in str(caught.value.fix)


def test_percent_are_no_logits() -> None:
    with pytest.raises(UserError, match="percent"):
        read({"boxes": BOXES[None], "scores": 100 * SCORES[None]})
    with pytest.raises(UserError, match="percent"):
        read({"o": np.concatenate([CENTRES, 100 * SCORES], 1)[None]})
    form = OutputFormat("boxes-scores", ("boxes", "scores"), 3)  # the probe picture may show less than one percent
    with pytest.raises(ArtifactError, match="scores above 1"):
        decode({"boxes": BOXES[None], "scores": 100 * SCORES[None]}, form, HW)


MANY = truth(rows=60)[0].clip(0, [HW[1], HW[0]] * 2)


@pytest.mark.parametrize("unit", ["", "-normalised"])
@pytest.mark.parametrize("padding", [None, 0, -1])
def test_finished_boxes_with_their_extent(unit: str, padding: int | None) -> None:
    scale = SHARES if unit else np.ones(4, np.float32)
    scores, labels = np.full(len(MANY), 0.5, np.float32), np.zeros(len(MANY), np.int64)
    for name, values in (
        ("cxcywh", cxcywh_from_xyxy(MANY)),
        ("xywh", np.concatenate([MANY[:, :2], MANY[:, 2:] - MANY[:, :2]], 1)),
    ):
        boxes = (values / scale).astype(np.float32)
        arrays = {"boxes": boxes[None], "scores": scores[None], "labels": labels[None]}
        if padding is not None:
            arrays["boxes"] = np.concatenate([boxes, np.full((40, 4), padding, np.float32)])[None]
            arrays["scores"] = np.concatenate([scores, np.zeros(40, np.float32)])[None]
            arrays["labels"] = np.concatenate([labels, np.full(40, -1)])[None]
        found, read_boxes, _ = read(arrays)
        assert found.form.box_format == name + unit
        np.testing.assert_allclose(read_boxes, MANY, atol=1e-3)


def test_finished_boxes_that_are_neither_corners_nor_inside() -> None:
    boxes = np.tile(np.array([[90, 60, 30, 30], [5, 5, 3, 3]], np.float32), (5, 1))[None]
    arrays = {"boxes": boxes, "scores": np.full((1, 10), 0.5, np.float32), "labels": np.zeros((1, 10), np.int64)}
    with pytest.raises(UserError, match="box_format"):
        read(arrays)
    assert read(arrays, box_format="xywh")[1][0].tolist() == [90, 60, 120, 90]


def test_one_declared_name_too_few_does_not_make_an_objectness() -> None:
    with pytest.raises(UserError, match="leave `class_names` out"):
        read({"output0": YOLO}, class_names=NAMES[:2])
    assert read({"output0": YOLO}, class_names=NAMES[:2], output="yolo-objectness")[0].form.num_classes == 2


@pytest.mark.parametrize(
    ("anchors", "finest"), [("yolov3-tiny", (10, 14)), ("yolov4-tiny", (23, 27))], ids=["v3", "v4"]
)
def test_a_tiny_raw_head_has_two_levels(anchors: str, finest: tuple[int, int]) -> None:
    raw = {
        "016_convolutional": np.zeros((1, 24, 2, 3), np.float32),
        "023_convolutional": np.zeros((1, 24, 4, 6), np.float32),
    }
    found, boxes, scores = read(raw, score_activation="sigmoid", anchors=anchors)
    assert found.form.box_format == "grid-anchors"
    centred = cxcywh_from_xyxy(boxes)
    np.testing.assert_allclose(centred[0], (8, 8, *finest))  # stride 16, the middle of the first cell
    np.testing.assert_allclose(centred[-1], (80, 48, 344, 319))
    np.testing.assert_allclose(scores, 0.25)
    assert len(boxes) == 3 * (24 + 6)


@pytest.mark.parametrize("own", [False, True])
def test_a_raw_head_of_yolov2_has_one_level_and_a_softmax(own: bool) -> None:
    raw = {"grid": np.zeros((1, 40, 2, 3), np.float32)}
    sizes = ((10, 20), (30, 30), (40, 20), (60, 50), (80, 64))
    for column, logit in ((5, 1.0), (6, -1.0), (7, -1.0)):
        raw["grid"][0, column::8] = logit  # of each anchor
    with pytest.raises(UserError, match="5 anchors") as caught:
        read(raw)
    assert "yolov2-tiny-voc" in str(caught.value.fix)
    found, boxes, scores = read(raw, anchors={"yolov2": sizes} if own else "yolov2-tiny-voc")
    assert found.form.activation == "softmax"
    np.testing.assert_allclose(cxcywh_from_xyxy(boxes)[0], (16, 16, *(sizes[0] if own else (34.56, 38.08))), rtol=1e-5)
    np.testing.assert_allclose(scores.sum(1), 0.5, rtol=1e-5)
    np.testing.assert_allclose(scores[:, 0], 0.5 * np.exp(2) / (np.exp(2) + 2), rtol=1e-5)
    with pytest.raises(UserError, match="in cells"):
        read(raw, anchors={"yolov2": ((1.08, 1.19), (3.42, 4.41), (6.63, 11.38), (9.42, 5.11), (16.62, 10.52))})


def test_anchors_decoded_like_those_of_other_levels_are_refused() -> None:
    raw = {name: np.full((1, 24, *hw), -1, np.float32) for name, hw in (("a", (4, 6)), ("b", (2, 3)))}
    own = ((8, 9), (15, 11), (20, 24), (28, 40), (45, 30), (50, 52))
    with pytest.raises(UserError, match="2 levels") as caught:
        read(raw, anchors={"yolov4": own})
    assert "yolov4-tiny two" in str(caught.value.fix)
    assert read(raw, anchors={"yolov4-tiny": own})[0].form.anchors_squared is False
    assert read(raw, anchors=own)[0].form.anchors_squared is True


def test_an_objectness_that_may_be_a_class_that_was_not_declared_is_told() -> None:
    boxes, scores = truth(4, 126)
    head = np.concatenate([cxcywh_from_xyxy(boxes), scores], 1)[None]
    told = "if it is a class, declare all 4"
    assert any(told in note for note in read({"o": head})[0].notes)
    assert not any(told in note for note in read({"o": head}, output="yolo-objectness")[0].notes)
    assert not any(
        told in note for note in read({"o": YOLOV5})[0].notes
    )  # no number of candidates that such heads have


def test_values_of_no_name_beside_boxes_and_scores_are_told() -> None:
    found, _, _ = read({"801": BOXES[None], "802": OBJECTNESS[None], "803": SCORES[None]})
    assert any(note.startswith("'802' left aside") for note in found.notes)


def test_the_file_s_own_names_are_not_put_into_another_order() -> None:
    with pytest.raises(UserError, match="another order") as caught:
        read({"o": YOLO}, ("Cow", "dog", "cat"), class_names=NAMES)
    assert caught.value.expected == "Cow, dog, cat"
    for own in (("Katze", "Hund", "Kuh"), ("Cat", "Dog", "Cow")):
        assert read({"o": YOLO}, own, class_names=NAMES)[0].class_names == NAMES


def test_what_is_declared_wins() -> None:
    found, boxes, _ = read({"o": YOLO}, None, class_names=NAMES, box_format="xyxy")
    np.testing.assert_allclose(boxes, CENTRES)
    assert found.form.box_format == "xyxy"
    ambiguous = {"boxes": ONE_BOX, "scores": SCORES[None, :1]}
    _, boxes, _ = read(ambiguous, box_format="cxcywh")
    np.testing.assert_allclose(boxes, [[0, 0, 40, 40]])
    _, _, scores = read({"boxes": BOXES[None], "scores": SCORES[None]}, score_activation="sigmoid")
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-SCORES)), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_a_failure_of_the_runtime(bad: float) -> None:
    form = OutputFormat("boxes-scores", ("boxes", "scores"), 3)
    for name in ("boxes", "scores"):
        arrays = {"boxes": BOXES[None].copy(), "scores": SCORES[None].copy()}
        arrays[name][0, 5, 1] = bad
        with pytest.raises(RuntimeFailure, match="not finite"):
            decode(arrays, form, HW)


def test_outputs_of_another_shape_are_a_failure_of_the_runtime() -> None:
    form = OutputFormat("boxes-scores", ("boxes", "scores"), 3)
    for arrays in ({"boxes": BOXES[None]}, {"boxes": BOXES[None], "scores": SCORES[None, :, :2]}):
        with pytest.raises(RuntimeFailure, match="output format"):
            decode(arrays, form, HW)


def test_any_image_of_a_batch() -> None:
    form = OutputFormat("boxes-scores", ("boxes", "scores"), 3)
    arrays = {"boxes": np.stack([BOXES, BOXES + 1]), "scores": np.stack([SCORES, SCORES / 2])}
    boxes, scores = decode(arrays, form, HW, item=1)
    np.testing.assert_array_equal(boxes, BOXES + 1)
    np.testing.assert_array_equal(scores, SCORES / 2)
    one_class = arrays | {"scores": arrays["scores"][:, :, 0]}
    _, scores = decode(one_class, OutputFormat("boxes-scores", ("boxes", "scores"), 1), HW, item=1)
    np.testing.assert_array_equal(scores, SCORES[:, :1] / 2)


@pytest.mark.parametrize("padding", [0, -1, None])
def test_boxes_as_shares_where_the_probe_found_nothing(padding: int | None) -> None:
    empty = np.zeros((0, 6), np.float32) if padding is None else np.full((1, 5, 6), padding, np.float32)
    found = recognise(Probe("t.onnx", {"o": empty}, HW), OnnxTeacher(name="t", onnx="t.onnx"), NAMES)
    rows = np.concatenate([BOXES[:5] / SHARES, [[0.9, 1]] * 5], 1).astype(np.float32)
    np.testing.assert_allclose(decode({"o": rows}, found.form, HW)[0], BOXES[:5], rtol=1e-5, atol=1e-3)
    rows[:, :4] = BOXES[:5]
    np.testing.assert_allclose(decode({"o": rows}, found.form, HW)[0], BOXES[:5])


def test_rows_that_all_have_label_minus_one_are_padding() -> None:
    """MXNet's SSDs give every candidate's row, and label -1 to what is no object: on the probe, all."""
    misses = mxnet_misses()
    found, boxes, scores = read({"o": misses[None]})
    assert (found.form.kind, found.form.columns, len(boxes), len(scores)) == ("detections", (), 0, 0)
    hits = np.concatenate([LABELS[:, None], FINISHED_SCORES[:, None], FINISHED_BOXES / SHARES], 1).astype(np.float32)
    boxes, scores = decode({"o": np.concatenate([hits, misses])[None]}, found.form, HW)
    np.testing.assert_allclose(boxes, FINISHED_BOXES, rtol=1e-4)
    np.testing.assert_array_equal(scores.argmax(1), LABELS)


def test_one_class_needs_no_labels() -> None:
    """What NMS has left of a detector of faces, say, without a batch axis."""
    arrays = {"boxes": BOXES, "scores": SCORES[:, 0]}
    found, boxes, scores = read(arrays, ("face",))
    assert (found.form.kind, found.form.num_classes) == ("boxes-scores", 1)
    np.testing.assert_array_equal(boxes, BOXES)
    np.testing.assert_array_equal(scores, SCORES[:, :1])
    nothing = {name: array[:0] for name, array in arrays.items()}
    with pytest.raises(UserError, match="no box on the probe picture") as caught:
        read(nothing, ("face",))
    assert "xyxy" in str(caught.value.fix)
    form = read(nothing, ("face",), box_format="xyxy")[0].form
    np.testing.assert_array_equal(decode(arrays, form, HW)[1], SCORES[:, :1])


def test_one_score_a_box_is_not_of_several_classes() -> None:
    with pytest.raises(UserError, match="one score a box, and 3 class names") as caught:
        read({"boxes": BOXES[None], "scores": SCORES[None, :, :1], "ids": LABELS[:1].astype(np.float32)})
    assert "called labels" in str(caught.value.fix)


def test_a_declared_unit_of_boxes_is_never_guessed_again() -> None:
    declared = OnnxTeacher(name="t", onnx="t.onnx", box_format="xyxy")
    found = recognise(Probe("t.onnx", {"o": np.zeros((0, 6), np.float32)}, HW), declared, NAMES)
    tiny = np.array([[0.2, 0.2, 1.5, 1.5, 0.9, 1]], np.float32)
    np.testing.assert_allclose(decode({"o": tiny}, found.form, HW)[0], tiny[:, :4])


@pytest.mark.parametrize("row", [[1, 2, 30, 40, 90.0, 1], [2, 0.9, 1, 2, 30, 1]], ids=["percent", "upside down"])
def test_scores_above_one_are_refused(row: list[float]) -> None:
    found = recognise(
        Probe("t.onnx", {"o": np.zeros((0, 6), np.float32)}, HW), OnnxTeacher(name="t", onnx="t.onnx"), NAMES
    )
    with pytest.raises(ArtifactError, match="scores above 1"):
        decode({"o": np.array([row], np.float32)}, found.form, HW)


def test_a_head_that_gives_no_number_is_not_to_be_declared() -> None:
    with pytest.raises(UserError, match="NaN or infinite"):
        recognise(Probe("t.onnx", {"o": YOLO * np.nan}, HW), OnnxTeacher(name="t", onnx="t.onnx"), NAMES)


@pytest.mark.parametrize("suffix", ["", ":0"])
def test_tensorflows_object_detection_api(suffix: str) -> None:
    boxes = np.array([[10, 5, 40, 30], [50, 20, 90, 60], [0, 0, 0, 0]], np.float32)
    arrays = {
        "detection_anchor_indices": np.zeros((1, 3), np.float32),
        "detection_boxes": (boxes / SHARES)[None][..., [1, 0, 3, 2]],
        "detection_classes": np.array([[1, 3, 1]], np.float32),
        "detection_multiclass_scores": np.zeros((1, 3, 4), np.float32),
        "detection_scores": np.array([[0.9, 0.6, 0.0]], np.float32),
        "num_detections": np.array([2.0], np.float32),
        "raw_detection_boxes": np.zeros((1, 50, 4), np.float32),
        "raw_detection_scores": np.zeros((1, 50, 4), np.float32),
    }
    found, read_boxes, scores = read({name + suffix: array for name, array in arrays.items()})
    assert (found.form.kind, found.form.box_format, found.form.background) == ("detections", "yxyx-normalised", "first")
    np.testing.assert_allclose(read_boxes, boxes[:2], rtol=1e-5)
    np.testing.assert_allclose(scores, [[0.9, 0, 0], [0, 0, 0.6]])


def test_declared_y_before_x() -> None:
    swapped = {"boxes": BOXES[:, [1, 0, 3, 2]][None], "scores": SCORES[None]}
    _, boxes, scores = read(swapped, box_format="yxyx")
    np.testing.assert_allclose(boxes, BOXES, rtol=1e-5)
    np.testing.assert_allclose(scores, SCORES)


def test_yolox_whose_boxes_are_not_decoded() -> None:
    rng = np.random.default_rng(0)
    cells = [(x, y, stride) for stride in (8, 16, 32) for y in range(HW[0] // stride) for x in range(HW[1] // stride)]
    raw = np.concatenate([rng.uniform(-0.5, 1.5, (len(cells), 2)), rng.normal(0, 0.7, (len(cells), 2))], 1)
    confidence, scores = rng.uniform(0.1, 0.9, (len(cells), 1)), rng.uniform(0, 1, (len(cells), 3))
    wanted = []
    for (x, y, stride), (dx, dy, w, h) in zip(cells, raw, strict=True):
        cx, cy, half_w, half_h = (x + dx) * stride, (y + dy) * stride, np.exp(w) * stride / 2, np.exp(h) * stride / 2
        wanted.append([cx - half_w, cy - half_h, cx + half_w, cy + half_h])
    output = np.concatenate([raw, confidence, scores], 1).astype(np.float32)[None]
    found, boxes, read_scores = read({"output": output})
    assert (found.form.kind, found.form.box_format) == ("yolo-objectness", "grid-offsets")
    np.testing.assert_allclose(boxes, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(read_scores, scores * confidence, rtol=1e-5)
    with pytest.raises(UserError, match="not decoded"):  # rows that are not the cells of any grids
        read({"output": output[:, :-1]})
    with pytest.raises(RuntimeFailure, match="not the cells"):
        decode({"output": output[:, :-1]}, found.form, HW)
