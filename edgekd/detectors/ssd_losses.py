"""SSD's losses against ground truth (arXiv 1512.02325, eq. 1-3) and against a teacher's boxes, whole batches at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.detectors.anchors import encode_boxes, xyxy_from_cxcywh
from edgekd.detectors.assignment import PaddedTargets
from edgekd.detectors.base import SoftTargets
from edgekd.detectors.matching import PriorMatch, hard_negatives, match_priors
from edgekd.ranks import normaliser

NEGATIVES_A_POSITIVE = 3
MIN_CONFIDENCE = 0.05
"""Teacher boxes under this teach nothing: there are hundreds of them an image, and they say little but "background"."""


def multibox_losses(
    cls_logits: Tensor, offsets: Tensor, priors_cxcywh: Tensor, targets: PaddedTargets, min_iou: float = 0.5
) -> dict[str, Tensor]:
    """Cross-entropy over positives and mined negatives, and smooth L1 over positives' offsets.

    Both are sums divided by the number of positives. Deviation: the paper gives an image without objects no loss; here
    it counts as one positive, so it teaches background through three mined negatives.

    Args:
        cls_logits: (B, P, classes + 1), background first.
        offsets: (B, P, 4), see `encode_boxes`.
        priors_cxcywh: (P, 4) pixels.
        targets: one-hot, pixels.
        min_iou: with a box, from which a prior learns it; see `match_priors`.

    Returns:
        {"cls": scalar, "box": scalar}.
    """
    logits = cls_logits.float()
    match = match_priors(xyxy_from_cxcywh(priors_cxcywh), targets, min_iou)
    labels = targets.class_probs.argmax(-1) + 1
    wanted = labels.gather(1, match.box) * match.positive
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
    positives = match.positive.sum(1).clamp(min=1)
    learning = match.positive | hard_negatives(loss.detach(), match.positive, NEGATIVES_A_POSITIVE * positives)
    box_loss = _box_loss(offsets, priors_cxcywh, targets, match)
    scale = 1.0 / normaliser(positives.sum())
    return {"cls": (loss * learning).sum() * scale, "box": (box_loss * match.positive).sum() * scale}


def soft_multibox_losses(
    cls_logits: Tensor,
    offsets: Tensor,
    priors_cxcywh: Tensor,
    targets: PaddedTargets,
    temperature: float,
    silent: Tensor | None = None,
    min_iou: float = 0.5,
) -> dict[str, Tensor]:
    """The same with a teacher's answer in place of ground truth.

    A matched prior learns the distribution of `background_and_classes` by KL divergence, both sides softened by the
    temperature T and scaled by T² (Hinton et al., 2015, arXiv 1503.02531), and the teacher's box weighted by its
    confidence. Mined background priors, three for each unit of matched confidence and at least three an image, learn
    plain background; their target is one-hot, which no temperature softens, so they are taken at T = 1. Both sums are
    divided by the matched confidence, each image counting for at least 1. Arguments as for `multibox_losses`; give it
    only boxes worth learning from (`confident`). Priors of `silent`, (B, P) bool, never learn background.
    """
    match = match_priors(xyxy_from_cxcywh(priors_cxcywh), targets, min_iou)
    logits = cls_logits.float()
    # Softening the few boxes and gathering is cheaper than softening every prior's row.
    soft = background_and_classes(targets.class_probs).pow(1.0 / temperature)
    soft = soft / soft.sum(-1, keepdim=True)
    wanted = soft.gather(1, match.box.unsqueeze(-1).expand(-1, -1, soft.shape[-1]))
    softened = (logits / temperature).log_softmax(-1)
    divergence = F.kl_div(softened, wanted, reduction="none").sum(-1) * temperature**2

    as_background = -logits.log_softmax(-1)[..., 0] if temperature != 1.0 else -softened[..., 0]
    confidence = targets.confidence.gather(1, match.box) * match.positive
    evidence = confidence.sum(1).clamp(min=1.0)
    count = (NEGATIVES_A_POSITIVE * evidence).ceil().long()
    not_background = match.positive if silent is None else match.positive | silent
    negative = hard_negatives(as_background.detach(), not_background, count)
    cls_loss = torch.where(match.positive, divergence, as_background * negative).sum()
    box_loss = (_box_loss(offsets, priors_cxcywh, targets, match) * confidence).sum()
    scale = 1.0 / normaliser(evidence.sum())
    return {"cls": cls_loss * scale, "box": box_loss * scale}


def confident(soft: SoftTargets) -> SoftTargets:
    """Only the boxes of at least `MIN_CONFIDENCE`."""
    keep = [probs.amax(-1) >= MIN_CONFIDENCE for probs in soft.class_probs]
    boxes = [b[k] for b, k in zip(soft.boxes_xyxy, keep, strict=True)]
    return SoftTargets(boxes, [p[k] for p, k in zip(soft.class_probs, keep, strict=True)], soft.silent_xyxy)


def background_and_classes(class_probs: Tensor) -> Tensor:
    """A distribution over background and classes from class probabilities that need not sum to 1.

    The largest probability is the chance that anything is there, the rest is background; the classes share that chance
    in proportion: (..., classes) in [0, 1] to (..., classes + 1).
    """
    confidence = class_probs.amax(-1, keepdim=True).clamp(max=1.0)
    total = class_probs.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([1.0 - confidence, class_probs * (confidence / total)], dim=-1)


def _box_loss(offsets: Tensor, priors_cxcywh: Tensor, targets: PaddedTargets, match: PriorMatch) -> Tensor:
    """(B, P): smooth L1 summed over the four offsets; means nothing where a prior is not matched."""
    boxes = targets.boxes_xyxy.gather(1, match.box.unsqueeze(-1).expand(-1, -1, 4))
    wanted = encode_boxes(boxes, priors_cxcywh)
    return F.smooth_l1_loss(offsets.float(), wanted, reduction="none").sum(-1)
