"""Quantisation-aware fine-tuning: a trained detector learns weights, and activation scales, that survive int8.

The forward pass rounds as the exported file will; `simulation` says how, and what it leaves out. Rounding passes gradients
straight through (Bengio et al., 2013), and the scales of activations are learned by LSQ (Esser et al., ICLR 2020, eq. 1-3),
here as logarithms. The scales of weights are not learned: they follow max |w| a channel, as in the exporter. BatchNorm
keeps its statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.data.loader import TrainLoader
from edgekd.detectors.base import Detector, DetectorOutput
from edgekd.errors import ExportError, NonFiniteLossError
from edgekd.export.calibration import Ranges
from edgekd.export.placement import Target
from edgekd.export.simulation import QuantisedDetector, range_keys
from edgekd.preprocess import normalisation
from edgekd.recipe import QatConfig
from edgekd.types import FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto

FACTS_KEY = "int8"
"""In a checkpoint's facts: {"target", "ranges": {tensor, by `simulation.range_keys`: [low, high]}, ...}."""
_SCALE_LR = 1e-3
_BACKGROUND = 0.01


def learned_ranges(model: ModelProto, facts: Mapping[str, Any], target: Target) -> Ranges:
    """Ranges that fine-tuning left in a checkpoint's facts, by tensor of the traced model; none for another target.

    A checkpoint of an earlier version has ranges for the inputs of convolutions alone; calibration finds the others.

    Raises:
        ExportError: a range is for a tensor that the model has not.
    """
    learned = facts.get(FACTS_KEY)
    if not learned or learned["target"] != target:
        return {}
    tensors = range_keys(model, target)
    unknown = [key for key in learned["ranges"] if key not in tensors]
    if unknown:
        raise ExportError(
            "the checkpoint has learned int8 ranges of tensors that its exported graph has not",
            got=", ".join(unknown[:3]),
            expected=f"some of {len(tensors)} tensors, such as {next(iter(tensors), 'none')}",
            fix="run edgekd quantize again, with this version",
        )
    return {tensors[key]: (low, high) for key, (low, high) in learned["ranges"].items()}


def unused_ranges(facts: Mapping[str, Any], target: Target) -> str | None:
    """What to say of ranges that were learned for another target, and so do not count; None where there are none."""
    learned = facts.get(FACTS_KEY)
    if not learned or learned["target"] == target:
        return None
    return (
        f"`edgekd quantize` learned int8 ranges for {learned['target']}, which {target} cannot take: they were found by "
        f"calibration instead; quantize with --set export.target={target}"
    )


@dataclass(frozen=True)
class QatResult:
    """A fine-tuned detector, the facts that its export reads, and the loss of each epoch."""

    detector: Detector
    facts: dict[str, Any]
    losses: tuple[float, ...]


def fine_tune(
    detector: Detector,
    calibration: Sequence[FloatArray],
    loader: TrainLoader,
    *,
    config: QatConfig,
    target: Target,
    device: str = "cpu",
    tell: Callable[[int, int, float], None] | None = None,
) -> QatResult:
    """Fine-tune a trained detector for int8, taught by its fp32 self as well where `config.distill` says so.

    Args:
        calibration: prepared training images, each (1, 3, H, W) float32.
        loader: of `config.epochs` epochs.
        tell: told (step, steps, loss).

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
    """
    student = QuantisedDetector(detector, calibration, target).to(device)
    teacher = copy.deepcopy(detector).float().eval().to(device)
    scales = student.scales()
    known = {id(scale) for scale in scales}
    weights = [p for p in student.parameters() if id(p) not in known and p.requires_grad]
    optimizer = torch.optim.Adam([{"params": weights, "lr": config.lr}, {"params": scales, "lr": _SCALE_LR}])
    total = max(1, config.epochs * loader.steps_per_epoch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    factor, shift = (torch.from_numpy(part).to(device) for part in normalisation(detector.spec.preprocess))
    losses, step = [], 0
    for epoch in range(config.epochs):
        seen: list[float] = []
        for batch in loader.epoch(epoch):
            images = batch.images_u8.to(device).float() * factor + shift
            output = student(images)
            loss = torch.stack(
                list(student.detector.detection_losses(output, batch.targets.to(torch.device(device))).values())
            ).sum()
            if config.distill:
                with torch.no_grad():
                    truth = teacher(images)
                loss = loss + config.distill * self_distillation(output, truth, detector.score_activation)
            if not torch.isfinite(loss):
                raise NonFiniteLossError("the loss is not finite", got=float(loss), fix="lower export.qat.lr")
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(weights, 10.0)
            optimizer.step()
            schedule.step()
            step += 1
            seen.append(float(loss.detach()))
            if tell is not None:
                tell(step, total, seen[-1])
        losses.append(sum(seen) / max(1, len(seen)))
    facts = {FACTS_KEY: {"target": target, "ranges": student.ranges(), "qat": config.model_dump(mode="json")}}
    return QatResult(student.plain(), facts, tuple(losses))


def self_distillation(output: DetectorOutput, truth: DetectorOutput, activation: str) -> Tensor:
    """KL(fp32 || int8) of the classes plus smooth L1 of the box coding, weighted to where fp32 sees an object."""
    if activation == "softmax":
        target = truth.cls_logits.softmax(-1)
        divergence = F.kl_div(output.cls_logits.log_softmax(-1), target, reduction="none").sum(-1)
        weight = 1 - target[..., 0]
    else:
        target = truth.cls_logits.sigmoid()
        cross = F.binary_cross_entropy_with_logits(output.cls_logits, target, reduction="none")
        divergence = (cross - F.binary_cross_entropy_with_logits(truth.cls_logits, target, reduction="none")).sum(-1)
        weight = target.amax(-1)
    if output.objectness is not None and truth.objectness is not None:
        weight = truth.objectness.sigmoid()
        divergence = divergence + (output.objectness - truth.objectness).square()
    boxes = F.smooth_l1_loss(output.bbox_regression, truth.bbox_regression, reduction="none").mean(-1)
    return ((weight + _BACKGROUND) * divergence + weight * boxes).sum() / weight.sum().clamp_min(1.0)
