"""One generated scene: background, clutter, objects from back to front, then light, blur and noise."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgekd.data._paint import Canvas, Draws, binomial_blur, blend, ramp, smooth_field, stripes, value_noise
from edgekd.data._shapes import FULL, SUB, TURN, UNIT, Points, blob, bounds, coverage, outline, place
from edgekd.types import ImageArray

SCENE_CLASSES = ("crescent", "cross", "disk", "ring", "square", "star5", "star6", "triangle")
"""Class names in label order."""

REVISION = 1
"""Raised whenever the pixels of any scene change."""

# Object sizes in 1/1000 of the shorter side: equal ratios, so that small ones are as common as large ones.
_SIDES = (
    *(60, 66, 73, 81, 90, 99, 109, 121, 134, 148, 163, 180),
    *(199, 220, 244, 269, 298, 329, 364, 402, 444, 491, 543, 600),
)
_LARGER_OF_TWO = 65  # per cent of objects that are the larger of two drawn sizes: the smallest stay, but as a minority
_USUAL_TILT = 10  # 1/240 turns either way; objects have an up and a down, mostly, as real ones do
_OBJECT_COUNTS = (1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10)
_TRIES = 12
_MIN_VISIBLE, _CLEARLY_VISIBLE = 30, 45  # per cent of an object's area


@dataclass(frozen=True)
class SceneObject:
    """One object as it is seen.

    Attributes:
        label: index into `SCENE_CLASSES`.
        box_xyxy: tight around its visible pixels before blur; whole pixels, x2 and y2 exclusive.
        visible: per cent of its area that is inside the picture and not hidden; at least 30.
        truncated: it reaches beyond the picture.
    """

    label: int
    box_xyxy: tuple[int, int, int, int]
    visible: int
    truncated: bool

    @property
    def difficult(self) -> bool:
        """More than half hidden or cut off."""
        return self.visible < _CLEARLY_VISIBLE


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        objects: from back to front.
        owners: (H, W) int16, the object in front at each pixel, -1 for the background.
    """

    image: ImageArray
    objects: tuple[SceneObject, ...]
    owners: NDArray[np.int16]


@dataclass(frozen=True)
class _Placed:
    """A shape with its place: alpha covers `window` (x1, y1, x2, y2), which may reach beyond the picture."""

    label: int
    contours: list[Points]
    window: tuple[int, int, int, int]
    alpha: Canvas
    centre: tuple[int, int]
    radius: int
    area: int


@dataclass
class _Stage:
    """The picture while it is being painted."""

    canvas: Canvas
    owners: NDArray[np.int16]
    placed: list[_Placed] = field(default_factory=list)

    @property
    def image_hw(self) -> tuple[int, int]:
        return self.owners.shape[0], self.owners.shape[1]

    def clip(self, window: tuple[int, int, int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """(rows, columns) of the picture that a window covers, and the same of the window's own arrays."""
        (h, w), (x1, y1, x2, y2) = self.image_hw, window
        left, top, right, bottom = max(0, x1), max(0, y1), max(0, min(w, x2)), max(0, min(h, y2))
        right, bottom = max(left, right), max(top, bottom)
        return (slice(top, bottom), slice(left, right)), (slice(top - y1, bottom - y1), slice(left - x1, right - x1))

    def lay(self, window: tuple[int, int, int, int], alpha: Canvas, colour: Canvas) -> None:
        """Blend a colour, (3,) or one a pixel of the window, into the picture."""
        inside, own = self.clip(window)
        blend(self.canvas[inside], colour if colour.ndim == 1 else colour[own], alpha[own])


def render_scene(seed: int, split: str, index: int, image_hw: tuple[int, int]) -> Scene:
    """Scene number `index` of a split: a pure function of its arguments."""
    draws = Draws(REVISION, seed, zlib.crc32(split.encode()), index)
    stage = _Stage(_background(draws, image_hw), np.full(image_hw, -1, np.int16))
    _clutter(draws, stage)
    for _ in range(draws.choice(_OBJECT_COUNTS)):
        _add_object(draws, stage)
    while not stage.placed:
        _add_object(draws, stage)
    objects = tuple(_describe(stage, number) for number in range(len(stage.placed)))
    return Scene(_finish(draws, stage.canvas), objects, stage.owners)


def _add_object(draws: Draws, stage: _Stage) -> None:
    placed = _find_place(draws, stage)
    if placed is not None:
        _paint_object(draws, stage, placed)
        inside, own = stage.clip(placed.window)
        stage.owners[inside][placed.alpha[own] >= FULL // 2] = len(stage.placed)
        stage.placed.append(placed)


def _background(draws: Draws, image_hw: tuple[int, int]) -> Canvas:
    """Two or three colours flowing into each other, clouds, sometimes faint bars or fine grain."""
    palette = np.stack([draws.colour(30, 215, vivid=0) for _ in range(draws.integer(2, 3))])
    if draws.percent(60):  # most backgrounds stay near one colour
        palette = palette[0] + (palette - palette[0]) * 2 // 5
    grey = palette.sum(1, keepdims=True) // 3
    palette = grey + (palette - grey) * draws.integer(60, 190) // 256  # muted, so that objects catch the eye
    grid_hw = (draws.integer(2, 4), draws.integer(2, 5))
    grid = palette[draws.levels(0, len(palette) - 1, *grid_hw)] + draws.levels(-14, 14, *grid_hw, 3)
    canvas = smooth_field(grid, image_hw)
    cells = draws.choice(((64, 32, 16, 8), (40, 20, 10, 5), (96, 24, 6), (24, 12, 6, 3)))
    canvas += value_noise(draws, image_hw, cells, draws.integer(8, 34))[..., None]
    if draws.percent(30):
        bars = stripes(image_hw, draws.integer(0, TURN - 1), draws.integer(6, 48))
        canvas += bars[..., None] * draws.levels(-16, 16, 3)
    return canvas


def _clutter(draws: Draws, stage: _Stage) -> None:
    """Things that are no object: irregular blobs, lines and bars, specks."""
    h, w = stage.image_hw
    side = min(h, w)
    for _ in range(draws.integer(0, 5)):
        lobes, phases = draws.levels(20, 75, 4).astype(np.int64), draws.levels(0, TURN - 1, 4).astype(np.int64)
        lobes[0] += 40  # always clearly lobed: never a disk
        shape = blob(256, lobes, phases)
        _lay_clutter(draws, stage, shape, draws.integer(side * 3, side * 22) * SUB // 100, draws.integer(70, 230))
    for _ in range(draws.integer(0, 6)):
        thick = draws.integer(UNIT * 6 // 1000, UNIT * 40 // 1000)
        bar = [np.array([[-UNIT, -thick], [UNIT, -thick], [UNIT, thick], [-UNIT, thick]], np.int64)]
        _lay_clutter(draws, stage, bar, draws.integer(side * 15, side * 70) * SUB // 100, draws.integer(90, 256))
    for _ in range(draws.choice((0, 0, 6, 15, 30))):
        shape = outline(draws.choice(("disk", "square")), 0)
        _lay_clutter(draws, stage, shape, draws.integer(SUB // 2, side * SUB * 14 // 1000), draws.integer(90, 256))


def _lay_clutter(draws: Draws, stage: _Stage, shape: list[Points], radius: int, strength: int) -> None:
    h, w = stage.image_hw
    centre = (draws.integer(0, w * SUB), draws.integer(0, h * SUB))
    contours = place(shape, centre=centre, radius=radius, stretch_256=256, lean=0, turn=draws.integer(0, TURN - 1))
    window = bounds(contours)
    stage.lay(window, coverage(contours, window) * strength >> 8, draws.colour(10, 240, vivid=0))


def _find_place(draws: Draws, stage: _Stage) -> _Placed | None:
    """A shape that neither is mostly cut off nor mostly hides another; None if a few tries find none."""
    h, w = stage.image_hw
    label, detail = draws.integer(0, len(SCENE_CLASSES) - 1), draws.integer(0, 255)
    side = draws.choice(_SIDES)
    if draws.percent(_LARGER_OF_TWO):
        side = max(side, draws.choice(_SIDES))
    radius = min(h, w) * side * SUB // 2000
    may_overlap, may_leave, upright = draws.percent(35), draws.percent(20), draws.percent(75)
    margin = 0 if may_leave else radius
    for _ in range(_TRIES):
        centre = (draws.integer(margin, w * SUB - margin), draws.integer(margin, h * SUB - margin))
        apart = all(_distance_2(centre, other.centre) > (radius + other.radius) ** 2 for other in stage.placed)
        if not apart and not may_overlap:
            continue
        contours = place(
            outline(SCENE_CLASSES[label], detail),
            centre=centre,
            radius=radius,
            stretch_256=draws.integer(180, 256),
            lean=draws.integer(0, TURN - 1),
            turn=draws.integer(-_USUAL_TILT, _USUAL_TILT) if upright else draws.integer(0, TURN - 1),
        )
        window = bounds(contours)
        alpha = coverage(contours, window)
        placed = _Placed(label, contours, window, alpha, centre, radius, int((alpha >= FULL // 2).sum()))
        if _leaves_all_visible(stage, placed):
            return placed
    return None


def _distance_2(a: tuple[int, int], b: tuple[int, int]) -> int:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def _leaves_all_visible(stage: _Stage, placed: _Placed) -> bool:
    inside, own = stage.clip(placed.window)
    mask = placed.alpha[own] >= FULL // 2
    if int(mask.sum()) * 100 < _MIN_VISIBLE * placed.area:
        return False
    hidden = np.bincount(stage.owners[inside][mask] + 1, minlength=len(stage.placed) + 1)[1:]
    seen = np.bincount(stage.owners.ravel() + 1, minlength=len(stage.placed) + 1)[1:]
    return all(
        (int(seen[k]) - int(hidden[k])) * 100 >= _MIN_VISIBLE * other.area for k, other in enumerate(stage.placed)
    )


def _paint_object(draws: Draws, stage: _Stage, placed: _Placed) -> None:
    """Shadow, rim, filling; a colour that stands out from what is behind, most of the time."""
    inside, _ = stage.clip(placed.window)
    behind = stage.canvas[inside].reshape(-1, 3)
    usual = behind.sum(0) // len(behind)
    contrast = draws.choice((70, 110, 140, 170))
    for _ in range(8):
        colour = draws.colour()
        if int(np.abs(colour - usual).sum()) >= contrast:
            break
    if draws.percent(55):
        _lay_shadow(draws, stage, placed)
    if draws.percent(45) and SCENE_CLASSES[placed.label] not in ("ring", "crescent"):
        stage.lay(placed.window, placed.alpha, colour * draws.integer(60, 150) >> 8)
        centre = np.array(placed.centre, np.int64)
        share = draws.integer(200, 228)  # the filling's size against the whole, of 256
        inner = coverage([centre + (points - centre) * share // 256 for points in placed.contours], placed.window)
        stage.lay(placed.window, inner, _filling(draws, placed, colour))
    else:
        stage.lay(placed.window, placed.alpha, _filling(draws, placed, colour))


def _lay_shadow(draws: Draws, stage: _Stage, placed: _Placed) -> None:
    reach = max(1, placed.radius // SUB // 8)
    pad = reach + 3
    soft = binomial_blur(np.pad(placed.alpha, pad), 2 + reach // 2)
    dx, dy = draws.integer(-reach, reach), draws.integer(0, reach)
    x1, y1, x2, y2 = placed.window
    window = (x1 - pad + dx, y1 - pad + dy, x2 + pad + dx, y2 + pad + dy)
    stage.lay(window, soft * draws.integer(60, 130) >> 8, np.zeros(3, np.int32))


def _filling(draws: Draws, placed: _Placed, colour: Canvas) -> Canvas:
    """(h, w, 3) colours: plain, two colours flowing, bars or speckles, always under a little light from one side."""
    hw = placed.alpha.shape[0], placed.alpha.shape[1]
    angle, kind = draws.integer(0, TURN - 1), draws.integer(0, 99)
    second = draws.colour() if draws.percent(40) else colour * draws.integer(130, 350) >> 8
    if kind < 35:
        flat = np.broadcast_to(colour, (*hw, 3))
    elif kind < 60:
        flat = colour + ((second - colour) * ramp(hw, angle)[..., None] >> 8)
    elif kind < 78:
        period = max(4, placed.radius // SUB * draws.integer(35, 90) // 100)
        flat = np.where(stripes(hw, angle, period)[..., None], second, colour)
    else:
        flat = colour + (draws.bytes(*hw).astype(np.int32) - 128)[..., None] * draws.integer(20, 90) // 256
    light = draws.integer(200, 250) + (ramp(hw, draws.integer(0, TURN - 1)) * draws.integer(0, 70) >> 8)
    return np.asarray(flat * light[..., None] >> 8, np.int32)


def _describe(stage: _Stage, number: int) -> SceneObject:
    placed = stage.placed[number]
    mask = stage.owners == number
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    _, own = stage.clip(placed.window)
    return SceneObject(
        placed.label,
        (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
        int(mask.sum()) * 100 // placed.area,
        int((placed.alpha[own] >= FULL // 2).sum()) < placed.area,
    )


def _finish(draws: Draws, canvas: Canvas) -> ImageArray:
    """Uneven light, a colour cast, blur, noise."""
    h, w = canvas.shape[:2]
    light = smooth_field(draws.levels(190, 320, draws.integer(2, 3), draws.integer(2, 3)), (h, w))
    cast = draws.levels(232, 276, 3)
    np.clip(canvas, 0, 255, out=canvas)
    canvas *= light[..., None]
    canvas *= cast
    canvas >>= 16
    canvas = binomial_blur(canvas.astype(np.int16), draws.choice((0, 0, 0, 0, 1, 1, 1, 2, 2, 5)))
    strength = draws.choice((0, 6, 12, 20, 32))
    if strength:
        grain = draws.bytes(2, h, w, 3).astype(np.int16).sum(0, dtype=np.int16) - 255
        canvas += grain * strength >> 8
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
