"""Tiny detectors as real ONNX files, and a data set to run them on."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from edgekd.types import Dataset, ImageRecord

NAMES = ("round", "square")
SIDE = 64


def write_detector(path: Path, boxes: np.ndarray, scores: np.ndarray, width: int = 4) -> Path:
    """An ONNX detector of the kind edgekd exports that always answers the same, after one honest convolution.

    Args:
        boxes: (P, 4) xyxy in input pixels of 64 x 64. scores: (P, 2).
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def tensor(name: str, value: np.ndarray) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value, np.float32), name)

    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        helper.make_node("Mul", ["pooled", "zero"], ["nothing4"]),
        helper.make_node("ReduceMean", ["nothing4"], ["nothing"], axes=[1, 2], keepdims=0),
        helper.make_node("Add", ["boxes_value", "nothing"], ["boxes"]),
        helper.make_node("Add", ["scores_value", "nothing"], ["scores"]),
    ]
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        nodes,
        "double",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, len(boxes), 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, len(boxes), len(NAMES)]),
        ],
        [
            tensor("weight", rng.normal(size=(width, 3, 3, 3))),
            tensor("bias", np.zeros(width)),
            tensor("zero", np.zeros((1, 1, 1, 1))),
            tensor("boxes_value", np.asarray(boxes)[None]),
            tensor("scores_value", np.asarray(scores)[None]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    spec = {
        "model": "double",
        "class_names": list(NAMES),
        "preprocess": {
            "input_hw": [SIDE, SIDE],
            "resize": "stretch",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "pad_value": 114,
        },
        "width": 1.0,
        "options": {},
    }
    metadata = {
        "edgekd.schema": "edgekd.onnx/1",
        "edgekd.spec": json.dumps(spec),
        "edgekd.output": json.dumps({"kind": "boxes-scores"}),
        "edgekd.precision": "fp32",
        "edgekd.target": "x86",
        "edgekd.provenance": "{}",
    }
    helper.set_model_props(model, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def make_dataset(folder: Path, images: int = 12, class_names: tuple[str, ...] = NAMES) -> Dataset:
    """Pictures of 128 x 128 with the same two objects each, the second one missing in every third picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records = []
    for index in range(images):
        path = folder / f"im{index}.png"
        cv2.imwrite(str(path), rng.integers(0, 255, (128, 128, 3), np.uint8))
        count = 1 if index % 3 == 2 else 2
        boxes = np.array([[20, 20, 60, 60], [70, 70, 120, 120]], np.float32)[:count]
        none = np.zeros(count, bool)
        records.append(ImageRecord(f"im{index}", path, (128, 128), boxes, np.arange(count), none, none))
    return Dataset(folder, "voc", "val", class_names, tuple(records))


GOOD_BOXES = np.array([[10, 10, 30, 30], [35, 35, 60, 60], [0, 0, 5, 5]])
"""In input pixels: the objects' places at half size."""
GOOD_SCORES = np.array([[0.9, 0.0], [0.0, 0.8], [0.1, 0.1]])
POOR_SCORES = np.array([[0.6, 0.0], [0.0, 0.0], [0.9, 0.1]])
