"""One door to the three formats: which one a folder is in, its splits, and a split as a `Dataset`."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from edgekd.data.coco import CocoSource, coco_files
from edgekd.data.layout import Format, Source, files_under, find_split, is_image
from edgekd.data.problems import Problem, printable, raise_if_stopped
from edgekd.data.records import resolve
from edgekd.data.voc import VocSource, voc_bases
from edgekd.data.yolo import YoloSource, is_yolo
from edgekd.errors import DataError
from edgekd.types import Dataset

_log = logging.getLogger("edgekd.data")

_MOST_LOOKED_AT = 100_000
"""Files in a folder that is no data set, to say what it holds."""

NO_CLASS = "no class is annotated in any split"
_GIVE_NAMES = "give the class names (`data.classes` in a recipe)"


def detect_format(root: Path | str) -> Format:
    """Which of the three layouts the data set at `root` is in.

    Raises:
        DataError: `root` is not there, or in no layout, or in several.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{printable(root)}: there is no such folder")
    found: list[Format] = []
    if voc_bases(root):
        found.append("voc")
    if coco_files(root):
        found.append("coco")
    if is_yolo(root):
        found.append("yolo")
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{printable(root)} can be read in several formats: {', '.join(found)}", fix="name the format")
    images = sum(map(is_image, itertools.islice(files_under(root), _MOST_LOOKED_AT))) if root.is_dir() else 0
    raise DataError(
        f"{printable(root)} holds {f'{images} images but no annotations' if images else 'no data set in a known layout'}",
        expected="VOC (Annotations/*.xml, JPEGImages/, ImageSets/Main/*.txt), COCO (annotations/instances_*.json), YOLO "
        "(data.yaml, or images/ beside labels/ with classes.txt), or a .xml or .txt of its name beside each image",
        fix="`edgekd data label RECIPE` has the recipe's teachers annotate them" if images else None,
    )


def open_source(root: Path | str, format: str = "auto") -> Source:
    """The data set at `root` before anything is read.

    Raises:
        DataError: it is not there, not in this format, or its description is wrong.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{printable(root)}: there is no such folder")
    name = detect_format(root) if format == "auto" else format
    if name == "voc":
        return VocSource(root)
    if name == "coco":
        return CocoSource(root)
    if name == "yolo":
        return YoloSource(root)
    raise DataError(f"unknown data format {format!r}", expected=", ".join(("auto", *get_args(Format))))


def list_splits(root: Path | str, format: str = "auto") -> tuple[str, ...]:
    """The splits of a data set, such as ("train", "val").

    Raises:
        DataError: see `open_source`.
    """
    return open_source(root, format).splits()


def class_names_of(source: Source, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The asked class names, or the data set's own.

    Raises:
        DataError: names repeat, or the data set names none and none are asked for.
    """
    names = tuple(asked) if asked is not None else source.class_names()
    root = printable(source.root)
    if names is None:
        raise DataError(
            f"{root} does not name its classes",
            fix=f"add classes.txt or data.yaml, or {_GIVE_NAMES}",
        )
    if not names:
        raise DataError(f"{root}: {NO_CLASS}", fix=_GIVE_NAMES)
    if len(set(names)) != len(names):
        raise DataError("class names repeat", got=", ".join(names))
    odd = [name for name in names if printable(name) != name or not name.strip()]
    if odd:
        raise DataError(f"{root}: class names that are no text", got=", ".join(map(repr, odd)))
    return names


def read_dataset(
    root: Path | str,
    split: str,
    *,
    format: str = "auto",
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
) -> Dataset:
    """Read one split, or its first `limit` images. "val" finds "valid", and "train" finds "train2017", where that is the
    only one which can be meant. Boxes are clipped or refused as `records` states.

    Class names in `class_names` fix the labels; otherwise they are the data set's own over all of its splits. What is
    left out is counted in one logged warning; `check_dataset` names each case.

    Raises:
        DataError: no such split (the message lists those there are), or a file that cannot be passed over: a missing
            or unreadable image or annotation, a class that is not in `class_names`, ids that repeat.
    """
    source = open_source(root, format)
    split = find_split(split, source.splits(), source.root)
    names = class_names_of(source, class_names)
    problems: list[Problem] = []
    resolved = resolve(source.scan(split, problems, limit), names, split, problems)
    raise_if_stopped(problems, f"{printable(root)}, split {split!r}")
    lost = Counter(problem.kind for problem in problems if problem.rule.loses)
    if lost:
        counts = ", ".join(f"{count} {kind}" for kind, count in lost.most_common())
        _log.warning("%s, split %s: %s; `edgekd data check` names each", printable(root), split, counts)
    return Dataset(Path(root), source.format, split, names, tuple(item.record for item in resolved))
