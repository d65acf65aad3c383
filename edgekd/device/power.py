"""Energy by sampling: a thread reads every rail while something runs, and integrates.

Rails that give watts are integrated by the trapezoidal rule; counters are differenced, one wrap between two samples
allowed for. A rail that stops answering, or answers what no rail can, for more than a tenth of the samples gives None, and
so does a counter that stands still, as some virtual machines have them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.device.jetson import jetson_rails
from edgekd.device.nvml import nvml_rails
from edgekd.device.rails import PowerRail, RailGroup
from edgekd.device.rapl import rapl_rails

_MAY_MISS = 0.1
_MOST_W = 10_000.0
"""More than one rail gives: a sensor's garbage, or a counter that began again elsewhere than at its end."""


def power_rails(root: Path = Path("/"), nvml: Any = None) -> tuple[RailGroup, ...]:
    """Every source of power readings here: a Jetson's rails, GPUs by NVML, the CPU's RAPL counters."""
    found = (jetson_rails(root), None if nvml is None else nvml_rails(nvml), rapl_rails(root))
    return tuple(group for group in found if group is not None)


def choose_group(groups: Sequence[RailGroup], uses_gpu: bool) -> RailGroup | None:
    """The source that a figure is about: a Jetson's board, else the GPU if it computes, else the CPU; None if none."""
    by_source = {group.source: group for group in groups}
    for source in ("jetson", "nvml") if uses_gpu else ("jetson", "rapl"):
        if source in by_source:
            return by_source[source]
    return None


@dataclass
class _Sum:
    """A rail's integral so far."""

    rail: PowerRail
    joules: float = 0.0
    last: tuple[float, float] | None = None
    first_s: float | None = None
    reads: int = 0
    missed: int = 0
    broken: bool = False

    def take(self, clock: Callable[[], float]) -> None:
        value, now = self.rail.read(), clock()
        self.reads += 1
        if value is None or not (self.rail.counts or abs(value) <= _MOST_W):
            self.missed += 1
            return
        if self.last is not None:
            grown = self._between(self.last, (now, value))
            if not 0 <= grown <= _MOST_W * max(1.0, now - self.last[0]) and self.rail.counts:
                self.broken = True  # what it counted until then is lost
            self.joules += grown
        else:
            self.first_s = now
        self.last = (now, value)

    def _between(self, before: tuple[float, float], after: tuple[float, float]) -> float:
        if not self.rail.counts:
            return (after[0] - before[0]) * (after[1] + before[1]) / 2
        grown = after[1] - before[1]
        return grown if grown >= 0 else grown + (self.rail.wraps_at or 0.0)

    @property
    def usable(self) -> bool:
        stands_still = self.rail.counts and not self.joules
        answers = self.reads > 1 and self.missed <= _MAY_MISS * self.reads and self.last is not None
        return answers and not self.broken and not stands_still

    @property
    def seconds(self) -> float:
        return 0.0 if self.last is None or self.first_s is None else self.last[0] - self.first_s


@dataclass(frozen=True)
class PowerReading:
    """What the rails of one source gave over a block.

    Attributes:
        seconds: between the first sample and the last. samples: how many of each rail.
        mean_w: mean watts by rail; None for one that did not answer.
        total_w: mean of the sum of `total` rails; None if one of them is missing.
    """

    source: str
    seconds: float
    samples: int
    total: tuple[str, ...]
    mean_w: dict[str, float | None] = field(default_factory=dict)

    @property
    def total_w(self) -> float | None:
        """Mean watts of what the device draws, which is more than none."""
        parts = [self.mean_w.get(name) for name in self.total]
        drawn = sum(part for part in parts if part is not None)
        return drawn if drawn > 0 and None not in parts else None


class PowerSampler:
    """Samples one source while a block runs, as a context manager; `reading` is there once it is left.

    Args:
        every_s: seconds between samples.
    """

    def __init__(self, group: RailGroup, every_s: float = 0.05, clock: Callable[[], float] = time.monotonic) -> None:
        self._group, self._every, self._clock = group, every_s, clock
        self._sums = [_Sum(rail) for rail in group.rails]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="edgekd-power", daemon=True)
        self.reading: PowerReading | None = None

    def __enter__(self) -> PowerSampler:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()
        seconds = max(total.seconds for total in self._sums)
        means = {s.rail.name: s.joules / s.seconds if s.usable and s.seconds > 0 else None for s in self._sums}
        samples = max(total.reads for total in self._sums)
        self.reading = PowerReading(self._group.source, seconds, samples, self._group.total, means)

    def _sample(self) -> None:
        while not self._stop.wait(self._every):
            self._take()

    def _take(self) -> None:
        for total in self._sums:
            total.take(self._clock)


def idle_reading(group: RailGroup, seconds: float) -> PowerReading | None:
    """What the source gives while nothing of ours runs."""
    with PowerSampler(group) as sampler:
        time.sleep(seconds)
    return sampler.reading


def energy_per_inference(
    run: Callable[[], object], group: RailGroup, seconds: float, idle: PowerReading | None
) -> dict[str, Any] | None:
    """Run over and over for `seconds` and divide the energy by the runs, as plain JSON types; None if unreadable.

    `gross_mj` is all that the rail gave; `above_idle_mj` is without what it gives anyway (None without an idle reading).
    """
    runs = 0
    with PowerSampler(group) as sampler:
        started = time.monotonic()
        while runs == 0 or time.monotonic() - started < seconds:
            run()
            runs += 1
        took = time.monotonic() - started
    reading = sampler.reading
    if reading is None or reading.total_w is None:
        return None
    idle_w = None if idle is None else idle.total_w
    gross = reading.total_w * took / runs
    return {
        "rail": " + ".join(reading.total),
        "source": reading.source,
        "inferences": runs,
        "seconds": round(took, 3),
        "samples": reading.samples,
        "mean_w": round(reading.total_w, 4),
        "idle_w": None if idle_w is None else round(idle_w, 4),
        "gross_mj": round(1000 * gross, 4),
        "above_idle_mj": None if idle_w is None else round(1000 * (gross - idle_w * took / runs), 4),
        "rails_mean_w": {name: None if w is None else round(w, 4) for name, w in reading.mean_w.items()},
    }
