"""What can be asked for power: a rail gives watts, a counter gives joules so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PowerRail:
    """One place where power is measured.

    Attributes:
        name: as the system calls it, such as "VDD_IN".
        read: watts now, or joules so far if `counts`; None when it does not answer.
        counts: it is an energy counter.
        wraps_at: joules after which a counter begins again; None if it does not.
    """

    name: str
    read: Callable[[], float | None]
    counts: bool = False
    wraps_at: float | None = None


@dataclass(frozen=True)
class RailGroup:
    """The rails of one source.

    Attributes:
        source: "jetson", "nvml" or "rapl".
        rails: all that can be read. total: names of those whose sum is what the device draws, readable or not.
    """

    source: str
    rails: tuple[PowerRail, ...]
    total: tuple[str, ...]
