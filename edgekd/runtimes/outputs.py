"""What a black box's output arrays mean, and how they become boxes in input pixels with class scores in [0, 1]."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, Mapping

import numpy as np

from edgekd.boxes import xyxy_from_cxcywh
from edgekd.errors import ArtifactError, RuntimeFailure
from edgekd.types import Array, FloatArray, IntArray

OutputKind = Literal["boxes-scores", "yolo", "yolo-objectness", "detections"]
BoxFormat = Literal["xyxy", "cxcywh", "yxyx", "xyxy-normalised", "cxcywh-normalised", "yxyx-normalised", "grid-offsets"]
Activation = Literal["none", "sigmoid", "softmax"]
Background = Literal["none", "first", "last"]
Arrays = Mapping[str, Array]
GRID_STRIDES = ((8, 16, 32), (8, 16, 32, 64))
"""Of "grid-offsets", by the number of candidates."""
NORMALISED_BELOW = 2.0
"""Boxes that all end within it are shares of the input: in pixels they would lie in one corner of it."""
_HIGHEST_SCORE = 1.01  # half precision rounds


@dataclass(frozen=True)
class OutputFormat:
    """How to read a detector's outputs.

    Attributes:
        kind: "boxes-scores": a box and a score a class in every row; "yolo": one array of 4 + K values a candidate;
            "yolo-objectness": 5 + K values; "detections": finished, one label a row, after the detector's own NMS.
        names: the arrays by role. boxes-scores: (boxes, scores). detections: (boxes, scores, labels) or
            (boxes, scores, labels, count), or (boxes with scores, labels), or one array of rows. yolo: one array.
        num_classes: K, without background.
        box_format: coding of the boxes; "normalised" means shares of the input's width and height; "grid-offsets" is
            YOLOX's: centres from the cell in cells, and logarithms of the extent in cells, fine to coarse.
        activation: what turns the scores into probabilities.
        background: where a score column for "no object" stands; in "detections", "first" means labels start at 1.
        channels_first: values run along the second to last axis, candidates along the last.
        columns: "detections" in one array: the columns of (x1, y1, x2, y2, score, label).
        unit_unseen: `box_format` is "xyxy" because nothing was found on the probe picture: an image whose boxes all end
            within `NORMALISED_BELOW` has them as shares.
    """

    kind: OutputKind
    names: tuple[str, ...]
    num_classes: int
    box_format: BoxFormat = "xyxy"
    activation: Activation = "none"
    background: Background = "none"
    channels_first: bool = False
    columns: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    unit_unseen: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether the detector has done its own NMS, so that none may follow."""
        return self.kind == "detections"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for reports."""
        return {**asdict(self), "names": list(self.names), "columns": list(self.columns)}


def decode(
    outputs: Arrays, form: OutputFormat, input_hw: tuple[int, int], item: int = 0
) -> tuple[FloatArray, FloatArray]:
    """One image's outputs to (boxes_xyxy (P, 4) float32 input pixels, scores (P, K) float32 in [0, 1]).

    Finished detections come back the same way, with a single score in each row above 0.

    Args:
        outputs: the arrays of one inference.
        form: how to read them.
        input_hw: the input tensor's (height, width).
        item: which image of the batch.

    Raises:
        RuntimeFailure: the outputs hold values that are not finite, or are not what `form` says.
        ArtifactError: finished detections with labels outside the class names, or scores above 1.
    """
    try:
        boxes, scores = _READERS[form.kind](outputs, form, item)
        boxes = _to_pixels(np.asarray(boxes, np.float32), _box_format(boxes, form), input_hw)
    except (KeyError, IndexError, ValueError) as error:
        raise RuntimeFailure(
            "a detector's outputs are not what its output format says",
            got="; ".join(f"{name} {array.shape}" for name, array in outputs.items()),
            expected=f"{form.kind} in {', '.join(form.names)} over {form.num_classes} classes ({error})",
        ) from error
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise RuntimeFailure(
            "a detector gave boxes or scores that are not finite",
            got=f"{int((~np.isfinite(boxes)).sum())} box values, {int((~np.isfinite(scores)).sum())} scores",
            fix="a reduced precision that overflows is the usual cause: compare with the fp32 file",
        )
    return boxes, scores


def item_of(array: Array, item: int, rank: int) -> Array:
    """One image's part of an output, with single axes dropped from the middle until it has `rank` axes."""
    if array.ndim > rank:
        array = array[item]
    while array.ndim > rank:
        single = [axis for axis in range(array.ndim) if array.shape[axis] == 1]
        if not single:
            break
        array = array.squeeze(single[0])
    return array


def activate(scores: Array, activation: Activation) -> FloatArray:
    """(P, C) raw scores to probabilities over the last axis."""
    values = np.asarray(scores, np.float32)
    if activation == "sigmoid":
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -80.0, 80.0))), np.float32)
    if activation == "softmax":
        powers = np.exp(values - values.max(-1, keepdims=True))
        return np.asarray(powers / powers.sum(-1, keepdims=True), np.float32)
    return values


def _read_boxes_scores(outputs: Arrays, form: OutputFormat, item: int) -> tuple[Array, FloatArray]:
    boxes, scores = (item_of(outputs[name], item, 2) for name in form.names)
    if form.channels_first:
        boxes, scores = boxes.T, scores.T
    probs = activate(scores, form.activation)
    if form.background == "first":
        probs = probs[:, 1:]
    elif form.background == "last":
        probs = probs[:, :-1]
    return boxes.reshape(-1, 4), _checked_width(probs, form)


def _read_yolo(outputs: Arrays, form: OutputFormat, item: int) -> tuple[Array, FloatArray]:
    table = item_of(outputs[form.names[0]], item, 2)
    if not form.channels_first:
        table = table.T
    objectness = form.kind == "yolo-objectness"
    scores = activate(table[4 + objectness :].T, form.activation)
    if objectness:
        scores = scores * activate(table[4], form.activation)[:, None]
    return table[:4].T, _checked_width(scores, form)


def _read_detections(outputs: Arrays, form: OutputFormat, item: int) -> tuple[Array, FloatArray]:
    if len(form.names) == 1:
        rows = _rows_of(outputs[form.names[0]], form, item)
        table = rows[:, list(form.columns)]
        boxes, scores, labels = table[:, :4], table[:, 4], table[:, 5]
    elif len(form.names) == 2:
        table = item_of(outputs[form.names[0]], item, 2).reshape(-1, 5)
        boxes, scores = table[:, :4], table[:, 4]
        labels = _column(outputs[form.names[1]], item, len(table))
    else:
        boxes = item_of(outputs[form.names[0]], item, 2).reshape(-1, 4)
        scores, labels = (_column(outputs[name], item, len(boxes)) for name in form.names[1:3])
        if len(form.names) == 4:
            count = int(outputs[form.names[3]].reshape(-1)[item])
            boxes, scores, labels = boxes[:count], scores[:count], labels[:count]
    classes: IntArray = np.rint(labels).astype(np.int64) - (form.background == "first")
    confidence = activate(scores, form.activation)
    real = (classes >= 0) & (confidence > 0)  # padding has no score or no label
    if (highest := float(confidence[real].max(initial=0.0))) > _HIGHEST_SCORE:
        raise ArtifactError(
            "a detector gives scores above 1",
            got=f"{highest:g}",
            expected="probabilities, in rows of x1, y1, x2, y2, score, label",
            fix="declare `score_activation: sigmoid` where they are logits; rows in another order, or percent, must be "
            "exported anew",
        )
    if form.background == "last":
        real &= classes != form.num_classes
    if (outside := classes[real & (classes >= form.num_classes)]).size:
        raise ArtifactError(
            "a detector gives labels for which it has no class names",
            got="label " + ", ".join(str(label) for label in np.unique(outside)[:5].tolist()),
            expected=f"0 to {form.num_classes - 1}: {form.num_classes} class names",
            fix="declare all of its classes in label order (`class_names`, --classes), or `background` where labels start "
            "at 1",
        )
    probs = np.zeros((int(real.sum()), form.num_classes), np.float32)
    probs[np.arange(len(probs)), classes[real]] = confidence[real]
    return boxes[real], probs


def _rows_of(array: Array, form: OutputFormat, item: int) -> Array:
    """One image's detection rows; an array over the whole batch names the image in its first column."""
    if array.ndim == 2 and min(form.columns) == 1:
        rows: Array = array[np.rint(array[:, 0]) == item]
        return rows
    return item_of(array, item, 2)


def _column(array: Array, item: int, rows: int) -> Array:
    """One value a detection, whatever single axes surround it."""
    flat = (array if array.size == rows or array.ndim == 1 else array[item]).reshape(-1)
    if len(flat) != rows:
        raise ValueError(f"{len(flat)} values for {rows} boxes")
    return flat


def _checked_width(scores: FloatArray, form: OutputFormat) -> FloatArray:
    if scores.shape[-1] != form.num_classes:
        raise ValueError(f"{scores.shape[-1]} score columns for {form.num_classes} classes")
    return scores


def _box_format(boxes: Array, form: OutputFormat) -> BoxFormat:
    if form.unit_unseen and boxes.size and float(np.abs(boxes).max()) <= NORMALISED_BELOW:
        return "xyxy-normalised"
    return form.box_format


@lru_cache(maxsize=4)
def grid_cells(input_hw: tuple[int, int], candidates: int) -> FloatArray | None:
    """(P, 3) x, y and stride of every cell of the grids that have so many cells in all; None if no grids do."""
    for strides in GRID_STRIDES:
        grids = {s: np.indices((input_hw[0] // s, input_hw[1] // s))[::-1].reshape(2, -1).T for s in strides}
        cells = np.concatenate([np.insert(grid, 2, stride, 1) for stride, grid in grids.items()])
        if len(cells) == candidates:
            return cells.astype(np.float32)
    return None


def _from_grid(boxes: FloatArray, input_hw: tuple[int, int]) -> FloatArray:
    cells = grid_cells(input_hw, len(boxes))
    if cells is None:
        raise ValueError(f"{len(boxes)} candidates are not the cells of strides 8, 16, 32 (and 64)")
    stride = cells[:, 2:]
    extent = np.exp(np.minimum(boxes[:, 2:], 20.0))  # what is larger is no box, and must not become infinite
    return xyxy_from_cxcywh(np.concatenate([(boxes[:, :2] + cells[:, :2]) * stride, extent * stride], 1))


def _to_pixels(boxes: FloatArray, box_format: BoxFormat, input_hw: tuple[int, int]) -> FloatArray:
    if box_format.startswith("cxcywh"):
        boxes = xyxy_from_cxcywh(boxes)
    elif box_format == "grid-offsets":
        boxes = _from_grid(boxes, input_hw)
    elif box_format.startswith("yxyx"):
        boxes = boxes[:, [1, 0, 3, 2]]
    if box_format.endswith("normalised"):
        height, width = input_hw
        boxes = boxes * np.array([width, height, width, height], np.float32)
    return boxes


_READERS = {
    "boxes-scores": _read_boxes_scores,
    "yolo": _read_yolo,
    "yolo-objectness": _read_yolo,
    "detections": _read_detections,
}
