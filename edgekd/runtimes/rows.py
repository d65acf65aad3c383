"""Finished detections in rows of one array: which column holds what, as the rows themselves show it."""

from __future__ import annotations

import numpy as np

from edgekd.errors import ArtifactError
from edgekd.types import Array

HIGHEST_SCORE = 1.01  # half precision rounds

# (x1, y1, x2, y2, score, label) by width; the first is the usual one. With seven columns the first names the image.
LAYOUTS = {
    6: (
        (0, 1, 2, 3, 4, 5),  # YOLOv10, Ultralytics with NMS
        (2, 3, 4, 5, 1, 0),  # PaddleDetection: label, score, box
        (0, 1, 2, 3, 5, 4),
    ),
    7: (
        (1, 2, 3, 4, 6, 5),  # YOLOv7 end to end: image, box, label, score
        (1, 2, 3, 4, 5, 6),  # YOLO-NAS flat, EfficientDet: image, box, score, label
        (3, 4, 5, 6, 2, 1),  # SSD's DetectionOutput: image, label, score, box
    ),
}
_NAMES = {0: "x1", 1: "y1", 2: "x2", 3: "y2", 4: "score", 5: "label"}


def fitting(rows: Array, classes: int | None = None) -> list[tuple[int, ...]]:
    """The layouts in which rows (N, 6 or 7) are detections: whole labels, scores up to 1, corners in order.

    Args:
        rows: padding of zeros or -1 says nothing. Without any other row there is nothing to fit: an empty list.
        classes: how many there are at most, with one for background.
    """
    rows = np.asarray(rows, np.float32)
    real = telling(rows)
    if not len(real):
        return []
    if rows.shape[1] == 7 and (rows[:, 0] != np.rint(rows[:, 0])).any():
        return []
    return [columns for columns in LAYOUTS[rows.shape[1]] if _fits(real[:, list(columns)], classes)]


def telling(rows: Array) -> Array:
    """Those of rows (N, C) that hold something: no zeros, and no label or score of -1, as what was not found has (MXNet)."""
    holding: Array = rows[(rows != 0).any(1) & ~(rows[:, :6] == -1).any(1)]
    return holding


def _fits(table: Array, classes: int | None) -> bool:
    boxes, scores, labels = table[:, :4], table[:, 4], table[:, 5]
    whole = (labels == np.rint(labels)) & (labels >= 0)
    if classes is not None:
        whole &= labels <= classes
    # Rows that found nothing may have corners out of order, where boxes are regressed without a floor.
    ordered = (boxes[:, 2:] >= boxes[:, :2]).all(1).mean() >= 0.5
    return bool((whole & (scores >= 0) & (scores <= HIGHEST_SCORE)).all() and ordered)


def layout_of(rows: Array, classes: int) -> tuple[int, ...]:
    """The columns of rows whose order nothing told before they were seen; empty where none of these holds anything.

    Raises:
        ArtifactError: none of the usual orders fits.
    """
    if not len(telling(rows)):
        return ()
    found = fitting(rows, classes)
    if not found:
        usual = "; ".join(in_words(columns) for columns in LAYOUTS[rows.shape[1]])
        raise ArtifactError(
            "a detector gives detections in none of the usual orders, or scores above 1, or labels without a name",
            got="a row of " + ", ".join(f"{value:g}" for value in rows[0].tolist()),
            expected=f"{usual}; scores up to 1, labels up to {classes}",
            fix="declare all of its classes in label order (`class_names`, --classes), or export it with boxes, scores and "
            "labels apart",
        )
    return found[0]


def in_words(columns: tuple[int, ...]) -> str:
    """A layout as "x1, y1, x2, y2, score, label"."""
    words = {column: _NAMES[role] for role, column in enumerate(columns)}
    return ", ".join(words.get(column, "image") for column in range(max(columns) + 1))
