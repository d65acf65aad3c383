"""GKD: distillation with global knowledge, prototypes (PGM) and robust distillation (RDM).

Source: S. Tang et al., "Distilling Object Detectors With Global Knowledge", ECCV 2022, arXiv 2210.09022; public code
DAVAR-Lab-ML. Published: a box's weight is r = 1 - |max cos(s, P_s) - max cos(t, P_t)|; feature loss weighted by r inside
boxes (weight 1) and outside (weight 4); KL at temperature 2 weighted by r; global term SmoothL1 between r cos(s, P_s) and
r cos(t, P_t), factor 5; all scaled by 1 - epoch / epochs (a recipe's `fade`). The public configuration leaves the global term
off; here it is on.
Reading and deviations (ours): instances are gathered from the steps of the epoch before instead of a pass of their own, so the
refresh costs only the search, and the first epoch goes without weights; objects are pooled on the finest matched level; the
feature loss is the mean over the cells inside boxes and the mean over those outside, averaged with the two weights; the KL
compares the class distributions of the rows that see each object best, so that detectors of unlike priors, and black boxes
with taps, can be compared; one teacher's prototypes each with several teachers; objects of classes that a teacher does not
know, which look like background to it, are left out of all parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgekd.errors import DistillationSetupError
from edgekd.losses.base import DistillBatch, Pair
from edgekd.losses.feature import LevelMaps, LevelTerm, Normalise
from edgekd.losses.levels import TapChoice
from edgekd.losses.objects import cell_shares, object_maps, object_quality, pool_boxes
from edgekd.losses.prototypes import InstanceBank, Prototypes, search_prototypes
from edgekd.ranks import normaliser, rank, world_size

_EPS = 1e-6


def robust_weights(student: Tensor, teacher: Tensor, prototypes: Prototypes) -> Tensor:
    """(N, C_s) and (N, C_t) L2-normalised objects to (N,) in [0, 1]: r = 1 - |max cos(s, P_s) - max cos(t, P_t)|.

    Cosines of standardised maps can be negative, as those of published, rectified ones cannot, so that r could fall below
    0, where it would push the student away from its teacher: it ends at 0.
    """
    s = (student @ prototypes.student.T).amax(1)
    t = (teacher @ prototypes.teacher.T).amax(1)
    return (1 - (s - t).abs()).clamp(min=0)


def soften(scores: Tensor, temperature: float) -> Tensor:
    """(N, K) scores to distributions over K classes and nothing: p^(1/T), renormalised: (N, K + 1)."""
    nothing = 1 - scores.amax(1, keepdim=True)
    p = torch.cat([scores, nothing], 1).clamp(min=_EPS).pow(1 / temperature)
    return p / p.sum(1, keepdim=True)


class GKDTerm(LevelTerm):
    """Global knowledge distillation.

    Args:
        pair: student and teachers; every teacher must offer taps.
        prototypes: per class. instances: per class, at most, in the bank. min_side: smallest box side in pixels that enters it.
        percentile: of density that an instance must reach in both spaces.
        inside: weight of the feature loss in boxes. outside: weight elsewhere.
        response_weight: of the weighted KL. temperature: of the KL.
        global_weight: factor of the relation to the prototypes; 0 turns it off, as the public configuration does.
        student_taps: see `LevelTerm`.
        teacher_taps: see `LevelTerm`.
        normalise: see `LevelTerm`.

    Raises:
        DistillationSetupError: levels do not match, or prototypes could never be found with these numbers.
    """

    name = "gkd"
    needs_answers = True

    def __init__(
        self,
        pair: Pair,
        *,
        prototypes: int = 10,
        instances: int = 800,
        min_side: float = 30.0,
        percentile: float = 40.0,
        inside: float = 1.0,
        outside: float = 4.0,
        response_weight: float = 1.0,
        temperature: float = 2.0,
        global_weight: float = 5.0,
        student_taps: TapChoice = "auto",
        teacher_taps: TapChoice = "auto",
        normalise: Normalise = "channel",
    ) -> None:
        super().__init__(pair, student_taps=student_taps, teacher_taps=teacher_taps, normalise=normalise)
        # Told now: prototypes are searched when the second epoch begins.
        for parameter, value, fits, expected in (
            ("prototypes", prototypes, prototypes >= 1, "at least 1"),
            ("instances", instances, instances >= 1, "at least 1"),
            ("percentile", percentile, percentile <= 100, "between 0 and 100"),
            ("inside and outside", inside + outside, inside + outside > 0, "weights of which one is above 0"),
        ):
            if not fits:
                raise DistillationSetupError(f"gkd: {parameter} cannot be this", got=value, expected=expected)
        self.student = [pair.student]
        self.count, self.percentile, self.min_side = prototypes, percentile, min_side
        self.inside, self.outside = inside, outside
        self.response_weight, self.temperature = response_weight, temperature
        self.global_weight = global_weight
        classes = len(pair.student.spec.class_names)
        self.banks = [InstanceBank(classes, instances) for _ in pair.teachers]
        self.images = 0
        self.prototypes: list[dict[int, Prototypes]] = [{} for _ in pair.teachers]
        self._lacks_prototypes, self._told = False, False

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Search prototypes among the instances of the epoch before, and begin to gather anew."""
        device = next(self.adapters.parameters()).device
        for index, bank in enumerate(self.banks):
            instances = bank.state()
            bank.clear()
            if instances:  # else it is the first epoch
                self.prototypes[index] = {
                    int(label): search_prototypes(
                        student.to(device), teacher.to(device), count=self.count, percentile=self.percentile
                    )
                    for label, (_, student, teacher) in instances.items()
                }
        self._lacks_prototypes = self.images > 0 and not any(self.prototypes)
        self.images = 0

    def warning(self) -> str | None:
        """Said once, where an epoch has brought no prototype, so that only the plain feature and response parts are left."""
        if self._told or not self._lacks_prototypes:
            return None
        self._told = True
        return (
            f"there are no prototypes, since no object that a teacher knows has {self.min_side:g} px on both sides at the "
            "student's input: all objects count alike, and the global part is 0; lower min_side"
        )

    def forward(self, batch: DistillBatch) -> Tensor:
        """Feature, response and global parts."""
        boxes, scores = self.student[0].decode(batch.output)
        rows = [
            object_quality(boxes[i].detach(), scores[i].detach(), gt, labels)[1]
            for i, (gt, labels) in enumerate(zip(batch.targets.boxes_xyxy, batch.targets.labels, strict=True))
        ]
        total = batch.images.new_zeros(())
        weights = total.new_ones(0)
        for maps in self.level_maps(batch):
            if maps.level_index == 0:
                # Cosines in single precision, as the prototypes are: a weight is a difference of two of them.
                with torch.autocast(maps.student.device.type, enabled=False):
                    weights, relation = self._relate(maps, batch)
                response = self._response(maps, batch, scores, rows, weights)
                total = total + maps.view.weight * (self.global_weight * relation + self.response_weight * response)
            total = total + maps.share * self._weighted_feature(maps, batch, weights)
        self.images += len(batch.images) * world_size()
        return total

    def _relate(self, maps: LevelMaps, batch: DistillBatch) -> tuple[Tensor, Tensor]:
        """The weight r of each object, image after image (N,), and the global term; feeds the bank on the way."""
        # The raw student, before the adapter: prototypes live in each detector's own space.
        s, t = self._pooled(maps.raw_student, batch), self._pooled(maps.teacher, batch)
        self._feed_bank(maps.teacher_index, batch, s.detach(), t.detach())
        labels = torch.cat(list(batch.targets.labels))
        weights = s.new_ones(len(labels))
        relation, count = s.new_zeros(()), 0
        for label, known in self.prototypes[maps.teacher_index].items():
            own = (labels == label).nonzero()[:, 0]
            r = robust_weights(s[own].detach(), t[own], known)
            weights[own] = r
            learned, target = (r[:, None] * (x[own] @ p.T) for x, p in ((s, known.student), (t, known.teacher)))
            relation = relation + functional.smooth_l1_loss(learned, target, reduction="none").mean(1).sum()
            count += len(own)
        return weights, relation / normaliser(relation.new_tensor(count), least=1.0)

    def _pooled(self, features: Tensor, batch: DistillBatch) -> Tensor:
        """(B, C, H, W) maps to every object's mean, image after image (N, C), L2-normalised, in single precision."""
        boxes = batch.targets.boxes_xyxy
        pooled = [pool_boxes(own.float(), gt, self.input_hw) for own, gt in zip(features, boxes, strict=True)]
        return functional.normalize(torch.cat(pooled), dim=1)

    def _feed_bank(self, index: int, batch: DistillBatch, student: Tensor, teacher: Tensor) -> None:
        """Large objects of known classes, (N, C_s) and (N, C_t) of all images, into a teacher's bank."""
        bank, unknown = self.banks[index], self.unknown[index]
        counts = [len(labels) for labels in batch.targets.labels]
        pooled = (torch.split(side, counts) for side in (student, teacher))
        objects = zip(batch.targets.boxes_xyxy, batch.targets.labels, *pooled, strict=True)
        for i, (gt, labels, s, t) in enumerate(objects):
            large = (gt[:, 2:] - gt[:, :2] >= self.min_side).all(1)
            for j, (label, fits) in enumerate(zip(labels.tolist(), large.tolist(), strict=True)):
                if fits and label not in unknown:
                    bank.add(label, s[j], t[j], self.images + i * world_size() + rank())

    def _weighted_feature(self, maps: LevelMaps, batch: DistillBatch, weights: Tensor) -> Tensor:
        grid_hw = (maps.student.shape[-2], maps.student.shape[-1])
        boxes = list(batch.targets.boxes_xyxy)
        owner = object_maps(boxes, grid_hw, self.input_hw)
        inside, outside = owner >= 0, owner < 0
        firsts = torch.tensor([0, *(len(b) for b in boxes[:-1])], device=owner.device).cumsum(0)
        row = (owner + firsts[:, None, None]).masked_fill(outside, -1)  # the last is of no object
        inside &= ~self.silent_cells(owner, batch, maps.teacher_index)
        own = torch.cat([weights, weights.new_ones(1)])[row]
        weight = self.inside * cell_shares(inside) * own + self.outside * cell_shares(outside)
        distance = (maps.student - maps.teacher).float().pow(2).mean(1)
        return (weight * distance).sum() / len(owner) / (self.inside + self.outside)

    def _response(
        self, maps: LevelMaps, batch: DistillBatch, scores: Tensor, rows: list[Tensor], weights: Tensor
    ) -> Tensor:
        view, unknown = maps.view, self.unknown[maps.teacher_index]
        shares = torch.split(weights, [len(labels) for labels in batch.targets.labels])
        pairs = []
        for i, (gt, labels) in enumerate(zip(batch.targets.boxes_xyxy, batch.targets.labels, strict=True)):
            quality, theirs = object_quality(view.soft.boxes_xyxy[i], view.soft.class_probs[i], gt, labels)
            seen = (quality > 0) & (rows[i] >= 0) & ~torch.isin(labels, labels.new_tensor(unknown))
            pairs.append((scores[i][rows[i][seen]], view.soft.class_probs[i][theirs[seen]], shares[i][seen]))
        student, teacher, weight = (torch.cat(column).float() for column in zip(*pairs, strict=True))
        student, teacher = soften(student, self.temperature), soften(teacher, self.temperature)
        kl = (teacher * (teacher.log() - student.log())).sum(1) * self.temperature**2
        return (weight * kl).sum() / normaliser(weight.new_tensor(len(weight)), least=1.0)

    def get_extra_state(self) -> dict[str, Any]:
        """Banks and prototypes, so that a resumed run goes on exactly; called by all ranks."""
        return {
            "images": self.images,
            "banks": [bank.state() for bank in self.banks],
            "prototypes": [
                {str(label): [p.student, p.teacher, p.index] for label, p in found.items()} for found in self.prototypes
            ],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_extra_state`."""
        device = next(self.adapters.parameters()).device
        self.images = state["images"]
        for bank, saved in zip(self.banks, state["banks"], strict=True):
            bank.load(saved, device)
        self.prototypes = [
            {int(label): Prototypes(*(t.to(device) for t in tensors)) for label, tensors in found.items()}
            for found in state["prototypes"]
        ]
