"""What a black box's output arrays mean, in words that a manifest can keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Mapping

OutputKind = Literal["boxes-scores", "yolo", "yolo-objectness", "detections"]
BoxFormat = Literal[
    "xyxy",
    "cxcywh",
    "xywh",
    "yxyx",
    "xyxy-normalised",
    "cxcywh-normalised",
    "xywh-normalised",
    "yxyx-normalised",
    "cxcywh-rotated",
    "grid-offsets",
    "grid-distances",
    "grid-distances-corner",
    "grid-anchors",
    "grid-priors",
]
Activation = Literal["none", "sigmoid", "softmax"]
Background = Literal["none", "first", "last"]
NORMALISED_BELOW = 2.0
"""Boxes that all end within it are shares of the input: in pixels they would lie in one corner of it."""


@dataclass(frozen=True)
class OutputFormat:
    """How to read a detector's outputs.

    Attributes:
        kind: "boxes-scores": a box and a score a class in every row; "yolo": one array of 4 + K values a candidate;
            "yolo-objectness": 5 + K values; "detections": finished, one label a row, after the detector's own NMS.
        names: the arrays by role. boxes-scores: (boxes, scores), or for a head in levels all boxes, then all scores.
            detections: (boxes, scores, labels) or (boxes, scores, labels, count), or (boxes with scores, labels), or one
            array of rows. yolo: one array, or one a level.
        num_classes: K, without background.
        box_format: coding of the boxes; "xywh" has the upper left corner and the extent, as COCO's; "normalised" means
            shares of the input's width and height; "rotated" ones have an angle in the last column and count as the
            upright box around them; "grid-..." is undecoded: "offsets" YOLOX's, "distances" YOLOv8's,
            "distances-corner" NanoDet-Plus's (`runtimes.grids`), "anchors" in maps and "priors" in rows
            (`runtimes.anchored`).
        activation: what turns the scores into probabilities.
        background: where a score column for "no object" stands; in "detections", "first" means labels start at 1.
        channels_first: values run along the second to last axis, candidates along the last.
        columns: "detections" in one array: the columns of (x1, y1, x2, y2, score, label); empty where no row was seen
            yet, so that each image's rows tell.
        unused_labels: "detections": labels of no class, such as COCO's unused category ids.
        unit_unseen: `box_format` is "xyxy" because nothing was found on the probe picture: an image whose boxes all end
            within `NORMALISED_BELOW` has them as shares.
        extra: "yolo": values after the scores that are neither (mask coefficients, keypoints, an angle).
        boxes_last: "yolo": the scores stand before the boxes.
        overlapping: "detections" to which no NMS has been applied yet.
        anchors: "grid-anchors", "grid-priors": width and height of each in input pixels, flat, fine to coarse.
        anchors_squared, centre_scales: how they are used, see `runtimes.anchored.AnchorSet`.
        frame_hw: height and width of the picture that boxes are of, where the graph itself resizes it; empty for the
            input's.
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
    unused_labels: tuple[int, ...] = ()
    extra: int = 0
    boxes_last: bool = False
    overlapping: bool = False
    anchors: tuple[float, ...] = ()
    anchors_squared: bool = False
    centre_scales: tuple[float, ...] = ()
    frame_hw: tuple[int, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the detector has done its own NMS, so that none may follow."""
        return self.kind == "detections" and not self.overlapping

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OutputFormat:
        """Inverse of `to_dict`."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for reports."""
        plain = asdict(self).items()
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain}
