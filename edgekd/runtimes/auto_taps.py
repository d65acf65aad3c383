"""Feature maps of a foreign ONNX detector that distillation can learn from, found in its graph.

A detector's neck ends where its head begins: in a map that several convolutions read, one for classes and one for boxes, or
the head's and the next level's. Of the maps at each stride, the last of these in the order of the graph is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekd.errors import UserError
from edgekd.runtimes.ort import read_graph

STRIDES = {"p3": 8, "p4": 16, "p5": 32}
"""Names of levels as in FPN (Lin et al., CVPR 2017): level l has a stride of 2 to the power of l."""

_PASSED = ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity")
_LEAST_CHANNELS = 16


def shared_maps(path: Path) -> list[str]:
    """Inner tensors that two convolutions or more read, in the order of the graph.

    Raises:
        ArtifactError: the file cannot be read. MissingDependencyError: onnx is not installed.
    """
    nodes = read_graph(path).graph.node
    source: dict[str, str] = {}  # what a tensor is but for its number format
    readers: dict[str, int] = defaultdict(int)
    order: list[str] = []
    for node in nodes:
        if node.op_type in _PASSED and node.input:
            source[node.output[0]] = source.get(node.input[0], node.input[0])
            continue
        order.extend(name for name in node.output if name)
        if node.op_type == "Conv":
            readers[source.get(node.input[0], node.input[0])] += 1
    return [name for name in order if readers[name] >= 2]


def taps_by_stride(
    path: Path, shapes: Sequence[tuple[str, Sequence[int]]], input_hw: tuple[int, int]
) -> Mapping[str, str]:
    """The last map at each of `STRIDES`, by level; `shapes` are `shared_maps` and their shapes.

    Raises:
        UserError: there is none.
    """
    found: dict[str, str] = {}
    for name, shape in shapes:
        for level, stride in STRIDES.items():
            grid = [-(-side // stride) for side in input_hw]
            if len(shape) == 4 and list(shape[2:]) == grid and shape[1] >= _LEAST_CHANNELS:
                found[level] = name
    if not found:
        raise UserError(
            f"{path}: `taps: auto` finds no feature map in its graph",
            got=f"{len(shapes)} inner tensors that two convolutions read, none of stride 8, 16 or 32",
            fix="name them: taps: {p4: TENSOR, p5: TENSOR}; a viewer such as Netron shows the graph",
        )
    return dict(sorted(found.items()))
