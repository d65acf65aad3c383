"""Just enough SVG for the report's plots: scales, axes, marks. Colours are CSS classes, so that a theme can set them.

Text that comes from data goes through `text` or `title`, which escape it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape as _escape
from xml.sax.saxutils import quoteattr

CHARACTER_PX = 6.5
"""About the width of a character of the labels' 12 px type."""

Position = tuple[float, float]


def escape(text: object) -> str:
    """For element content; control characters, which no XML may hold, become spaces."""
    return _escape("".join(c if c.isprintable() else " " for c in str(text)))


def attribute(text: object) -> str:
    """A quoted attribute value."""
    return quoteattr("".join(c if c.isprintable() else " " for c in str(text)))


def num(value: float) -> str:
    """A coordinate, as short as it can be."""
    return f"{value:.1f}".rstrip("0").rstrip(".") if value else "0"


@dataclass(frozen=True)
class Scale:
    """A data interval onto a pixel interval, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a data value."""
        if self.log:
            share = math.log(max(value, 1e-12) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values within the interval."""
        found = _log_ticks(self.low, self.high, wanted) if self.log else []
        return found if len(found) > 2 else _linear_ticks(self.low, self.high, wanted)


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    rough = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough - 1e-12)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**d for d in decades for m in mantissas if low * 0.999 <= m * 10.0**d <= high * 1.001]
        if len(found) <= wanted + 1:
            return found
    return found


def padded(values: Sequence[float], share: float = 0.08, least: float = 1e-3) -> tuple[float, float]:
    """A linear interval around values with air on both sides."""
    low, high = min(values), max(values)
    air = max((high - low) * share, least)
    return low - air, high + air


def tick_label(value: float) -> str:
    """A tick's number, without needless digits."""
    return f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")


def svg(width: float, height: float, label: str, body: Sequence[str]) -> str:
    """A whole picture with its text alternative."""
    return (
        f'<svg viewBox="0 0 {num(width)} {num(height)}" width="{num(width)}" height="{num(height)}" role="img" '
        f"aria-label={attribute(label)}>" + "".join(body) + "</svg>"
    )


def text(x: float, y: float, content: object, classes: str = "", anchor: str = "start") -> str:
    """A line of text with its baseline at y."""
    aligned = "" if anchor == "start" else f' text-anchor="{anchor}"'
    styled = f' class="{classes}"' if classes else ""
    return f'<text x="{num(x)}" y="{num(y)}"{aligned}{styled}>{escape(content)}</text>'


def line(a: Position, b: Position, classes: str) -> str:
    """A straight line."""
    return f'<path d="M{num(a[0])} {num(a[1])}L{num(b[0])} {num(b[1])}" class="{classes}"/>'


def polyline(places: Sequence[Position], classes: str) -> str:
    """A line through many points."""
    if not places:
        return ""
    return f'<path d="M{"L".join(f"{num(x)} {num(y)}" for x, y in places)}" class="{classes}"/>'


def rectangle(x: float, y: float, width: float, height: float, classes: str, tip: str = "") -> str:
    """A filled box, with a tip on hovering."""
    return (
        f'<rect x="{num(x)}" y="{num(y)}" width="{num(max(width, 0))}" height="{num(height)}" class="{classes}">'
        f"{_tip(tip)}</rect>"
    )


def marker(x: float, y: float, role: str, classes: str, tip: str = "", size: float = 5.0) -> str:
    """A mark whose shape says the role too, for those who cannot tell the colours apart."""
    return f'<path d="{_SHAPES.get(role, _circle)(x, y, size)}" class="{classes}">{_tip(tip)}</path>'


def _tip(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""


def _circle(x: float, y: float, r: float) -> str:
    return f"M{num(x - r)} {num(y)}a{num(r)} {num(r)} 0 1 0 {num(2 * r)} 0a{num(r)} {num(r)} 0 1 0 {num(-2 * r)} 0z"


def _diamond(x: float, y: float, r: float) -> str:
    r *= 1.3
    return f"M{num(x)} {num(y - r)}l{num(r)} {num(r)}l{num(-r)} {num(r)}l{num(-r)} {num(-r)}z"


def _square(x: float, y: float, r: float) -> str:
    r *= 0.9
    return f"M{num(x - r)} {num(y - r)}h{num(2 * r)}v{num(2 * r)}h{num(-2 * r)}z"


def _triangle(x: float, y: float, r: float) -> str:
    r *= 1.15
    return f"M{num(x)} {num(y - r)}L{num(x + r)} {num(y + 0.8 * r)}L{num(x - r)} {num(y + 0.8 * r)}z"


_SHAPES: dict[str, Callable[[float, float, float], str]] = {
    "teacher": _triangle,
    "ensemble": _diamond,
    "student": _square,
    "student_distilled": _circle,
}


def bottom_axis(scale: Scale, y: float, top: float, title: str, wanted: int = 5) -> str:
    """Vertical grid lines with numbers under them, and what they measure."""
    parts = []
    for value in scale.ticks(wanted):
        x = scale(value)
        parts += [line((x, top), (x, y), "grid"), text(x, y + 16, tick_label(value), "tick", "middle")]
    parts.append(text((scale.start + scale.end) / 2, y + 34, title, "axis", "middle"))
    return "".join(parts)


def left_axis(scale: Scale, x: float, right: float, title: str, wanted: int = 5) -> str:
    """Horizontal grid lines with numbers beside them, and what they measure above."""
    parts = []
    for value in scale.ticks(wanted):
        y = scale(value)
        parts += [line((x, y), (right, y), "grid"), text(x - 7, y + 4, tick_label(value), "tick", "end")]
    parts.append(text(0, min(scale.start, scale.end) - 12, title, "axis"))
    return "".join(parts)
