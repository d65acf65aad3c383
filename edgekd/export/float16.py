"""Weights and compute in float16, with float32 inputs and outputs, and decoding in float32.

Our own conversion, since the known ones put a float16 round trip between every two nodes that are to stay float32,
and pixel coordinates suffer: float16 has steps of half a pixel between 512 and 1024.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import ExportError
from edgekd.export.graph import (
    GraphIndex,
    constants_as_weights,
    copy_of,
    prune,
    raw_tensors,
    replace_nodes,
    set_metadata,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT_OPERATORS = (
    *("ReduceL2", "ReduceSumSquare", "ReduceSum", "ReduceMean", "Pow", "Sqrt", "Exp", "Softmax", "Cast"),
    *("Constant", "ConstantOfShape", "EyeLike", "Range"),
)
"""Sums of squares pass float16's 65,504 easily (SSD's L2Norm over 512 channels does), so these stay float32. What makes
values out of nothing says their type itself, and Range knows no float16."""

LARGEST = float(np.finfo(np.float16).max)
_FLOAT_INPUTS = {"Resize": (1, 2)}
"""Inputs that the operator defines as float32 whatever the data's type."""


def to_float16(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """A copy of an fp32 model whose detector (all that its raw outputs depend on) computes in float16.

    Args:
        kept: names of nodes that stay float32.

    Raises:
        ExportError: a weight does not fit in float16, types cannot be inferred, or the result does not pass the checker.
    """
    from onnx import checker, shape_inference

    copy = copy_of(model)
    constants_as_weights(copy)
    try:
        _Converter(shape_inference.infer_shapes(copy, strict_mode=True), kept).convert(copy)
        prune(copy)
        del copy.graph.value_info[:]
        checker.check_model(copy, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError, RuntimeError) as error:
        raise ExportError("converting to fp16 failed", got=f"{type(error).__name__}: {error}") from error
    set_metadata(copy, {"edgekd.precision": "fp16"})
    return copy


def overflow(half: ModelProto, peaks: Mapping[str, float]) -> tuple[str, float] | None:
    """The tensor that goes furthest beyond float16's range in a model of `to_float16`: (name, magnitude); None for none.

    To run it does not tell: ONNX Runtime's CPU provider computes float16 in float32, and hands that on.

    Args:
        peaks: tensor of the fp32 model to its largest magnitude.
    """
    from onnx import TensorProto, shape_inference

    infos = shape_inference.infer_shapes(half).graph.value_info
    names = (info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT16)
    found = [name if name in peaks else name.removesuffix("_half") for name in names]
    worst = max(found, key=lambda name: peaks.get(name, 0.0), default=None)
    return None if worst is None or peaks.get(worst, 0.0) <= LARGEST else (worst, peaks[worst])


class _Converter:
    def __init__(self, typed: ModelProto, kept: Collection[str]) -> None:
        from onnx import TensorProto

        self.index = GraphIndex(typed)
        infos = (*typed.graph.value_info, *typed.graph.input, *typed.graph.output)
        self.floats = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
        self.floats |= {tensor.name for tensor in typed.graph.initializer if tensor.data_type == TensorProto.FLOAT}
        body = self.index.before(raw_tensors(typed)) - set(kept)
        self.half = {node.name for node in typed.graph.node if node.name in body and self._can_be_half(node)}
        self.nodes: list[NodeProto] = []
        self.made: dict[tuple[str, bool], str] = {}

    def _can_be_half(self, node: NodeProto) -> bool:
        return node.op_type not in _FLOAT_OPERATORS and all(name in self.floats for name in node.output if name)

    def convert(self, model: ModelProto) -> None:
        """Rewrite the model's nodes: casts where float16 begins and ends, float16 copies of weights."""
        for node in model.graph.node:
            half = node.name in self.half
            copy = type(node).FromString(node.SerializeToString())
            fixed = _FLOAT_INPUTS.get(node.op_type, ())
            for position, name in enumerate(node.input):
                if name in self.floats:
                    copy.input[position] = self._as(model, name, half and position not in fixed)
            for position, name in enumerate(node.output):
                if half and name in self.index.outputs:
                    copy.output[position] = f"{name}_half"
            self.nodes.append(copy)
            for name in node.output:
                if half and name in self.index.outputs:
                    self._cast(f"{name}_half", name, half=False)
        replace_nodes(model, self.nodes)

    def _as(self, model: ModelProto, tensor: str, half: bool) -> str:
        """The name under which a tensor is there in this type, made where it is not yet."""
        maker = self.index.producer.get(tensor)
        is_half = maker is not None and maker.name in self.half and tensor not in self.index.outputs
        if is_half == half:
            return tensor
        if (tensor, half) not in self.made:
            name = f"{tensor}_{'half' if half else 'float'}"
            if self.index.is_constant(tensor):
                self._constant(model, tensor, name)
            else:
                self._cast(tensor, name, half=half)
            self.made[tensor, half] = name
        return self.made[tensor, half]

    def _constant(self, model: ModelProto, tensor: str, name: str) -> None:
        from onnx import numpy_helper

        value = self.index.constant(tensor)
        if value.size and not float(np.abs(value).max()) <= LARGEST:
            raise ExportError(
                "a weight does not fit in float16", got=f"{tensor}: up to {np.abs(value).max():g}", expected=LARGEST
            )
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float16), name))

    def _cast(self, source: str, name: str, *, half: bool) -> None:
        from onnx import TensorProto, helper

        to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.nodes.append(helper.make_node("Cast", [source], [name], name=f"{name}_cast", to=to))
