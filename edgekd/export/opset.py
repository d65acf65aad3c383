"""Bring a model to opset 17, the oldest that we offer, by rules for the operators that opset 18 changed.

torch's exporter writes opset 18. The public converters give up on Pad or leave attributes of 18 in a file that says 17,
which newer runtimes accept and older ones (TensorRT 8) do not; so the few rules stand here, and what they do not
cover is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import ArtifactError, ExportError, UserError
from edgekd.export.graph import GraphIndex, opset_of, prune

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

NATIVE = 18
"""What torch's exporter writes."""

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_NEW_IN_18: dict[str, dict[str, Any]] = {
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "Split": {},
    **{f"Reduce{name}": {"noop_with_empty_axes": 0} for name in _REDUCTIONS},
}
"""Attributes that opset 18 brought, with the value at which they change nothing."""


def require_opset(opset: int) -> None:
    """Refuse an opset that what is installed here cannot write or check, before there is any work for it.

    Raises:
        UserError: onnx or ONNX Runtime does not know it.
    """
    if opset <= NATIVE or _is_known(opset):
        return
    from onnx import defs

    newest = next((known for known in range(defs.onnx_opset_version(), NATIVE, -1) if _is_known(known)), NATIVE)
    raise UserError("the opset is not one that onnx and ONNX Runtime know here", got=opset, expected=f"17 to {newest}")


def _is_known(opset: int) -> bool:
    """Whether a file of this opset loads."""
    from onnx import TensorProto, defs, helper

    from edgekd.runtimes.ort import OrtRuntime

    if opset > defs.onnx_opset_version():
        return False
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in ("images", "same")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["same"])], "opset", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    try:
        OrtRuntime(model.SerializeToString(), threads=1).close()
    except ArtifactError:
        return False
    return True


def to_opset_17(model: ModelProto) -> ModelProto:
    """Rewrite a model of opset 18 in place.

    Raises:
        ExportError: it uses what opset 17 cannot say.
    """
    if opset_of(model) != NATIVE:
        raise ExportError("only opset 18 can be brought to 17", got=f"opset {opset_of(model)}")
    index = GraphIndex(model)
    for node in model.graph.node:
        for name, neutral in _NEW_IN_18.get(node.op_type, {}).items():
            _drop_attribute(node, name, neutral)
        if node.op_type.removeprefix("Reduce") in _REDUCTIONS and node.op_type.startswith("Reduce"):
            _axes_as_attribute(node, index)
        elif node.op_type == "Split":
            _split_evenly(node)
        elif node.op_type == "Pad" and len(node.input) > 3 and node.input[3]:
            raise _inexpressible(node, "Pad with axes")
        elif node.op_type == "Resize" and any(attribute.name == "axes" for attribute in node.attribute):
            raise _inexpressible(node, "Resize with axes")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = 17
    prune(model)
    return model


def _axes_as_attribute(node: NodeProto, index: GraphIndex) -> None:
    from onnx import helper

    if len(node.input) < 2 or not node.input[1]:
        return
    if not index.is_constant(node.input[1]):
        raise _inexpressible(node, "axes that are computed")
    node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in index.constant(node.input[1])]))
    del node.input[1:]


def _split_evenly(node: NodeProto) -> None:
    """Opset 17 splits evenly unless told otherwise, and the checker sees to it that it can."""
    for attribute in list(node.attribute):
        if attribute.name == "num_outputs":
            if attribute.i != len(node.output):
                raise _inexpressible(node, "fewer outputs than parts")
            node.attribute.remove(attribute)


def _drop_attribute(node: NodeProto, name: str, neutral: Any) -> None:
    from onnx import helper

    for attribute in list(node.attribute):
        if attribute.name == name:
            if not np.array_equal(helper.get_attribute_value(attribute), neutral):
                raise _inexpressible(node, name)
            node.attribute.remove(attribute)


def _inexpressible(node: NodeProto, what: str) -> ExportError:
    return ExportError(
        "this detector cannot be written in opset 17",
        got=f"{what}, at {node.op_type} {node.name}",
        fix="export with opset 18",
    )
