"""Precision on weakly typed networks: flags say which formats TensorRT may use, and it picks the fastest for each layer.

Left alone it picks float16 for decoding too, whose steps are half a pixel from 512 on, and for sums of squares, which
pass float16's 65,504. So wherever float16 is allowed, those layers are held in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgekd.runtimes.trt_api import optional

NO_TF32 = "no TF32"
_ONLY = "TensorRT 8 and 10"
_OF_THEIR_OWN = ("CONSTANT", "SHAPE", "IDENTITY", "CAST", "QUANTIZE", "DEQUANTIZE")
"""Layers whose types the graph gives."""
_CONVOLUTIONS = ("CONVOLUTION", "DECONVOLUTION")
_SUMS = ("REDUCE", "UNARY", "SOFTMAX")


def precision_flags(precision: str, *, half_inside: bool, strongly_typed: bool) -> list[str]:
    """What to tell the builder of a graph's precision.

    A strongly typed network takes no precision flags; a weakly typed int8 one may use float16 for what is not int8,
    as it would be slower than float16 otherwise.

    Args:
        precision: "fp32", "fp16" or "int8". half_inside: float16 tensors are in the graph.
    """
    flags = [NO_TF32] if precision == "fp32" else []  # a baseline in fp32 should not be in TF32's 10 bits
    if strongly_typed:
        return flags
    if precision == "int8":
        flags.append("INT8")
    if precision != "fp32" or half_inside:
        flags.append("FP16")
    return flags


def set_precision(trt: Any, network: Any, config: Any, flags: Sequence[str]) -> list[str]:
    """Set flags of `precision_flags`, and hold in float32 what float16 would spoil; returns all flags that were set."""
    if NO_TF32 in flags:
        config.clear_flag(trt.BuilderFlag.TF32)
    if "INT8" in flags:
        config.set_flag(optional(trt.BuilderFlag, "INT8", _ONLY))
    if "FP16" in flags:
        config.set_flag(optional(trt.BuilderFlag, "FP16", _ONLY))
    if "FP16" not in flags or not _hold_in_float(trt, network):
        return [*flags]
    config.set_flag(optional(trt.BuilderFlag, "PREFER_PRECISION_CONSTRAINTS", _ONLY))
    return [*flags, "PREFER_PRECISION_CONSTRAINTS"]


def _hold_in_float(trt: Any, network: Any) -> int:
    """Ask float32 of layers; returns how many.

    Where convolutions are float16 in the graph, every float32 layer is meant to be one. Elsewhere (int8 graphs) it is
    what comes after the last convolution, and sums of squares before it.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    typed = any(layer.type.name in _CONVOLUTIONS and _makes(layer, trt.DataType.HALF) for layer in layers)
    leading = _leading_to_convolutions(layers)
    held = 0
    for index, layer in enumerate(layers):
        if layer.type.name in _OF_THEIR_OWN or not _makes(layer, trt.DataType.FLOAT):
            continue
        if typed or index not in leading or layer.type.name in _SUMS or _is_square(layer):
            optional(layer, "precision", _ONLY)
            layer.precision = trt.DataType.FLOAT
            for output in range(layer.num_outputs):
                if layer.get_output(output).dtype == trt.DataType.FLOAT:
                    optional(layer, "set_output_type", _ONLY)(output, trt.DataType.FLOAT)
            held += 1
    return held


def _makes(layer: Any, kind: Any) -> bool:
    return any(layer.get_output(index).dtype == kind for index in range(layer.num_outputs))


def _leading_to_convolutions(layers: Sequence[Any]) -> set[int]:
    """Indices of convolutions and of all layers whose output one of them needs; layers stand in topological order."""
    needed: set[str] = set()
    found = set()
    for index in reversed(range(len(layers))):
        layer = layers[index]
        outputs = {layer.get_output(output).name for output in range(layer.num_outputs)}
        if layer.type.name in _CONVOLUTIONS or outputs & needed:
            edges = (layer.get_input(number) for number in range(layer.num_inputs))
            needed.update(edge.name for edge in edges if edge is not None)
            found.add(index)
    return found


def _is_square(layer: Any) -> bool:
    """x * x, as sums of squares begin with."""
    if layer.type.name != "ELEMENTWISE" or layer.num_inputs != 2:
        return False
    return bool(layer.get_input(0).name == layer.get_input(1).name)
