"""The report's plots of a benchmark, each at any width, each with a text alternative that says the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekd.bench.matching import Float64Array
from edgekd.report import svg
from edgekd.report.words import ROLE_NAMES, milliseconds, points, times

Rows = Sequence[Mapping[str, Any]]

_NARROW = 480


def role_class(row: Mapping[str, Any]) -> str:
    """The CSS class that colours a row."""
    return f"r-{row['role']}" if row["role"] in ROLE_NAMES else "r-teacher"


def mark_class(row: Mapping[str, Any], rows: Rows) -> str:
    """Rows of one role share a colour and a shape; every other one is hollow."""
    alike = [other["name"] for other in rows if other["role"] == row["role"]]
    return f"mark {role_class(row)}" + (" hollow" if alike.index(row["name"]) % 2 else "")


def dash_class(row: Mapping[str, Any], rows: Rows) -> str:
    """Rows of one role share a colour; their lines differ in dashes."""
    alike = [other["name"] for other in rows if other["role"] == row["role"]]
    return f"dash-{alike.index(row['name']) % 4}"


def tradeoff_plot(rows: Rows, width: float) -> str:
    """AP50 against median latency, with the 95 % interval of AP50 and a whisker to the 90th percentile of latency."""
    shown = [row for row in rows if row["map"]["ap50"] is not None]
    height = 380.0 if width > _NARROW else 340.0
    left, right, top, bottom = 40.0, width - 14, 34.0, height - 44
    latencies = [row["latency_ms"][key] for row in shown for key in ("median", "p90")] or [1.0]
    accuracies = [v for row in shown for v in (100 * row["map"]["ap50"], *_interval(row))] or [0.0, 100.0]
    low, high = min(latencies), max(latencies)
    log = high / low > 3
    x = svg.Scale(low / 1.35 if log else 0.0, high * (1.5 if log else 1.15), left, right, log)
    y = svg.Scale(*_accuracy_range(accuracies), bottom, top)
    body = [
        svg.bottom_axis(x, bottom, top, "median latency, ms" + (" (log scale)" if log else ""), int(width // 110)),
        svg.left_axis(y, left, right, "AP50, points"),
        svg.text(left + 8, top + 16, "↖ better", "tick"),
    ]
    taken: list[tuple[float, float, float, float]] = []
    for row in shown:
        px, py = x(row["latency_ms"]["median"]), y(100 * row["map"]["ap50"])
        taken.append((px - 8, py - 8, px + 8, py + 8))
    for row in shown:
        px, py = x(row["latency_ms"]["median"]), y(100 * row["map"]["ap50"])
        colour = role_class(row)
        if ends := _interval(row):
            body.append(svg.line((px, y(ends[0])), (px, y(ends[1])), f"whisker {colour}"))
        body.append(svg.line((px, py), (x(row["latency_ms"]["p90"]), py), f"whisker {colour}"))
        body.append(svg.marker(px, py, row["role"], mark_class(row, rows), _tip(row), 6))
    for row in shown:
        px, py = x(row["latency_ms"]["median"]), y(100 * row["map"]["ap50"])
        beyond = x(row["latency_ms"]["p90"]) - px
        body.append(_label((px, py, beyond), str(row["name"]), taken, (left, top, width, bottom)))
    said = "; ".join(
        f"{row['name']} ({ROLE_NAMES.get(row['role'], '')}): {points(row['map']['ap50'])} AP50 at "
        f"{milliseconds(row['latency_ms']['median'])} ms"
        for row in shown
    )
    return svg.svg(width, height, f"Accuracy against latency. {said}.", body)


def _interval(row: Mapping[str, Any]) -> list[float]:
    found = row["map"].get("ap50_interval")
    return [100 * value for value in found] if found else []


def _accuracy_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = svg.padded(values, 0.1, 1.0)
    return max(0.0, low), max(min(high, 100.0), low + 1.0)


def _tip(row: Mapping[str, Any]) -> str:
    latency = row["latency_ms"]
    return (
        f"{row['name']}: {points(row['map']['ap50'])} AP50, median {milliseconds(latency['median'])} ms, "
        f"p90 {milliseconds(latency['p90'])} ms"
    )


def _label(
    mark: tuple[float, float, float],
    name: str,
    taken: list[tuple[float, float, float, float]],
    inside: tuple[float, float, float, float],
) -> str:
    """A name beside its mark (x, y, length of the whisker to the right), where it covers least."""
    px, py, whisker = mark
    shown = _shortened(name, 24)
    wide = len(shown) * svg.CHARACTER_PX
    left, top, right, bottom = inside
    places = []
    beside = max(11.0, whisker + 5)
    tried = [(beside, 4, "start"), (-11, 4, "end"), (0, -13, "middle"), (0, 22, "middle")]
    tried += [(11, -12, "start"), (-11, 18, "end"), (11, 18, "start"), (-11, -12, "end")]
    for order, (dx, dy, anchor) in enumerate(tried):
        start = px + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        box = (start, py + dy - 11, start + wide, py + dy + 3)
        cover = sum(_overlap(box, other) for other in taken)
        outside = (
            max(0.0, left - box[0]) + max(0.0, box[2] - right) + max(0.0, top - box[1]) + max(0.0, box[3] - bottom)
        )
        places.append((cover + 40 * outside, order, box, px + dx, py + dy, anchor))
    _, _, box, tx, ty, anchor = min(places)
    taken.append(box)
    return svg.text(tx, ty, shown, "label", anchor)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _shortened(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def stage_plot(rows: Rows, width: float) -> str:
    """Median time of each stage, stacked, one bar a row."""
    narrow = width <= _NARROW
    step, top = (54.0, 8.0) if narrow else (34.0, 8.0)
    left = 0.0 if narrow else min(190.0, max(len(_shortened(str(row["name"]), 26)) for row in rows) * 7 + 12)
    right = width - (8 if narrow else 215)
    bottom = top + step * len(rows)
    totals = [sum(row["stages_ms"].values()) for row in rows]
    x = svg.Scale(0.0, max(totals) or 1.0, left, right)
    body = [svg.bottom_axis(x, bottom, top, "ms an image, medians", 4 if narrow else 6)]
    for i, (row, total) in enumerate(zip(rows, totals, strict=True)):
        y = top + i * step + (21 if narrow else 6)
        name = _shortened(str(row["name"]), 26)
        stages = row["stages_ms"]
        parts = " + ".join(milliseconds(stages[key]) for key in ("pre", "infer", "post"))
        if narrow:
            body.append(svg.text(0, y - 6, f"{name}  {milliseconds(total)} ms", "label"))
        else:
            body.append(svg.text(left - 10, y + 15, name, "label", "end"))
        start = left
        for key in ("pre", "infer", "post"):
            end = x(stages[key]) - left + start
            tip = f"{row['name']}, {key}: {milliseconds(stages[key])} ms"
            body.append(svg.rectangle(start, y, max(end - start, 0.8), 21, f"stage-{key}", tip))
            start = end
        if not narrow:
            body.append(svg.text(start + 8, y + 15, f"{milliseconds(total)} ms", "label"))
            body.append(svg.text(start + 8 + len(milliseconds(total)) * 7 + 28, y + 15, f"{parts}", "tick"))
    said = "; ".join(
        f"{row['name']}: " + ", ".join(f"{key} {milliseconds(row['stages_ms'][key])} ms" for key in row["stages_ms"])
        for row in rows
    )
    return svg.svg(width, bottom + 44, f"Stage times. {said}.", body)


def spread_plot(rows: Rows, samples: Mapping[str, Float64Array], width: float) -> str:
    """Every latency sample as a tick, relative to its row's own median: nothing is cut off."""
    shown = [row for row in rows if row["name"] in samples]
    ratios = {row["name"]: np.ravel(samples[row["name"]]) / np.median(samples[row["name"]]) for row in shown}
    narrow = width <= _NARROW
    step, top = (50.0, 6.0) if narrow else (32.0, 6.0)
    left = 0.0 if narrow else min(190.0, max(len(_shortened(str(row["name"]), 26)) for row in shown) * 7 + 12)
    right = width - (8 if narrow else 120)
    bottom = top + step * len(shown)
    low, high = min(float(r.min()) for r in ratios.values()), max(float(r.max()) for r in ratios.values())
    x = svg.Scale(min(low, 0.97) * 0.99, max(high, 1.05) * 1.01, left, right, log=True)
    body = [svg.bottom_axis(x, bottom, top, "latency as a multiple of the row's median", 4 if narrow else 8)]
    for i, row in enumerate(shown):
        y = top + i * step + (18 if narrow else 6)
        values = ratios[row["name"]]
        places = sorted({round(2 * x(float(v))) / 2 for v in values})
        worst = f"max {times(float(values.max()))}"
        if narrow:
            body.append(svg.text(0, y - 5, f"{_shortened(str(row['name']), 26)}  {worst}", "label"))
        else:
            body.append(svg.text(left - 10, y + 15, _shortened(str(row["name"]), 26), "label", "end"))
            body.append(svg.text(right + 10, y + 15, worst, "tick"))
        path = "".join(f"M{svg.num(px)} {svg.num(y)}v20" for px in places)
        body.append(f'<path d="{path}" class="rug {role_class(row)}"/>')
        p90 = x(float(np.percentile(values, 90)))
        body.append(svg.line((x(1.0), y - 2), (x(1.0), y + 22), "median"))
        body.append(svg.line((p90, y - 2), (p90, y + 22), "p90"))
    said = "; ".join(
        f"{row['name']}: p90 {times(float(np.percentile(ratios[row['name']], 90)))}, "
        f"slowest {times(float(ratios[row['name']].max()))} of the median"
        for row in shown
    )
    return svg.svg(width, bottom + 44, f"Spread of latency. {said}.", body)


def recall_plot(rows: Rows, width: float) -> str:
    """Precision at each recall, IoU 0.5, averaged over classes."""
    shown = [row for row in rows if row.get("precision_at_recall")]
    height = 360.0 if width > _NARROW else 320.0
    left, right, top, bottom = 40.0, width - 12, 34.0, height - 44
    x, y = svg.Scale(0, 100, left, right), svg.Scale(0, 100, bottom, top)
    body = [svg.bottom_axis(x, bottom, top, "recall, %"), svg.left_axis(y, left, right, "precision, %")]
    for row in shown:
        curve = row["precision_at_recall"]
        places = [(x(100 * i / (len(curve) - 1)), y(100 * value)) for i, value in enumerate(curve)]
        body.append(svg.polyline(places, f"curve {role_class(row)} {dash_class(row, rows)}"))
    said = "; ".join(
        f"{row['name']}: precision {100 * row['precision_at_recall'][50]:.0f} % at 50 % recall" for row in shown
    )
    return svg.svg(width, height, f"Precision and recall. {said}.", body)


MOST_CLASSES = 30


def class_plot(rows: Rows, width: float) -> tuple[str, int]:
    """AP50 of each class for the ensemble and the students, and how many classes were left out.

    Beyond `MOST_CLASSES`, those are shown in which the rows differ most.
    """
    names = [name for name, figures in rows[0]["map"]["per_class"].items() if figures["ap50"] is not None]
    spans = {name: [100 * (row["map"]["per_class"][name]["ap50"] or 0.0) for row in rows] for name in names}
    most = sorted(names, key=lambda name: min(spans[name]) - max(spans[name]))[:MOST_CLASSES]
    shown = sorted(most, key=lambda name: (-max(spans[name]), name))
    narrow = width <= _NARROW
    limit = 15 if narrow else 22
    left = min(150.0, max([len(_shortened(name, limit)) for name in shown] or [4]) * 7.0 + 12)
    right, top, step = width - 14, 8.0, 24.0
    bottom = top + step * len(shown) + 4
    x = svg.Scale(0, 100, left, right)
    body = [svg.bottom_axis(x, bottom, top, "AP50, points", 4 if narrow else 10)]
    for i, name in enumerate(shown):
        y = top + step * (i + 0.5)
        body.append(svg.text(left - 10, y + 4, _shortened(name, limit), "label", "end"))
        body.append(svg.line((x(min(spans[name])), y), (x(max(spans[name])), y), "span"))
        for row, value in zip(rows, spans[name], strict=True):
            tip = f"{name}, {row['name']}: {value:.1f}"
            body.append(svg.marker(x(value), y, row["role"], mark_class(row, rows), tip, 4.6))
    said = "; ".join(
        f"{name}: " + ", ".join(f"{row['name']} {value:.0f}" for row, value in zip(rows, spans[name], strict=True))
        for name in shown
    )
    return svg.svg(width, bottom + 44, f"AP50 by class. {said}.", body), len(names) - len(shown)
