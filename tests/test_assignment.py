"""Assignments against slow plain references, and what they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgekd.detectors.assignment import (
    AnchorLayout,
    PaddedTargets,
    anchor_shape,
    for_foreground,
    pad_soft_targets,
    pad_targets,
    task_aligned,
)
from edgekd.detectors.base import SoftTargets, Targets
from edgekd.detectors.box_losses import pairwise_iou
from edgekd.detectors.pyramid import grid_cells
from edgekd.types import DetectorSpec, PreprocessSpec

CPU = torch.device("cpu")
SPEC = DetectorSpec("yolo-nano", ("a", "b", "c"), PreprocessSpec((64, 96), "letterbox"))
STRIDES = (8, 16, 32)


def random_soft(batch: int, seed: int) -> SoftTargets:
    draw = torch.Generator().manual_seed(seed)
    boxes, probs = [], []
    for index in range(batch):
        count = (5 * index) % 9
        corner = torch.rand(count, 2, generator=draw) * torch.tensor([80.0, 50.0])
        boxes.append(torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=draw) * 40], dim=1))
        probs.append(torch.rand(count, 3, generator=draw))
    return SoftTargets(boxes, probs)


def slow_task_aligned(
    scores: Tensor, boxes: Tensor, cells: Tensor, target_boxes: Tensor, probs: Tensor, k: int
) -> tuple[dict[int, int], dict[int, float]]:
    """One image, alpha 0.5 and beta 6: {cell: box} and {cell: quality}."""
    iou = pairwise_iou(target_boxes, boxes)
    finest = cells[:, 2].min().item()
    alignment, claims = {}, {}
    for m, box in enumerate(target_boxes.tolist()):
        label = int(probs[m].argmax())
        able = []
        for p, (cx, cy, size, _) in enumerate(cells.tolist()):
            inside = box[0] < cx < box[2] and box[1] < cy < box[3]
            dx, dy = abs((box[0] + box[2]) / 2 - cx), abs((box[1] + box[3]) / 2 - cy)
            if inside or (size == finest and dx <= size / 2 and dy <= size / 2):
                alignment[m, p] = scores[p, label].item() ** 0.5 * iou[m, p].item() ** 6
                able.append(p)
        able.sort(key=lambda p: -alignment[m, p])
        for p in able[:k]:
            if alignment[m, p] > 0:
                claims.setdefault(p, []).append(m)
    matched = {p: max(ms, key=lambda m: (iou[m, p] * probs[m].max()).item()) for p, ms in claims.items()}
    quality = {}
    for m in range(len(target_boxes)):
        mine = [p for p in matched if matched[p] == m]
        for p in mine:
            best = max(alignment[m, q] for q in mine)
            quality[p] = alignment[m, p] / best * max(iou[m, q].item() for q in mine)
    return matched, quality


@pytest.mark.parametrize("k", [1, 4, 10])
def test_task_aligned_equals_the_slow_reference(k: int) -> None:
    cells = grid_cells(SPEC, STRIDES)
    soft = random_soft(4, seed=k)
    draw = torch.Generator().manual_seed(7)
    scores = torch.rand(4, len(cells), 3, generator=draw)
    centre = cells[:, :2] + torch.randn(4, len(cells), 2, generator=draw) * 4
    half = torch.rand(4, len(cells), 2, generator=draw) * 20 + 2
    boxes = torch.cat([centre - half, centre + half], dim=-1)
    found = task_aligned(scores, boxes, cells, pad_soft_targets(soft, 3, CPU), topk=k)
    assert found.foreground.shape == (4, len(cells))
    for i in range(4):
        matched, quality = slow_task_aligned(scores[i], boxes[i], cells, soft.boxes_xyxy[i], soft.class_probs[i], k)
        rows = found.foreground[i].nonzero().flatten().tolist()
        assert rows == sorted(matched)
        assert {p: int(found.matched[i, p]) for p in rows} == matched
        expected = torch.tensor([quality[p] for p in rows])
        torch.testing.assert_close(found.quality[i, rows], expected, rtol=1e-3, atol=1e-6)
        assert (found.quality[i][~found.foreground[i]] == 0).all()


def test_a_box_smaller_than_a_cell_still_has_one() -> None:
    cells = grid_cells(SPEC, STRIDES)
    boxes = torch.cat([cells[:, :2] - cells[:, 2:], cells[:, :2] + cells[:, 2:]], dim=1).unsqueeze(0)
    tiny = Targets([torch.tensor([[0.5, 0.5, 2.0, 2.0]])], [torch.tensor([1])])
    found = task_aligned(torch.full((1, len(cells), 3), 0.01), boxes, cells, pad_targets(tiny, 3, CPU))
    assert found.foreground[0].nonzero().flatten().tolist() == [0]


def test_padding_and_boxes_without_extent_are_never_assigned() -> None:
    targets = Targets(
        [torch.tensor([[10.0, 10, 30, 30], [40, 20, 40, 50]]), torch.zeros(0, 4)],
        [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.int64)],
    )
    padded = pad_targets(targets, 3, CPU)
    assert padded.confidence.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    cells = grid_cells(SPEC, STRIDES)
    boxes = torch.cat([cells[:, :2] - 20, cells[:, :2] + 20], dim=1).repeat(2, 1, 1)
    found = task_aligned(torch.rand(2, len(cells), 3), boxes, cells, padded)
    assert found.foreground[0].any()
    assert not found.foreground[1].any()
    assert set(for_foreground(padded.class_probs, found).argmax(-1).tolist()) == {2}


ANCHORS = ((8.0, 10.0), (16.0, 14.0), (30.0, 34.0), (70.0, 60.0))


def anchor_layout() -> AnchorLayout:
    """Two levels of 96 x 64 pixels, strides 16 and 32, two anchors each."""
    return AnchorLayout(
        torch.tensor(ANCHORS),
        torch.tensor([16, 16, 32, 32]),
        torch.tensor([[4, 6], [4, 6], [2, 3], [2, 3]]),
        torch.tensor([0, 1, 48, 49]),
        2,
        60,
    )


def slow_anchor_shape(boxes: Tensor, confidence: Tensor, ratio: float) -> dict[int, int]:
    """One image: {row: box}."""
    best: dict[int, tuple[float, int]] = {}
    grids = [(4, 6, 16, 0), (4, 6, 16, 1), (2, 3, 32, 48), (2, 3, 32, 49)]
    for m, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        w, h = x2 - x1, y2 - y1
        overlaps = [min(w, a) * min(h, b) / (w * h + a * b - min(w, a) * min(h, b)) for a, b in ANCHORS]
        for a, (aw, ah) in enumerate(ANCHORS):
            close = max(w / aw, aw / w, h / ah, ah / h) < ratio
            if not close and overlaps[a] < max(overlaps):
                continue
            rows, columns, stride, first = grids[a]
            cx = min(max(int((x1 + x2) / 2 // stride), 0), columns - 1)
            cy = min(max(int((y1 + y2) / 2 // stride), 0), rows - 1)
            row = first + (cy * columns + cx) * 2
            claim = overlaps[a] * confidence[m].item()
            if row not in best or claim > best[row][0]:
                best[row] = (claim, m)
    return {row: m for row, (_, m) in best.items()}


@pytest.mark.parametrize("ratio", [1.0, 1.5, 4.0])
def test_anchor_shape_equals_the_slow_reference(ratio: float) -> None:
    soft = random_soft(5, seed=3)
    found = anchor_shape(pad_soft_targets(soft, 3, CPU), anchor_layout(), ratio)
    for i in range(5):
        rows = found.foreground[i].nonzero().flatten().tolist()
        expected = slow_anchor_shape(soft.boxes_xyxy[i], soft.class_probs[i].amax(-1), ratio) if i else {}
        assert {row: int(found.matched[i, row]) for row in rows} == expected


def test_anchor_shape_puts_a_box_on_the_edge_into_the_grid() -> None:
    edge = Targets([torch.tensor([[90.0, 60, 102, 68]])], [torch.tensor([0])])  # its centre is the far corner
    found = anchor_shape(pad_targets(edge, 3, CPU), anchor_layout(), 1.0)
    assert found.foreground[0].nonzero().flatten().tolist() == [(3 * 6 + 5) * 2]


def test_of_two_equal_boxes_the_surer_one_wins() -> None:
    box = torch.tensor([[10.0, 10, 40, 44]]).repeat(2, 1)
    padded = PaddedTargets(box[None], torch.tensor([[[0.2, 0, 0], [0, 0.9, 0]]]), torch.tensor([[0.2, 0.9]]))
    by_shape = anchor_shape(padded, anchor_layout(), 4.0)
    assert set(by_shape.matched[by_shape.foreground].tolist()) == {1}
    cells = grid_cells(SPEC, STRIDES)
    boxes = torch.cat([cells[:, :2] - 15, cells[:, :2] + 17], dim=1).unsqueeze(0)
    aligned = task_aligned(torch.full((1, len(cells), 3), 0.5), boxes, cells, padded)
    assert set(aligned.matched[aligned.foreground].tolist()) == {1}
