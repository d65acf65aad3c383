"""From candidate boxes to detections: NMS, soft-NMS, weighted boxes fusion, and the selection that detectors end with.

Plain numpy, bounded in memory: no step builds an N x N matrix of all candidates, so 8,400 boxes times 80 classes at a
threshold of 0.001 cost milliseconds. Ties in score are broken by position, so results repeat exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.boxes import area, iou_matrix
from edgekd.types import BoolArray, Detections, FloatArray, IntArray, SoftDetections

PRE_NMS_TOP_K = 1000
"""Candidates that enter NMS at most. At a 0.001 threshold a YOLO head gives tens of thousands, nearly all noise."""

_BLOCK = 64
_TINY, _ZERO = np.finfo(np.float32).tiny, np.float32(0)


def nms(boxes_xyxy: FloatArray, scores: FloatArray, labels: IntArray, iou: float, limit: int | None = None) -> IntArray:
    """Greedy class-wise non-maximum suppression: the kept rows, best score first.

    Candidates are taken in blocks, best first. Where a block keeps few of its rows, these suppress among all that follow at
    once, so that later blocks hold no row that is gone already; where it keeps most, only the next block is tested. This
    equals the one-by-one algorithm, and stops once `limit` rows are kept.

    Args:
        boxes_xyxy: (N, 4) float32. scores: (N,). labels: (N,) int: boxes suppress only boxes of their own class.
        iou: a box goes if it overlaps a better one by more than this.
        limit: keep at most so many.
    """
    order = _best_first(scores)
    return order.take(_suppress(_table(boxes_xyxy, order, labels.take(order)), iou, limit))


def _table(boxes_xyxy: FloatArray, rows: IntArray, labels: IntArray) -> FloatArray:
    """(6, N) float32, each along memory: x1, y1, x2, y2, area and label of these rows."""
    table = np.empty((6, len(rows)), np.float32)
    # Of an array that lies the other way round, `take` would copy every row first; and it is ten times as fast as brackets.
    columns_first = boxes_xyxy.T.flags.c_contiguous
    table[:4] = boxes_xyxy.T.take(rows, 1) if columns_first else boxes_xyxy.take(rows, 0).T
    extent = table[2:4] - table[:2]
    np.maximum(extent, _ZERO, out=extent)
    np.multiply(extent[0], extent[1], out=table[4])
    table[5] = labels
    return table


def _suppress(table: FloatArray, iou: float, limit: int | None) -> IntArray:
    """Positions that `nms` keeps of a `_table` in descending score."""
    at = np.arange(table.shape[1])
    if iou >= 1.0:  # nothing overlaps by more: a detector that has done its own NMS
        return at[:limit]
    tiny = bool(np.count_nonzero(table[4] < 2 * _TINY))
    if len(at) <= _BLOCK:
        return np.array(_greedy(_overlap(table, table, iou, tiny))[:limit], np.int64)
    kept, found = [at[:0]], 0
    pending = table[:, :0]  # what is kept and `table` has not been tested against yet
    while len(at) and (limit is None or found < limit):
        block, block_at, table, at = table[:, :_BLOCK], at[:_BLOCK], table[:, _BLOCK:], at[_BLOCK:]
        if pending.shape[1]:
            free = _free(pending, block, iou, tiny)
            block, block_at = block.compress(free, 1), block_at.compress(free)
        new = np.array(_greedy(_overlap(block, block, iou, tiny)), np.int64)
        kept.append(block_at.take(new))
        found += len(new)
        fresh = block.take(new, 1)
        pending = np.concatenate([pending, fresh], 1) if pending.shape[1] else fresh
        if len(new) < _BLOCK // 2 and len(at):  # rows lie in heaps: most of what follows goes at once
            free = _free(pending, table, iou, tiny)
            table, at, pending = table.compress(free, 1), at.compress(free), pending[:, :0]
    return np.concatenate(kept)[:limit]


def _free(kept: FloatArray, others: FloatArray, iou: float, tiny: bool) -> BoolArray:
    """Which of the others no kept one suppresses."""
    gone: BoolArray = np.logical_or.reduce(_overlap(kept, others, iou, tiny), 0)
    return ~gone


def _overlap(a: FloatArray, b: FloatArray, iou: float, tiny: bool) -> BoolArray:
    """(N, M) bool: same class, and overlapping by more than `iou`, as `iou_matrix` has it, of two tables.

    In place and along memory: at these sizes numpy's calls and temporaries cost more than the arithmetic.
    """
    low = np.maximum(a[:2, :, None], b[:2, None])
    high = np.minimum(a[2:4, :, None], b[2:4, None])
    np.minimum(low, high, out=low)  # no extent where boxes lie apart: a third of the time of a maximum with 0
    high -= low
    shared, union = high[0], low[0]
    shared *= high[1]
    np.add(a[4][:, None], b[4], out=union)
    union -= shared
    if tiny:
        np.maximum(union, _TINY, out=union)
    shared /= union
    over: BoolArray = shared > iou
    over &= a[5][:, None] == b[5]
    return over


def _greedy(over: BoolArray) -> list[int]:
    """Rows that greedy suppression keeps, given symmetric (N, N) overlaps of rows in descending score."""
    # A row of the matrix as the bits of one Python integer: marking all that it suppresses is then a single operation.
    packed = np.packbits(over, axis=1, bitorder="little")
    width, data = packed.shape[1], packed.tobytes()
    kept, left = list[int](), (1 << len(over)) - 1
    while left:
        best = left & -left
        row = best.bit_length() - 1
        kept.append(row)
        left &= ~(int.from_bytes(data[row * width : (row + 1) * width], "little") | best)
    return kept


def soft_nms(
    boxes_xyxy: FloatArray,
    scores: FloatArray,
    labels: IntArray,
    *,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> tuple[IntArray, FloatArray]:
    """Gaussian soft-NMS (Bodla et al., ICCV 2017, eq. 3), class-wise: (kept rows, their decayed scores), best first.

    Each box chosen multiplies the scores of the rest of its class by exp(-iou^2 / sigma); rows that fall to
    `score_threshold` or below leave. Only the best `PRE_NMS_TOP_K` rows take part, since the method is quadratic.
    """
    rows = _top_k(scores, PRE_NMS_TOP_K)
    rows = rows[scores[rows] > score_threshold]
    left_scores = scores[rows].astype(np.float32)
    chosen: list[int] = []
    chosen_scores: list[float] = []
    while len(rows):
        best = int(left_scores.argmax())
        row = rows[best]
        chosen.append(int(row))
        chosen_scores.append(float(left_scores[best]))
        rest = np.arange(len(rows)) != best
        rows, left_scores = rows[rest], left_scores[rest]
        overlap = iou_matrix(boxes_xyxy[row][None], boxes_xyxy[rows])[0]
        same = labels[rows] == labels[row]
        left_scores = np.where(same, left_scores * np.exp(-(overlap**2) / np.float32(sigma)), left_scores)
        alive = left_scores > score_threshold
        rows, left_scores = rows[alive], left_scores[alive]
    return np.array(chosen, np.int64), np.array(chosen_scores, np.float32)


def _best_first(values: FloatArray) -> IntArray:
    """`np.argsort(-values, kind="stable")`, in a fifth of the time where these are a thousand float32 over 0."""
    if len(values) < 128 or values.dtype != np.float32 or not values.min(initial=1) > 0:
        return np.argsort(-values, kind="stable")
    # Such numbers are ordered as their bits are. With the position below them no two keys are equal, so that the plain
    # sort of integers, which numpy has vectorised, cannot but be stable.
    keys = (~values.view(np.uint32)).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.int64)


def _top_k(values: FloatArray, k: int) -> IntArray:
    """Positions of the k largest values (all of them if there are fewer), in ascending position; of equals the first."""
    if len(values) <= k:
        return np.arange(len(values), dtype=np.int64)
    last = np.partition(values, len(values) - k)[len(values) - k]
    rows = np.flatnonzero(values >= last)
    if len(rows) > k:  # several are equal to the last
        equal = np.flatnonzero(values.take(rows) == last)
        rows = np.delete(rows, equal[len(equal) - (len(rows) - k) :])
    return rows


def _best_pairs(flat: FloatArray, score_threshold: float, k: int) -> IntArray:
    """Positions of all scores over the threshold or, where many are, of some that hold the best k with all their equals."""
    passing = flat > score_threshold
    if np.count_nonzero(passing) > 4 * k:
        # Of 2k groups' best scores the k-th is no higher than the k-th of all, and not much lower.
        groups = 2 * k
        whole = len(flat) // groups * groups
        best = flat[:whole].reshape(-1, groups).max(0)
        bound = np.partition(best, k)[k]
        if bound > score_threshold:
            pairs = np.flatnonzero(flat >= bound)
            if len(pairs) >= k:  # else there were values that are not numbers
                return pairs
    return np.flatnonzero(passing)


def select(
    boxes_xyxy: FloatArray,
    scores: FloatArray,
    *,
    score_threshold: float,
    nms_iou: float,
    max_detections: int,
    box_voting: float | None = None,
) -> Detections:
    """Multi-label selection, as mAP wants it: every (box, class) pair over the threshold is a candidate, then NMS.

    Args:
        boxes_xyxy: (P, 4) float32; rows with negative extent are left out. scores: (P, K) float32 in [0, 1].
        box_voting: candidates that overlap a kept box of their class by more than this vote on where it lies, each by
            its score (Gidaris & Komodakis, ICCV 2015); None leaves boxes as they are.

    Returns:
        At most `max_detections`, best first, in the frame of `boxes_xyxy`.
    """
    rows, labels, values = _candidates(scores, score_threshold)
    order = _best_first(values)[:PRE_NMS_TOP_K]
    labels = labels.take(order)
    table = _table(boxes_xyxy, rows.take(order), labels)
    valid = table[2:4] >= table[:2]
    if np.count_nonzero(valid) < valid.size:
        sound = valid[0] & valid[1]
        order, labels, table = order.compress(sound), labels.compress(sound), table.compress(sound, 1)
    kept = _suppress(table, nms_iou, max_detections)
    values = values.take(order)
    boxes = table[:4].take(kept, 1).T if box_voting is None else _vote(table, values, kept, box_voting)
    return Detections(boxes, values.take(kept), labels.take(kept))


def _vote(table: FloatArray, scores: FloatArray, kept: IntArray, iou: float) -> FloatArray:
    """(M, 4) boxes at positions `kept` of a `_table` with (N,) `scores`, moved to their voters' mean."""
    chosen = table.take(kept, 1)
    voting = _overlap(chosen, table, iou, bool(np.count_nonzero(table[4] < 2 * _TINY)))
    voting[np.arange(len(kept)), kept] = True  # a box without extent does not even overlap itself
    weights = voting * scores
    boxes: FloatArray = weights @ table[:4].T
    boxes /= weights.sum(1, keepdims=True)
    return boxes


def _candidates(scores: FloatArray, score_threshold: float) -> tuple[IntArray, IntArray, FloatArray]:
    """(rows, labels, scores) of pairs over the threshold, the best `PRE_NMS_TOP_K` among them, by row and label."""
    count, classes = scores.shape
    if scores.T.flags.c_contiguous and not scores.flags.c_contiguous:  # channels first, as YOLO gives them
        flat = scores.T.reshape(-1)
        pairs = _best_pairs(flat, score_threshold, PRE_NMS_TOP_K)
        labels, rows = np.divmod(pairs, count)
        by_row = np.argsort(rows * classes + labels)
        rows, labels, pairs = rows.take(by_row), labels.take(by_row), pairs.take(by_row)
    else:
        flat = scores.reshape(-1)
        pairs = _best_pairs(flat, score_threshold, PRE_NMS_TOP_K)
        rows, labels = np.divmod(pairs, classes)
    return rows, labels, flat.take(pairs)


def select_soft(
    boxes_xyxy: FloatArray,
    scores: FloatArray,
    *,
    score_threshold: float,
    nms_iou: float,
    max_detections: int,
) -> SoftDetections:
    """Like `select`, but one row a box with its whole class vector; NMS goes by each box's best class."""
    best = scores.max(1, initial=0.0)
    rows = np.flatnonzero((best > score_threshold) & (boxes_xyxy[:, 2:] >= boxes_xyxy[:, :2]).all(1))
    rows = rows[_top_k(best[rows], PRE_NMS_TOP_K)]
    labels = scores[rows].argmax(1) if len(rows) else np.zeros(0, np.int64)
    kept = rows[nms(boxes_xyxy[rows], best[rows], labels, nms_iou, max_detections)]
    return SoftDetections(boxes_xyxy[kept], scores[kept])


def weighted_boxes_fusion(
    answers: Sequence[SoftDetections],
    weights: Sequence[float] | None = None,
    iou: float = 0.55,
    *,
    known: Sequence[BoolArray] | None = None,
) -> SoftDetections:
    """Weighted boxes fusion (Solovyev, Wang, Gabruseva 2021) of several models' answers to one image.

    Boxes of the same best class join the cluster whose fused box they overlap most, if by more than `iou`. The fused
    box is the average weighted by confidence; the fused class vector is the models' weighted average, where a model
    that has no box in the cluster counts as zero: with one box a model this is the paper's rescaling by T / N.

    Deviations: whole class vectors are averaged instead of one score; a model's second box in a cluster shapes the
    box but takes nothing from the score (its best one counts); ties are broken by content, so the order of the models
    makes no difference.

    Args:
        answers: one a model, all over the same K classes and the same image.
        weights: one positive number a model; equal if left out.
        known: one (K,) bool a model: the classes it can see at all. A model is not counted as having missed a class
            that it does not know.

    Returns:
        Fused candidates, most confident first.

    Raises:
        ValueError: no answers, or lengths or class counts differ.
    """
    shares = np.ones(len(answers)) if weights is None else np.asarray(weights, np.float64)
    widths = {answer.class_probs.shape[1] for answer in answers}
    if len(widths) != 1 or len(shares) != len(answers) or (known is not None and len(known) != len(answers)):
        raise ValueError(f"answers over {sorted(widths)} classes, {len(answers)} answers, {len(shares)} weights")
    knows = np.ones((len(answers), widths.pop())) if known is None else np.asarray(known, np.float64)
    boxes = np.concatenate([answer.boxes_xyxy for answer in answers])
    probs = np.concatenate([answer.class_probs for answer in answers])
    model = np.repeat(np.arange(len(answers)), [len(answer) for answer in answers])
    confidence = probs.max(1, initial=0.0) * shares[model]
    order = np.lexsort([*probs.T, *boxes.T, shares[model], -confidence])
    votes = probs * (shares[:, None] * knows)[model]
    # Sorted before summing, so that not even the last bit depends on the order of the models.
    total = np.maximum(np.sort(shares[:, None] * knows, axis=0).sum(0), np.finfo(np.float64).tiny)
    fused_boxes: list[FloatArray] = []
    voters: list[list[int]] = []
    best_class = probs.argmax(1)[order] if len(probs) else np.zeros(0, np.int64)
    for label in np.unique(best_class):
        rows = order[best_class == label]
        whose = model[rows].tolist()
        for box, members in _clusters(boxes[rows], confidence[rows], iou):
            fused_boxes.append(box)
            first = dict(zip((whose[row] for row in reversed(members)), reversed(members), strict=True))
            voters.append(rows[sorted(first.values())].tolist())  # of each model its most confident box
    if not fused_boxes:
        return SoftDetections.empty(probs.shape[1])
    starts = np.cumsum([0, *map(len, voters[:-1])])
    fused = np.add.reduceat(votes[np.concatenate(voters)], starts) / total
    fused = np.clip(fused.astype(np.float32), 0.0, 1.0)
    best_first = np.argsort(-fused.max(1), kind="stable")
    return SoftDetections(np.array(fused_boxes, np.float32)[best_first], fused[best_first])


def _clusters(boxes: FloatArray, confidence: NDArray[np.float64], iou: float) -> list[tuple[FloatArray, list[int]]]:
    """Cluster one class's boxes, given by descending confidence: (fused box, member rows) each."""
    fused = np.zeros((4, len(boxes)), np.float32)
    areas, members = np.zeros(len(boxes), np.float32), list[list[int]]()
    shares = np.concatenate([confidence[:, None] * boxes, confidence[:, None]], 1)
    sums = np.zeros_like(shares)
    for row, (box, own_area) in enumerate(zip(boxes, area(boxes), strict=True)):
        count, home = len(members), -1
        if count:  # as `iou_matrix`, whose general form costs more than the arithmetic on so few boxes
            x1, y1, x2, y2 = fused[:, :count]
            shared = np.minimum(x2, box[2])
            shared -= np.maximum(x1, box[0])
            height = np.minimum(y2, box[3])
            height -= np.maximum(y1, box[1])
            shared = np.maximum(shared, 0.0, out=shared) * np.maximum(height, 0.0, out=height)
            shared /= np.maximum(areas[:count] + own_area - shared, _TINY)
            home = int(shared.argmax())
            home = home if shared[home] > iou else -1
        if home < 0:
            home = count
            members.append([])
        members[home].append(row)
        total = sums[home]
        total += shares[row]
        fused[:, home] = mean = total[:4] / total[4] if total[4] > 0 else box
        x1, y1, x2, y2 = mean.astype(np.float32)
        areas[home] = max(x2 - x1, _ZERO) * max(y2 - y1, _ZERO)
    return [(fused[:, index].copy(), rows) for index, rows in enumerate(members)]
