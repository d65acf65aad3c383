"""Colour, texture, light, blur and noise for generated scenes, in whole numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekd.data._shapes import COS, SIN, TURN, UNIT

Canvas = NDArray[np.int32]
"""(H, W, 3) colours or (H, W) levels, nominally 0..255."""
T = TypeVar("T")
Levels = TypeVar("Levels", NDArray[np.int16], NDArray[np.int32])


class Draws:
    """Random whole numbers that are the same on every machine and numpy.

    Only PCG64's raw 64-bit stream is used: numpy promises that it never changes, which it does not of
    `Generator`'s methods.
    """

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(list(entropy)))

    def integer(self, low: int, high: int) -> int:
        """One of low..high, both included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def percent(self, chance: int) -> bool:
        """True in `chance` of 100 cases."""
        return self.integer(0, 99) < chance

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def bytes(self, *shape: int) -> NDArray[np.uint8]:
        """Uniform 0..255."""
        count = int(np.prod(shape))
        raw = np.asarray(self._bits.random_raw(-(-count // 8)), dtype="<u8")
        return raw.view(np.uint8)[:count].reshape(shape)

    def levels(self, low: int, high: int, *shape: int) -> Canvas:
        """Uniform low..high, in steps of at least (high - low) / 255."""
        return np.asarray(low + (self.bytes(*shape).astype(np.int32) * (high - low + 1) >> 8), np.int32)

    def colour(self, low: int = 24, high: int = 236, vivid: int = 60) -> Canvas:
        """(3,) RGB whose largest and smallest channels are at least `vivid` apart, if it comes within a few draws."""
        rgb = self.levels(low, high, 3)
        for _ in range(5):
            if int(rgb.max() - rgb.min()) >= vivid:
                break
            rgb = self.levels(low, high, 3)
        return rgb


def smooth_field(grid: Canvas, image_hw: tuple[int, int]) -> Canvas:
    """A coarse (gh, gw) or (gh, gw, 3) grid of levels spread over the image, smoothstep between its points."""
    columns = _weights(grid.shape[1], image_hw[1]).T
    planes = np.moveaxis(grid.reshape(*grid.shape[:2], -1), -1, 0).astype(np.float64)
    # Sums of whole numbers below 2**53 are exact in float64 in any order, so this is integer arithmetic at BLAS speed.
    field = np.floor((_weights(grid.shape[0], image_hw[0]) @ planes) @ columns * 2.0**-14)
    return np.moveaxis(field, 0, -1).reshape(*image_hw, *grid.shape[2:]).astype(np.int32)


def _weights(points: int, size: int) -> NDArray[np.float64]:
    """(size, points) shares of each grid point at each pixel, in 1/128."""
    position = np.arange(size) * ((points - 1) * 256) // size
    cell, share = position // 256, position % 256
    share = share * share * (768 - 2 * share) // 2**17
    weights = np.zeros((size, points), np.float64)
    weights[np.arange(size), cell] = 128 - share
    weights[np.arange(size), cell + 1] = share
    return weights


def value_noise(draws: Draws, image_hw: tuple[int, int], cells_px: Sequence[int], strength: int) -> Canvas:
    """(H, W) clouds around 0: a sum of octaves, one for each cell size, each about half as strong as the one before."""
    total = np.zeros(image_hw, np.int32)
    for octave, cell in enumerate(cells_px):
        amplitude = max(1, strength >> octave)
        grid = draws.levels(-amplitude, amplitude, *(size // cell + 2 for size in image_hw))
        total += smooth_field(grid, image_hw)
    return total


def ramp(image_hw: tuple[int, int], angle: int) -> Canvas:
    """(H, W) plane from 0 to 255 that rises in the direction of `angle`."""
    h, w = image_hw
    x, y = np.arange(w, dtype=np.int64) * int(COS[angle % TURN]), np.arange(h, dtype=np.int64) * int(SIN[angle % TURN])
    plane = x[None, :] + y[:, None]
    low = plane.min()
    return np.asarray((plane - low) * 255 // max(1, int(plane.max() - low)), np.int32)


def stripes(image_hw: tuple[int, int], angle: int, period_px: int) -> NDArray[np.bool_]:
    """(H, W) bars of half the period each."""
    h, w = image_hw
    x, y = np.arange(w, dtype=np.int64) * int(COS[angle % TURN]), np.arange(h, dtype=np.int64) * int(SIN[angle % TURN])
    return np.asarray((x[None, :] + y[:, None]) // (UNIT * max(1, period_px // 2)) % 2 == 1)


def blend(region: Canvas, colour: Canvas, alpha: Canvas) -> None:
    """Lay a colour, (3,) or (h, w, 3), over a region (h, w, 3) in place; alpha (h, w) in 0..256."""
    region += (colour - region) * alpha[..., None] >> 8


def binomial_blur(image: Levels, passes: int) -> Levels:
    """Repeated 1-2-1 smoothing along both axes of (H, W) or (H, W, 3), edges repeated; its own memory."""
    for _ in range(passes):
        for axis in (0, 1):
            total = 2 * image + 2
            out, old = total.swapaxes(0, axis), image.swapaxes(0, axis)
            out[1:] += old[:-1]
            out[:-1] += old[1:]
            out[0] += old[0]
            out[-1] += old[-1]
            image = np.right_shift(total, 2, out=total)
    return image
