"""Stacked bars, one a row: stage times, memory, energy, shares of a roof, slow layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekd.report import svg
from edgekd.report.marks import NARROW, name_column, role_class, shortened
from edgekd.report.words import milliseconds, number

Rows = Sequence[Mapping[str, Any]]

STAGE_CLASSES = {"pre": "stage-pre", "infer": "stage-infer", "post": "stage-post"}


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        parts: (what, value, CSS class), stacked from the left.
        total: what is written behind it. note: and more quietly behind that, where there is room.
        reach: the end of a thin line beyond or within the bar, such as a 90th percentile.
    """

    name: str
    parts: Sequence[tuple[str, float, str]]
    total: str
    note: str = ""
    reach: float | None = None


def bar_plot(bars: Sequence[Bar], width: float, title: str, axis: str, *, most: float | None = None) -> str:
    """All bars on one axis from 0 to the longest, or to `most`."""
    narrow = width <= NARROW
    step, top = (54.0, 8.0) if narrow else (34.0, 8.0)
    left = name_column([bar.name for bar in bars], width)
    room = max((len(bar.total) + len(bar.note) for bar in bars), default=0) * 7.0 + 34
    right = width - (8 if narrow else min(room, 0.4 * width))
    bottom = top + step * len(bars)
    ends = [max(sum(value for _, value, _ in bar.parts), bar.reach or 0.0) for bar in bars]
    x = svg.Scale(0.0, most or max(ends, default=0.0) or 1.0, left, right)
    body = [svg.bottom_axis(x, bottom, top, axis, 4 if narrow else 6)]
    for i, (bar, longest) in enumerate(zip(bars, ends, strict=True)):
        y = top + i * step + (21 if narrow else 6)
        if narrow:
            body.append(svg.text(0, y - 6, f"{shortened(bar.name, 26)} · {bar.total}", "label"))
        else:
            body.append(svg.text(left - 10, y + 15, shortened(bar.name, 26), "label", "end"))
            body.append(svg.text(x(longest) + 8, y + 15, bar.total, "label"))
            body.append(svg.text(x(longest) + 18 + 7.2 * len(bar.total), y + 15, bar.note, "tick"))
        start = left
        for what, value, style in bar.parts:
            end = start + x(value) - left
            tip = f"{bar.name}, {what}: {number(value, 2)}" if what else bar.name
            body.append(svg.rectangle(start, y, max(end - start, 0.8), 21, style, tip))
            start = end
        if bar.reach is not None:
            body.append(svg.line((start, y + 10.5), (x(bar.reach), y + 10.5), "reach"))
            body.append(svg.line((x(bar.reach), y + 5), (x(bar.reach), y + 16), "reach"))
    said = "; ".join(
        f"{bar.name}: {bar.total}"
        + (f" ({', '.join(f'{w} {number(v, 2)}' for w, v, _ in bar.parts)})" if len(bar.parts) > 1 else "")
        for bar in bars
    )
    return svg.svg(width, bottom + 44, f"{title}. {said}.", body)


def stage_bars(rows: Rows) -> list[Bar]:
    """Median time of each stage; rows without any are left out."""
    found = []
    for row in rows:
        stages = {name: value for name, value in row["stages_ms"].items() if value is not None}
        if stages:
            parts = [(name, value, STAGE_CLASSES.get(name, "stage-other")) for name, value in stages.items()]
            note = " + ".join(milliseconds(value) for value in stages.values()) if len(stages) > 1 else ""
            found.append(Bar(row["name"], parts, f"{milliseconds(sum(stages.values()))} ms", note))
    return found


def memory_bars(rows: Rows) -> list[Bar]:
    """Peak memory of each, and how much of it came with the model."""
    found = []
    for row in rows:
        peak, model = row["peak_memory_bytes"], row["model_memory_bytes"] or 0
        if peak:
            model = min(model, peak)
            parts = [("before the model was loaded", (peak - model) / 1e6, "part-base"), ("model", model / 1e6, "part")]
            found.append(Bar(row["name"], parts, f"{number(peak, 0, 1e6)} MB", f"model {number(model, 0, 1e6)}"))
    return found


def energy_bars(rows: Rows) -> list[Bar]:
    """Energy of an inference: what the machine takes when idle, and what comes on top."""
    found = []
    for row in rows:
        gross, above = row["energy"]["gross_mj"], row["energy"]["above_idle_mj"]
        if gross is None:
            continue
        if above is None:
            parts = [("gross", gross, "part")]
        else:
            own = min(max(above, 0.0), gross)
            parts = [("idle", gross - own, "part-base"), ("above idle", own, "part")]
        note = "" if above is None else f"above idle {number(above, 1)}"
        found.append(Bar(_named(row, rows), parts, f"{number(gross, 1)} mJ", note))
    return found


def roof_bars(rows: Rows) -> list[Bar]:
    """The share of what the machine's measured peak allows, in percent, and what sets the limit."""
    found = []
    for row in rows:
        share, limit = row["roof"]["share"], row["roof"]["limit_ms"]
        if share is not None:
            note = " ".join(filter(None, (row["roof"]["bound"], f"{milliseconds(limit)} ms" if limit else None)))
            parts = [("share", 100 * share, f"fill {role_class(row)}")]
            found.append(Bar(_named(row, rows), parts, f"{number(share, 0, 0.01)} %", note and f"limit: {note}"))
    return found


SLOWEST = 12


def slowest_layers(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The layers of a profile that take longest."""
    layers = [layer for layer in row["profile"]["layers"] if layer["ms"]]
    return sorted(layers, key=lambda layer: -float(layer["ms"]))[:SLOWEST]


def layer_bars(row: Mapping[str, Any]) -> list[Bar]:
    """The slowest layers of a row's profile, by the ends of their names, which tell them apart."""
    found = []
    for layer in slowest_layers(row):
        name = str(layer["name"] or "unnamed")
        share = f"{number(layer['share'], 1, 0.01)} %"
        rate = "" if layer["gflops"] is None else f"{number(layer['gflops'], 1)} GFLOP/s"
        parts = [("ms", layer["ms"], "part")]
        found.append(
            Bar(name if len(name) < 27 else "…" + name[-25:], parts, share, f"{layer['op'] or ''} {rate}".strip())
        )
    return found


def latency_bars(rows: Rows) -> list[Bar]:
    """Median latency of each, with a line to the 90th percentile."""
    return [
        Bar(
            _named(row, rows),
            [("median", row["latency_ms"]["median"], f"fill {role_class(row)}")],
            f"{milliseconds(row['latency_ms']['median'])} ms",
            "" if row["latency_ms"]["p90"] is None else f"p90 {milliseconds(row['latency_ms']['p90'])}",
            row["latency_ms"]["p90"],
        )
        for row in rows
        if row["latency_ms"]["median"] is not None
    ]


def _named(row: Mapping[str, Any], rows: Rows) -> str:
    """The name, with its precision where names repeat."""
    repeats = sum(other["name"] == row["name"] for other in rows) > 1
    return f"{row['name']} {row['precision']}" if repeats else str(row["name"])
