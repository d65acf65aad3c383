"""Insert QuantizeLinear/DequantizeLinear pairs: which nodes run in int8, where the pairs go, for which target.

Two placements of the same idea (Jacob et al., CVPR 2018, and NVIDIA's "Working with quantized types"):

- **x86** (ONNX Runtime): activations uint8 with a zero point, weights int8 a channel, biases int32. Every int8 node
  has pairs on its inputs and on its output, since ONNX Runtime fuses DQ-node-Q, never DQ-node alone. A ReLU or Clip
  behind a convolution vanishes into the range of its output, where uint8 saturates at the same values.
- **tensorrt**: activations and weights int8, symmetric, all zero points 0; weights stay float behind a pair of their
  own, biases stay float. Pairs only in front of int8 nodes; of a residual Add only the skip side gets one, so that
  TensorRT fuses the Add into the convolution on the other side.

Decoding, and everything else after the last convolutions, stays float.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekd.export.calibration import Ranges
from edgekd.export.graph import GraphIndex, copy_of, prune, raw_tensors, replace_nodes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Target = Literal["x86", "tensorrt"]

_WEIGHT_AXIS = {"Conv": 0, "ConvTranspose": 1}
_SAME_PARAMETERS = ("MaxPool", "Resize", "Transpose", "Reshape", "Flatten", "Slice", "Split")
"""Operators that only move values: their output must share their input's scale to be fused."""
_INT8_OPERATORS: dict[Target, tuple[str, ...]] = {
    "x86": ("Conv", "Add", "Mul", "Sigmoid", "LeakyRelu", "Concat", "AveragePool", *_SAME_PARAMETERS),
    "tensorrt": ("Conv", "ConvTranspose", "Add", "MaxPool"),
}
_INPUT_CHANNELS = 8
"""x86: a convolution on fewer channels gets zero channels added. ONNX Runtime copies its input channel by channel at
every kernel position; with 3 channels that takes longer than the arithmetic (MobileNetV2 at 320 px: 0.73 ms, 0.33 with
8, of 6 in all)."""
_LARGEST_BIAS = 2.0**30
_DUST = 1e-9


@dataclass(frozen=True)
class Parameters:
    """Scale and zero point of a tensor: real = (stored - zero_point) * scale."""

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]


def int8_nodes(model: ModelProto, target: Target) -> list[str]:
    """Names of the nodes that can run in int8, in graph order."""
    index = GraphIndex(model)
    body = index.before(raw_tensors(model))
    weighted = [node for node in model.graph.node if node.name in body and is_weighted(node, index)]
    before_weights = index.before(name for node in weighted for name in index.activations(node))
    names = {node.name for node in weighted if node.op_type in _INT8_OPERATORS[target]}
    for node in model.graph.node:
        able = node.name in before_weights and node.op_type in _INT8_OPERATORS[target]
        if able and not is_weighted(node, index) and _fits(node, index):
            names.add(node.name)
    return [node.name for node in model.graph.node if node.name in names]


def is_weighted(node: NodeProto, index: GraphIndex) -> bool:
    """Whether a node is a convolution with constant weights."""
    return node.op_type in _WEIGHT_AXIS and index.is_constant(node.input[1])


def _fits(node: NodeProto, index: GraphIndex) -> bool:
    """Whether a weightless node is of the kind that gains from int8, not a bit of arithmetic among constants."""
    inputs = index.activations(node)
    if node.op_type == "Add":
        return len(inputs) == 2 and inputs[0] != inputs[1]
    if node.op_type == "Mul":  # SiLU: x * sigmoid(x)
        makers = [index.producer.get(name) for name in inputs]
        return len(inputs) == 2 and any(
            maker is not None and maker.op_type == "Sigmoid" and maker.input[0] == other
            for maker, other in zip(makers, reversed(inputs), strict=True)
        )
    if node.op_type == "Sigmoid":
        return any(reader.op_type == "Mul" and _fits(reader, index) for reader in index.consumers[node.output[0]])
    if node.op_type == "Resize":
        return any(attribute.name == "mode" and attribute.s == b"nearest" for attribute in node.attribute)
    return len(inputs) == (len(node.input) if node.op_type == "Concat" else 1)


def folded_activations(model: ModelProto, nodes: Set[str]) -> dict[str, str]:
    """x86: int8 node to the ReLU or Clip (from 0) behind it that the output's range makes superfluous."""
    index = GraphIndex(model)
    folded: dict[str, str] = {}
    for node in model.graph.node:
        if node.name not in nodes or node.op_type not in ("Conv", "Add"):
            continue
        reader = index.only_consumer(node.output[0])
        if reader is not None and (reader.op_type == "Relu" or _clips_from_zero(reader, index)):
            folded[node.name] = reader.name
    return folded


def _clips_from_zero(node: NodeProto, index: GraphIndex) -> bool:
    if node.op_type != "Clip" or len(node.input) < 2 or not index.is_constant(node.input[1]):
        return False
    return float(index.constant(node.input[1])) == 0.0


def tensors_to_quantise(model: ModelProto, nodes: Set[str], target: Target) -> list[str]:
    """Names of the activations that get a pair when these nodes run in int8, in graph order."""
    index = GraphIndex(model)
    folded = folded_activations(model, nodes) if target == "x86" else {}
    outputs = {node.name: node.output[0] for node in model.graph.node}
    wanted: set[str] = set()
    for node in model.graph.node:
        if node.name not in nodes:
            continue
        if target == "x86":
            wanted.update(index.activations(node))
            wanted.update([outputs[folded[node.name]]] if node.name in folded else node.output)
        elif node.op_type == "Add":
            fused = fused_side(node, index)
            wanted.update(name for name in index.activations(node) if name != fused)
        else:
            wanted.update(index.activations(node))
    order = [entry.name for entry in model.graph.input] + [name for node in model.graph.node for name in node.output]
    return [name for name in order if name in wanted]


def fused_side(add: NodeProto, index: GraphIndex) -> str | None:
    """The input of a residual Add that a convolution makes for it alone: TensorRT adds in that convolution."""
    for name in reversed(index.activations(add)):
        maker = index.producer.get(name)
        if maker is not None and maker.op_type in _WEIGHT_AXIS and index.only_consumer(name) is not None:
            return name
    return None


def activation_parameters(low: float, high: float, target: Target) -> Parameters:
    """Scale and zero point that represent [low, high] and zero exactly."""
    if target == "tensorrt":
        scale = max(abs(low), abs(high), _DUST) / 127.0
        return Parameters(np.array(scale, np.float32), np.array(0, np.int8))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, _DUST) / 255.0
    zero_point = np.clip(round(-low / scale), 0, 255)
    return Parameters(np.array(scale, np.float32), np.array(zero_point, np.uint8))


def quantise(
    model: ModelProto, ranges: Ranges, nodes: Set[str], target: Target, *, reduce_range: bool = False
) -> ModelProto:
    """A copy of an fp32 model in which `nodes` compute in int8, as explicit Q/DQ pairs.

    Args:
        ranges: for every name in `tensors_to_quantise(model, nodes, target)`.
        nodes: some of `int8_nodes(model, target)`.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI, whose 8-bit products saturate in pairs.
    """
    from onnx import checker

    tensors = tensors_to_quantise(model, nodes, target)
    model = copy_of(model)
    if target == "x86":
        _fold(model, folded_activations(model, nodes))
    writer = _PairWriter(model, target, 63 if reduce_range else 127)
    writer.parameters = _shared_parameters(model, ranges, nodes, tensors, target)
    writer.rewrite(nodes)
    prune(model)
    del model.graph.value_info[:]
    standard = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    extra = [entry for entry in model.opset_import if entry not in standard]
    for entry in extra:
        model.opset_import.remove(entry)
    checker.check_model(model, full_check=True)
    return model


def _fold(model: ModelProto, folded: dict[str, str]) -> None:
    """Let a node make its activation's output itself, and drop the activation."""
    by_name = {node.name: node for node in model.graph.node}
    for name, activation in folded.items():
        by_name[name].output[0] = by_name[activation].output[0]
    gone = set(folded.values())
    replace_nodes(model, [node for node in model.graph.node if node.name not in gone])


def _shared_parameters(
    model: ModelProto, ranges: Ranges, nodes: Set[str], tensors: list[str], target: Target
) -> dict[str, Parameters]:
    parameters: dict[str, Parameters] = {}
    moved = {
        output: node.input[0]
        for node in model.graph.node
        if node.name in nodes and node.op_type in _SAME_PARAMETERS
        for output in node.output
    }
    for name in tensors:  # graph order: a mover's input comes before its output
        source = parameters.get(moved.get(name, "")) if target == "x86" else None
        parameters[name] = source or activation_parameters(*ranges[name], target)
    return parameters


class _PairWriter:
    """Rewrites one graph: adds pairs behind tensors, and quantised weights and biases to int8 nodes."""

    def __init__(self, model: ModelProto, target: Target, weight_limit: int) -> None:
        self.model, self.target, self.weight_limit = model, target, weight_limit
        self.index = GraphIndex(model)
        self.parameters: dict[str, Parameters] = {}
        self.extra_channels: dict[str, int] = {}
        self.nodes: list[NodeProto] = []

    def rewrite(self, nodes: Set[str]) -> None:
        """Write pairs behind every tensor in `parameters`, and weights of `nodes`, in topological order."""
        if self.target == "x86":
            self._widen(nodes)
        for entry in self.model.graph.input:
            self._pair(entry.name)
        for node in self.model.graph.node:
            original = type(node).FromString(node.SerializeToString())
            fused = fused_side(node, self.index) if self.target == "tensorrt" and node.op_type == "Add" else None
            for position, name in enumerate(original.input):
                if name in self.parameters and name != fused:
                    original.input[position] = f"{name}_dequantised"
            if node.name in nodes and is_weighted(node, self.index):
                self._weights(original, node.input[0])
            self.nodes.append(original)
            for name in node.output:
                self._pair(name)
        replace_nodes(self.model, self.nodes)

    def _widen(self, nodes: Set[str]) -> None:
        """Note the tensors that are to get zero channels."""
        for node in self.model.graph.node:
            if node.name not in nodes or not is_weighted(node, self.index):
                continue
            channels = self.index.constant(node.input[1]).shape[1]
            grouped = any(attribute.name == "group" and attribute.i != 1 for attribute in node.attribute)
            if channels < _INPUT_CHANNELS and not grouped and self.index.only_consumer(node.input[0]) is not None:
                self.extra_channels[node.input[0]] = _INPUT_CHANNELS - channels

    def _pair(self, tensor: str) -> None:
        if tensor not in self.parameters:
            return
        scale, zero = self._store(tensor, self.parameters[tensor])
        stored = self._add("QuantizeLinear", [tensor, scale, zero], f"{tensor}_quantised")
        if tensor in self.extra_channels:
            self._constant(f"{tensor}_pads", np.array([0, 0, 0, 0, 0, self.extra_channels[tensor], 0, 0], np.int64))
            stored = self._add("Pad", [stored, f"{tensor}_pads", zero], f"{tensor}_padded")
        self._add("DequantizeLinear", [stored, scale, zero], f"{tensor}_dequantised")

    def _weights(self, node: NodeProto, source: str) -> None:
        """Replace a convolution's weights, and on x86 its bias, by quantised ones."""
        weights = self.index.constant(node.input[1]).astype(np.float32)
        extra = self.extra_channels.get(source, 0)
        weights = np.pad(weights, [(0, 0), (0, extra), *[(0, 0)] * (weights.ndim - 2)])
        axis = _WEIGHT_AXIS[node.op_type]
        others = tuple(dim for dim in range(weights.ndim) if dim != axis)
        scale = np.maximum(np.abs(weights).max(axis=others), _DUST) / np.float32(self.weight_limit)
        bias = self.index.constant(node.input[2]).astype(np.float32) if len(node.input) > 2 and node.input[2] else None
        if self.target == "x86" and bias is not None:
            # A dead channel has next to no weights but may have a bias, which must fit in int32.
            step = self.parameters[source].scale
            scale = np.maximum(scale, np.abs(bias) / (step * np.float32(_LARGEST_BIAS)))
        parameters = Parameters(scale.astype(np.float32), np.zeros(len(scale), np.int8))
        name = f"{node.name}_weight"
        stored_scale, zero = self._store(name, parameters)
        if self.target == "tensorrt":
            self._add("QuantizeLinear", [node.input[1], stored_scale, zero], f"{name}_quantised", axis=axis)
        else:
            shape = [len(scale) if dim == axis else 1 for dim in range(weights.ndim)]
            steps = np.clip(np.rint(weights / scale.reshape(shape)), -self.weight_limit, self.weight_limit)
            self._constant(f"{name}_quantised", steps.astype(np.int8))
        self._add("DequantizeLinear", [f"{name}_quantised", stored_scale, zero], f"{name}_dequantised", axis=axis)
        node.input[1] = f"{name}_dequantised"
        if self.target == "x86" and bias is not None:
            node.input[2] = self._bias(node, bias, self.parameters[source].scale * parameters.scale)

    def _bias(self, node: NodeProto, bias: NDArray[np.float32], scale: NDArray[np.float32]) -> str:
        name = f"{node.name}_bias"
        self._constant(f"{name}_quantised", np.rint(bias / scale).astype(np.int32))
        stored_scale, zero = self._store(name, Parameters(scale, np.zeros(len(scale), np.int32)))
        return self._add("DequantizeLinear", [f"{name}_quantised", stored_scale, zero], f"{name}_dequantised", axis=0)

    def _store(self, name: str, parameters: Parameters) -> tuple[str, str]:
        self._constant(f"{name}_scale", parameters.scale)
        self._constant(f"{name}_zero_point", parameters.zero_point)
        return f"{name}_scale", f"{name}_zero_point"

    def _constant(self, name: str, value: NDArray[Any]) -> None:
        from onnx import numpy_helper

        self.model.graph.initializer.append(numpy_helper.from_array(value, name))

    def _add(self, operator: str, inputs: list[str], output: str, axis: int | None = None) -> str:
        from onnx import helper

        node = helper.make_node(operator, inputs, [output], name=f"{output}_op")
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)
        return output
