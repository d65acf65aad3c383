"""Tiny ONNX files with known outputs, for tests of what runs and reads foreign detectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_constant_detector(
    path: Path,
    outputs: Mapping[str, np.ndarray],
    input_shape: tuple[int | str, ...] = (1, 3, 64, 96),
    metadata: Mapping[str, str] | None = None,
    input_type: str = "FLOAT",
) -> Path:
    """An ONNX file that answers every image with the same arrays; a tensor "inner" (1, 3, H, W) can be tapped."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = getattr(TensorProto, input_type)
    nodes, weights, infos = [], [], []
    for name, array in outputs.items():
        weights.append(numpy_helper.from_array(np.ascontiguousarray(array), f"{name}.value"))
        nodes.append(helper.make_node("Identity", [f"{name}.value"], [name]))
        infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    nodes.append(helper.make_node("Relu", ["images"], ["inner"]))
    nodes.append(helper.make_node("ReduceMax", ["inner"], ["unused"], keepdims=0))
    graph = helper.make_graph(
        nodes, "toy", [helper.make_tensor_value_info("images", kind, input_shape)], infos, weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if metadata:
        helper.set_model_props(model, dict(metadata))
    onnx.save(model, str(path))
    return path
