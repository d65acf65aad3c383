"""Selection and fusion against slow, plain references written from the papers."""

from __future__ import annotations

import math
import tracemalloc
from itertools import permutations

import numpy as np
import pytest

from edgekd.postprocess import PRE_NMS_TOP_K, _best_first, nms, select, select_soft, soft_nms, weighted_boxes_fusion
from edgekd.types import SoftDetections


def plain_iou(a: np.ndarray, b: np.ndarray) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def plain_nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float) -> list[int]:
    kept: list[int] = []
    for row in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if all(labels[row] != labels[k] or plain_iou(boxes[row], boxes[k]) <= iou for k in kept):
            kept.append(row)
    return kept


def plain_soft_nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, sigma: float, threshold: float) -> dict:
    left = {i: float(s) for i, s in enumerate(scores) if s > threshold}
    done: dict[int, float] = {}
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        done[best] = left.pop(best)
        for i in list(left):
            if labels[i] == labels[best]:
                left[i] *= math.exp(-(plain_iou(boxes[i], boxes[best]) ** 2) / sigma)
                if left[i] <= threshold:
                    del left[i]
    return done


def crowd(rng: np.random.Generator, count: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clustered boxes, so that suppression has work to do."""
    centres = rng.uniform(20, 180, (6, 2))
    low = centres[rng.integers(0, 6, count)] + rng.normal(0, 6, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(10, 60, (count, 2))], 1).astype(np.float32)
    return boxes, rng.random(count).astype(np.float32), rng.integers(0, classes, count)


@pytest.mark.parametrize("count", [0, 1, 2, 50, 127, 128, 129, 450])
@pytest.mark.parametrize("iou", [0.3, 0.6, 1.0])
def test_nms_equals_one_by_one(count: int, iou: float) -> None:
    boxes, scores, labels = crowd(np.random.default_rng(count), count)
    expected = plain_nms(boxes, scores, labels, iou)
    assert nms(boxes, scores, labels, iou).tolist() == expected
    assert nms(boxes, scores, labels, iou, limit=7).tolist() == expected[:7]


@pytest.mark.parametrize("limit", [None, 1, 30, 70])
def test_nms_of_heaps_and_of_strays_equals_one_by_one(limit: int | None) -> None:
    """Strays first, of which every block keeps most, then heaps, of which it keeps few: both ways of testing, in turn."""
    rng = np.random.default_rng(5)
    strays = np.stack([np.arange(150) * 20.0, np.full(150, 500.0)], 1)
    heaps = rng.uniform(0, 200, (12, 2))[rng.integers(0, 12, 300)] + rng.normal(0, 2, (300, 2))
    corners = np.concatenate([strays, heaps])
    boxes = np.concatenate([corners, corners + 25], 1).astype(np.float32)
    scores = np.concatenate([rng.uniform(0.8, 1, 150), rng.uniform(0, 0.9, 300)]).astype(np.float32)
    labels = rng.integers(0, 2, len(boxes))
    assert nms(boxes, scores, labels, 0.5, limit).tolist() == plain_nms(boxes, scores, labels, 0.5)[:limit]


def test_nms_breaks_ties_by_position() -> None:
    boxes = np.array([[0, 0, 10, 10]] * 3, np.float32)
    assert nms(boxes, np.full(3, 0.5, np.float32), np.zeros(3, np.int64), 0.5).tolist() == [0]


def test_nms_is_class_wise_at_any_coordinate() -> None:
    # Where classes are kept apart by shifting boxes, coordinates left of the image or huge ones break it.
    boxes = np.array([[-900, -900, 9000, 9000]] * 4, np.float32)
    labels = np.array([0, 1, 79, 1])
    assert nms(boxes, np.array([0.9, 0.8, 0.7, 0.6], np.float32), labels, 0.5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [0, 1, 60, 200])
def test_soft_nms_equals_one_by_one(count: int) -> None:
    boxes, scores, labels = crowd(np.random.default_rng(count + 1), count)
    rows, decayed = soft_nms(boxes, scores, labels, sigma=0.4, score_threshold=0.01)
    expected = plain_soft_nms(boxes, scores, labels, 0.4, 0.01)
    assert rows.tolist() == list(expected)
    np.testing.assert_allclose(decayed, list(expected.values()), rtol=1e-4)
    assert (np.diff(decayed) <= 0).all()


def test_soft_nms_keeps_what_nms_would_drop_but_with_less() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], np.float32)
    rows, decayed = soft_nms(boxes, np.array([0.9, 0.8, 0.3], np.float32), np.zeros(3, np.int64))
    assert rows.tolist() == [0, 2, 1]
    np.testing.assert_allclose(decayed, [0.9, 0.3, 0.8 * math.exp(-(0.9**2) / 0.5)], rtol=1e-5)


def test_select_takes_every_pair_over_the_threshold() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [30, 30, 40, 40]], np.float32)
    scores = np.array([[0.9, 0.4], [0.8, 0.5], [0.05, 0.1]], np.float32)
    found = select(boxes, scores, score_threshold=0.05, nms_iou=0.5, max_detections=10)
    assert found.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(found.scores, np.array([0.9, 0.5, 0.1], np.float32))
    np.testing.assert_array_equal(found.boxes_xyxy, boxes[[0, 1, 2]])


@pytest.mark.parametrize("chooser", [select, select_soft])
def test_selection_of_nothing_and_of_broken_boxes(chooser) -> None:  # type: ignore[no-untyped-def]
    limits = {"score_threshold": 0.1, "nms_iou": 0.5, "max_detections": 10}
    assert len(chooser(np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float32), **limits)) == 0
    boxes = np.array([[0, 0, 5, 5], [9, 9, 2, 2]], np.float32)
    assert len(chooser(boxes, np.zeros((2, 3), np.float32), **limits)) == 0
    assert len(chooser(boxes, np.ones((2, 3), np.float32), **limits)) == (3 if chooser is select else 1)


def test_select_soft_keeps_class_vectors() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10]], np.float32)
    scores = np.array([[0.6, 0.3], [0.5, 0.1], [0.2, 0.9]], np.float32)
    found = select_soft(boxes, scores, score_threshold=0.05, nms_iou=0.5, max_detections=10)
    np.testing.assert_array_equal(found.class_probs, scores[[2, 0]])  # the second overlaps the first, same best class


def test_select_of_channels_first_scores_is_the_same() -> None:
    rng = np.random.default_rng(3)
    corners = rng.uniform(0, 300, (900, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + rng.uniform(5, 80, (900, 2)).astype(np.float32)], 1)
    scores = np.round(rng.uniform(0, 1, (900, 7)) ** 8, 2).astype(np.float32)  # rounded, so that there are ties
    settings = {"score_threshold": 0.05, "nms_iou": 0.5, "max_detections": 100}
    rows_first = select(boxes, scores, **settings)
    channels_first = select(np.asfortranarray(boxes), np.asfortranarray(scores), **settings)
    assert len(rows_first) == 100
    for name in ("boxes_xyxy", "scores", "labels"):
        assert np.array_equal(getattr(rows_first, name), getattr(channels_first, name)), name


def test_select_equals_the_reference_and_honours_the_limit() -> None:
    rng = np.random.default_rng(5)
    boxes, _, _ = crowd(rng, 150)
    scores = (rng.random((150, 4)) ** 4).astype(np.float32)
    rows, labels = np.nonzero(scores > 0.3)
    assert len(rows) < PRE_NMS_TOP_K
    kept = plain_nms(boxes[rows], scores[rows, labels], labels, 0.5)[:20]
    found = select(boxes, scores, score_threshold=0.3, nms_iou=0.5, max_detections=20)
    np.testing.assert_array_equal(found.scores, scores[rows, labels][kept])
    np.testing.assert_array_equal(found.labels, labels[kept])
    np.testing.assert_array_equal(found.boxes_xyxy, boxes[rows][kept])


def test_box_voting_equals_the_paper_one_by_one() -> None:
    rng = np.random.default_rng(8)
    boxes, _, _ = crowd(rng, 150)
    boxes[7, 2:] = boxes[7, :2]  # without extent: it overlaps nothing, itself included
    scores = (rng.random((150, 4)) ** 4).astype(np.float32)
    scores[7] = 0.9
    settings = {"score_threshold": 0.3, "nms_iou": 0.5, "max_detections": 100}
    plain, voted = select(boxes, scores, **settings), select(boxes, scores, **settings, box_voting=0.4)
    np.testing.assert_array_equal(voted.scores, plain.scores)
    np.testing.assert_array_equal(voted.labels, plain.labels)
    moved = 0
    for before, after, label in zip(plain.boxes_xyxy, voted.boxes_xyxy, plain.labels, strict=True):
        near = [i for i in range(150) if scores[i, label] > 0.3 and plain_iou(boxes[i], before) > 0.4]
        votes = np.array([scores[i, label] for i in near], np.float64)
        expected = votes @ boxes[near] / votes.sum() if near else before
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-4)
        moved += len(near) > 1
    assert 10 < moved < len(plain)
    without = select(boxes, scores, **settings, box_voting=0.999)
    np.testing.assert_allclose(without.boxes_xyxy, plain.boxes_xyxy, rtol=1e-6)
    assert len(select(boxes[:0], scores[:0], **settings, box_voting=0.4)) == 0


def test_a_crowded_head_at_a_tiny_threshold_stays_small() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 600, (8400, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 40, (8400, 2))], 1).astype(np.float32)
    scores = rng.random((8400, 80)).astype(np.float32)  # all 672,000 pairs are candidates
    tracemalloc.start()
    found = select(boxes, scores, score_threshold=0.001, nms_iou=0.5, max_detections=300)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 300
    assert peak < 64 << 20


def soft(rows: list[tuple[list[float], list[float]]], classes: int = 2) -> SoftDetections:
    if not rows:
        return SoftDetections.empty(classes)
    return SoftDetections(np.array([r[0] for r in rows], np.float32), np.array([r[1] for r in rows], np.float32))


def plain_wbf(answers: list[list[tuple[float, np.ndarray]]], weights: list[float], iou: float) -> list[tuple]:
    """The paper's steps 1-6 for one class, a score a box, with weighted models."""
    queue = sorted(
        ((s * w, b, w) for rows, w in zip(answers, weights, strict=True) for s, b in rows), key=lambda r: -r[0]
    )
    clusters: list[list[tuple]] = []
    fused: list[np.ndarray] = []
    for confidence, box, weight in queue:
        overlaps = [plain_iou(box, f) for f in fused]
        if overlaps and max(overlaps) > iou:
            home = int(np.argmax(overlaps))
        else:
            home = len(fused)
            clusters.append([])
            fused.append(box)
        clusters[home].append((confidence, box, weight))
        total = sum(c for c, _, _ in clusters[home])
        fused[home] = sum(c * b for c, b, _ in clusters[home]) / total
    # score: sum of weighted scores over the sum of all weights = the average rescaled by T / N
    return sorted(
        ((sum(c for c, _, _ in cl) / sum(weights), f) for cl, f in zip(clusters, fused, strict=True)),
        key=lambda r: -r[0],
    )


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]])
def test_wbf_equals_the_paper_with_one_box_a_model(weights: list[float]) -> None:
    rng = np.random.default_rng(3)
    objects = np.array([[10, 10, 60, 60], [80, 20, 140, 90], [30, 100, 50, 160], [120, 120, 190, 190]], np.float64)
    answers = []
    for _ in weights:
        seen = rng.random(4) < 0.8
        answers.append([(float(rng.uniform(0.2, 0.95)), box + rng.normal(0, 3, 4)) for box in objects[seen]])
    columns = [soft([(box.tolist(), [score]) for score, box in rows], 1) for rows in answers]
    fused = weighted_boxes_fusion(columns, weights, 0.55)
    expected = plain_wbf(answers, weights, 0.55)
    assert len(fused) == len(expected)
    np.testing.assert_allclose(fused.class_probs[:, 0], [score for score, _ in expected], rtol=1e-5)
    np.testing.assert_allclose(fused.boxes_xyxy, np.array([box for _, box in expected]), rtol=1e-4)


def test_wbf_by_hand() -> None:
    a = soft([([0, 0, 10, 10], [0.8, 0.1]), ([50, 50, 60, 60], [0.1, 0.6])])
    b = soft([([0, 0, 10, 12], [0.4, 0.3])])
    fused = weighted_boxes_fusion([a, b])
    np.testing.assert_allclose(fused.class_probs, [[0.6, 0.2], [0.05, 0.3]], rtol=1e-6)  # the second: one of two models
    np.testing.assert_allclose(fused.boxes_xyxy, [[0, 0, 10, 10 + 2 / 3], [50, 50, 60, 60]], rtol=1e-6)


def test_wbf_does_not_count_a_class_as_missed_by_a_model_that_cannot_know_it() -> None:
    a = soft([([50, 50, 60, 60], [0.0, 0.6])])
    known = [np.array([True, True]), np.array([True, False])]
    fused = weighted_boxes_fusion([a, soft([])], known=known)
    np.testing.assert_allclose(fused.class_probs, [[0.0, 0.6]], rtol=1e-6)


def test_wbf_does_not_depend_on_the_order_of_models() -> None:
    rng = np.random.default_rng(1)
    answers = []
    for _ in range(4):
        boxes, scores, labels = crowd(rng, 40)
        probs = (rng.random((40, 3)) * 0.1).round(1).astype(np.float32)  # rounded: many exact ties
        probs[np.arange(40), labels] = scores.round(1)
        answers.append(SoftDetections(boxes.round(-1) + np.array([0, 0, 10, 10], np.float32), probs))
    answers.append(answers[0])  # one model twice: every row ties with its twin
    weights = [1.0, 2.0, 1.0, 0.5, 1.0]
    reference = weighted_boxes_fusion(answers, weights)
    for order in list(permutations(range(5)))[::7]:
        fused = weighted_boxes_fusion([answers[i] for i in order], [weights[i] for i in order])
        np.testing.assert_array_equal(fused.boxes_xyxy, reference.boxes_xyxy)
        np.testing.assert_array_equal(fused.class_probs, reference.class_probs)


def test_wbf_of_one_model_and_of_nothing() -> None:
    only = soft([([0, 0, 10, 10], [0.8, 0.1]), ([50, 50, 60, 60], [0.1, 0.6])])
    fused = weighted_boxes_fusion([only])
    np.testing.assert_allclose(fused.boxes_xyxy, only.boxes_xyxy)
    np.testing.assert_allclose(fused.class_probs, only.class_probs)
    assert weighted_boxes_fusion([soft([]), soft([])]).class_probs.shape == (0, 2)


def test_wbf_refuses_answers_over_different_classes() -> None:
    with pytest.raises(ValueError, match="classes"):
        weighted_boxes_fusion([soft([], 2), soft([], 3)])
    with pytest.raises(ValueError, match="weights"):
        weighted_boxes_fusion([soft([])], [1.0, 2.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_best_first_is_a_stable_sort(dtype: type) -> None:
    rng = np.random.default_rng(0)
    for values in (
        rng.random(1000),
        np.round(rng.random(1000), 2) + 0.01,  # many equals
        rng.normal(size=200),  # some below 0
        np.array([0.5, 0.0, -0.0, 0.5, 1e-45, np.inf, 1.0]),
        np.array([0.5, np.nan, 0.7]),
        np.empty(0),
    ):
        drawn = values.astype(dtype)
        np.testing.assert_array_equal(_best_first(drawn), np.argsort(-drawn, kind="stable"))
