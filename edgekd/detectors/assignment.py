"""Which output row learns which box: task-aligned (anchor-free) and by anchor shape (YOLOv3), whole batches at once.

Ground truth and a teacher's answer go through the same functions: ground truth is an answer of full confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.detectors.base import SoftTargets, Targets
from edgekd.detectors.box_losses import pairwise_iou


@dataclass(frozen=True)
class PaddedTargets:
    """Boxes of a batch in one tensor, M being the largest number in an image and at least 1.

    Attributes:
        boxes_xyxy: (B, M, 4) float32, input pixels.
        class_probs: (B, M, classes) float32 in [0, 1]; one-hot for ground truth.
        confidence: (B, M) float32, the largest of `class_probs`; 0 marks padding and boxes without extent.
    """

    boxes_xyxy: Tensor
    class_probs: Tensor
    confidence: Tensor


def pad_targets(targets: Targets, num_classes: int, device: torch.device) -> PaddedTargets:
    """Ground truth as `PaddedTargets`."""
    return _pad(targets.boxes_xyxy, [F.one_hot(v.long(), num_classes) for v in targets.labels], num_classes, device)


def pad_soft_targets(soft: SoftTargets, num_classes: int, device: torch.device) -> PaddedTargets:
    """A teacher's answer as `PaddedTargets`."""
    return _pad(soft.boxes_xyxy, soft.class_probs, num_classes, device)


@torch.no_grad()
def silent_rows(soft: SoftTargets, rows_cxcywh: Tensor) -> Tensor:
    """(B, P) bool: rows centred in an object that the teacher cannot know, where its silence is no background.

    By centre rather than overlap, so that one rule holds for priors, anchors and cells: a prior whose centre is outside
    an object has an IoU of less than 0.5 with it.

    Args:
        rows_cxcywh: (P, 4), input pixels.
    """
    silent = torch.zeros(len(soft.boxes_xyxy), len(rows_cxcywh), dtype=torch.bool, device=rows_cxcywh.device)
    centre = rows_cxcywh[:, None, :2]
    for index, boxes in enumerate(soft.silent_xyxy):
        objects = boxes.to(rows_cxcywh.device)
        silent[index] = ((centre >= objects[:, :2]) & (centre <= objects[:, 2:])).all(-1).any(-1)
    return silent


def _pad(boxes: Sequence[Tensor], probs: Sequence[Tensor], num_classes: int, device: torch.device) -> PaddedTargets:
    most = max([1, *(len(b) for b in boxes)])
    padded_boxes = torch.zeros(len(boxes), most, 4, device=device)
    padded_probs = torch.zeros(len(boxes), most, num_classes, device=device)
    for index, (box, prob) in enumerate(zip(boxes, probs, strict=True)):
        padded_boxes[index, : len(box)] = box.to(device, torch.float32)
        padded_probs[index, : len(prob)] = prob.to(device, torch.float32)
    has_extent = (padded_boxes[..., 2:] > padded_boxes[..., :2]).all(-1)
    return PaddedTargets(padded_boxes, padded_probs, padded_probs.amax(-1) * has_extent)


@dataclass(frozen=True)
class Assignment:
    """What each of P rows learns.

    Attributes:
        foreground: (B, P) bool.
        matched: (B, P) int64, index of the row's box in `PaddedTargets`; 0 in the background.
        quality: (B, P) float32 in [0, 1], how well the row may serve; 0 in the background.
    """

    foreground: Tensor
    matched: Tensor
    quality: Tensor


def for_foreground(values: Tensor, assignment: Assignment) -> Tensor:
    """Of values (B, M, ...) a box, those of the foreground rows' boxes: (foreground rows of the batch, ...)."""
    image = assignment.foreground.nonzero(as_tuple=True)[0]
    return values[image, assignment.matched[assignment.foreground]]


@torch.no_grad()
def task_aligned(
    scores: Tensor,
    boxes_xyxy: Tensor,
    cells_cxcywh: Tensor,
    targets: PaddedTargets,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Task-aligned assignment (TOOD, Feng et al., 2021, arXiv 2108.07755, section 3.2).

    The `topk` cells of largest score^alpha * IoU^beta learn a box, among those whose centre it contains; a cell that
    several boxes claim goes to the one of largest IoU times confidence. The quality is that alignment, scaled so that
    a box's best cell has the IoU of its best-overlapping cell.

    Deviations: the paper starts with another assigner (ATSS) and takes 13 cells, alpha 1; here the cell of the finest
    grid around a box's centre is always a candidate, so that a box smaller than a cell still has one.

    Args:
        scores: (B, P, classes) in [0, 1], predicted.
        boxes_xyxy: (B, P, 4) predicted, input pixels.
        cells_cxcywh: (P, 4) grid cells, input pixels.
    """
    labels = targets.class_probs.argmax(-1)
    score = scores.transpose(1, 2).gather(1, labels.unsqueeze(-1).expand(-1, -1, scores.shape[1]))
    iou = pairwise_iou(targets.boxes_xyxy, boxes_xyxy)
    alignment = score.pow(alpha) * iou.pow(beta)
    alignment *= _candidates(cells_cxcywh, targets)

    values, index = alignment.topk(min(topk, alignment.shape[-1]), dim=-1)
    claimed = torch.zeros_like(alignment, dtype=torch.bool).scatter_(-1, index, values > 0)
    claim = torch.where(claimed, iou * targets.confidence.unsqueeze(-1) + 1e-9, 0.0)
    strength, matched = claim.max(dim=1)
    foreground = strength > 0

    batch = torch.arange(len(labels), device=labels.device).unsqueeze(1)
    cell = torch.arange(iou.shape[-1], device=labels.device)
    row_alignment = alignment[batch, matched, cell] * foreground
    row_iou = iou[batch, matched, cell] * foreground
    nothing = torch.zeros_like(targets.confidence)
    best_alignment = nothing.scatter_reduce(1, matched, row_alignment, "amax")
    best_iou = nothing.scatter_reduce(1, matched, row_iou, "amax")
    scale = best_iou / best_alignment.clamp(min=torch.finfo(torch.float32).tiny)
    quality = row_alignment * scale.gather(1, matched)
    return Assignment(foreground, torch.where(foreground, matched, 0), quality.clamp(max=1.0))


def _candidates(cells_cxcywh: Tensor, targets: PaddedTargets) -> Tensor:
    """(B, M, P) bool: whether a cell may learn a box."""
    cx, cy, size, _ = cells_cxcywh.unbind(-1)
    x1, y1, x2, y2 = targets.boxes_xyxy.unsqueeze(-1).unbind(-2)
    inside = (cx > x1) & (cx < x2) & (cy > y1) & (cy < y2)
    # Only the finest grid: elsewhere the cell at the centre of a box this small would be a poor candidate.
    reach = torch.where(size == size.min(), size / 2, -1.0)
    central = (((x1 + x2) / 2 - cx).abs() <= reach) & (((y1 + y2) / 2 - cy).abs() <= reach)
    return (inside | central) & (targets.confidence > 0).unsqueeze(-1)


@dataclass(frozen=True)
class AnchorLayout:
    """Where each anchor shape's rows lie; rows run over levels (fine to coarse), then y, x and the level's anchors.

    Attributes:
        shapes_wh: (A, 2) float32, anchor sizes in input pixels, all levels.
        strides: (A,) int64, pixels a cell.
        grids_hw: (A, 2) int64, cells of the anchor's level.
        first_rows: (A,) int64, the row of the anchor at cell (0, 0).
        anchors_a_cell: in every level.
        rows: in all, P.
    """

    shapes_wh: Tensor
    strides: Tensor
    grids_hw: Tensor
    first_rows: Tensor
    anchors_a_cell: int
    rows: int


@torch.no_grad()
def anchor_shape(targets: PaddedTargets, layout: AnchorLayout, ratio: float) -> Assignment:
    """YOLOv3's assignment: the anchor of best IoU in shape alone, in the cell that holds the box's centre.

    Deviation: also every other anchor whose sides are within a factor `ratio` of the box's, which gives small data
    sets more rows to learn from. A row that several boxes want goes to the one of largest shape IoU times confidence,
    which is also the quality.
    """
    image, box = (targets.confidence > 0).nonzero(as_tuple=True)
    corners, confidence = targets.boxes_xyxy[image, box], targets.confidence[image, box]
    size = (corners[:, 2:] - corners[:, :2]).unsqueeze(1)
    smaller = torch.min(size, layout.shapes_wh).prod(-1)
    overlap = smaller / (size.prod(-1) + layout.shapes_wh.prod(-1) - smaller)
    factor = (size / layout.shapes_wh).log().abs().amax(-1).exp()
    best = F.one_hot(overlap.argmax(-1), layout.shapes_wh.shape[0]).bool()
    which, anchor = ((factor < ratio) | best).nonzero(as_tuple=True)

    centre = (corners[which, :2] + corners[which, 2:]) / 2
    grid_hw = layout.grids_hw[anchor]
    cell = (centre / layout.strides[anchor].unsqueeze(1)).floor().long().clamp(min=0)
    cell_x, cell_y = torch.min(cell, grid_hw.flip(-1) - 1).unbind(-1)
    row = layout.first_rows[anchor] + (cell_y * grid_hw[:, 1] + cell_x) * layout.anchors_a_cell
    place = image[which] * layout.rows + row
    quality = overlap[which, anchor] * confidence[which]

    # Two stable sorts put the rows together with the best claim first: the same winner on every device.
    order = torch.argsort(quality, descending=True, stable=True)
    order = order[torch.argsort(place[order], stable=True)]
    winner = torch.ones_like(order, dtype=torch.bool)
    winner[1:] = place[order[1:]] != place[order[:-1]]
    order = order[winner]

    batch = len(targets.confidence)
    device = place.device
    foreground = torch.zeros(batch * layout.rows, dtype=torch.bool, device=device)
    matched = torch.zeros(batch * layout.rows, dtype=torch.int64, device=device)
    kept = torch.zeros(batch * layout.rows, device=device)
    foreground[place[order]] = True
    matched[place[order]] = box[which[order]]
    kept[place[order]] = quality[order]
    shape = (batch, layout.rows)
    return Assignment(foreground.view(shape), matched.view(shape), kept.view(shape))
