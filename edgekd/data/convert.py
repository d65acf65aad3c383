"""Between VOC, COCO and YOLO layouts, and back, without loss of what edgekd reads.

Kept: boxes (to 1e-9 px), classes and their order, difficult and crowd flags, image ids, file names, splits, COCO's
category ids, that teachers have annotated a split (`data label`), and every image byte for byte. What VOC and YOLO have no
place for goes into `edgekd.json`; what COCO has no place for into keys of its own that other readers pass over. Not kept:
what edgekd does not read (masks, keypoints, poses, marks such as truncated and occluded), and boxes that reading refuses,
which the report names.
"""

from __future__ import annotations

import filecmp
import itertools
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import get_args

import numpy as np
from PIL import Image

from edgekd.artifact import atomic_folder
from edgekd.data.layout import IMAGE_SUFFIXES, Format, RawImage, Source, require_split
from edgekd.data.problems import Problem, printable, raise_if_stopped
from edgekd.data.reading import class_names_of, open_source
from edgekd.data.records import Resolved, resolve
from edgekd.data.writers import Content, Placed, image_folder, write_coco, write_voc, write_yolo
from edgekd.errors import DataError, refusal

_WRITERS = {"voc": write_voc, "coco": write_coco, "yolo": write_yolo}


@dataclass(frozen=True)
class ConvertReport:
    """What was written.

    Attributes:
        images: split -> number of images.
        objects: split -> number of boxes.
        problems: what reading refused or clipped on the way.
    """

    out: Path
    format: Format
    images: Mapping[str, int]
    objects: Mapping[str, int]
    problems: tuple[Problem, ...]


def convert_dataset(
    source: Path | str,
    out: Path | str,
    to: str,
    *,
    format: str = "auto",
    splits: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    link: bool = False,
) -> ConvertReport:
    """Write a data set, or some of its splits, in another layout at `out`, all of it or nothing.

    `link` hard-links the images where the file system allows, instead of copying them.

    Raises:
        DataError: the source cannot be read whole, `to` is no format, or `out` is there and not empty,
            or within the source.
    """
    source, out = Path(source), Path(out)
    if to not in _WRITERS:
        raise DataError(f"unknown data format {to!r}", expected=", ".join(get_args(Format)))
    require_new(out, source)
    opened = open_source(source, format)
    problems: list[Problem] = []
    found: dict[str, list[RawImage]] = {}
    for split in dict.fromkeys(splits or opened.splits()):
        require_split(split, opened.splits(), source)
        found[split] = opened.scan(split, problems)
    return write_dataset(opened, found, out, to, class_names=class_names, link=link, problems=problems)


def require_new(out: Path, source: Path) -> None:
    """Raise unless a data set can be written at `out`, with its images from `source`.

    Raises:
        DataError: `out` is there and not empty, or within `source`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{printable(out)} is there already and not empty", fix="name a new folder, or remove this one")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        fix = "choose a folder beside it: one within would be read as a part of it"
        raise DataError(f"{printable(out)} lies within the data set", fix=fix)


def write_dataset(
    source: Source,
    splits: Mapping[str, Sequence[RawImage]],
    out: Path,
    to: str,
    *,
    class_names: Sequence[str] | None = None,
    link: bool = False,
    problems: Sequence[Problem] = (),
) -> ConvertReport:
    """Write images of `source`, as these splits, in layout `to` at `out` (see `require_new`), all of it or nothing.

    `problems` are those of scanning them.

    Raises:
        DataError: an image or its annotation cannot be read, or the layout cannot hold a name.
    """
    names = class_names_of(source, class_names)
    judged = list(problems)
    found: dict[str, list[Resolved]] = {}
    for split, raws in splits.items():
        _check_split_name(split)
        found[split] = resolve(raws, names, split, judged)
    raise_if_stopped(judged, printable(source.root))
    placed = _place(found, to)
    by = {split: dict.fromkeys(name for raw in raws for name in raw.teachers) for split, raws in splits.items()}
    content = Content(
        names, source.category_ids(), placed, {split: tuple(teachers) for split, teachers in by.items() if teachers}
    )
    try:
        with atomic_folder(out) as folder:
            _put_images(folder, to, content, link)
            _WRITERS[to](folder, content)
    except OSError as error:
        raise refusal(error, printable(out)) from error
    return ConvertReport(
        out,
        to,  # type: ignore[arg-type]  # checked above
        {split: len(rows) for split, rows in placed.items()},
        {split: sum(len(row.boxes) for row in rows) for split, rows in placed.items()},
        tuple(judged),
    )


def _put_images(folder: Path, to: str, content: Content, link: bool) -> None:
    """Copy or link each image once; where several splits need it in folders of their own, link the copies."""
    first: dict[Path, Path] = {}
    for split, rows in content.splits.items():
        base = folder / image_folder(to, split)
        base.mkdir(parents=True, exist_ok=True)
        for row in rows:
            source, target = row.record.path.resolve(), base / row.name
            if target.exists():  # VOC: another split has put it there
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if source in first or link:
                try:
                    os.link(first.get(source, source), target)
                    continue
                except OSError:  # another file system, or one without hard links
                    pass
            shutil.copyfile(source, target)
            first[source] = target


def _place(found: Mapping[str, list[Resolved]], to: str) -> dict[str, list[Placed]]:
    """Give every image a safe file name, unique within its folder; without its suffix too, where annotations go by that.

    All splits of VOC lie in one folder. An image that is in several is then one file, if the splits agree on its pixels
    and its annotation.
    """
    shared = to == "voc"
    placed: dict[str, list[Placed]] = {}
    taken: dict[str, tuple[str, Resolved]] = {}
    for split, rows in found.items():
        taken = taken if shared else {}
        placed[split] = []
        for row in rows:
            name = _safe_name(row)
            stem, suffix = os.path.splitext(name)
            for addition in itertools.chain(["", f"_{split}"], (f"_{split}_{n}" for n in itertools.count(2))):
                name = stem + addition + suffix
                key = name if to == "coco" else stem + addition
                if taken.setdefault(key, (name, row))[1] is row or (shared and _same(row, taken[key][1])):
                    break
            placed[split].append(Placed(row.record, row.boxes, taken[key][0]))
    return placed


def _same(a: Resolved, b: Resolved) -> bool:
    """Whether two splits speak of the same picture and say the same of it."""
    pairs = ("labels", "difficult", "crowd")
    if not np.array_equal(a.boxes, b.boxes):
        return False
    if not all(np.array_equal(getattr(a.record, key), getattr(b.record, key)) for key in pairs):
        return False
    return a.record.path == b.record.path or filecmp.cmp(a.record.path, b.record.path, shallow=False)


def _safe_name(row: Resolved) -> str:
    """The image's name such that every layout can hold it: no way out of the folder, nothing hidden, a known suffix."""
    parts = [part for part in PurePosixPath(row.name).parts if part not in ("/", "..")]
    parts = [re.sub(r"[\x00-\x1f\x7f\\\\:]", "_", part).strip() for part in parts]
    name = "/".join("_" + part if part.startswith(".") else part for part in parts if part) or "image"
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in IMAGE_SUFFIXES:
        return stem.rstrip() + suffix
    with Image.open(row.record.path) as image:  # a name without suffix: readers go by it
        suffix = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(image.format or "", f".{image.format}".lower())
    return name + (suffix if suffix in IMAGE_SUFFIXES else ".png")


def _check_split_name(split: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise DataError(f"split name {split!r} cannot be a file name", expected="letters, digits, '_', '-', '.'")
