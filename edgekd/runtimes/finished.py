"""Recognise finished detections: rows of one array, or boxes, scores and labels in arrays of their own."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from edgekd.labels import COCO_UNUSED_IDS, NAMED_LABEL_SETS
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.output_format import NORMALISED_BELOW, Activation, Background, BoxFormat, OutputFormat
from edgekd.runtimes.outputs import Arrays, names_image, rows_of
from edgekd.runtimes.probe import (
    BOX_WORDS,
    COUNT_WORDS,
    LABEL_WORDS,
    SCORE_WORDS,
    Probe,
    Recognised,
    named,
)
from edgekd.runtimes.rows import LAYOUTS, fitting, in_words, telling
from edgekd.types import FloatArray

_TENSORFLOW = ("detection_boxes", "detection_scores", "detection_classes", "num_detections")
"""What TensorFlow's Object Detection API calls its outputs."""
_TFLITE = ("TFLite_Detection_PostProcess", "StatefulPartitionedCall")
"""What TensorFlow Lite's calls all of its, by the version of its exporter: with ":1", ":2", ":3" behind."""
_REVERSED = 0.2
"""Of the rows: more whose corners are in the wrong order are no corners."""
_OVER = 0.03
"""How far, of its side, boxes may reach over the picture's edge."""
_COCO, _COCO_BY_ID = NAMED_LABEL_SETS["coco"], NAMED_LABEL_SETS["coco91"]
_UNUSED = {_COCO_BY_ID[label] for label in COCO_UNUSED_IDS}
_Origin = Literal["tensorflow", "TensorFlow Lite", "torchvision", "SSD", "unknown-start", "other"]
Roles = tuple[tuple[str, ...], tuple[int, ...]]


def finished(
    probe: Probe, arrays: Arrays, declared: OnnxTeacher, names: tuple[str, ...] | None, *, certain: bool
) -> Recognised | None:
    """Finished detections in one array or several; None if the outputs are something else.

    Args:
        certain: they are declared to be finished.

    Raises:
        UserError: something about them must be declared.
    """
    own = {name: array for name, array in arrays.items() if name.partition(":")[0] in _TENSORFLOW}
    if len(own) == len(_TENSORFLOW):
        arrays = own  # beside them stand raw boxes, anchors and other scores
    roles = _tflite_roles(arrays) or _row_roles(probe, arrays, names, certain) or _column_roles(arrays)
    if roles is None:
        if certain:
            raise probe.unclear(
                "output: detections needs boxes, scores and labels, or one array of rows",
                "declare another `output`, or rename the outputs boxes, scores, labels",
            )
        return None
    if names is None:
        raise probe.unclear(
            "finished detections, and no class names in the file",
            "declare `class_names` (--classes): a list in label order, coco, coco91 (COCO's own ids) or voc",
        )
    outputs, columns = roles
    origin = _origin(probe, outputs, arrays)
    names, background, counted = _labels(probe, origin, names, declared)
    box_format, unit_unseen = _boxes(probe, origin, outputs, columns, arrays, declared)
    activation: Activation = "none" if declared.score_activation == "auto" else declared.score_activation
    rows = _row_count(arrays[outputs[0]])
    overlapping = not probe.has_too_few_for_raw(rows)
    form = OutputFormat(
        "detections",
        outputs,
        len(names),
        box_format,
        activation,
        background,
        columns=columns,
        unit_unseen=unit_unseen,
        unused_labels=tuple(label for label, name in enumerate(names) if name in _UNUSED),
        overlapping=overlapping,
    )
    unit = "pixels or shares as each image shows" if unit_unseen else box_format
    notes = [f"outputs recognised as finished detections, boxes as {unit}", counted]
    if len(outputs) == 1:
        order = f"as {in_words(columns)}" if columns else "in the order that each image's rows show"
        notes.append(f"detection rows read {order}")
    if overlapping:
        notes.append(f"{rows} rows, which no NMS has thinned yet: edgekd does it")
    return Recognised(form, names, tuple(notes))


def _row_count(array: NDArray[Any]) -> int:
    return int(np.prod(array.shape[:-1]))


def _origin(probe: Probe, outputs: tuple[str, ...], arrays: Arrays) -> _Origin:
    """Who exported them, as far as that says where labels start: from their names, and whether they have a batch axis."""
    plain = {name.partition(":")[0] for name in outputs}
    if len(outputs) == 1 and arrays[outputs[0]].shape[-1] == 7:
        if arrays[outputs[0]].ndim == 4:
            return "SSD"  # DetectionOutput
        return "tensorflow" if probe.channels_last else "other"  # EfficientDet
    if len(outputs) < 3:
        return "other"
    if plain == set(_TENSORFLOW):  # whose names NVIDIA's EfficientNMS has too, with boxes in pixels
        in_pixels = float(np.abs(arrays[outputs[0]]).max(initial=0.0)) > NORMALISED_BELOW
        return "other" if in_pixels else "tensorflow"
    if len(plain) == 1:
        return "TensorFlow Lite"
    if plain == {"bboxes", "labels", "scores"}:
        return "SSD"
    if arrays[outputs[0]].ndim > 2 or arrays[outputs[2]].ndim != 1:
        return "other"
    if any(array.shape == (2,) and array.dtype.kind == "i" for n, array in arrays.items() if n not in outputs):
        return "other"  # Detectron2 gives the image's size too
    if plain == {"boxes", "labels", "scores"}:
        return "torchvision"
    return (
        "other" if any(named(name, (*BOX_WORDS, *LABEL_WORDS, *SCORE_WORDS)) for name in outputs) else "unknown-start"
    )


def _labels(
    probe: Probe, origin: _Origin, names: tuple[str, ...], declared: OnnxTeacher
) -> tuple[tuple[str, ...], Background, str]:
    """(names, where labels start, a note on it)."""
    if names == _COCO and origin in ("tensorflow", "torchvision") and declared.background == "auto":
        names = _COCO_BY_ID
    if names in (_COCO, _COCO_BY_ID) and origin == "TensorFlow Lite" and declared.background == "auto":
        return _COCO_BY_ID[1:], "none", "labels read as one less than COCO's category ids, as TensorFlow Lite has them"
    if names == _COCO_BY_ID:
        return names, "none", "labels read as COCO's category ids"
    if declared.background != "auto":
        start: Background = declared.background
        return names, start, f"labels counted from {int(start == 'first')}, as declared"
    if origin == "unknown-start":
        raise probe.unclear(
            "labels that may start at 0 or at 1",
            "declare `background: first` where label 1 is the first class (torchvision and maskrcnn-benchmark export so), "
            "`background: none` where label 0 is, or `class_names: coco91` for COCO's own ids",
        )
    start = "none" if origin in ("other", "TensorFlow Lite") else "first"
    why = "" if origin == "other" else f", as {origin} does"
    return names, start, f"labels counted from {int(start == 'first')}{why}; `background` declares it"


def _boxes(
    probe: Probe,
    origin: _Origin,
    outputs: tuple[str, ...],
    columns: tuple[int, ...],
    arrays: Arrays,
    declared: OnnxTeacher,
) -> tuple[BoxFormat, bool]:
    """(box format, whether its unit is still to be seen)."""
    if declared.box_format != "auto":
        return declared.box_format, False
    if origin in ("tensorflow", "TensorFlow Lite") and len(outputs) > 1:
        return "yxyx-normalised", False
    if probe.metadata.get("task") == "obb":
        return "cxcywh-rotated", False
    array = arrays[outputs[0]]
    if len(outputs) == 1:
        array = rows_of(array, 0)[: None if columns else 0]  # rows that do not show their columns show no boxes
        columns = columns or LAYOUTS[min(array.shape[-1], 7)][0]
    boxes = np.asarray(array, np.float32)[..., list(columns[:4] if len(outputs) == 1 else (0, 1, 2, 3))].reshape(-1, 4)
    real = boxes[~((boxes == boxes[:, :1]).all(1))]  # padding, of zeros or -1
    if len(real) and float((real[:, 2:] < real[:, :2]).any(1).mean()) > _REVERSED:
        return _with_extent(probe, real), False
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]  # the rest says nothing of the unit
    normalised = len(boxes) > 0 and float(np.abs(boxes).max()) <= NORMALISED_BELOW
    axes = "yxyx" if probe.channels_last and array.shape[-1] == 7 else "xyxy"  # EfficientDet's rows
    return cast(BoxFormat, axes + ("-normalised" if normalised else "")), not len(boxes) and axes == "xyxy"


def _with_extent(probe: Probe, boxes: FloatArray) -> BoxFormat:
    """How boxes that are no corners are read: by what leaves them in the picture, a centre or a corner before the extent.

    Raises:
        UserError: both do, or neither.
    """
    normalised = float(np.abs(boxes).max()) <= NORMALISED_BELOW
    height, width = (1.0, 1.0) if normalised else (float(extent) for extent in probe.input_hw)
    size = np.array([width, height], np.float32)
    inside = {}
    for name, share in (("cxcywh", 0.5), ("xywh", 0.0)):
        low = boxes[:, :2] - share * boxes[:, 2:]
        fits = (boxes[:, 2:] >= 0) & (low >= -_OVER * size) & (low + boxes[:, 2:] <= (1 + _OVER) * size)
        inside[name] = float(fits.all(1).mean())
    best, other = sorted(inside, key=lambda name: -inside[name])
    if inside[best] < 0.9 or inside[other] > inside[best] - 0.1:
        raise probe.unclear(
            "boxes of finished detections whose second corner does not lie behind their first",
            "declare `box_format`: cxcywh (centre and extent), xywh (corner and extent) or yxyx",
        )
    return cast(BoxFormat, best + ("-normalised" if normalised else ""))


def _row_roles(probe: Probe, arrays: Arrays, names: tuple[str, ...] | None, certain: bool) -> Roles | None:
    """One array of rows, perhaps with a count or masks in whole numbers beside it; prototypes of masks are no tables."""
    tables = {n: a for n, a in arrays.items() if not (a.dtype.kind in "iu" and (a.size == 1 or not _is_column(a)))}
    if len(tables) != 1:
        return None
    ((name, array),) = tables.items()
    task = probe.metadata.get("task")
    if array.ndim not in (2, 3, 4) or array.shape[-1] < 6 or (array.ndim == 2 and array.shape[-1] > 7):
        return None
    width = array.shape[-1]
    if task == "obb" and width == 7 and array.ndim == 3:  # centre, extent, score, label, angle
        return (name,), LAYOUTS[6][0]
    if names_image(array) and (array[..., 0] != np.rint(array[..., 0])).any():
        return None  # a raw head without batch axis: its first values are centres
    rows = np.asarray(rows_of(array, 0), np.float32)
    classes = None if names is None else len(names)
    further = width > 7  # mask coefficients or keypoints behind the six
    table = rows[:, :6] if further else rows
    found = [columns for columns in fitting(table) if not further or columns == LAYOUTS[6][0]]
    if not len(telling(table)) and (not further or task in ("segment", "pose")):
        return (name,), LAYOUTS[6][0] if further else ()
    if not found:
        return None
    # Labels that are all 0 may be a raw head's scores for a class that it sees nowhere; not behind corners and one score,
    # for heads with an objectness give centres.
    of_one_class = classes == 1 and bool((rows[:, 2:4] >= rows[:, :2]).all())
    if not (certain or rows[:, found[0][5]].any() or of_one_class or probe.has_too_few_for_raw(len(rows))):
        return None
    named_ones = [columns for columns in found if columns in fitting(table, classes)]
    if not named_ones:
        raise probe.unclear(
            f"rows of detections with labels up to {table[:, found[0][5]].max():g}, and {classes} class names",
            "declare all of its classes in label order (`class_names`, --classes), coco91 for COCO's own ids, or another "
            "`output` if these are no labels",
        )
    return (name,), named_ones[0] if len(named_ones) == 1 else ()


def _tflite_roles(arrays: Arrays) -> Roles | None:
    """Boxes, scores, labels and count of TensorFlow Lite, whose names do not tell them apart, but shapes and values do."""
    if len(arrays) != 4 or {name.partition(":")[0] for name in arrays} not in [{name} for name in _TFLITE]:
        return None
    boxes = [name for name, array in arrays.items() if array.ndim == 3 and array.shape[-1] == 4]
    counts = [name for name, array in arrays.items() if array.size == 1]
    columns = [name for name in arrays if name not in (*boxes, *counts)]
    labels = [name for name in columns if _is_whole(arrays[name])]
    if (len(boxes), len(counts), len(columns), len(labels)) != (1, 1, 2, 1):
        return None
    scores = columns[1 - columns.index(labels[0])]
    return (boxes[0], scores, labels[0], counts[0]), (0, 1, 2, 3, 4, 5)


def _column_roles(arrays: Arrays) -> Roles | None:
    """Boxes, scores and labels in arrays of their own, perhaps with a count; by type and name, since rows may be 0."""
    boxes = [n for n, a in arrays.items() if a.ndim >= 2 and a.shape[-1] in (4, 5) and a.dtype.kind in "fiu"]
    if len(boxes) > 1:  # (1, N) columns with four or five rows look like boxes too
        boxes = [name for name in boxes if named(name, BOX_WORDS)] or boxes
        boxes = [name for name in boxes if arrays[name].ndim == max(arrays[other].ndim for other in boxes)]
    if len(boxes) != 1:
        return None
    rows = _row_count(arrays[boxes[0]])
    flat = {name: array for name, array in arrays.items() if name not in boxes and _is_column(array)}
    counts = [n for n, a in flat.items() if a.size == 1 and named(n, COUNT_WORDS) and not named(n, LABEL_WORDS)]
    flat = {name: array for name, array in flat.items() if array.size == rows and name not in counts}
    labels = [name for name, array in flat.items() if array.dtype.kind in "iu"]
    labels = labels or [n for n in flat if named(n, LABEL_WORDS) and not named(n, COUNT_WORDS) and _is_whole(flat[n])]
    if len(labels) > 1:
        labels = [name for name in labels if named(name, LABEL_WORDS)]
    if not labels and len(flat) == 2:  # names that say nothing: the one with whole numbers
        labels = [name for name, array in flat.items() if _is_whole(array) and array.any()]
    scores = [name for name, array in flat.items() if array.dtype.kind == "f" and name not in labels]
    if len(scores) > 1:
        scores = [name for name in scores if named(name, SCORE_WORDS)]
    if len(labels) != 1:
        return None
    if arrays[boxes[0]].shape[-1] == 5:  # the score stands behind the box
        return ((boxes[0], labels[0]), (0, 1, 2, 3, 4)) if not scores else None
    if len(scores) != 1:
        return None
    return (boxes[0], scores[0], labels[0], *counts[:1]), (0, 1, 2, 3, 4, 5)


def _is_whole(array: NDArray[Any]) -> bool:
    return bool((array == np.rint(array)).all())


def _is_column(array: NDArray[Any]) -> bool:
    """Whether an output has one value a row: (N,), (1, N), (1, N, 1), (N, 1) or a count."""
    return array.ndim <= 1 or sum(extent != 1 for extent in array.shape) <= 1
