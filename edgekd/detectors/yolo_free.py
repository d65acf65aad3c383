"""An anchor-free detector in two sizes: cross-stage-partial backbone, path aggregation, decoupled head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edgekd.detectors.assignment import (
    PaddedTargets,
    for_foreground,
    pad_soft_targets,
    pad_targets,
    silent_rows,
    task_aligned,
)
from edgekd.detectors.backbones.csp import CspBackbone, CspBlock
from edgekd.detectors.backbones.darknet import ConvUnit, scaled_channels
from edgekd.detectors.base import Detector, DetectorOutput, SoftTargets, Targets
from edgekd.detectors.box_losses import (
    Overlap,
    boxes_from_distances,
    distances_from_boxes,
    distribution_focal_loss,
    expected_distances,
    paired_iou,
    softened_bce,
)
from edgekd.detectors.pyramid import (
    Options,
    check_input_hw,
    doubled,
    grid_cells,
    grids_of,
    parse_options,
    pyramid_taps,
    select_taps,
)
from edgekd.ranks import normaliser, world_size
from edgekd.types import DetectorSpec

_OBJECT_PRIOR = 0.01
_DISTANCE_DECAY = 0.4
"""Bias from bin to bin of the distance distributions: first boxes reach about two cells to every side."""


class YoloFreeOptions(Options):
    """Settings of the anchor-free family.

    Attributes:
        reg_max: bins of each side's distance, one cell wide: a side lies at most reg_max - 1 cells from the centre.
        assign_topk, assign_alpha, assign_beta: see `assignment.task_aligned`.
        overlap: what the box loss is one minus of. cls_gain, box_gain, dfl_gain: weights of the losses.
    """

    reg_max: Annotated[int, Field(ge=2, le=64)] = 16
    assign_topk: Annotated[int, Field(ge=1)] = 10
    assign_alpha: Annotated[float, Field(ge=0)] = 0.5
    assign_beta: Annotated[float, Field(ge=0)] = 6.0
    overlap: Overlap = "ciou"
    cls_gain: Annotated[float, Field(ge=0)] = 1.0
    box_gain: Annotated[float, Field(ge=0)] = 2.5
    dfl_gain: Annotated[float, Field(ge=0)] = 0.5


@dataclass(frozen=True)
class _Size:
    """Channels at strides 2 to 32, bottlenecks at strides 4 to 32 and in each of the neck's blocks."""

    widths: tuple[int, int, int, int, int]
    depths: tuple[int, int, int, int]
    neck_depth: int
    head_width: int


_SIZES: Mapping[str, _Size] = {
    "yolo-nano": _Size((16, 32, 64, 128, 256), (1, 2, 2, 1), 1, 64),
    "yolo-small": _Size((32, 64, 128, 256, 448), (1, 2, 2, 1), 1, 96),
}


class _PathAggregation(nn.Module):
    """Path aggregation (PANet, Liu et al., 2018, arXiv 1803.01534): coarse to fine, then fine to coarse again."""

    def __init__(self, channels: Sequence[int], depth: int) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.channels = (fine, middle, coarse)
        self.middle_down = CspBlock(coarse + middle, middle, depth, shortcut=False)
        self.fine = CspBlock(middle + fine, fine, depth, shortcut=False)
        self.fine_to_middle = ConvUnit(fine, fine, stride=2, activation="silu")
        self.middle_up = CspBlock(fine + middle, middle, depth, shortcut=False)
        self.middle_to_coarse = ConvUnit(middle, middle, stride=2, activation="silu")
        self.coarse = CspBlock(middle + coarse, coarse, depth, shortcut=False)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Backbone maps at strides 8, 16, 32 to fused maps on the same grids."""
        s8, s16, s32 = maps
        middle = self.middle_down(torch.cat([doubled(s32), s16], dim=1))
        p3 = self.fine(torch.cat([doubled(middle), s8], dim=1))
        p4 = self.middle_up(torch.cat([self.fine_to_middle(p3), middle], dim=1))
        p5 = self.coarse(torch.cat([self.middle_to_coarse(p4), s32], dim=1))
        return [p3, p4, p5]


class _Head(nn.Module):
    """The decoupled head of one level: classes and distances come from branches of their own."""

    def __init__(self, channels: int, width: int, num_classes: int, bins: int) -> None:
        super().__init__()
        # Objects are rare and most are small: without these starting points the first steps only unlearn.
        prior = _OBJECT_PRIOR / num_classes
        scores = torch.full((num_classes,), math.log(prior / (1 - prior)))
        self.cls = _branch(channels, width, scores)
        self.reg = _branch(channels, width, (-_DISTANCE_DECAY * torch.arange(bins)).repeat(4))

    def forward(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) to (B, H * W, classes) and (B, H * W, 4 * bins)."""
        return self.cls(fused).flatten(2).transpose(1, 2), self.reg(fused).flatten(2).transpose(1, 2)


def _branch(channels: int, width: int, bias: Tensor) -> nn.Sequential:
    output = nn.Conv2d(width, len(bias), 1)
    output.bias = nn.Parameter(bias)
    return nn.Sequential(
        ConvUnit(channels, width, activation="silu"), ConvUnit(width, width, activation="silu"), output
    )


class YoloFree(Detector):
    """The anchor-free family, "yolo-nano" and "yolo-small": backbone, neck and head apart.

    Rows run over levels (fine to coarse), then y and x. A row's coding is four distributions over 0 ... reg_max - 1
    cells (Li et al., 2020, arXiv 2006.04388), whose means are the distances from the cell's centre to the left, top,
    right and bottom sides. Assignment is task-aligned (TOOD, arXiv 2108.07755) and its quality is what the scores
    learn; scores start from a prior of 0.01 that a cell holds any object at all, shared out over the classes.

    Raises:
        RecipeError: the input is no multiple of 32, or a setting is wrong.
    """

    score_activation = "sigmoid"
    cells: Tensor

    def __init__(self, spec: DetectorSpec) -> None:
        super().__init__()
        check_input_hw(spec.model, spec.preprocess.input_hw)
        self.spec = spec
        self.options = parse_options(YoloFreeOptions, spec.model, spec.options)
        self.num_classes = len(spec.class_names)
        size = _SIZES[spec.model]
        self.backbone = CspBackbone([scaled_channels(c, spec.width) for c in size.widths], size.depths)
        self.strides = self.backbone.strides
        self.neck = _PathAggregation(self.backbone.channels, size.neck_depth)
        width = scaled_channels(size.head_width, spec.width)
        self.head = nn.ModuleList(
            _Head(channels, width, self.num_classes, self.options.reg_max) for channels in self.neck.channels
        )
        self.tap_specs = pyramid_taps(spec, self.strides, self.backbone.channels, self.neck.channels)
        self.register_buffer("cells", grid_cells(spec, self.strides), persistent=False)

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> DetectorOutput:
        """See `Detector.forward`; cls_logits (B, P, classes), bbox_regression (B, P, 4 * reg_max)."""
        backbone = self.backbone(images)
        neck = self.neck(backbone)
        levels = [head(fused) for head, fused in zip(self.head, neck, strict=True)]
        return DetectorOutput(
            torch.cat([cls for cls, _ in levels], dim=1),
            torch.cat([reg for _, reg in levels], dim=1),
            None,
            select_taps(self.tap_specs, [*backbone, *neck], taps),
        )

    def _boxes(self, raw: Tensor) -> Tensor:
        """(B, P, 4 * reg_max) logits to xyxy in input pixels."""
        distances = expected_distances(raw, self.options.reg_max) * self.cells[:, 2:3]
        return boxes_from_distances(distances, self.cells[:, :2])

    def decode(self, output: DetectorOutput) -> tuple[Tensor, Tensor]:
        """See `Detector.decode`."""
        return self._boxes(output.bbox_regression.float()), output.cls_logits.float().sigmoid()

    def detection_losses(self, output: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
        """{"cls", "box", "dfl"}, each shared out over the assigned rows' quality (one an image at least)."""
        return self._losses(output, pad_targets(targets, self.num_classes, output.cls_logits.device), 1.0)

    def soft_losses(self, output: DetectorOutput, soft: SoftTargets, temperature: float = 1.0) -> dict[str, Tensor]:
        """See `Detector.soft_losses`: scores learn class probability times quality; "box" includes the DFL part.

        The temperature softens assigned rows only: on the background it would weigh what is already learnt.
        """
        targets = pad_soft_targets(soft, self.num_classes, output.cls_logits.device)
        losses = self._losses(output, targets, temperature, silent_rows(soft, self.cells))
        return {"cls": losses["cls"], "box": losses["box"] + losses["dfl"]}

    def _losses(
        self, output: DetectorOutput, targets: PaddedTargets, temperature: float, silent: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits, raw = output.cls_logits.float(), output.bbox_regression.float()
        boxes = self._boxes(raw)
        options = self.options
        assigned = task_aligned(
            logits.detach().sigmoid(),
            boxes.detach(),
            self.cells,
            targets,
            topk=options.assign_topk,
            alpha=options.assign_alpha,
            beta=options.assign_beta,
        )
        rows = assigned.foreground
        weight = for_foreground(targets.confidence, assigned) * assigned.quality[rows]
        share = 1 / normaliser(weight.sum(), least=len(boxes) * world_size())

        probs = for_foreground(targets.class_probs, assigned) * assigned.quality[rows].unsqueeze(-1)
        positive = softened_bce(logits[rows], probs, temperature).sum()
        background = ~rows if silent is None else ~(rows | silent)
        negative = (F.softplus(logits).sum(-1) * background).sum()

        truth = for_foreground(targets.boxes_xyxy, assigned)
        cells = self.cells.expand(len(boxes), -1, -1)[rows]
        distances = distances_from_boxes(truth, cells[:, :2]) / cells[:, 2:3]
        overlap = paired_iou(boxes[rows], truth, options.overlap)
        spread = distribution_focal_loss(raw[rows], distances, options.reg_max)
        return {
            "cls": options.cls_gain * (positive + negative) * share,
            "box": options.box_gain * ((1 - overlap) * weight).sum() * share,
            "dfl": options.dfl_gain * (spread * weight).sum() * share,
        }

    def prior_boxes(self) -> Tensor:
        """See `Detector.prior_boxes`: grid cells."""
        return self.cells

    def layout(self) -> tuple[object, ...]:
        """See `Detector.layout`."""
        grids = grids_of(self.spec, self.strides)
        return ("yolo-free", self.spec.preprocess.input_hw, grids, self.options.reg_max)
