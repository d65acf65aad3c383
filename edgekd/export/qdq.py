"""Write QuantizeLinear/DequantizeLinear pairs, int8 weights and int32 biases into a graph; `placement` says where."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekd.export.calibration import Ranges
from edgekd.export.graph import GraphIndex, copy_of, prune, replace_nodes
from edgekd.export.placement import (
    WEIGHT_AXIS,
    Target,
    folded_activations,
    fused_side,
    is_weighted,
    scale_owners,
    tensors_to_quantise,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_INPUT_CHANNELS = 8
"""x86: a convolution on fewer channels gets zero channels added. ONNX Runtime copies its input channel by channel at
every kernel position; with 3 channels that takes longer than the arithmetic (MobileNetV2 at 320 px: 0.73 ms, 0.33 with
8, of 6 in all)."""
LARGEST_BIAS = 2.0**30
DUST = 1e-9


@dataclass(frozen=True)
class Parameters:
    """Scale and zero point of a tensor: real = (stored - zero_point) * scale."""

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]


def activation_parameters(low: float, high: float, target: Target) -> Parameters:
    """Scale and zero point that represent [low, high] and zero exactly."""
    if target == "tensorrt":
        scale = max(abs(low), abs(high), DUST) / 127.0
        return Parameters(np.array(scale, np.float32), np.array(0, np.int8))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, DUST) / 255.0
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
    owners = scale_owners(model, nodes, target)
    for name in tensors:  # graph order: a mover's input comes before its output
        shared = parameters.get(owners.get(name, ""))
        parameters[name] = shared or activation_parameters(*ranges[name], target)
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
        axis = WEIGHT_AXIS[node.op_type]
        others = tuple(dim for dim in range(weights.ndim) if dim != axis)
        scale = np.maximum(np.abs(weights).max(axis=others), DUST) / np.float32(self.weight_limit)
        bias = self.index.constant(node.input[2]).astype(np.float32) if len(node.input) > 2 and node.input[2] else None
        if self.target == "x86" and bias is not None:
            # A dead channel has next to no weights but may have a bias, which must fit in int32.
            step = self.parameters[source].scale
            scale = np.maximum(scale, np.abs(bias) / (step * np.float32(LARGEST_BIAS)))
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
