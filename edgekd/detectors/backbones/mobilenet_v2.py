"""MobileNetV2 (Sandler et al., 2018, arXiv 1801.04381), without its classifier: 2.2 M parameters at width 1.

Parameter names and shapes are torchvision's (`features.0.0.weight` ... `features.18.1.running_var`).
"""

from __future__ import annotations

from torch import Tensor, nn

from edgekd.detectors.backbones.layers import (
    BN_MOMENTUM,
    Backbone,
    BackboneMaps,
    ConvUnit,
    MapSpec,
    initialise,
    scaled_channels,
)

# (expansion, output channels, repeats, stride of the first); the paper's table 2.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_LAST_AT_STRIDE_8, _FIRST_AT_STRIDE_32, _LAST_CONV = 6, 14, 18


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; plus the input where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = [ConvUnit(in_channels, hidden, 1)] if expansion != 1 else []
        layers += [
            ConvUnit(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels, momentum=BN_MOMENTUM),
        ]
        self.conv = nn.Sequential(*layers)
        self.hidden_channels = hidden
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H / stride, W / stride)."""
        return self.forward_with_expansion(x)[0]

    def forward_with_expansion(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the expanded map (B, hidden, H, W) that SSD-lite reads."""
        layers = iter(self.conv)
        expanded: Tensor = next(layers)(x)
        out = expanded
        for layer in layers:
            out = layer(out)
        return (x + out if self.has_shortcut else out), expanded


class MobileNetV2(Backbone):
    """Sources: the last block's output at stride 8; the expansion of the first block that leaves stride 16, as the paper's
    SSD-lite taps it (section 6.2); the last 1x1 convolution at stride 32.

    Unlike the classifier, a width below 1 thins the last convolution too: in a detector it is a large share of the cost.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled_channels(32, width)
        features: list[nn.Module] = [ConvUnit(3, channels, 3, 2)]
        for expansion, out, repeats, first_stride in _STAGES:
            out_channels = scaled_channels(out, width)
            for index in range(repeats):
                features.append(InvertedResidual(channels, out_channels, first_stride if index == 0 else 1, expansion))
                channels = out_channels
        last = scaled_channels(1280, width)
        features.append(ConvUnit(channels, last, 1))
        self.features = nn.Sequential(*features)
        tapped = features[_FIRST_AT_STRIDE_32]
        assert isinstance(tapped, InvertedResidual)
        fine = MapSpec(8, scaled_channels(32, width))
        self.sources = (fine, MapSpec(16, tapped.hidden_channels), MapSpec(32, last))
        self.stages = (fine, MapSpec(16, scaled_channels(96, width)), MapSpec(32, scaled_channels(320, width)))
        initialise(self)

    def forward(self, images: Tensor) -> BackboneMaps:
        """(B, 3, H, W) to the maps at strides 8, 16 and 32."""
        x, sources, stages = images, [], []
        for index, block in enumerate(self.features):
            if index in (_FIRST_AT_STRIDE_32, _LAST_CONV):
                stages.append(x)
            if index == _FIRST_AT_STRIDE_32 and isinstance(block, InvertedResidual):
                x, expanded = block.forward_with_expansion(x)
                sources.append(expanded)
                continue
            x = block(x)
            if index == _LAST_AT_STRIDE_8:
                sources.append(x)
                stages.append(x)
        return BackboneMaps((*sources, x), tuple(stages))
