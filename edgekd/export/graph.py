"""Reading and editing ONNX graphs: who makes and reads each tensor, what lies before it, sessions, metadata.

Everything here works on `onnx.ModelProto` in memory; tensors are spoken of by name, and every node has a unique name.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime
    from onnx import ModelProto, NodeProto

RAW_KEY = "edgekd.raw"
"""Metadata: JSON object, raw output (cls_logits, ...) to the tensor that holds it. What comes after is decoding."""


class GraphIndex:
    """A snapshot of a graph's wiring; build a new one after editing.

    Attributes:
        producer: tensor name to the node that makes it; graph inputs and initializers have none.
        consumers: tensor name to the nodes that read it, one entry a use.
        constants: initializer name to its value.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: ModelProto) -> None:
        self.producer: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}
        for node in model.graph.node:
            for name in node.output:
                self.producer[name] = node
            for name in node.input:
                if name:
                    self.consumers[name].append(node)

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is an initializer."""
        return tensor in self._initializers

    def constant(self, tensor: str) -> NDArray[Any]:
        """An initializer's value."""
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self._initializers[tensor]))

    def only_consumer(self, tensor: str) -> NodeProto | None:
        """The one node that reads a tensor, once; None if there are others or the graph gives the tensor out."""
        readers = self.consumers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def activations(self, node: NodeProto) -> list[str]:
        """A node's inputs that are computed, not constant."""
        return [name for name in node.input if name and not self.is_constant(name)]

    def before(self, tensors: Iterable[str]) -> set[str]:
        """Names of all nodes that the tensors depend on."""
        found: set[str] = set()
        pending = list(tensors)
        while pending:
            node = self.producer.get(pending.pop())
            if node is not None and node.name not in found:
                found.add(node.name)
                pending.extend(node.input)
        return found


def name_nodes(model: ModelProto) -> None:
    """Give every node a unique name, since blocking and keeping layers goes by name."""
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        base = node.name or f"{node.op_type}_{node.output[0]}"
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}__{seen[base]}"


def constants_as_weights(model: ModelProto) -> None:
    """Keep the tensors of Constant nodes, which some exporters write, among the initializers."""
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        for entry in node.attribute:
            if entry.name == "value":
                entry.t.name = node.output[0]
                model.graph.initializer.append(entry.t)
                model.graph.node.remove(node)


def strip_notes(model: ModelProto) -> None:
    """Remove the exporter's notes: stack traces with paths of this machine, which triple small files."""
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("doc_string")
        if "metadata_props" in item.DESCRIPTOR.fields_by_name:
            item.ClearField("metadata_props")
    graph.ClearField("doc_string")
    if "metadata_props" in graph.DESCRIPTOR.fields_by_name:
        graph.ClearField("metadata_props")
    model.ClearField("doc_string")


def opset_of(model: ModelProto) -> int:
    """The version of the default operator set."""
    return max((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def set_metadata(model: ModelProto, entries: Mapping[str, object]) -> None:
    """Add or replace metadata: strings as they are, everything else as JSON."""
    merged = metadata_of(model)
    for key, value in entries.items():
        merged[key] = value if isinstance(value, str) else json.dumps(value, sort_keys=True, allow_nan=False)
    model.ClearField("metadata_props")
    for key in sorted(merged):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, merged[key]


def metadata_of(model: ModelProto) -> dict[str, str]:
    """All metadata as strings."""
    return {entry.key: entry.value for entry in model.metadata_props}


def raw_tensors(model: ModelProto) -> tuple[str, ...]:
    """Names of the detector's raw outputs inside the graph, where decoding begins; all outputs if not recorded."""
    recorded = metadata_of(model).get(RAW_KEY)
    if recorded is None:
        return tuple(output.name for output in model.graph.output)
    return tuple(json.loads(recorded).values())


def prune(model: ModelProto) -> None:
    """Drop nodes that no output depends on, initializers that no node reads, and value infos of what is gone."""
    needed = GraphIndex(model).before(output.name for output in model.graph.output)
    nodes = [node for node in model.graph.node if node.name in needed]
    used = {name for node in nodes for name in node.input} | {output.name for output in model.graph.output}
    made = {name for node in nodes for name in node.output}
    _replace(model.graph.node, nodes)
    _replace(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in used])
    _replace(model.graph.value_info, [info for info in model.graph.value_info if info.name in made])


def replace_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    """Set the graph's nodes, in this (topological) order."""
    _replace(model.graph.node, list(nodes))


def _replace(field: Any, items: list[Any]) -> None:
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def open_session(model: bytes | ModelProto, *, optimised: bool = True) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU, warnings off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def with_outputs(model: ModelProto, tensors: Iterable[str]) -> ModelProto:
    """A copy of a model that also gives these inner tensors out, after its own outputs."""
    from onnx import helper

    copy = copy_of(model)
    present = {output.name for output in copy.graph.output}
    for name in tensors:
        if name not in present:
            copy.graph.output.append(helper.make_empty_tensor_value_info(name))  # the runtime infers the type
            present.add(name)
    return copy


def copy_of(model: ModelProto) -> ModelProto:
    """A deep copy."""
    copy: ModelProto = type(model).FromString(model.SerializeToString())
    return copy
