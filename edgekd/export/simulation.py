"""A detector that computes in torch as its int8 file will, differentiable, with every pair that `qdq.quantise` writes.

The detector is captured with torch.export and walked one operator at a time. Each tensor behind which the file has a
QuantizeLinear/DequantizeLinear pair is rounded with the same scale and zero point: inputs of convolutions, what residual
Adds take (on TensorRT the skip side alone) and, on x86, also what convolutions, Adds, LeakyReLU, both halves of SiLU and
Concat give out. BatchNorm is folded into the weights before these are rounded, as the exporter does. On x86 biases are
rounded too, and a ReLU that the exporter leaves to uint8's saturation is left to it here.

Not simulated, because it is decided only when a file is made or run:
- layers that the exporter may leave in float to hold its mAP budget (`precision.to_int8`, "kept_float");
- calibration by entropy or percentile: scales start from the least and greatest values seen, and learn from there;
- float32's own rounding: sums that are exact in int32 are float32 here, so that a value next to the middle between two
  steps may round to the other one. A deep network spreads such a step, as it spreads any other noise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from edgekd.detectors.base import Detector, DetectorOutput
from edgekd.errors import ExportError
from edgekd.export.calibration import collect
from edgekd.export.capture import Program, call, conv_path, describe_tensors, mapped
from edgekd.export.graph import GraphIndex
from edgekd.export.onnx import trace
from edgekd.export.placement import (
    Target,
    folded_activations,
    int8_nodes,
    is_weighted,
    scale_owners,
    tensors_to_quantise,
)
from edgekd.export.precision import weight_limit
from edgekd.export.qdq import DUST, LARGEST_BIAS, Parameters, activation_parameters
from edgekd.types import FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto


def scaled_tensors(model: ModelProto, target: Target) -> list[str]:
    """The tensors whose pairs have a scale of their own when the whole detector runs in int8, in graph order."""
    nodes = set(int8_nodes(model, target))
    owners = scale_owners(model, nodes, target)
    return [name for name in tensors_to_quantise(model, nodes, target) if name not in owners]


def conv_inputs(model: ModelProto, target: Target) -> dict[str, str]:
    """Each int8 convolution's path in the detector to the tensor whose scale its input has.

    On x86 a pooling or reshaping in between takes its input's scale, so the tensor before it counts.

    Raises:
        ExportError: a convolution is none of the detector's, or is used twice.
    """
    index, nodes = GraphIndex(model), set(int8_nodes(model, target))
    owners = scale_owners(model, nodes, target)
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.name not in nodes or not is_weighted(node, index):
            continue
        path = conv_path(node, index)
        if not path or path in found:
            raise ExportError(
                "a convolution of the exported graph cannot be matched with the detector's",
                got=f"{node.name}, weights {node.input[1]}" + (", used twice" if path else ""),
                expected="each convolution once, its weights named after it",
            )
        found[path] = owners.get(node.input[0], node.input[0])
    return found


def range_keys(model: ModelProto, target: Target) -> dict[str, str]:
    """What a checkpoint calls the ranges, to tensors of a traced model.

    The input of a convolution goes by the convolution's path; everything else by `describe_tensors`.
    """
    inputs = conv_inputs(model, target)
    others = [name for name in scaled_tensors(model, target) if name not in set(inputs.values())]
    return {**inputs, **{what: name for name, what in describe_tensors(model, others).items()}}


class ActivationGrid(nn.Module):
    """Rounds an activation to the steps of a scale that is learned; the zero point stays."""

    def __init__(self, start: Parameters, target: Target) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(float(start.scale)).log())
        self.zero_point = int(start.zero_point)
        self.least, self.most = (0, 255) if target == "x86" else (-128, 127)

    def forward(self, values: Tensor) -> Tensor:
        """Values (B, ...) as int8 would hold them; the scale's gradient is damped as in LSQ."""
        damping = (values[0].numel() * (self.most - self.least)) ** -0.5
        scale = self.log_scale.exp()
        scale = scale * damping + (scale * (1 - damping)).detach()
        steps = _rounded(values / scale) + self.zero_point
        rounded: Tensor = (steps.clamp(self.least, self.most) - self.zero_point) * scale
        return rounded

    @property
    def range(self) -> tuple[float, float]:
        """(lowest, highest) value, from which `activation_parameters` makes this scale and zero point again."""
        scale = float(self.log_scale.detach().exp())
        lowest = 0 if self.least == 0 else -127
        return (lowest - self.zero_point) * scale, (self.most - self.zero_point) * scale


def _rounded(values: Tensor) -> Tensor:
    return values + (values.round() - values).detach()


class QuantisedDetector(nn.Module):
    """A copy of a detector that computes as its int8 export will, calibrated and ready to be fine-tuned.

    BatchNorm keeps its statistics; its factors and shifts train.

    Args:
        images: prepared training images to start the scales from, each (1, 3, H, W) float32.

    Raises:
        DataError: no images.
        ExportError: the detector cannot be captured, or a tensor that the file rounds is not found in it.

    Attributes:
        detector: the copy, in eval mode, whose parameters train. target: what int8 is laid out for.
    """

    def __init__(self, detector: Detector, images: Sequence[FloatArray], target: Target) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector).float().cpu().eval()
        self.target, self._limit = target, weight_limit(target)
        model = trace(self.detector)
        tensors = scaled_tensors(model, target)
        seen = collect(model, tensors, images)
        grids = {
            name: ActivationGrid(activation_parameters(seen[name].lowest, seen[name].highest, target), target)
            for name in tensors
        }
        self.grids = nn.ModuleList(grids.values())
        self._keyed = {key: grids[name] for key, name in range_keys(model, target).items()}
        self._conv_grids = {path: grids[name] for path, name in conv_inputs(model, target).items()}
        self._program = Program(self.detector)
        made = self._program.find(describe_tensors(model, tensors))
        self._grid_of = {node: grids[name] for node, name in made.items()}
        folded = set(folded_activations(model, set(int8_nodes(model, target))).values()) if target == "x86" else set()
        dropped = {output for node in model.graph.node if node.name in folded for output in node.output}
        self._dropped = {node for node, name in made.items() if name in dropped}

    def forward(self, images: Tensor) -> DetectorOutput:
        """(B, 3, H, W) to the raw outputs, without taps."""
        values = {
            node: self._grid_of[node](value) if node in self._grid_of else value
            for node, value in self._program.inputs(self.detector, images).items()
        }
        for node in self._program.steps:
            if node in self._program.convs:
                value = self._convolution(node, values)
            elif node in self._program.norms or node in self._dropped:  # part of the convolution; of the range
                value = mapped(node.args[0], values)
            else:
                value = call(node, values)
            values[node] = self._grid_of[node](value) if node in self._grid_of else value
        return DetectorOutput(*(values[node] for node in self._program.results))

    def _convolution(self, node: Node, values: Mapping[Node, Any]) -> Tensor:
        path, norm = self._program.convs[node]
        source, weight, *others = mapped(node.args, values)
        bias, *geometry = others or [None]
        if norm is not None:
            factor, shift, mean, variance = mapped(norm.args[1:5], values)
            factor = factor * torch.rsqrt(variance + norm.args[7])
            weight = weight * factor.view(-1, 1, 1, 1)
            bias = shift + ((0 if bias is None else bias) - mean) * factor
        if path in self._conv_grids:
            weight, bias = self._rounded_weights(weight, bias, self._conv_grids[path].log_scale.detach().exp())
        return F.conv2d(source, weight, bias, *geometry)

    def _rounded_weights(self, weight: Tensor, bias: Tensor | None, step: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `qdq` stores them. The scales of weights do not learn: they follow max |w| of each channel."""
        scale = weight.detach().abs().amax((1, 2, 3)).clamp_min(DUST) / self._limit
        if self.target == "x86" and bias is not None:
            scale = torch.maximum(scale, bias.detach().abs() / (step * LARGEST_BIAS))
            bias = _rounded(bias / (step * scale)) * (step * scale)
        scale = scale.view(-1, 1, 1, 1)
        return _rounded(weight / scale) * scale, bias

    def ranges(self) -> dict[str, list[float]]:
        """The learned (low, high) of every quantised tensor, by `range_keys`."""
        return {key: list(grid.range) for key, grid in self._keyed.items()}

    def scales(self) -> list[nn.Parameter]:
        """The logarithms of the activation scales, each once."""
        return [grid.log_scale for grid in self.grids if isinstance(grid, ActivationGrid)]

    def plain(self) -> Detector:
        """The detector with the fine-tuned weights: what a checkpoint holds."""
        return copy.deepcopy(self.detector).cpu()
