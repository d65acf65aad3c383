"""One door to the three formats: which one a folder is in, its splits, and a split as a `Dataset`."""

from __future__ import annotations

import itertools
import logging
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from edgekd.data.coco import CocoSource, coco_files
from edgekd.data.foreign import find_foreign
from edgekd.data.layout import Format, Source, files_under, find_split, is_hidden, is_image
from edgekd.data.problems import Problem, printable, raise_if_stopped
from edgekd.data.records import resolve
from edgekd.data.voc import VocSource, voc_bases
from edgekd.data.yolo import YoloSource, is_yolo
from edgekd.errors import DataError
from edgekd.types import Dataset

_log = logging.getLogger("edgekd.data")

_MOST_LOOKED_AT = 100_000
"""Files in a folder that is no data set, to say what it holds."""

_MOST_LEVELS, _MOST_FOLDERS = 3, 100
"""How deep a data set may lie in what was unpacked (archive/archive/set), and folders that are looked at on a level."""

_OTHER_KINDS = frozenset(
    {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xml", ".parquet", ".tfrecord", ".record", ".mat"}
)
"""Files that other tools keep annotations in."""

_READERS: dict[str, Callable[[Path], Source]] = {"voc": VocSource, "coco": CocoSource, "yolo": YoloSource}
_LAYOUTS: dict[Format, Callable[[Path], bool]] = {
    "voc": lambda root: bool(voc_bases(root)),
    "coco": lambda root: bool(coco_files(root)),
    "yolo": is_yolo,
}

NO_CLASS = "no class is annotated in any split"
UNREAD_ANNOTATIONS = frozenset({"bad-annotation", "missing-annotation"})
_NAME_ALL = "data.classes must name every class that is annotated; without it, the data set's own are taken"
_KEPT_NAMES = (
    "edgekd.json keeps the classes in their order: add the new one to its class_names, last, or delete that file"
)
_GIVE_NAMES = "in a recipe, `data.classes` can name the classes"


def detect_format(root: Path | str) -> Format:
    """Which of the three layouts the data set at `root` is in; see `locate`.

    Raises:
        DataError: as `locate`.
    """
    return locate(root)[1]


def locate(root: Path | str) -> tuple[Path, Format]:
    """The folder that holds the data set (`root`, or the only one below it that does, as unpacked archives have it), and
    its layout.

    Raises:
        DataError: `root` is not there, or in no layout, or in several, or holds several data sets.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{printable(root)}: there is no such folder")
    places = [root] if formats_at(root) else _nested(root, get_args(Format))
    if not places:
        raise _no_data_set(root)
    found = formats_at(_only(root, places))
    if len(found) > 1:
        what = f"{printable(places[0])} can be read in several formats: {', '.join(found)}"
        raise DataError(what, fix="name the format")
    return places[0], found[0]


def formats_at(root: Path) -> list[Format]:
    """The layouts that the folder or file itself is in."""
    return [name for name, is_there in _LAYOUTS.items() if is_there(root)]


def _nested(root: Path, formats: Sequence[str]) -> list[Path]:
    """The folders in `root` that are data sets in one of these layouts, of the first level that has any."""
    level = [root] if root.is_dir() else []
    for _ in range(_MOST_LEVELS):
        children = (child for folder in level for child in sorted(folder.iterdir()))
        level = [child for child in children if child.is_dir() and not is_hidden(child.name)]
        level = [child for child in level if not child.name.startswith("__")]  # __MACOSX
        level = level[:_MOST_FOLDERS]
        found = [child for child in level if set(formats) & set(formats_at(child))]
        if found:
            return found
    return []


def _only(root: Path, places: Sequence[Path]) -> Path:
    if len(places) > 1:
        choices = ", ".join(printable(place) for place in places)
        raise DataError(f"{printable(root)} holds several data sets", expected=f"one of {choices}")
    return places[0]


def _no_data_set(root: Path) -> DataError:
    """What to say of a folder in no layout: what it holds instead."""
    files = list(itertools.islice(files_under(root), _MOST_LOOKED_AT)) if root.is_dir() else []
    images = sum(map(is_image, files))
    stems = {path.stem for path in files if is_image(path)}
    texts = sum(path.suffix.lower() == ".txt" and path.stem in stems for path in files)
    others = Counter(path.suffix.lower() for path in files if path.suffix.lower() in _OTHER_KINDS)
    kinds = ", ".join(f"{count} {suffix} file{'s' * (count > 1)}" for suffix, count in others.most_common(3))
    holds = f"{images} image{'s' * (images > 1)} but no annotations" if images else "no data set"
    label = f"`edgekd data label {shlex.quote(str(root))} --teacher FILE --classes NAMES`"
    fix = f"{label} has your teachers annotate them" if images else None
    unlabelled = f"; {label} is for images that nobody has annotated" if images else ""
    tools = (
        "have the tool that made them, or FiftyOne, CVAT, Roboflow, Label Studio and the like, write them as COCO, VOC "
    )
    tools += "or YOLO"
    if foreign := find_foreign(files):
        kind, path = foreign
        kinds = f"{kind.name}, a kind that is not read ({printable(path.relative_to(root))})"
        fix = kind.fix.replace("DIR", shlex.quote(printable(root))).replace("FILE", shlex.quote(printable(path)))
        fix += unlabelled
    elif not images and (alone := sum(path.suffix.lower() == ".txt" for path in files)) > 1:
        kinds = f"{alone} .txt files and no image"
        fix = "if these are YOLO's labels, put the images beside them, or into images/ beside labels/; CVAT exports both with "
        fix += "`Save images`, Label Studio as YOLO with Images"
    elif texts:
        kinds = f"{texts} .txt file{'s' * (texts > 1)} of the images' names, in a folder where none is looked for"
        fix = f"YOLO's labels belong into labels/ beside images/ (so written), or beside the images; of other kinds, {tools}"
    elif others:
        kinds += ", of a kind that is not read"
        fix = f"if these hold the annotations, {tools}"
        fix += unlabelled
    return DataError(
        f"{printable(root)} holds {holds} in a known layout",
        got=kinds or None,
        expected="VOC (Annotations/*.xml, JPEGImages/, ImageSets/Main/*.txt), COCO (annotations/instances_*.json), YOLO "
        "(data.yaml, or images/ beside labels/ with classes.txt), or a .xml or .txt of its name beside each image",
        fix=fix,
    )


def open_source(root: Path | str, format: str = "auto") -> Source:
    """The data set at `root` (see `locate`) before anything is read.

    Raises:
        DataError: it is not there, not in this format, or its description is wrong.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{printable(root)}: there is no such folder")
    if format == "auto":
        root, format = locate(root)
    elif format not in _READERS:
        raise DataError(f"unknown data format {format!r}", expected=", ".join(("auto", *get_args(Format))))
    elif not _LAYOUTS[format](root) and (places := _nested(root, [format])):  # type: ignore[index]  # just looked up
        root = _only(root, places)
    return _READERS[format](root)


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
            fix=f"add classes.txt (one name a line) or `names` in data.yaml; {_GIVE_NAMES}",
        )
    if not names:
        reasons = _reasons(source)
        raise DataError(f"{root}: {NO_CLASS}{reasons}", fix=None if reasons else f"annotate some images; {_GIVE_NAMES}")
    require_class_names(names, root)
    return names


def require_class_names(names: Sequence[str], root: str) -> None:
    """Refuse names that no data set may have.

    Raises:
        DataError: they repeat, or one is blank or no text.
    """
    if len(set(names)) != len(names):
        raise DataError("class names repeat", got=", ".join(names))
    odd = [name for name in names if printable(name) != name or not name.strip()]
    if odd:
        raise DataError(f"{root}: class names that are no text", got=", ".join(map(repr, odd)))


def _reasons(source: Source) -> str:
    """The annotations that are not found or not understood, where there is no class: the classes may stand in those."""
    problems: list[Problem] = []
    for split in source.splits():
        source.scan(split, problems)
    bad = [problem for problem in problems if problem.kind in UNREAD_ANNOTATIONS]
    lines = [f", for {len(bad)} annotation{'s' * (len(bad) > 1)} cannot be read", *map(str, bad[:5])]
    lines += [f"... and {len(bad) - 5} more"] if len(bad) > 5 else []
    return "\n  ".join(lines) if bad else ""


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
    left out is counted in one logged warning; `check_dataset` names each case. Many images without labels are told, too.

    Raises:
        DataError: no such split (the message lists those there are), or a file that cannot be passed over: a missing
            or unreadable image or annotation, a class that is not in `class_names`, ids that repeat.
    """
    source = open_source(root, format)
    split = find_split(split, source.splits(), Path(root))
    names = class_names_of(source, class_names)
    problems: list[Problem] = []
    resolved = resolve(source.scan(split, problems, limit), names, split, problems)
    kinds = {problem.kind for problem in problems if problem.rule.stops}
    fix = None
    if kinds == {"unknown-class"}:  # VOC's own are those that are annotated, but for the ones that edgekd.json has kept
        fix = _NAME_ALL if class_names is not None else _KEPT_NAMES if source.format == "voc" else None
    raise_if_stopped(problems, f"{printable(root)}, split {split!r}", fix=fix)
    lost = Counter(problem.kind for problem in problems if problem.rule.loses)
    if lost:
        counts = ", ".join(f"{count} {kind}" for kind, count in lost.most_common())
        _log.warning("%s, split %s: %s; `edgekd data check` names each", printable(root), split, counts)
    for problem in (problem for problem in problems if problem.kind == "sparse-labels"):  # hardly meant, unlike a few
        _log.warning("%s", problem)
    by_teachers = any(problem.kind == "labels-of-teachers" for problem in problems)
    return Dataset(Path(root), source.format, split, names, tuple(item.record for item in resolved), by_teachers)
