"""Files whose graph itself resizes the picture: whether their boxes are of the input or of that inner picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgekd.errors import EdgeKDError, UserError
from edgekd.runtimes.outputs import Arrays, decode
from edgekd.runtimes.probe import Recognised
from edgekd.types import FloatArray

_MANY = 20
"""So many boxes of a picture of noise lie all over it: if all are in one part, it is the whole of a smaller picture."""
_OVER = 1.03
"""How far, of its side, a centre may lie outside."""


def in_its_frame(
    arrays: Arrays,
    input_hw: tuple[int, int],
    inner_hw: tuple[int, int],
    recognised: Callable[[tuple[int, int]], Recognised],
) -> Recognised:
    """What the outputs are, read in the frame of the input or of the picture inside, as they show it.

    Args:
        arrays: the outputs for the probe picture.
        inner_hw: the size that the graph brings the picture to.
        recognised: the reading in a frame of this size.

    Raises:
        UserError: no reading fits in the input's frame, nor in the inner one's.
    """
    if inner_hw == input_hw:
        return recognised(input_hw)
    inside = f"the graph itself resizes pictures to {inner_hw[0]}x{inner_hw[1]}"
    try:
        found = recognised(inner_hw)
    except UserError:
        return recognised(input_hw)  # the smaller frame leaves pixels of the larger one without a reading
    if found.form.box_format.endswith("normalised"):
        return found
    if found.form.box_format.startswith("grid"):
        return _noted(found, inner_hw, f"{inside}, whose cells the boxes are coded by")
    boxes = _boxes(arrays, found, inner_hw)
    fitting = [hw for hw in sorted((inner_hw, input_hw)) if _lie_in(boxes, hw)]
    if len(fitting) == 1 or (fitting and len(boxes) >= _MANY):
        frame = fitting[0]
        if frame == inner_hw:
            return _noted(found, inner_hw, f"{inside}, and boxes are of that")
        return _noted(recognised(input_hw), (), f"{inside}; boxes are scaled back to the input")
    doubt = (
        "boxes taken to be of the input, since the probe shows too few: if they are not, export them as shares of it"
    )
    return _noted(recognised(input_hw), (), f"{inside}; {doubt}")


def _noted(found: Recognised, frame_hw: tuple[int, ...], note: str) -> Recognised:
    return replace(found, form=replace(found.form, frame_hw=frame_hw), notes=(*found.notes, note))


def _boxes(arrays: Arrays, found: Recognised, frame_hw: tuple[int, int]) -> FloatArray:
    """The probe picture's boxes; none where they cannot be read on it."""
    try:
        boxes, _ = decode(arrays, found.form, frame_hw)
    except EdgeKDError:
        return np.zeros((0, 4), np.float32)
    return boxes


def _lie_in(boxes: FloatArray, frame_hw: tuple[int, int]) -> bool:
    """Whether nearly all boxes have their centres in a frame of this size."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    size = np.array(frame_hw[::-1], np.float32)
    return bool(((centres <= _OVER * size).all(1)).mean() >= 0.99) if len(boxes) else True
