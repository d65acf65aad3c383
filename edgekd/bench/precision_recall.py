"""Average precision from matched detections, and how sure one can be of a difference between two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.bench.matching import Float64Array, Matches, check_answers, match_coco
from edgekd.types import Detections, ImageRecord

RECALL_POINTS_COCO: Float64Array = np.linspace(0.0, 1.0, 101)
RECALL_POINTS_VOC07: Float64Array = np.arange(11) / 10.0

_REPLICATES_AT_ONCE = 128


def average_precisions_voc(matches: Matches) -> tuple[Float64Array, Float64Array]:
    """VOC's (11-point, all-point) average precision of each class, each (classes,); NaN without objects.

    11 points: the mean of the best precision at recalls 0, 0.1, ... 1 (VOC 2007). All points: the area under the
    precision envelope (VOC 2010 onwards).
    """
    eleven, every = (np.full(matches.positives.shape[1], np.nan) for _ in range(2))
    for label, count in enumerate(matches.positives.sum(0).tolist()):
        if not count:
            continue
        correct = matches.correct[matches.of_class(label)]
        found = np.cumsum(correct)
        recall, precision = found / count, found / np.arange(1, len(correct) + 1)
        envelope = _envelope(precision)
        at = np.searchsorted(recall, RECALL_POINTS_VOC07, side="left")
        eleven[label] = np.append(envelope, 0.0)[at].mean()
        every[label] = float((np.diff(recall, prepend=0.0) * envelope).sum())
    return eleven, every


def map_difference(
    records: Sequence[ImageRecord],
    detections_a: Sequence[Detections],
    detections_b: Sequence[Detections],
    num_classes: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float] | None:
    """AP50 of model a minus that of model b, with a paired 95 % bootstrap interval over images.

    Both models answer the same resampled images, so what is hard about an image cancels. Images are drawn with
    replacement; the interval is the percentile one.

    Returns:
        (difference, low, high), AP50 in [-1, 1]; None when there is no object to be found.

    Raises:
        ValueError: the answers do not belong to the images.
    """
    check_answers(records, detections_a, num_classes)
    check_answers(records, detections_b, num_classes)
    a, b = (match_coco(records, found, num_classes) for found in (detections_a, detections_b))
    drawn = resampled_ap50([a, b], resamples=resamples, seed=seed)
    return percentile_interval(drawn[0] - drawn[1])


def resampled_ap50(models: Sequence[Matches], *, resamples: int = 1000, seed: int = 0) -> Float64Array:
    """(models, 1 + resamples) AP50 on the split itself, then on resampled images, the same ones for every model."""
    images = len(models[0].positives)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1.0 / images), size=resamples)
    weights = np.concatenate([np.ones((1, images), np.int64), draws])
    return np.stack([mean_ap50(matches, weights) for matches in models])


def percentile_interval(values: Float64Array) -> tuple[float, float, float] | None:
    """(the first, low, high) of a figure and its resampled values, 95 %; None if the figure itself is not there."""
    if not np.isfinite(values[0]):
        return None
    drawn = values[1:][np.isfinite(values[1:])]  # a draw without any object says nothing
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (values[0], values[0])
    return float(values[0]), float(low), float(high)


def share_interval(values: Float64Array) -> tuple[float, float, float] | None:
    """(AP, low, high) of one model by itself, in [0, 1]: the percentiles of resampled values mirrored about AP in log odds.

    AP of few images is too high, since its envelope takes the best of what chance offers, and AP of a resample of them is
    too high once more: percentiles would lie on the wrong side of the figure. Mirrored they lie on the other one (the "basic"
    interval: Davison & Hinkley, Bootstrap Methods, 1997, 5.2). Between two models this cancels, so that differences keep
    percentiles. None as in `percentile_interval`.
    """
    found = percentile_interval(values)
    if found is None or not 0.0 < found[0] < 1.0:
        return found
    value, low, high = found
    squared = (value / (1.0 - value)) ** 2
    ends = [squared * (1.0 - end) / (squared * (1.0 - end) + end) for end in (high, low)]
    return value, min(ends[0], value), max(ends[1], value)


def mean_ap50(matches: Matches, weights: NDArray[np.int64]) -> Float64Array:
    """COCO's 101-point AP50, averaged over classes, of many weighted copies of a split at once.

    Args:
        matches: from `match_coco`.
        weights: (R, images) how often each image counts in each of R copies; a row of ones is the split itself.

    Returns:
        (R,) AP50 over the classes that have objects in that copy; NaN where no class has.
    """
    out = np.empty(len(weights))
    classes = [_ClassRows.of(matches, label) for label in np.flatnonzero(matches.positives.sum(0)).tolist()]
    for start in range(0, len(weights), _REPLICATES_AT_ONCE):
        part = np.ascontiguousarray(weights[start : start + _REPLICATES_AT_ONCE].T.astype(np.float64))
        total, counted = np.zeros(part.shape[1]), np.zeros(part.shape[1])
        for rows in classes:
            precision, there = rows.average_precision(part)
            total += precision
            counted += there
        out[start : start + part.shape[1]] = np.divide(
            total, counted, out=np.full_like(total, np.nan), where=counted > 0
        )
    return out


@dataclass(frozen=True)
class _ClassRows:
    """One class's detections, cut to what can change its average precision.

    Precision as a function of recall only ever peaks at a true positive, so false positives are kept merely as
    runs before each true positive, and those after the last are dropped.
    """

    objects_an_image: NDArray[np.float64]
    correct_images: NDArray[np.intp]
    wrong_images: NDArray[np.intp]
    wrong_before: NDArray[np.intp]

    @classmethod
    def of(cls, matches: Matches, label: int) -> _ClassRows:
        rows = matches.of_class(label)
        correct, images = matches.correct[rows], matches.images[rows]
        hits = np.flatnonzero(correct)
        until_last = slice(0, int(hits[-1]) + 1 if len(hits) else 0)
        return cls(
            matches.positives[:, label].astype(np.float64),
            images[hits],
            images[until_last][~correct[until_last]],
            hits - np.arange(len(hits)),
        )

    def average_precision(self, weights: Float64Array) -> tuple[Float64Array, NDArray[np.bool_]]:
        """(AP or 0 (R,), has objects (R,)) for weights (images, R)."""
        objects = self.objects_an_image @ weights
        there = objects > 0
        if not len(self.correct_images):
            return np.zeros(weights.shape[1]), there
        found = np.cumsum(weights[self.correct_images], axis=0)
        wrong = np.zeros((len(self.wrong_images) + 1, weights.shape[1]))
        np.cumsum(weights[self.wrong_images], axis=0, out=wrong[1:])
        wrong = wrong[self.wrong_before]
        precision = np.divide(found, found + wrong, out=np.zeros_like(found), where=found > 0)
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recall = np.divide(found, objects, out=np.zeros_like(found), where=there)
        # Each recall point takes the envelope at the first detection that reaches it: count the points a step passes.
        reached = np.searchsorted(RECALL_POINTS_COCO, recall.ravel(), side="right").reshape(recall.shape)
        passed = np.diff(reached, axis=0, prepend=0)
        return np.where(there, (passed * envelope).sum(0) / len(RECALL_POINTS_COCO), 0.0), there


def _envelope(precision: Float64Array) -> Float64Array:
    """The best precision at this recall or any higher one."""
    return np.maximum.accumulate(precision[::-1])[::-1]
