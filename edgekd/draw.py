"""Detections drawn into a picture, with labels that can be read on any background."""

from __future__ import annotations

import colorsys
import contextlib
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edgekd.types import Detections, ImageArray

Rectangle = tuple[float, float, float, float]
Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
)
_NO_CHARACTER = "\U0010ffff"


def label_font(text: str, size: int) -> Font:
    """Pillow's own font, or, as that knows ASCII alone, the one of the system's that has most of the text."""
    own = ImageFont.load_default(size=size)
    return own if text.isascii() else max((own, *_system_fonts(size)), key=lambda font: _written(font, text))


@functools.cache
def _system_fonts(size: int) -> tuple[Font, ...]:
    found = []
    for name in _SYSTEM_FONTS:
        with contextlib.suppress(OSError):  # it is not installed
            found.append(ImageFont.truetype(name, size))
    return tuple(found)


def _written(font: Font, text: str) -> int:
    """How many different characters of the text are not drawn as what stands for a missing one."""
    missing = bytes(font.getmask(_NO_CHARACTER))
    return sum(bytes(font.getmask(character)) != missing for character in set(text))


def class_colour(label: int) -> Colour:
    """A colour for a class: neighbours differ strongly, and the same class always has the same one."""
    hue = (label * 0.618034 + 0.02) % 1.0  # steps of the golden ratio never come near an earlier hue soon
    lightness = (0.45, 0.55, 0.38)[label % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(image: ImageArray, detections: Detections, class_names: Sequence[str]) -> ImageArray:
    """A copy of `image` (H, W, 3) uint8 RGB with boxes and "name score" labels; the surest detection on top."""
    height, width = image.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(image))
    canvas = ImageDraw.Draw(picture)
    side = max(height, width)
    line = max(1, round(side / 400))
    names = {
        label: class_names[label] if label < len(class_names) else str(label) for label in detections.labels.tolist()
    }
    font = label_font("".join(names.values()), max(10, round(side / 45)))
    order = np.argsort(detections.scores, kind="stable")
    for index in order:
        box = tuple(float(v) for v in detections.boxes_xyxy[index])
        canvas.rectangle(_inside(box, width, height), outline=class_colour(int(detections.labels[index])), width=line)
    taken: list[Rectangle] = []
    for index in order[::-1]:
        label = int(detections.labels[index])
        text = f"{names[label]} {detections.scores[index]:.2f}"
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        size = (right - left + 2 * line + 2, bottom - top + 2 * line + 2)
        place = _label_place(tuple(float(v) for v in detections.boxes_xyxy[index]), size, (width, height), taken)
        taken.append(place)
        colour = class_colour(label)
        canvas.rectangle(place, fill=colour)
        canvas.text((place[0] + line + 1 - left, place[1] + line + 1 - top), text, fill=_ink(colour), font=font)
    return np.asarray(picture)


def _inside(box: tuple[float, ...], width: int, height: int) -> Rectangle:
    """The box cut to pixels that exist, so that borders along the edge are seen."""
    x1, x2 = (min(max(v, 0.0), width - 1.0) for v in (box[0], box[2]))
    y1, y2 = (min(max(v, 0.0), height - 1.0) for v in (box[1], box[3]))
    return x1, y1, x2, y2


def _label_place(
    box: tuple[float, ...], size: tuple[float, float], image_wh: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Where a label goes: above its box, else below, else inside; the first place that covers no other label."""
    width, height = size
    right, bottom = max(0.0, image_wh[0] - width), max(0.0, image_wh[1] - height)
    places = []
    for x, y in (
        (box[0], box[1] - height),
        (box[2] - width, box[1] - height),
        (box[0], box[3]),
        (box[2] - width, box[3]),
        (box[0], box[1]),
        (box[0], box[3] - height),
    ):
        x, y = min(max(x, 0.0), right), min(max(y, 0.0), bottom)
        places.append((x, y, x + width, y + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _ink(colour: Colour) -> Colour:
    """Black or white, whichever reads better on `colour` (ITU-R BT.601 luma)."""
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luma > 140 else (255, 255, 255)
