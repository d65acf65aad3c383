"""Photometric distortion as in SSD (Liu et al., 2016, section 2.2, "Data augmentation"), as replayable numbers."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgekd.types import ImageArray

# The ranges of SSD's original implementation, for images of 0..255.
BRIGHTNESS = 32.0
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE_DEGREES = 36.0


@dataclass(frozen=True)
class Photometric:
    """One drawn distortion; the defaults leave an image as it is.

    Attributes:
        brightness: added to every value, in 1/255.
        contrast: factor on every value.
        saturation: factor on HSV saturation.
        hue_degrees: added to HSV hue.
        contrast_last: whether contrast comes after saturation and hue rather than before.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue_degrees: float = 0.0
    contrast_last: bool = False


def sample_photometric(rng: np.random.Generator, chance: float) -> Photometric | None:
    """Draw each distortion with probability `chance`; None when nothing came of it."""
    applied = rng.random(4) < chance
    brightness = float(rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast = float(rng.uniform(*CONTRAST))
    saturation = float(rng.uniform(*SATURATION))
    hue = float(rng.uniform(-HUE_DEGREES, HUE_DEGREES))
    contrast_last = bool(rng.random() < 0.5)
    if not applied.any():
        return None
    return Photometric(
        brightness if applied[0] else 0.0,
        contrast if applied[1] else 1.0,
        saturation if applied[2] else 1.0,
        hue if applied[3] else 0.0,
        contrast_last,
    )


def distort(image: ImageArray, drawn: Photometric) -> ImageArray:
    """An (H, W, 3) uint8 RGB image distorted, itself untouched; rounds to uint8 between steps: tables do the work."""
    values = np.arange(256, dtype=np.float64)
    first = values + drawn.brightness
    if not drawn.contrast_last:
        first = first * drawn.contrast
    out = cv2.LUT(image, _table(first)) if drawn.brightness or drawn.contrast != 1.0 else image
    if drawn.saturation != 1.0 or drawn.hue_degrees != 0.0:
        hsv = cv2.cvtColor(out, cv2.COLOR_RGB2HSV)  # 8-bit hue counts in steps of 2 degrees, 0..179
        tables = np.stack(
            [
                _table((values + drawn.hue_degrees / 2.0) % 180.0) % 180,
                _table(values * drawn.saturation),
                _table(values),
            ],
            axis=-1,
        )
        out = cv2.cvtColor(cv2.LUT(hsv, tables[None]), cv2.COLOR_HSV2RGB)
    if drawn.contrast_last and drawn.contrast != 1.0:
        out = cv2.LUT(out, _table(values * drawn.contrast))
    return np.asarray(out, np.uint8)


def _table(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
