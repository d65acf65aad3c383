"""Recognise boxes and class scores in two arrays, as SSD's, DETR's and decoded YOLOs have them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.anchored import prior_cells
from edgekd.runtimes.grids import grid_cells
from edgekd.runtimes.heads import activation_of, declared_anchors
from edgekd.runtimes.output_format import Activation, Background, BoxFormat, OutputFormat
from edgekd.runtimes.outputs import Arrays, activate, item_of, paired
from edgekd.runtimes.probe import (
    BOX_WORDS,
    LABEL_WORDS,
    SCORE_WORDS,
    Probe,
    Recognised,
    box_format_of,
    coco_by_id,
    named,
    names_or_error,
)
from edgekd.types import Array, FloatArray

_FACTOR_WORDS = ("obj", "centerness", "centreness")
"""In the names of values that class scores are to be multiplied by: YOLO's objectness, FCOS's centre-ness."""
_UNLIKELY = -1.0
"""A logit that a sigmoid head gives nearly every candidate less than, and a softmax's background more than."""
_WINS = 0.5
"""Of candidates: nearly every one of a detector is background, so its column wins nearly everywhere, and clearly."""


def boxes_scores(
    probe: Probe, pair: tuple[str, str, bool], declared: OnnxTeacher, names: tuple[str, ...] | None
) -> Recognised:
    """How a pair of arrays, as `box_and_score` found it, is read.

    Raises:
        UserError: it leaves more than one reading or none.
    """
    box_name, score_name, channels_first = pair
    boxes, scores = tables_of(probe, pair)
    factors = [n for n, a in probe.arrays.items() if n not in pair and a.size == len(boxes) and named(n, _FACTOR_WORDS)]
    if factors:
        raise probe.unclear(
            f"{factors[0]!r} beside the class scores looks like a factor of theirs, which would be left out",
            "export the detector with scores that it has been multiplied into, or with both in one array (`output: "
            "yolo-objectness`)",
        )
    columns = scores.shape[1]
    class_names, notes = names_or_error(probe, names, columns)
    aside = [n for n, a in probe.arrays.items() if n not in pair and a.size == len(boxes) and a.dtype.kind == "f"]
    notes = (*notes, *(f"{n!r} left aside: if scores are to be multiplied by it, export them so" for n in aside))
    activation, background = _activation_and_background(probe, scores, class_names, declared)
    has_background = background != "none"
    if coco_by_id(class_names) and columns - has_background == 90:
        class_names = class_names[1:]
    if len(class_names) != columns - has_background:
        if columns == 1:
            raise probe.unclear(
                f"one score a box, and {len(class_names)} class names",
                "declare one name; or, if labels stand in an output apart, export it called labels, as numbers, beside boxes "
                "and scores",
            )
        raise probe.unclear(
            f"{len(class_names)} class names{' and background' * has_background} do not fit {columns} score columns",
            f"declare {columns} class names, or {columns - 1} with `background: first` or `last`; a column that is never used "
            "needs a name, too",
        )
    priors = _priors(probe, boxes, declared)
    box_format: BoxFormat = "grid-priors" if priors else box_format_of(probe, boxes, declared, usual=None)
    if declared.box_format == "auto" and any("yolonms" in name for name in probe.arrays):
        box_format = "yxyx"  # Keras YOLOv3, of the ONNX model zoo
    form = OutputFormat(
        "boxes-scores",
        (box_name, score_name),
        len(class_names),
        box_format,
        activation,
        background,
        channels_first,
        anchors=priors,
    )
    found = f"outputs recognised as boxes ({box_format}) and scores (activation {activation}, background {background})"
    return Recognised(form, class_names, (found, *notes))


def _priors(probe: Probe, boxes: FloatArray, declared: OnnxTeacher) -> tuple[float, ...]:
    """The declared priors that boxes are coded by; empty where they are decoded.

    Raises:
        UserError: there are not as many boxes as the priors have; or they look coded, and no priors are declared.
    """
    anchors = None if declared.anchors is None else declared_anchors(declared.anchors)
    if anchors is None or not anchors.in_rows:
        if declared.box_format == "auto" and _look_coded(probe, boxes):
            raise probe.unclear(
                "the boxes are neither corners nor centre with extent: they look like offsets from priors, two a cell",
                "declare `anchors: retinaface` if it is one, or its priors, fine to coarse: `anchors: {retinaface: [[24, 24], "
                "[48, 48], ...]}`; or export the detector with decoded boxes",
            )
        return ()
    count = len(anchors.sizes) // 2
    if prior_cells(len(boxes), count, probe.input_hw) is None:
        raise probe.unclear(
            f"{len(boxes)} boxes are not those of {count} priors, an equal share in each cell of every level",
            "declare the priors of each level, fine to coarse, in input pixels: `anchors: {retinaface: [[16, 16], ...]}`",
        )
    return anchors.sizes


def _look_coded(probe: Probe, boxes: FloatArray) -> bool:
    """Whether boxes are about 0, and two for every cell of the usual grids."""
    two_a_cell = len(boxes) % 2 == 0 and grid_cells(probe.input_hw, len(boxes) // 2) is not None
    return (
        two_a_cell
        and bool((boxes[:, 2:] < 0).any(1).mean() > 0.1)
        and bool((boxes[:, 2:] < boxes[:, :2]).any(1).mean() > 0.1)
    )


def tables_of(probe: Probe, pair: tuple[str, str, bool]) -> tuple[FloatArray, FloatArray]:
    """((P, 4) boxes, (P, columns) scores) of a pair of arrays, as `box_and_score` found it."""
    box_name, score_name, channels_first = pair
    boxes, scores = (_table(probe.arrays[n]).astype(np.float32) for n in (box_name, score_name))
    if channels_first:
        boxes, scores = boxes.T, scores.T
    return boxes, paired(boxes, scores)


def _table(array: Array) -> Array:
    """One image's rows of an output; of one value a row, without an axis for it, too."""
    return item_of(array, 0, 2) if array.ndim > 1 else array[:, None]


def box_and_score(probe: Probe, arrays: Arrays, names: tuple[str, ...] | None) -> tuple[str, str, bool] | None:
    """(boxes, scores, boxes have channels first): the two arrays with one row a candidate; None if there are none."""
    tables = {name: _table(array) for name, array in arrays.items() if array.ndim > 0 and array.dtype.kind == "f"}
    tables = {name: table for name, table in tables.items() if table.ndim == 2}
    for channels_first in (False, True):
        axis = 0 if channels_first else 1
        boxes = [name for name, table in tables.items() if table.shape[axis] == 4]
        if len(boxes) > 1:
            boxes = [name for name in boxes if named(name, BOX_WORDS)]
        if len(boxes) != 1:
            continue
        rows = tables[boxes[0]].shape[1 - axis]
        others = {name: table for name, table in tables.items() if name != boxes[0]}
        scores = [name for name, table in others.items() if table.shape[1 - axis] == rows]
        scores = scores or [name for name, table in others.items() if table.shape[axis] == rows]
        if len(scores) > 1 and names is not None:
            widths = {name: tables[name].size // max(rows, 1) for name in scores}
            scores = [name for name in scores if widths[name] - len(names) in (0, 1)] or scores
        if len(scores) > 1:
            scores = [name for name in scores if named(name, (*SCORE_WORDS, *LABEL_WORDS))]
        if len(scores) == 1:
            return boxes[0], scores[0], channels_first
    return None


def _activation_and_background(
    probe: Probe, scores: FloatArray, class_names: tuple[str, ...], declared: OnnxTeacher
) -> tuple[Activation, Background]:
    columns, by_id = scores.shape[1], coco_by_id(class_names)
    has_background = _has_background(columns, class_names, declared)
    activation = activation_of(probe, scores, declared)
    if activation == "sigmoid" and declared.score_activation == "auto" and (has_background or by_id):
        end = _winner(activate(scores, "softmax"))
        # Sigmoids' logits are far below 0 for what is no object, in a column that was never used too (Deformable DETR's).
        stands_out = end is not None and float(np.median(scores[:, 0 if end == "first" else -1])) > _UNLIKELY
        activation = "softmax" if stands_out else "sigmoid"
    probs = activate(scores, activation)
    if columns == 91 and by_id and declared.background == "auto":
        has_background = _winner(probs) == "first"  # else id 0 is a column like any other
    return activation, _background(probe, probs, class_names, declared) if has_background else "none"


def _has_background(columns: int, class_names: tuple[str, ...], declared: OnnxTeacher) -> bool:
    if declared.background != "auto":
        return declared.background != "none"
    if coco_by_id(class_names):
        return columns == 92
    return columns == len(class_names) + 1


def _winner(probs: FloatArray) -> Background | None:
    """The end at which a column wins nearly everywhere, and clearly, if one does: not just that of the commonest class."""
    best = probs.argmax(1)
    first, last = best == 0, best == probs.shape[1] - 1
    end: Background = "first" if first.mean() >= last.mean() else "last"
    wins = first if end == "first" else last
    if wins.mean() < _WINS or np.median(probs[wins, 0 if end == "first" else -1]) < _WINS:
        return None
    return end


def _background(probe: Probe, probs: FloatArray, class_names: Sequence[str], declared: OnnxTeacher) -> Background:
    if declared.background != "auto":
        return declared.background
    found = _winner(probs)
    if found is None:
        raise probe.unclear(
            f"{probs.shape[1]} score columns for {len(class_names)} classes, and neither end looks like background",
            "declare `background: first` (a first column that is never used, as Deformable DETR's, too), `last` or `none`, and "
            "the class names that go with it",
        )
    return found
