"""A linter for Q/DQ graphs: what a target would refuse, or would quietly run in float."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgekd.export.graph import GraphIndex, metadata_of, raw_tensors
from edgekd.export.placement import Target, is_weighted

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

INT8_KEY = "edgekd.int8"
"""Metadata: JSON facts on an int8 model; "float_stem" and "kept_float" list nodes that are float on purpose."""


_INTEGER_OPERATORS = ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
"""What `quantize_dynamic` and the QOperator format of ONNX Runtime write instead of pairs."""


@dataclass(frozen=True)
class Finding:
    """One thing wrong: `code` is stable, such as "zero-point"; `where` names a node; `message` says why it matters."""

    code: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.where}: {self.message}"


def lint_qdq(model: ModelProto, target: Target | None = None) -> list[Finding]:
    """Everything wrong with an int8 model for its target; empty when clean.

    Args:
        target: "x86" or "tensorrt"; what the metadata says if left out, "x86" if it says nothing.
    """
    if target is None:
        target = "tensorrt" if metadata_of(model).get("edgekd.target") == "tensorrt" else "x86"
    index = GraphIndex(model)
    findings: list[Finding] = []
    for node in model.graph.node:
        if target == "tensorrt" and node.op_type in _INTEGER_OPERATORS:
            findings.append(
                Finding("operator", node.name, f"TensorRT has no {node.op_type}: it takes Q/DQ pairs alone")
            )
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            findings += _parameters(node, index, target)
            findings += _wiring(node, index)
        elif node.op_type == "Add" and target == "tensorrt":
            findings += _residual(node, index)
    findings += _convolutions(model, index, target)
    extra = sorted({entry.domain for entry in model.opset_import} - {"", "ai.onnx"})
    if extra:
        findings.append(Finding("opset-domain", ", ".join(extra), "operator domains other than ONNX's own"))
    return findings


def _parameters(node: NodeProto, index: GraphIndex, target: Target) -> Iterator[Finding]:
    if not all(index.is_constant(name) for name in node.input[1:]):
        yield Finding("dynamic-scale", node.name, "scale or zero point is not a constant")
        return
    scale = index.constant(node.input[1])
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield Finding("scale", node.name, "a scale is not a positive finite number")
    if len(node.input) < 3:
        kind, zero_point = "uint8", np.zeros(1, np.uint8)  # ONNX's default
    else:
        zero_point = index.constant(node.input[2])
        kind = zero_point.dtype.name
    on_weights = node.op_type == "DequantizeLinear" and _is_weight(node.input[0], index)
    if kind == "int32":
        if target == "tensorrt":
            yield Finding("int32-bias", node.name, "TensorRT refuses an int32 bias: it must stay float")
        return
    if (target == "tensorrt" or on_weights) and zero_point.any():
        yield Finding("zero-point", node.name, f"zero point {int(np.abs(zero_point).max())}, must be 0")
    if not on_weights and scale.ndim == 0:
        wanted = "int8" if target == "tensorrt" else "uint8"
        if kind != wanted:
            slow = "TensorRT takes signed activations only" if target == "tensorrt" else "signed ones are slower on x86"
            yield Finding("activation-type", node.name, f"activations are {kind}, not {wanted}: {slow}")


def _is_weight(tensor: str, index: GraphIndex) -> bool:
    maker = index.producer.get(tensor)
    return index.is_constant(tensor) or (maker is not None and index.is_constant(maker.input[0]))


def _wiring(node: NodeProto, index: GraphIndex) -> Iterator[Finding]:
    readers = index.consumers.get(node.output[0], [])
    if node.op_type == "QuantizeLinear":
        if len(readers) == 1 and readers[0].op_type == "Pad":  # zero channels for a fast first convolution
            readers = index.consumers.get(readers[0].output[0], [])
        if not readers or any(reader.op_type != "DequantizeLinear" for reader in readers):
            yield Finding("dangling", node.name, "a QuantizeLinear whose output is not read by DequantizeLinear alone")
        return
    maker = _maker(node.input[0], index)
    if not index.is_constant(node.input[0]) and (maker is None or maker.op_type != "QuantizeLinear"):
        yield Finding("dangling", node.name, "a DequantizeLinear that reads neither QuantizeLinear nor a constant")
    if not readers and node.output[0] not in index.outputs:
        yield Finding("dangling", node.name, "a DequantizeLinear that nothing reads")
    if maker is not None and maker.op_type == "QuantizeLinear":
        pairs = zip(maker.input[1:], node.input[1:], strict=False)
        if any(not np.array_equal(index.constant(a), index.constant(b)) for a, b in pairs if a != b):
            yield Finding("mismatch", node.name, "scale or zero point differ from those of its QuantizeLinear")


def _maker(tensor: str, index: GraphIndex) -> NodeProto | None:
    """The node behind a stored tensor, looking through the padding of its channels."""
    maker = index.producer.get(tensor)
    return index.producer.get(maker.input[0]) if maker is not None and maker.op_type == "Pad" else maker


def _residual(node: NodeProto, index: GraphIndex) -> Iterator[Finding]:
    """Both sides of an Add behind pairs: TensorRT cannot add inside the convolution."""
    sources = []
    for name in node.input:
        maker = index.producer.get(name)
        quantiser = index.producer.get(maker.input[0]) if maker and maker.op_type == "DequantizeLinear" else None
        if quantiser is None:
            return
        sources.append(index.producer.get(quantiser.input[0]))
    for source in sources:
        if source is not None and source.op_type == "Conv" and index.only_consumer(source.output[0]) is not None:
            yield Finding("residual", node.name, "a pair between a convolution and its Add keeps TensorRT from fusing")
            return


def _convolutions(model: ModelProto, index: GraphIndex, target: Target) -> Iterator[Finding]:
    facts = json.loads(metadata_of(model).get(INT8_KEY, "{}"))
    kept = {*facts.get("float_stem", ()), *facts.get("kept_float", ())}
    body = index.before(raw_tensors(model))
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose") or node.name in kept or node.name not in body:
            continue
        if is_weighted(node, index) or not _dequantised(node.input[0], index) or not _dequantised(node.input[1], index):
            if node.op_type == "Conv" or target == "tensorrt":
                yield Finding("float-conv", node.name, "a convolution that runs in float and is not listed as kept")
        elif target == "x86" and not all(
            reader.op_type == "QuantizeLinear" for reader in index.consumers.get(node.output[0], [])
        ):
            yield Finding("unfused", node.name, "no QuantizeLinear behind it: ONNX Runtime would run it in float")


def _dequantised(tensor: str, index: GraphIndex) -> bool:
    maker = index.producer.get(tensor)
    return maker is not None and maker.op_type == "DequantizeLinear"
