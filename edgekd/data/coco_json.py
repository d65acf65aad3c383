"""What stands in a COCO JSON file, as people and services write it: its three lists, its categories, its numbers."""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from edgekd.artifact import stand_in
from edgekd.data.layout import around
from edgekd.data.problems import printable
from edgekd.errors import DataError

_SNIFFED_BYTES = 1 << 30


class CocoError(ValueError):
    """A file is no COCO JSON; `line` is where, if that is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def load_coco(path: Path) -> Mapping[str, Any]:
    """A COCO file with its three lists.

    Raises:
        CocoError: unreadable, malformed, or without them.
    """
    try:
        data = json.loads(_text(path))
    except json.JSONDecodeError as error:
        if found := stand_in(path):
            raise CocoError(f"{found[0]}: {found[1]}") from error
        raise CocoError(f"malformed JSON: {error.msg}", error.lineno) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CocoError(f"not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CocoError("no COCO file: the outermost value is no object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise CocoError(f"no COCO file: {key!r} is {'no list' if key in data else 'missing'}")
    return data


def stamp(path: Path) -> tuple[int, int]:
    """What `categories` remembers a file by."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=64)
def categories(path: Path, mtime_ns: int, size: int) -> dict[int, str]:
    """Category id -> name of one file, without parsing the rest of what may be hundreds of megabytes.

    A file that cannot be parsed has none; `scan` reports it. Several ids may have one name: Roboflow numbers a project
    of the class's own name as category 0.

    Raises:
        DataError: the categories are wrong in themselves.
    """
    try:
        entries = _category_entries(_text(path), path)
    except (OSError, ValueError, RecursionError):
        return {}
    names: dict[int, str] = {}
    for position, entry in enumerate(entries):
        where = f"{printable(path)}: categories[{position}]"
        identity = whole(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None or not (is_name(entry.get("name")) or _is_integer(entry.get("name"))):
            raise DataError(f"{where} needs an integer id and a name", got=str(entry)[:100])
        name = str(entry["name"])
        if names.setdefault(identity, name) != name:
            raise DataError(
                f"{where} repeats an id", got=f"{identity}: {name!r}", expected=f"{names[identity]!r} alone"
            )
    return names


def _category_entries(text: str, path: Path) -> list[Any]:
    found = list(re.finditer(r'"categories"\s*:\s*(?=\[)', text))
    if len(found) == 1:  # else an image, or `info`, has a list of that name as well
        with contextlib.suppress(ValueError):
            return list(json.JSONDecoder().raw_decode(text, found[0].end())[0])
    return list(load_coco(path)["categories"])


def looks_like_coco(path: Path) -> bool:
    """Whether a JSON file has the lists of a COCO file, by a glance."""
    try:
        if path.stat().st_size > _SNIFFED_BYTES:
            return True
        data = path.read_bytes()
    except OSError:
        return False
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as PowerShell's > writes
        data = data.replace(b"\0", b"")
    return b'"images"' in data and (b'"annotations"' in data or b'"categories"' in data)


def declared_hw(entry: Mapping[str, Any]) -> tuple[int, int]:
    """An image entry's (height, width); zeros where it states none that can be used."""
    h, w = whole(entry.get("height")), whole(entry.get("width"))
    return (0, 0) if h is None or w is None else (h, w)


def corners(entry: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """An annotation's box as x1, y1, x2, y2, around it where it is turned; of its polygons, where it has no bbox.

    Raises:
        CocoError: it has neither.
    """
    box, polygons = entry.get("bbox"), entry.get("segmentation")
    parts = polygons if not box and isinstance(polygons, list) else []
    if parts and all(isinstance(part, list) and len(part) >= 6 and all(map(_is_number, part)) for part in parts):
        xs, ys = [x for part in parts for x in part[::2]], [y for part in parts for y in part[1::2]]
        return float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        mask = "; `pycocotools.mask.toBbox` gives the one around its RLE mask" if isinstance(polygons, dict) else ""
        raise CocoError(f"bbox must be [x, y, width, height], got {repr(box)[:80]}{mask}")
    x, y, w, h = map(float, box)
    rotation = attributes(entry).get("rotation")
    return around((x, y, x + w, y + h), float(rotation) if _is_number(rotation) else 0)


def attributes(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What CVAT and Datumaro say of an object beyond the format."""
    found = entry.get("attributes")
    return found if isinstance(found, dict) else {}


def flag(value: object) -> bool:
    """A flag that is 0 or 1, as a number or, as pandas writes it, a text; one that is not set is False.

    Raises:
        CocoError: it is something else.
    """
    number = int(value) if isinstance(value, bool) else 0 if value is None else whole(value)
    if number not in (0, 1):
        raise CocoError(f"iscrowd and difficult must be 0 or 1, got {value!r}")
    return bool(number)


def id_key(value: object) -> str | None:
    """An id as text, the same for 7, 7.0 (as pandas writes it) and "7"; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def whole(value: object) -> int | None:
    """A number that is an integer, also where it is written 7.0 or "7"."""
    key = id_key(value)
    return int(key) if key is not None and re.fullmatch(r"-?[0-9]{1,18}", key) else None


def is_name(value: object) -> TypeGuard[str]:
    """Whether it is a text with something in it."""
    return isinstance(value, str) and value != ""


def _text(path: Path) -> str:
    data = path.read_bytes()
    return data.decode(json.detect_encoding(data))


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
