"""Prior shapes that suit a data set: where an SSD's published ones leave its boxes badly covered, others take their place.

The idea of learning the shapes from the training boxes is YOLOv2's (Redmon and Farhadi, CVPR 2017), which clusters them.
Clusters know nothing of an SSD's grids: a prior of a small object's very size is of no use if it stands half a cell away.
So each prior in turn becomes the shape that adds most to how well the boxes are covered wherever they lie between cells,
if any adds more than `LEAST_GAIN`; the others stay as published, and with them what augmentation makes of the boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.boxes import iou_matrix
from edgekd.detectors import spec_for
from edgekd.detectors.anchors import PriorLayout, xyxy_from_cxcywh
from edgekd.recipe import ModelConfig
from edgekd.types import DetectorSpec, ImageRecord, IntArray

LEAST_GAIN = 5e-4
"""In coverage, which lies in [0, 1]."""
LEAST_BOXES = 100
"""With fewer boxes the published shapes stay."""
MISSED, LEAST_OBJECTS = 0.3, 20
"""`prior_advice` speaks of a class of so many objects, of which this share is missed."""
LEAST_REACHED = 0.02
"""Share of objects that a change of the priors must reach besides, to be worth it."""
LARGEST_CELLS = 4.0
"""A fitted shape is at most so many cells wide (geometric mean), so that large objects stay on coarse levels."""
_SSDS = ("-ssd", "-ssd-lite")
_LOW, _HIGH = 0.3, 0.7  # an overlap below the first is worth nothing, above the second no more
_SIDES = (0.125, 0.375)  # how far a box's centre lies from the nearest prior's, in cells
_SWEEPS, _CANDIDATES, _BOXES, _SAMPLE = 3, 256, 4096, 300

Float64 = NDArray[np.float64]


def fitted_spec(spec: DetectorSpec, records: Sequence[ImageRecord]) -> DetectorSpec:
    """`spec` with the shapes for these images' boxes written out, if its option `priors` asks for it; else as it is."""
    if spec.options.get("priors") != "fitted":
        return spec
    from edgekd.detectors.ssd import SSD

    sizes, labels = _box_sizes(records)
    if len(sizes) < LEAST_BOXES:
        return replace(spec, options={**spec.options, "priors": "published"})
    with torch.random.fork_rng(devices=[]):  # the training's own initialisation stays what it is without a fit
        layout = SSD(spec).prior_layout
    shapes = fit_shapes(layout, sizes, labels)
    return replace(spec, options={**spec.options, "priors": [np.round(level, 4).tolist() for level in shapes]})


def prior_advice(config: ModelConfig, class_names: Sequence[str], records: Sequence[ImageRecord]) -> str | None:
    """Which class an SSD's priors miss, and the options that mend it; None where none is missed or nothing would mend it.

    A class is missed where `MISSED` or more of its objects, at least `LEAST_OBJECTS`, overlap no prior by half.
    """
    mend = _mend_missed(config, class_names, records)
    if mend is None:
        return None
    options = ", ".join(f"{name}: {value}" for name, value in mend[0].items())
    return f"{mend[1]} with `options: {{{options}}}`"


def suited_options(
    config: ModelConfig, class_names: Sequence[str], records: Sequence[ImageRecord]
) -> tuple[dict[str, Any], str]:
    """(Options of a model that suit these images' boxes, why): what `prior_advice` asks for, or fitted priors where they
    reach more objects; ({}, "") where neither brings anything, or the model is no SSD."""
    if not config.model.endswith(_SSDS):
        return {}, ""
    mend = _mend_missed(config, class_names, records)
    if mend is not None:
        return mend[0], f"{mend[1]} with these"
    count = _count(class_names, records)
    if count.sum() < LEAST_BOXES:
        return {}, ""
    now, then = (
        float(_missed(spec_for(_with(config, options), class_names), records) @ count / count.sum())
        for options in ({}, {"priors": "fitted"})
    )
    if now - then < LEAST_REACHED:
        return {}, ""
    return {"priors": "fitted"}, f"{now:.0%} of the objects overlap no published prior by half; {then:.0%} with these"


def _mend_missed(
    config: ModelConfig, class_names: Sequence[str], records: Sequence[ImageRecord]
) -> tuple[dict[str, Any], str] | None:
    """(Options, what is missed without and with them) of `prior_advice`."""
    if not config.model.endswith(_SSDS):
        return None
    count = _count(class_names, records)
    if count.max() < LEAST_OBJECTS:
        return None
    now = _missed(spec_for(config, class_names), records) * (count >= LEAST_OBJECTS)
    worst = int(now.argmax())
    if now[worst] < MISSED:
        return None
    better: dict[str, Any] = {"priors": "fitted"}
    then = _missed(spec_for(_with(config, better), class_names), records)[worst]
    if config.model.endswith("-lite"):  # the finer level costs arithmetic: only where it does more than other shapes
        finer = {"finest_stride": 8, **better}
        share = _missed(spec_for(_with(config, finer), class_names), records)[worst]
        if share < then - LEAST_REACHED:
            better, then = finer, share
    if then > now[worst] / 2:
        return None
    return better, (
        f"{now[worst]:.0%} of the objects of class {class_names[worst]} ({count[worst]}) overlap no prior by half, and are "
        f"hard to learn; {then:.0%}"
    )


def _with(config: ModelConfig, options: Mapping[str, Any]) -> ModelConfig:
    return config.model_copy(update={"options": {**config.options, **options}})


def _count(class_names: Sequence[str], records: Sequence[ImageRecord]) -> IntArray:
    """(classes,) objects to train on."""
    labels = np.concatenate([np.zeros(0, np.int64), *(r.labels[r.trainable] for r in records)])
    return np.bincount(labels, minlength=len(class_names))


def _missed(spec: DetectorSpec, records: Sequence[ImageRecord]) -> Float64:
    """(classes,) share of each class's objects, at most `_SAMPLE` of them, that overlap no prior by half."""
    from edgekd.detectors.ssd import SSD

    with torch.random.fork_rng(devices=[]):
        layout = SSD(fitted_spec(spec, records)).prior_layout
    priors = xyxy_from_cxcywh(layout.priors((1, 1))).numpy()
    boxes = np.concatenate([r.boxes_xyxy[r.trainable] / np.tile(r.image_hw[::-1], 2) for r in records])
    labels = np.concatenate([r.labels[r.trainable] for r in records])
    shares = np.zeros(len(spec.class_names))
    for label in range(len(shares)):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(int)]
        if len(rows):
            shares[label] = (iou_matrix(boxes[rows].astype(np.float32), priors).max(1) < 0.5).mean()
    return shares


def _box_sizes(records: Sequence[ImageRecord]) -> tuple[Float64, IntArray]:
    """(N, 2) width and height as shares of the image's, which an SSD's input is stretched to, and (N,) labels."""
    sizes, labels = [np.zeros((0, 2))], [np.zeros(0, np.int64)]
    for record in records:
        boxes = record.boxes_xyxy[record.trainable].astype(np.float64)
        sizes.append((boxes[:, 2:] - boxes[:, :2]) / np.array(record.image_hw[::-1]))
        labels.append(record.labels[record.trainable])
    together, classes = np.concatenate(sizes), np.concatenate(labels)
    real = (together > 0).all(1)
    return together[real], classes[real]


def fit_shapes(layout: PriorLayout, sizes_wh: Float64, labels: IntArray) -> list[Float64]:
    """For each level (priors a cell, 2) shapes, shares of the input's sides, that cover boxes (N, 2) of classes (N,).

    A class counts by the square root of its boxes: frequent ones for more, rare ones not for nothing.
    """
    weights = np.bincount(labels)[labels] ** -0.5
    draw = np.random.default_rng(0)
    if len(sizes_wh) > _BOXES:
        chosen = draw.choice(len(sizes_wh), _BOXES, replace=False)
        sizes_wh, weights = sizes_wh[chosen], weights[chosen]
    weights = weights / weights.sum()
    likely = draw.choice(len(sizes_wh), min(_CANDIDATES, len(sizes_wh)), replace=False, p=weights)
    candidates = sizes_wh[np.sort(likely)]
    levels = range(len(layout.grids_hw))
    shapes = [np.array(layout.cell_shapes_wh(level)) for level in levels]
    covered = [coverage(sizes_wh, shapes[level], layout.grids_hw[level]) for level in levels]
    offered = []
    for level, (rows, columns) in enumerate(layout.grids_hw):
        fits = np.sqrt(candidates.prod(1) * rows * columns) <= LARGEST_CELLS
        offered.append(coverage(sizes_wh, candidates, (rows, columns)) * (fits | (level == levels[-1])))
    for _ in range(_SWEEPS):
        changed = False
        for level in levels:
            for place in range(len(shapes[level])):
                others = [np.delete(c, place, 1) if k == level else c for k, c in enumerate(covered)]
                rest = np.concatenate(others, 1).max(1)
                now = weights @ np.maximum(rest, covered[level][:, place])
                then = weights @ np.maximum(rest[:, None], offered[level])
                best = int(then.argmax())
                if then[best] > now + LEAST_GAIN:
                    shapes[level][place], covered[level][:, place] = candidates[best], offered[level][:, best]
                    changed = True
        if not changed:
            break
    return shapes


def coverage(sizes_wh: Float64, shapes_wh: Float64, grid_hw: tuple[int, int]) -> Float64:
    """(N, M) in [0, 1]: how well a prior of each shape in the nearest cell covers a box, averaged over where it may lie.

    Args:
        sizes_wh: (N, 2) and shapes_wh: (M, 2), shares of the input's sides. grid_hw: cells of the shapes' level.
    """
    shared = [
        _shared(sizes_wh[:, axis], shapes_wh[:, axis], np.array(_SIDES) / cells)
        for axis, cells in ((0, grid_hw[1]), (1, grid_hw[0]))
    ]
    both = shared[0][:, :, :, None] * shared[1][:, :, None, :]
    area = sizes_wh.prod(1)[:, None] + shapes_wh.prod(1)[None]
    iou = both / (area[:, :, None, None] - both)
    worth: Float64 = np.clip((iou - _LOW) / (_HIGH - _LOW), 0.0, 1.0).mean((2, 3))
    return worth


def _shared(first: Float64, second: Float64, apart: Float64) -> Float64:
    """(N, M, distances): length that intervals of these lengths share when their centres lie so far apart."""
    a, b = first[:, None, None] / 2, second[None, :, None] / 2
    lengths: Float64 = np.clip(np.minimum(a, apart + b) - np.maximum(-a, apart - b), 0.0, None)
    return lengths
