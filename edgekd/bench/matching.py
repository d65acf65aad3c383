"""Which detection belongs to which object, by the two protocols in use, as flat columns over a whole split.

Both are computed once a model; average precision, curves and bootstrap intervals are then arithmetic on the columns.
IoU is taken in double precision over continuous coordinates: no "+1" of pixel-inclusive boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.types import Detections, ImageRecord

Float64Array = NDArray[np.float64]
IntpArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]

IOU_THRESHOLD = 0.5
MAX_DETECTIONS = 100
"""COCO's limit, an image and class."""


@dataclass(frozen=True)
class Matches:
    """Detections of a split, by class and falling score, with their verdicts; ignored ones are left out.

    Attributes:
        labels: (D,) class index, ascending.
        scores: (D,) float64, descending within a class; equal scores keep the order of images.
        images: (D,) index of the image in the split.
        correct: (D,) bool, true positive; the others are false positives.
        positives: (images, classes) int64, objects to be found.
    """

    labels: IntpArray
    scores: Float64Array
    images: IntpArray
    correct: BoolArray
    positives: NDArray[np.int64]

    def of_class(self, label: int) -> slice:
        """Where a class's rows lie."""
        return slice(*np.searchsorted(self.labels, [label, label + 1]).tolist())


def iou_with_crowds(boxes_xyxy: Float64Array, objects_xyxy: Float64Array, crowd: BoolArray) -> Float64Array:
    """(N, M) IoU; towards a crowd the union is the detection's own area (COCO's rule)."""
    top_left = np.maximum(boxes_xyxy[:, None, :2], objects_xyxy[None, :, :2])
    bottom_right = np.minimum(boxes_xyxy[:, None, 2:], objects_xyxy[None, :, 2:])
    sides = np.clip(bottom_right - top_left, 0.0, None)
    overlap: Float64Array = sides[..., 0] * sides[..., 1]
    area, object_area = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes_xyxy, objects_xyxy))
    union = np.where(crowd[None, :], area[:, None], area[:, None] + object_area[None, :] - overlap)
    return np.asarray(np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0), np.float64)


def check_answers(records: Sequence[ImageRecord], detections: Sequence[Detections], num_classes: int) -> None:
    """Refuse answers that cannot belong to these images.

    Raises:
        ValueError: there is not one answer an image, or a label lies outside the classes.
    """
    if len(records) != len(detections):
        raise ValueError(f"{len(records)} images but {len(detections)} answers")
    for record, found in zip(records, detections, strict=True):
        for what, labels in (("object", record.labels), ("detection", found.labels)):
            if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
                raise ValueError(f"{record.image_id}: {what} labels outside [0, {num_classes})")


def match_coco(records: Sequence[ImageRecord], detections: Sequence[Detections], num_classes: int) -> Matches:
    """COCO's matching at IoU 0.5 (pycocotools' `evaluateImg`): greedy by score, each object once, crowds any often.

    A detection takes the free object of highest IoU, real ones before ignored ones; those that end on an ignored
    object (crowd or difficult) count as nothing. At most 100 detections an image and class are looked at.
    """
    columns = _Columns(len(records), num_classes)
    for index, (record, found) in enumerate(zip(records, detections, strict=True)):
        ignored = record.difficult | record.crowd
        columns.add_objects(index, record.labels[~ignored])
        order = np.argsort(-found.scores.astype(np.float64), kind="stable")
        order = order[_first_of_each(found.labels[order], MAX_DETECTIONS)]
        verdict, _ = assign(record, found.take(order))
        columns.add(index, found.labels[order], found.scores[order], verdict)
    return columns.matches()


def assign(record: ImageRecord, found: Detections) -> tuple[NDArray[np.int8], IntpArray]:
    """COCO's greedy assignment in one image at IoU 0.5.

    Args:
        found: by falling score.

    Returns:
        (N,) verdicts: 1 correct, 0 wrong, -1 on an ignored object; (N,) the object each is assigned to, -1 for none.
    """
    verdict, owner = np.zeros(len(found), np.int8), np.full(len(found), -1, np.intp)
    if not len(found) or not len(record.labels):
        return verdict, owner
    ignored, crowd = record.difficult | record.crowd, record.crowd
    overlap = iou_with_crowds(found.boxes_xyxy.astype(np.float64), record.boxes_xyxy.astype(np.float64), crowd)
    candidates = (overlap >= IOU_THRESHOLD) & (found.labels[:, None] == record.labels[None, :])
    taken = np.zeros(len(ignored), np.bool_)
    for row in np.flatnonzero(candidates.any(1)).tolist():
        free = candidates[row] & (~taken | crowd)
        for group in (free & ~ignored, free & ignored):  # real objects before ignored ones
            columns = np.flatnonzero(group)
            if len(columns):
                # The last of equally good ones, as pycocotools takes it.
                best = columns[len(columns) - 1 - int(np.argmax(overlap[row, columns][::-1]))]
                taken[best], owner[row], verdict[row] = True, best, -1 if ignored[best] else 1
                break
    return verdict, owner


def match_voc(records: Sequence[ImageRecord], detections: Sequence[Detections], num_classes: int) -> Matches:
    """The VOC development kit's matching: each detection belongs to the object of its class with the highest IoU.

    At IoU >= 0.5 the best-scored detection of an object is correct, later ones are wrong, and those of difficult (or
    crowd) objects count as nothing, however many. Everingham et al., "The PASCAL VOC Challenge", IJCV 2010, sec. 4.2.
    """
    columns = _Columns(len(records), num_classes)
    for index, (record, found) in enumerate(zip(records, detections, strict=True)):
        ignored = record.difficult | record.crowd
        columns.add_objects(index, record.labels[~ignored])
        order = np.argsort(-found.scores.astype(np.float64), kind="stable")
        labels = found.labels[order]
        verdict = np.zeros(len(order), np.int8)
        if len(order) and len(record.labels):
            boxes, objects = found.boxes_xyxy[order].astype(np.float64), record.boxes_xyxy.astype(np.float64)
            overlap = iou_with_crowds(boxes, objects, np.zeros(len(objects), np.bool_))
            overlap[labels[:, None] != record.labels[None, :]] = -1.0
            best = overlap.argmax(1)
            hit = overlap.max(1) >= IOU_THRESHOLD
            verdict[hit & ignored[best]] = -1
            rows = np.flatnonzero(hit & ~ignored[best])
            # Rows are in score order, so the first row of each object is its best-scored detection.
            verdict[rows[np.unique(best[rows], return_index=True)[1]]] = 1
        columns.add(index, labels, found.scores[order], verdict)
    return columns.matches()


def _first_of_each(labels: NDArray[np.int64], limit: int) -> BoolArray:
    """True for the first `limit` occurrences of each label."""
    if len(labels) <= limit:
        return np.ones(len(labels), np.bool_)
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    rank = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    keep = np.empty(len(labels), np.bool_)
    keep[order] = rank < limit
    return keep


class _Columns:
    """Collects one image after the other and sorts all at the end."""

    def __init__(self, images: int, num_classes: int) -> None:
        self._positives = np.zeros((images, num_classes), np.int64)
        self._labels: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        self._scores: list[Float64Array] = [np.zeros(0)]
        self._images: list[IntpArray] = [np.zeros(0, np.intp)]
        self._verdicts: list[NDArray[np.int8]] = [np.zeros(0, np.int8)]

    def add_objects(self, image: int, labels: NDArray[np.int64]) -> None:
        np.add.at(self._positives[image], labels, 1)

    def add(
        self, image: int, labels: NDArray[np.int64], scores: NDArray[np.float32], verdict: NDArray[np.int8]
    ) -> None:
        counted = verdict >= 0
        self._labels.append(labels[counted])
        self._scores.append(scores[counted].astype(np.float64))
        self._images.append(np.full(int(counted.sum()), image, np.intp))
        self._verdicts.append(verdict[counted])

    def matches(self) -> Matches:
        labels, scores = np.concatenate(self._labels), np.concatenate(self._scores)
        images, verdicts = np.concatenate(self._images), np.concatenate(self._verdicts)
        order = np.lexsort((-scores, labels))  # stable: equal scores stay in image order
        return Matches(
            labels[order].astype(np.intp), scores[order], images[order], verdicts[order] == 1, self._positives
        )
