"""The form that engines are built from: decoded boxes and scores, cut to a fixed number of candidates.

NMS inside an engine has output sizes that depend on the picture, which CUDA graphs cannot hold, so it stays outside,
and a TopK makes what is copied back small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import ExportError, UserError
from edgekd.export.graph import copy_of, prune
from edgekd.postprocess import PRE_NMS_TOP_K

if TYPE_CHECKING:
    from onnx import ModelProto

LARGEST_K = 3839
"""TensorRT's TopK takes no more than 3,840."""
CANDIDATES = PRE_NMS_TOP_K
"""The rows whose best score is highest. The best N (box, class) pairs lie in the best N rows, so selection, which
takes `PRE_NMS_TOP_K` pairs, gives what it would have given on all rows."""


def with_top_candidates(model: ModelProto, names: tuple[str, str], count: int = CANDIDATES) -> ModelProto:
    """A copy whose outputs are the best `count` candidates: boxes (B, count, 4) and scores (B, count, K), best first.

    A model with no more candidates than that comes back as it is.

    Args:
        names: its boxes (B, P, 4) and scores (B, P, K); the outputs keep these names.

    Raises:
        UserError: `count` is more than TensorRT's TopK takes.
        ExportError: the number of candidates is not fixed in the graph.
    """
    from onnx import checker

    if not 0 < count <= LARGEST_K:
        raise UserError("too many candidates for an engine", got=count, expected=f"1 to {LARGEST_K}")
    shapes = {
        output.name: [dim.dim_value for dim in output.type.tensor_type.shape.dim] for output in model.graph.output
    }
    if any(len(shapes.get(name, ())) != 3 or shapes[name][1] < 1 for name in names):
        raise ExportError(
            "the number of candidates is not fixed in the graph",
            got={name: shapes.get(name) for name in names},
            expected="boxes (B, P, 4) and scores (B, P, K)",
        )
    if shapes[names[1]][1] <= count:
        return model
    copy = copy_of(model)
    for node in copy.graph.node:
        for field in (node.input, node.output):
            for position, name in enumerate(field):
                if name in names:
                    field[position] = f"all_{name}"
    _append(copy, names, count, batch=shapes[names[1]][0])
    for output in copy.graph.output:
        if output.name in names:
            output.type.tensor_type.shape.dim[1].dim_value = count
    del copy.graph.value_info[:]
    prune(copy)
    try:
        checker.check_model(copy, full_check=True)
    except (checker.ValidationError, RuntimeError) as error:
        raise ExportError("appending TopK failed", got=f"{type(error).__name__}: {error}") from error
    return copy


def _append(model: ModelProto, names: tuple[str, str], count: int, batch: int) -> None:
    """Operators that TensorRT 8.6 has too: Gather where the batch is 1, GatherND where it is more or open."""
    from onnx import helper, numpy_helper

    def constant(name: str, value: list[int]) -> str:
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"topk_{name}"))
        return f"topk_{name}"

    def add(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        node = helper.make_node(operator, inputs, outputs, name=f"topk_{outputs[0]}_op", **attributes)
        model.graph.node.append(node)

    boxes, scores = names
    from_18 = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")) >= 18
    if from_18:  # axes became an input
        add("ReduceMax", [f"all_{scores}", constant("class_axis", [2])], ["topk_best"], keepdims=0)
    else:
        add("ReduceMax", [f"all_{scores}"], ["topk_best"], axes=[2], keepdims=0)
    add("TopK", ["topk_best", constant("count", [count])], ["topk_values", "topk_at"], axis=1, largest=1, sorted=1)
    if batch == 1:
        add("Squeeze", ["topk_at", constant("batch_axis", [0])], ["topk_rows"])
        for name in (boxes, scores):
            add("Gather", [f"all_{name}", "topk_rows"], [name], axis=1)
    else:
        add("Unsqueeze", ["topk_at", constant("last_axis", [2])], ["topk_rows"])
        for name in (boxes, scores):
            add("GatherND", [f"all_{name}", "topk_rows"], [name], batch_dims=1)
