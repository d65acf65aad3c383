"""The contract of a distillation term: what it asks for, what it is given, what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from edgekd.detectors.base import Detector, DetectorOutput, SoftTargets, Targets
from edgekd.teachers.base import Teacher


@dataclass(frozen=True)
class TeacherView:
    """One teacher's answer as a term sees it: everything in the frame of the student's input tensor.

    Attributes:
        name: the teacher's.
        weight: its share in the ensemble; weights sum to 1.
        soft: boxes with class probabilities; of no images where no term reads them (`Term.needs_answers`).
        dense: raw outputs of a native teacher, where it saw the view, now or for a cache.
        taps: feature maps that cover the same window of the image as the student's maps.
    """

    name: str
    weight: float
    soft: SoftTargets
    dense: DetectorOutput | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DistillBatch:
    """One training step as the terms see it.

    Attributes:
        images: (B, 3, H, W) float32, the student's normalised input.
        output: the student's raw outputs with the taps that the terms asked for.
        targets: ground truth.
        teachers: one view a teacher.
        fused: the ensemble's fused answer, the only teacher's where there is one; of no images where no term reads boxes.
        epoch: from 0. epochs: how many there will be.
    """

    images: Tensor
    output: DetectorOutput
    targets: Targets
    teachers: Sequence[TeacherView]
    fused: SoftTargets
    epoch: int
    epochs: int


@dataclass(frozen=True)
class Pair:
    """The detectors that a term is built for."""

    student: Detector
    teachers: Sequence[Teacher]

    @property
    def input_hw(self) -> tuple[int, int]:
        """The student's input size."""
        return self.student.spec.preprocess.input_hw


class Term(nn.Module):
    """Base of every distillation term.

    A term is built once, before step 0, with the pair it will work on; its `__init__` checks that the pair can meet
    its needs and raises `DistillationSetupError`, listing both sides' taps with grids and channels, when not. Its own
    parameters (adapters, discriminators, generation blocks) train with the student and are dropped at export.

    Attributes:
        name: what logs call it.
        student_taps: taps of the student that `forward` reads.
        teacher_taps: for each teacher, the taps that `forward` reads.
        needs_dense: whether `TeacherView.dense` must be there (the teachers then run online).
        needs_answers: whether `forward` reads boxes: `TeacherView.soft` or `DistillBatch.fused`, which are empty otherwise.
    """

    name: str = ""
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[tuple[str, ...], ...] = ()
    needs_dense: bool = False
    needs_answers: bool = False

    @property
    def needs_online_teachers(self) -> bool:
        """Whether teachers must see the augmented view itself, rather than answers mapped through it."""
        return self.needs_dense or any(self.teacher_taps)

    def forward(self, batch: DistillBatch) -> Tensor:
        """The unweighted loss, a scalar that depends on the student."""
        raise NotImplementedError

    def adversary_loss(self, batch: DistillBatch) -> Tensor | None:
        """A loss for `adversary_parameters` alone (a discriminator), on detached features; None for most terms."""
        return None

    def adversary_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that `adversary_loss` trains, with an optimiser of their own; kept out of the student's."""
        return ()

    def matched(self) -> str:
        """Which maps of the student learn from which of the teachers', in words; nothing for a term without maps."""
        return ""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch's first step."""

    def warning(self) -> str | None:
        """Something the user should know, said once; polled after `statistics`."""
        return None

    def statistics(self) -> dict[str, float]:
        """Figures worth a log line since the last call, such as a discriminator's accuracy."""
        return {}
