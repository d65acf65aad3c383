"""What one training step computes: the detection loss, the distillation terms, and how hard each of them pulls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.data.loader import Batch
from edgekd.detectors.base import Detector
from edgekd.distill import Clock, Distiller
from edgekd.errors import NonFiniteLossError
from edgekd.preprocess import normalisation


class StepInput:
    """A batch and the clock, in a plain class so that precision plugins pass it through untouched."""

    __slots__ = ("batch", "clock", "measure")

    def __init__(self, batch: Batch, clock: Clock, measure: bool) -> None:
        self.batch, self.clock, self.measure = batch, clock, measure


@dataclass
class Pull:
    """Gradient norms on the detector's parameters, of each part as it enters the total loss."""

    detection: float
    terms: dict[str, float]

    @property
    def ratio(self) -> float | None:
        """Norm of the distillation terms' sum of norms over detection's; None without either."""
        if not self.terms or self.detection <= 0:
            return None
        return sum(self.terms.values()) / self.detection


class LearningStep(nn.Module):
    """The detector, its distiller, and the sum of their losses, as one module whose parameters train together.

    `forward` returns {"loss": total, "det": ..., "<part>": ...}; only "loss" is to be backpropagated, and "adversary",
    when present, by its own optimiser.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, detector: Detector, distiller: Distiller | None, detection_weight: float) -> None:
        super().__init__()
        self.detector, self.distiller, self.detection_weight = detector, distiller, detection_weight
        scale, bias = normalisation(detector.spec.preprocess)
        self.register_buffer("scale", torch.from_numpy(scale), persistent=False)
        self.register_buffer("bias", torch.from_numpy(bias), persistent=False)
        self.pull: Pull | None = None
        self.channels_last = False

    def forward(self, step: StepInput) -> dict[str, Tensor]:
        """Compute every loss of a batch."""
        device = self.scale.device
        images = step.batch.images_u8.to(device, non_blocking=True).float() * self.scale + self.bias
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = step.batch.targets.to(device)
        taps = self.distiller.student_taps if self.distiller is not None else ()
        output = self.detector(images, taps)
        parts = self.detector.detection_losses(output, targets)
        detection = torch.stack(list(parts.values())).sum()
        losses = {"det": detection, **{f"det_{name}": value for name, value in parts.items()}}
        total = self.detection_weight * detection
        if self.distiller is not None:
            given = self.distiller.gather(step.batch, images, output, targets, step.clock)
            terms = self.distiller(given)
            if step.measure:
                self._measure(detection, terms)
            for index, (entry, loss) in enumerate(zip(self.distiller.terms, terms, strict=True)):
                if loss is None:
                    continue
                losses[entry.label] = loss
                total = total + self.distiller.weight_of(index) * loss
            adversary = [a for entry in self.distiller.terms if (a := entry.term.adversary_loss(given)) is not None]
            if adversary:
                losses["adversary"] = torch.stack(adversary).sum()
        losses["loss"] = total
        return losses

    def _measure(self, detection: Tensor, terms: list[Tensor | None]) -> None:
        assert self.distiller is not None
        parameters = [p for p in self.detector.parameters() if p.requires_grad]
        det_norm = _gradient_norm(detection, parameters)
        norms = [None if loss is None else _gradient_norm(loss, parameters) for loss in terms]
        self.distiller.update_ratio_weights(self.detection_weight * det_norm, norms)
        self.pull = Pull(
            self.detection_weight * det_norm,
            {
                entry.label: self.distiller.weight_of(index) * norm
                for index, (entry, norm) in enumerate(zip(self.distiller.terms, norms, strict=True))
                if norm is not None
            },
        )


def _gradient_norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    if not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [g.detach().float().pow(2).sum() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def check_finite(losses: Mapping[str, float], step: int, image_ids: tuple[str, ...]) -> None:
    """Stop on a loss that is NaN or infinite.

    Raises:
        NonFiniteLossError: names the parts, the step, and the batch's images.
    """
    bad = [name for name, value in losses.items() if value != value or value in (float("inf"), float("-inf"))]
    if not bad:
        return
    raise NonFiniteLossError(
        f"non-finite loss at step {step}: {', '.join(n for n in bad if n not in ('loss', 'det')) or ', '.join(bad)}",
        got=f"images {', '.join(image_ids[:16])}{' ...' if len(image_ids) > 16 else ''}",
        fix="lower train.lr, lengthen train.warmup_steps, or use train.precision: fp32; the last checkpoint is intact",
    )
