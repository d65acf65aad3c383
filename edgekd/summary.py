"""A benchmark's result for a terminal: one row an artefact in aligned columns, then the findings in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.report.words import ROLE_NAMES, answer, gain, images, milliseconds, number, points, times

HEADINGS = (
    "name",
    "role",
    "AP50",
    "AP50:95",
    "VOC07",
    "ms median",
    "p90",
    "pre/infer/post",
    "speed-up",
    "M params",
    "GMACs",
    "MB",
)


def summary_text(result: Mapping[str, Any]) -> str:
    """The comparison table, what can be said from it, and what to know before believing it."""
    rows = [[*HEADINGS], *(_cells(row) for row in result["rows"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * max(len(line) for line in lines))
    data = result["data"]
    lines += ["", f"data: {data['name']}, split {data['split']}, {images(result)}"]
    lines += [sentence for sentence in (answer(result), gain(result)) if sentence]
    lines += [f"note: {warning}" for warning in result.get("warnings", ())]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    latency, stages, accuracy = row["latency_ms"], row["stages_ms"], row["map"]
    return [
        str(row["name"]) if str(row["name"]).endswith(row["precision"]) else f"{row['name']} {row['precision']}",
        ROLE_NAMES.get(row["role"], str(row["role"])),
        *(points(accuracy[key]) for key in ("ap50", "ap", "voc07")),
        milliseconds(latency["median"]),
        milliseconds(latency["p90"]),
        "/".join(milliseconds(stages[key]) for key in ("pre", "infer", "post")),
        times(row["speedup_vs_ensemble"]),
        number(row["parameters"], 2, 1e6),
        number(row["macs"], 2, 1e9),
        number(row["size_bytes"], 1, 1e6),
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    aligned = [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()
