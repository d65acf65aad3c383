"""A grid of a data set's images with their boxes and class names: the quickest way to see that labels are wrong."""

from __future__ import annotations

import colorsys
import io
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from edgekd.artifact import atomic_path
from edgekd.data.images import load_image
from edgekd.data.problems import printable
from edgekd.draw import Font, label_font
from edgekd.errors import DataError
from edgekd.types import Dataset, ImageRecord

_MARGIN, _CAPTION, _FONT_PX = 6, 16, 11
_PAGE, _INK, _BROKEN = (24, 24, 27), (228, 228, 231), (127, 29, 29)


def write_contact_sheet(
    dataset: Dataset, path: Path | str, *, count: int = 24, columns: int = 6, tile_px: int = 240, seed: int = 0
) -> Path:
    """Draw `count` images, drawn at random by `seed`, with their boxes into one picture; returns its path.

    Difficult objects are drawn thin and marked "?", crowds marked "*". Images that cannot be decoded show as a red tile.

    Raises:
        DataError: the split has no images.
    """
    path = Path(path)
    if not dataset.records:
        raise DataError(f"split {dataset.split!r} of {printable(dataset.root)} has no images to draw")
    chosen = sorted(random.Random(seed).sample(range(len(dataset)), min(count, len(dataset))))
    columns = min(columns, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    cell_w, cell_h = tile_px + _MARGIN, tile_px + _CAPTION + _MARGIN
    sheet = Image.new("RGB", (columns * cell_w + _MARGIN, rows * cell_h + _MARGIN), _PAGE)
    draw = ImageDraw.Draw(sheet)
    for position, index in enumerate(chosen):
        record = dataset.records[index]
        x = _MARGIN + position % columns * cell_w
        y = _MARGIN + position // columns * cell_h
        tile = _tile(record, dataset.class_names, tile_px)
        sheet.paste(tile, (x + (tile_px - tile.width) // 2, y + (tile_px - tile.height) // 2))
        caption = printable(record.image_id).replace("\n", " ")  # one line, whatever a file name holds
        font = label_font(caption, _FONT_PX)
        draw.text((x, y + tile_px + 2), _fit(draw, caption, font, tile_px), _INK, font)
    encoded = io.BytesIO()  # Pillow itself does not notice where a file ends short, on a full disk
    sheet.save(encoded, format={".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG"))
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())
    return path


def class_colour(label: int) -> tuple[int, int, int]:
    """An RGB colour a class; neighbours in label order lie far apart on the colour wheel."""
    r, g, b = colorsys.hsv_to_rgb(label * 0.618033988749895 % 1.0, 0.75, 1.0)
    return round(255 * r), round(255 * g), round(255 * b)


def _tile(record: ImageRecord, class_names: tuple[str, ...], tile_px: int) -> Image.Image:
    try:
        pixels = load_image(record.path)
    except DataError:
        return Image.new("RGB", (tile_px, tile_px), _BROKEN)
    h, w = record.image_hw
    scale = tile_px / max(h, w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    tile = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(tile)
    boxes = (np.asarray(record.boxes_xyxy) * scale).tolist()
    columns = list(zip(boxes, record.labels.tolist(), record.difficult, record.crowd, strict=True))
    for (x1, y1, x2, y2), label, difficult, crowd in columns:
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        draw.rectangle(corners, outline=class_colour(label), width=1 if difficult or crowd else 2)
    for (x1, y1, _, _), label, difficult, crowd in columns:
        name = printable(class_names[label]) + ("?" if difficult else "") + ("*" if crowd else "")
        _draw_name(draw, name, x1, y1, class_colour(label), tile.width)
    return tile


def _draw_name(
    draw: ImageDraw.ImageDraw, name: str, x: float, y: float, colour: tuple[int, int, int], tile_width: int
) -> None:
    """The name on a patch of its colour, above (x, y) where there is room."""
    font = label_font(name, _FONT_PX)
    _, _, width, height = draw.textbbox((0, 0), name, font=font)
    left = min(max(0.0, x), max(0.0, tile_width - width - 3))
    top = y - (height + 2) if y >= height + 2 else y
    draw.rectangle((left, top, left + width + 3, top + height + 1), fill=colour)
    r, g, b = colour
    draw.text((left + 2, top), name, (0, 0, 0) if 0.3 * r + 0.59 * g + 0.11 * b > 110 else (255, 255, 255), font)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength("..." + text, font=font) > width:
        text = text[1:]
    return "..." + text
