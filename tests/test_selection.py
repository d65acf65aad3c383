"""What is left to decide where NMS is inside a file, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekd.preprocess import geometry_for
from edgekd.selection import Selection, effective, idle
from edgekd.types import PreprocessSpec

OURS = {"score_threshold": 0.001, "nms_iou": 0.5, "max_detections": 100}


@pytest.mark.parametrize(
    ("inside", "asked", "merges", "said"),
    [
        (None, Selection(0.0, 0.9, 300, 0.6), False, None),
        (OURS, Selection(), False, None),
        (OURS, Selection(0.3, 0.5, 10), False, None),
        (OURS, Selection(nms_iou=0.7), False, "NMS inside: IoU 0.5, at most 100, from 0.001; IoU 0.7 does not apply"),
        (OURS, Selection(0.0, 0.5, 300), False, "at most 300, from 0 do not apply"),
        (OURS, Selection(nms_iou=0.7, box_voting=0.6), True, None),
        ({}, Selection(), False, None),
        ({}, Selection(nms_iou=0.7), False, "NMS inside: fixed there; IoU 0.7 does not apply"),
        ({}, Selection(box_voting=0.6), False, "box voting from 0.6 does not apply"),
        ({"nms_iou": "x"}, Selection(nms_iou=0.7), False, "NMS inside: fixed there; IoU 0.7 does not apply"),
    ],
)
def test_what_does_not_apply(inside: dict[str, Any] | None, asked: Selection, merges: bool, said: str | None) -> None:
    found = idle(asked, inside, merges=merges)
    assert found is said is None or (found is not None and said is not None and found.endswith(said))


def test_boxes_beside_the_image_are_no_detections() -> None:
    geometry = geometry_for((100, 200), PreprocessSpec((64, 64), "letterbox"))
    boxes = np.array([[0, 0, 64, 12], [0, 20, 32, 40]], np.float32)  # the first lies in the padding
    found = Selection().place(boxes, np.full((2, 1), 0.5, np.float32), geometry)
    np.testing.assert_allclose(found.boxes_xyxy, [[0, 12.5, 100, 75]])


def test_what_applies() -> None:
    asked = Selection(0.3, 0.7, 10, 0.6)
    assert effective(asked, OURS) == {
        "nms": "inside", "score_threshold": 0.3, "nms_iou": 0.5, "max_detections": 10, "box_voting": None,
    }  # fmt: skip
    assert effective(asked, {})["nms_iou"] is None
    assert effective(asked, None) == {
        "nms": "after", "score_threshold": 0.3, "nms_iou": 0.7, "max_detections": 10, "box_voting": 0.6,
    }  # fmt: skip
