"""A detector as a list of torch calls, and names of its tensors that its ONNX graph shares.

ONNX tensors are called as the exporter pleases, so the same tensor is found again by what it is: the input or the output
of a convolution, which both sides know by the name of its weights, or what an operator makes of such tensors.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from edgekd.detectors.base import Detector
from edgekd.errors import ExportError
from edgekd.export.graph import GraphIndex
from edgekd.export.placement import is_weighted

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_PREFIX, _SUFFIX = "detector.", ".weight"
_ONNX_KINDS = {"Relu": "Clip"}
_TORCH_KINDS = {
    **{"add": "Add", "mul": "Mul", "sigmoid": "Sigmoid", "leaky_relu": "LeakyRelu", "cat": "Concat", "pad": "Pad"},
    **{"max_pool2d": "MaxPool", "avg_pool2d": "AveragePool", "upsample_nearest2d": "Resize"},
    **dict.fromkeys(("relu", "relu6", "hardtanh", "clamp", "clamp_min"), "Clip"),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), "Split"),
}


@dataclass(frozen=True)
class _Step:
    """An operator in words that ONNX and torch share; `conv` is a convolution's path in the detector."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    conv: str = ""


def _described(steps: Sequence[_Step]) -> dict[str, str]:
    """Every tensor to its description, such as "Sigmoid(output of stem.0)"."""
    read: dict[str, str] = {}
    for step in steps:
        if step.conv:
            read[step.inputs[0]] = min(step.conv, read.get(step.inputs[0], step.conv))
    found: dict[str, str] = {}
    for step in steps:
        inputs = [found.get(name, name) for name in step.inputs]
        listed = ", ".join(sorted(inputs) if step.kind in ("Add", "Mul") else inputs)
        made = f"output of {step.conv}" if step.conv else f"{step.kind}({listed})"
        for position, name in enumerate(step.outputs):
            part = f"{made}[{position}]" if step.kind == "Split" else made
            found[name] = f"input of {read[name]}" if name in read else part
    return found


def describe_tensors(model: ModelProto, tensors: Iterable[str]) -> dict[str, str]:
    """Tensors of a traced model to descriptions, which are the same in every trace of a detector.

    Raises:
        ExportError: two of the tensors have the same one.
    """
    index = GraphIndex(model)
    steps = [_Step("Input", (), (entry.name,)) for entry in model.graph.input]
    for node in model.graph.node:
        kind = _ONNX_KINDS.get(node.op_type, node.op_type)
        steps.append(_Step(kind, tuple(index.activations(node)), tuple(node.output), conv_path(node, index)))
    described, found = _described(steps), dict[str, str]()
    for name in tensors:
        twin = found.setdefault(described[name], name)
        if twin != name:
            raise ExportError(
                "two tensors of the exported graph cannot be told apart", got=f"{twin} and {name}: {described[name]}"
            )
    return {name: description for description, name in found.items()}


def conv_path(node: NodeProto, index: GraphIndex) -> str:
    """The path in the detector of a node's weights, without ".weight"; empty if it is no convolution of the detector's."""
    if not is_weighted(node, index) or not node.input[1].startswith(_PREFIX):
        return ""
    return str(node.input[1].removeprefix(_PREFIX).removesuffix(_SUFFIX))


class _Raw(nn.Module):
    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.detector(images)
        raw = (output.cls_logits, output.bbox_regression)
        return raw if output.objectness is None else (*raw, output.objectness)


class Program:
    """What `Detector.forward` calls in eval mode, for any batch size; SiLU as a sigmoid and a product.

    Args:
        detector: in eval mode.

    Raises:
        ExportError: torch cannot capture it, or it makes constants that are neither parameters nor buffers.

    Attributes:
        steps: the calls, in order. convs: those of convolutions, to the path in the detector and the BatchNorm behind.
        norms: these BatchNorms. results: what the raw outputs are, as `DetectorOutput` takes them.
    """

    def __init__(self, detector: Detector) -> None:
        h, w = detector.spec.preprocess.input_hw
        batch = torch.zeros(2, 3, h, w)  # 2, since a dimension of 1 is taken for a constant
        try:
            with torch.no_grad():
                program = torch.export.export(
                    _Raw(detector), (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},)
                )
        except Exception as error:
            raise ExportError(
                f"torch cannot capture {detector.spec.model}", got=f"{type(error).__name__}: {error}"
            ) from error
        signature = program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._graph: Graph = program.graph_module.graph
        _split_silu(self._graph)
        placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
        self._stored = {node: stored[node.name].removeprefix(_PREFIX) for node in placeholders if node.name in stored}
        fed = [node for node in placeholders if node not in self._stored and node.users]
        if [node.name for node in fed] != list(signature.user_inputs):
            raise ExportError(
                f"{detector.spec.model} makes constants in its forward pass", got=fed, expected="registered buffers"
            )
        self._images = fed[0]
        self.steps = [node for node in self._graph.nodes if node.op == "call_function"]
        self.results: tuple[Node, ...] = next(node for node in self._graph.nodes if node.op == "output").args[0]
        self.convs: dict[Node, tuple[str, Node | None]] = {}
        for node in self.steps:
            if _operator(node) == "conv2d" and node.args[1] in self._stored:
                readers = list(node.users)
                norm = readers[0] if len(readers) == 1 and _operator(readers[0]) == "batch_norm" else None
                self.convs[node] = (self._stored[node.args[1]].removesuffix(_SUFFIX), norm)
        self.norms = {norm for _, norm in self.convs.values() if norm is not None}

    def inputs(self, detector: nn.Module, images: Tensor) -> dict[Node, Any]:
        """The values that the calls start from: images (B, 3, H, W), and the detector's parameters and buffers."""
        state: dict[str, Tensor] = {**dict(detector.named_parameters()), **dict(detector.named_buffers())}
        return {self._images: images, **{node: state[name] for node, name in self._stored.items() if node.users}}

    def find(self, descriptions: Mapping[str, str]) -> dict[Node, str]:
        """The calls that make the tensors described (`describe_tensors`), to the tensors' names.

        Raises:
            ExportError: one is not found.
        """
        makers: dict[str, list[Node]] = defaultdict(list)
        by_name = {node.name: node for node in self._graph.nodes}
        for name, description in _described(self._described_steps()).items():
            if name in by_name:
                makers[description].append(by_name[name])
        missing = [f"{name}: {what}" for name, what in descriptions.items() if what not in makers]
        if missing:
            raise ExportError(
                "a tensor that int8 rounds was not found in the detector",
                got="; ".join(missing[:3]),
                expected="every operator between convolutions known to edgekd.export.capture",
            )
        return {node: name for name, what in descriptions.items() for node in makers[what]}

    def _described_steps(self) -> list[_Step]:
        steps = [_Step("Input", (), (self._images.name,))]
        for node in self.steps:
            inputs = tuple(source.name for source in node.all_input_nodes if source not in self._stored)
            if node in self.convs:
                path, norm = self.convs[node]
                steps.append(_Step("Conv", inputs, ((norm or node).name,), path))
            elif (kind := _TORCH_KINDS.get(_operator(node), _operator(node))) == "Split":
                parts = {reader.args[1]: reader.name for reader in node.users if reader.target is operator.getitem}
                outputs = tuple(parts.get(part, "") for part in range(1 + max(parts, default=-1)))
                steps.append(_Step("Split", inputs, outputs))
            elif node not in self.norms and node.target is not operator.getitem:
                steps.append(_Step(kind, inputs, (node.name,)))
        return steps


def call(node: Node, values: Mapping[Node, Any]) -> Any:
    """The result of one call."""
    assert callable(node.target)
    return node.target(*mapped(node.args, values), **mapped(node.kwargs, values))


def mapped(arguments: Any, values: Mapping[Node, Any]) -> Any:
    """Arguments with the values of the calls that they name."""
    return map_arg(arguments, values.__getitem__)


def _operator(node: Node) -> str:
    """Such as "add", for the in-place form as well."""
    target = node.target
    return str(target._schema.name).split("::")[1].rstrip("_") if isinstance(target, torch._ops.OpOverload) else ""


def _split_silu(graph: Graph) -> None:
    """x * sigmoid(x) instead of SiLU: the file rounds the sigmoid too."""
    for node in list(graph.nodes):
        if node.op == "call_function" and _operator(node) == "silu":
            with graph.inserting_before(node):
                gate = graph.call_function(torch.ops.aten.sigmoid.default, node.args[:1])
                product = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], gate))
            node.replace_all_uses_with(product)
            graph.erase_node(node)
