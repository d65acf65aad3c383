"""Which feature map of the student learns from which of a teacher's: matched by grid size, never by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional

from edgekd.detectors.base import TapKind, TapSpec
from edgekd.errors import DistillationSetupError

TapChoice = Sequence[str] | Literal["auto"]
MAX_RESIZE = 2.5
"""How many times larger or smaller a grid may be than the one that it is matched with."""
SAME_LEVEL = 2**0.5
"""Levels are twice as large from one to the next: a grid within this is nearer to its partner than to the level beside."""


@dataclass(frozen=True)
class LevelPair:
    """One student map and the teacher map it learns from."""

    student: TapSpec
    teacher: TapSpec

    def describe(self) -> str:
        """Both maps with their grids."""
        (h, w), (rows, columns) = self.student.grid_hw, self.teacher.grid_hw
        return f"{self.student.name} {h}x{w} <- {self.teacher.name} {rows}x{columns}"

    def align(self, teacher_map: Tensor, like: Tensor) -> Tensor:
        """The teacher's (B, C, H, W) map on the grid of `like`, bilinear (area when shrinking by 2 or more)."""
        target_hw = like.shape[-2:]
        if teacher_map.shape[-2:] == target_hw:
            return teacher_map
        if teacher_map.shape[-1] >= 2 * target_hw[-1]:
            return functional.adaptive_avg_pool2d(teacher_map, (target_hw[0], target_hw[1]))
        return functional.interpolate(teacher_map, size=list(target_hw), mode="bilinear", align_corners=False)


def describe_taps(taps: Mapping[str, TapSpec]) -> str:
    """One line that lists every tap with its channels and grid."""
    if not taps:
        return "none (a black box; give an ONNX teacher `taps: auto`)"
    return ", ".join(f"{t.name} ({t.channels} ch, {t.grid_hw[0]}x{t.grid_hw[1]})" for t in taps.values())


def match_levels(
    student: Mapping[str, TapSpec],
    teacher: Mapping[str, TapSpec],
    *,
    student_taps: TapChoice = "auto",
    teacher_taps: TapChoice = "auto",
    kinds: Sequence[TapKind] = ("neck", "backbone"),
    who: str = "",
) -> list[LevelPair]:
    """Pair the levels of two detectors.

    Named taps are paired in the order given. Where one side is named, each of its taps has to find a partner on the other,
    of its own kind if there is one: the nearest grid within `MAX_RESIZE` times. "auto" on both takes the first kind in `kinds`
    in which both have a map of the same level, and of that kind every student map with a partner within `SAME_LEVEL`; where
    no grid is equal, since the input sizes differ, within `MAX_RESIZE`.

    Raises:
        DistillationSetupError: an unknown tap, or one that was named finds no partner, or nothing matches; lists both sides'
            taps with channels and grids.
    """
    chosen_student = _choose(student, student_taps, "student", who)
    chosen_teacher = _choose(teacher, teacher_taps, "teacher", who)
    if student_taps != "auto" and teacher_taps != "auto":
        if len(student_taps) != len(teacher_taps):
            raise DistillationSetupError(
                f"{who}: as many student_taps as teacher_taps are needed",
                got=f"{len(student_taps)} and {len(teacher_taps)}",
            )
        return [LevelPair(student[s], teacher[t]) for s, t in zip(student_taps, teacher_taps, strict=True)]
    named_taps = [tap for tap in chosen_student if student_taps != "auto"]
    named_taps += [tap for tap in chosen_teacher if teacher_taps != "auto"]
    kinds = sorted(kinds, key=lambda kind: kind not in {tap.kind for tap in named_taps})
    kinds_to_try: list[tuple[TapKind, TapKind]] = [(kind, kind) for kind in kinds]
    kinds_to_try += [(a, b) for a in kinds for b in kinds if a != b]
    alone = named = [tap.name for tap in named_taps]
    for limit in (SAME_LEVEL, MAX_RESIZE):
        for student_kind, teacher_kind in kinds_to_try:
            students = [t for t in chosen_student if t.kind == student_kind or student_taps != "auto"]
            teachers = [t for t in chosen_teacher if t.kind == teacher_kind or teacher_taps != "auto"]
            # A 1x1 or 2x2 map says nothing about where; pairing it would only add noise to the sum over levels.
            smallest = 3 if student_taps == "auto" else 1
            pairs = _by_grid(students, teachers, limit, smallest)
            if pairs and not any(pair.student.grid_hw == pair.teacher.grid_hw for pair in pairs):
                pairs = _by_grid(students, teachers, MAX_RESIZE, smallest)
            paired = {pair.student.name if student_taps != "auto" else pair.teacher.name for pair in pairs}
            left = [name for name in named if name not in paired]
            if pairs and not left:
                return pairs
            alone = min(alone, left, key=len)
    raise DistillationSetupError(
        f"{who}: no partner for {', '.join(alone)}"
        if alone
        else f"{who}: no student level finds a partner among the teacher's",
        got=f"student taps: {describe_taps(student)}\n            teacher taps: {describe_taps(teacher)}",
        expected=f"grids that are equal or within {MAX_RESIZE:g}x of each other",
        fix="name student_taps and teacher_taps in the term, or choose input sizes whose grids agree",
    )


def _choose(taps: Mapping[str, TapSpec], names: TapChoice, side: str, who: str) -> list[TapSpec]:
    if names == "auto":
        return list(taps.values())
    if not names:
        raise DistillationSetupError(
            f"{who}: {side}_taps names none", expected=f"auto, or some of {describe_taps(taps)}"
        )
    unknown = [name for name in names if name not in taps]
    if unknown:
        raise DistillationSetupError(
            f"{who}: unknown {side} tap{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}",
            expected=describe_taps(taps),
        )
    return [taps[name] for name in names]


def _by_grid(students: Sequence[TapSpec], teachers: Sequence[TapSpec], limit: float, smallest: int) -> list[LevelPair]:
    pairs = []
    for s in students:
        if min(s.grid_hw) < smallest and len(students) > 1:
            continue
        ranked = sorted(teachers, key=lambda t: (_ratio(s, t), t.name))
        if ranked and _ratio(s, ranked[0]) <= limit + 1e-6:
            pairs.append(LevelPair(s, ranked[0]))
    return pairs


def _ratio(a: TapSpec, b: TapSpec) -> float:
    return max(max(x / y, y / x) for x, y in zip(a.grid_hw, b.grid_hw, strict=True))
