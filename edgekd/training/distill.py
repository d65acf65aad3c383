"""One Distiller: it gathers what the teachers say about a batch and turns it into weighted terms.

Answers (boxes with class probabilities) come from the image store, mapped through the view by the loader, or from
teachers run online on the very view; features and raw outputs always come from teachers that saw the view: online, or
earlier, where a cache keeps what they said (`teachers.cache`). Such teachers see the student's window stretched to their
own input size, so every map covers the same part of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.data.loader import Batch, Stored
from edgekd.data.view_plan import ViewPlan
from edgekd.data.view_store import ViewStore
from edgekd.detectors.base import Detector, DetectorOutput, SoftTargets, Targets
from edgekd.errors import DistillationSetupError
from edgekd.losses import TERMS, DistillBatch, Pair, TeacherView, Term, build_term
from edgekd.recipe import DistillConfig
from edgekd.teachers.base import Teacher, TeacherOutput
from edgekd.teachers.cache import DENSE, Wanted
from edgekd.types import SoftDetections

Answers = Mapping[str, SoftDetections]
NO_ANSWERS = SoftTargets([], [])
"""Of no images, not even empty ones: a term that reads boxes without saying so fails at its first step."""

Fuse = Callable[[Sequence[SoftDetections]], SoftDetections]


@dataclass(frozen=True)
class TeacherSet:
    """The teachers of a run and how they become one.

    Attributes:
        teachers: at least one.
        weights: one a teacher, summing to 1.
        fuse: the ensemble's fusion on answers in one frame.
        answers: per teacher, its answer to every training image; empty where no term reads them, or teachers run online only.
        fused_answers: the fused answer to every training image.
    """

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...]
    fuse: Fuse
    answers: tuple[Answers, ...] = ()
    fused_answers: Answers | None = None


@dataclass(frozen=True)
class WeightedTerm:
    """A term with how it is weighted: a fixed number, or a gradient-norm ratio to the detection loss.

    With a ratio, `weight` is the term's default, which holds until there is a gradient to measure.
    """

    label: str
    term: Term
    weight: float
    gradient_ratio: float | None
    fades: bool


class Distiller(nn.Module):
    """The terms of a recipe, built for one student and its teachers.

    Raises:
        DistillationSetupError: no teachers, no terms, or a term that the pair cannot meet.
    """

    ratio_weights: Tensor

    def __init__(self, student: Detector, teacher_set: TeacherSet, config: DistillConfig) -> None:
        super().__init__()
        if not teacher_set.teachers:
            raise DistillationSetupError("distillation needs teachers", fix="list at least one under `teachers`")
        if not config.terms:
            raise DistillationSetupError("distillation needs terms", fix="list at least one under `distill.terms`")
        self.set = teacher_set
        self.terms = _weighted_terms(config, Pair(student, teacher_set.teachers))
        self.modules_of_terms = nn.ModuleList(entry.term for entry in self.terms)
        # Weights of terms that follow a gradient ratio: part of the state, so that a resumed run goes on with them.
        self.register_buffer("ratio_weights", torch.zeros(len(self.terms)))
        self.left = 1.0  # of training, at the batch in hand: what remains of the pull of terms that fade
        self.online = config.answers == "online" or any(entry.term.needs_online_teachers for entry in self.terms)
        self.needs_answers = any(entry.term.needs_answers for entry in self.terms)
        self.answers_from_images = self.needs_answers and config.answers != "online"
        # A run with a teacher cache: which views it shows, and what the teachers said about them.
        self.plan: ViewPlan | None = None
        self.stores: tuple[ViewStore, ...] = ()
        self._frozen: dict[str, list[str]] = {}  # of each term, taps whose layers cannot learn; emptied when told

    @property
    def student_taps(self) -> tuple[str, ...]:
        """The student's taps that any term reads."""
        return tuple(dict.fromkeys(name for entry in self.terms for name in entry.term.student_taps))

    @property
    def matched(self) -> list[str]:
        """Which maps of the student learn from which of the teachers', a line for all terms that match alike."""
        terms: dict[str, list[str]] = {}
        for entry in self.terms:
            if pairs := entry.term.matched():
                terms.setdefault(pairs, []).append(entry.label)
        return [f"{', '.join(labels)}: {pairs}" for pairs, labels in terms.items()]

    @property
    def loader_answers(self) -> tuple[Answers, ...]:
        """What the loader must map through each view: every teacher's answers, then the fused ones, if these are others."""
        if not self.answers_from_images:
            return ()
        fused = self.set.fused_answers
        assert fused is not None, "the answers to the training images were not collected"
        alone = len(self.set.answers) == 1 and self.set.answers[0] is fused
        return self.set.answers if alone else (*self.set.answers, fused)

    @property
    def loader_hw(self) -> tuple[tuple[int, int], ...]:
        """Sizes at which the loader must render each view for online teachers."""
        if not self.online or self.stores:
            return ()
        return tuple(dict.fromkeys(teacher.preprocess.input_hw for teacher in self.set.teachers))

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """For each teacher, what is asked of it about each view."""
        dense = any(entry.term.needs_dense for entry in self.terms)
        soft = self.needs_answers and not self.answers_from_images
        count = len(self.set.teachers)
        return tuple(Wanted(soft, dense, self._taps_of(index)) for index in range(count))

    def _taps_of(self, index: int) -> tuple[str, ...]:
        """The taps of one teacher that any term reads."""
        terms = [entry.term for entry in self.terms if entry.term.teacher_taps]
        return tuple(dict.fromkeys(name for term in terms for name in term.teacher_taps[index]))

    def weight_of(self, index: int) -> float:
        """The present multiplier of a term."""
        entry = self.terms[index]
        weight = entry.weight
        if entry.gradient_ratio is not None:
            weight = float(self.ratio_weights[index]) or weight  # 0: it has had no gradient to be measured yet
        return weight * self.left if entry.fades else weight

    def update_ratio_weights(self, detection_norm: float, term_norms: Sequence[float | None]) -> None:
        """Move ratio weights towards their targets, given gradient norms of the unweighted losses."""
        for index, (entry, norm) in enumerate(zip(self.terms, term_norms, strict=True)):
            if entry.gradient_ratio is None or norm is None:
                continue
            # bf16 on CPUs has given gradients that are not finite: the loop leaves such a step out, and so must a weight.
            if not (0 < norm < math.inf and 0 < detection_norm < math.inf):
                continue
            wanted = entry.gradient_ratio * detection_norm / norm
            old = float(self.ratio_weights[index])
            # The geometric mean, since a weight is a ratio: half-way each time damps the noise of one batch, which is less
            # than a factor of four. What pulls still harder has changed, and would drown detection until the next time.
            self.ratio_weights[index] = wanted if old == 0 else min(math.sqrt(old * wanted), 2 * wanted)

    def adversary_parameters(self) -> list[nn.Parameter]:
        """Parameters of discriminators, which have an optimiser of their own."""
        return [p for entry in self.terms for p in entry.term.adversary_parameters()]

    def gather(
        self, batch: Batch, images: Tensor, output: DetectorOutput, targets: Targets, clock: Clock
    ) -> DistillBatch:
        """Everything the terms are given for one batch."""
        device = images.device
        outputs = self._recorded(batch, device) if self.stores else self._ask_online(batch, device)
        views = []
        for index, teacher in enumerate(self.set.teachers):
            answer = outputs[index] if outputs else None
            if not self.needs_answers:
                soft = NO_ANSWERS
            elif self.answers_from_images:
                soft = batch.soft[index].to(device)
            else:
                assert answer is not None
                soft = _scaled(answer.soft, teacher.preprocess.input_hw, (images.shape[-2], images.shape[-1]))
            views.append(
                TeacherView(
                    teacher.name,
                    self.set.weights[index],
                    soft,
                    None if answer is None else answer.dense,
                    {} if answer is None else answer.taps,
                )
            )
        if not self.needs_answers:
            fused = NO_ANSWERS
        elif self.answers_from_images:
            fused = batch.soft[-1].to(device)
        elif len(self.stores) > len(views) and (kept := batch.stored[-1].soft) is not None:
            fused = kept.to(device)
        else:
            fused = self._fuse_batch([view.soft for view in views], device)
        return DistillBatch(images, output, targets, views, fused, clock.epoch, clock.epochs)

    def forward(self, batch: DistillBatch) -> list[Tensor | None]:
        """Each term's unweighted loss; None for a term of weight 0, which is not computed at all.

        Raises:
            DistillationSetupError: a term gives a loss that does not depend on the student, or compares maps that nothing
                can change.
        """
        self.left = 1 - batch.epoch / batch.epochs
        losses: list[Tensor | None] = []
        for entry in self.terms:
            if entry.gradient_ratio is None and entry.weight == 0:
                losses.append(None)
                continue
            loss = entry.term(batch)
            if not loss.requires_grad:
                raise DistillationSetupError(
                    f"term {entry.label} does not depend on the student: it would silently do nothing"
                )
            taps = entry.term.student_taps
            frozen = [name for name in taps if not batch.output.taps[name].requires_grad]
            if taps and len(frozen) == len(taps):
                raise DistillationSetupError(  # its adapters would learn, and hide that the student does not
                    f"term {entry.label} would teach the student nothing: the layers before its taps are frozen",
                    got=", ".join(taps),
                    fix="name student_taps behind them, or lower train.freeze_stride (train.backbone_lr_factor: 0 freezes too)",
                )
            self._frozen.setdefault(entry.label, frozen)
            losses.append(loss)
        return losses

    def warnings(self) -> list[str]:
        """What the user should know, each thing once; asked for after the terms' statistics."""
        told = [f"term {entry.label}: {said}" for entry in self.terms if (said := entry.term.warning()) is not None]
        for label, names in self._frozen.items():
            if names:
                told.append(
                    f"term {label}: the layers before {', '.join(names)} are frozen, so what is taught there is not learned"
                )
                self._frozen[label] = []
        return told

    def _ask_online(self, batch: Batch, device: torch.device) -> list[TeacherOutput]:
        if not self.online:
            return []
        answers = []
        for teacher, wanted in zip(self.set.teachers, self.wanted, strict=True):
            images = batch.teacher_images_u8[teacher.preprocess.input_hw].to(device, non_blocking=True)
            with torch.no_grad():
                answers.append(teacher.respond(images, wanted.taps, boxes=wanted.soft))
        return answers

    def _recorded(self, batch: Batch, device: torch.device) -> list[TeacherOutput]:
        """What the stores hold of the batch's views, as the teachers would have said it."""
        return [_as_said(stored.to(device)) for stored in batch.stored[: len(self.set.teachers)]]

    def _fuse_batch(self, softs: Sequence[SoftTargets], device: torch.device) -> SoftTargets:
        if len(softs) == 1:
            return softs[0]
        boxes, probs = [], []
        for index in range(len(softs[0].boxes_xyxy)):
            fused = self.set.fuse(
                [SoftDetections(s.boxes_xyxy[index].cpu().numpy(), s.class_probs[index].cpu().numpy()) for s in softs]
            )
            boxes.append(torch.from_numpy(fused.boxes_xyxy).to(device))
            probs.append(torch.from_numpy(fused.class_probs).to(device))
        return SoftTargets(boxes, probs)


@dataclass(frozen=True)
class Clock:
    """Where training is: epoch from 0, epochs in all."""

    epoch: int
    epochs: int


def fuse_answers(teacher_answers: Sequence[Answers], fuse: Fuse) -> Answers:
    """The ensemble's answer to every image that the teachers answered."""
    if len(teacher_answers) == 1:
        return teacher_answers[0]
    return {image_id: fuse([answers[image_id] for answers in teacher_answers]) for image_id in teacher_answers[0]}


def _weighted_terms(config: DistillConfig, pair: Pair) -> list[WeightedTerm]:
    entries: list[WeightedTerm] = []
    for term_config in config.terms:
        term = build_term(term_config, pair)
        used = sum(entry.term.name == term.name for entry in entries)
        label = term.name if not used else f"{term.name}-{used + 1}"
        usual = TERMS[term_config.loss]
        weight = usual.default_weight if term_config.weight is None else term_config.weight
        fades = usual.fades if term_config.fade is None else term_config.fade
        entries.append(WeightedTerm(label, term, weight, term_config.gradient_ratio, fades))
    return entries


def _as_said(stored: Stored) -> TeacherOutput:
    arrays = {name: array.float() for name, array in stored.arrays.items()}
    raw = {name: arrays[f"dense.{name}"] for name in DENSE if f"dense.{name}" in arrays}
    dense = DetectorOutput(raw["cls_logits"], raw["bbox_regression"], raw.get("objectness")) if raw else None
    taps = {name.removeprefix("tap."): array for name, array in arrays.items() if name.startswith("tap.")}
    soft = stored.soft if stored.soft is not None else NO_ANSWERS
    return TeacherOutput(soft, dense, taps)


def _scaled(soft: SoftTargets, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> SoftTargets:
    scale = [to_hw[1] / from_hw[1], to_hw[0] / from_hw[0]] * 2
    return SoftTargets([b * b.new_tensor(scale) for b in soft.boxes_xyxy], soft.class_probs)


def term_parameters(distiller: Distiller | None) -> Iterable[nn.Parameter]:
    """Adapters and generation blocks, which train with the student; discriminators are left out."""
    if distiller is None:
        return []
    adversaries = {id(p) for p in distiller.adversary_parameters()}
    return [p for p in distiller.parameters() if id(p) not in adversaries]
