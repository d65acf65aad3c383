"""What one training step computes: the detection loss, the distillation terms, and how hard each of them pulls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.data.loader import Batch
from edgekd.detectors.base import Detector
from edgekd.errors import NonFiniteLossError
from edgekd.preprocess import normalisation
from edgekd.ranks import gather, mean_over_ranks
from edgekd.training.distill import Clock, Distiller


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

    `forward` returns {"loss": total, "det": ..., "<part>": ...}; only "loss" is to be backpropagated. What the
    discriminators are to learn from is left in `adversary`, apart, since it is no part of the student's gradient.
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
        self.adversary: Tensor | None = None
        self.channels_last = False
        self.single_precision = False

    def forward(self, step: StepInput) -> dict[str, Tensor]:
        """Compute every loss of a batch; with `single_precision`, whatever precision is set around it."""
        with torch.autocast(self.scale.device.type, enabled=False) if self.single_precision else nullcontext():
            return self._losses(step)

    def _losses(self, step: StepInput) -> dict[str, Tensor]:
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
            self.adversary = torch.stack(adversary).sum() if adversary else None
            if self.adversary is not None:
                losses["adversary"] = self.adversary.detach()
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
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return float(mean_over_ranks(torch.cat([g.detach().float().flatten() for g in gradients])).norm())


class Adversary:
    """The discriminators' own optimiser: a step for each of the student's, on the mean gradient of that step's batches.

    More steps than the student takes would let them win wherever batches are accumulated.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.999))
        self._gradients: list[Tensor] = []  # not in the parameters' own `grad`, which DDP looks after

    def gather(self, loss: Tensor) -> None:
        """Add the gradient of one batch's loss; called by all ranks."""
        # The discriminators of a term of weight 0 are in no loss.
        own = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        shared = [mean_over_ranks(gradient) for gradient in own]
        self._gradients = [a + b for a, b in zip(self._gradients, shared, strict=True)] if self._gradients else shared

    def step(self) -> None:
        """Learn from what was gathered."""
        if self._gradients:
            for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.forget()

    def forget(self) -> None:
        """Leave out what was gathered."""
        self._gradients = []


class PullGuard:
    """Notices a term that moves nothing at first, or at any time drowns detection, over three measurements in a row."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}

    def check(self, pull: Pull) -> list[str]:
        """Take one measurement in; what is to be told of it, each thing once."""
        told = []
        for name, norm in pull.terms.items():
            if pull.detection <= 0:
                continue
            history = self.history.setdefault(name, [])
            history.append(norm / pull.detection)
            verdict = None
            if len(history) == 3 and max(history) < 0.01:  # not later, when a term may have faded as it is meant to
                verdict = "moves next to nothing"
            elif _has_drowned(history) and not _has_drowned(history[:-1]):
                verdict = "drowns detection"
            if verdict is not None:
                told.append(f"term {name} {verdict}: its gradient is {history[-1]:.3g}x the detection loss's")
        return told


def _has_drowned(ratios: list[float]) -> bool:
    """Whether a term's gradient was more than 20 times detection's in three measurements in a row."""
    return any(min(ratios[start : start + 3]) > 20 for start in range(len(ratios) - 2))


def check_finite(losses: Mapping[str, float], step: int, image_ids: tuple[str, ...]) -> None:
    """Stop on a loss that is NaN or infinite; called by all ranks with the same losses.

    Raises:
        NonFiniteLossError: names the parts, the step, and the batch's images.
    """
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if not bad:
        return
    image_ids = tuple(name for ids in gather(image_ids) for name in ids)
    raise NonFiniteLossError(
        f"non-finite loss at step {step}: {', '.join(n for n in bad if n not in ('loss', 'det')) or ', '.join(bad)}",
        got=f"images {', '.join(image_ids[:16])}{' ...' if len(image_ids) > 16 else ''}",
        fix="lower train.lr, lengthen train.warmup_steps, or use train.precision: fp32; the last checkpoint is intact",
    )
