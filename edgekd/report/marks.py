"""How rows are told apart in every plot: colour and shape by role, hollow or dashed among rows of one role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.report.words import ROLE_NAMES

Row = Mapping[str, Any]
Rows = Sequence[Row]

NARROW = 480
"""Up to this width in pixels, plots are laid out for a phone."""


def role_class(row: Row) -> str:
    """The CSS class that colours a row."""
    return f"r-{row['role']}" if row["role"] in ROLE_NAMES else "r-teacher"


def mark_class(row: Row, rows: Rows) -> str:
    """Rows of one role share a colour and a shape; every other one is hollow."""
    return f"mark {role_class(row)}" + (" hollow" if _order(row, rows) % 2 else "")


def dash_class(row: Row, rows: Rows) -> str:
    """Rows of one role share a colour; their lines differ in dashes."""
    return f"dash-{_order(row, rows) % 4}"


def _order(row: Row, rows: Rows) -> int:
    return [other["name"] for other in rows if other["role"] == row["role"]].index(row["name"])


def shortened(name: object, limit: int) -> str:
    """At most `limit` characters."""
    text = str(name)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def name_column(names: Sequence[object], width: float) -> float:
    """Pixels that names take at the left of a wide plot; none in a narrow one, where they stand above."""
    if width <= NARROW:
        return 0.0
    return min(200.0, 14 + max((len(shortened(name, 26)) for name in names), default=4) * 7.3 + 12)
