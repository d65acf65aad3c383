"""Feature distillation: the student's maps, through 1x1 adapters, imitate the teachers' (FitNets).

Source: A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015. Reading (ours): teacher maps are standardised
per channel over the batch by default, so that one weight carries over between backbones whose activations differ in scale.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from edgekd.detectors.base import TapKind
from edgekd.errors import DistillationSetupError
from edgekd.losses.base import DistillBatch, Pair, Term
from edgekd.losses.levels import LevelPair, TapChoice, match_levels


def standardise(features: Tensor, eps: float = 1e-5) -> Tensor:
    """(B, C, H, W) to zero mean and unit variance per channel over batch and positions."""
    mean = features.mean((0, 2, 3), keepdim=True)
    variance = features.var((0, 2, 3), keepdim=True, unbiased=False)
    return (features - mean) / (variance + eps).sqrt()


def adapter(level: LevelPair) -> nn.Conv2d:
    """The 1x1 convolution from the student's channels to the teacher's; dropped at export."""
    return nn.Conv2d(level.student.channels, level.teacher.channels, 1)


class FeatureTerm(Term):
    """Mean squared error between adapted student maps and each teacher's, averaged over levels.

    Args:
        pair: student and teachers; every teacher must offer taps.
        student_taps: names, or "auto" to match by grid.
        teacher_taps: names, or "auto".
        kinds: which parts of the networks "auto" looks at, in order of preference.
        normalise: "channel" standardises the teacher's maps, "none" takes them as they are.

    Raises:
        DistillationSetupError: a teacher offers no level that matches; lists both sides' grids and channels.
    """

    name = "feature"

    def __init__(
        self,
        pair: Pair,
        *,
        student_taps: TapChoice = "auto",
        teacher_taps: TapChoice = "auto",
        kinds: tuple[TapKind, ...] = ("neck", "backbone"),
        normalise: Literal["channel", "none"] = "channel",
    ) -> None:
        super().__init__()
        if normalise not in ("channel", "none"):
            raise DistillationSetupError("feature: unknown normalise", got=normalise, expected="channel or none")
        self.normalise = normalise
        self.levels: list[list[LevelPair]] = [
            match_levels(
                pair.student.tap_specs,
                teacher.tap_specs,
                student_taps=student_taps,
                teacher_taps=teacher_taps,
                kinds=kinds,
                who=f"feature term, teacher {teacher.name}",
            )
            for teacher in pair.teachers
        ]
        self.student_taps = tuple(dict.fromkeys(level.student.name for levels in self.levels for level in levels))
        self.teacher_taps = tuple(tuple(level.teacher.name for level in levels) for levels in self.levels)
        self.adapters = nn.ModuleList(nn.ModuleList(adapter(level) for level in levels) for levels in self.levels)

    def forward(self, batch: DistillBatch) -> Tensor:
        """Average over levels, weighted over teachers."""
        total = batch.images.new_zeros(())
        for view, levels, adapters in zip(batch.teachers, self.levels, self.adapters, strict=True):
            assert isinstance(adapters, nn.ModuleList)
            for level, adapt in zip(levels, adapters, strict=True):
                student_map = adapt(batch.output.taps[level.student.name])
                teacher_map = level.align(view.taps[level.teacher.name].detach(), student_map)
                if self.normalise == "channel":
                    teacher_map = standardise(teacher_map)
                total = total + view.weight / len(levels) * functional.mse_loss(student_map, teacher_map)
        return total
