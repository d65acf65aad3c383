"""What stands in a data set and what is wrong with it: counts, class balance, box sizes, duplicates, every bad file."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.data.contact_sheet import write_contact_sheet
from edgekd.data.images import load_image
from edgekd.data.layout import Source, require_split
from edgekd.data.problems import RULES, Problem, printable
from edgekd.data.reading import class_names_of, detect_format, open_source
from edgekd.data.records import resolve
from edgekd.errors import DataError
from edgekd.types import ImageRecord

__all__ = ["CheckReport", "SplitSummary", "check_dataset", "write_contact_sheet"]

SMALL_AREA_PX, LARGE_AREA_PX = 32.0**2, 96.0**2
"""COCO's bounds between small, medium and large objects, by box area."""

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_UNIONS = frozenset({"trainval", "all", "traintest", "trainvaltest"})


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds, of what reading keeps.

    Attributes:
        background_images: images without an object.
        per_class: objects of each class, in label order.
        sizes: objects that are small, medium and large by COCO's bounds (32² and 96² px).
        relative_size: quantile, such as "50%", to sqrt(box area / image area).
        image_hw: smallest and largest (height, width), each by area.
    """

    name: str
    images: int
    objects: int
    difficult: int
    crowd: int
    background_images: int
    per_class: Mapping[str, int]
    sizes: Mapping[str, int]
    relative_size: Mapping[str, float]
    image_hw: tuple[tuple[int, int], tuple[int, int]] | None


@dataclass(frozen=True)
class CheckReport:
    """All that `data check` found.

    Attributes:
        unions: splits that are made of other splits, such as trainval; their overlap with those is no leak.
    """

    root: Path
    format: str
    class_names: tuple[str, ...]
    splits: tuple[SplitSummary, ...]
    problems: tuple[Problem, ...]
    unions: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether training would be right: no problem is an error."""
        return not self.errors

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems that make training or its figures wrong."""
        return tuple(problem for problem in self.problems if problem.rule.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Problems worth a look."""
        return tuple(problem for problem in self.problems if problem.rule.severity == "warning")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with schema "edgekd.check/1"."""
        return {
            "schema": "edgekd.check/1",
            "root": printable(self.root),
            "format": self.format,
            "ok": self.ok,
            "class_names": list(self.class_names),
            "splits": [asdict(split) for split in self.splits],
            "unions": list(self.unions),
            "problem_counts": dict(Counter(problem.kind for problem in self.problems)),
            "problems": [problem.to_dict() for problem in self.problems],
        }

    def text(self, max_problems: int = 100) -> str:
        """The report for a terminal, with at most `max_problems` problems, errors first."""
        lines = [f"{printable(self.root)}: {self.format}, {len(self.class_names)} classes"]
        for split in self.splits:
            lines += ["", *_split_lines(split)]
        if self.unions:
            lines += ["", f"made of other splits: {', '.join(self.unions)}"]
        ordered = self.errors + self.warnings
        if ordered:
            lines += ["", f"{len(self.errors)} errors, {len(self.warnings)} warnings"]
            counts = Counter(problem.kind for problem in ordered)
            lines += [f"  {count:6d} {kind}: {RULES[kind].treatment}" for kind, count in counts.items()]
            lines += [""]
            lines += [f"{problem.rule.severity}: {problem}" for problem in ordered[:max_problems]]
            if len(ordered) > max_problems:
                lines.append(f"... and {len(ordered) - max_problems} more")
        lines += ["", "ok" if self.ok else "NOT ok: training on this would be wrong"]
        return "\n".join(lines)


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
    for split in splits or ():
        require_split(split, source.splits(), source.root)
    problems: list[Problem] = []
    names = _names(source, class_names, problems)
    records: dict[str, list[ImageRecord]] = {}
    for split in splits or source.splits():
        try:
            raws = source.scan(split, problems)
        except DataError as error:
            problems.append(_layout_problem(source.root, error, split))
            continue
        judged = problems if names else []  # without class names every object would be of an unknown one
        records[split] = [item.record for item in resolve(raws, names, split, judged)]
    digests = _pixel_digests(records, problems, progress)
    unions = _unions(records, digests)
    problems += _duplicates(records, digests, unions)
    problems += _empty(source.root, records, names)
    summaries = tuple(_summary(split, found, names) for split, found in records.items())
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


def _pixel_digests(
    records: Mapping[str, list[ImageRecord]], problems: list[Problem], progress: Callable[[int, int], None] | None
) -> dict[Path, str]:
    """Decode each image once: path -> hash of its upright pixels; files that fail are reported."""
    splits_of: dict[Path, str] = {}
    for split, found in records.items():
        for record in found:
            splits_of.setdefault(record.path, split)
    digests: dict[Path, str] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, (path, digest) in enumerate(zip(splits_of, pool.map(_digest, splits_of), strict=True), 1):
            if isinstance(digest, DataError):
                message = str(digest).replace("\n", ";")
                problems.append(Problem("broken-pixels", path, message, split=splits_of[path]))
            else:
                digests[path] = digest
            if progress:
                progress(done, len(splits_of))
    return digests


def _digest(path: Path) -> str | DataError:
    try:
        pixels = load_image(path)
    except DataError as error:
        return error
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).hexdigest()


def _unions(records: Mapping[str, list[ImageRecord]], digests: Mapping[Path, str]) -> dict[str, frozenset[str]]:
    """Splits that consist of other splits' pictures -> those: two or more exactly, or named as such and around one."""
    pictures = {split: {digests.get(r.path, str(r.path)) for r in found} for split, found in records.items()}
    unions = {}
    for split, own in pictures.items():
        parts = frozenset(name for name, other in pictures.items() if name != split and other and other < own)
        exact = len(parts) > 1 and set().union(*(pictures[part] for part in parts)) == own
        if parts and (split in _UNIONS or exact):
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


def _empty(root: Path, records: Mapping[str, list[ImageRecord]], names: Sequence[str]) -> list[Problem]:
    problems = []
    for split, found in records.items():
        trains = split.startswith(("train", "all"))
        if not found:
            problems.append(Problem("empty-split", root, f"split {split!r} has no readable image", split=split))
            continue
        counts = Counter(int(label) for record in found for label in record.labels[record.trainable])
        if not counts and trains:
            problems.append(Problem("empty-split", root, f"split {split!r} has no object to train on", split=split))
        elif trains:
            absent = [name for label, name in enumerate(names) if not counts[label]]
            if absent:
                message = f"{len(absent)} of {len(names)} classes have no object to train on in split {split!r}: "
                problems.append(Problem("absent-class", root, message + ", ".join(absent), split=split))
    return problems


def _summary(split: str, records: Sequence[ImageRecord], names: Sequence[str]) -> SplitSummary:
    labels = Counter(int(label) for record in records for label in record.labels)
    boxes = np.concatenate([np.zeros((0, 4)), *(record.boxes_xyxy.astype(np.float64) for record in records)])
    image_areas = np.repeat(
        [float(record.image_hw[0] * record.image_hw[1]) for record in records],
        [len(record.labels) for record in records],
    )
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    relative = np.sqrt(areas / image_areas) if len(areas) else np.zeros(0)
    small, large = int((areas < SMALL_AREA_PX).sum()), int((areas >= LARGE_AREA_PX).sum())
    by_area = sorted((record.image_hw for record in records), key=lambda hw: (hw[0] * hw[1], hw))
    return SplitSummary(
        split,
        images=len(records),
        objects=len(boxes),
        difficult=sum(int(record.difficult.sum()) for record in records),
        crowd=sum(int(record.crowd.sum()) for record in records),
        background_images=sum(len(record.labels) == 0 for record in records),
        per_class={name: labels[label] for label, name in enumerate(names)},
        sizes={"small": small, "medium": len(boxes) - small - large, "large": large},
        relative_size={f"{q:.0%}": round(float(np.quantile(relative, q)), 4) for q in QUANTILES} if len(areas) else {},
        image_hw=(by_area[0], by_area[-1]) if by_area else None,
    )


def _split_lines(split: SplitSummary) -> list[str]:
    lines = [
        f"{split.name}: {split.images} images ({split.background_images} without objects), {split.objects} objects "
        f"({split.difficult} difficult, {split.crowd} crowd)"
    ]
    if split.image_hw:
        (h, w), (big_h, big_w) = split.image_hw
        lines.append(f"  images   {w} x {h} to {big_w} x {big_h} px")
    if split.objects:
        sizes = ", ".join(f"{name} {count} ({count / split.objects:.0%})" for name, count in split.sizes.items())
        lines.append(f"  sizes    {sizes}")
        lines.append("  side     " + ", ".join(f"{q} {value:.3f}" for q, value in split.relative_size.items()))
        width = max(len(name) for name, count in split.per_class.items() if count)
        for name, count in sorted(split.per_class.items(), key=lambda entry: -entry[1]):
            if not count:
                continue
            bar = "#" * round(30 * count / max(split.per_class.values()))
            lines.append(f"  {printable(name):{width}s} {count:7d} {count / split.objects:6.1%} {bar}")
        absent = [name for name, count in split.per_class.items() if not count]
        lines += [f"  no object: {printable(', '.join(absent))}"] if absent else []
    return lines
