"""A benchmark's result for a terminal: one row an artefact, then the differences in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "name",
    "precision",
    "ms median",
    "p90",
    "pre/infer/post",
    "AP50",
    "AP",
    "VOC07",
    "M params",
    "GMACs",
    "MB",
    "speed-up",
)
_ROLES = {"student_distilled": "distilled student", "student": "student", "teacher": "teacher", "ensemble": "ensemble"}


def summary_text(result: Mapping[str, Any]) -> str:
    """The comparison table and what can be said from it, as plain text in aligned columns."""
    rows = [[*COLUMNS], *(_cells(row) for row in result["rows"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    data = result["data"]
    kind = "synthetic " if data.get("synthetic") else ""
    reference = f"; speed-up over {result['reference']}" if result["reference"] else ""
    lines += ["", f"{kind}data: {data['name']}, split {data['split']}, {data['images']} images{reference}"]
    lines += [comparison_text(comparison) for comparison in result["comparisons"]]
    lines += [f"note: {warning}" for warning in result.get("warnings", ())]
    return "\n".join(lines)


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """One difference in AP50 points with its interval, and plainly whether there is one."""
    points, low, high = (100 * comparison[key] for key in ("difference", "low", "high"))
    numbers = f"{points:+.1f} AP50 points (95 %: {low:+.1f} to {high:+.1f}, over {comparison['images']} images)"
    pair = f"{_named(comparison, 'a')} against {_named(comparison, 'b')}"
    if not comparison["difference_shown"]:
        return f"{pair}: no difference shown, {numbers}"
    return f"{pair}: {'better' if points > 0 else 'worse'}, {numbers}"


def _named(comparison: Mapping[str, Any], side: str) -> str:
    name, role = str(comparison[side]), _ROLES.get(comparison[f"{side}_role"], "")
    return name if not role or name in role else f"{name} ({role})"


def _cells(row: Mapping[str, Any]) -> list[str]:
    latency, stages, accuracy = row["latency_ms"], row["stages_ms"], row["map"]
    return [
        str(row["name"]),
        str(row["precision"]),
        f"{latency['median']:.1f}",
        f"{latency['p90']:.1f}",
        "/".join(f"{stages[key]:.1f}" for key in ("pre", "infer", "post")),
        *(_number(accuracy[key], "{:.3f}") for key in ("ap50", "ap", "voc07")),
        _number(row["parameters"], "{:.2f}", 1e6),
        _number(row["macs"], "{:.2f}", 1e9),
        _number(row["size_bytes"], "{:.1f}", 1e6),
        _number(row["speedup_vs_ensemble"], "{:.1f}x"),
    ]


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(value / unit)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    aligned = [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()
