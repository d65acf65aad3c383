"""Small ONNX files in the formats that the field exports, each giving the same known boxes.

What is written follows the exporters' own code: names, shapes, types, coordinate frames and metadata are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.boxes import cxcywh_from_xyxy
from edgekd.labels import COCO_BY_ID, COCO_CLASSES
from edgekd.preprocess import geometry_for
from edgekd.runtimes.anchored import ANCHOR_SETS
from edgekd.runtimes.grids import grid_cells
from edgekd.types import Channels, PreprocessSpec, ResizeMode

SOURCE_HW, INPUT_HW = (120, 200), (64, 96)
BOXES = np.array([[20, 10, 120, 90], [5, 40, 60, 110], [130, 50, 190, 115]], np.float32)
"""In the original image."""
SCORES = np.array([0.9, 0.6, 0.4], np.float32)
LABELS = np.array([2, 0, 1])
NAMES = ("cat", "dog", "cow")
SHARES = np.array([96, 64, 96, 64], np.float32)
ULTRALYTICS = {"names": str(dict(enumerate(NAMES))), "stride": "32", "imgsz": "[64, 96]", "task": "detect"}
CELLS = 126  # of strides 8, 16, 32 in 64 x 96
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
BYTES = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
CAFFE = ((104 / 255, 117 / 255, 123 / 255), (1 / 255, 1 / 255, 1 / 255))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NANODET = ((0.406, 0.456, 0.485), (0.225, 0.224, 0.229))
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Export:
    """One exporter's format.

    Attributes:
        outputs: from boxes (N, 4) in input pixels to the arrays.
        resize, scaling, channels: how its users prepare pictures, so that edgekd must too.
        inputs: name to (type, shape); the first is the image. scaled: output to the side input that it is multiplied by.
        hidden: outputs whose rows are there only on the picture with objects, not on a probe; to the axis of rows.
        declared: what edgekd has to be told. names: the classes that it must come to.
    """

    outputs: Callable[[np.ndarray], Arrays]
    resize: ResizeMode = "letterbox"
    scaling: tuple[tuple[float, ...], tuple[float, ...]] = PLAIN
    channels: Channels = "rgb"
    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]] = field(
        default_factory=lambda: {"images": ("FLOAT", (1, 3, *INPUT_HW))}
    )
    scaled: Mapping[str, str] = field(default_factory=dict)
    hidden: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    declared: Mapping[str, Any] = field(default_factory=lambda: {"class_names": NAMES})
    names: tuple[str, ...] = NAMES
    input_hw: tuple[int, int] = INPUT_HW

    def input_boxes(self) -> np.ndarray:
        """The boxes in input pixels."""
        return geometry_for(SOURCE_HW, PreprocessSpec(INPUT_HW, self.resize)).to_input(BOXES)


def write(export: Export, path: Path, *, opset: int = 17, ir: int = 8, empty_probe: bool = False) -> Path:
    """The file; with `empty_probe` the `hidden` outputs have no rows on any picture but one of a single colour."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, infos = [], [], []
    image = next(iter(export.inputs))
    channels_last = export.inputs[image][1][-1] == 3
    axes = [1, 2] if channels_last else [-2, -1]
    nodes.append(helper.make_node("Cast", [image], ["pixels"], to=TensorProto.FLOAT))
    for operator in ("ReduceMax", "ReduceMin"):
        nodes.append(helper.make_node(operator, ["pixels"], [f"{operator}.planes"], axes=axes, keepdims=0))
    nodes.append(helper.make_node("Sub", ["ReduceMax.planes", "ReduceMin.planes"], ["spread"]))
    nodes.append(helper.make_node("ReduceMax", ["spread"], ["most"], keepdims=0))
    weights.append(numpy_helper.from_array(np.array(1e-3, np.float32), "little"))
    nodes.append(helper.make_node("Less", ["most", "little"], ["objects"]))
    for name, array in export.outputs(export.input_boxes()).items():
        weights.append(numpy_helper.from_array(np.ascontiguousarray(array), f"{name}.value"))
        value = f"{name}.value"
        if name in export.scaled:
            side = export.scaled[name]
            nodes.append(helper.make_node("Cast", [side], [f"{name}.side"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Concat", [f"{name}.side"] * 2, [f"{name}.four"], axis=1))
            nodes.append(helper.make_node("Mul", [value, f"{name}.four"], [f"{name}.scaled"]))
            value = f"{name}.scaled"
        shape: list[Any] = list(array.shape)
        if empty_probe and name in export.hidden:
            axis = export.hidden[name]
            weights.append(numpy_helper.from_array(np.array([array.shape[axis]], np.int64), f"{name}.rows"))
            nodes.append(helper.make_node("Expand", ["objects", f"{name}.rows"], [f"{name}.all"]))
            nodes.append(helper.make_node("Compress", [value, f"{name}.all"], [f"{name}.found"], axis=axis))
            value, shape[axis] = f"{name}.found", "found"
        nodes.append(helper.make_node("Identity", [value], [name]))
        infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
    inputs = [
        helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)
        for name, (kind, shape) in export.inputs.items()
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "export", inputs, infos, weights),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir,
    )
    helper.set_model_props(model, dict(export.metadata))
    onnx.save(model, str(path))
    return path


# --- what exporters write ------------------------------------------------------------------------------------------


def image(kind: str, *shape: int | str, name: str = "images", **others: tuple[str, tuple[int | str, ...]]) -> Any:
    """The inputs of a file: the image, and others."""
    return {name: (kind, shape), **others}


def candidates(boxes: np.ndarray, classes: int = 3, rows: int = CELLS, labels: np.ndarray = LABELS) -> Any:
    """((rows, 4) corners, (rows, classes) scores): the boxes among many that nothing speaks for."""
    rng = np.random.default_rng(0)
    centre, extent = rng.uniform(0.1, 0.9, (rows, 2)) * SHARES[:2], rng.uniform(2, 12, (rows, 2))
    corners = np.concatenate([centre - extent / 2, centre + extent / 2], 1)
    scores = rng.uniform(1e-5, 5e-4, (rows, classes))
    for place, (box, label, score) in enumerate(zip(boxes, labels, SCORES, strict=True)):
        corners[5 + 20 * place], scores[5 + 20 * place, label] = box, score
    return corners.astype(np.float32), scores.astype(np.float32)


def logits(scores: np.ndarray) -> np.ndarray:
    return np.log(scores / (1 - scores))


def head(boxes: np.ndarray, *middle: str, classes: int = 3, further: int = 0) -> np.ndarray:
    """(1, rows, values): centre and extent, objectness if asked for, scores, and others."""
    corners, scores = candidates(boxes, classes)
    parts = [cxcywh_from_xyxy(corners)]
    if middle:
        parts.append(np.full((len(scores), 1), 0.95))
        scores = scores / 0.95
    rng = np.random.default_rng(1)
    return np.concatenate([*parts, scores, rng.normal(0, 3, (len(scores), further))], 1).astype(np.float32)[None]


def rows_of(boxes: np.ndarray, order: str, padding: int = 0, *, first: int = 0) -> np.ndarray:
    """Finished rows in an order of the letters b (box), s, l, i (image), y (box with y first); labels from `first`."""
    parts = {
        "b": boxes,
        "y": boxes[:, [1, 0, 3, 2]],
        "s": SCORES[:, None],
        "l": LABELS[:, None] + first,
        "i": np.zeros((3, 1)),
    }
    rows = np.concatenate([parts[letter] for letter in order], 1).astype(np.float32)
    return np.concatenate([rows, np.zeros((padding, rows.shape[1]), np.float32)])


def distribution(
    boxes: np.ndarray, bins: int, strides: tuple[int, ...], offset: float
) -> tuple[np.ndarray, np.ndarray]:
    """((cells, 4 bins) logits, (cells, 3) scores): each box as distances from a cell that lies well inside it."""
    count = sum(-(-INPUT_HW[0] // stride) * -(-INPUT_HW[1] // stride) for stride in strides)
    cells = grid_cells(INPUT_HW, count)
    assert cells is not None
    rng = np.random.default_rng(0)
    distances, scores = rng.uniform(0.2, 1, (count, 4)), rng.uniform(1e-5, 5e-4, (count, 3))
    for box, label, score in zip(boxes, LABELS, SCORES, strict=True):
        points = (cells[:, :2] + offset) * cells[:, 2:]
        sides = np.concatenate([points - box[:2], box[2:] - points], 1) / cells[:, 2:]
        place = int(np.flatnonzero((sides > 0).all(1) & (sides < bins - 1.01).all(1))[0])
        distances[place], scores[place, label] = sides[place], score
    low = np.floor(distances).astype(int)
    weights = np.full((count, 4, bins), 1e-9)
    np.put_along_axis(weights, low[..., None], (1 - (distances - low))[..., None], 2)
    np.put_along_axis(weights, low[..., None] + 1, np.maximum(distances - low, 1e-9)[..., None], 2)
    return np.log(weights).reshape(count, -1).astype(np.float32), scores.astype(np.float32)


def maps_of(table: np.ndarray, strides: tuple[int, ...] = (8, 16, 32)) -> list[np.ndarray]:
    """(cells, C) as maps (1, C, h, w), fine to coarse."""
    found, start = [], 0
    for stride in strides:
        height, width = -(-INPUT_HW[0] // stride), -(-INPUT_HW[1] // stride)
        part = table[start : start + height * width]
        found.append(np.ascontiguousarray(part.T.reshape(1, -1, height, width)))
        start += height * width
    return found


def apart(boxes: np.ndarray, names: tuple[str, str, str], first: int = 0, *, batch: bool = True) -> Arrays:
    """Boxes, scores and labels in three arrays."""
    values = (boxes.astype(np.float32), SCORES, LABELS.astype(np.int64) + first)
    return {name: value[None] if batch else value for name, value in zip(names, values, strict=True)}


def yolox(boxes: np.ndarray) -> np.ndarray:
    """YOLOX's undecoded rows."""
    corners, scores = candidates(boxes)
    cells = grid_cells(INPUT_HW, CELLS)
    assert cells is not None
    centred = cxcywh_from_xyxy(corners)
    offsets = centred[:, :2] / cells[:, 2:] - cells[:, :2]
    coded = np.concatenate([offsets, np.log(centred[:, 2:] / cells[:, 2:])], 1)
    return np.concatenate([coded, np.full((CELLS, 1), 0.95), scores / 0.95], 1).astype(np.float32)[None]


def with_background(scores: np.ndarray, place: int) -> np.ndarray:
    """Scores with a column for background at the place, rows summing to 1."""
    return np.insert(scores, place, 1 - scores.sum(1), 1).astype(np.float32)


def detr(boxes: np.ndarray, classes: int = 3, labels: np.ndarray = LABELS) -> tuple[np.ndarray, np.ndarray]:
    """((1, 100, 4) centres and extents as shares, (1, 100, classes) scores)."""
    corners, scores = candidates(boxes, classes, 100, labels)
    return (cxcywh_from_xyxy(corners) / SHARES)[None], scores[None]


def keras_yolo(boxes: np.ndarray) -> Arrays:
    corners, scores = candidates(boxes)
    return {
        "yolonms_layer_1": (corners / SHARES)[None][..., [1, 0, 3, 2]],
        "yolonms_layer_1:1": scores.T[None],
        "yolonms_layer_1:2": np.array([[[0, 2, 5], [0, 0, 25], [0, 1, 45]]], np.int32),
    }


def tensorflow(boxes: np.ndarray, ids: np.ndarray) -> Arrays:
    shares = np.concatenate([boxes / SHARES, np.zeros((2, 4))]).astype(np.float32)[None]
    return {
        "detection_boxes:0": shares[..., [1, 0, 3, 2]],
        "detection_classes:0": np.concatenate([ids, [1, 1]]).astype(np.float32)[None],
        "detection_scores:0": np.concatenate([SCORES, [0, 0]]).astype(np.float32)[None],
        "num_detections:0": np.array([3], np.float32),
    }


def tensorflow_lite(boxes: np.ndarray, names: tuple[str, ...], labels: np.ndarray = LABELS) -> Arrays:
    shares = np.concatenate([boxes / SHARES, np.zeros((2, 4))]).astype(np.float32)[None]
    return {
        names[0]: shares[..., [1, 0, 3, 2]],
        names[1]: np.append(labels, [0, 0]).astype(np.float32)[None],
        names[2]: np.append(SCORES, [0, 0]).astype(np.float32)[None],
        names[3]: np.array([3], np.float32),
    }


def mxnet_misses() -> np.ndarray:
    """Rows of what MXNet's SSDs take for background: label -1, with a score and a box."""
    rng = np.random.default_rng(0)
    corner, extent = rng.uniform(0.1, 0.5, (20, 2)), rng.uniform(0.1, 0.4, (20, 2))
    scores = rng.uniform(0.02, 0.3, (20, 1))
    return np.concatenate([np.full((20, 1), -1), scores, corner, corner + extent], 1).astype(np.float32)


def efficient_nms(boxes: np.ndarray, names: tuple[str, str, str, str]) -> Arrays:
    padded = np.concatenate([boxes, np.full((2, 4), 7.0)]).astype(np.float32)
    return {
        names[0]: np.array([[3]], np.int32),
        names[1]: padded[None],
        names[2]: np.concatenate([SCORES, [0.7, 0.7]]).astype(np.float32)[None],
        names[3]: np.concatenate([LABELS, [1, 1]]).astype(np.int32)[None],
    }


def rotated(boxes: np.ndarray) -> np.ndarray:
    """Ultralytics' OBB head: extents exchanged and turned by a right angle, which is the same upright box."""
    corners, scores = candidates(boxes)
    centred = cxcywh_from_xyxy(corners)[:, [0, 1, 3, 2]]
    return np.concatenate([centred, scores, np.full((CELLS, 1), np.pi / 2)], 1).astype(np.float32)[None]


def anchored(
    boxes: np.ndarray, which: str, form: str = "maps", *, squashed: bool = False, own: tuple[Any, ...] = ()
) -> Arrays:
    """A raw head of a published set of anchors, or of its `own` coded like it: each box coded from the cell of its centre
    at a level that can say it."""
    anchors = ANCHOR_SETS[which]
    sizes = np.array(own or anchors.sizes).reshape(3, 3, 2)
    scales = anchors.centre_scales or (2.0 if anchors.squared else 1.0,) * 3
    rng = np.random.default_rng(0)
    grids = [rng.normal(0, 0.3, (64 // s, 96 // s, 3, 8)) for s in (8, 16, 32)]
    for grid in grids:
        grid[..., 4:] = -9.0
    for box, label, score in zip(cxcywh_from_xyxy(boxes), LABELS, SCORES, strict=True):
        level = 1
        stride, anchor = 16, 1
        ratio = box[2:] / sizes[level, anchor]
        cell = np.floor(box[:2] / stride).astype(int)
        part = (box[:2] / stride - cell + (scales[level] - 1) / 2) / scales[level]
        extent = logits(np.sqrt(ratio) / 2) if anchors.squared else np.log(ratio)
        values = [*logits(part), *extent, logits(np.array(0.95)), *[-9.0] * 3]
        values[5 + label] = logits(np.array(score / 0.95))
        grids[level][cell[1], cell[0], anchor] = values
    if squashed:
        grids = [1 / (1 + np.exp(-grid)) for grid in grids]
    turned = {
        "maps": lambda g: g.transpose(2, 3, 0, 1).reshape(1, 24, *g.shape[:2]),
        "anchors apart": lambda g: g.transpose(2, 0, 1, 3)[None],
        "channels last": lambda g: g[None],
        "maps, channels last": lambda g: g.reshape(1, *g.shape[:2], 24),
    }[form]
    return {name: turned(grid).astype(np.float32) for name, grid in zip("abc", grids, strict=True)}


def retinaface(boxes: np.ndarray, own: tuple[tuple[int, int], ...] = ()) -> Arrays:
    """RetinaFace in PyTorch: offsets from two priors a cell, face or not, and five landmarks, all in rows."""
    cells = grid_cells(INPUT_HW, CELLS)
    assert cells is not None
    sizes = np.array(own or ANCHOR_SETS["retinaface"].sizes, np.float32).reshape(3, 2, 2)
    rng = np.random.default_rng(0)
    offsets = rng.normal(0, 2, (2 * CELLS, 4)).astype(np.float32)
    scores = rng.uniform(1e-5, 5e-4, 2 * CELLS).astype(np.float32)
    for box, score in zip(cxcywh_from_xyxy(boxes), SCORES, strict=True):
        place = int(np.flatnonzero((cells[:, 2] == 16) & (cells[:, :2] == box[:2] // 16).all(1))[0])
        middle, prior = (cells[place, :2] + 0.5) * 16, sizes[1, 1]
        offsets[2 * place + 1] = *(box[:2] - middle) / (0.1 * prior), *np.log(box[2:] / prior) / 0.2
        scores[2 * place + 1] = score
    return {
        "loc": offsets[None],
        "conf": np.stack([1 - scores, scores], 1)[None],
        "landms": rng.normal(0, 2, (1, 2 * CELLS, 10)).astype(np.float32),
    }


def _one_class(boxes: np.ndarray, further: int = 0) -> np.ndarray:
    corners, scores = candidates(boxes, 1, labels=ONE_CLASS)
    rest = np.random.default_rng(1).normal(20, 30, (CELLS, further))
    return np.concatenate([cxcywh_from_xyxy(corners), scores, rest], 1).astype(np.float32)[None]


def _ones_in(table: np.ndarray) -> np.ndarray:
    """YOLOv6 has kept a column for objectness, which is always 1."""
    table[..., 5:] *= table[..., 4:5]
    table[..., 4] = 1
    return table


def _scores_across(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes, scores.T


def _dfl(boxes: np.ndarray, *, raw: bool) -> np.ndarray:
    coded, scores = distribution(boxes, 16, (8, 16, 32), 0.5)
    return np.concatenate([coded, logits(scores) if raw else scores], 1).astype(np.float32)


def _rknn(boxes: np.ndarray) -> Arrays:
    table = _dfl(boxes, raw=False)
    arrays: Arrays = {}
    for level, found in enumerate(maps_of(table)):
        arrays |= {f"box{level}": found[:, :64], f"cls{level}": found[:, 64:]}
        arrays[f"sum{level}"] = found[:, 64:].sum(1, keepdims=True)
    return arrays


def _nanodet_levels(boxes: np.ndarray) -> Arrays:
    coded, scores = distribution(boxes, 8, (8, 16, 32), 0.5)
    arrays: Arrays = {}
    start = 0
    for stride, count in ((8, 96), (16, 24), (32, 6)):
        arrays[f"cls_pred_stride_{stride}"] = scores[None, start : start + count]
        arrays[f"dis_pred_stride_{stride}"] = coded[None, start : start + count]
        start += count
    return arrays


def _best_of(boxes: np.ndarray) -> Arrays:
    corners, scores = candidates(boxes)
    twice = corners.copy()
    twice[6], scores[6] = corners[5] + 0.3, scores[5] * 0.9  # the first box again, which NMS must take out
    return {
        "boxes": twice[None],
        "scores": scores.max(1)[None],
        "class_idx": scores.argmax(1)[None].astype(np.uint8),
    }


def _picodet(boxes: np.ndarray) -> Arrays:
    """PicoDet without its postprocessing, as paddle2onnx names it: all scores, then all distributions, four levels."""
    coded, scores = distribution(boxes, 8, (8, 16, 32, 64), 0.5)
    counts = [-(-INPUT_HW[0] // stride) * -(-INPUT_HW[1] // stride) for stride in (8, 16, 32, 64)]
    ends = np.cumsum(counts)[:-1]
    tables = [*np.split(scores, ends), *np.split(coded, ends)]
    return {f"transpose_{n}.tmp_0": table[None] for n, table in zip((0, 2, 4, 6, 1, 3, 5, 7), tables, strict=True)}


PERSON = ("person",)
OWN_PRIORS = ((24, 24), (48, 48), (96, 96), (192, 192), (384, 384), (768, 768))
OWN_ANCHORS = ((8, 9), (15, 11), (20, 24), (28, 40), (45, 30), (50, 52), (70, 60), (80, 64), (96, 64))
PROTOTYPES = np.zeros((1, 32, 16, 24), np.float32)
BY_ID = np.array([COCO_BY_ID.index(name) for name in ("cow", "cat", "dog")])
IN_COCO = np.array([COCO_CLASSES.index(name) for name in ("cow", "cat", "dog")])
ONE_CLASS = np.zeros(3, int)
TASK = {task: ULTRALYTICS | {"task": task} for task in ("segment", "pose", "obb")}
TRACED = {"boxes": 0, "labels": 0, "scores": 0}

EXPORTS: dict[str, Export] = {
    "Ultralytics v5": Export(
        lambda b: {"output0": head(b, "objectness")},
        metadata={k: ULTRALYTICS[k] for k in ("names", "stride")},
        declared={},
    ),
    "Ultralytics v8, 11": Export(lambda b: {"output0": head(b).transpose(0, 2, 1)}, metadata=ULTRALYTICS, declared={}),
    "Ultralytics v8, dynamic": Export(
        lambda b: {"output0": head(b).transpose(0, 2, 1)},
        inputs=image("FLOAT", "batch", 3, "height", "width"),
        metadata=ULTRALYTICS,
        declared={},
    ),
    "Ultralytics v8, half": Export(
        lambda b: {"output0": head(b).transpose(0, 2, 1).astype(np.float16)},
        inputs=image("FLOAT16", 1, 3, *INPUT_HW),
        metadata=ULTRALYTICS,
        declared={},
    ),
    "Ultralytics v8, one class": Export(
        lambda b: {"output0": _one_class(b).transpose(0, 2, 1)},
        metadata=ULTRALYTICS | {"names": "{0: 'person'}"},
        declared={},
        names=PERSON,
    ),
    "Ultralytics v10, 26 end to end": Export(
        lambda b: {"output0": rows_of(b, "bsl", 5)[None]}, metadata=ULTRALYTICS, declared={}, hidden={"output0": 1}
    ),
    "Ultralytics v8-seg": Export(
        lambda b: {"output0": head(b, further=32).transpose(0, 2, 1), "output1": PROTOTYPES},
        metadata=TASK["segment"],
        declared={},
    ),
    "Ultralytics v5-seg": Export(
        lambda b: {"output0": head(b, "objectness", further=32), "output1": PROTOTYPES},
        metadata={k: ULTRALYTICS[k] for k in ("names", "stride")},
        declared={},
    ),
    "Ultralytics v8-seg with NMS": Export(
        lambda b: {
            "output0": np.concatenate([rows_of(b, "bsl", 5), np.ones((8, 32), np.float32)], 1)[None],
            "output1": PROTOTYPES,
        },
        metadata=TASK["segment"],
        declared={},
        hidden={"output0": 1},
    ),
    "Ultralytics v8-pose": Export(
        lambda b: {"output0": _one_class(b, 51).transpose(0, 2, 1)},
        metadata=TASK["pose"] | {"names": "{0: 'person'}", "kpt_shape": "[17, 3]"},
        declared={},
        names=PERSON,
    ),
    "Ultralytics v8-pose with NMS": Export(
        lambda b: {"output0": np.concatenate([rows_of(b, "bsl", 5), np.full((8, 51), 9, np.float32)], 1)[None]},
        metadata=TASK["pose"] | {"kpt_shape": "[17, 3]"},
        declared={},
        hidden={"output0": 1},
    ),
    "Ultralytics v8-obb with NMS": Export(
        lambda b: {
            "output0": np.concatenate(
                [cxcywh_from_xyxy(b)[:, [0, 1, 3, 2]], rows_of(b, "sl"), np.full((3, 1), np.pi / 2)], 1
            ).astype(np.float32)[None]
        },
        metadata=TASK["obb"],
        declared={},
        hidden={"output0": 1},
    ),
    "Ultralytics v8-obb": Export(
        lambda b: {"output0": rotated(b).transpose(0, 2, 1)}, metadata=TASK["obb"], declared={}
    ),
    "Ultralytics RT-DETR": Export(
        lambda b: {"output0": np.concatenate(detr(b), 2)}, resize="stretch", metadata=ULTRALYTICS, declared={}
    ),
    "YOLOv6": Export(lambda b: {"outputs": _ones_in(head(b, "objectness"))}),
    "YOLOv7 with grid": Export(lambda b: {"output": head(b, "objectness")}),
    "YOLOv7 end to end": Export(lambda b: {"output": rows_of(b, "ibls")}, hidden={"output": 0}),
    "YOLOv7 end to end for TensorRT": Export(
        lambda b: efficient_nms(b, ("num_dets", "det_boxes", "det_scores", "det_classes"))
    ),
    "YOLOX": Export(lambda b: {"output": yolox(b)}, "letterbox-corner", BYTES, "bgr"),
    "YOLO-NAS flat": Export(
        lambda b: {"graph2_flat_predictions": rows_of(b, "ibsl")},
        scaling=BYTES,
        inputs=image("UINT8", 1, 3, *INPUT_HW),
        hidden={"graph2_flat_predictions": 0},
    ),
    "YOLO-NAS batch": Export(
        lambda b: efficient_nms(b, ("num_predictions", "pred_boxes", "pred_scores", "pred_classes")),
        scaling=BYTES,
        inputs=image("UINT8", 1, 3, *INPUT_HW),
    ),
    "YOLO-NAS raw": Export(lambda b: dict(zip(("884", "877"), (a[None] for a in candidates(b)), strict=True))),
    "PP-YOLOE": Export(
        lambda b: {
            "multiclass_nms3_0.tmp_0": rows_of(b, "lsb"),
            "multiclass_nms3_0.tmp_2": np.array([3], np.int32),
        },
        "stretch",
        inputs=image("FLOAT", "n", 3, *INPUT_HW, name="image", scale_factor=("FLOAT", ("n", 2))),
        hidden={"multiclass_nms3_0.tmp_0": 0},
    ),
    "PP-YOLOE without NMS": Export(
        lambda b: dict(
            zip(("tmp_16", "concat_14.tmp_0"), (a[None] for a in _scores_across(*candidates(b))), strict=True)
        ),
        "stretch",
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="image", scale_factor=("FLOAT", (1, 2))),
    ),
    "Mask R-CNN of PaddleDetection": Export(
        lambda b: {
            "fetch_name_0": rows_of(b, "lsb"),
            "fetch_name_1": np.array([3], np.int32),
            "fetch_name_2": np.zeros((3, 20, 20), np.int32),
        },
        "stretch",
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="image", scale_factor=("FLOAT", (1, 2))),
        hidden={"fetch_name_0": 0, "fetch_name_2": 0},
    ),
    "RT-DETR of PaddleDetection": Export(
        lambda b: {"reshape2_95.tmp_0": rows_of(b, "lsb"), "tile_3.tmp_0": np.array([3], np.int32)},
        "stretch",
        inputs=image(
            "FLOAT", 1, 3, *INPUT_HW, name="image", im_shape=("FLOAT", (1, 2)), scale_factor=("FLOAT", (1, 2))
        ),
    ),
    "RT-DETR, D-FINE, DEIM": Export(
        lambda b: apart(b / SHARES, ("boxes", "scores", "labels")),
        "stretch",
        inputs=image("FLOAT", "N", 3, *INPUT_HW, orig_target_sizes=("INT64", ("N", 2))),
        scaled={"boxes": "orig_target_sizes"},
    ),
    "Hugging Face RT-DETR": Export(
        lambda b: {"logits": logits(detr(b)[1]), "pred_boxes": detr(b)[0]},
        "stretch",
        inputs=image("FLOAT", "b", "c", "h", "w", name="pixel_values"),
        declared={"class_names": NAMES, "input_size": 64},
        input_hw=(64, 64),
    ),
    "Hugging Face DETR": Export(
        lambda b: {
            "logits": np.log(with_background(detr(b, 91, BY_ID)[1][0], 91))[None],
            "pred_boxes": detr(b)[0],
            "encoder_last_hidden_state": np.zeros((1, 6, 256), np.float32),
        },
        "stretch",
        IMAGENET,
        inputs=image("FLOAT", "b", 3, *INPUT_HW, name="pixel_values", pixel_mask=("INT64", ("b", 64, 64))),
        declared={},
        names=COCO_BY_ID,
    ),
    "RF-DETR": Export(
        lambda b: {"dets": detr(b)[0], "labels": logits(detr(b, 91, BY_ID)[1])},
        "stretch",
        IMAGENET,
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="input"),
        declared={},
        names=COCO_BY_ID,
    ),
    "torchvision": Export(
        lambda b: apart(b, ("boxes", "scores", "labels"), first=1, batch=False), "stretch", hidden=TRACED
    ),
    "torchvision's Mask R-CNN": Export(
        lambda b: (
            apart(b, ("boxes", "scores", "labels"), first=1, batch=False)
            | {"masks": np.ones((3, 1, 28, 28), np.float32)}
        ),
        "stretch",
        hidden=TRACED | {"masks": 0},
    ),
    "torchvision, COCO": Export(
        lambda b: apart(b, ("boxes", "scores", "labels"), batch=False) | {"labels": BY_ID},
        "stretch",
        inputs=image("FLOAT", 3, *INPUT_HW),
        hidden=TRACED,
        declared={"class_names": "coco"},
        names=COCO_BY_ID,
    ),
    "TensorFlow's detection API": Export(
        lambda b: tensorflow(b, BY_ID),
        "stretch",
        BYTES,
        inputs=image("UINT8", 1, "h", "w", 3, name="inputs:0"),
        declared={"class_names": "coco", "input_size": 96},
        input_hw=(96, 96),
        names=COCO_BY_ID,
    ),
    "TensorFlow's detection API on floats": Export(
        lambda b: tensorflow(b, BY_ID),
        "stretch",
        BYTES,
        inputs=image("FLOAT", 1, *INPUT_HW, 3, name="image_tensor:0"),
        declared={"class_names": "coco"},
        names=COCO_BY_ID,
    ),
    "the zoo's SSD": Export(
        lambda b: apart(b / SHARES, ("bboxes", "scores", "labels"), first=1) | {"labels": IN_COCO[None] + 1},
        "stretch",
        IMAGENET,
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="image"),
        declared={"class_names": "coco"},
        names=COCO_CLASSES,
        hidden={"bboxes": 1, "scores": 1, "labels": 1},
    ),
    "the zoo's YOLOv3": Export(
        keras_yolo,
        inputs=image("FLOAT", "n", 3, *INPUT_HW, name="input_1", image_shape=("FLOAT", ("n", 2))),
        scaled={"yolonms_layer_1": "image_shape"},
    ),
    "EfficientDet": Export(
        lambda b: {"detections:0": rows_of(b, "iysl", 3, first=1)[None]},
        "letterbox-corner",
        BYTES,
        inputs=image("UINT8", 1, *INPUT_HW, 3, name="image_arrays:0"),
    ),
    "NanoDet-Plus": Export(
        lambda b: {"output": np.concatenate(distribution(b, 8, (8, 16, 32, 64), 0.0)[::-1], 1)[None]},
        "stretch",
        NANODET,
        "bgr",
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="data"),
    ),
    "NanoDet in levels": Export(
        lambda b: _nanodet_levels(b),
        "stretch",
        NANODET,
        "bgr",
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="input.1"),
    ),
    "PicoDet without postprocessing": Export(
        _picodet,
        "stretch",
        IMAGENET,
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="image"),
        metadata={"character": "\n".join(NAMES)},
        declared={},
    ),
    "mmdeploy": Export(
        lambda b: {"dets": rows_of(b, "bs", 4)[None], "labels": np.append(LABELS, [-1] * 4)[None]},
        "letterbox-corner",
        IMAGENET,
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="input"),
        hidden={"dets": 1, "labels": 1},
    ),
    "mmyolo": Export(lambda b: efficient_nms(b, ("num_dets", "boxes", "scores", "labels"))),
    "YOLOv4": Export(
        lambda b: {
            "boxes": (candidates(b, rows=200)[0] / SHARES)[None, :, None],
            "confs": candidates(b, rows=200)[1][None],
        },
        "stretch",
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="input"),
    ),
    "YOLOv8's raw levels": Export(
        lambda b: dict(zip("abc", maps_of(_dfl(b, raw=True)), strict=True)), metadata=ULTRALYTICS, declared={}
    ),
    "YOLOv8 for RKNN": Export(lambda b: _rknn(b)),
    "SSD of jetson-inference": Export(
        lambda b: {
            "scores": with_background(candidates(b, rows=300)[1], 0)[None],
            "boxes": (candidates(b, rows=300)[0] / SHARES)[None],
        },
        "stretch",
        HALVES,
        inputs=image("FLOAT", 1, 3, *INPUT_HW, name="input_0"),
        declared={"class_names": ("BACKGROUND", *NAMES)},
    ),
    "SSD's DetectionOutput": Export(
        lambda b: {"detection_out": rows_of(b / SHARES, "ilsb", first=1)[None, None]},
        "stretch",
        BYTES,
        "bgr",
        declared={"class_names": ("background", *NAMES)},
    ),
    "TensorFlow Lite's SSD": Export(
        partial(
            tensorflow_lite,
            names=("TFLite_Detection_PostProcess", *(f"TFLite_Detection_PostProcess:{i}" for i in (1, 2, 3))),
        ),
        "stretch",
        HALVES,
        inputs=image("FLOAT", 1, *INPUT_HW, 3, name="normalized_input_image_tensor"),
    ),
    "TensorFlow Lite's SSD of TensorFlow 2, COCO": Export(
        partial(tensorflow_lite, names=tuple(f"StatefulPartitionedCall:{i}" for i in (3, 1, 2, 0)), labels=BY_ID - 1),
        "stretch",
        BYTES,
        inputs=image("UINT8", 1, *INPUT_HW, 3, name="serving_default_input:0"),
        declared={"class_names": "coco"},
        names=COCO_BY_ID[1:],
    ),
    "GluonCV": Export(
        lambda b: {
            "box_ids": np.append(LABELS, [-1, -1]).astype(np.float32)[None, :, None],
            "scores": np.append(SCORES, [-1, -1]).astype(np.float32)[None, :, None],
            "bboxes": np.concatenate([b, np.full((2, 4), -1)]).astype(np.float32)[None],
        },
        "stretch",
        IMAGENET,
    ),
    "MXNet's MultiBoxDetection": Export(
        lambda b: {"multibox": np.concatenate([rows_of(b / SHARES, "lsb"), mxnet_misses()])[None]},
        declared={"class_names": NAMES, "resize": "letterbox"},
    ),
    "Hugging Face RT-DETR with its inner layers": Export(
        lambda b: {
            "logits": logits(detr(b)[1]),
            "pred_boxes": detr(b)[0],
            "last_hidden_state": np.zeros((1, 100, 256), np.float32),
            "intermediate_logits": np.zeros((1, 6, 100, 3), np.float32),
            "enc_topk_logits": logits(detr(b)[1]) - 1,
            "enc_topk_bboxes": detr(b)[0] + 0.01,
        },
        "stretch",
    ),
    "Azure Custom Vision": Export(
        lambda b: apart(b / SHARES, ("detected_boxes", "detected_scores", "detected_classes"), batch=False), "stretch"
    ),
    "Detectron2": Export(
        lambda b: apart(b, ("boxes", "scores", "classes"), batch=False) | {"image_size": np.array([64, 96])}, "stretch"
    ),
    "boxes, best score and class, no NMS yet (Qualcomm)": Export(lambda b: _best_of(b)),
    "one class without an axis": Export(
        lambda b: {
            "boxes": candidates(b, 1, labels=ONE_CLASS)[0][None],
            "scores": candidates(b, 1, labels=ONE_CLASS)[1].T,
        },
        declared={"class_names": PERSON},
        names=PERSON,
    ),
    **{
        f"raw {which} in {form}": Export(
            partial(anchored, which=which, form=form), declared={"class_names": NAMES, "anchors": which}
        )
        for which, form in (
            ("yolov5", "maps"),
            ("yolov5", "anchors apart"),
            ("yolov7", "anchors apart"),
            ("yolov3", "maps"),
            ("yolov4", "channels last"),
            ("yolov4", "maps, channels last"),
        )
    },
    "raw, anchors of its own, coded like yolov4": Export(
        partial(anchored, which="yolov4", own=OWN_ANCHORS),
        declared={"class_names": NAMES, "anchors": {"yolov4": OWN_ANCHORS}},
    ),
    **{
        f"RetinaFace in PyTorch, {which}": Export(
            partial(retinaface, own=own),
            "letterbox",
            CAFFE,
            "bgr",
            declared={"class_names": PERSON, "anchors": {"retinaface": own} if own else "retinaface"},
            names=PERSON,
        )
        for which, own in (("as published", ()), ("priors of its own", OWN_PRIORS))
    },
    "raw yolov5 for RKNN": Export(
        partial(anchored, which="yolov5", squashed=True), declared={"class_names": NAMES, "anchors": "yolov5"}
    ),
    "beside outputs of no use": Export(
        lambda b: {
            "embedding": np.zeros((1, 512), np.float32),
            "output0": head(b).transpose(0, 2, 1),
            "tokens": np.zeros((1, 20, 64), np.float32),
        },
        metadata=ULTRALYTICS,
        declared={},
    ),
}
