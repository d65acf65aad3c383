"""What `data check` found: counts, class balance and box sizes of each split, and every problem with its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.data.layout import is_part, split_advice
from edgekd.data.problems import RULES, Problem, printable
from edgekd.labels import some_of
from edgekd.types import ImageRecord

SMALL_AREA_PX, LARGE_AREA_PX = 32.0**2, 96.0**2
"""COCO's bounds between small, medium and large objects, by box area."""

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


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
        if len(self.splits) == 1 and not is_part(self.splits[0].name):
            lines += ["", split_advice(self.root, [self.splits[0].name])]
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


def summarise(split: str, records: Sequence[ImageRecord], names: Sequence[str]) -> SplitSummary:
    """Count one split's records."""
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
        lines.append(f"  sizes    {sizes}; bounds are 32 x 32 and 96 x 96 px, as COCO has them")
        sides = ", ".join(f"{q} {value:.3f}" for q, value in split.relative_size.items())
        lines.append(f"  side     {sides}: quantiles of sqrt(box area / image area)")
        width = max(len(name) for name, count in split.per_class.items() if count)
        for name, count in sorted(split.per_class.items(), key=lambda entry: -entry[1]):
            if not count:
                continue
            bar = "#" * round(30 * count / max(split.per_class.values()))
            lines.append(f"  {printable(name):{width}s} {count:7d} {count / split.objects:6.1%} {bar}")
        absent = [name for name, count in split.per_class.items() if not count]
        lines += [f"  no object: {printable(some_of(absent, 20))}"] if absent else []
    return lines
