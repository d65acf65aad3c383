"""What all SSD backbones share: the base class, channel scaling, the convolution unit and the initialisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from edgekd.detectors.backbones.depthwise import DepthwiseConv2d

BN_MOMENTUM = 0.03
"""Share of each batch in BatchNorm's running statistics. torch's 0.1 remembers about ten batches, and the coarsest
levels of a detector see a handful of cells a batch, so the statistics that deployment uses would be noisy; TensorFlow's
0.003 does not arrive within a short fine-tuning. torchvision's SSD-lite found 0.03 in between."""


@dataclass(frozen=True)
class MapSpec:
    """A feature map that a backbone returns: its stride and its channels."""

    stride: int
    channels: int

    @property
    def name(self) -> str:
        """Such as "s8", of the map at stride 8."""
        return f"s{self.stride}"

    def grid_hw(self, input_hw: tuple[int, int]) -> tuple[int, int]:
        """Of an input of this size. Strides are powers of two, each halving of which rounds up, and so does the whole."""
        return math.ceil(input_hw[0] / self.stride), math.ceil(input_hw[1] / self.stride)


class BackboneMaps(NamedTuple):
    """What a backbone returns, each fine to coarse; one (B, channels, H / stride, W / stride) map for each spec.

    Attributes:
        sources: what the neck reads, as `Backbone.sources` lists it.
        stages: the last block's output at each stride, as `Backbone.stages` lists it. The same maps as the sources, or much
            narrower ones where SSD-lite reads an expansion: what feature distillation compares.
    """

    sources: tuple[Tensor, ...]
    stages: tuple[Tensor, ...]


class Backbone(nn.Module):
    """Base of SSD backbones.

    Attributes:
        sources, stages: the maps that `forward` returns, see `BackboneMaps`.
    """

    sources: tuple[MapSpec, ...]
    stages: tuple[MapSpec, ...]

    def forward(self, images: Tensor) -> BackboneMaps:
        """(B, 3, H, W) to the maps; sizes round up."""
        raise NotImplementedError

    def to_stride(self, stride: int) -> list[nn.Module]:
        """The layers, from the image on, whose maps have at most this stride."""
        reached, layers = 1, list[nn.Module]()
        for child in self.children():
            for layer in child if isinstance(child, nn.Sequential | nn.ModuleList) else (child,):
                reached *= math.prod(_strides(layer))
                if reached > stride:
                    return layers
                layers.append(layer)
        return layers


def _strides(layer: nn.Module) -> list[int]:
    windows = [module for module in layer.modules() if isinstance(module, nn.Conv2d | nn.MaxPool2d)]
    return [window.stride if isinstance(window.stride, int) else window.stride[0] for window in windows]


def scaled_channels(channels: int, width: float, floor: int = 8) -> int:
    """`channels` times `width`, rounded to a multiple of 8, never below `floor` nor below 90 % of the exact product.

    This is the rounding of the MobileNet and EfficientNet papers' code.
    """
    exact = channels * width
    rounded = int(exact + 4) // 8 * 8
    if rounded < 0.9 * exact:
        rounded += 8
    return max(floor, rounded)


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias: (B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
    if groups == in_channels == out_channels > 1:
        return DepthwiseConv2d(in_channels, kernel, stride)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


class ConvUnit(nn.Sequential):
    """Convolution without bias, batch norm, ReLU6: (B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1, eps: float = 1e-5
    ) -> None:
        super().__init__(
            convolution(in_channels, out_channels, kernel, stride, groups),
            nn.BatchNorm2d(out_channels, eps=eps, momentum=BN_MOMENTUM),
            nn.ReLU6(inplace=True),
        )


def initialise(module: nn.Module) -> None:
    """Kaiming initialisation of every convolution (by its true fan-out, so depthwise ones are not a hundredfold too
    small), zero biases, neutral batch norms.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
