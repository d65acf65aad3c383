"""ONNX detectors to build engines of, and what the versions of TensorRT differ in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fake_tensorrt import FakeTensorRT

IMAGES = np.random.default_rng(3).normal(size=(4, 3, 64, 64)).astype(np.float32)
Machine = Callable[..., FakeTensorRT]
WEAK = ("8.5.3.1", "8.6.1", "10.3.0")
"""Versions that take precision as flags."""
HELD = "PREFER_PRECISION_CONSTRAINTS"


def moving_detector(batch: int | str = 1, candidates: int = 3000, classes: int = 3, opset: int = 17) -> onnx.ModelProto:
    """Boxes and scores that depend on the picture: the image's values laid out anew, then scores through a sigmoid."""
    columns = 4 + classes
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["features"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["features", "rows"], ["table"], "reshape"),
        helper.make_node("Slice", ["table", "zero", "four", "last"], ["corners"], "corners_slice"),
        helper.make_node("Slice", ["table", "four", "end", "last"], ["logits"], "logits_slice"),
        helper.make_node("Slice", ["corners", "zero", "two", "last"], ["first"], "first_slice"),
        helper.make_node("Slice", ["corners", "two", "four", "last"], ["size"], "size_slice"),
        helper.make_node("Abs", ["size"], ["extent"], "abs"),
        helper.make_node("Add", ["first", "extent"], ["second"], "second_add"),
        helper.make_node("Concat", ["first", "second"], ["boxes"], "boxes_concat", axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"], "sigmoid"),
    ]
    side = 64
    depth = -(-candidates * columns // side**2)
    nodes.insert(1, helper.make_node("Reshape", ["features", "flat"], ["flattened"], "flatten"))
    nodes.insert(2, helper.make_node("Slice", ["flattened", "zero", "used", "one"], ["trimmed"], "trim"))
    nodes[3].input[0] = "trimmed"
    weights = {
        "kernel": rng.normal(scale=0.2, size=(depth, 3, 3, 3)).astype(np.float32),
        "flat": np.array([0, -1], np.int64),
        "used": np.array([candidates * columns], np.int64),
        "rows": np.array([-1, candidates, columns], np.int64),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "four": np.array([4], np.int64),
        "end": np.array([columns], np.int64),
        "last": np.array([2], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "moving",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, side, side])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [batch, candidates, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, candidates, classes]),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def ours(model: onnx.ModelProto, path: Path, names: tuple[str, ...] = ("circle", "square", "star")) -> Path:
    """A model with our metadata, as a file."""
    preprocess = {"input_hw": [64, 64], "resize": "stretch", "mean": [0.5] * 3, "std": [0.5] * 3, "pad_value": 114}
    spec = {"model": "double", "class_names": list(names), "preprocess": preprocess, "width": 1.0, "options": {}}
    entries = {"schema": "edgekd.onnx/1", "spec": json.dumps(spec), "output": '{"kind": "boxes-scores"}'}
    helper.set_model_props(model, {f"edgekd.{key}": value for key, value in entries.items()})
    onnx.save(model, str(path))
    return path


def quantised(
    zero_point: int = 0, kind: type[np.generic] = np.int8, model: onnx.ModelProto | None = None
) -> onnx.ModelProto:
    """The moving detector with its convolution between pairs."""
    model = model or moving_detector()
    graph = model.graph
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(0.05, np.float32), "scale"),
            numpy_helper.from_array(np.array(zero_point, kind), "zero_point"),
        ]
    )
    pair = ["scale", "zero_point"]
    graph.node.insert(0, helper.make_node("QuantizeLinear", ["images", *pair], ["images_q"], "quantise"))
    graph.node.insert(1, helper.make_node("DequantizeLinear", ["images_q", *pair], ["images_d"], "dequantise"))
    graph.node[2].input[0] = "images_d"
    return model


def run_onnx(model: onnx.ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))
