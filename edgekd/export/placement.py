"""Where Q/DQ pairs go: which nodes run in int8, and which activations are quantised for them, by target.

Two placements of the same idea (Jacob et al., CVPR 2018, and NVIDIA's "Working with quantized types"):

- **x86** (ONNX Runtime): activations uint8 with a zero point, weights int8 a channel, biases int32. Every int8 node
  has pairs on its inputs and on its output, since ONNX Runtime fuses DQ-node-Q, never DQ-node alone. A ReLU or Clip
  behind a convolution vanishes into the range of its output, where uint8 saturates at the same values. A narrow
  network's first layers, of few channels on large maps, are faster in float there and stay so (`float_stem`).
- **tensorrt**: activations and weights int8, symmetric, all zero points 0; weights stay float behind a pair of their
  own, biases stay float. Pairs only in front of int8 nodes; of a residual Add only the skip side gets one, so that
  TensorRT fuses the Add into the convolution on the other side.

Decoding, and everything else after the last convolutions, stays float.
"""

from __future__ import annotations

import math
from collections.abc import Set
from typing import TYPE_CHECKING, Literal

from edgekd.export.graph import GraphIndex, raw_tensors

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Target = Literal["x86", "tensorrt"]

WEIGHT_AXIS = {"Conv": 0, "ConvTranspose": 1}
"""Weighted operators, with the axis of their weights that counts output channels."""
_FEW_CHANNELS = 16
"""Up to which ONNX Runtime's int8 convolutions are slower than its float ones (benchmarks/README.md)."""
MOVERS = ("MaxPool", "Resize", "Transpose", "Reshape", "Flatten", "Slice", "Split")
"""Operators that only move values: their output must share their input's scale to be fused."""
_INT8_OPERATORS: dict[Target, tuple[str, ...]] = {
    "x86": ("Conv", "Add", "Mul", "Sigmoid", "LeakyRelu", "Concat", "AveragePool", *MOVERS),
    "tensorrt": ("Conv", "ConvTranspose", "Add", "MaxPool"),
}


def int8_nodes(model: ModelProto, target: Target) -> list[str]:
    """Names of the nodes that can run in int8, in graph order."""
    index = GraphIndex(model)
    body = index.before(raw_tensors(model))
    if target == "x86":
        body -= {node.name for node in model.graph.node[: _stem_end(model, body, index)]}
    weighted = [node for node in model.graph.node if node.name in body and is_weighted(node, index)]
    before_weights = body & index.before(name for node in weighted for name in index.activations(node))
    names = {node.name for node in weighted if node.op_type in _INT8_OPERATORS[target]}
    for node in model.graph.node:
        able = node.name in before_weights and node.op_type in _INT8_OPERATORS[target]
        if able and not is_weighted(node, index) and _fits(node, index):
            names.add(node.name)
    return [node.name for node in model.graph.node if node.name in names]


def float_stem(model: ModelProto, target: Target) -> list[str]:
    """Names of the first convolutions, left in float because int8 would be slower there, in graph order."""
    if target != "x86":
        return []
    index = GraphIndex(model)
    body = index.before(raw_tensors(model))
    stem = model.graph.node[: _stem_end(model, body, index)]
    return [node.name for node in stem if node.name in body and is_weighted(node, index)]


def _stem_end(model: ModelProto, body: Set[str], index: GraphIndex) -> int:
    """x86: how many of a graph's first nodes stay float.

    ONNX Runtime's int8 kernels go through channels, its float ones through pixels too: on 16 channels int8 takes up to
    twice as long. So it starts at the first convolution of more than `_FEW_CHANNELS`, or before it, where what passes
    from float to int8 has fewer values than the image: to quantise large maps, such as VGG's, costs more than it brings.
    Never more than a quarter of the convolutions, which are a stem and no network.
    """
    shapes = _shapes(model)
    image = shapes.get(model.graph.input[0].name, ())
    position = {node.name: number for number, node in enumerate(model.graph.node)}
    weighted = [node for node in model.graph.node if node.name in body and is_weighted(node, index)]
    end = 0
    for node in weighted[: len(weighted) // 4 + 1]:
        here = position[node.name]
        passing = {
            name
            for reader in model.graph.node[here:]
            if reader.name in body
            for name in index.activations(reader)
            if name in index.producer and position[index.producer[name].name] < here
        }
        known = all(name in shapes for name in passing)
        if passing and known and sum(math.prod(shapes[name]) for name in passing) < math.prod(image):
            end = here
        if index.constant(node.input[1]).shape[WEIGHT_AXIS[node.op_type]] > _FEW_CHANNELS:
            break
    return end


def _shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """(C, H, W) and the like of every tensor of which they are known: without the batch axis."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model).graph
    found = {
        entry.name: tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim[1:])
        for entry in (*graph.input, *graph.value_info)
    }
    return {name: shape for name, shape in found.items() if shape and all(shape)}


def is_weighted(node: NodeProto, index: GraphIndex) -> bool:
    """Whether a node is a convolution with constant weights."""
    return node.op_type in WEIGHT_AXIS and index.is_constant(node.input[1])


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


def scale_owners(model: ModelProto, nodes: Set[str], target: Target) -> dict[str, str]:
    """x86: the output of an int8 node that only moves values, to the tensor whose scale it takes over."""
    owners: dict[str, str] = {}
    for node in model.graph.node:
        if target == "x86" and node.name in nodes and node.op_type in MOVERS:
            owners.update(dict.fromkeys(node.output, owners.get(node.input[0], node.input[0])))
    return owners


def fused_side(add: NodeProto, index: GraphIndex) -> str | None:
    """The input of a residual Add that a convolution makes for it alone: TensorRT adds in that convolution."""
    for name in reversed(index.activations(add)):
        maker = index.producer.get(name)
        if maker is not None and maker.op_type in WEIGHT_AXIS and index.only_consumer(name) is not None:
            return name
    return None
