"""How each row's latencies are spread: a histogram a row out of percentiles, its tail kept to the last sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.report import svg
from edgekd.report.marks import NARROW, Row, Rows, name_column, role_class, shortened
from edgekd.report.words import milliseconds

_BINS = 110


def spread_rows(rows: Rows) -> list[Row]:
    """Rows whose latency has percentiles."""
    return [row for row in rows if row["latency_ms"]["percentiles"] and min(row["latency_ms"]["percentiles"]) > 0]


def spread_plot(rows: Rows, width: float) -> str:
    """One histogram a row, over the latency of an image on a logarithmic axis; median, p90 and slowest marked."""
    shown = spread_rows(rows)
    curves = [np.maximum.accumulate(np.asarray(row["latency_ms"]["percentiles"], np.float64)) for row in shown]
    narrow = width <= NARROW
    step, top = (66.0, 6.0) if narrow else (48.0, 6.0)
    left = name_column([row["name"] for row in shown], width)
    right = width - (8 if narrow else 110)
    bottom = top + step * len(shown)
    low, high = min(float(c[0]) for c in curves), max(float(c[-1]) for c in curves)
    x = svg.Scale(low / 1.03, max(high, low * 1.2) * 1.03, left, right, log=True)
    body = [svg.bottom_axis(x, bottom, top, "latency of an image, ms (log scale)", 4 if narrow else 9)]
    for i, (row, curve) in enumerate(zip(shown, curves, strict=True)):
        base = top + (i + 1) * step - 5
        slowest = f"slowest {milliseconds(float(curve[-1]))} ms"
        if narrow:
            body.append(svg.text(0, base - 42, f"{shortened(row['name'], 26)} · {slowest}", "label"))
        else:
            body.append(svg.text(left - 10, base - 6, shortened(row["name"], 26), "label", "end"))
            body.append(svg.text(right + 10, base - 6, slowest, "tick"))
        body.append(_hill(curve, x, base, 36.0, f"hill {role_class(row)}"))
        for share, style in ((50, "median"), (90, "p90")):
            place = x(float(np.interp(share, np.linspace(0, 100, len(curve)), curve)))
            body.append(svg.line((place, base - 36), (place, base), style))
        body.append(svg.line((x(float(curve[-1])), base - 9), (x(float(curve[-1])), base), f"worst {role_class(row)}"))
    said = "; ".join(f"{row['name']}: {_said(curve)}" for row, curve in zip(shown, curves, strict=True))
    return svg.svg(width, bottom + 44, f"Spread of latency. {said}.", body)


def _hill(curve: np.ndarray, x: svg.Scale, base: float, tall: float, style: str) -> str:
    """The share of samples in equal steps of the logarithm, scaled to the row's own highest."""
    edges = np.geomspace(x.low, x.high, _BINS + 1)
    share = np.diff(np.interp(edges, curve, np.linspace(0.0, 1.0, len(curve))))
    share = np.convolve(np.pad(share, 1), (0.25, 0.5, 0.25), "valid")
    heights = share / max(float(share.max()), 1e-12)
    places: Sequence[svg.Position] = [
        (x(float(edge)), base - tall * float(height))
        for edge, height in zip((edges[:-1] * edges[1:]) ** 0.5, heights, strict=True)
    ]
    there = [i for i, height in enumerate(heights) if height > 0.004]
    kept = places[max(0, there[0] - 1) : there[-1] + 2] if there else places
    return svg.polyline([(kept[0][0], base), *kept, (kept[-1][0], base)], style)


def _said(curve: np.ndarray) -> str:
    at = [float(np.interp(share, np.linspace(0, 100, len(curve)), curve)) for share in (50, 90, 100)]
    return f"median {milliseconds(at[0])} ms, p90 {milliseconds(at[1])} ms, slowest {milliseconds(at[2])} ms"
