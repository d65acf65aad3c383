"""Method gains of `edgekd compare`: a dot a seed, the mean with its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.artifact import write_text
from edgekd.report import svg
from edgekd.report.marks import NARROW, name_column, shortened
from edgekd.report.words import interval, method_gain, signed

# The plot by itself has no page around it to give it colours.
_ALONE = """<style>svg{background:#fff}text{fill:#40454d;font:12px system-ui,sans-serif}.label{fill:#1b1d21}
.grid{stroke:#e4e4e4}.zero{stroke:#1b1d21}.across{stroke:#0072b2;stroke-width:3}.within{stroke:#7fb2d6;stroke-width:9}
.dot{fill:#7b828c}.mean{fill:#c8500a}</style>"""


def gain_rows(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Methods with a gain over the student alone."""
    return [row for row in comparison["rows"] if row.get("gain") and row["gain"]["ap50"] is not None]


def gain_plot(rows: Sequence[Mapping[str, Any]], width: float) -> str:
    """The gain in AP50 points of each method: dots for seeds, a thin line over seeds, a broad one over images."""
    narrow = width <= NARROW
    step, top = (62.0, 8.0) if narrow else (44.0, 8.0)
    left = name_column([row["method"] for row in rows], width)
    right = width - (10 if narrow else 130)
    bottom = top + step * len(rows)
    values = [0.0] + [100 * v for row in rows for v in _values(row["gain"])]
    x = svg.Scale(*svg.padded(values, 0.08, 0.5), left, right)
    body = [
        svg.bottom_axis(x, bottom, top, "AP50 points over the same student alone", 4 if narrow else 8),
        svg.line((x(0), top), (x(0), bottom), "zero"),
    ]
    for i, row in enumerate(rows):
        gain = row["gain"]
        y = top + (i + 0.5) * step + (9 if narrow else 0)
        name, mean = shortened(row["method"] or f"method {i + 1}", 26), 100 * gain["ap50"]
        if narrow:
            body.append(svg.text(0, y - 18, f"{name} · {signed(mean)}", "label"))
        else:
            body.append(svg.text(left - 10, y + 4, name, "label", "end"))
            body.append(svg.text(right + 10, y + 4, f"{signed(mean)}  {_interval(gain['interval_seeds'])}", "tick"))
        for key, style in (("interval_images", "within"), ("interval_seeds", "across")):
            if ends := gain[key]:
                body.append(svg.line((x(100 * ends[0]), y), (x(100 * ends[1]), y), style))
        body += [svg.marker(x(100 * v), y, "student_distilled", "dot", "", 4) for v in gain["values"] if v is not None]
        body.append(svg.marker(x(mean), y, "ensemble", "mean", f"{row['method']}: {signed(mean)}", 6))
    said = "; ".join(f"{row['method']}: {method_gain(row)}" for row in rows)
    return svg.svg(width, bottom + 44, f"Gains of methods. {said}.", body)


def _values(gain: Mapping[str, Any]) -> list[float]:
    found = [gain["ap50"], *gain["values"], *(gain["interval_seeds"] or ()), *(gain["interval_images"] or ())]
    return [value for value in found if value is not None]


def _interval(ends: Sequence[float] | None) -> str:
    return interval(100 * ends[0], 100 * ends[1]) if ends else ""


def draw_comparison(data: Mapping[str, Any], path: Path) -> None:
    """Write the plot of `comparison.json`'s contents as an SVG file of its own."""
    picture = gain_plot(gain_rows(data), 760.0)
    start = picture.index(">") + 1
    named = picture[: len("<svg")] + ' xmlns="http://www.w3.org/2000/svg"' + picture[len("<svg") : start]
    write_text(path, named + _ALONE + picture[start:] + "\n")
