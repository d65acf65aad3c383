"""Where a window of an image lands in a picture, one axis at a time, in whole pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Axis:
    """One axis of a part at one output size: source pixels `crop` fill output pixels `place` inside `cell`."""

    crop: tuple[int, int]
    place: tuple[int, int]
    cell: tuple[int, int]
    flip: bool

    def to_output(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Source coordinates to output coordinates, not clipped."""
        moved = (x - self.crop[0]) * ((self.place[1] - self.place[0]) / (self.crop[1] - self.crop[0]))
        return self.place[1] - moved if self.flip else self.place[0] + moved


def place_axis(window: tuple[float, float], size: int, cell: tuple[int, int], flip: bool) -> Axis | None:
    """Snap a window to whole source and output pixels, so that one plain resize renders it; None shows nothing.

    An image edge inside the window lands where letterboxing would put it (size rounded first, then centred); a
    window edge inside the image lands exactly on the cell's edge. Boxes follow the snapped map, hence the pixels.
    """
    (w0, w1), span = window, cell[1] - cell[0]
    crop = (max(0, round(w0)), min(size, round(w1)))
    if crop[1] <= crop[0] or span <= 0:
        return None
    scale = span / (w1 - w0)
    starts_inside, ends_inside = w0 >= 0, w1 <= size
    ideal = (0.0 if starts_inside else -w0 * scale, float(span) if ends_inside else (size - w0) * scale)
    length = min(span, max(1, round(ideal[1] - ideal[0])))
    if starts_inside:
        start = 0
    elif ends_inside:
        start = span - length
    else:
        # Half a pixel rounds down, as letterboxing does; the small number keeps float noise from deciding.
        start = math.ceil((ideal[0] + ideal[1] - length) / 2 - 0.5 - 1e-6)
        start = min(max(start, 0), span - length)
    if starts_inside and ends_inside:
        length = span
    if flip:
        start = span - length - start
    return Axis(crop, (cell[0] + start, cell[0] + start + length), cell, flip)
