"""Accuracy against latency, with intervals on both axes and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from edgekd.report import svg
from edgekd.report.marks import NARROW, Row, Rows, mark_class, role_class, shortened
from edgekd.report.words import ROLE_NAMES, milliseconds, points

Box = tuple[float, float, float, float]


def placed(rows: Rows) -> list[Row]:
    """Rows with an accuracy and a latency."""
    return [row for row in rows if row["map"]["ap50"] is not None and row["latency_ms"]["median"] is not None]


def pareto_front(rows: Rows) -> list[Row]:
    """Rows that none beats in AP50 and latency both, fastest first."""
    front: list[Row] = []
    for row in sorted(placed(rows), key=lambda row: (row["latency_ms"]["median"], -row["map"]["ap50"])):
        if not front or row["map"]["ap50"] > front[-1]["map"]["ap50"]:
            front.append(row)
    return front


def tradeoff_plot(rows: Rows, width: float) -> str:
    """AP50 against median latency, each with its 95 % interval."""
    shown = placed(rows)
    height = 400.0 if width > NARROW else 340.0
    left, right, top, bottom = 40.0, width - 14, 34.0, height - 44
    x, y = _scales(shown, (left, right, top, bottom))
    body = [
        svg.bottom_axis(
            x, bottom, top, "median latency, ms" + (" (log scale)" if x.log else ""), max(4, int(width // 110))
        ),
        svg.left_axis(y, left, right, "AP50, points"),
        svg.text(left + 8, top + 16, "↖ better", "tick"),
        _front(pareto_front(rows), x, y, (right, bottom)),
    ]
    places = [(x(row["latency_ms"]["median"]), y(100 * row["map"]["ap50"])) for row in shown]
    taken: list[Box] = [(px - 8, py - 8, px + 8, py + 8) for px, py in places]
    for row, (px, py) in zip(shown, places, strict=True):
        for (a, b), (c, d) in _whiskers(row, px, py, x, y):
            body.append(svg.line((a, b), (c, d), f"whisker {role_class(row)}"))
        body.append(svg.marker(px, py, row["role"], mark_class(row, rows), _tip(row), 6))
    for row, place in zip(shown, places, strict=True):
        interval = row["latency_ms"]["median_interval"]
        beyond = x(interval[1]) - place[0] if interval else 0.0
        body.append(_label((*place, beyond), str(row["name"]), taken, (left, top, width, bottom)))
    front = ", ".join(str(row["name"]) for row in pareto_front(rows))
    said = "; ".join(f"{_tip(row)} ({ROLE_NAMES.get(row['role'], row['role'])})" for row in shown)
    return svg.svg(width, height, f"Accuracy against latency. {said}. On the Pareto front: {front}.", body)


def _scales(shown: Rows, area: Box) -> tuple[svg.Scale, svg.Scale]:
    left, right, top, bottom = area
    latencies = [v for r in shown for v in (r["latency_ms"]["median"], *(r["latency_ms"]["median_interval"] or ()))]
    accuracies = [100 * v for r in shown for v in (r["map"]["ap50"], *(r["map"]["ap50_interval"] or ()))]
    low, high = min(latencies), max(latencies)
    log = high / low > 3
    x = svg.Scale(low / 1.2 if log else 0.0, high * (1.35 if log else 1.15), left, right, log)
    bottom_value, top_value = svg.padded(accuracies, 0.1, 1.0)
    floor = max(0.0, bottom_value)
    return x, svg.Scale(floor, max(min(top_value, 100.0), floor + 1.0), bottom, top)


def _front(front: Rows, x: svg.Scale, y: svg.Scale, ends: tuple[float, float]) -> str:
    """A staircase: what one can have at each latency."""
    places = [(x(row["latency_ms"]["median"]), y(100 * row["map"]["ap50"])) for row in front]
    if len(places) < 2:
        return ""
    path = [(places[0][0], ends[1])]
    for i, (px, py) in enumerate(places):
        path += [(px, py), (places[i + 1][0] if i + 1 < len(places) else ends[0], py)]
    return svg.polyline(path, "front")


def _whiskers(row: Row, px: float, py: float, x: svg.Scale, y: svg.Scale) -> list[tuple[svg.Position, svg.Position]]:
    """Both intervals, each a line with ends."""
    found = []
    if ends := row["map"]["ap50_interval"]:
        low, high = (y(100 * value) for value in ends)
        found += [((px, low), (px, high)), ((px - 3, low), (px + 3, low)), ((px - 3, high), (px + 3, high))]
    if ends := row["latency_ms"]["median_interval"]:
        low, high = (x(value) for value in ends)
        found += [((low, py), (high, py)), ((low, py - 3), (low, py + 3)), ((high, py - 3), (high, py + 3))]
    return found


def _tip(row: Row) -> str:
    latency, accuracy = row["latency_ms"], row["map"]
    times, heights = latency["median_interval"], accuracy["ap50_interval"]
    return (
        f"{row['name']}: {points(accuracy['ap50'])} AP50"
        + (f" [{points(heights[0])}, {points(heights[1])}]" if heights else "")
        + f" at {milliseconds(latency['median'])} ms"
        + (f" [{milliseconds(times[0])}, {milliseconds(times[1])}]" if times else "")
    )


def _label(mark: tuple[float, float, float], name: str, taken: list[Box], inside: Box) -> str:
    """A name beside its mark (x, y, length of the whisker to the right), where it covers least."""
    px, py, whisker = mark
    shown = shortened(name, 24)
    wide = len(shown) * svg.CHARACTER_PX
    places = []
    beside = max(11.0, whisker + 7)
    tried: Sequence[tuple[float, float, str]] = (
        (beside, 4, "start"), (-11, 4, "end"), (0, -13, "middle"), (0, 22, "middle"),
        (11, -12, "start"), (-11, 18, "end"), (11, 18, "start"), (-11, -12, "end"),
        (0, -30, "middle"), (0, 38, "middle"),
    )  # fmt: skip
    for order, (dx, dy, anchor) in enumerate(tried):
        start = px + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        box = (start, py + dy - 11, start + wide, py + dy + 3)
        cover = sum(_overlap(box, other) for other in taken) + 40 * _outside(box, inside)
        places.append((cover, order, box, px + dx, py + dy, anchor))
    _, _, box, tx, ty, anchor = min(places)
    taken.append(box)
    return svg.text(tx, ty, shown, "label", anchor)


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, inside: Box) -> float:
    left, top, right, bottom = inside
    return max(0.0, left - box[0]) + max(0.0, box[2] - right) + max(0.0, top - box[1]) + max(0.0, box[3] - bottom)
