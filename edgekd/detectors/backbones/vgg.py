"""VGG 11 and 16 (Simonyan & Zisserman, 2014, arXiv 1409.1556) as SSD uses them (Liu et al., 2016, arXiv 1512.02325).

Convolutions keep torchvision's names (`features.0.weight` ...). The last pooling becomes 3x3 with stride 1, and the
classifier's first two layers the convolutions `fc6` (3x3, dilation 6) and `fc7` (1x1); `weights.py` fills them from a
published classifier by taking every fourth output and every third position, as the paper's code does.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.detectors.backbones.layers import Backbone, BackboneMaps, MapSpec, initialise, scaled_channels

# Convolutions of each stage, and the index in `features` of the last ReLU at stride 8 (conv4_3 in VGG16).
_STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


class VGG(Backbone):
    """Sources and stages: the last convolution at stride 8 (conv4_3 in VGG16) and fc7 at stride 16. No batch norm, as
    published.
    """

    def __init__(self, depth: Literal[11, 16] = 16, width: float = 1.0) -> None:
        super().__init__()
        channels, layers = 3, []
        stages = _STAGES[depth]
        for number, stage in enumerate(stages):
            for out in stage:
                layers += [nn.Conv2d(channels, scaled_channels(out, width), 3, padding=1), nn.ReLU(inplace=True)]
                channels = scaled_channels(out, width)
            if number == 3:
                self._stride_8_index = len(layers) - 1
            # Rounding up keeps the published 38x38 grid at 300 pixels (75 is odd).
            last = number == len(stages) - 1
            layers.append(nn.MaxPool2d(3, 1, 1) if last else nn.MaxPool2d(2, 2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        hidden = scaled_channels(1024, width)
        self.fc6 = nn.Conv2d(channels, hidden, 3, padding=6, dilation=6)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.sources = self.stages = (MapSpec(8, channels), MapSpec(16, hidden))
        initialise(self)

    def forward(self, images: Tensor) -> BackboneMaps:
        """(B, 3, H, W) to the maps at strides 8 and 16."""
        x = fine = images
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == self._stride_8_index:
                fine = x
        x = F.relu(self.fc6(x), inplace=True)
        maps = (fine, F.relu(self.fc7(x), inplace=True))
        return BackboneMaps(maps, maps)
