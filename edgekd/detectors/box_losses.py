"""Overlap measures and losses over boxes and scores, in torch; boxes are xyxy in pixels unless a name says else."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Overlap = Literal["iou", "giou", "ciou"]
_EPS = 1e-7


def paired_iou(boxes: Tensor, others: Tensor, kind: Overlap = "iou") -> Tensor:
    """Overlap of boxes row by row: (..., 4) and (..., 4) to (...), differentiable in both.

    "giou" is Rezatofighi et al., 2019 (arXiv 1902.09630); "ciou" is Zheng et al., 2020 (arXiv 1911.08287, eq. 10-12),
    whose trade-off factor takes no gradient. Both lie in (-1.5, 1] and equal IoU where boxes coincide.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    u1, v1, u2, v2 = others.unbind(-1)
    w, h, ow, oh = x2 - x1, y2 - y1, u2 - u1, v2 - v1
    inter = (torch.min(x2, u2) - torch.max(x1, u1)).clamp(min=0) * (torch.min(y2, v2) - torch.max(y1, v1)).clamp(min=0)
    union = w * h + ow * oh - inter + _EPS
    iou = inter / union
    if kind == "iou":
        return iou
    cw, ch = torch.max(x2, u2) - torch.min(x1, u1), torch.max(y2, v2) - torch.min(y1, v1)
    if kind == "giou":
        hull = cw * ch + _EPS
        return iou - (hull - union) / hull
    distance = ((x1 + x2 - u1 - u2) ** 2 + (y1 + y2 - v1 - v2) ** 2) / 4
    # The small addends keep the arc tangents' gradient finite for boxes without extent.
    aspect = (4 / math.pi**2) * (torch.atan(w / (h + _EPS)) - torch.atan(ow / (oh + _EPS))) ** 2
    with torch.no_grad():
        share = aspect / (1 - iou + aspect + _EPS)
    return iou - distance / (cw**2 + ch**2 + _EPS) - share * aspect


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each with each: (..., N, 4) and (..., M, 4) to (..., N, M) in [0, 1]."""
    x1, y1, x2, y2 = boxes.unsqueeze(-2).unbind(-1)
    u1, v1, u2, v2 = others.unsqueeze(-3).unbind(-1)
    inter = (torch.min(x2, u2) - torch.max(x1, u1)).clamp_(min=0)
    inter *= (torch.min(y2, v2) - torch.max(y1, v1)).clamp_(min=0)
    return inter / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter + _EPS)


def distances_from_boxes(boxes: Tensor, centres: Tensor) -> Tensor:
    """How far the left, top, right and bottom sides lie from points: (..., 4) and (..., 2) to (..., 4), pixels."""
    return torch.cat([centres - boxes[..., :2], boxes[..., 2:] - centres], dim=-1)


def boxes_from_distances(distances: Tensor, centres: Tensor) -> Tensor:
    """Inverse of `distances_from_boxes`."""
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)


def expected_distances(logits: Tensor, bins: int) -> Tensor:
    """Means of the distributions over 0 ... bins - 1: (..., 4 * bins) logits to (..., 4), in bins."""
    ramp = torch.arange(bins, dtype=logits.dtype, device=logits.device)
    return (_by_side(logits, bins).softmax(-1) * ramp).sum(-1)


def _by_side(logits: Tensor, bins: int) -> Tensor:
    return logits.reshape(*logits.shape[:-1], 4, bins)


def distribution_focal_loss(logits: Tensor, distances: Tensor, bins: int) -> Tensor:
    """Distribution focal loss (Li et al., 2020, arXiv 2006.04388, eq. 6), mean over the four sides.

    Args:
        logits: (N, 4 * bins).
        distances: (N, 4) in bins; clipped to [0, bins - 1].

    Returns:
        (N,): cross-entropy with the two bins beside the distance, weighted by nearness.
    """
    distances = distances.clamp(0, bins - 1)
    lower = distances.floor().clamp(max=bins - 2)
    share = distances - lower
    log_probs = _by_side(logits, bins).log_softmax(-1)
    index = lower.long().unsqueeze(-1)
    below = log_probs.gather(-1, index).squeeze(-1)
    above = log_probs.gather(-1, index + 1).squeeze(-1)
    return -(below * (1 - share) + above * share).mean(-1)


def softened_bce(logits: Tensor, probabilities: Tensor, temperature: float = 1.0) -> Tensor:
    """Binary cross-entropy element by element, both sides softened by a temperature and scaled by its square.

    Hinton et al., 2015 (arXiv 1503.02531), for independent classes. At temperature 1 it is plain BCE with soft targets.
    """
    if temperature == 1.0:
        return F.binary_cross_entropy_with_logits(logits, probabilities, reduction="none")
    softened = torch.sigmoid(torch.logit(probabilities, eps=1e-4) / temperature)
    loss = F.binary_cross_entropy_with_logits(logits / temperature, softened, reduction="none")
    return loss * temperature**2
