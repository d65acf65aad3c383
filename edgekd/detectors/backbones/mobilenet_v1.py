"""MobileNetV1 (Howard et al., 2017, arXiv 1704.04861), without its classifier: 3.2 M parameters at width 1.

torchvision has none. Parameter names are those of the widespread PyTorch port, `model.0.0.weight` ...
`model.13.4.running_var`: a sequence `model` of the first convolution (conv, bn) and thirteen depthwise-separable
blocks (depthwise conv, bn, relu, pointwise conv, bn, relu).
"""

from __future__ import annotations

from torch import Tensor, nn

from edgekd.detectors.backbones.layers import Backbone, BackboneMaps, ConvUnit, MapSpec, initialise, scaled_channels

# (output channels, stride) of each block; the paper's table 1.
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


class MobileNetV1(Backbone):
    """Sources and stages: outputs of the last blocks at stride 8 (conv5), 16 (conv11) and 32 (conv13)."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled_channels(32, width)
        blocks: list[nn.Module] = [ConvUnit(3, channels, 3, 2)]
        for out, stride in _BLOCKS:
            out_channels = scaled_channels(out, width)
            depthwise = ConvUnit(channels, channels, 3, stride, groups=channels)
            blocks.append(nn.Sequential(*depthwise, *ConvUnit(channels, out_channels, 1)))
            channels = out_channels
        self.model = nn.Sequential(*blocks)
        stages = ((8, 256), (16, 512), (32, 1024))
        self.sources = self.stages = tuple(MapSpec(s, scaled_channels(c, width)) for s, c in stages)
        initialise(self)

    def forward(self, images: Tensor) -> BackboneMaps:
        """(B, 3, H, W) to the maps at strides 8, 16 and 32."""
        x, maps = images, []
        for index, block in enumerate(self.model):
            x = block(x)
            if index in (5, 11, 13):
                maps.append(x)
        return BackboneMaps(tuple(maps), tuple(maps))
