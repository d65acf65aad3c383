"""The layers of an ONNX graph that cost something: multiply-accumulates and bytes of each, from shapes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
_OPERANDS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger"), (0, 1)),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), (0, 3)),  # scale and zero point follow each operand
}
"""Operators that are counted, and which inputs are multiplied; the second holds the weights where there are any."""
_CONVERTING = ("QuantizeLinear", "DequantizeLinear", "Cast")
"""Operators through which weights reach their layer: stored as int8, as floats that are quantised first, or as halves."""
_FUSED = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "Add")
"""Operators that runtimes compute within the layer before them, which then goes by what they give out."""


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product.

    Attributes:
        names: its node's name, its output's, and those of what a runtime may fuse behind it: runtimes keep one of them.
        macs: multiply-accumulates of one inference. None where a shape is open.
        bytes: least traffic: weights once, input read, output written, all as wide as the weights are stored.
    """

    names: tuple[str, ...]
    op: str
    macs: int | None
    bytes: int | None


def read_layers(file: Path, input_hw: tuple[int, int] | None = None) -> tuple[Layer, ...]:
    """The layers of an ONNX file; its external data is not read.

    Args:
        input_hw: the size it runs at where the graph leaves it open.
    """
    import onnx

    return graph_layers(inferred(onnx.load(str(file), load_external_data=False), input_hw))


def inferred(model: Any, input_hw: tuple[int, int] | None) -> Any:
    """The graph of a model with the shapes of its inner tensors, as far as they can be found out."""
    import onnx

    _fix_input(model.graph, input_hw)
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # shape inference is a courtesy: a graph that it rejects may still run
        return model.graph


def graph_layers(graph: Any) -> tuple[Layer, ...]:
    """The layers of a graph with inferred shapes, in its order."""
    shapes, stored = _shapes(graph), stored_shapes(graph)
    widths = _widths(graph)
    readers = _readers(graph)
    found = []
    for node in graph.node:
        if node.op_type in _OPERANDS:
            names = tuple(name for name in (node.name, node.output[0], *_fused_outputs(node, readers)) if name)
            macs, moved = _macs(node, shapes, stored), _bytes(node, shapes, stored, widths)
            found.append(Layer(names, node.op_type, macs, moved))
    return tuple(found)


def _readers(graph: Any) -> dict[str, list[Any]]:
    """Tensor name to the nodes that read it."""
    found: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            found[name].append(node)
    return found


def _fused_outputs(node: Any, readers: Mapping[str, list[Any]]) -> list[str]:
    """What is given out by the activations and additions behind a layer that read nothing but it, in their order."""
    found: list[str] = []
    name = node.output[0]
    while len(behind := readers.get(name, [])) == 1 and behind[0].op_type in _FUSED:
        name = behind[0].output[0]
        found.append(name)
    return found


def stored_shapes(graph: Any) -> dict[str, Shape]:
    """Shapes of tensors that the file holds, also under the names that they have once converted, in the graph's order."""
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    stored.update({node.output[0]: _constant_shape(node) for node in graph.node if node.op_type == "Constant"})
    for node in graph.node:
        if node.op_type in _CONVERTING and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    return stored


def _widths(graph: Any) -> dict[str, int]:
    """Bytes a value of stored tensors: 1 for int8, also behind a DequantizeLinear, 2 for float16, else 4."""
    import onnx

    types = onnx.TensorProto
    narrow = {types.FLOAT16: 2, types.INT8: 1, types.UINT8: 1}
    widths = {tensor.name: narrow.get(tensor.data_type, 4) for tensor in graph.initializer}
    return widths | {node.output[0]: 1 for node in graph.node if node.op_type == "DequantizeLinear"}


def _macs(node: Any, shapes: Mapping[str, Shape], stored: Mapping[str, Shape]) -> int | None:
    data, weights = (node.input[position] for position in _OPERANDS[node.op_type])
    weight = stored.get(weights) or shapes.get(weights)
    source, out = shapes.get(data) or stored.get(data), shapes.get(node.output[0])
    if not weight or not source or not out:
        return None
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
        return prod(out) * prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return prod(source) * prod(weight[1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return prod(out) * source[-2 if transposed else -1]


def _bytes(
    node: Any, shapes: Mapping[str, Shape], stored: Mapping[str, Shape], widths: Mapping[str, int]
) -> int | None:
    data, weights = (node.input[position] for position in _OPERANDS[node.op_type])
    sizes = [stored.get(name) or shapes.get(name) for name in (data, weights, node.output[0])]
    width = widths.get(weights, 4)
    return None if None in sizes else sum(prod(size) * width for size in sizes if size is not None)


def _fix_input(graph: Any, input_hw: tuple[int, int] | None) -> None:
    """Give the open dimensions of an image input their values, and drop what was derived from them."""
    for info in graph.input:
        dims = info.type.tensor_type.shape.dim
        if len(dims) != 4 or all(d.dim_value for d in dims):
            continue
        height, width = input_hw or (0, 0)
        channels_last = dims[3].dim_value == 3 and dims[1].dim_value != 3  # as TensorFlow's
        values = (1, height, width, 3) if channels_last else (1, 3, height, width)
        for dim, value in zip(dims, values, strict=True):
            if not dim.dim_value and value:
                dim.dim_value = value
        del graph.value_info[:]
        for output in graph.output:
            output.type.tensor_type.ClearField("shape")


def _shapes(graph: Any) -> dict[str, Shape]:
    """Static shapes by tensor name, batch of one where only the batch is open."""
    found = {}
    for info in (*graph.value_info, *graph.input, *graph.output):
        dims = [d.dim_value if d.HasField("dim_value") else 0 for d in info.type.tensor_type.shape.dim]
        if dims and dims[0] == 0:
            dims[0] = 1
        if dims and all(dims):
            found[info.name] = tuple(dims)
    return found


def _constant_shape(node: Any) -> Shape:
    return next((tuple(a.t.dims) for a in node.attribute if a.name == "value"), ())
