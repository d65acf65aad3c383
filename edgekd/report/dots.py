"""Accuracy in detail: dots by class and by size of object, and precision over recall."""

from __future__ import annotations

from edgekd.report import svg
from edgekd.report.marks import NARROW, Rows, dash_class, mark_class, role_class, shortened

MOST_GROUPS = 30
SIZES = {"small": "below 32² px", "medium": "32² to 96² px", "large": "above 96² px"}


def groups_of(rows: Rows, kind: str) -> list[str]:
    """Classes ("per_class") or sizes ("by_size") in which some row has a figure."""
    names = dict.fromkeys(name for row in rows for name in row["map"][kind])
    return [n for n in names if any(row["map"][kind].get(n, {}).get("ap50") is not None for row in rows)]


def group_plot(rows: Rows, kind: str, width: float) -> str:
    """AP50 of each class or size, one dot a row.

    Beyond `MOST_GROUPS`, those are shown in which the rows differ most.
    """
    names = groups_of(rows, kind)
    values = {name: [row["map"][kind].get(name, {}).get("ap50") for row in rows] for name in names}
    there = {name: [100 * v for v in found if v is not None] for name, found in values.items()}
    shown = sorted(names, key=lambda name: min(there[name]) - max(there[name]))[:MOST_GROUPS]
    if kind == "per_class":
        shown = sorted(shown, key=lambda name: (-max(there[name]), name))
    else:
        shown = [name for name in names if name in shown]
    narrow = width <= NARROW
    limit = 15 if narrow else 22
    left = min(150.0, max(len(shortened(name, limit)) for name in shown) * 7.8 + 12)
    right, top, step = width - 14, 8.0, 24.0
    bottom = top + step * len(shown) + 4
    x = svg.Scale(0, 100, left, right)
    body = [svg.bottom_axis(x, bottom, top, "AP50, points", 4 if narrow else 10)]
    for i, name in enumerate(shown):
        y = top + step * (i + 0.5)
        body.append(svg.text(left - 10, y + 4, shortened(name, limit), "label", "end"))
        body.append(svg.line((x(min(there[name])), y), (x(max(there[name])), y), "span"))
        for row, value in zip(rows, values[name], strict=True):
            if value is not None:
                tip = f"{name}, {row['name']}: {100 * value:.1f}"
                body.append(svg.marker(x(100 * value), y, row["role"], mark_class(row, rows), tip, 4.6))
    said = "; ".join(
        f"{name}: "
        + ", ".join(f"{row['name']} {100 * v:.0f}" for row, v in zip(rows, values[name], strict=True) if v is not None)
        for name in shown
    )
    return svg.svg(width, bottom + 44, f"AP50 by {'class' if kind == 'per_class' else 'size'}. {said}.", body)


def recall_plot(rows: Rows, width: float) -> str:
    """Precision at each recall, IoU 0.5, averaged over classes."""
    shown = [row for row in rows if row["precision_at_recall"]]
    height = 360.0 if width > NARROW else 320.0
    left, right, top, bottom = 40.0, width - 12, 34.0, height - 44
    x, y = svg.Scale(0, 100, left, right), svg.Scale(0, 100, bottom, top)
    body = [svg.bottom_axis(x, bottom, top, "recall, %"), svg.left_axis(y, left, right, "precision, %")]
    for row in shown:
        curve = row["precision_at_recall"]
        places = [(x(100 * i / (len(curve) - 1)), y(100 * value)) for i, value in enumerate(curve)]
        body.append(svg.polyline(places, f"curve {role_class(row)} {dash_class(row, rows)}"))
    said = "; ".join(
        f"{row['name']}: precision {100 * row['precision_at_recall'][len(row['precision_at_recall']) // 2]:.0f} % "
        "at 50 % recall"
        for row in shown
    )
    return svg.svg(width, height, f"Precision and recall. {said}.", body)
