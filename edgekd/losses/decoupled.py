"""Decoupled foreground and background with an adaptive gate.

Source: a thesis advised by Yen Shwu-Huey. Published: cosine similarity on foreground feature vectors (a small KL can hide
very different directions), KL on the background's predictions, and the student learns from the teacher only where the
teacher does better than the student. One-stage detectors.
Reading (ours): L = mean_fg g_i (1 - cos(phi S_i, T_i)) + w * mean_bg g_i KL_i, g_i = 1[loss_T,i < loss_S,i]. With several
teachers the gate becomes a choice: for each object, the teacher with the lowest loss, or none. The gate is an object's, and
so is the mean: each object counts once, whatever its size, or the cells of a few large ones would be all there is to learn
from. An object's loss is -log of max over rows (score of its class x IoU), which any detector can be asked, black boxes too;
a background row's is the binary cross-entropy of its highest class score against 0. Background rows are the student's rows
centred in no object, whose boxes overlap none by 0.5 or more (young students' boxes overlap nothing: rows inside objects
would be pushed to silence while detection raises them); the teachers' prediction there is that of their box that fits the
row (IoU >= 0.5). Where they have none, their scores lie somewhere under the threshold of their answers, and the student's
count as no worse down to it: taken for zeros they would outweigh all else, the more the better the student is (measured:
benchmarks/). The KL is binary per class, on the rows where the student errs most (3 an object, at least 32).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from edgekd.detectors.box_losses import pairwise_iou
from edgekd.losses.base import DistillBatch, Pair
from edgekd.losses.feature import LevelTerm, Normalise
from edgekd.losses.levels import TapChoice
from edgekd.losses.objects import object_maps, object_quality, object_shares
from edgekd.ranks import gather, normaliser

_EPS = 1e-4
SILENCE = 0.05
"""How high a teacher's score may be where it answers nothing: a little above the threshold of answers."""


def choose_teachers(student_loss: Tensor, teacher_losses: Tensor) -> Tensor:
    """(N,) and (teachers, N) losses to (N,) int64: the teacher with the lowest loss, or -1 where the student is better."""
    best, index = teacher_losses.min(0)
    return torch.where(best < student_loss, index, torch.full_like(index, -1))


def background_kl(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """(R, K) scores to (R,): KL(Bernoulli(teacher) || Bernoulli(student)) summed over classes."""
    s, t = (x.float().clamp(_EPS, 1 - _EPS) for x in (student_scores, teacher_scores))
    return (t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()).sum(-1)


def background_rows(priors_cxcywh: Tensor, boxes_xyxy: Tensor, gt_boxes: Tensor) -> Tensor:
    """Which of the student's rows are background: (P, 4) priors, (P, 4) decoded boxes and (N, 4) objects to (P,) bool."""
    # The prior's own overlap need not be asked for: with its centre outside an object it is no more than a half.
    centres = priors_cxcywh[:, None, :2]
    inside = ((centres >= gt_boxes[:, :2]) & (centres < gt_boxes[:, 2:])).all(-1)
    return ~(inside | (pairwise_iou(boxes_xyxy, gt_boxes) >= 0.5)).any(1)


class DecoupledTerm(LevelTerm):
    """Cosine on the foreground's features, KL on the background's predictions, both gated.

    Args:
        pair: student and teachers; every teacher must offer taps.
        background_weight: w; 0 leaves the background out. With 1, and cells for objects, nothing was gained on blood cells
            (benchmarks/).
        foreground_mean: "objects" counts each object once, "cells" each of its cells.
        student_taps: see `LevelTerm`, but that "auto" looks at backbones first: with the neck's maps a small anchor-free YOLO
            lost more (benchmarks/).
        teacher_taps: the same.
        normalise: see `LevelTerm`.
    """

    name = "decoupled"
    needs_answers = True

    def __init__(
        self,
        pair: Pair,
        *,
        background_weight: float = 0.2,
        foreground_mean: Literal["objects", "cells"] = "objects",
        student_taps: TapChoice = "auto",
        teacher_taps: TapChoice = "auto",
        normalise: Normalise = "none",
    ) -> None:
        super().__init__(
            pair,
            student_taps=student_taps,
            teacher_taps=teacher_taps,
            kinds=("backbone", "neck"),
            normalise=normalise,
        )
        self.student = [pair.student]
        self.background_weight, self.foreground_mean = background_weight, foreground_mean
        self._objects, self._gated = 0, 0

    def forward(self, batch: DistillBatch) -> Tensor:
        """Foreground plus weighted background."""
        boxes, scores = self.student[0].decode(batch.output)
        choices = self._choices(batch, boxes.detach(), scores.detach())
        foreground = self._foreground(batch, choices)
        if not self.background_weight:
            return foreground
        return foreground + self.background_weight * self._background(batch, boxes.detach(), scores)

    def statistics(self) -> dict[str, float]:
        """The share of objects from whose teacher the student learned."""
        objects, gated = (sum(column) for column in zip(*gather((self._objects, self._gated)), strict=True))
        self._objects = self._gated = 0
        return {"gate_open": 1 - gated / objects} if objects else {}

    def _choices(self, batch: DistillBatch, boxes: Tensor, scores: Tensor) -> list[Tensor]:
        """For each image (N_i,): which teacher teaches each object, -1 for none."""
        choices = []
        for i, (gt, labels) in enumerate(zip(batch.targets.boxes_xyxy, batch.targets.labels, strict=True)):
            own = -(object_quality(boxes[i], scores[i], gt, labels)[0] + _EPS).log()
            theirs = [
                -(object_quality(v.soft.boxes_xyxy[i], v.soft.class_probs[i], gt, labels)[0] + _EPS).log()
                for v in batch.teachers
            ]
            choice = choose_teachers(own, torch.stack(theirs))
            self._objects += len(choice)
            self._gated += int((choice < 0).sum())
            choices.append(choice)
        return choices

    def _foreground(self, batch: DistillBatch, choices: list[Tensor]) -> Tensor:
        total = batch.images.new_zeros(())
        gt = list(batch.targets.boxes_xyxy)
        for maps in self.level_maps(batch):
            grid_hw = (maps.student.shape[-2], maps.student.shape[-1])
            owner = object_maps(gt, grid_hw, self.input_hw)
            gate = torch.stack([_gate_map(o, c == maps.teacher_index) for o, c in zip(owner, choices, strict=True)])
            distance = 1 - functional.cosine_similarity(maps.student.float(), maps.teacher.float(), dim=1)
            weight = object_shares(owner) if self.foreground_mean == "objects" else (owner >= 0).to(distance.dtype)
            # Averaged over the whole foreground, gated or not, so that a closed gate weakens the pull.
            mean = (gate * weight * distance).sum() / normaliser(weight.sum(), least=1.0)
            total = total + mean / len(self.levels[maps.teacher_index])
        return total

    def _background(self, batch: DistillBatch, boxes: Tensor, scores: Tensor) -> Tensor:
        total = batch.images.new_zeros(())
        priors = self.student[0].prior_boxes().to(boxes.device)
        for i, gt in enumerate(batch.targets.boxes_xyxy):
            free = background_rows(priors, boxes[i], gt)
            worst = scores[i].detach().amax(-1).masked_fill(~free, -1.0)
            count = min(int(free.sum()), max(32, 3 * len(gt)))
            if not count:
                continue
            rows = worst.topk(count).indices
            student = scores[i][rows]
            teacher = self._teacher_scores(batch, i, boxes[i][rows], student.detach())
            gate = (teacher.amax(-1) < student.detach().amax(-1)).float()
            # Averaged over all of these rows, gated or not, as the foreground is.
            total = total + (gate * background_kl(student, teacher)).mean()
        return total / len(batch.targets.boxes_xyxy)

    def _teacher_scores(self, batch: DistillBatch, image: int, boxes: Tensor, student: Tensor) -> Tensor:
        """The lowest-loss teacher's scores for (R, 4) background boxes that the student scores (R, K): (R, K)."""
        silence = student.clamp(max=SILENCE)
        answers = []
        for view in batch.teachers:
            theirs, probs = view.soft.boxes_xyxy[image], view.soft.class_probs[image]
            if not len(theirs):
                answers.append(silence)
                continue
            overlap, index = pairwise_iou(boxes, theirs).max(1)
            answers.append(torch.where((overlap >= 0.5)[:, None], probs[index], silence))
        stacked = torch.stack(answers)
        best = stacked.amax(-1).argmin(0)
        return stacked[best, torch.arange(len(boxes), device=boxes.device)]


def _gate_map(owner: Tensor, open_objects: Tensor) -> Tensor:
    """(H, W) owners and (N,) bool to (H, W): 1 in the cells of objects whose gate is open."""
    if not len(open_objects):
        return torch.zeros(owner.shape, device=owner.device)
    return (open_objects[owner.clamp(min=0)] & (owner >= 0)).float()
