"""Mean average precision as COCO and as VOC define it, from the same detections.

COCO's figures come from faster-coco-eval (tested to equal pycocotools'); VOC's from `precision_recall`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgekd.bench.matching import Float64Array, check_answers, match_voc
from edgekd.bench.precision_recall import RECALL_POINTS_COCO, average_precisions_voc
from edgekd.types import Detections, ImageRecord

SIZES = ("small", "medium", "large")
"""COCO's areas: below 32², up to 96², above; of the box, in the image's own pixels."""

_OUTSIDE_EVERY_RANGE = -1.0


@dataclass(frozen=True)
class ClassAccuracy:
    """One class: figures in [0, 1], None where it has no objects to be found."""

    objects: int
    ap50: float | None
    ap: float | None
    voc07: float | None
    voc_all_point: float | None


@dataclass(frozen=True)
class SizeAccuracy:
    """Objects of one size: AP50 and AP over ten IoUs, in [0, 1]; None without such objects."""

    ap50: float | None
    ap: float | None


@dataclass(frozen=True)
class Accuracy:
    """What a detector got right on a split; every figure in [0, 1], averaged over classes that have objects.

    Attributes:
        ap50: COCO AP at IoU 0.5, 101 points. None when no class has objects, likewise below.
        ap: COCO AP averaged over IoU 0.50:0.05:0.95.
        voc07: VOC 2007's 11-point AP at IoU 0.5. voc_all_point: VOC 2010's, all points.
        images: how many images. objects: how many objects were to be found (neither difficult nor crowd).
        per_class: by class name, in label order.
        by_size: "small", "medium", "large".
        curves: class name to precision (101,) at recalls 0, 0.01, ... 1, IoU 0.5; "" is the mean over classes.
    """

    ap50: float | None
    ap: float | None
    voc07: float | None
    voc_all_point: float | None
    images: int
    objects: int
    per_class: dict[str, ClassAccuracy]
    by_size: dict[str, SizeAccuracy]
    curves: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, figures rounded to six places."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


def evaluate(records: Sequence[ImageRecord], detections: Sequence[Detections], class_names: Sequence[str]) -> Accuracy:
    """Score one answer an image against its ground truth.

    Difficult objects are neither to be found nor wrong to find; in COCO's protocol each can be found once, in VOC's
    any number of times. Crowds follow COCO's rule, and count as difficult in VOC's.

    Raises:
        ValueError: there is not one answer an image, or a label lies outside the classes.
    """
    check_answers(records, detections, len(class_names))
    precision = _coco_precision(records, detections, class_names)  # (10 IoUs, 101, classes, 4 areas)
    matches = match_voc(records, detections, len(class_names))
    voc07, all_point = average_precisions_voc(matches)
    ap50, ap = precision[0, :, :, 0].mean(0), precision[:, :, :, 0].mean((0, 1))
    objects = matches.positives.sum(0)
    return Accuracy(
        ap50=_mean(ap50),
        ap=_mean(ap),
        voc07=_mean(voc07),
        voc_all_point=_mean(all_point),
        images=len(records),
        objects=int(objects.sum()),
        per_class={
            name: ClassAccuracy(int(objects[i]), *(_mean(v[i : i + 1]) for v in (ap50, ap, voc07, all_point)))
            for i, name in enumerate(class_names)
        },
        by_size={
            size: SizeAccuracy(_mean(precision[0, :, :, area]), _mean(precision[:, :, :, area]))
            for area, size in enumerate(SIZES, 1)
        },
        curves=_curves(precision[0, :, :, 0], class_names),
    )


def _curves(precision: Float64Array, class_names: Sequence[str]) -> dict[str, list[float]]:
    """Precision (101, classes) by class name, and their mean under ""."""
    there = np.isfinite(precision[0])
    curves = {name: precision[:, i].tolist() for i, name in enumerate(class_names) if there[i]}
    if there.any():
        curves[""] = precision[:, there].mean(1).tolist()
    return curves


def _coco_precision(
    records: Sequence[ImageRecord], detections: Sequence[Detections], class_names: Sequence[str]
) -> Float64Array:
    """(10, 101, classes, 4) precision by IoU, recall, class and area (all, small, medium, large); NaN: no objects."""
    from faster_coco_eval import COCO, COCOeval_faster

    if not records or not class_names:
        return np.full((10, len(RECALL_POINTS_COCO), len(class_names), 1 + len(SIZES)), np.nan)
    images = [
        {"id": i, "height": record.image_hw[0], "width": record.image_hw[1]} for i, record in enumerate(records, 1)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(class_names, 1)]
    sides = []
    for boxes in (_annotations(records), _results(detections)):
        side = COCO(print_function=_silent)
        side.dataset = {"images": images, "categories": categories, "annotations": boxes}
        side.createIndex()
        sides.append(side)
    evaluator = COCOeval_faster(*sides, iouType="bbox", print_function=_silent)
    evaluator.evaluate()
    evaluator.accumulate()
    precision = np.asarray(evaluator.eval["precision"], np.float64)[..., -1]
    return np.where(precision < 0, np.nan, precision)


def _annotations(records: Sequence[ImageRecord]) -> list[dict[str, Any]]:
    annotations = []
    for image_id, record in enumerate(records, 1):
        boxes = _xywh(record.boxes_xyxy)
        areas = boxes[:, 2] * boxes[:, 3]
        # An area outside every range makes COCO's evaluation ignore an object without the crowd rule, which would
        # let any number of boxes match it at a more lenient overlap.
        areas[record.difficult & ~record.crowd] = _OUTSIDE_EVERY_RANGE
        rows = zip(
            boxes.tolist(), areas.tolist(), (record.labels + 1).tolist(), record.crowd.astype(int).tolist(), strict=True
        )
        annotations += [
            {"image_id": image_id, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
            for box, area, label, crowd in rows
        ]
    return [{"id": index, **annotation} for index, annotation in enumerate(annotations, 1)]


def _results(detections: Sequence[Detections]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for image_id, found in enumerate(detections, 1):
        boxes = _xywh(found.boxes_xyxy)
        rows = zip(
            boxes.tolist(),
            (boxes[:, 2] * boxes[:, 3]).tolist(),
            (found.labels + 1).tolist(),
            found.scores.astype(np.float64).tolist(),
            strict=True,
        )
        start = len(results) + 1
        results += [
            {"id": i, "image_id": image_id, "category_id": k, "bbox": b, "area": a, "score": s, "iscrowd": 0}
            for i, (b, a, k, s) in enumerate(rows, start)
        ]
    return results


def _xywh(boxes_xyxy: Any) -> Float64Array:
    """Corners to corner and extent, in double precision so that it loses nothing."""
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _mean(values: Float64Array) -> float | None:
    """The mean of what is finite; None if nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return value


def _silent(*_: object) -> None:
    """Takes the library's progress messages."""
