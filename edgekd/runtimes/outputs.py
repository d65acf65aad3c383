"""How a black box's output arrays become boxes in input pixels with class scores in [0, 1]."""

from __future__ import annotations

from dataclasses import replace
from typing import Mapping, Sequence

import numpy as np

from edgekd.boxes import xyxy_from_cxcywh
from edgekd.errors import ArtifactError, RuntimeFailure
from edgekd.runtimes.anchored import AnchorSet, candidates_of, decoded, from_priors
from edgekd.runtimes.grids import from_distances, from_offsets
from edgekd.runtimes.output_format import NORMALISED_BELOW, Activation, BoxFormat, OutputFormat
from edgekd.runtimes.rows import HIGHEST_SCORE, layout_of
from edgekd.types import Array, FloatArray, IntArray

Arrays = Mapping[str, Array]
_SURE = 0.5
"""Scores above it are no noise: a detector never gives one to a label that it was never taught."""


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
    if form.frame_hw:
        height, width = form.frame_hw
        boxes, scores = decode(outputs, replace(form, frame_hw=()), (height, width), item)
        return boxes * np.array([input_hw[1] / width, input_hw[0] / height] * 2, np.float32), scores
    try:
        if form.box_format == "grid-anchors":
            boxes, scores = _read_anchored(outputs, form, item, input_hw)
        else:
            boxes, scores = _READERS[form.kind](outputs, form, item)
            boxes = np.asarray(boxes, np.float32)
            if form.box_format == "grid-priors":
                boxes = from_priors(boxes, form.anchors, input_hw)
            else:
                boxes = _to_pixels(boxes, _box_format(boxes, form), input_hw)
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
    if form.activation == "none" and (highest := float(scores.max(initial=0.0))) > HIGHEST_SCORE:
        raise ArtifactError(
            "a detector gives scores above 1",
            got=f"{highest:g}",
            expected="probabilities, as its outputs were read",
            fix="declare `score_activation: sigmoid` or `softmax` where they are logits; percent must be exported anew; a file "
            "whose boxes and scores were quantised with one scale, without the operators behind its last convolutions",
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


def table_of(arrays: Sequence[Array], item: int, channels_first: bool) -> Array:
    """One image's candidates (P, C) of one output, or of one a level: (B, P, C), (B, C, P) or maps (B, C, h, w)."""
    tables = []
    for array in arrays:
        if array.ndim == 4 and len(arrays) > 1:
            tables.append(array[item].reshape(array.shape[1], -1).T)
            continue
        part = item_of(array, item, 2)
        tables.append(part.T if channels_first else part)
    return tables[0] if len(tables) == 1 else np.concatenate(tables)


def paired(boxes: Array, scores: Array) -> Array:
    """Scores turned so that they have a row a box: PaddleDetection's lie across, and one class may come without axis."""
    if len(scores) != len(boxes) and scores.shape[-1] == len(boxes):
        scores = scores.T
    return scores


def _read_boxes_scores(outputs: Arrays, form: OutputFormat, item: int) -> tuple[Array, FloatArray]:
    half = len(form.names) // 2
    box_arrays, score_arrays = ([outputs[n] for n in names] for names in (form.names[:half], form.names[half:]))
    boxes = table_of(box_arrays, item, form.channels_first)
    if form.num_classes == 1 and score_arrays[0].ndim == box_arrays[0].ndim - 1:
        score_arrays = [array[..., None] for array in score_arrays]
    scores = paired(boxes, table_of(score_arrays, item, form.channels_first))
    probs = activate(scores, form.activation)
    if form.background == "first":
        probs = probs[:, 1:]
    elif form.background == "last":
        probs = probs[:, :-1]
    return boxes, _checked_width(probs, form)


def _read_yolo(outputs: Arrays, form: OutputFormat, item: int) -> tuple[Array, FloatArray]:
    table = table_of([outputs[name] for name in form.names], item, form.channels_first)
    objectness = int(form.kind == "yolo-objectness")
    width = table.shape[1] - form.extra
    coded = width - objectness - form.num_classes
    if coded != 4 and not (form.box_format.startswith("grid-distances") and coded > 0):
        raise ValueError(f"{width} values a candidate for {form.num_classes} classes")
    first = 0 if form.boxes_last else coded + objectness
    boxes = table[:, form.num_classes : width] if form.boxes_last else table[:, :coded]
    scores = activate(table[:, first : first + form.num_classes], form.activation)
    if objectness:
        scores = scores * activate(table[:, coded], form.activation)[:, None]
    if form.box_format == "cxcywh-rotated":
        boxes = np.concatenate([boxes, table[:, -1:]], 1)
    return boxes, scores


def _read_anchored(
    outputs: Arrays, form: OutputFormat, item: int, input_hw: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """Maps with anchors, one a level: box, objectness and scores of each, as logits unless the graph has a sigmoid."""
    maps = [outputs[name] for name in form.names]
    raw, places = candidates_of(maps, item, 5 + form.num_classes, input_hw)
    anchors = AnchorSet(form.anchors, form.anchors_squared, form.centre_scales)
    squashed = form.activation == "none"
    boxes = decoded(raw[:, :4], places, anchors, len(maps), squashed=squashed)
    objectness = activate(raw[:, 4], "none" if squashed else "sigmoid")
    return boxes, activate(raw[:, 5:], form.activation) * objectness[:, None]


def _read_detections(outputs: Arrays, form: OutputFormat, item: int) -> tuple[Array, FloatArray]:
    if len(form.names) == 1:
        rows = rows_of(outputs[form.names[0]], item)
        columns = form.columns or layout_of(rows, form.num_classes)
        table = rows[:, list(columns)] if columns else np.zeros((0, 6), np.float32)
        boxes, scores, labels = table[:, :4], table[:, 4], table[:, 5]
        if form.box_format == "cxcywh-rotated":
            boxes = np.concatenate([boxes, rows[:, -1:]], 1)
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
    return _labelled(boxes, activate(scores, form.activation), labels, form)


def _labelled(boxes: Array, confidence: FloatArray, labels: Array, form: OutputFormat) -> tuple[Array, FloatArray]:
    """Detections as rows of class scores; padding, which has no score or no label, is left out.

    Raises:
        ArtifactError: labels that are not whole, have no name or mean background, or scores above 1.
    """
    classes: IntArray = np.rint(labels).astype(np.int64) - (form.background == "first")
    real = (labels >= 0) & (confidence > 0)
    if (broken := labels[real & (np.abs(labels - np.rint(labels)) > 1e-3)]).size:
        raise ArtifactError(
            "a detector gives labels that are not whole numbers",
            got=f"{broken[0]:g}",
            expected="detections in rows of x1, y1, x2, y2, score, label, or boxes, scores and labels apart",
            fix="the outputs mean something else: declare `output`, or rename them boxes, scores, labels",
        )
    if (highest := float(confidence[real].max(initial=0.0))) > HIGHEST_SCORE:
        raise ArtifactError(
            "a detector gives scores above 1",
            got=f"{highest:g}",
            expected="probabilities, in rows of x1, y1, x2, y2, score, label",
            fix="declare `score_activation: sigmoid` where they are logits; rows in another order, or percent, must be "
            "exported anew",
        )
    if (real & (classes < 0)).any():
        raise ArtifactError(
            "a detector gives label 0 to an object, which was taken for background",
            got="background: first",
            expected="labels that start at 1",
            fix="declare `background: none`: its labels start at 0",
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
    sure = classes[real & (confidence > _SURE)]
    if form.unused_labels and (unused := sure[np.isin(sure, form.unused_labels)]).size:
        raise ArtifactError(
            "a detector is sure of objects whose labels are COCO category ids that no class has",
            got="label " + ", ".join(str(label) for label in np.unique(unused)[:5].tolist()),
            expected="COCO's category ids, as its labels were read",
            fix="declare `background: first` if label 1 is the first of 80 classes in a row, `background: none` if label 0 is",
        )
    probs = np.zeros((int(real.sum()), form.num_classes), np.float32)
    probs[np.arange(len(probs)), classes[real]] = confidence[real]
    return boxes[real], probs


def names_image(array: Array) -> bool:
    """Whether detection rows of this shape are those of a whole batch, with the image in the first of seven columns."""
    return array.shape[-1] == 7 and (array.ndim == 2 or (array.ndim == 4 and array.shape[:2] == (1, 1)))


def rows_of(array: Array, item: int) -> Array:
    """One image's detection rows (N, C); of an array over the whole batch those that name the image."""
    if names_image(array):
        flat = array.reshape(-1, 7)
        rows: Array = flat[np.rint(flat[:, 0]) == item]
        return rows
    if array.ndim == 4:
        array = array.reshape(array.shape[0], -1, array.shape[-1])
    return array[item] if array.ndim == 3 else array


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


def _to_pixels(boxes: FloatArray, box_format: BoxFormat, input_hw: tuple[int, int]) -> FloatArray:
    if box_format == "grid-offsets":
        return from_offsets(boxes, input_hw)
    if box_format.startswith("grid-distances"):
        return from_distances(boxes, input_hw, centred=box_format == "grid-distances")
    if box_format == "cxcywh-rotated":
        boxes = _around(boxes)
    if boxes.shape[1:] != (4,):
        raise ValueError(f"{boxes.shape[1:]} values a box")
    if box_format.startswith("cxcywh"):
        boxes = xyxy_from_cxcywh(boxes)
    elif box_format.startswith("xywh"):
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    elif box_format.startswith("yxyx"):
        boxes = boxes[:, [1, 0, 3, 2]]
    if box_format.endswith("normalised"):
        height, width = input_hw
        boxes = boxes * np.array([width, height, width, height], np.float32)
    return boxes


def _around(boxes: FloatArray) -> FloatArray:
    """(P, 5) centre, extent and angle in radians to the (P, 4) centre and extent of the upright box around it."""
    cosine, sine = np.abs(np.cos(boxes[:, 4:])), np.abs(np.sin(boxes[:, 4:]))
    width, height = boxes[:, 2:3], boxes[:, 3:4]
    return np.concatenate([boxes[:, :2], width * cosine + height * sine, width * sine + height * cosine], 1)


_READERS = {
    "boxes-scores": _read_boxes_scores,
    "yolo": _read_yolo,
    "yolo-objectness": _read_yolo,
    "detections": _read_detections,
}
