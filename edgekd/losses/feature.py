"""Feature distillation: what all feature terms share, and the plainest of them.

Source of the plain term: A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015. Reading (ours): teacher maps are
standardised per channel over the batch by default, so that one weight carries over between backbones whose activations
differ in scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekd.detectors.base import TapKind
from edgekd.losses.base import DistillBatch, Pair, TeacherView, Term
from edgekd.losses.levels import LevelPair, TapChoice, match_levels
from edgekd.ranks import mean_over_ranks

Normalise = Literal["channel", "none"]


def standardise(features: Tensor) -> Tensor:
    """(B, C, H, W) to float32 of zero mean and unit variance per channel, over the whole batch and its positions."""
    features = features.float()  # squares of VGG's maps pass fp16's largest number
    centred = features - mean_over_ranks(features.mean((0, 2, 3), keepdim=True))
    variance = mean_over_ranks(centred.square().mean((0, 2, 3), keepdim=True))
    return centred / (variance + 1e-5).sqrt()


@dataclass(frozen=True)
class LevelMaps:
    """One level of one teacher, ready to compare.

    Attributes:
        view: the teacher. teacher_index, level_index: where in the term's lists.
        share: weight of this level in the sum: the teacher's weight over its number of levels.
        student: (B, C_teacher, H, W) the student's map through its 1x1 adapter.
        raw_student: (B, C_student, H, W) before the adapter.
        teacher: (B, C_teacher, H, W) on the student's grid, detached, standardised if the term asks for it.
    """

    view: TeacherView
    teacher_index: int
    level_index: int
    share: float
    student: Tensor
    raw_student: Tensor
    teacher: Tensor


class LevelTerm(Term):
    """Base of the terms that compare feature maps level by level: matching, 1x1 adapters, alignment.

    Deviations from the public codes of CWD, MGD, FGD and PKD: levels are averaged, not added up, so that a weight does not
    depend on their number; teacher maps are standardised unless `normalise` is "none"; every level has an adapter.

    Args:
        pair: student and teachers; every teacher must offer taps.
        student_taps: names, or "auto" to match by grid.
        teacher_taps: names, or "auto".
        kinds: which parts of the networks "auto" looks at, in order of preference.
        normalise: "channel" standardises the teacher's maps, "none" takes them as they are.

    Raises:
        DistillationSetupError: a teacher offers no level that matches; lists both sides' grids and channels.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        student_taps: TapChoice = "auto",
        teacher_taps: TapChoice = "auto",
        kinds: tuple[TapKind, ...] = ("neck", "backbone"),
        normalise: Normalise = "channel",
    ) -> None:
        super().__init__()
        self.normalise, self.input_hw = normalise, pair.input_hw
        names = pair.student.spec.class_names
        self.unknown = [[i for i, name in enumerate(names) if name in t.unknown_classes] for t in pair.teachers]
        self.teacher_names = [teacher.name for teacher in pair.teachers]
        matched = (
            match_levels(
                pair.student.tap_specs,
                teacher.tap_specs,
                student_taps=student_taps,
                teacher_taps=teacher_taps,
                kinds=kinds,
                who=f"{self.name} term, teacher {teacher.name}",
            )
            for teacher in pair.teachers
        )
        # Fine to coarse, in whatever order a recipe names them.
        self.levels = [sorted(pairs, key=lambda level: level.student.grid_hw, reverse=True) for pairs in matched]
        self.student_taps = tuple(dict.fromkeys(level.student.name for levels in self.levels for level in levels))
        self.teacher_taps = tuple(tuple(level.teacher.name for level in levels) for levels in self.levels)
        self.adapters = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(level.student.channels, level.teacher.channels, 1) for level in levels)
            for levels in self.levels
        )

    def matched(self) -> str:
        """See `Term.matched`."""
        return "; ".join(
            f"from {teacher}, " + ", ".join(level.describe() for level in levels)
            for teacher, levels in zip(self.teacher_names, self.levels, strict=True)
        )

    def per_level(self, build: type[nn.Module]) -> nn.ModuleList:
        """A `build(channels)` for each teacher and level, channels being the teacher's."""
        return nn.ModuleList(nn.ModuleList(build(level.teacher.channels) for level in ls) for ls in self.levels)

    def level_maps(self, batch: DistillBatch) -> Iterator[LevelMaps]:
        """Every (teacher, level) of the batch."""
        for t, (view, levels) in enumerate(zip(batch.teachers, self.levels, strict=True)):
            for i, level in enumerate(levels):
                raw = batch.output.taps[level.student.name]
                student_map = at(self.adapters, t, i)(raw)
                teacher_map = self.teacher_map(view, level, student_map)
                yield LevelMaps(view, t, i, view.weight / len(levels), student_map, raw, teacher_map)

    def teacher_map(self, view: TeacherView, level: LevelPair, like: Tensor) -> Tensor:
        """A teacher's map of one level on the grid of `like`, detached, standardised if the term asks for it."""
        aligned = level.align(view.taps[level.teacher.name].detach(), like)
        return standardise(aligned) if self.normalise == "channel" else aligned

    def silent_cells(self, owner: Tensor, batch: DistillBatch, teacher_index: int) -> Tensor:
        """Of (B, H, W) `objects.object_maps`, the cells of objects whose class the teacher does not know, as bool."""
        silent = torch.zeros_like(owner, dtype=torch.bool)
        classes = self.unknown[teacher_index]
        for image, labels in enumerate(batch.targets.labels):
            if classes and len(labels):
                unknown = torch.isin(labels, labels.new_tensor(classes))
                silent[image] = unknown[owner[image].clamp(min=0)] & (owner[image] >= 0)
        return silent

    def forward(self, batch: DistillBatch) -> Tensor:
        """Levels averaged, teachers weighted."""
        total = batch.images.new_zeros(())
        for maps in self.level_maps(batch):
            total = total + maps.share * self.level_loss(maps, batch)
        return total

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> Tensor:
        """The scalar loss of one level; what a subclass adds."""
        raise NotImplementedError


def at(modules: nn.ModuleList, teacher_index: int, level_index: int) -> nn.Module:
    """The module of one teacher and level in a nested list."""
    inner = modules[teacher_index]
    assert isinstance(inner, nn.ModuleList)
    return inner[level_index]


class FeatureTerm(LevelTerm):
    """Mean squared error between adapted student maps and each teacher's."""

    name = "feature"

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> Tensor:
        """Mean squared error."""
        return functional.mse_loss(maps.student, maps.teacher)
