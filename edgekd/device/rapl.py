"""Energy counters of x86 processors (RAPL), where the system lets a user read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgekd.device.rails import PowerRail, RailGroup
from edgekd.machine import read_text, scaled

_MICRO = 1e-6


def rapl_rails(root: Path = Path("/")) -> RailGroup | None:
    """One counter a readable zone; the total is all packages, and memory where it is counted apart. None if none.

    A package that cannot be read is part of the total all the same: without it the sum would be too small.
    """
    rails, total = [], []
    for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        own = read_text(zone / "name") or zone.name
        parent = read_text(zone.parent / zone.name.rsplit(":", 1)[0] / "name") if zone.name.count(":") > 1 else None
        name = own if parent is None else f"{parent}/{own}"
        if scaled(zone / "energy_uj", _MICRO) is not None:
            rails.append(PowerRail(name, _counter(zone), True, scaled(zone / "max_energy_range_uj", _MICRO)))
        if own.startswith("package") or own == "dram":
            total.append(name)
    return RailGroup("rapl", tuple(rails), tuple(total)) if total and rails else None


def _counter(zone: Path) -> Callable[[], float | None]:
    return lambda: scaled(zone / "energy_uj", _MICRO)
