"""Append NMS to an exported detector, so that one file goes from the image tensor to detections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.postprocess import PRE_NMS_TOP_K
from edgekd.selection import Selection

if TYPE_CHECKING:
    from onnx import ModelProto


def append_nms(model: ModelProto, thresholds: Selection) -> ModelProto:
    """A copy that ends in detections: "boxes" (N, 4) xyxy input pixels, "scores" (N,), "labels" (N,) int64, best first.

    Gives what `edgekd.postprocess.select` gives on the same boxes and scores: class-wise NMS over the best
    `PRE_NMS_TOP_K` (box, class) pairs. Standard operators alone. A dynamic batch becomes a batch of 1, since
    detections of several images do not fit these outputs.

    Args:
        model: with outputs "boxes" (1, P, 4) and "scores" (1, P, K).
    """
    from onnx import TensorProto, checker, helper

    from edgekd.export.graph import copy_of, opset_of, strip_notes

    model = copy_of(model)
    graph = model.graph
    for info in (*graph.input, *graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 1
    scores = next(output for output in graph.output if output.name == "scores")
    _, boxes, classes = (dim.dim_value for dim in scores.type.tensor_type.shape.dim)
    for node in graph.node:  # the decoded tensors give their names to the new outputs
        for field in (node.input, node.output):
            for position, name in enumerate(field):
                if name in ("boxes", "scores"):
                    field[position] = f"decoded_{name}"
    _append_selection(model, thresholds, pairs=boxes * classes)
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["detections", 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["detections"]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["detections"]),
        ]
    )
    del graph.value_info[:]
    strip_notes(model)
    assert opset_of(model) >= 13  # the operators below take axes as inputs since then
    checker.check_model(model, full_check=True)
    return model


def _append_selection(model: ModelProto, thresholds: Selection, pairs: int) -> None:
    from onnx import helper, numpy_helper

    graph = model.graph

    def constant(name: str, value: float | int | list[float] | list[int], kind: type[np.generic]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value, kind), f"nms_{name}"))
        return f"nms_{name}"

    def add(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        graph.node.append(helper.make_node(op, inputs, outputs, name=f"nms_{outputs[0]}_op", **attributes))
        return outputs[0]

    add("Transpose", ["decoded_scores"], ["nms_by_class"], perm=[0, 2, 1])
    threshold = constant("threshold", [thresholds.score_threshold], np.float32)
    if pairs > PRE_NMS_TOP_K:  # only scores above that of the first pair left out may enter
        flat = add("Reshape", ["decoded_scores", constant("flat", [-1], np.int64)], ["nms_pairs"])
        add("TopK", [flat, constant("candidates", [PRE_NMS_TOP_K + 1], np.int64)], ["nms_top", "nms_top_at"])
        last = add("Gather", ["nms_top", constant("last", [PRE_NMS_TOP_K], np.int64)], ["nms_left_out"])
        threshold = add("Max", [threshold, last], ["nms_score_threshold"])
    limit = constant("limit", [thresholds.max_detections], np.int64)
    overlap = constant("iou", [thresholds.nms_iou], np.float32)
    # Boxes are read as (y1, x1, y2, x2), but IoU is the same with the axes swapped.
    add("NonMaxSuppression", ["decoded_boxes", "nms_by_class", limit, overlap, threshold], ["nms_selected"])
    found = add("GatherND", ["nms_by_class", "nms_selected"], ["nms_scores"])
    count = add("Shape", [found], ["nms_count"])
    keep = add("Min", [count, limit], ["nms_keep"])
    add("TopK", [found, keep], ["scores", "nms_order"], axis=0, largest=1, sorted=1)
    best = add("Gather", ["nms_selected", "nms_order"], ["nms_best"], axis=0)
    add("Gather", [best, constant("class_column", 1, np.int64)], ["labels"], axis=1)
    rows = add("Gather", [best, constant("box_column", 2, np.int64)], ["nms_rows"], axis=1)
    squeezed = add("Squeeze", ["decoded_boxes", constant("batch_axis", [0], np.int64)], ["nms_boxes"])
    add("Gather", [squeezed, rows], ["boxes"], axis=0)
