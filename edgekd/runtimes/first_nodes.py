"""Whether a graph scales or normalises pixels itself, read off the first operators behind its image input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PixelRange = Literal["0 to 1", "0 to 255"]
_PASSING = ("Cast", "Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Gather")
_MOST_STEPS = 12


@dataclass(frozen=True)
class Beginning:
    """How a graph begins.

    Attributes:
        pixels: the range of pixels that it normalises itself; None if its first layer is another.
        sliced: it takes the picture apart into every second pixel, as the Focus layer of YOLOX does.
    """

    pixels: PixelRange | None = None
    sliced: bool = False


def beginning_of(model: Path, image: str) -> Beginning:
    """How the graph in an ONNX file treats its image input; nothing is known if onnx is absent or cannot read it."""
    try:
        import onnx

        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception:  # whoever runs the file says what is wrong with it
        return Beginning()
    first = [node.op_type for node in graph.node if image in node.input]
    return Beginning(_range_inside(graph, image), len(first) > 1 and set(first) == {"Slice"})


def _range_inside(graph: Any, image: str) -> PixelRange | None:
    from onnx import TensorProto, numpy_helper

    constants: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = next((entry.t for entry in node.attribute if entry.name == "value"), None)

    def value_of(name: str) -> NDArray[Any] | None:
        tensor = constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        array = np.asarray(numpy_helper.to_array(tensor), np.float64)
        return array if 0 < array.size <= 3 else None

    for _ in range(_MOST_STEPS):
        following = [node for node in graph.node if image in node.input and node.op_type != "Shape"]
        if len(following) != 1:
            return None
        node = following[0]
        if node.op_type in _PASSING:
            image = node.output[0]
            continue
        return _range_before(node.op_type, [value_of(name) for name in node.input if name != image])
    return None


def _range_before(operator: str, values: list[NDArray[Any] | None]) -> PixelRange | None:
    """What range an operator with these constants makes sense of."""
    if operator == "BatchNormalization" and len(values) == 4 and values[2] is not None:
        return "0 to 255" if float(np.abs(values[2]).max()) > 2 else "0 to 1"
    if not values or values[0] is None:
        return None
    largest = float(np.abs(values[0]).max())
    ranges: Mapping[str, tuple[bool, bool]] = {  # (byte values, shares)
        "Div": (largest > 2, 0 < largest <= 2),
        "Mul": (0 < largest < 0.1, largest >= 1),
        "Sub": (largest > 2, 0 < largest <= 2),
        "Add": (largest > 2, 0 < largest <= 2),
    }
    as_bytes, as_shares = ranges.get(operator, (False, False))
    return "0 to 255" if as_bytes else "0 to 1" if as_shares else None
