"""What the three readers share: annotations as they stand in the files, and finding images and lines on disk."""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edgekd.data.problems import Problem, printable
from edgekd.errors import DataError

Format = Literal["voc", "coco", "yolo"]

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pnm"}
)

_VALIDATION = ("val", "valid", "validation")
PARTS = frozenset({"train", *_VALIDATION, "test", "trainval"})
"""Names of splits that are a part of a data set; a lone split of another name is the whole of it."""


@dataclass(frozen=True)
class RawObject:
    """One annotated object as its file states it, in edgekd's frame but neither clipped nor judged.

    Attributes:
        box: (x1, y1, x2, y2), pixels, or shares of the image where `RawImage.normalised`.
        label: the class name; an index where a YOLO data set names no classes or the index is out of range.
        line: 1-based line of the object in the annotation file.
        label_line: line of its class, if that is another.
        item: its entry, for formats without lines.
    """

    box: tuple[float, float, float, float]
    label: str | int
    difficult: bool = False
    crowd: bool = False
    line: int | None = None
    label_line: int | None = None
    item: str = ""


@dataclass(frozen=True)
class RawImage:
    """One image with its annotation as the files state it.

    Attributes:
        image_id: unique within the split.
        name: the image's file name within its split or image folder, with "/" between folders.
        path: the image file, which exists.
        annotation: the file that speaks of it.
        declared_hw: (height, width) that the annotation states; (0, 0) if it states nothing usable, None if the
            format has no such field.
        normalised: boxes are shares of the image's width and height.
    """

    image_id: str
    name: str
    path: Path
    annotation: Path
    declared_hw: tuple[int, int] | None = None
    objects: tuple[RawObject, ...] = ()
    normalised: bool = False
    item: str = ""


class Source(Protocol):
    """A data set in one of the three formats, before anything is judged."""

    root: Path
    format: Format

    def splits(self) -> tuple[str, ...]:
        """The splits that the data set offers, in its own order."""
        ...

    def class_names(self) -> tuple[str, ...] | None:
        """Class names in label order over all splits; None where the data set does not name them.

        Raises:
            DataError: they contradict each other.
        """
        ...

    def category_ids(self) -> Mapping[str, int] | None:
        """COCO's category id of each class, where known, so that converting to COCO gives them back."""
        ...

    def scan(self, split: str, problems: list[Problem], limit: int | None = None) -> list[RawImage]:
        """The split's images (the first `limit`); what is wrong goes to `problems`, and such images are left out."""
        ...


def find_split(split: str, splits: tuple[str, ...], root: Path) -> str:
    """The split of this name, or the only one that means the same: valid for val, train2017 for train.

    Raises:
        DataError: there is none; the message lists the ones that are.
    """
    if split not in splits:
        same = _VALIDATION if split in _VALIDATION else (split,)
        alike = [name for name in splits if name in same or (name[:-4] in same and name[-4:].isdigit())]
        if len(alike) == 1:
            return alike[0]
    require_split(split, splits, root)
    return split


def require_split(split: str, splits: tuple[str, ...], root: Path) -> None:
    """Raise unless the split is there.

    Raises:
        DataError: it is not; the message lists the ones that are.
    """
    if split not in splits:
        unsplit = len(splits) == 1 and splits[0] not in PARTS
        raise DataError(
            f"{printable(root)} has no split {split!r}",
            expected=", ".join(splits) if splits else "at least one split, but none was found",
            fix=f"it has no splits yet: `edgekd data split {printable(root)} --val 0.2` draws them"
            if unsplit
            else "name one of these: `data.train` and `data.val` in a recipe, --split on the command line"
            if splits
            else None,
        )


def is_image(path: Path) -> bool:
    """Whether the file name says that it is an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def files_under(folder: Path) -> Iterator[Path]:
    """Every file below the folder, sorted, hidden ones left out; links are followed, each folder once."""
    seen: set[tuple[int, int]] = set()
    for base, folders, names in os.walk(folder, followlinks=True):
        stat = os.stat(base)
        if (stat.st_dev, stat.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(base, name)


def is_regular(path: Path) -> bool:
    """Whether it is a plain file or leads to one; opening a pipe would wait for ever. Takes any text for a name."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def tails(text: str) -> list[str]:
    r"""A path as another machine has written it, then without its first folders, one after the other.

    "/home/me/set/images/1.jpg" and "C:\\set\\images\\1.jpg" end in "1.jpg"; of a path that claims no place on a disk
    ("data/images/1.jpg") the last folder stays, since names repeat between folders.
    """
    text = re.sub(r"^([a-z]:|[a-z]+://)", "/", text.replace("\\", "/"), flags=re.IGNORECASE)
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    least = 1 if text.startswith(("/", "../")) else 2
    return [text] + ["/".join(parts[start:]) for start in range(len(parts) - least + 1)]


def index_by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, list[Path]]:
    """Files with one of the (lower-case) suffixes below a folder, by their relative name without suffix."""
    index: dict[str, list[Path]] = {}
    for path in files_under(folder):
        if path.suffix.lower() in suffixes:
            index.setdefault(stem_of(path.relative_to(folder).as_posix()), []).append(path)
    return index


def stem_of(name: str) -> str:
    """A relative file name without its suffix, safe to print."""
    return printable(os.path.splitext(name)[0])


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """(1-based number, text) of the lines that hold something; any newline convention, with or without a BOM.

    UTF-16 is told by its BOM. Bytes that are not UTF-8 survive as surrogates, so that they still name the file they name.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read", got=error.strerror) from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as PowerShell's > writes
        text = data.decode("utf-16", "replace")
    else:
        text = data.decode("utf-8-sig", "surrogateescape")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
