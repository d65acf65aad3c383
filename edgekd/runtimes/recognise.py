"""Find out what a foreign detector's outputs mean: from what is declared, from their names and shapes, and from one run.

What is declared wins. What is left is settled by the outputs of a probe image, where they leave one reading only; where
they leave two, the error says which key of the recipe decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import UserError
from edgekd.labels import NAMED_LABEL_SETS
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.outputs import (
    NORMALISED_BELOW,
    Activation,
    Background,
    BoxFormat,
    OutputFormat,
    OutputKind,
    activate,
    grid_cells,
    item_of,
)
from edgekd.types import FloatArray

_BOX_WORDS = ("box", "bbox", "loc")
_SCORE_WORDS = ("score", "conf", "prob", "logit")
_LABEL_WORDS = ("label", "class", "cls", "categor")
_COUNT_WORDS = ("num", "count", "valid")
_TENSORFLOW = ("detection_boxes", "detection_scores", "detection_classes", "num_detections")
"""What TensorFlow's Object Detection API calls its outputs."""
_COCO_COLUMNS = {80: "coco", 81: "coco", 90: "coco91", 91: "coco91", 92: "coco91"}


@dataclass(frozen=True)
class Recognised:
    """A format with the class names that fit it.

    Attributes:
        form: how to read the outputs.
        class_names: one a class, in label order.
        notes: what was found out rather than declared, one sentence each.
    """

    form: OutputFormat
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """The outputs of one run, with what the graph says about their ranks (a run may find nothing and lose axes).

    Attributes:
        source: the file's name, for messages.
        arrays: by output name; batch of one.
        input_hw: the probe's (height, width).
    """

    source: str
    arrays: Mapping[str, NDArray[Any]]
    input_hw: tuple[int, int]

    def listed(self) -> str:
        """Every output with shape and type."""
        return "; ".join(f"{name} {array.shape} {array.dtype}" for name, array in self.arrays.items())

    def unclear(self, what: str, fix: str) -> UserError:
        """The error for outputs that leave more than one reading, or none."""
        return UserError(f"{self.source}: {what}", got=f"outputs {self.listed()}", fix=fix)


def recognise(probe: Probe, declared: OnnxTeacher, found_names: Sequence[str] | None = None) -> Recognised:
    """The output format of a foreign detector.

    Args:
        probe: the outputs of one run on a picture.
        declared: what the recipe says; "auto" leaves a question to the outputs.
        found_names: class names from the file's metadata, if it has any.

    Raises:
        UserError: the outputs leave more than one reading or none; the message lists them and says what to declare.
    """
    names = _declared_names(declared) or (tuple(found_names) if found_names else None)
    arrays = {name: array for name, array in probe.arrays.items() if _core_rank(array) <= 2}
    kind = declared.output
    if kind in ("auto", "detections"):
        finished = _finished(probe, arrays, declared, names, certain=kind == "detections")
        if finished is not None:
            return finished
    if len(arrays) == 1 and kind in ("auto", "yolo", "yolo-objectness"):
        return _yolo(probe, next(iter(arrays.items())), declared, names)
    if kind in ("yolo", "yolo-objectness"):
        wide = [(name, array) for name, array in arrays.items() if _core_rank(array) == 2]
        if len(wide) != 1:
            raise probe.unclear(f"output: {kind} needs one array of candidates", "declare another `output`")
        return _yolo(probe, wide[0], declared, names)
    if kind in ("auto", "boxes-scores"):
        return _boxes_scores(probe, arrays, declared, names)
    raise probe.unclear(f"output: {kind} does not fit", "declare another `output`, or leave it out")


def _core_rank(array: NDArray[Any]) -> int:
    """Axes that are left without the batch and single axes in between."""
    return item_of(array, 0, 2).ndim if array.ndim > 1 else array.ndim


def _declared_names(declared: OnnxTeacher) -> tuple[str, ...] | None:
    if isinstance(declared.class_names, str):
        return NAMED_LABEL_SETS.get(declared.class_names)
    return tuple(declared.class_names)


def _named(name: str, words: Sequence[str]) -> bool:
    return any(word in name.lower() for word in words)


# --- finished detections -------------------------------------------------------------------------------------------


def _finished(
    probe: Probe,
    arrays: Mapping[str, NDArray[Any]],
    declared: OnnxTeacher,
    names: tuple[str, ...] | None,
    *,
    certain: bool,
) -> Recognised | None:
    """Finished detections in one array or several; None if the outputs are something else."""
    own = {name: array for name, array in arrays.items() if name.partition(":")[0] in _TENSORFLOW}
    if tensorflow := len(own) == len(_TENSORFLOW):
        arrays = own  # beside them stand raw boxes, anchors and other scores
    single = len(arrays) == 1
    roles = _row_roles(next(iter(arrays.items())), names, certain) if single else _column_roles(arrays)
    if roles is None:
        if certain:
            raise probe.unclear(
                "output: detections needs boxes, scores and labels, or one array of rows",
                "declare another `output`, or rename the outputs boxes, scores, labels",
            )
        return None
    outputs, columns = roles
    if names is None:
        raise probe.unclear(
            "finished detections, and no class names in the file",
            "declare `class_names`: a list in label order, coco, coco91 (COCO's own ids) or voc",
        )
    # TensorFlow's counts labels from 1 and puts y before x.
    background: Background = "first" if tensorflow else "none"
    if declared.background != "auto":
        background = declared.background
    boxes = np.asarray(arrays[outputs[0]], np.float32)[..., list(columns[:4])].reshape(-1, 4)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]  # padding, of zeros or -1, says nothing of the unit
    box_format: str = declared.box_format
    unit_unseen = box_format == "auto" and not len(boxes)
    if box_format == "auto":
        normalised = len(boxes) > 0 and float(np.abs(boxes).max()) <= NORMALISED_BELOW
        box_format = "xyxy-normalised" if normalised else "xyxy"
        if tensorflow:
            box_format, unit_unseen = "yxyx-normalised", False
    activation: Activation = "none" if declared.score_activation == "auto" else declared.score_activation
    if names == NAMED_LABEL_SETS["coco91"]:
        background = "none"  # these names already have the background at 0
    form = OutputFormat(
        "detections",
        outputs,
        len(names),
        cast(BoxFormat, box_format),
        activation,
        background,
        columns=columns,
        unit_unseen=unit_unseen,
    )
    unit = "pixels or shares as each image shows" if unit_unseen else box_format
    return Recognised(form, names, (f"outputs recognised as finished detections, boxes as {unit}",))


def _row_roles(
    output: tuple[str, NDArray[Any]], names: tuple[str, ...] | None, certain: bool
) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """One array of rows: (x1, y1, x2, y2, score, label), or (image, x1, y1, x2, y2, label, score)."""
    name, array = output
    if array.ndim == 2 and array.shape[1] == 7:
        return (name,), (1, 2, 3, 4, 6, 5)
    if array.ndim not in (2, 3) or array.shape[-1] != 6:
        return None
    rows = item_of(array, 0, 2).reshape(-1, 6)
    integral = bool((rows[:, 5] == np.rint(rows[:, 5])).all())
    # With one or two classes a raw head has six columns too; only whole numbers in the last one tell them apart.
    if certain or (integral and (len(rows) <= 1000 or names is None or len(names) > 2)):
        return (name,), (0, 1, 2, 3, 4, 5)
    return None


def _column_roles(arrays: Mapping[str, NDArray[Any]]) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """Boxes, scores and labels in arrays of their own, perhaps with a count; by type and name, since rows may be 0."""
    boxes = [name for name, array in arrays.items() if array.ndim >= 2 and array.shape[-1] in (4, 5)]
    if len(boxes) > 1:  # (1, N) columns with four or five rows look like boxes too
        boxes = [name for name in boxes if _named(name, _BOX_WORDS)] or boxes
        boxes = [name for name in boxes if arrays[name].ndim == max(arrays[other].ndim for other in boxes)]
    flat = {name: array for name, array in arrays.items() if name not in boxes and _is_column(array)}
    labels = [name for name, array in flat.items() if array.dtype.kind in "iu" and not _named(name, _COUNT_WORDS)]
    labels = [name for name in labels if flat[name].size != 1 or len(labels) == 1 or _named(name, _LABEL_WORDS)]
    labels = labels or [name for name in flat if _named(name, _LABEL_WORDS) and not _named(name, _COUNT_WORDS)]
    counts = [name for name in flat if name not in labels and _named(name, _COUNT_WORDS)]
    scores = [name for name, array in flat.items() if array.dtype.kind == "f" and name not in labels + counts]
    if not (len(boxes) == len(labels) == 1):
        return None
    if arrays[boxes[0]].shape[-1] == 5:  # the score stands behind the box
        return ((boxes[0], labels[0]), (0, 1, 2, 3, 4)) if not scores else None
    if len(scores) != 1:
        return None
    return (boxes[0], scores[0], labels[0], *counts[:1]), (0, 1, 2, 3, 4, 5)


def _is_column(array: NDArray[Any]) -> bool:
    """Whether an output has one value a row: (N,), (1, N), (1, N, 1), (N, 1) or a count."""
    return array.ndim <= 1 or sum(extent != 1 for extent in array.shape) <= 1


# --- raw YOLO heads ------------------------------------------------------------------------------------------------


def _yolo(
    probe: Probe, output: tuple[str, NDArray[Any]], declared: OnnxTeacher, names: tuple[str, ...] | None
) -> Recognised:
    name, array = output
    table = item_of(array, 0, 2)
    if table.ndim != 2 or min(table.shape) < 5:
        raise probe.unclear(
            "the output is neither a raw YOLO head (4 + K or 5 + K values a candidate) nor finished detections",
            "declare `output`, and export boxes with scores if the file is something else",
        )
    channels_first = _channels_first(probe, table, names)
    columns = table.shape[0 if channels_first else 1]
    kind = _yolo_kind(probe, columns, channels_first, declared, names)
    offset = 5 if kind == "yolo-objectness" else 4
    class_names, notes = _names_or_error(probe, declared, names, columns - offset)
    if len(class_names) != columns - offset:
        raise probe.unclear(
            f"{len(class_names)} class names do not fit {columns} values a candidate",
            f"declare {columns - 4} class names for `output: yolo`, or {columns - 5} for `output: yolo-objectness`",
        )
    values = np.asarray(table if channels_first else table.T, np.float32)
    activation = _activation(values[4:].T, declared, "sigmoid")
    offsets = declared.box_format == "auto" and kind == "yolo-objectness" and _are_grid_offsets(probe, values[:4].T)
    box_format: BoxFormat = "grid-offsets" if offsets else _box_format(probe, values[:4].T, declared, usual="cxcywh")
    form = OutputFormat(kind, (name,), len(class_names), box_format, activation, "none", channels_first)
    return Recognised(form, class_names, (f"outputs recognised as {kind}, boxes as {box_format}", *notes))


def _channels_first(probe: Probe, table: NDArray[Any], names: tuple[str, ...] | None) -> bool:
    """Whether values run along the first axis: by the number of classes, else the shorter axis."""
    if names is not None:
        fits = [extent - len(names) in (4, 5) for extent in table.shape]
        if fits[0] != fits[1]:
            return fits[0]
    if table.shape[0] == table.shape[1]:
        raise probe.unclear(
            "a square output does not show which axis holds the candidates", "export another input size"
        )
    return bool(table.shape[0] < table.shape[1])


def _yolo_kind(
    probe: Probe, columns: int, channels_first: bool, declared: OnnxTeacher, names: tuple[str, ...] | None
) -> OutputKind:
    if declared.output in ("yolo", "yolo-objectness"):
        return cast(OutputKind, declared.output)
    classes = 80 if names is None else len(names)
    if columns - classes == 4:
        return "yolo"
    if columns - classes == 5:
        return "yolo-objectness"
    raise probe.unclear(
        f"{columns} values a candidate fit neither 4 + {classes} nor 5 + {classes} classes",
        "declare `class_names`, and `output: yolo` or `output: yolo-objectness`; a head for masks, keypoints or rotated "
        "boxes has further values: take the detection model of it",
    )


# --- boxes and scores ----------------------------------------------------------------------------------------------


def _boxes_scores(
    probe: Probe, arrays: Mapping[str, NDArray[Any]], declared: OnnxTeacher, names: tuple[str, ...] | None
) -> Recognised:
    box_name, score_name, channels_first = _box_and_score(probe, arrays, names)
    boxes, scores = (np.asarray(item_of(arrays[n], 0, 2), np.float32) for n in (box_name, score_name))
    if channels_first:
        boxes, scores = boxes.T, scores.T
    columns = scores.shape[1]
    class_names, notes = _names_or_error(probe, declared, names, columns)
    has_background = _has_background(probe, columns, class_names, declared)
    activation = _activation(scores, declared, "softmax" if has_background else "sigmoid")
    background: Background = "none"
    if has_background:
        background = _background(probe, activate(scores, activation), class_names, declared)
    class_names = _fit_coco(class_names, columns - has_background, background)
    if len(class_names) != columns - has_background:
        raise probe.unclear(
            f"{len(class_names)} class names do not fit {columns} score columns",
            f"declare {columns} class names, or {columns - 1} with `background: first` or `last`",
        )
    box_format = _box_format(probe, boxes, declared, usual=None)
    form = OutputFormat(
        "boxes-scores", (box_name, score_name), len(class_names), box_format, activation, background, channels_first
    )
    found = f"outputs recognised as boxes ({box_format}) and scores (activation {activation}, background {background})"
    return Recognised(form, class_names, (found, *notes))


def _box_and_score(
    probe: Probe, arrays: Mapping[str, NDArray[Any]], names: tuple[str, ...] | None
) -> tuple[str, str, bool]:
    """(boxes, scores, channels first): the two arrays with one row a candidate."""
    tables = {name: item_of(array, 0, 2) for name, array in arrays.items() if _core_rank(array) == 2}
    for channels_first in (False, True):
        axis = 0 if channels_first else 1
        boxes = [name for name, table in tables.items() if table.shape[axis] == 4]
        if len(boxes) > 1:
            boxes = [name for name in boxes if _named(name, _BOX_WORDS)]
        if len(boxes) != 1:
            continue
        rows = tables[boxes[0]].shape[1 - axis]
        scores = [name for name, table in tables.items() if name != boxes[0] and table.shape[1 - axis] == rows]
        if len(scores) > 1 and names is not None:
            fitting = [name for name in scores if tables[name].shape[axis] - len(names) in (0, 1)]
            scores = fitting or scores
        if len(scores) > 1:
            scores = [name for name in scores if _named(name, (*_SCORE_WORDS, *_LABEL_WORDS))]
        if len(scores) == 1:
            return boxes[0], scores[0], channels_first
    raise probe.unclear(
        "no pair of boxes (N, 4) and scores (N, classes) among the outputs",
        "export the detector with decoded boxes and class scores, or declare `output`",
    )


def _has_background(probe: Probe, columns: int, class_names: tuple[str, ...], declared: OnnxTeacher) -> bool:
    if declared.background != "auto":
        return declared.background != "none"
    if class_names == NAMED_LABEL_SETS["coco91"]:
        return columns == 92
    return columns == len(class_names) + 1


def _background(probe: Probe, probs: FloatArray, class_names: Sequence[str], declared: OnnxTeacher) -> Background:
    """Nearly every candidate of a detector is background, so its column is the one that wins nearly everywhere."""
    if declared.background != "auto":
        return declared.background
    best = probs.argmax(1)
    first, last = float((best == 0).mean()), float((best == probs.shape[1] - 1).mean())
    if max(first, last) < 0.5:
        raise probe.unclear(
            f"{probs.shape[1]} score columns for {len(class_names)} classes, and neither end looks like background",
            "declare `background: first`, `last` or `none`, and the class names that go with it",
        )
    return "first" if first >= last else "last"


def _fit_coco(class_names: tuple[str, ...], columns: int, background: Background) -> tuple[str, ...]:
    """COCO's names by category id, cut to the columns that are left without background."""
    if class_names != NAMED_LABEL_SETS["coco91"]:
        return class_names
    return class_names[1:] if columns == 90 else class_names


# --- what all formats share ----------------------------------------------------------------------------------------


def _names_or_error(
    probe: Probe, declared: OnnxTeacher, names: tuple[str, ...] | None, columns: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names, notes): declared ones, or those of the file, or COCO's where the width is COCO's."""
    by_id = names == NAMED_LABEL_SETS["coco"] and columns in (90, 91, 92)
    if names is not None and not by_id:
        return names, ()
    if columns in _COCO_COLUMNS:
        key = _COCO_COLUMNS[columns]
        return NAMED_LABEL_SETS[key], () if by_id else (f"{columns} scores a candidate taken as COCO's classes",)
    raise probe.unclear(
        f"{columns} scores a candidate, and no names for them in the file",
        "declare `class_names`: a list in label order, coco, coco91 (COCO's own ids) or voc",
    )


def _activation(scores: FloatArray, declared: OnnxTeacher, for_logits: Activation) -> Activation:
    """Values outside [0, 1] are logits; what squashes them is known from whether there is a background column."""
    if declared.score_activation != "auto":
        return declared.score_activation
    inside = scores.size == 0 or (float(scores.min()) >= -1e-4 and float(scores.max()) <= 1.0 + 1e-4)
    return "none" if inside else for_logits


def _box_format(probe: Probe, boxes: FloatArray, declared: OnnxTeacher, usual: str | None) -> BoxFormat:
    """Which reading of the box values gives boxes at all; `usual` is what this kind of output is wont to be."""
    if declared.box_format != "auto":
        return declared.box_format
    boxes = boxes[np.isfinite(boxes).all(1)]
    if not len(boxes):
        raise probe.unclear(
            "no finite box on the probe picture",
            "export the detector anew: its outputs are NaN or infinite, as after an overflow in reduced precision",
        )
    normalised = float(np.abs(boxes).max()) <= NORMALISED_BELOW
    height, width = (1.0, 1.0) if normalised else (float(extent) for extent in probe.input_hw)
    as_corners = bool((boxes[:, 2:] >= boxes[:, :2]).all())
    as_centres = bool((boxes[:, 2:] >= 0).all()) and _mostly_inside(boxes, width, height)
    if usual == "cxcywh":
        as_centres = bool((boxes[:, 2:] >= 0).all()) and not (as_corners and not as_centres)
        as_corners = as_corners and not as_centres
    if as_corners == as_centres:
        raise probe.unclear(
            "the boxes can be read both as corners and as centre with extent"
            if as_corners
            else "the boxes are neither corners nor centre with extent: they look like offsets that are not decoded",
            "declare `box_format`" if as_corners else "export the detector with decoded boxes",
        )
    form = "xyxy" if as_corners else "cxcywh"
    return cast(BoxFormat, form + ("-normalised" if normalised else ""))


def _are_grid_offsets(probe: Probe, boxes: FloatArray) -> bool:
    """Whether a head's boxes are not decoded, as YOLOX exports them: one a cell, some extents' logarithms below 0."""
    return bool((boxes[:, 2:] < 0).any()) and grid_cells(probe.input_hw, len(boxes)) is not None


def _mostly_inside(boxes: FloatArray, width: float, height: float) -> bool:
    """Whether, read as centre with extent, boxes rarely reach far out of the picture."""
    reach = np.array([width, height], np.float32) * 0.25
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    outside = (low < -reach).any(1) | (high > np.array([width, height], np.float32) + reach).any(1)
    return float(outside.mean()) < 0.1
