"""YOLOv3 and YOLOv3-tiny (Redmon & Farhadi, 2018, arXiv 1804.02767), written from the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from edgekd.detectors.assignment import (
    AnchorLayout,
    PaddedTargets,
    anchor_shape,
    for_foreground,
    pad_soft_targets,
    pad_targets,
    silent_rows,
)
from edgekd.detectors.backbones.darknet import ConvUnit, Darknet53, DarknetTiny, scaled_channels
from edgekd.detectors.base import Detector, DetectorOutput, SoftTargets, Targets
from edgekd.detectors.box_losses import Overlap, paired_iou, pairwise_iou, softened_bce
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
from edgekd.errors import RecipeError
from edgekd.ranks import normaliser, world_size
from edgekd.types import DetectorSpec

_COCO_ANCHORS = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))
_COCO_TINY_ANCHORS = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
_COCO_ANCHOR_SIZE = 416
_OBJECT_PRIOR = 0.01
_MAX_LOG_SIDE = 4.0
"""Boxes are at most e^4 times their anchor: beyond it the exponential would overflow long before it were useful."""


class YoloV3Options(Options):
    """Settings of YOLOv3.

    Attributes:
        anchors: (width, height) in input pixels, small to large, as many for each level; the paper's, scaled to the
            input, where left out.
        anchor_ratio: anchors whose sides are within this factor of a box's learn it too; 1 leaves the best one alone.
        ignore_iou: rows whose box overlaps an object more than this learn no background. The paper writes 0.5, its
            published configuration 0.7.
        grid_sensitivity: how far a centre may reach, as a multiple of its cell; 1 is the paper.
        overlap: what the box loss is one minus of. box_gain, cls_gain, obj_gain: weights of the losses.
    """

    anchors: tuple[tuple[PositiveFloat, PositiveFloat], ...] | None = None
    anchor_ratio: Annotated[float, Field(ge=1)] = 2.5
    ignore_iou: Annotated[float, Field(gt=0, le=1)] = 0.7
    grid_sensitivity: Annotated[float, Field(ge=1, le=2)] = 1.05
    overlap: Overlap = "ciou"
    box_gain: Annotated[float, Field(ge=0)] = 2.5
    cls_gain: Annotated[float, Field(ge=0)] = 1.0
    obj_gain: Annotated[float, Field(ge=0)] = 1.0


def yolov3_options(model: str, input_hw: tuple[int, int], options: dict[str, object]) -> YoloV3Options:
    """The settings with every default written out, the anchors scaled to the input.

    Raises:
        RecipeError: an unknown setting, a bad value, or anchors that do not share out among the levels.
    """
    parsed = parse_options(YoloV3Options, model, options)
    levels = 2 if model == "yolov3-tiny" else 3
    if parsed.anchors is None:
        scale = min(input_hw) / _COCO_ANCHOR_SIZE
        published = _COCO_TINY_ANCHORS if model == "yolov3-tiny" else _COCO_ANCHORS
        anchors = tuple((round(w * scale, 2), round(h * scale, 2)) for w, h in published)
        return parsed.model_copy(update={"anchors": anchors})
    if not parsed.anchors or len(parsed.anchors) % levels:
        raise RecipeError(
            f"options of model {model!r} are wrong",
            got=f"{len(parsed.anchors)} anchors",
            expected=f"a multiple of {levels}, for its {levels} levels",
        )
    return parsed


class _ConvSet(nn.Sequential):
    """The five alternating 1x1 and 3x3 convolutions before each head."""

    def __init__(self, in_channels: int, channels: int) -> None:
        steps = [ConvUnit(in_channels, channels, 1)]
        for _ in range(2):
            steps += [ConvUnit(channels, channels * 2, 3), ConvUnit(channels * 2, channels, 1)]
        super().__init__(*steps)


class _Neck(nn.Module):
    """Top-down feature fusion: each finer level sees the coarser one's features, upsampled and joined to its own."""

    def __init__(self, channels: Sequence[int], width: float) -> None:
        super().__init__()
        self.channels = tuple(scaled_channels(c, width) for c in (128, 256, 512))
        fine, middle, coarse = self.channels
        self.coarse = _ConvSet(channels[2], coarse)
        self.to_middle = ConvUnit(coarse, middle, 1)
        self.middle = _ConvSet(channels[1] + middle, middle)
        self.to_fine = ConvUnit(middle, fine, 1)
        self.fine = _ConvSet(channels[0] + fine, fine)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Backbone maps at strides 8, 16, 32 to fused maps on the same grids."""
        p5 = self.coarse(maps[2])
        p4 = self.middle(torch.cat([doubled(self.to_middle(p5)), maps[1]], dim=1))
        p3 = self.fine(torch.cat([doubled(self.to_fine(p4)), maps[0]], dim=1))
        return [p3, p4, p5]


class _TinyNeck(nn.Module):
    """The tiny model's fusion of two levels; its 3x3 convolutions before the outputs count as neck."""

    def __init__(self, channels: Sequence[int], width: float) -> None:
        super().__init__()
        self.channels = tuple(scaled_channels(c, width) for c in (256, 512))
        middle = scaled_channels(256, width)
        lateral = scaled_channels(128, width)
        self.reduce = ConvUnit(channels[1], middle, 1)
        self.coarse = ConvUnit(middle, self.channels[1], 3)
        self.to_fine = ConvUnit(middle, lateral, 1)
        self.fine = ConvUnit(channels[0] + lateral, self.channels[0], 3)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Backbone maps at strides 16, 32 to fused maps on the same grids."""
        reduced = self.reduce(maps[1])
        fused = torch.cat([doubled(self.to_fine(reduced)), maps[0]], dim=1)
        return [self.fine(fused), self.coarse(reduced)]


class YoloV3(Detector):
    """YOLOv3 or its tiny: backbone, neck and head apart.

    Rows run over levels (fine to coarse), then y, x and the level's anchors. A row's coding is (tx, ty, tw, th) with
    centre = (cell + s * sigmoid(t) - (s - 1) / 2) * stride, s being the grid sensitivity, and side = anchor * exp(t).

    Deviations from the paper: boxes learn by CIoU instead of squared error, more than one anchor may learn an object
    (`assignment.anchor_shape`), objectness starts from a prior of 0.01, and losses are shared out over the assigned
    rows instead of the batch.

    Raises:
        RecipeError: the input is no multiple of 32, or a setting is wrong.
    """

    score_activation = "sigmoid"
    strides_of_rows: Tensor
    cells_of_rows: Tensor
    anchors_of_rows: Tensor

    def __init__(self, spec: DetectorSpec) -> None:
        super().__init__()
        check_input_hw(spec.model, spec.preprocess.input_hw)
        self.spec = spec
        self.options = yolov3_options(spec.model, spec.preprocess.input_hw, dict(spec.options))
        self.num_classes = len(spec.class_names)
        tiny = spec.model == "yolov3-tiny"
        self.backbone: Darknet53 | DarknetTiny = DarknetTiny(spec.width) if tiny else Darknet53(spec.width)
        neck_type = _TinyNeck if tiny else _Neck
        self.neck = neck_type(self.backbone.channels, spec.width)
        self.strides = self.backbone.strides
        self.anchors = self.options.anchors or ()
        self.anchors_a_cell = len(self.anchors) // len(self.strides)
        bias = _prior_bias(self.num_classes).repeat(self.anchors_a_cell)
        self.head = nn.ModuleList(_head(channels, bias, tiny) for channels in self.neck.channels)
        self.tap_specs = pyramid_taps(spec, self.strides, self.backbone.channels, self.neck.channels)
        self._make_rows()

    def _make_rows(self) -> None:
        cells = grid_cells(self.spec, self.strides).repeat_interleave(self.anchors_a_cell, dim=0)
        shapes = torch.tensor(self.anchors).view(len(self.strides), self.anchors_a_cell, 2)
        grids = grids_of(self.spec, self.strides)
        anchors = [level.repeat(h * w, 1) for level, (h, w) in zip(shapes, grids, strict=True)]
        self.register_buffer("cells_of_rows", cells[:, :2] - cells[:, 2:] / 2, persistent=False)
        self.register_buffer("strides_of_rows", cells[:, 2:3].clone(), persistent=False)
        self.register_buffer("anchors_of_rows", torch.cat(anchors), persistent=False)

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> DetectorOutput:
        """See `Detector.forward`; cls_logits (B, P, classes), bbox_regression (B, P, 4), objectness (B, P)."""
        backbone = self.backbone(images)
        neck = self.neck(backbone)
        rows = []
        for head, fused in zip(self.head, neck, strict=True):
            cells = head(fused).flatten(2).transpose(1, 2)
            rows.append(cells.reshape(cells.shape[0], -1, 5 + self.num_classes))
        raw = torch.cat(rows, dim=1)
        # A slice, not an index: as a Gather, OpenVINO 2026 carries int8 scales through it with the axis that it drops.
        objectness = raw[..., 4:5].squeeze(-1)
        found = select_taps(self.tap_specs, [*backbone, *neck], taps)
        return DetectorOutput(raw[..., 5:], raw[..., :4], objectness, found)

    def _boxes(self, raw: Tensor) -> Tensor:
        """(B, P, 4) raw coding to xyxy in input pixels."""
        reach = self.options.grid_sensitivity
        offset = raw[..., :2].sigmoid() * reach - (reach - 1) / 2
        centre = self.cells_of_rows + offset * self.strides_of_rows
        half = self.anchors_of_rows * raw[..., 2:].clamp(-_MAX_LOG_SIDE, _MAX_LOG_SIDE).exp() / 2
        return torch.cat([centre - half, centre + half], dim=-1)

    def decode(self, output: DetectorOutput) -> tuple[Tensor, Tensor]:
        """See `Detector.decode`; scores are class probability times objectness."""
        assert output.objectness is not None  # every output of this detector has it
        scores = output.cls_logits.float().sigmoid() * output.objectness.float().sigmoid().unsqueeze(-1)
        return self._boxes(output.bbox_regression.float()), scores

    def detection_losses(self, output: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
        """{"obj", "cls", "box"}, each a sum over rows shared out over the assigned ones (one an image at least)."""
        return self._losses(output, pad_targets(targets, self.num_classes, output.cls_logits.device), 1.0)

    def soft_losses(self, output: DetectorOutput, soft: SoftTargets, temperature: float = 1.0) -> dict[str, Tensor]:
        """See `Detector.soft_losses`: objectness learns the teacher's confidence, classes their shares of it.

        Objectness is counted in "cls" and takes no temperature, which would only sharpen the background.
        """
        targets = pad_soft_targets(soft, self.num_classes, output.cls_logits.device)
        losses = self._losses(output, targets, temperature, silent_rows(soft, self.prior_boxes()))
        return {"cls": losses["cls"] + losses["obj"], "box": losses["box"]}

    def _losses(
        self, output: DetectorOutput, targets: PaddedTargets, temperature: float, silent: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert output.objectness is not None  # every output of this detector has it
        boxes = self._boxes(output.bbox_regression.float())
        assigned = anchor_shape(targets, self._anchor_layout(), self.options.anchor_ratio)
        rows = assigned.foreground
        weight = for_foreground(targets.confidence, assigned)
        share = 1 / normaliser(weight.sum(), least=len(boxes) * world_size())

        confidence = torch.zeros_like(assigned.quality).masked_scatter(rows, weight)
        objectness = softened_bce(output.objectness.float(), confidence)
        background = self._background_weight(boxes, targets)
        if silent is not None:
            background = background * ~silent
        objectness = objectness * torch.where(rows, 1.0, background)
        probs = for_foreground(targets.class_probs, assigned) / weight.unsqueeze(-1)
        classes = softened_bce(output.cls_logits[rows].float(), probs, temperature).sum(-1)
        truth = for_foreground(targets.boxes_xyxy, assigned)
        overlap = paired_iou(boxes[rows], truth, self.options.overlap)
        return {
            "obj": self.options.obj_gain * objectness.sum() * share,
            "cls": self.options.cls_gain * (classes * weight).sum() * share,
            "box": self.options.box_gain * ((1 - overlap) * weight).sum() * share,
        }

    @torch.no_grad()
    def _background_weight(self, boxes: Tensor, targets: PaddedTargets) -> Tensor:
        """(B, P): 0 where a row's box overlaps a sure object too well to be called background, 1 far from any."""
        near = pairwise_iou(targets.boxes_xyxy, boxes) > self.options.ignore_iou
        return 1 - (near * targets.confidence.unsqueeze(-1)).amax(dim=1)

    def _anchor_layout(self) -> AnchorLayout:
        device = self.anchors_of_rows.device
        grids = grids_of(self.spec, self.strides)
        each = self.anchors_a_cell
        levels = [(grid, stride) for grid, stride in zip(grids, self.strides, strict=True) for _ in range(each)]
        first, start = [], 0
        for h, w in grids:
            first += [start + index for index in range(each)]
            start += h * w * each
        return AnchorLayout(
            torch.tensor(self.anchors, device=device),
            torch.tensor([stride for _, stride in levels], device=device),
            torch.tensor([grid for grid, _ in levels], device=device),
            torch.tensor(first, device=device),
            each,
            start,
        )

    def prior_boxes(self) -> Tensor:
        """See `Detector.prior_boxes`: anchors, centred on their cells."""
        centre = self.cells_of_rows + self.strides_of_rows / 2
        return torch.cat([centre, self.anchors_of_rows], dim=1)

    def layout(self) -> tuple[object, ...]:
        """See `Detector.layout`."""
        grids = grids_of(self.spec, self.strides)
        return ("yolov3", self.spec.preprocess.input_hw, grids, self.anchors, self.options.grid_sensitivity)


def _prior_bias(num_classes: int) -> Tensor:
    """(5 + classes,): objects are rare, and an object's classes equally likely."""
    # Without it the first steps would only unlearn.
    class_prior = 1 / max(num_classes, 2)
    bias = torch.zeros(5 + num_classes)
    bias[4] = math.log(_OBJECT_PRIOR / (1 - _OBJECT_PRIOR))
    bias[5:] = math.log(class_prior / (1 - class_prior))
    return bias


def _head(channels: int, bias: Tensor, tiny: bool) -> nn.Sequential:
    output = nn.Conv2d(channels if tiny else channels * 2, len(bias), 1)
    output.bias = nn.Parameter(bias.clone())
    return nn.Sequential(output) if tiny else nn.Sequential(ConvUnit(channels, channels * 2, 3), output)
