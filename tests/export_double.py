"""A detector small enough to export in two seconds: MobileNetV2's building blocks, an SSD-like head, softmax.

And detectors' traces, each made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from edgekd.detectors.base import Detector, DetectorOutput
from edgekd.export.onnx import trace
from edgekd.types import DetectorSpec, PreprocessSpec

CLASSES = ("circle", "square", "star")
_traces: dict[tuple[Any, ...], bytes] = {}


def traced(detector: Detector, *, opset: int = 17, dynamic_batch: bool = False) -> onnx.ModelProto:
    """What `trace` gives, made once: it takes seconds, and the same detector has the same graph."""
    values = (value.numpy().tobytes() for value in detector.state_dict().values())
    key = (type(detector), str(detector.spec), opset, dynamic_batch, *values)
    if key not in _traces:
        _traces[key] = trace(detector, opset=opset, dynamic_batch=dynamic_batch).SerializeToString()
    return onnx.load_model_from_string(_traces[key])


def _block(channels_in: int, channels: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()
    )


class ToyDetector(Detector):
    """Two priors a cell on a stride-4 grid."""

    score_activation = "softmax"

    def __init__(self, input_hw: tuple[int, int] = (64, 64), seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.spec = DetectorSpec("toy", CLASSES, PreprocessSpec(input_hw))
        self.tap_specs = {}
        self.stem, self.depthwise = _block(3, 16, 2), _block(16, 16, 1, 16)
        self.pointwise = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.down = _block(16, 16, 2)
        self.cls = nn.Conv2d(16, 2 * (len(CLASSES) + 1), 3, 1, 1)
        self.box = nn.Conv2d(16, 2 * 4, 3, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):  # as if trained: folding must have something to fold
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias)
        with torch.no_grad():
            self.cls.weight *= 5
            self.box.weight *= 2
        grid_h, grid_w = input_hw[0] // 4, input_hw[1] // 4
        ys, xs = torch.meshgrid(torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
        centres = torch.stack([(xs + 0.5) * 4, (ys + 0.5) * 4], -1).reshape(-1, 1, 2).repeat(1, 2, 1).reshape(-1, 2)
        self.register_buffer("centres", centres)

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> DetectorOutput:
        features = self.stem(images)
        features = self.down(features + self.pointwise(self.depthwise(features)))
        batch = features.shape[0]
        cls = self.cls(features).permute(0, 2, 3, 1).reshape(batch, -1, len(CLASSES) + 1)
        box = self.box(features).permute(0, 2, 3, 1).reshape(batch, -1, 4)
        return DetectorOutput(cls, box)

    def decode(self, output: DetectorOutput) -> tuple[Tensor, Tensor]:
        offsets, sizes = output.bbox_regression[..., :2], output.bbox_regression[..., 2:]
        centres = self.centres + offsets
        halves = torch.exp(sizes.clamp(-4, 4)) * 6
        boxes = torch.cat([centres - halves, centres + halves], -1)
        return boxes, torch.softmax(output.cls_logits, -1)[..., 1:]
