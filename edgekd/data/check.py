"""What stands in a data set and what is wrong with it: counts, class balance, box sizes, duplicates, every bad file."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from edgekd.data.check_report import CheckReport, SplitSummary, summarise
from edgekd.data.contact_sheet import write_contact_sheet
from edgekd.data.images import Oddity, examine_image, grey_span, lost_greys
from edgekd.data.layout import Source, find_split
from edgekd.data.problems import Problem, printable
from edgekd.data.reading import NO_CLASS, UNREAD_ANNOTATIONS, class_names_of, detect_format, open_source
from edgekd.data.records import resolve
from edgekd.errors import DataError
from edgekd.labels import some_of
from edgekd.machine import usable_threads
from edgekd.types import ImageRecord

__all__ = ["CheckReport", "SplitSummary", "check_dataset", "write_contact_sheet"]

_UNIONS = frozenset({"trainval", "all", "traintest", "trainvaltest"})


def check_dataset(
    root: Path | str,
    *,
    format: str = "auto",
    splits: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read every annotation and decode every image of a data set, and report on all of it.

    `progress` is called with (images decoded, images in all). What cannot be understood at all (a broken data.yaml,
    class lists that contradict each other) is a problem in the report as well.

    Raises:
        DataError: there is no data set at `root` in this format, or a split in `splits` is not there.
    """
    source = _open(root, format)
    if isinstance(source, CheckReport):
        return source
    splits = [find_split(split, source.splits(), Path(root)) for split in splits or ()]
    problems: list[Problem] = []
    names = _names(source, class_names, problems)
    records: dict[str, list[ImageRecord]] = {}
    for split in splits or source.splits():
        try:
            raws = source.scan(split, problems)
        except DataError as error:
            problem = _layout_problem(source.root, error, split)
            if replace(problem, split="") not in problems:  # the class names may have met it before
                problems.append(problem)
            continue
        judged = problems if names else []  # without class names every object would be of an unknown one
        records[split] = [item.record for item in resolve(raws, names, split, judged)]
    if any(problem.kind in UNREAD_ANNOTATIONS for problem in problems):  # the reason, and what to mend
        problems = [problem for problem in problems if NO_CLASS not in problem.message]
    paths = {split: [record.path for record in found] for split, found in records.items()}
    digests = pixel_digests(paths, problems, progress)
    if source.format != "yolo":  # others state the size of the picture that was annotated: `resolve` compares it
        problems = [problem for problem in problems if problem.kind != "turned-images"]
    unions = _unions(records, digests)
    problems += _duplicates(records, digests, unions)
    problems += _empty(source.root, records, names)
    problems += _alike(source.root, names)
    summaries = tuple(summarise(split, found, names) for split, found in records.items())
    return CheckReport(Path(root), source.format, names, summaries, _once(problems, unions), tuple(unions))


def _once(problems: Sequence[Problem], unions: Collection[str]) -> tuple[Problem, ...]:
    """Without what the splits of a union have reported already."""
    seen: set[Problem] = set()
    kept = []
    for problem in sorted(problems, key=lambda problem: problem.split in unions):
        alike = replace(problem, split="")
        if alike not in seen or problem.split not in unions:
            kept.append(problem)
        seen.add(alike)
    return tuple(kept)


def _open(root: Path | str, format: str) -> Source | CheckReport:
    """The data set, or a report of the one problem that keeps it from being opened.

    Raises:
        DataError: there is nothing at `root`, or the format is unknown or cannot be told.
    """
    if format == "auto":
        format = detect_format(root)
    try:
        return open_source(root, format)
    except DataError as error:
        if not Path(root).exists() or "unknown data format" in error.what:
            raise
        return CheckReport(Path(root), format, (), (), (_layout_problem(Path(root), error),))


def _layout_problem(root: Path, error: DataError, split: str = "") -> Problem:
    return Problem("bad-layout", root, str(error).replace("\n", ";"), split=split)


def _names(source: Source, asked: Sequence[str] | None, problems: list[Problem]) -> tuple[str, ...]:
    try:
        return class_names_of(source, asked)
    except DataError as error:
        problems.append(_layout_problem(source.root, error))
        return ()


def pixel_digests(
    images: Mapping[str, list[Path]], problems: list[Problem], progress: Callable[[int, int], None] | None
) -> dict[Path, str]:
    """Decode each image of the splits once: path -> hash of its upright pixels; files that fail are reported."""
    splits_of: dict[Path, str] = {}
    for split, found in images.items():
        for path in found:
            splits_of.setdefault(path, split)
    digests: dict[Path, str] = {}
    spans: dict[str, list[int]] = {}
    turned: dict[str, list[Path]] = {}
    with ThreadPoolExecutor(max_workers=min(8, usable_threads())) as pool:
        for done, (path, examined) in enumerate(zip(splits_of, pool.map(_digest, splits_of), strict=True), 1):
            if isinstance(examined, DataError):
                message = str(examined).replace("\n", ";")
                problems.append(Problem("broken-pixels", path, message, split=splits_of[path]))
            else:
                digests[path], oddity, span, is_turned = examined
                if is_turned:
                    turned.setdefault(splits_of[path], []).append(path)
                if span is not None:
                    spans.setdefault(splits_of[path], []).append(span)
                if oddity is not None:
                    kind = "damaged-pixels" if oddity.is_damage else "odd-pixels"
                    problems.append(Problem(kind, path, oddity.text, split=splits_of[path]))
            if progress:
                progress(done, len(splits_of))
    for split, of_split in spans.items():
        if lost := lost_greys(of_split):
            first = next(path for path in splits_of if splits_of[path] == split)
            problems.append(
                Problem("few-greys", first.parent, f"{lost} in the {len(of_split)} of split {split!r}", split=split)
            )
    for split, paths in turned.items():
        message = f"EXIF turns {len(paths)} images of split {split!r}, this one first"
        problems.append(Problem("turned-images", paths[0], message, split=split))
    return digests


def _digest(path: Path) -> tuple[str, Oddity | None, int | None, bool] | DataError:
    """Hash of an image's pixels, what is odd about its file, the greys that it spans where it has 16 bits, and whether EXIF
    turns it."""
    try:
        pixels, oddity, is_16bit, is_turned = examine_image(path)
    except DataError as error:
        return error
    digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).hexdigest()
    return digest, oddity, grey_span(pixels) if is_16bit else None, is_turned


def _unions(records: Mapping[str, list[ImageRecord]], digests: Mapping[Path, str]) -> dict[str, frozenset[str]]:
    """Splits that consist of other splits' pictures -> those: two or more exactly, or named as such and around one."""
    pictures = {split: {digests.get(r.path, str(r.path)) for r in found} for split, found in records.items()}
    unions = {}
    for split, own in pictures.items():
        parts = frozenset(name for name, other in pictures.items() if name != split and other and other < own)
        exact = len(parts) > 1 and set().union(*(pictures[part] for part in parts)) == own
        if parts and (split.casefold() in _UNIONS or exact):
            unions[split] = parts
    return unions


def _duplicates(
    records: Mapping[str, list[ImageRecord]], digests: Mapping[Path, str], unions: Mapping[str, frozenset[str]]
) -> list[Problem]:
    """The same pixels within a split, and across splits unless one is a part of the other."""
    holders: dict[str, list[tuple[str, Path]]] = {}
    for split in sorted(records, key=lambda split: split in unions):
        for record in records[split]:
            if record.path in digests:
                holders.setdefault(digests[record.path], []).append((split, record.path))
    problems = []
    for group in holders.values():
        reported: set[tuple[str, Path]] = set()
        for position, (split, path) in enumerate(group):
            for other_split, other in group[:position]:
                kind = "duplicate-image" if split == other_split else "leak"
                is_part = other_split in unions.get(split, ()) or split in unions.get(other_split, ())
                is_part = is_part or (split in unions and other_split in unions)  # their parts tell
                if is_part or (kind, path) in reported:
                    continue
                reported.add((kind, path))
                message = f"the same picture as {printable(other)} of split {other_split!r}"
                problems.append(Problem(kind, path, message, split=split))
    return problems


def _alike(root: Path, names: Sequence[str]) -> list[Problem]:
    groups: dict[str, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        groups.setdefault("".join(filter(str.isalnum, plain)), []).append(name)
    alike = [group for key, group in groups.items() if key and len(group) > 1]
    return [Problem("alike-classes", root, " and ".join(map(repr, group)) + " are two classes") for group in alike]


def _empty(root: Path, records: Mapping[str, list[ImageRecord]], names: Sequence[str]) -> list[Problem]:
    problems = []
    for split, found in records.items():
        trains = split.casefold().startswith(("train", "all"))
        if not found:
            problems.append(Problem("empty-split", root, f"split {split!r} has no readable image", split=split))
            continue
        counts = Counter(int(label) for record in found for label in record.labels[record.trainable])
        if not counts and trains:
            problems.append(Problem("empty-split", root, f"split {split!r} has no object to train on", split=split))
        elif not counts and names:
            message = f"split {split!r} has no object: are its annotations there?"
            problems.append(Problem("unmeasurable-split", root, message, split=split))
        elif trains:
            absent = [name for label, name in enumerate(names) if not counts[label]]
            if absent:
                message = f"{len(absent)} of {len(names)} classes have no object to train on in split {split!r}: "
                problems.append(Problem("absent-class", root, message + some_of(absent, 20), split=split))
    return problems
