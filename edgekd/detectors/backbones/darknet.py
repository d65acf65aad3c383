"""Darknet-53 and the tiny Darknet of YOLOv3 (Redmon & Farhadi, 2018, arXiv 1804.02767), without their classifiers."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["leaky", "silu"]


def scaled_channels(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8 and at least 8."""
    return max(8, int(channels * width + 4) // 8 * 8)


class ConvUnit(nn.Sequential):
    """Convolution without bias, batch norm, activation: (B, in, H, W) to (B, out, H / stride, W / stride)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, activation: Activation = "leaky"
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.1, inplace=True) if activation == "leaky" else nn.SiLU(inplace=True),
        )


class _Residual(nn.Module):
    """Darknet's residual block: 1x1 to half the channels, 3x3 back, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = ConvUnit(channels, max(channels // 2, 8), 1)
        self.expand = ConvUnit(max(channels // 2, 8), channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.expand(self.reduce(x))
        return out


class Darknet53(nn.Module):
    """The 52 convolutions of Darknet-53; 40.6 M parameters at width 1.

    Attributes:
        strides: of the maps that `forward` returns, fine to coarse.
        channels: of the same maps.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        stem, *stages = (scaled_channels(c, width) for c in (32, 64, 128, 256, 512, 1024))
        self.stem = ConvUnit(3, stem)
        self.stages = nn.ModuleList()
        before = stem
        for channels, blocks in zip(stages, (1, 2, 8, 8, 4), strict=True):
            residuals = [_Residual(channels) for _ in range(blocks)]
            self.stages.append(nn.Sequential(ConvUnit(before, channels, stride=2), *residuals))
            before = channels
        self.strides = (8, 16, 32)
        self.channels = tuple(stages[2:])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to the maps at strides 8, 16 and 32."""
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[2:]


class DarknetTiny(nn.Module):
    """The seven convolutions of YOLOv3-tiny's backbone, with max pooling between them; 6.3 M parameters at width 1.

    Attributes:
        strides: of the maps that `forward` returns, fine to coarse.
        channels: of the same maps.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        widths = [scaled_channels(c, width) for c in (16, 32, 64, 128, 256, 512, 1024)]
        self.convs = nn.ModuleList(
            ConvUnit(before, after) for before, after in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.strides = (16, 32)
        self.channels = (widths[4], widths[6])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to the maps at strides 16 and 32."""
        x, fine = images, images
        for index, conv in enumerate(self.convs):
            if 1 <= index <= 5:
                x = F.max_pool2d(x, 2, 2)
            elif index == 6:
                # A 2x2 pool of stride 1 that keeps the size. Repeating the border is the same as padding with minus
                # infinity, and leaves finite values for a quantiser.
                x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
            x = conv(x)
            if index == 4:
                fine = x
        return [fine, x]
