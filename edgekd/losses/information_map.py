"""Information map: distil backbone and neck, each position weighted by how informative the teacher is there.

Source: Li et al., 2022, doi 10.3778/j.issn.1002-8331.2101-0089. Published: on YOLOv3, a map of how informative each teacher
position is weights the supervision; backbone outputs and neck outputs are both distilled; +9.3 mAP points.
Reading (ours): L = sum_l lambda_l * sum_ij I_ij |phi S - T|^2_ij / sum_ij I_ij, where I is the normalised channel mean of
|T| in the backbone, and objectness x best class in the neck (the best over all rows whose prior is centred in the cell).
Deviations: levels are averaged within backbone and neck, so that lambda is of each of these two; |.|^2 is the mean over
channels, so that the weight does not depend on their number; a teacher without raw outputs (a black box) has its neck
weighted by its boxes' confidence; objects of classes that a teacher does not know weigh nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.detectors.base import SoftTargets, TapKind
from edgekd.errors import DistillationSetupError
from edgekd.losses.base import DistillBatch, Pair, Term
from edgekd.losses.feature import LevelMaps, LevelTerm, Normalise
from edgekd.losses.levels import describe_taps
from edgekd.losses.objects import cell_overlaps, cells_of, object_maps
from edgekd.ranks import normaliser
from edgekd.teachers.base import Teacher


def backbone_information(teacher_map: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W): channel mean of |T|, each image scaled to a mean of 1."""
    energy = teacher_map.abs().mean(1)
    return energy / energy.mean((1, 2), keepdim=True).clamp(min=1e-9)


def confidence_on_grid(
    confidence: Tensor, centres: Tensor, grid_hw: tuple[int, int], input_hw: tuple[int, int]
) -> Tensor:
    """(B, P) confidences of rows centred at (P, 2) xy pixels, to the best in each cell: (B, H, W)."""
    y, x = cells_of(centres, grid_hw, input_hw)
    index = (y * grid_hw[1] + x).expand(len(confidence), -1)
    flat = confidence.new_zeros(len(confidence), grid_hw[0] * grid_hw[1])
    return flat.scatter_reduce(1, index, confidence, "amax").view(-1, *grid_hw)


def soft_confidence_map(soft: SoftTargets, grid_hw: tuple[int, int], input_hw: tuple[int, int]) -> Tensor:
    """The highest confidence of a box over each cell, weighted by the share of the cell it covers: (B, H, W)."""
    maps = []
    for boxes, probs in zip(soft.boxes_xyxy, soft.class_probs, strict=True):
        if not len(boxes):
            maps.append(boxes.new_zeros(grid_hw))
            continue
        rows, columns = cell_overlaps(boxes, grid_hw, input_hw)
        covered = rows[:, :, None] * columns[:, None, :]
        maps.append((covered * probs.amax(1)[:, None, None]).amax(0))
    return torch.stack(maps)


class _WeightedLevels(LevelTerm):
    """Levels of one kind, weighted by the information map."""

    def __init__(self, pair: Pair, kind: TapKind, normalise: Normalise) -> None:
        self.name = f"information_map.{kind}"
        super().__init__(pair, kinds=(kind,), normalise=normalise)
        self.kind = kind
        self.teachers: list[Teacher] = list(pair.teachers)

    def information(self, maps: LevelMaps) -> Tensor:
        """I of this level, (B, H, W)."""
        grid_hw = (maps.student.shape[-2], maps.student.shape[-1])
        if self.kind == "backbone":
            level = self.levels[maps.teacher_index][maps.level_index]
            return backbone_information(level.align(maps.view.taps[level.teacher.name].detach(), maps.student))
        native = self.teachers[maps.teacher_index].detector
        if native is None or maps.view.dense is None:
            return soft_confidence_map(maps.view.soft, grid_hw, self.input_hw)
        with torch.no_grad():
            _, scores = native.decode(maps.view.dense)
        centres = native.prior_boxes()[:, :2].to(scores.device)
        return confidence_on_grid(scores.amax(-1), centres, grid_hw, native.spec.preprocess.input_hw)

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> Tensor:
        """Squared distance, averaged over positions with the information as weight."""
        information = self.information(maps)
        if self.unknown[maps.teacher_index]:
            grid_hw = (information.shape[-2], information.shape[-1])
            owner = object_maps(list(batch.targets.boxes_xyxy), grid_hw, self.input_hw)
            information = information.masked_fill(self.silent_cells(owner, batch, maps.teacher_index), 0.0)
        distance = (maps.student - maps.teacher).float().pow(2).mean(1)
        return (information * distance).sum() / normaliser(information.sum(), least=1e-6)


class InformationMapTerm(Term):
    """Backbone and neck distilled with the information map.

    Args:
        pair: student and teachers; each teacher must offer backbone and neck taps.
        backbone_weight: lambda of the backbone's levels. neck_weight: of the neck's.
        normalise: see `LevelTerm`.

    Raises:
        DistillationSetupError: a side lacks backbone or neck taps, or no grids match.
    """

    name = "information_map"

    def __init__(
        self,
        pair: Pair,
        *,
        backbone_weight: float = 1.0,
        neck_weight: float = 1.0,
        normalise: Normalise = "channel",
    ) -> None:
        super().__init__()
        self.weights = (backbone_weight, neck_weight)
        kinds: tuple[TapKind, TapKind] = ("backbone", "neck")
        for kind in kinds:
            sides = {"the student": pair.student.tap_specs, **{f"teacher {t.name}": t.tap_specs for t in pair.teachers}}
            for owner, taps in sides.items():
                if not any(tap.kind == kind for tap in taps.values()):
                    raise DistillationSetupError(
                        f"information_map distils backbone and neck; {owner} offers no {kind} taps",
                        got="\n            ".join(f"{name}: {describe_taps(taps)}" for name, taps in sides.items()),
                        expected="native detectors with both; an ONNX file's taps are its neck's alone",
                        fix="use another term that reads maps, such as feature",
                    )
        self.parts = [_WeightedLevels(pair, kind, normalise) for kind in kinds]
        self.backbone, self.neck = self.parts
        self.student_taps = tuple(dict.fromkeys(n for part in self.parts for n in part.student_taps))
        self.teacher_taps = tuple(
            tuple(dict.fromkeys(n for part in self.parts for n in part.teacher_taps[i]))
            for i in range(len(pair.teachers))
        )
        self.needs_dense = any(teacher.detector is not None for teacher in pair.teachers)
        self.needs_answers = any(teacher.detector is None for teacher in pair.teachers)

    def matched(self) -> str:
        """See `Term.matched`."""
        return "; ".join(part.matched() for part in self.parts)

    def forward(self, batch: DistillBatch) -> Tensor:
        """Backbone and neck parts, weighted."""
        losses = [weight * part(batch) for weight, part in zip(self.weights, self.parts, strict=True)]
        return torch.stack(losses).sum()
