"""A small cross-stage-partial backbone with SiLU, in the spirit of CSPNet (Wang et al., 2020, arXiv 1911.11929)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.detectors.backbones.darknet import ConvUnit


class _Bottleneck(nn.Module):
    """Two 3x3 convolutions, plus the input where `shortcut`."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.first = ConvUnit(channels, channels, 3, activation="silu")
        self.second = ConvUnit(channels, channels, 3, activation="silu")
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return x + out if self.shortcut else out


class CspBlock(nn.Module):
    """A cross-stage-partial block: half of the channels pass through bottlenecks, the other half past them.

    (B, in, H, W) to (B, out, H, W). The two 1x1 entries of the paper are one convolution whose output is cut in two.
    """

    def __init__(self, in_channels: int, out_channels: int, depth: int, shortcut: bool = True) -> None:
        super().__init__()
        half = out_channels // 2
        self.entry = ConvUnit(in_channels, 2 * half, 1, activation="silu")
        self.body = nn.Sequential(*(_Bottleneck(half, shortcut) for _ in range(depth)))
        self.fuse = ConvUnit(2 * half, out_channels, 1, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H, W)."""
        past, through = self.entry(x).chunk(2, dim=1)
        out: Tensor = self.fuse(torch.cat([past, self.body(through)], dim=1))
        return out


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling at stride 1 (He et al., 2014): 5, 9 and 13 pixel maxima beside the map itself.

    The larger windows are made by pooling again over the smaller one's result, which gives the same values for less.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.entry = ConvUnit(channels, channels // 2, 1, activation="silu")
        self.fuse = ConvUnit(channels // 2 * 4, channels, 1, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        maps = [self.entry(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, 1, 2))
        out: Tensor = self.fuse(torch.cat(maps, dim=1))
        return out


class CspBackbone(nn.Module):
    """Stem and four stages of stride 2 each, the last with pyramid pooling.

    Args:
        widths: channels at strides 2, 4, 8, 16 and 32.
        depths: bottlenecks in the blocks at strides 4, 8, 16 and 32.

    Attributes:
        strides: of the maps that `forward` returns, fine to coarse.
        channels: of the same maps.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.stem = ConvUnit(3, widths[0], stride=2, activation="silu")
        self.stages = nn.ModuleList(
            nn.Sequential(ConvUnit(before, after, stride=2, activation="silu"), CspBlock(after, after, depth))
            for before, after, depth in zip(widths[:-1], widths[1:], depths, strict=True)
        )
        self.pooling = PyramidPooling(widths[-1])
        self.strides = (8, 16, 32)
        self.channels = tuple(widths[2:])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to the maps at strides 8, 16 and 32."""
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [maps[1], maps[2], self.pooling(maps[3])]
