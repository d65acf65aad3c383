"""What the three readers share: annotations as they stand in the files, and finding images and lines on disk."""

from __future__ import annotations

import codecs
import contextlib
import errno
import math
import os
import re
import shlex
import stat
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edgekd.artifact import stand_in
from edgekd.data.problems import Problem, printable
from edgekd.errors import DataError

Format = Literal["voc", "coco", "yolo"]

Numbers = Literal["left, top, right, bottom", "left, top, width, height", "centre, width, height"]
"""What the four numbers of a box are in its file."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpx", ".png", ".apng", ".gif", ".webp"}
) | {".avif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"}
"""What Pillow reads. One without the decoder for a rarer kind says so of the file: nothing is passed over by its name."""

UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}
)
"""Photographs of kinds that are not read, and must not go missing silently."""

_VALIDATION = ("val", "valid", "validation")
PARTS = frozenset({"train", *_VALIDATION, "test", "trainval"})
"""Names of splits, in small letters, that are a part of a data set; a lone split of another name is the whole of it."""


@dataclass(frozen=True)
class RawObject:
    """One annotated object as its file states it, in edgekd's frame but neither clipped nor judged.

    Attributes:
        box: (x1, y1, x2, y2), pixels, or shares of the image where `RawImage.normalised`.
        label: the class name; an index where a YOLO data set names no classes.
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
        numbers: what a box's numbers are in the file, by its format.
        teachers: names of those who annotated it, where `edgekd data label` did.
    """

    image_id: str
    name: str
    path: Path
    annotation: Path
    declared_hw: tuple[int, int] | None = None
    objects: tuple[RawObject, ...] = ()
    normalised: bool = False
    item: str = ""
    numbers: Numbers = "left, top, right, bottom"
    teachers: tuple[str, ...] = ()


def around(box: tuple[float, float, float, float], degrees: float) -> tuple[float, float, float, float]:
    """The upright box around one that is turned about its centre: CVAT exports it as it lay before, with a rotation."""
    if not math.isfinite(degrees):
        return (math.nan,) * 4
    if degrees % 180 == 0:
        return box
    x1, y1, x2, y2 = box
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    w, h = (x2 - x1) * cos + (y2 - y1) * sin, (x2 - x1) * sin + (y2 - y1) * cos
    return (x1 + x2 - w) / 2, (y1 + y2 - h) / 2, (x1 + x2 + w) / 2, (y1 + y2 + h) / 2


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
    """The split of this name, or the only one that means the same: valid or Validation for val, train2017 for train.

    Raises:
        DataError: there is none; the message lists the ones that are.
    """
    if split not in splits:
        asked = split.casefold()
        same = _VALIDATION if asked in _VALIDATION else (asked,)
        alike = [name for name in splits if _kind(name) in same]
        if len(alike) == 1:
            return alike[0]
    require_split(split, splits, root)
    return split


def usual_split(names: Sequence[str], splits: tuple[str, ...], root: Path) -> str | None:
    """The split of the first of these names that `find_split` finds one for."""
    for name in names:
        with contextlib.suppress(DataError):
            return find_split(name, splits, root)
    return None


def require_split(split: str, splits: tuple[str, ...], root: Path) -> None:
    """Raise unless the split is there.

    Raises:
        DataError: it is not; the message lists the ones that are.
    """
    if split not in splits:
        raise DataError(
            f"{printable(root)} has no split {split!r}",
            expected=", ".join(splits) if splits else "at least one split, but none was found",
            fix=_split_fix(split, splits, root) if splits else None,
        )


def _split_fix(split: str, splits: tuple[str, ...], root: Path) -> str:
    if len(splits) == 1:
        return split_advice(root, splits)
    named = "name one of these: `data.train` and `data.val` in a recipe, --split on the command line"
    lacks = split.casefold() in _VALIDATION and not any(map(is_validation, splits))
    return f"{named}; or {split_advice(root, splits)}" if lacks else named


def split_advice(root: Path, splits: Sequence[str]) -> str:
    """The command that draws splits for a data set which has these."""
    command = f"edgekd data split {shlex.quote(printable(root))}"
    if len(splits) == 1 and not is_part(splits[0]):
        return f"it has no splits yet: `{command} --val 0.2` draws them"
    if not any(map(is_validation, splits)):
        part = next((name for name in splits if name.casefold().startswith("train")), splits[0])
    else:
        part = next((name for name in splits if not is_part(name) and not is_validation(name)), "")
        if not part:
            return "use them as they are"
    beside = shlex.quote(printable(split_folder(root)))
    words = f"`{command} --from {shlex.quote(printable(part))} --val 0.2 --out {beside}`"
    return f"{words} writes a data set beside it in which {printable(part)!r} is divided"


def split_folder(root: Path) -> Path:
    """Where `split_advice` has the divided data set written: beside `root`."""
    folder = root if root.name not in ("", "..") else root.resolve()
    return folder.with_name(f"{folder.stem if folder.is_file() else folder.name}-split")


def is_validation(split: str) -> bool:
    """Whether a split is called like one to validate on: Validation, val2017."""
    return _kind(split) in _VALIDATION


def _kind(split: str) -> str:
    """A split's name without COCO's year."""
    return re.sub(r"\d{4}$", "", split.casefold())


def is_part(split: str) -> bool:
    """Whether a split is called like a part of a data set, in whatever letters (CVAT writes Train)."""
    return split.casefold() in PARTS


def is_image(path: Path) -> bool:
    """Whether the file name says that it is an image that can be read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def unread_images(paths: Collection[Path]) -> list[Path]:
    """Those of the files that are images of a kind that is not read, unless one of the same name that is lies beside."""
    read = {path.with_suffix("") for path in paths if is_image(path)}
    return [path for path in paths if path.suffix.lower() in UNREAD_SUFFIXES and path.with_suffix("") not in read]


def unread_message(path: Path) -> str:
    """What to say of one of `unread_images`."""
    return f"{printable(path.name)} is of a kind that is not read: convert it to JPEG or PNG"


def is_hidden(name: str) -> bool:
    """Whether files or folders of this name are passed over: hidden ones, and the one that disks have for what fsck finds."""
    return name.startswith(".") or name == "lost+found"


def files_under(folder: Path) -> Iterator[Path]:
    """Every file below the folder, sorted, hidden ones left out; links are followed, each folder once.

    Raises:
        PermissionError: a folder below may not be looked into: what is in it would go missing silently.
    """
    seen: set[tuple[int, int]] = set()
    for base, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        stat = os.stat(base)
        if (stat.st_dev, stat.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            if not is_hidden(name):
                yield Path(base, name)


def _refuse(error: OSError) -> None:
    if isinstance(error, PermissionError):  # others: the folder is not there
        raise error


def each_file(folder: Path) -> Iterator[Path]:
    """The files below a folder, in no order and as they are found: to tell their kind, where listing all takes seconds."""
    seen: set[tuple[int, int]] = set()
    folders = [folder]
    while folders:
        base = folders.pop()
        stat = base.stat()
        if (stat.st_dev, stat.st_ino) in seen:  # as in `files_under`
            continue
        seen.add((stat.st_dev, stat.st_ino))
        with contextlib.suppress(OSError), os.scandir(base) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(Path(entry.path))
                else:
                    yield Path(entry.path)


def is_regular(path: Path) -> bool:
    """Whether it is a plain file or leads to one; opening a pipe would wait for ever. Takes any text for a name."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_regular(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        OSError: it cannot be read, or is no file: a pipe, out of which nothing may ever come.
    """
    if path.exists() and not path.is_dir() and not is_regular(path):
        raise OSError(errno.EINVAL, "not a file")
    return path.read_bytes()


def tails(text: str) -> list[str]:
    r"""A path as another machine has written it, then without its first folders, one after the other.

    "/home/me/set/images/1.jpg" and "C:\\set\\images\\1.jpg" end in "1.jpg"; of a path that claims no place on a disk
    ("data/images/1.jpg") the last folder stays, since names repeat between folders. Then all of them in their other `forms`.
    """
    text = re.sub(r"^([a-z]:|[a-z]+://)", "/", text.replace("\\", "/"), flags=re.IGNORECASE)
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    least = 1 if text.startswith(("/", "../")) else 2
    found = [text] + ["/".join(parts[start:]) for start in range(len(parts) - least + 1)]
    return found + [form for tail in found for form in forms(tail)[1:]]


def forms(name: str) -> list[str]:
    """A file name as it stands, then with an accented letter as one character and as two, where that differs.

    To the eye they are one: a Mac writes two, and what goes through an archive or a labelling tool may come out as one.
    """
    if name.isascii():
        return [name]
    return list(dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))))


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
        DataError: the file cannot be read, or is Git LFS's pointer to it.
    """
    try:
        data = read_regular(path)
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read", got=error.strerror) from error
    if data.startswith(b"version ") and (found := stand_in(path)):
        raise DataError(f"{printable(path)} is {found[0]}", fix=found[1])
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as PowerShell's > writes
        text = data.decode("utf-16", "replace")
    else:
        text = data.decode("utf-8-sig", "surrogateescape")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
