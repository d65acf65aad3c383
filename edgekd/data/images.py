"""Image files to RGB arrays: one reading for training, evaluation and the device.

The rules: EXIF orientation is applied; grayscale is repeated into three channels; 16-bit images keep their high byte;
alpha is dropped, leaving the stored colours (as OpenCV does); CMYK is converted without colour management; of
animations the first frame is read. A file that is cut off is an error, never half a picture, even with an end marker.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from edgekd.data.layout import UNREAD_SUFFIXES, unread_message
from edgekd.data.problems import printable
from edgekd.errors import DataError
from edgekd.types import ImageArray, ImageRecord

MAX_PIXELS = 89_000_000
"""Larger images are refused: just below the size at which Pillow suspects a decompression bomb."""

FEW_GREYS = 32
"""Grey values, of 256, up to which a 16-bit image has lost what is to be seen: sensors of 12 bits, or thermal ones of 14."""

_MAX_BYTES = 1 << 30
_EXIF_ORIENTATION = 0x0112


def spread_places(total: int, count: int) -> list[int]:
    """At most `count` places among `total`, evenly, since sets are often sorted by content."""
    places: list[int] = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
    return places


def evenly_spread(records: Sequence[ImageRecord], count: int) -> list[Path]:
    """At most `count` image files, evenly over a data set."""
    return [records[place].path for place in spread_places(len(records), count)]


def load_image(path: Path | str) -> ImageArray:
    """Read an image file as (H, W, 3) uint8 RGB, upright.

    Raises:
        DataError: the file is missing, empty, cut off, damaged, no image, or larger than `MAX_PIXELS`.
    """
    return examine_image(path).pixels


class Oddity(NamedTuple):
    """What a decoder finds odd about a file that it can read, and whether pixels are wrong, to all appearance."""

    text: str
    is_damage: bool


class Examined(NamedTuple):
    """An image, and what there is to say of its file.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, upright, as `load_image` gives it.
        oddity: what the decoder finds odd, if anything.
        is_16bit: it is a greyscale image of 16 bits, of which `pixels` have the high byte.
        is_turned: EXIF has it shown otherwise than its pixels are stored.
    """

    pixels: ImageArray
    oddity: Oddity | None = None
    is_16bit: bool = False
    is_turned: bool = False


def grey_span(pixels: ImageArray) -> int:
    """How many of the 256 grey values an image spans; dead and hot pixels, a thousandth at each end, do not count."""
    shares = np.bincount(pixels[..., 0].reshape(-1), minlength=256).cumsum() / (pixels.size // pixels.shape[-1])
    return int(np.searchsorted(shares, 0.999) - np.searchsorted(shares, 0.001, "right")) + 1


def grey_spans(paths: Sequence[Path]) -> list[int]:
    """`grey_span` of the 16-bit images among these; others are not decoded, and broken ones left to whoever needs them."""
    spans = []
    for path in paths:
        with contextlib.suppress(DataError, OSError), Image.open(path) as image:
            if image.mode.startswith("I") and (examined := examine_image(path)).is_16bit:
                spans.append(grey_span(examined.pixels))
    return spans


def lost_greys(spans: Sequence[int]) -> str:
    """What to say of 16-bit images whose grey values span so few that a picture of 8 bits shows little of them, if anything."""
    if not spans or max(spans) > FEW_GREYS:
        return ""
    return f"16-bit images are read by their high byte alone, which spans at most {max(spans)} of 256 greys"


def examine_image(path: Path | str) -> Examined:
    """What `load_image` gives, with what there is to say of the file.

    Raises:
        DataError: as `load_image`.
    """
    path = Path(path)
    return _decode(_read(path), path)


def decode_image(data: bytes) -> ImageArray:
    """An image file's bytes as (H, W, 3) uint8 RGB, upright.

    Raises:
        DataError: the bytes are empty, cut off, damaged, no image, or of one larger than `MAX_PIXELS`.
    """
    return _decode(data, Path("image")).pixels


def _decode(data: bytes, path: Path) -> Examined:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(path, image)
            orientation = _orientation(image)
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            pixels, oddity = _jpeg_pixels(data) if plain else (None, None)
            is_16bit = False
            if pixels is None:
                pixels, is_16bit = _pillow_pixels(image)
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly anything on hostile bytes; to the user it is one thing
        raise _unreadable(path, error) from error
    return Examined(np.ascontiguousarray(_upright(pixels, orientation)), oddity, is_16bit, orientation > 1)


def image_hw(path: Path | str) -> tuple[int, int]:
    """(height, width) in pixels after EXIF orientation, from the header alone.

    Raises:
        DataError: the file is missing, empty, no image, or larger than `MAX_PIXELS`.
    """
    path = Path(path)
    _require_file(path)
    try:
        with Image.open(path) as image:
            _check_size(path, image)
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)
    except DataError:
        raise
    except Exception as error:  # see load_image
        raise _unreadable(path, error) from error


def _require_file(path: Path) -> None:
    """Raise for a folder or a pipe, which nothing may ever come out of."""
    if path.exists() and not path.is_file():
        raise DataError(f"{printable(path)}: not a file", expected="an image file")


def _read(path: Path) -> bytes:
    _require_file(path)
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise DataError(
                f"{printable(path)}: too large for an image", got=f"{size:,} bytes", expected="at most 1 GiB"
            )
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    name = printable(path)
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name}: there is no such image")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _too_large(path, str(error))
    try:
        if path.is_file() and path.stat().st_size == 0:
            return DataError(f"{name}: the image file is empty (0 bytes)")
    except OSError:
        pass
    if isinstance(error, UnidentifiedImageError) and path.suffix.lower() in UNREAD_SUFFIXES:
        return DataError(f"{name}: {unread_message(path)}")
    if isinstance(error, UnidentifiedImageError):
        return DataError(f"{name}: not an image, or of a kind that Pillow does not know", got=_beginning(path))
    return DataError(f"{name}: the image cannot be read", got=f"{type(error).__name__}: {error}")


def _beginning(path: Path) -> str | None:
    """What a file starts with: enough to see an error page, that Git LFS has left a pointer, or an iPhone's picture that
    was called .jpg."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(40)
        if head[4:8] == b"ftyp":
            return f"HEIC or a relative of it ({head[8:12].decode('ascii', 'replace')}): convert it to JPEG or PNG"
        text = head.decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return f"a text that starts with {text!r}" if text.isprintable() or "\n" in text else None


def _too_large(path: Path, got: str) -> DataError:
    return DataError(
        f"{printable(path)}: the image is too large to load safely",
        got=got,
        expected=f"at most {MAX_PIXELS:,} pixels",
        fix="cut or shrink the image, and its boxes with it",
    )


def _check_size(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width} x {height} = {width * height:,} pixels")
    if width < 1 or height < 1:
        raise DataError(f"{printable(path)}: the image has no pixels", got=f"{width} x {height}")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8 that is still to be applied, from what stands before the pixels; damaged EXIF counts as 1."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, sizes included
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole file to look behind the pixels
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # EXIF is a side note written by anyone's camera: never a reason to refuse a sound picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: ImageArray, orientation: int) -> ImageArray:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


_LOST = ("premature end", "bad huffman code", "instead of rst")
"""In libjpeg's warnings: pixels are missing or wrong. Others may tell of an odd encoder only."""


def _jpeg_pixels(data: bytes) -> tuple[ImageArray | None, Oddity | None]:
    """Pixels equal to Pillow's, only faster; or None, for Pillow to look at, and what is odd about the file.

    Pillow and OpenCV fill what is missing of a damaged file with grey, as long as its end marker is in its place.

    Raises:
        ValueError: a part of the picture is damaged or missing.
    """
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", strict=True), np.uint8), None
    except ValueError as error:
        if any(word in str(error).lower() for word in _LOST):
            raise
        return None, Oddity(str(error), _runs_on(data, str(error)))


def _runs_on(data: bytes, warning: str) -> bool:
    """Whether a picture's data goes on behind its last row: somewhere before, the decoder has lost its way.

    Padding, which some encoders leave there, is the same byte again and again.
    """
    found = re.search(r"(\d+) extraneous bytes before marker 0xd9", warning)
    if found is None:
        return False
    end = data.rfind(b"\xff\xd9")
    return len(set(data[max(0, end - int(found[1])) : end])) > 1


def _pillow_pixels(image: Image.Image) -> tuple[ImageArray, bool]:
    """Pixels, and whether they are the high bytes of 16 bits."""
    image.load()
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        # Mode "I" also holds 8-bit values in some formats; only what exceeds them is taken as 16-bit.
        is_wide = image.mode != "I" or int(wide.max(initial=0)) > 255
        gray = np.clip(wide >> 8 if is_wide else wide, 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2), is_wide
    if image.mode == "F":
        raise ValueError("floating-point images have no agreed range; save it as 8 or 16 bits")
    if image.mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"), np.uint8), False
