"""Figures and findings as people write them: a true minus, points with a sign, and no claim the data does not carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.bench.result import unlike

ROLE_NAMES: Mapping[str, str] = {
    "teacher": "teacher",
    "ensemble": "ensemble",
    "student": "student alone",
    "student_distilled": "distilled student",
}

MINUS, TIMES, NOTHING = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
_SPACE = "\N{NO-BREAK SPACE}"  # keeps a figure and its unit, and an interval, on one line

Row = Mapping[str, Any]


def number(value: float | None, decimals: int = 1, unit: float = 1.0) -> str:
    """A figure with thousands separated, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value / unit:,.{decimals}f}".replace("-", MINUS)


def signed(value: float) -> str:
    """A difference with its sign and one decimal; a zero has no sign."""
    rounded = round(value, 1) + 0.0
    return f"{rounded:+,.1f}".replace("-", MINUS) if rounded else "0.0"


def points(value: float | None) -> str:
    """AP in [0, 1] as points of 100."""
    return number(value, 1, 0.01)


def milliseconds(value: float | None) -> str:
    """Three significant digits where that matters."""
    return number(value, 2 if value is not None and value < 10 else 1)


def times(value: float | None) -> str:
    """A factor, such as 9.1×."""
    if value is None:
        return NOTHING
    return f"{value:.{0 if value >= 100 else 1 if value >= 1.95 else 2}f}{TIMES}"


def interval(low: float, high: float) -> str:
    """[−1.5, −0.1]."""
    return f"[{signed(low)},{_SPACE}{signed(high)}]"


def images(result: Mapping[str, Any]) -> str:
    """ "1,700 images", and synthetic where they are."""
    count, kind = result["data"]["images"], "synthetic " if result["data"].get("synthetic") else ""
    if count is None:
        return f"an unknown number of {kind}images"
    return f"{int(count):,}{_SPACE}{kind}image{'s' if count != 1 else ''}"


def difference_points(comparison: Mapping[str, Any]) -> str:
    """−0.8 AP50 points [−1.5, −0.1]."""
    value, low, high = (100 * float(comparison[key]) for key in ("difference", "low", "high"))
    return f"{signed(value)}{_SPACE}AP50{_SPACE}points {interval(low, high)}"


def subject(row: Row, rows: Sequence[Row]) -> str:
    """How a sentence calls a row: by its role if that is unmistakable, else with its precision or its name."""
    role = ROLE_NAMES.get(row["role"], row["role"])
    alike = [other for other in rows if other["role"] == row["role"]]
    if len(alike) == 1:
        return f"the {role}"
    precisions = {other["precision"] for other in alike}
    return f"the {role} ({row['precision'] if len(precisions) == len(alike) else row['name']})"


def find(rows: Sequence[Row], name: object) -> Row | None:
    """The row of that name."""
    return next((row for row in rows if row["name"] == name), None)


def headline_student(rows: Sequence[Row]) -> Row | None:
    """The student that the answer is about: the first distilled one, or the first."""
    for role in ("student_distilled", "student"):
        for row in rows:
            if row["role"] == role:
                return row
    return None


def answer(result: Mapping[str, Any]) -> str:
    """What was found, in one sentence."""
    rows: Sequence[Row] = result["rows"]
    if not rows:
        return "Nothing was measured."
    student, reference = headline_student(rows), find(rows, result.get("reference"))
    if student is None:
        best = max(rows, key=lambda row: (row["map"] or {}).get("ap50") or 0.0)
        return _plain(best, result)
    name = _capital(subject(student, rows))
    if reference is None:
        return _plain(student, result)
    owner = "its ensemble" if reference["role"] == "ensemble" else "its teacher"
    against = next(
        (c for c in result["comparisons"] if c["a"] == student["name"] and c["b"] == reference["name"]), None
    )
    if against is None:
        accuracy = "; their accuracy could not be compared"
    elif against["difference_shown"]:
        accuracy = f", {difference_points(against)}"
    else:
        accuracy = f", with no difference in accuracy shown: {difference_points(against)}"
    return f"{name} {_speed(student, owner)}{accuracy}, {images(result)}."


def _speed(student: Row, owner: str) -> str:
    factor, interval = student["speedup_vs_ensemble"], student["speedup_interval"]
    if factor is None or interval is None:
        return f"was not timed against {owner}"
    low, high = interval
    if low <= 1.0 <= high:
        return f"is not shown to be faster or slower than {owner}"
    if factor < 1:
        return f"is {times(1 / factor)} slower than {owner}"
    return f"is {times(factor)} faster than {owner}"


def gain(result: Mapping[str, Any]) -> str | None:
    """What distillation brought over the same student trained alone, in two sentences; None if that was not measured.

    Where the student alone is another network, or in another precision, the difference is given without a cause. One training
    of each is all that a benchmark has seen, which no interval over images makes up for.
    """
    rows: Sequence[Row] = result["rows"]
    student = headline_student(rows)
    if student is None:
        return None
    for comparison in result["comparisons"]:
        if comparison["a"] == student["name"] and comparison["b_role"] == "student":
            brought = _brought(comparison, student, find(rows, comparison["b"]))
            found = [
                f"{brought}. One training of each: the interval is over images, not over seeds.",
                *_too_few(result),
            ]
            return " ".join(found)
    return None


def _brought(comparison: Mapping[str, Any], student: Row, alone: Row | None) -> str:
    points = difference_points(comparison)
    if differs := unlike(student, alone) if alone is not None else ["a detector that is not in the table"]:
        return (
            f"Against {comparison['b']}, a student trained alone: {points}; that is {' and '.join(differs)}, so this does "
            "not show what distillation brings"
        )
    if not comparison["difference_shown"]:
        return f"Distillation is not shown to make a difference to the same student trained alone: {points}"
    if comparison["difference"] > 0:
        return f"Distillation brings it {points} over the same student trained alone"
    return f"Distillation costs it accuracy against the same student trained alone: {points}"


def method_gain(row: Row) -> str:
    """What a method of `edgekd compare` brought: +1.0 AP50 points [−4.1, +6.1] over 3 seeds."""
    gain, seeds = row["gain"], len(row["seeds"])
    found = gain["interval_seeds"] or gain["interval_images"]
    over = f"over {seeds} seed{'s' if seeds != 1 else ''}" if gain["interval_seeds"] else "of one seed, over images"
    bounds = f" {interval(100 * found[0], 100 * found[1])}" if found else ""
    return f"{signed(100 * gain['ap50'])}{_SPACE}AP50{_SPACE}points{bounds} {over}"


def comparison_answer(comparison: Mapping[str, Any]) -> str:
    """What came of `edgekd compare`, in one sentence about its best method: of those whose gain is shown, if there are any."""
    methods = _methods(comparison)
    if not methods:
        return "No method was compared."
    shown = [row for row in methods if row["gain"]["verdict"] == "gain"]
    best = max(shown or methods, key=lambda row: float(row["gain"]["ap50"]))
    verdicts = {
        "gain": f"{best['method']} brings {method_gain(best)}",
        "loss": f"No method gains: the best, {best['method']}, changes accuracy by {method_gain(best)}",
    }
    unsure = f"No gain is shown for {best['method']}: {method_gain(best)}"
    return (
        f"{verdicts.get(best['gain']['verdict'] or '', unsure)}, against the same student alone, {images(comparison)}."
    )


_FEW_IMAGES = 20
"""On fewer, a bootstrap interval over images leaves out zero too often where there is no difference: simulated, of a mean of
normal differences, in 28 % of cases on 3 images and in 17 % on 5, instead of 5 %."""


def _too_few(result: Mapping[str, Any]) -> list[str]:
    """A sentence where an interval over the images of a benchmark or comparison cannot be believed."""
    count = result["data"]["images"]
    if count is None or count >= _FEW_IMAGES:
        return []
    return [f"On so few images ({count}) the interval over images is too narrow."]


def _methods(comparison: Mapping[str, Any]) -> list[Row]:
    """The rows that are compared with the student alone, in a summary as in a file fitted to its shape."""
    return [row for row in comparison["rows"] if row.get("gain", {}).get("ap50") is not None]


def more_seeds(comparison: Mapping[str, Any]) -> list[str]:
    """A sentence about how many seeds would decide the differences that a comparison over three or more leaves open."""
    found = [(row["method"], row["gain"].get("seeds_to_show")) for row in _methods(comparison)]
    best = comparison.get("best") or {"method": None, "ahead_of": {}}
    leads = ((f"{best['method']} over {other}", lead.get("seeds_to_show")) for other, lead in best["ahead_of"].items())
    needed = [f"{name} {number(count, 0)}" for name, count in (*found, *leads) if count]
    if not needed:
        return []
    return [f"Seeds that would decide what is not shown, if mean and spread stayed: {', '.join(needed)}."]


def caveats(comparison: Mapping[str, Any]) -> list[str]:
    """What else than the method differs between the student alone and the others, or makes the figures look better."""
    settings, found = comparison["train"], _too_few(comparison)
    tried = len(_methods(comparison))
    if tried > 2:
        found.append(
            f"Each of {tried} methods is judged at 95 % by itself: the more are tried, the likelier one is shown by chance."
        )
    if settings.get("select") == "best":
        found.append(
            "Every figure is of the best of several evaluations on these images (train.select: best): optimistic."
        )
    shown: dict[int, list[str]] = {}
    for name, method in comparison.get("methods", {}).items():
        views = (method["distill"].get("cache") or {}).get("views")
        if views and settings["epochs"] and views < settings["epochs"]:
            shown.setdefault(views, []).append(name)
    for views, names in shown.items():
        found.append(
            f"{', '.join(names)} {'were' if len(names) > 1 else 'was'} shown {views} view{'s' if views != 1 else ''} of each "
            "image (distill.cache), the student alone a new one each epoch."
        )
    return found


def device_answer(result: Mapping[str, Any]) -> str:
    """What was found on a device, in one sentence."""
    rows: Sequence[Row] = [row for row in result["rows"] if row["latency_ms"]["median"] is not None]
    if not rows:
        return "Nothing was measured."
    student, reference = headline_student(rows) or rows[0], find(rows, result.get("reference"))
    where = machine_name(result["device"])
    name = _capital(subject(student, rows))
    if reference is None or reference is student or student["speedup_vs_ensemble"] is None:
        took = milliseconds(student["latency_ms"]["median"])
        return f"{name} takes {took}{_SPACE}ms an inference on {where}."
    owner = "its ensemble" if reference["role"] == "ensemble" else "its teacher"
    return f"{name} {_speed(student, owner)} on {where}."


def machine_name(device: Mapping[str, Any]) -> str:
    """The most telling name there is: the board's, the GPU's, or the processor's."""
    gpus = [gpu["name"] for gpu in device.get("nvml") or () if gpu["name"]]
    names = [(device.get("jetson") or {}).get("model"), device.get("board"), *gpus, device["cpu"], device["machine"]]
    return next((str(name) for name in names if name), "an unnamed machine")


def _plain(row: Row, result: Mapping[str, Any]) -> str:
    """What one row reaches, and what of that was not measured."""
    name, ap50, took = (
        _capital(subject(row, result["rows"])),
        (row["map"] or {}).get("ap50"),
        row["latency_ms"]["median"],
    )
    if ap50 is None and took is None:
        return f"Neither accuracy nor latency of {subject(row, result['rows'])} was measured."
    if ap50 is None:
        return f"{name} takes {milliseconds(took)} ms an image over {images(result)}; its accuracy was not measured."
    if took is None:
        return f"{name} reaches {points(ap50)} AP50 over {images(result)}; its latency was not measured."
    return f"{name} reaches {points(ap50)} AP50 at {milliseconds(took)} ms an image over {images(result)}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
