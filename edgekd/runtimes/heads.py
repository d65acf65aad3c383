"""Recognise raw heads: YOLO's in one array or one a level, and boxes beside scores."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgekd.recipe import AnchorFamily, AnchorSizes, OnnxTeacher
from edgekd.runtimes.anchored import ANCHOR_SETS, CELL, OF_MAPS, AnchorSet, candidates_of, grid_of
from edgekd.runtimes.grids import grid_cells, is_map
from edgekd.runtimes.output_format import Activation, BoxFormat, OutputFormat, OutputKind
from edgekd.runtimes.outputs import item_of, table_of
from edgekd.runtimes.probe import Probe, Recognised, box_format_of, names_or_error
from edgekd.types import FloatArray

BINS = (8, 16, 17)
"""How many distances a box side's distribution goes over: NanoDet's and PicoDet's, YOLOv8's, Generalized Focal Loss's."""


@dataclass(frozen=True)
class _Layout:
    """What a candidate's values are: K scores, an objectness perhaps, box values, and others that are of no use here."""

    kind: OutputKind
    classes: int
    box_values: int = 4
    extra: int = 0


def yolo(probe: Probe, outputs: Sequence[str], declared: OnnxTeacher, names: tuple[str, ...] | None) -> Recognised:
    """A head whose candidates have a box and all scores in one array, or in one array a level.

    Raises:
        UserError: it leaves more than one reading or none.
    """
    arrays = [probe.arrays[name] for name in outputs]
    channels_first = True
    if len(outputs) == 1 or arrays[0].ndim < 4:
        table = item_of(arrays[0], 0, 2)
        if table.ndim != 2 or min(table.shape) < 5:
            raise probe.unclear(
                "the output is neither a raw YOLO head (4 + K or 5 + K values a candidate) nor finished detections",
                "declare `output`, and export boxes with scores if the file is something else",
            )
        channels_first = _channels_first(probe, table, names)
    values = np.asarray(table_of(arrays, 0, channels_first), np.float32)
    layout = _layout(probe, values, declared, names)
    class_names, notes = names_or_error(probe, names, layout.classes)
    last = (
        layout.box_values > 4 and _bounded(values[:, : layout.classes]) and not _bounded(values[:, -layout.classes :])
    )
    boxes = values[:, layout.classes :] if last else values[:, : layout.box_values]
    box_format = _yolo_box_format(probe, boxes, declared, layout, last)
    scores = values[:, : layout.classes] if last else values[:, layout.box_values : values.shape[1] - layout.extra]
    _refuse_other_values(probe, scores, declared, layout)
    activation = activation_of(probe, scores, declared)
    form = OutputFormat(
        layout.kind,
        tuple(outputs),
        len(class_names),
        box_format,
        activation,
        "none",
        channels_first,
        extra=layout.extra,
        boxes_last=last,
    )
    if layout.extra:
        notes = (*notes, f"{layout.extra} further values a candidate (mask, keypoints, angle) left aside")
    guessed = layout.kind == "yolo-objectness" and declared.output == "auto" and box_format != "grid-offsets"
    if (
        guessed and grid_cells(probe.input_hw, len(values)) is not None
    ):  # of heads with one candidate a cell few have one
        more = layout.classes + 1
        notes = (*notes, f"the fifth value of each candidate read as objectness; if it is a class, declare all {more}")
    levels = f" over {len(outputs)} levels" if len(outputs) > 1 else ""
    return Recognised(
        form, class_names, (f"outputs recognised as {layout.kind}{levels}, boxes as {box_format}", *notes)
    )


def _refuse_other_values(probe: Probe, scores: FloatArray, declared: OnnxTeacher, layout: _Layout) -> None:
    """Raise where something else stands in the place of scores: labels, or an angle."""
    if len(scores) and ((scores == np.rint(scores)).all(0) & (np.ptp(scores, 0) > 0)).any():
        raise probe.unclear(
            "whole numbers where scores would stand: labels, it seems, of finished detections in an order or unit that is "
            "none of the usual ones",
            "export it with boxes, scores and labels apart, or with corners in pixels and scores up to 1",
        )
    if (
        layout.kind == "yolo-objectness"
        and declared.output == "auto"
        and _bounded(scores[:, :-1])
        and not _bounded(scores)
    ):
        raise probe.unclear(
            "only the last value of a candidate lies outside 0 to 1, as an angle of rotated boxes does",
            "declare `output: yolo-objectness` if it is a class score; else take a detection model without angles",
        )
    if layout.kind == "yolo-objectness" and declared.output == "auto" and _are_shares(scores):
        raise probe.unclear(
            "what would be an objectness and the class scores sum to 1, as a softmax's with one for background do",
            "name that one among the classes, at its place: `class_names: [background, ...]`",
        )


def _channels_first(probe: Probe, table: NDArray[Any], names: tuple[str, ...] | None) -> bool:
    """Whether values run along the first axis: by the number of classes, else the shorter axis."""
    if names is not None:
        fits = [extent - len(names) in (4, 5) for extent in table.shape]
        if fits[0] != fits[1]:
            return fits[0]
    cells = [grid_cells(probe.input_hw, extent) is not None for extent in table.shape]
    if cells[0] != cells[1]:
        return cells[1]
    if table.shape[0] == table.shape[1]:
        raise probe.unclear(
            "a square output does not show which axis holds the candidates", "export another input size"
        )
    return bool(table.shape[0] < table.shape[1])


def _layout(probe: Probe, values: FloatArray, declared: OnnxTeacher, names: tuple[str, ...] | None) -> _Layout:
    """Which values of a candidate are box, objectness, scores and anything else."""
    columns = values.shape[1]
    classes = 80 if names is None else len(names)
    extra = _further_values(probe, columns - classes)
    if declared.output in ("yolo", "yolo-objectness"):
        offset = 4 if declared.output == "yolo" else 5
        if names is None or columns - offset - extra == classes:
            return _Layout(cast(OutputKind, declared.output), columns - offset - extra, 4, extra)
        raise probe.unclear(
            f"{classes} class names do not fit {columns} values a candidate",
            f"declare {columns - 4} class names for `output: yolo`, or {columns - 5} for `output: yolo-objectness`",
        )
    if columns - classes - extra == 4:
        if len(values) % 3 == 0 and grid_cells(probe.input_hw, len(values) // 3) is not None:
            raise probe.unclear(
                f"{columns} values a candidate for {classes} classes leave none for objectness, which heads with three "
                "candidates a cell (YOLOv3 to v7) have",
                f"declare {columns - 5 - extra} class names, or `output: yolo` if it really has none",
            )
        return _Layout("yolo", classes, 4, extra)
    if columns - classes - extra == 5:
        return _Layout("yolo-objectness", classes, 4, extra)
    in_bins = columns - classes in [4 * bins for bins in BINS] and grid_cells(probe.input_hw, len(values)) is not None
    if in_bins and not _bounded(
        values[:, 4:]
    ):  # else they are scores behind a box, of more classes than there are names
        return _Layout("yolo", classes, columns - classes)
    if names is None and columns > 5:
        raise probe.unclear(
            f"{columns} values a candidate, and no class names in the file",
            f"declare `class_names` (--classes) in label order: {columns - 4} of them, or {columns - 5} if the fifth value is "
            "an objectness (YOLOv3 to v7, YOLOX); fewer if further values are keypoints, masks or angles",
        )
    raise probe.unclear(
        f"{columns} values a candidate fit neither 4 + {classes} nor 5 + {classes} classes",
        "declare `class_names`, and `output: yolo` or `output: yolo-objectness`; a head for masks, keypoints or rotated "
        "boxes has further values: take the detection model of it, or a file that says its `task`, as Ultralytics' do",
    )


def _further_values(probe: Probe, spare: int) -> int:
    """How many values a candidate has besides box and scores: by the file's task, or by prototypes of masks beside it."""
    task = probe.metadata.get("task")
    prototypes = [a.shape[1] for a in probe.arrays.values() if a.ndim == 4 and min(a.shape[1:]) > 1]
    if task == "obb":
        return 1
    if task == "pose":
        try:
            points, values = ast.literal_eval(probe.metadata.get("kpt_shape", ""))
            return int(points) * int(values)
        except (ValueError, SyntaxError, TypeError):
            return max(0, spare - 4)
    return next((count for count in prototypes if spare - count in (4, 5)), 0)


def _yolo_box_format(probe: Probe, boxes: FloatArray, declared: OnnxTeacher, layout: _Layout, last: bool) -> BoxFormat:
    if declared.box_format != "auto":
        return declared.box_format
    if layout.box_values > 4:
        return "grid-distances-corner" if last else "grid-distances"
    if probe.metadata.get("task") == "obb":
        return "cxcywh-rotated"
    if layout.kind == "yolo-objectness" and _are_grid_offsets(probe, boxes):
        return "grid-offsets"
    # Rows of one class that NMS has left, a box and a score each, look like a head, and mostly have corners.
    return box_format_of(probe, boxes, declared, usual=None if probe.has_too_few_for_raw(len(boxes)) else "cxcywh")


def _are_grid_offsets(probe: Probe, boxes: FloatArray) -> bool:
    """Whether a head's boxes are not decoded, as YOLOX exports them: one a cell, some extents' logarithms below 0."""
    return bool((boxes[:, 2:] < 0).any()) and grid_cells(probe.input_hw, len(boxes)) is not None


def _are_shares(values: FloatArray) -> bool:
    """Whether the rows of (P, N) values, none below 0, sum to 1; but not behind an objectness that is 1 by itself."""
    return (
        _bounded(values) and bool(np.ptp(values[:, 0]) > 0) and float((np.abs(values.sum(1) - 1) < 5e-3).mean()) > 0.99
    )


def _bounded(scores: FloatArray) -> bool:
    return scores.size == 0 or (float(scores.min()) >= -1e-4 and float(scores.max()) <= 1.0 + 1e-3)


def activation_of(probe: Probe, scores: FloatArray, declared: OnnxTeacher) -> Activation:
    """Values outside [0, 1] are logits, of sigmoids unless something else tells of a softmax.

    Raises:
        UserError: none is below 0, as of logits most are.
    """
    if declared.score_activation != "auto":
        return declared.score_activation
    if _bounded(scores):
        return "none"
    if float(scores.min()) >= 0:
        raise probe.unclear(
            f"scores from {scores.min():g} to {scores.max():g}, neither probabilities nor logits: percent, perhaps",
            "export it with scores up to 1, or declare `score_activation` if they are logits all the same",
        )
    return "sigmoid"


# --- one array, or a pair, a level ---------------------------------------------------------------------------------


def levels(probe: Probe, declared: OnnxTeacher, names: tuple[str, ...] | None) -> Recognised | None:
    """A head in levels, as the file has one map or one table a level or a pair of them; None if there are none.

    Raises:
        UserError: a head in levels that cannot be read.
    """
    maps = {name: array for name, array in probe.arrays.items() if is_map(array.shape, probe.input_hw)}
    if (found := _anchored(probe, declared, names)) is not None:
        return found
    tables = {name: array[0].reshape(array.shape[1], -1).T for name, array in maps.items()}
    if not maps:
        tables = {n: item_of(a, 0, 2) for n, a in probe.arrays.items() if a.ndim == 3 and min(a.shape[1:]) > 1}
    groups: dict[int, dict[str, int]] = {}
    for name, table in tables.items():
        groups.setdefault(len(table), {})[name] = table.shape[1]
    sizes = sorted(groups, reverse=True)
    whole = grid_cells(probe.input_hw, sum(sizes)) is not None
    alike = len({tuple(sorted(group.values())) for group in groups.values()}) == 1
    if whole and alike and len(groups) > 1:
        single = len(groups[sizes[0]]) == 1
        one_each = [next(iter(groups[size])) for size in sizes]
        found = yolo(probe, one_each, declared, names) if single else _pairs(probe, groups, sizes, declared, names)
    if found is None and maps:
        raise probe.unclear(
            "feature maps of a head whose coding of boxes the file does not say",
            "export the detector with decoded boxes and class scores; as a teacher it can also be a `module` that decodes them "
            "(docs/teachers.md)",
        )
    return found


def _anchored(probe: Probe, declared: OnnxTeacher, names: tuple[str, ...] | None) -> Recognised | None:
    """A raw head whose maps have four values, an objectness and the scores for each of some anchors; None without any.

    Raises:
        UserError: its anchors are not declared.
    """
    classes = 80 if names is None else len(names)
    grids = {name: grid_of(array.shape, 5 + classes, probe.input_hw) for name, array in probe.arrays.items()}
    levels_found = sorted(((grid, name) for name, grid in grids.items() if grid is not None), key=lambda g: -g[0][1])
    counts = {grid[0] for grid, _ in levels_found}
    sizes = [array.shape[2:] for array in probe.arrays.values() if is_map(array.shape, probe.input_hw)]
    apart = len(set(sizes)) < len(sizes)  # boxes and scores, a pair a level
    coded = any(probe.arrays[name].shape[1] - classes in [4 * bins for bins in BINS] for _, name in levels_found)
    if len(counts) != 1 or counts == {1} or apart or coded:
        return None
    total = len(levels_found) * counts.pop()
    if declared.anchors is None:
        raise probe.unclear(
            f"a raw head with {total} anchors, which the file does not say",
            f"declare `anchors`, one of {OF_MAPS}, or its own under the name of the one that it is decoded "
            "like: `anchors: {yolov4-tiny: [[23, 27], ...]}`; or export it with decoded boxes: YOLOv5's export.py does, "
            "YOLOv7's with --grid",
        )
    anchors = declared_anchors(declared.anchors)
    if anchors.in_rows:
        raise probe.unclear(
            "anchors of boxes in rows are declared, and these stand in maps",
            f"declare `anchors` that maps are decoded with: {OF_MAPS}",
        )
    if len(anchors.sizes) != 2 * total:
        raise probe.unclear(
            f"{len(anchors.sizes) // 2} anchors for maps of {total}",
            "declare the anchors of each level, fine to coarse, one that two levels use twice",
        )
    if anchors.centre_scales and len(anchors.centre_scales) != len(levels_found):
        raise probe.unclear(
            f"a raw head of {len(levels_found)} levels, and anchors decoded as over {len(anchors.centre_scales)}",
            "declare them under another name: yolov4 has three levels, yolov4-tiny two",
        )
    if anchors.softmax and max(anchors.sizes, default=0.0) < CELL:
        raise probe.unclear(
            f"YOLOv2's anchors up to {max(anchors.sizes, default=0.0):g}: in cells, it seems, as its configuration has them",
            f"declare them in pixels: {CELL} times as much",
        )
    outputs = tuple(name for _, name in levels_found)
    raw, _ = candidates_of([probe.arrays[name] for name in outputs], 0, 5 + classes, probe.input_hw)
    class_names, notes = names_or_error(probe, names, classes)
    activation = activation_of(probe, raw if anchors.squared else raw[:, 4:], declared)
    if anchors.softmax and activation == "sigmoid" and declared.score_activation == "auto":
        activation = "softmax"
    form = OutputFormat(
        "yolo-objectness",
        outputs,
        classes,
        "grid-anchors",
        activation,
        anchors=anchors.sizes,
        anchors_squared=anchors.squared,
        centre_scales=anchors.centre_scales,
    )
    coding = "squared sigmoids (YOLOv5)" if anchors.squared else "exponentials (YOLOv2 to v4)"
    found = f"outputs recognised as a raw head of {total} anchors over {len(outputs)} levels, extents as {coding}"
    return Recognised(form, class_names, (found, *notes))


def declared_anchors(declared: AnchorFamily | AnchorSizes | Mapping[AnchorFamily, AnchorSizes]) -> AnchorSet:
    """A published set, or sizes of one's own decoded like one."""
    if isinstance(declared, str):
        return ANCHOR_SETS[declared]
    family, sizes = next(iter(declared.items())) if isinstance(declared, Mapping) else ("yolov5", declared)
    return replace(ANCHOR_SETS[family], sizes=tuple(extent for size in sizes for extent in size))


def _pairs(
    probe: Probe,
    groups: dict[int, dict[str, int]],
    sizes: Sequence[int],
    declared: OnnxTeacher,
    names: tuple[str, ...] | None,
) -> Recognised | None:
    """Boxes and scores apart on each level, as for RKNN and in NanoDet's and PicoDet's first exports."""
    widths = sorted(next(iter(groups.values())).values())
    coded = [width for width in widths if width in [4 * bins for bins in BINS]]
    others = [width for width in widths if width not in coded]
    classes = len(names) if names is not None else others[0] if len(others) == 1 else 80
    if len(coded) != 1 or widths.count(classes) != 1 or classes == coded[0]:
        return None
    box_names = [name for size in sizes for name, width in groups[size].items() if width == coded[0]]
    score_names = [name for size in sizes for name, width in groups[size].items() if width == classes]
    class_names, notes = names_or_error(probe, names, classes)
    channels_first = probe.arrays[score_names[0]].ndim == 4
    scores = table_of([probe.arrays[name] for name in score_names], 0, channels_first)
    activation = activation_of(probe, np.asarray(scores, np.float32), declared)
    box_format: BoxFormat = "grid-distances" if declared.box_format == "auto" else declared.box_format
    form = OutputFormat(
        "boxes-scores", (*box_names, *score_names), classes, box_format, activation, "none", channels_first
    )
    found = f"outputs recognised as boxes ({box_format}) and scores over {len(sizes)} levels (activation {activation})"
    return Recognised(form, class_names, (found, *notes))
