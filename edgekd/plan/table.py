"""A plan for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekd.report.table import aligned

_HEADINGS = (
    "",
    "model",
    "width",
    "px",
    "",
    "GMACs",
    "M params",
    "pre/infer/post",
    "ms median",
    "p90",
    "budget",
    "roof",
)


def plan_text(plan: Mapping[str, Any]) -> str:
    """The candidates worth distilling, best first, the recipes, and what to know of them."""
    rows = {row["name"]: row for row in plan["rows"]}
    best = [_cells(number, rows[name], plan["budget_ms"]) for number, name in enumerate(plan["best"], 1)]
    lines = aligned([_HEADINGS, *best], words=(1,))
    lines += [
        "",
        f"ms of one image; budget: the median as a share of {plan['budget_ms']:g} ms; roof: the least that the machine's "
        "arithmetic and memory allow, as a share of what inference took",
    ]
    if not plan["best"]:
        lines = [f"nothing is known to be within {plan['budget_ms']:g} ms: {_nearest(plan)}"]
    counted = (
        f"{len(plan['measured'])} of {plan['candidates']} candidates measured, {len(plan['within'])} within "
        f"{plan['budget_ms']:g} ms"
    )
    if plan["failed"]:
        counted += f"; {len(plan['failed'])} could not be: {rows[plan['failed'][0]]['failed'].splitlines()[0]}"
    lines += [
        "",
        counted,
        *(f"recipe: {name}" for name in plan["recipes"]),
        *(f"note: {note}" for note in plan["notes"]),
    ]
    return "\n".join(lines)


def _cells(number: int, row: Mapping[str, Any], budget_ms: float) -> list[str]:
    latency, stages, share = row["latency_ms"], row["stages_ms"], row["roof"]["share"]
    return [
        f"{number}.",
        row["model"],
        f"{row['width']:g}",
        str(row["input_size"]),
        row["precision"],
        f"{row['macs'] / 1e9:.3f}",
        f"{row['parameters'] / 1e6:.2f}",
        "/".join("-" if stages[key] is None else f"{stages[key]:.2f}" for key in ("pre", "infer", "post")),
        f"{latency['median']:.2f}",
        f"{latency['p90']:.2f}",
        f"{latency['median'] / budget_ms:.0%}",
        "-" if share is None else f"{share:.0%}",
    ]


def _nearest(plan: Mapping[str, Any]) -> str:
    timed = [row for row in plan["rows"] if row["name"] in plan["measured"]]
    if not timed:
        never = "there was no time for any" if plan["left"] else "each is expected to take many times that"
        return "none could be measured" if plan["failed"] else never
    fastest = min(timed, key=lambda row: float(row["latency_ms"]["median"]))
    return f"the fastest was {fastest['name']} with {fastest['latency_ms']['median']:.2f} ms"
