"""SSD (Liu et al., 2016, arXiv 1512.02325) and SSD-lite (Sandler et al., 2018, arXiv 1801.04381, section 6.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.detectors.anchors import PriorLayout, decode_boxes, even_scales
from edgekd.detectors.assignment import pad_soft_targets, pad_targets, silent_rows
from edgekd.detectors.backbones.efficientnet_lite import EfficientNetLite
from edgekd.detectors.backbones.layers import Backbone, ConvUnit, initialise, scaled_channels
from edgekd.detectors.backbones.mobilenet_v1 import MobileNetV1
from edgekd.detectors.backbones.mobilenet_v2 import MobileNetV2
from edgekd.detectors.backbones.vgg import VGG
from edgekd.detectors.base import Detector, DetectorOutput, SoftTargets, TapSpec, Targets
from edgekd.detectors.pyramid import select_taps
from edgekd.detectors.ssd_losses import NEGATIVES_A_POSITIVE, confident, multibox_losses, soft_multibox_losses
from edgekd.detectors.ssd_options import FAMILIES, LEVELS, Shapes, check_width, read_options
from edgekd.errors import RecipeError
from edgekd.ranks import world_size
from edgekd.types import DetectorSpec

_FINE_CHANNELS = 128
_LITE_EPS = 1e-3  # TensorFlow's, in which SSD-lite was published; steadier than 1e-5 where a batch has few cells


_BACKBONES: dict[str, Callable[[float], Backbone]] = {
    "vgg16-ssd": partial(VGG, 16),
    "vgg11-ssd": partial(VGG, 11),
    "mobilenetv1-ssd-lite": MobileNetV1,
    "mobilenetv2-ssd-lite": MobileNetV2,
    "efficientnet-lite0-ssd-lite": partial(EfficientNetLite, 0),
    "efficientnet-lite1-ssd-lite": partial(EfficientNetLite, 1),
}


class L2Norm(nn.Module):
    """Each cell's channels scaled to unit length times a learned scale (SSD, section 3.1), which starts at 20."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        # Shrunk first: squares of VGG's activations, summed over 512 channels, pass the largest fp16. The floor of the
        # norm is one that fp16 can tell from zero.
        return F.normalize(x / 64, dim=1, eps=1e-4) * self.scale.view(1, -1, 1, 1)


class SsdNeck(nn.Module):
    """The paper's extra levels behind VGG: 1x1 then 3x3 convolutions with ReLU, two of stride 2, two unpadded."""

    def __init__(self, fine_channels: int, coarse_channels: int, coarse_hw: tuple[int, int], width: float) -> None:
        super().__init__()
        self.norm = L2Norm(fine_channels)
        self.extras = nn.ModuleList()
        self.channels = [fine_channels, coarse_channels]
        grid_hw = coarse_hw
        self._extra_grids = list[tuple[int, int]]()
        for out, stride in ((512, 2), (256, 2), (256, 1), (256, 1)):
            out_channels = scaled_channels(out, width, 64)
            # Unpadded, the last two take a cell off each side: 5, 3, 1 at 300 pixels. Small inputs have none to give.
            padding = 1 if stride == 2 or min(grid_hw) < 3 else 0
            squeezed = out_channels // 2
            self.extras.append(
                nn.Sequential(
                    nn.Conv2d(self.channels[-1], squeezed, 1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(squeezed, out_channels, 3, stride, padding),
                    nn.ReLU(inplace=True),
                )
            )
            self.channels.append(out_channels)
            grid_hw = ((grid_hw[0] + 2 * padding - 3) // stride + 1, (grid_hw[1] + 2 * padding - 3) // stride + 1)
            self._extra_grids.append(grid_hw)

    def grids_hw(self, sources_hw: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of the levels, from those of the backbone's maps."""
        return [*sources_hw, *self._extra_grids]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's two maps to six levels, fine to coarse."""
        levels = [self.norm(maps[0]), maps[1]]
        for extra in self.extras:
            levels.append(extra(levels[-1]))
        return levels


class FineLevel(nn.Module):
    """The stride-8 map with what the stride-16 map knows: one step of a feature pyramid (Lin et al., CVPR 2017), depthwise."""

    def __init__(self, fine_channels: int, coarse_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lateral = ConvUnit(fine_channels, out_channels, 1, eps=_LITE_EPS)
        self.top = ConvUnit(coarse_channels, out_channels, 1, eps=_LITE_EPS)
        self.smooth = ConvUnit(out_channels, out_channels, 3, groups=out_channels, eps=_LITE_EPS)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B, C8, H, W) and (B, C16, H / 2, W / 2) to (B, out, H, W)."""
        smooth: Tensor = self.smooth(
            self.lateral(fine) + F.interpolate(self.top(coarse), fine.shape[-2:], mode="nearest")
        )
        return smooth


class SsdLiteNeck(nn.Module):
    """Extra levels: 1x1 to half the channels, 3x3 depthwise of stride 2, 1x1. A 1x1 grid stays 1x1.

    Args:
        channels: of the backbone's maps, fine to coarse. finest_stride: 16, the paper's, with four extra levels; or 8, with a
            `FineLevel` before and one extra level less.
    """

    def __init__(self, channels: Sequence[int], width: float, finest_stride: int) -> None:
        super().__init__()
        self.extras = nn.ModuleList()
        self.channels = list(channels[-2:])
        outs = [512, 256, 256, 128]
        self.fine: FineLevel | None = None
        if finest_stride == 8:
            fine_channels = scaled_channels(_FINE_CHANNELS, width, 64)
            self.fine = FineLevel(channels[-3], channels[-2], fine_channels)
            del outs[-1]
        for out in outs:
            out_channels = scaled_channels(out, width, 64)
            squeezed = out_channels // 2
            self.extras.append(
                nn.Sequential(
                    ConvUnit(self.channels[-1], squeezed, 1, eps=_LITE_EPS),
                    ConvUnit(squeezed, squeezed, 3, 2, groups=squeezed, eps=_LITE_EPS),
                    ConvUnit(squeezed, out_channels, 1, eps=_LITE_EPS),
                )
            )
            self.channels.append(out_channels)
        if self.fine is not None:
            self.channels.insert(0, fine_channels)

    def grids_hw(self, sources_hw: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of the levels, from those of the backbone's maps, fine to coarse; each extra level has half the cells, rounded up."""
        grids = list(sources_hw[-2:] if self.fine is None else sources_hw[-3:])
        for _ in self.extras:
            height, width = grids[-1]
            grids.append((math.ceil(height / 2), math.ceil(width / 2)))
        return grids

    def stay_on_single_cells(self, grids_hw: Sequence[tuple[int, int]]) -> None:
        """Stride 1 wherever a level of these (fine to coarse) has one cell: the same result, and the same gradient.

        With stride 2, oneDNN's bf16 gradient of a depthwise convolution on one cell, channels last, leaves the weights left and
        right of the centre as they were in memory: NaN sooner or later, at 224 and 256 pixels (torch 2.13, AVX-512 BF16).
        """
        for extra, (height, width) in zip(self.extras, grids_hw[-len(self.extras) - 1 :], strict=False):
            if height == width == 1:
                assert isinstance(extra, nn.Sequential)
                depthwise = extra[1]
                assert isinstance(depthwise, ConvUnit)
                assert isinstance(depthwise[0], nn.Conv2d)
                depthwise[0].stride = (1, 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's maps to six levels, fine to coarse; the backbone's last two are among them."""
        levels = [maps[-2], maps[-1]]
        for extra in self.extras:
            levels.append(extra(levels[-1]))
        return levels if self.fine is None else [self.fine(maps[-3], maps[-2]), *levels]


class SsdHead(nn.Module):
    """For each level a class and a box predictor: 3x3 convolutions, in SSD-lite depthwise-separable ones."""

    def __init__(self, channels: Sequence[int], priors_a_cell: Sequence[int], num_classes: int, lite: bool) -> None:
        super().__init__()
        self.columns = num_classes + 1
        pairs = list(zip(channels, priors_a_cell, strict=True))
        self.classes = nn.ModuleList(_predictor(c, n * self.columns, lite) for c, n in pairs)
        self.boxes = nn.ModuleList(_predictor(c, n * 4, lite) for c, n in pairs)

    def initialise_outputs(self) -> None:
        """Small output weights, and the bias at which an untrained head already has the loss's share of background.

        Of the priors that learn, three in four are background. With the bias for that, the first steps go into telling
        classes apart.
        """
        for predictor in chain(self.classes, self.boxes):
            nn.init.normal_(_last_conv(predictor).weight, std=0.01)
        for predictor in self.classes:
            bias = _last_conv(predictor).bias
            assert bias is not None
            with torch.no_grad():
                bias.view(-1, self.columns)[:, 0] = math.log(NEGATIVES_A_POSITIVE * (self.columns - 1))

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The levels to class logits (B, P, classes + 1) and box offsets (B, P, 4)."""
        logits = [_rows(predict(x), self.columns) for predict, x in zip(self.classes, levels, strict=True)]
        offsets = [_rows(predict(x), 4) for predict, x in zip(self.boxes, levels, strict=True)]
        return torch.cat(logits, dim=1), torch.cat(offsets, dim=1)


def _predictor(in_channels: int, out_channels: int, lite: bool) -> nn.Module:
    if not lite:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    depthwise = ConvUnit(in_channels, in_channels, 3, groups=in_channels, eps=_LITE_EPS)
    return nn.Sequential(depthwise, nn.Conv2d(in_channels, out_channels, 1))


def _last_conv(predictor: nn.Module) -> nn.Conv2d:
    last = predictor if isinstance(predictor, nn.Conv2d) else list(predictor.children())[-1]
    assert isinstance(last, nn.Conv2d)
    return last


def _rows(x: Tensor, columns: int) -> Tensor:
    """(B, priors * columns, H, W) to (B, H * W * priors, columns); free when channels come last in memory."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, columns)


class SSD(Detector):
    """An SSD or SSD-lite: backbone, extra levels, a predictor on each level. Softmax scores, background first.

    Taps: "backbone.s8", "backbone.s16", "backbone.s32", the last block's output at each stride (VGG has no s32), and
    "neck.l0" ... "neck.l5", the six levels that the head reads (in MobileNetV2 and EfficientNet-Lite much wider). The names
    do not depend on the input size; `TapSpec.grid_hw` has the grids.
    """

    score_activation = "softmax"
    priors: Tensor

    def __init__(self, spec: DetectorSpec) -> None:
        super().__init__()
        check_width(spec.model, spec.width)
        lite = FAMILIES[spec.model].lite
        input_hw = spec.preprocess.input_hw
        options = read_options(spec.model, spec.options, input_hw)
        self.spec, self.match_iou = spec, options.match_iou
        self.backbone = _BACKBONES[spec.model](spec.width)
        sources_hw = [source.grid_hw(input_hw) for source in self.backbone.sources]
        fine, coarse = (m.channels for m in self.backbone.sources[-2:])
        self.neck: SsdLiteNeck | SsdNeck
        if lite:
            self.neck = SsdLiteNeck([m.channels for m in self.backbone.sources], spec.width, options.finest_stride)
        else:
            self.neck = SsdNeck(fine, coarse, sources_hw[-1], spec.width)
        grids = tuple(self.neck.grids_hw(sources_hw))
        if isinstance(self.neck, SsdLiteNeck):
            self.neck.stay_on_single_cells(grids)
        few, all_ratios = options.aspect_ratios[:1], options.aspect_ratios
        ratios = (all_ratios,) * LEVELS if lite else (few, all_ratios, all_ratios, all_ratios, few, few)
        scales = even_scales(options.min_scale, options.max_scale, LEVELS, half_level_first=not lite)
        self.prior_layout = _with_shapes(PriorLayout(grids, scales, ratios), options.priors, spec.model)
        self.head = SsdHead(self.neck.channels, self.prior_layout.priors_a_cell, len(spec.class_names), lite)
        initialise(self.neck)
        initialise(self.head)
        self.head.initialise_outputs()
        self.register_buffer("priors", self.prior_layout.priors(input_hw), persistent=False)
        self.tap_specs = self._list_taps()
        self._has_single_cell_norm = lite and (1, 1) in grids

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> DetectorOutput:
        """Run the network; see `Detector.forward`.

        Raises:
            KeyError: an unknown tap.
            ValueError: images of another size than the priors were made for.
            RecipeError: training on a single image, for which batch norm is not defined on a 1x1 level.
        """
        if tuple(images.shape[-2:]) != self.spec.preprocess.input_hw:
            raise ValueError(f"images are {tuple(images.shape)}, the detector takes {self.spec.preprocess.input_hw}")
        if self.training and self._has_single_cell_norm and images.shape[0] * world_size() == 1:
            raise RecipeError(
                f"{self.spec.model} cannot train on one image at a time: its coarsest level has one cell, of which batch "
                "norm has no variance",
                fix="set train.batch_size to 2 or more, and give it 2 images or more",
            )
        maps = self.backbone(images)
        levels = self.neck(maps.sources)
        cls_logits, offsets = self.head(levels)
        found = select_taps(self.tap_specs, [*maps.stages, *levels], taps)
        return DetectorOutput(cls_logits, offsets, taps=found)

    def decode(self, output: DetectorOutput) -> tuple[Tensor, Tensor]:
        """Boxes (B, P, 4) xyxy pixels and softmax scores (B, P, classes) without the background column."""
        boxes = decode_boxes(output.bbox_regression.float(), self.priors)
        return boxes, output.cls_logits.float().softmax(-1)[..., 1:]

    def detection_losses(self, output: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
        """{"cls", "box"}: see `ssd_losses.multibox_losses`."""
        padded = pad_targets(targets, len(self.spec.class_names), self.priors.device)
        return multibox_losses(output.cls_logits, output.bbox_regression, self.priors, padded, self.match_iou)

    def soft_losses(self, output: DetectorOutput, soft: SoftTargets, temperature: float = 1.0) -> dict[str, Tensor]:
        """{"cls", "box"}: see `ssd_losses.soft_multibox_losses`."""
        padded = pad_soft_targets(confident(soft), len(self.spec.class_names), self.priors.device)
        silent = silent_rows(soft, self.priors) if len(soft.silent_xyxy) else None
        return soft_multibox_losses(
            output.cls_logits, output.bbox_regression, self.priors, padded, temperature, silent, self.match_iou
        )

    def prior_boxes(self) -> Tensor:
        """(P, 4) float32 cxcywh, input pixels; not clipped to the image."""
        return self.priors

    def layout(self) -> tuple[object, ...]:
        """Grids and the shapes of a cell's priors. Relative to the input, so two input sizes may share a layout."""
        layout = self.prior_layout
        return ("ssd", layout.grids_hw, *(tuple(layout.cell_shapes_wh(level)) for level in range(LEVELS)))

    def _list_taps(self) -> dict[str, TapSpec]:
        input_hw = self.spec.preprocess.input_hw
        specs = [
            TapSpec(f"backbone.{m.name}", "backbone", m.channels, m.grid_hw(input_hw)) for m in self.backbone.stages
        ]
        levels = zip(self.neck.channels, self.prior_layout.grids_hw, strict=True)
        specs += [TapSpec(f"neck.l{index}", "neck", c, grid) for index, (c, grid) in enumerate(levels)]
        return {tap.name: tap for tap in specs}


def _with_shapes(layout: PriorLayout, priors: str | Shapes, model: str) -> PriorLayout:
    """The layout with a recipe's own shapes; as published as long as they are to be fitted."""
    if isinstance(priors, str):
        return layout
    counts = tuple(len(level) for level in priors)
    if counts != layout.priors_a_cell:
        raise RecipeError(f"{model}: wrong number of priors on the levels", got=counts, expected=layout.priors_a_cell)
    return replace(layout, shapes_wh=priors)
