"""The plot of a comparison over seeds: one row a method, a dot a seed, the mean with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.artifact import atomic_path


def draw_comparison(data: Mapping[str, Any], path: Path) -> None:
    """Write the plot of `comparison.json`'s contents to `path` (SVG, or PNG by its suffix)."""
    from matplotlib.figure import Figure

    rows = [row for row in data["rows"] if "gain" in row][::-1]
    figure = Figure(figsize=(7.0, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        gain = row["gain"]
        values = [100 * value for value in gain["values"]]
        axes.plot(values, [y] * len(values), "o", color="#9aa5b1", markersize=5, zorder=2)
        interval = gain["interval_seeds"] or gain["interval_images"]
        axes.plot([100 * v for v in interval], [y, y], "-", color="#0b5cad", linewidth=2, zorder=3)
        axes.plot([100 * gain["ap50"]], [y], "D", color="#0b5cad", markersize=7, zorder=4)
        axes.annotate(
            f"{100 * gain['ap50']:+.1f}", (100 * gain["ap50"], y), (0, 9), textcoords="offset points", ha="center"
        )
    axes.axvline(0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    kind = "synthetic " if data["data"]["synthetic"] else ""
    axes.set_xlabel(
        f"AP50 points over the same student alone ({kind}{data['data']['name']}, {data['data']['images']} images; "
        "dots: seeds, bar: 95 %)"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
