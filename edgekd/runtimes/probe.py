"""What one run of a foreign detector shows, and what every kind of output has in common when it is recognised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import UserError
from edgekd.labels import NAMED_LABEL_SETS
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.grids import grid_cells
from edgekd.runtimes.output_format import NORMALISED_BELOW, BoxFormat, OutputFormat
from edgekd.runtimes.outputs import Arrays
from edgekd.types import FloatArray

BOX_WORDS = ("box", "bbox", "loc", "det")
SCORE_WORDS = ("score", "conf", "prob", "logit")
LABEL_WORDS = ("label", "class", "cls", "categor", "box_ids")  # the last is GluonCV's
COUNT_WORDS = ("num", "count", "valid")
MOST_FINISHED = 1000
"""Rows beyond this are candidates that no NMS has thinned."""
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
    """The outputs of one run, with what else the file says that helps to read them.

    Attributes:
        source: the file's name, for messages.
        arrays: by output name; batch of one.
        input_hw: the probe's (height, width).
        metadata: the file's own, such as Ultralytics' `task`.
        channels_last: the graph takes (B, H, W, 3), as TensorFlow's do.
    """

    source: str
    arrays: Arrays
    input_hw: tuple[int, int]
    metadata: Mapping[str, str] = field(default_factory=dict)
    channels_last: bool = False

    def has_too_few_for_raw(self, rows: int) -> bool:
        """Whether a raw head of this input has another number of candidates, so that NMS has thinned these."""
        return rows <= MOST_FINISHED and grid_cells(self.input_hw, rows) is None

    def listed(self) -> str:
        """Every output with shape and type."""
        return "; ".join(f"{name} {array.shape} {array.dtype}" for name, array in self.arrays.items())

    def unclear(self, what: str, fix: str) -> UserError:
        """The error for outputs that leave more than one reading, or none."""
        return UserError(f"{self.source}: {what}", got=f"outputs {self.listed()}", fix=fix)


def named(name: str, words: Sequence[str]) -> bool:
    """Whether a name has one of the words in it."""
    return any(word in name.lower() for word in words)


def names_or_error(
    probe: Probe, names: tuple[str, ...] | None, columns: int
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
        "declare `class_names` (--classes): a list in label order, coco, coco91 (COCO's own ids) or voc",
    )


def coco_by_id(names: Sequence[str]) -> bool:
    """Whether names are COCO's by category id, whose first column is never an object."""
    return tuple(names) == NAMED_LABEL_SETS["coco91"]


def box_format_of(probe: Probe, boxes: FloatArray, declared: OnnxTeacher, usual: str | None) -> BoxFormat:
    """Which reading of the box values gives boxes at all; `usual` is what this kind of output is wont to be."""
    if declared.box_format != "auto":
        return declared.box_format
    if not len(boxes):
        raise probe.unclear(
            "no box on the probe picture, so that nothing shows how boxes are coded",
            "declare `box_format`, such as xyxy for corners in pixels",
        )
    boxes = boxes[np.isfinite(boxes).all(1)]
    if not len(boxes):
        raise probe.unclear(
            "no finite box on the probe picture",
            "export the detector anew: its outputs are NaN or infinite, as after an overflow in reduced precision",
        )
    normalised = float(np.abs(boxes).max()) <= NORMALISED_BELOW
    height, width = (1.0, 1.0) if normalised else (float(extent) for extent in probe.input_hw)
    as_corners = _nearly_all(boxes[:, 2:] >= boxes[:, :2])
    as_centres = _nearly_all(boxes[:, 2:] >= 0) and _mostly_inside(boxes, width, height)
    if usual == "cxcywh":
        as_centres = _nearly_all(boxes[:, 2:] >= 0) and not (as_corners and not as_centres)
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


def _nearly_all(holds: NDArray[Any]) -> bool:
    """Whether something holds in all rows but a few: regression without a floor gives some boxes no extent."""
    return float(holds.all(1).mean()) >= 0.99


def _mostly_inside(boxes: FloatArray, width: float, height: float) -> bool:
    """Whether, read as centre with extent, boxes rarely reach far out of the picture."""
    reach = np.array([width, height], np.float32) * 0.25
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    outside = (low < -reach).any(1) | (high > np.array([width, height], np.float32) + reach).any(1)
    return float(outside.mean()) < 0.1
