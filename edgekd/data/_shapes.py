"""Shapes for generated scenes, in whole numbers only, so that every machine draws the same pixels.

Outlines are polygons on a unit square of -4096..4096; placed polygons are in 1/64 pixel. Angles count 240 to a turn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.int64]
"""(V, 2) corners x, y of a closed contour; outer contours and holes wind opposite ways."""

UNIT = 4096
TURN = 240
SUB = 64
"""Fixed-point steps a pixel."""
FULL = 256
"""Coverage of a pixel that lies wholly inside."""

# round(4096 * cos(k / 240 of a turn)) for a quarter; written out because cos() may differ in its last bit by machine.
_QUARTER = (
    *(4096, 4095, 4090, 4083, 4074, 4061, 4046, 4027, 4006, 3983, 3956, 3927, 3896, 3861, 3824, 3784, 3742, 3697, 3650),
    *(3600, 3547, 3492, 3435, 3376, 3314, 3250, 3183, 3115, 3044, 2971, 2896, 2820, 2741, 2660, 2578, 2493, 2408, 2320),
    *(2231, 2140, 2048, 1954, 1860, 1763, 1666, 1567, 1468, 1367, 1266, 1163, 1060, 956, 852, 746, 641, 535, 428, 321),
    *(214, 107, 0),
)
_HALF = np.array([*_QUARTER, *(-v for v in _QUARTER[-2::-1])], np.int64)
COS = np.concatenate([_HALF, _HALF[-2:0:-1]])
SIN = np.roll(COS, TURN // 4)

_SAMPLES = 4  # sub-rows a pixel; along a row, coverage is exact


def arc(start: int, stop: int, step: int, radius: int = UNIT) -> Points:
    """Points of a circle from angle `start` to `stop` inclusive, in 1/240 turns."""
    angles = np.arange(start, stop + (1 if step > 0 else -1), step) % TURN
    return np.stack([COS[angles], SIN[angles]], axis=1) * radius // UNIT


def outline(name: str, detail: int) -> list[Points]:
    """Contours of a shape.

    Args:
        name: one of the scene classes.
        detail: 0..255, how thick a ring, arm, point or crescent is within the class's range.
    """
    thick = (detail * UNIT) >> 8
    if name == "disk":
        return [arc(0, TURN - 4, 4)]
    if name == "ring":
        return [arc(0, TURN - 4, 4), arc(TURN - 4, 0, -4, UNIT * 45 // 100 + thick * 25 // 100)]
    if name == "square":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.int64) * (UNIT * 72 // 100)]
    if name == "triangle":
        return [arc(-TURN // 4, -TURN // 4 + TURN * 2 // 3, TURN // 3)]
    if name == "cross":
        a, b = UNIT, UNIT * 24 // 100 + thick * 16 // 100
        corners = [
            [-b, -a],
            [b, -a],
            [b, -b],
            [a, -b],
            [a, b],
            [b, b],
            [b, a],
            [-b, a],
            [-b, b],
            [-a, b],
            [-a, -b],
            [-b, -b],
        ]
        return [np.array(corners, np.int64)]
    if name in ("star5", "star6"):
        points = int(name[-1])
        step, up = TURN // points, -TURN // 4
        outer = arc(up, up + TURN - 1, step)
        inner = arc(up + step // 2, up + TURN - 1, step, UNIT * 40 // 100 + thick * 14 // 100)
        return [np.stack([outer, inner], axis=1).reshape(-1, 2)]
    if name == "crescent":
        tip = 30
        outer = arc(tip, TURN - tip, 4)
        inner = arc(-TURN // 4, TURN // 4, 4)
        depth = UNIT * 105 // 100 + thick * 25 // 100
        inner = np.stack([COS[tip] - inner[:, 0] * depth // UNIT, inner[:, 1] * SIN[tip] // UNIT], axis=1)
        return [np.concatenate([outer, inner[1:-1]])]
    raise KeyError(name)


def blob(radius_256: int, lobes: NDArray[np.int64], phases: NDArray[np.int64]) -> list[Points]:
    """A smooth irregular closed curve: a circle with its 2nd, 3rd, ... harmonics added, amplitudes `lobes` / 256."""
    angles = np.arange(0, TURN, 4)
    radius = np.full(len(angles), radius_256, np.int64)
    for harmonic, (amplitude, phase) in enumerate(zip(lobes.tolist(), phases.tolist(), strict=True), start=2):
        radius += amplitude * COS[(angles * harmonic + phase) % TURN] // UNIT
    return [np.stack([COS[angles] * radius // 256, SIN[angles] * radius // 256], axis=1)]


def place(
    contours: list[Points], *, centre: tuple[int, int], radius: int, stretch_256: int, lean: int, turn: int
) -> list[Points]:
    """Scale, squeeze, rotate and move an outline.

    Args:
        contours: unit outlines.
        centre: x, y in 1/64 pixel.
        radius: what the unit becomes, 1/64 pixel.
        stretch_256: height against width, 256 keeps the shape.
        lean: angle at which it is squeezed.
        turn: angle by which it is rotated at last.
    """
    placed = []
    for points in contours:
        points = _rotate(points, -lean)
        points = _rotate(points * np.array([256, stretch_256], np.int64) // 256, lean + turn)
        placed.append(points * radius // UNIT + np.array(centre, np.int64))
    return placed


def _rotate(points: Points, angle: int) -> Points:
    c, s = COS[angle % TURN], SIN[angle % TURN]
    x, y = points[:, 0], points[:, 1]
    return np.stack([x * c - y * s, x * s + y * c], axis=1) // UNIT


def bounds(contours: list[Points]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 in whole pixels, around all contours."""
    points = np.concatenate(contours)
    low, high = points.min(0) // SUB, -(-points.max(0) // SUB)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def coverage(contours: list[Points], window: tuple[int, int, int, int]) -> NDArray[np.int32]:
    """(h, w) share of each pixel of a window (x1, y1, x2, y2) that lies inside the contours, 0..256.

    On each of four sub-rows a pixel, every edge that crosses adds its direction at the crossing, and the running sum
    along the row is the winding number, weighted by how much of the crossed pixel is inside.
    """
    x1, y1, x2, y2 = window
    h, w = y2 - y1, x2 - x1
    starts = np.concatenate(contours) - np.array([x1 * SUB, y1 * SUB])
    ends = np.concatenate([np.roll(points, -1, axis=0) for points in contours]) - np.array([x1 * SUB, y1 * SUB])
    step = SUB // _SAMPLES
    rows = np.arange(h * _SAMPLES) * step + step // 2
    above_start, above_end = starts[:, 1:] <= rows, ends[:, 1:] <= rows
    edge, row = np.nonzero(above_start != above_end)
    run = ends[edge] - starts[edge]
    x = starts[edge, 0] + (rows[row] - starts[edge, 1]) * run[:, 0] // run[:, 1]
    x = np.clip(x, 0, w * SUB)
    sign = np.where(run[:, 1] > 0, -1, 1)
    column, part = x // SUB, x % SUB
    change = np.zeros(h * _SAMPLES * (w + 2), np.int32)
    np.add.at(change, row * (w + 2) + column, (sign * (SUB - part)).astype(np.int32))
    np.add.at(change, row * (w + 2) + column + 1, (sign * part).astype(np.int32))
    winding = np.cumsum(change.reshape(h, _SAMPLES, w + 2).sum(1, dtype=np.int32), axis=1, dtype=np.int32)
    return np.minimum(np.abs(winding[:, :w]), FULL)
