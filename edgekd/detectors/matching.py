"""Which prior learns which box, and which background priors are worth learning from (SSD, sections 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekd.detectors.assignment import PaddedTargets
from edgekd.detectors.box_losses import pairwise_iou

_MAX_OVERLAPS = 1 << 23
"""Most (image, box, prior) triples at a time: bounds memory at a few hundred MB for crowded batches."""

_TIE_BREAK = 1e-5
"""IoU a pixel of distance: above rounding, below any difference that matters."""


@dataclass(frozen=True)
class PriorMatch:
    """What each of P priors learns.

    Attributes:
        positive: (B, P) bool, whether it learns a box.
        box: (B, P) int64, which, as an index into `PaddedTargets`; 0 where it learns none.
    """

    positive: Tensor
    box: Tensor


@torch.no_grad()
def match_priors(priors_xyxy: Tensor, targets: PaddedTargets, min_iou: float = 0.5) -> PriorMatch:
    """SSD's rule: each box takes its best prior, and every prior of at least `min_iou` with a box takes that box.

    A prior that several boxes want goes to the one of largest IoU times confidence, where the IoU counts 2 more with a box's
    best prior: of ground truth, whose confidence is 1, to the box that has it as its best prior before any other. Boxes of
    confidence 0 take no part.

    Deviation: of priors with equal IoU the nearest is best. A box smaller than the priors has the same IoU with each
    prior of one size that contains it, and rounding would choose a different one in every view.

    Args:
        priors_xyxy: (P, 4), pixels.
    """
    images, boxes = targets.confidence.shape
    share = max(1, _MAX_OVERLAPS // (boxes * len(priors_xyxy)))
    parts = [
        _match(
            priors_xyxy, targets.boxes_xyxy[start : start + share], targets.confidence[start : start + share], min_iou
        )
        for start in range(0, images, share)
    ]
    return PriorMatch(torch.cat([positive for positive, _ in parts]), torch.cat([box for _, box in parts]))


def _match(priors_xyxy: Tensor, boxes_xyxy: Tensor, confidence: Tensor, min_iou: float) -> tuple[Tensor, Tensor]:
    overlap = pairwise_iou(boxes_xyxy, priors_xyxy)
    best_prior = (overlap - _TIE_BREAK * _centre_distance(boxes_xyxy, priors_xyxy)).argmax(dim=-1, keepdim=True)
    # Compared rather than scattered: the same on every device, and two boxes may share their best prior.
    is_best = torch.arange(len(priors_xyxy), device=overlap.device) == best_prior
    is_best &= overlap > 0
    claim = torch.where(is_best, overlap + 2.0, torch.where(overlap >= min_iou, overlap, 0.0))
    strength, box = (claim * confidence.unsqueeze(-1)).max(dim=1)
    positive = strength > 0
    return positive, torch.where(positive, box, 0)


def _centre_distance(boxes_xyxy: Tensor, priors_xyxy: Tensor) -> Tensor:
    """(B, M, 4) and (P, 4) to (B, M, P): horizontal plus vertical distance of centres, pixels."""
    x, y = ((boxes_xyxy[..., :2] + boxes_xyxy[..., 2:]) / 2).unsqueeze(-1).unbind(-2)
    prior_x, prior_y = ((priors_xyxy[:, :2] + priors_xyxy[:, 2:]) / 2).unbind(-1)
    return (x - prior_x).abs_() + (y - prior_y).abs_()


@torch.no_grad()
def hard_negatives(loss: Tensor, positive: Tensor, count: Tensor) -> Tensor:
    """The `count` background priors of largest loss in each image, as a (B, P) mask.

    Args:
        loss: (B, P), of calling each prior background.
        positive: (B, P) bool, priors that are not background.
        count: (B,) int64.
    """
    order = loss.masked_fill(positive, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(loss.shape[1], device=loss.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, ranks)
    return (rank < count.unsqueeze(1)) & ~positive
