from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from edgekd.data.images import MAX_PIXELS, examine_image, image_hw, load_image
from edgekd.errors import DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (24, 36, 3), np.uint8)
SMOOTH = np.asarray(Image.fromarray(RGB).resize((180, 120), Image.Resampling.BICUBIC), np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 75},
        {"quality": 90, "subsampling": 0},
        {"quality": 60, "subsampling": 1},
        {"progressive": True},
        {"optimize": True, "quality": 30},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_path_gives_pillows_pixels(tmp_path: Path, mode: str, options: dict[str, object]) -> None:
    path = saved(tmp_path / "x.jpg", Image.fromarray(SMOOTH).convert(mode), **options)
    np.testing.assert_array_equal(load_image(path), np.asarray(Image.open(path).convert("RGB")))


def test_the_fast_path_gives_pillows_pixels_on_photographs(voc2007: Path, tiny_coco: Path) -> None:
    photos = sorted((voc2007 / "JPEGImages").iterdir())[:60] + sorted((tiny_coco / "val2017").iterdir())
    for path in photos:
        image = load_image(path)
        np.testing.assert_array_equal(image, np.asarray(Image.open(path).convert("RGB")), str(path))
        assert image_hw(path) == image.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("suffix", "options"), [("jpg", {}), ("png", {}), ("tif", {}), ("webp", {"lossless": True})])
def test_exif_orientation(tmp_path: Path, suffix: str, options: dict[str, object], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"x.{suffix}", Image.fromarray(RGB), exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    np.testing.assert_array_equal(load_image(path), expected)
    assert image_hw(path) == expected.shape[:2] == ((36, 24) if orientation >= 5 else (24, 36))


def test_damaged_exif_is_passed_over(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", Image.fromarray(RGB), exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert load_image(path).shape == (24, 36, 3)
    assert image_hw(path) == (24, 36)


GRAY16 = RNG.integers(0, 65536, (24, 36), np.uint16)
PALETTE = Image.fromarray(RGB).quantize(16)
CASES = {
    "gray": (Image.fromarray(RGB[..., 0]), "png", {}, np.repeat(RGB[..., :1], 3, 2)),
    "gray-alpha": (
        Image.merge("LA", [Image.fromarray(RGB[..., i]) for i in (0, 1)]),
        "png",
        {},
        np.repeat(RGB[..., :1], 3, 2),
    ),
    "rgba": (Image.merge("RGBA", [*Image.fromarray(RGB).split(), Image.new("L", (36, 24), 0)]), "png", {}, RGB),
    "gray16": (Image.fromarray(GRAY16), "png", {}, np.repeat((GRAY16 >> 8).astype(np.uint8)[..., None], 3, 2)),
    "gray16-tiff": (Image.fromarray(GRAY16), "tif", {}, np.repeat((GRAY16 >> 8).astype(np.uint8)[..., None], 3, 2)),
    "palette": (PALETTE, "png", {}, np.asarray(PALETTE.convert("RGB"))),
    "palette-transparent": (PALETTE, "png", {"transparency": b"\x00\x80\xff"}, np.asarray(PALETTE.convert("RGB"))),
    "gif": (PALETTE, "gif", {"transparency": 3}, np.asarray(PALETTE.convert("RGB"))),
    "bilevel": (Image.fromarray(RGB[..., 0] > 127), "png", {}, np.repeat((RGB[..., :1] > 127) * np.uint8(255), 3, 2)),
    "bmp": (Image.fromarray(RGB), "bmp", {}, RGB),
    "ppm": (Image.fromarray(RGB), "ppm", {}, RGB),
    "webp": (Image.fromarray(RGB), "webp", {"lossless": True}, RGB),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CASES)
def test_modes(tmp_path: Path, name: str) -> None:
    image, suffix, options, expected = CASES[name]
    path = saved(tmp_path / f"x.{suffix}", image, **options)
    found = load_image(path)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert image_hw(path) == (24, 36)
    np.testing.assert_array_equal(found, expected)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", Image.fromarray(SMOOTH).convert("CMYK"), quality=95)
    assert np.abs(load_image(path).astype(int) - SMOOTH).mean() < 4


def test_rgb16_png_keeps_the_high_byte(tmp_path: Path) -> None:
    wide = RNG.integers(0, 65536, (5, 7, 3), np.uint16)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in wide)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for tag, content in chunks:
        data += struct.pack(">I", len(content)) + tag + content + struct.pack(">I", zlib.crc32(tag + content))
    (tmp_path / "x.png").write_bytes(data)
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), (wide >> 8).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_errors(tmp_path: Path, suffix: str, share: float) -> None:
    whole = io.BytesIO()
    Image.fromarray(SMOOTH).save(whole, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])
    with pytest.raises(DataError, match=f"cut.{suffix}"):
        load_image(path)


def jpeg_bytes(side: int = 128) -> bytearray:
    """A photograph-like JPEG, of which every byte matters."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return bytearray(stream.getvalue())


def test_half_a_jpeg_with_an_end_marker_is_an_error(tmp_path: Path) -> None:
    data = jpeg_bytes()
    path = tmp_path / "half.jpg"
    path.write_bytes(data[: len(data) * 2 // 3] + b"\xff\xd9")
    with pytest.raises(DataError, match=r"half.jpg[^$]*premature end"):
        load_image(path)


def test_a_jpeg_overwritten_in_the_middle_is_an_error_or_doubted(tmp_path: Path) -> None:
    whole = jpeg_bytes()
    path = tmp_path / "hole.jpg"
    path.write_bytes(whole)
    clean, oddity, *_ = examine_image(path)
    assert oddity is None
    told = 0
    for seed in range(12):
        data, rng = whole.copy(), np.random.default_rng(seed)
        start = int(rng.integers(len(data) * 7 // 10, len(data) * 9 // 10))
        data[start : start + 60] = rng.integers(0, 256, 60, np.uint8).tobytes()
        path.write_bytes(data)
        try:
            pixels, oddity, *_ = examine_image(path)
        except DataError:
            told += 1
            continue
        told += oddity is not None
        assert not np.array_equal(pixels, clean)
    assert told >= 10  # rarely, what is left decodes as if nothing had been


def test_a_jpeg_with_bytes_behind_its_end_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", Image.fromarray(SMOOTH))
    clean = load_image(path)
    path.write_bytes(path.read_bytes() + b"trailing")
    np.testing.assert_array_equal(load_image(path), clean)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC .*convert it to JPEG"),
        (b"\xff\xd8\xff\xe0garbage\xff\xd9", "bad.jpg"),
        (None, "no such image"),
    ],
)
@pytest.mark.parametrize("read", [load_image, image_hw])
def test_what_is_no_image_is_named(tmp_path: Path, read, content: bytes | None, words: str) -> None:
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(path)


@pytest.mark.parametrize("side", [9_500, 15_000, 65_000])
@pytest.mark.parametrize("read", [load_image, image_hw])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, read, side: int) -> None:
    assert side * side > MAX_PIXELS
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for tag, content in [(b"IHDR", header), (b"IDAT", zlib.compress(b"\x00" * 10)), (b"IEND", b"")]:
        data += struct.pack(">I", len(content)) + tag + content + struct.pack(">I", zlib.crc32(tag + content))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(DataError, match="too large to load"):
        read(tmp_path / "bomb.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_image_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for read in (image_hw, load_image):
        with pytest.raises(DataError, match="not a file"):
            read(tmp_path / "a.png")
