"""Selection and NMS on drawn candidates against a slow, plain reference: ties, NaN, flat and inside-out boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd import postprocess
from edgekd.boxes import iou_matrix
from edgekd.postprocess import nms, select, select_soft

IOUS = st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0])
SCORES = st.sampled_from([0.0, 0.05, 0.1, 0.1000001, 0.25, 0.25, 0.5, 0.75, 1.0, float("nan")])
# Few whole numbers, so that boxes are often the same, flat or inside out; and some so small that areas vanish.
SIDES = st.one_of(st.integers(0, 6).map(float), st.sampled_from([1e-20, 3e-20, 1e-19, 0.1, 2.5]))


def draw_boxes(data: st.DataObject, count: int) -> np.ndarray:
    return np.array(data.draw(st.lists(SIDES, min_size=4 * count, max_size=4 * count)), np.float32).reshape(-1, 4)


def plain_nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float) -> list[int]:
    kept: list[int] = []
    order = sorted(
        range(len(scores)), key=lambda i: (bool(np.isnan(scores[i])), -scores[i] if scores[i] >= 0 else 0, i)
    )
    for row in order:
        same = [k for k in kept if labels[k] == labels[row]]
        if not any((iou_matrix(boxes[[k]], boxes[[row]]) > iou)[0, 0] for k in same):
            kept.append(row)
    return kept


def plain_select(boxes: np.ndarray, scores: np.ndarray, over: float, iou: float, limit: int, top_k: int) -> list[tuple]:
    count, classes = scores.shape
    pairs = [(row, label) for row in range(count) for label in range(classes) if scores[row, label] > over]
    best = sorted(pairs, key=lambda pair: -scores[pair])[:top_k]  # stable: of equals the first
    sound = [(r, c) for r, c in best if boxes[r, 2] >= boxes[r, 0] and boxes[r, 3] >= boxes[r, 1]]
    rows, labels = [r for r, _ in sound], np.array([c for _, c in sound], np.int64)
    kept = plain_nms(boxes[rows], np.array([scores[pair] for pair in sound], np.float32), labels, iou)[:limit]
    return [(*boxes[rows[k]].tolist(), float(scores[sound[k]]), int(labels[k])) for k in kept]


@pytest.mark.parametrize("block", [2, 64])
@given(data=st.data(), iou=IOUS, limit=st.sampled_from([None, 1, 3, 100]))
@settings(max_examples=150, deadline=None)
def test_nms_equals_the_plain_loop(block: int, data: st.DataObject, iou: float, limit: int | None) -> None:
    count = data.draw(st.integers(0, 24))
    boxes = draw_boxes(data, count)
    scores = np.array(data.draw(st.lists(SCORES, min_size=count, max_size=count)), np.float32)
    labels = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "_BLOCK", block)  # so that a few boxes make several blocks
        found = nms(boxes, scores, labels, iou, limit).tolist()
    assert found == plain_nms(boxes, scores, labels, iou)[:limit]


@given(
    data=st.data(),
    iou=IOUS,
    limit=st.integers(1, 8),
    top_k=st.integers(1, 12),
    over=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_select_equals_the_plain_loop_however_arrays_lie(
    data: st.DataObject, iou: float, limit: int, top_k: int, over: float
) -> None:
    count, classes = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 4))
    boxes = draw_boxes(data, count)
    drawn = data.draw(st.lists(SCORES, min_size=count * classes, max_size=count * classes))
    scores = np.array(drawn, np.float32).reshape(count, classes)
    expected = plain_select(boxes, scores, over, iou, limit, top_k)
    wide_boxes, wide_scores = np.zeros((count, 8), np.float32), np.zeros((count, 2 * classes), np.float32)
    wide_boxes[:, ::2], wide_scores[:, ::2] = boxes, scores
    layouts = [
        (boxes, scores),
        (np.asfortranarray(boxes), np.asfortranarray(scores)),
        (wide_boxes[:, ::2], wide_scores[:, ::2]),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "PRE_NMS_TOP_K", top_k)  # so that a few pairs are too many
        for some_boxes, some_scores in layouts:
            found = select(some_boxes, some_scores, score_threshold=over, nms_iou=iou, max_detections=limit)
            said = zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
            assert [(*box, score, label) for box, score, label in said] == expected


@pytest.mark.parametrize("values", [59, 1200])  # as many as there are scores: none are equal
@pytest.mark.parametrize("nans", [0, 1, 6, 8, 40])
def test_of_many_pairs_the_best_are_taken_and_of_equals_the_first(
    nans: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postprocess, "PRE_NMS_TOP_K", 10)
    rng = np.random.default_rng(2)
    scores = ((rng.permutation(1200).reshape(400, 3) % values + 1) / 1280).astype(np.float32)
    scores.reshape(-1)[rng.permutation(1200)[:nans]] = np.nan
    corners = np.arange(400, dtype=np.float32)[:, None] * [20, 0]
    boxes = np.concatenate([corners, corners + 10], 1).astype(np.float32)
    ranked = np.argsort(-np.nan_to_num(scores.reshape(-1), nan=0.0), kind="stable")[:10]
    for layout in (np.ascontiguousarray, np.asfortranarray):
        found = select(boxes, layout(scores), score_threshold=0.0005, nms_iou=0.5, max_detections=100)
        assert (found.boxes_xyxy[:, 0] / 20 * 3 + found.labels).astype(int).tolist() == ranked.tolist()


def test_of_rows_with_equal_best_scores_the_first_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "PRE_NMS_TOP_K", 3)
    corners = np.arange(8, dtype=np.float32)[:, None] * [20, 0]
    boxes = np.concatenate([corners, corners + 10], 1).astype(np.float32)
    probs = np.full((8, 2), 0.5, np.float32)
    probs[6] = 0.75
    found = select_soft(boxes, probs, score_threshold=0.1, nms_iou=0.5, max_detections=10)
    assert (found.boxes_xyxy[:, 0] / 20).tolist() == [6, 0, 1]
