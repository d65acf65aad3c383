"""Whether a graph scales, normalises or resizes pictures itself, read off the first operators behind its image input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekd.types import Channels

PixelRange = Literal["0 to 1", "0 to 255"]
_PASSING = ("Cast", "Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Gather")
_RESIZING = ("Resize", "Upsample")
_SCALING = ("Sub", "Add", "Mul", "Div", "Clip", "BatchNormalization")
_MOST_STEPS = 12


@dataclass(frozen=True)
class Beginning:
    """How a graph begins.

    Attributes:
        pixels: the range of pixels that it normalises itself; None if its first layer is another.
        channels: the order of colours that ImageNet's means, which it takes off, stand in; None without such.
        sliced: it takes the picture apart into every second pixel, as the Focus layer of YOLOX does.
        resized: the tensor with the picture in another size, if the graph brings it to one before its first layer.
    """

    pixels: PixelRange | None = None
    channels: Channels | None = None
    sliced: bool = False
    resized: str | None = None


def beginning_of(model: Path, image: str) -> Beginning:
    """How the graph in an ONNX file treats its image input; nothing is known if onnx is absent or cannot read it."""
    try:
        import onnx

        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception:  # whoever runs the file says what is wrong with it
        return Beginning()
    first = [node.op_type for node in graph.node if image in node.input]
    operator, value, moved = _first_operator(graph, image)
    pixels = _range_before(operator, value)
    channels: Channels | None = None
    if pixels is not None and not moved and operator in ("Sub", "Add") and value is not None and value.size == 3:
        red_first = abs(float(value.flat[0])) - abs(float(value.flat[2]))  # its mean of red is the largest
        channels = "rgb" if red_first > 0 else "bgr" if red_first < 0 else None
    return Beginning(pixels, channels, len(first) > 1 and set(first) == {"Slice"}, _resized(graph, image))


def _readers(graph: Any, image: str) -> Iterator[tuple[Any, str]]:
    """(node, which of its inputs is the picture) along the picture's way, while one node alone reads it."""
    for _ in range(_MOST_STEPS):
        following = [node for node in graph.node if image in node.input and node.op_type != "Shape"]
        if len(following) != 1:
            return
        yield following[0], image
        image = following[0].output[0]


def _resized(graph: Any, image: str) -> str | None:
    for node, _ in _readers(graph, image):
        if node.op_type in _RESIZING:
            return str(node.output[0])
        if node.op_type not in (*_PASSING, *_SCALING):
            return None
    return None


def _first_operator(graph: Any, image: str) -> tuple[str, NDArray[Any] | None, bool]:
    """(operator, its constant) that first changes pixel values, and whether channels may have been exchanged before."""
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

    moved = False
    for node, picture in _readers(graph, image):
        if node.op_type in (*_PASSING, *_RESIZING):
            moved = moved or node.op_type == "Gather"
            continue
        others = [name for name in node.input if name != picture]
        place = 2 if node.op_type == "BatchNormalization" else 0  # its running mean
        return node.op_type, value_of(others[place]) if len(others) > place else None, moved
    return "", None, moved


def _range_before(operator: str, value: NDArray[Any] | None) -> PixelRange | None:
    """What range an operator with this constant makes sense of."""
    if value is None:
        return None
    largest = float(np.abs(value).max())
    mean = (largest > 2, 0.1 < largest <= 2)  # about 0, pictures have been centred before
    ranges: Mapping[str, tuple[bool, bool]] = {  # (byte values, shares)
        "Div": (largest > 2, 0 < largest <= 2),
        "Mul": (0 < largest < 0.1, largest >= 1),
        **dict.fromkeys(("Sub", "Add", "BatchNormalization"), mean),
    }
    as_bytes, as_shares = ranges.get(operator, (False, False))
    return "0 to 255" if as_bytes else "0 to 1" if as_shares else None
