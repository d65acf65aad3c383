"""EfficientNet-Lite 0 and 1, without their classifiers: 3.4 M and 4.1 M parameters at width 1.

EfficientNet (Tan & Le, 2019, arXiv 1905.11946) in the Lite variant that Google published for edge devices: no
squeeze-and-excitation, ReLU6 for swish, stem and head not scaled in depth. Parameter names are those of the PyTorch
checkpoints converted from Google's (`_conv_stem.weight`, `_blocks.0._depthwise_conv.weight`, ... `_bn1.running_var`).

Deviation: the originals pad strided convolutions as TensorFlow does (one more pixel right and below), this one
symmetrically, which exports to plain convolutions. Each strided layer then keeps the other phase of its input, in all
five of them, so inside the image the maps are those of the original for a picture shifted by 31 pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.detectors.backbones.layers import (
    BN_MOMENTUM,
    Backbone,
    BackboneMaps,
    MapSpec,
    convolution,
    initialise,
    scaled_channels,
)

# (repeats, kernel, stride of the first, expansion, output channels) of EfficientNet-B0.
_STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
_DEPTH = {0: 1.0, 1: 1.1}
_EPS = 1e-3  # of the published checkpoints


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPS, momentum=BN_MOMENTUM)


class LiteBlock(nn.Module):
    """1x1 expansion, depthwise, linear 1x1 projection; plus the input where shapes allow.

    Attributes:
        norm_pairs: names of each convolution and of the batch norm right behind it, which an export folds into it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = convolution(in_channels, hidden, 1)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = convolution(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = convolution(hidden, out_channels, 1)
        self._bn2 = _norm(out_channels)
        pairs = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
        self.norm_pairs = pairs if self.expands else pairs[1:]
        self.hidden_channels, self.stride = hidden, stride
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H / stride, W / stride)."""
        return self.forward_with_expansion(x)[0]

    def forward_with_expansion(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the expanded map (B, hidden, H, W) that SSD-lite reads."""
        expanded = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        out = F.relu6(self._bn1(self._depthwise_conv(expanded)), inplace=True)
        out = self._bn2(self._project_conv(out))
        return (x + out if self.has_shortcut else out), expanded


class EfficientNetLite(Backbone):
    """Sources, chosen as in MobileNetV2: the last block's output at stride 8, the expansion of the first block that leaves
    stride 16, and the last 1x1 convolution at stride 32.

    Attributes:
        norm_pairs: as in `LiteBlock`.
    """

    norm_pairs = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))

    def __init__(self, variant: Literal[0, 1] = 0, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled_channels(32, width)
        self._conv_stem = convolution(3, channels, 3, 2)
        self._bn0 = _norm(channels)
        blocks: list[LiteBlock] = []
        for stage, (repeats, kernel, first_stride, expansion, out) in enumerate(_STAGES):
            ends = stage in (0, len(_STAGES) - 1)  # which Lite does not scale in depth
            out_channels = scaled_channels(out, width)
            for index in range(repeats if ends else math.ceil(repeats * _DEPTH[variant])):
                blocks.append(LiteBlock(channels, out_channels, kernel, first_stride if index == 0 else 1, expansion))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        last = scaled_channels(1280, width)
        self._conv_head = convolution(channels, last, 1)
        self._bn1 = _norm(last)
        strided = [index for index, block in enumerate(blocks) if block.stride == 2]
        self._last_at_stride_8, self._first_at_stride_32 = strided[2] - 1, strided[3]
        fine = MapSpec(8, scaled_channels(40, width))
        self.sources = (fine, MapSpec(16, blocks[self._first_at_stride_32].hidden_channels), MapSpec(32, last))
        self.stages = (fine, MapSpec(16, scaled_channels(112, width)), MapSpec(32, scaled_channels(320, width)))
        initialise(self)

    def forward(self, images: Tensor) -> BackboneMaps:
        """(B, 3, H, W) to the maps at strides 8, 16 and 32."""
        x = F.relu6(self._bn0(self._conv_stem(images)), inplace=True)
        sources, stages = [], []
        for index, block in enumerate(self._blocks):
            assert isinstance(block, LiteBlock)
            if index == self._first_at_stride_32:
                stages.append(x)
            x, expanded = block.forward_with_expansion(x)
            if index == self._last_at_stride_8:
                sources.append(x)
                stages.append(x)
            elif index == self._first_at_stride_32:
                sources.append(expanded)
        last = F.relu6(self._bn1(self._conv_head(x)), inplace=True)
        return BackboneMaps((*sources, last), (*stages, x))
