"""Temperatures, clocks and throttling: a snapshot now, and what changed over a measurement."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekd.device.nvml import nvml_conditions
from edgekd.machine import read_int, read_text

_GPU = re.compile(r"gpu(-gpc-\d+)?|g[a-z]\d\d?b")
"""Devices with scaling that are a GPU: "gpu", "gpu-gpc-0" (Thor), "ga10b" (Orin), "gv11b" (Xavier)."""
_POSSIBLE_C = (-200.0, 200.0)  # zones that are switched off say -256; a sensor's garbage is beyond the other end
_PI_NOW = {"under-voltage": 0x1, "frequency capped": 0x2, "throttled": 0x4, "soft temperature limit": 0x8}


def snapshot(root: Path = Path("/"), nvml: Any = None) -> dict[str, Any]:
    """Temperatures (°C), clocks (MHz) and signs of throttling now; what cannot be read is None or left empty."""
    return {
        "temperatures_c": temperatures(root),
        "clocks": clocks(root),
        "throttle": throttle(root),
        "gpus": None if nvml is None else nvml_conditions(nvml),
    }


def temperatures(root: Path = Path("/")) -> dict[str, float | None]:
    """Degrees by thermal zone; None for a zone that is switched off, does not answer or cannot be so hot."""
    found: dict[str, float | None] = {}
    low, high = _POSSIBLE_C
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*"), key=_by_number):
        name = read_text(zone / "type") or zone.name
        value = read_int(zone / "temp")
        degrees = None if value is None else value / 1000
        found[_unused(name, found)] = degrees if degrees is not None and low < degrees < high else None
    return found


def clocks(root: Path = Path("/")) -> dict[str, dict[str, Any]]:
    """Clocks of CPU clusters and of the devices with scaling of their own (on a Jetson, the GPU).

    `pinned` says whether lowest and highest clock are equal, as `jetson_clocks` makes them for CPUs and the GPU; None
    for what it leaves alone, such as video engines.
    """
    found: dict[str, dict[str, Any]] = {}
    for policy in sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*"), key=_by_number):
        found[f"cpu{policy.name[len('policy') :]}"] = _clock(policy, "scaling_", "scaling_governor", 1e-3, "cpuinfo_")
    for device in sorted(root.glob("sys/class/devfreq/*")):
        name = device.name.split(".", 1)[-1] if device.name[:1].isdigit() else device.name
        clock = _clock(device, "", "governor", 1e-6, None)
        found[_unused(name, found)] = clock if _GPU.fullmatch(name) else {**clock, "pinned": None}
    return found


def _clock(folder: Path, prefix: str, governor: str, to_mhz: float, limits: str | None) -> dict[str, Any]:
    def mhz(name: str) -> float | None:
        value = read_int(folder / name)
        return None if value is None else round(value * to_mhz, 3)

    low, high = mhz(f"{prefix}min_freq"), mhz(f"{prefix}max_freq")
    return {
        "now_mhz": mhz(f"{prefix}cur_freq"),
        "min_mhz": low,
        "max_mhz": high,
        "limit_mhz": None if limits is None else mhz(f"{limits}max_freq"),
        "governor": read_text(folder / governor),
        "pinned": None if low is None or high is None else low == high,
    }


def throttle(root: Path = Path("/")) -> dict[str, Any]:
    """Signs of throttling: counters that only rise, and alerts that are on now."""
    counters = {
        f"{path.parent.name}/{path.name}": value
        for path in sorted(root.glob("sys/class/hwmon/hwmon*/oc[0-9]*_event_cnt"))
        if (value := read_int(path)) is not None
    }
    for cpu in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle")):
        for name in ("core_throttle_count", "package_throttle_count"):
            value = read_int(cpu / name)
            if value is not None:
                counters[f"{cpu.parent.name}/{name}"] = value
    alerts: dict[str, int | None] = {}
    for device in sorted(root.glob("sys/class/thermal/cooling_device*"), key=_by_number):
        kind = read_text(device / "type") or ""
        if kind.endswith("-alert"):
            alerts[kind] = read_int(device / "cur_state")
    board = read_int(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if board is None:
        hexadecimal = read_text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
        board = _hexadecimal(hexadecimal)
    if board is not None:
        alerts.update({name: int(bool(board & bit)) for name, bit in _PI_NOW.items()})
    return {"counters": counters, "alerts": alerts}


class ConditionWatch:
    """Conditions before, during and after a block, as a context manager; `result` is there once it is left.

    Args:
        every_s: seconds between looks; a look costs a few dozen small reads.
    """

    def __init__(self, root: Path = Path("/"), nvml: Any = None, every_s: float = 1.0) -> None:
        self._root, self._nvml, self._every = root, nvml, every_s
        self._stop = threading.Event()
        self._seen: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._look, name="edgekd-conditions", daemon=True)
        self.result: dict[str, Any] = {}

    def __enter__(self) -> ConditionWatch:
        self._seen.append(snapshot(self._root, self._nvml))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._seen.append(snapshot(self._root, self._nvml))
        self.result = summary(self._seen)

    def _look(self) -> None:
        while not self._stop.wait(self._every):
            self._seen.append(snapshot(self._root, self._nvml))


def summary(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """{"before", "during", "after", "throttled"} of snapshots in order; the first and last are before and after."""
    before, after = seen[0], seen[-1]
    hottest: dict[str, float] = {}
    slowest: dict[str, float] = {}
    for look in seen:
        for name, degrees in _temperatures(look):
            hottest[name] = max(degrees, hottest.get(name, degrees))
        for name, mhz in _clocks(look):
            slowest[name] = min(mhz, slowest.get(name, mhz))
    during = {"looks": len(seen), "max_temperatures_c": hottest, "min_clocks_mhz": slowest}
    return {"before": before, "during": during, "after": after, "throttled": throttled(seen)}


def throttled(seen: list[dict[str, Any]]) -> list[str] | None:
    """What was throttled between the first snapshot and the last; [] for nothing, None where no sensor says."""
    found: list[str] = []
    first: dict[str, int] = {}
    for look in seen:  # each, since a counter may go with its CPU, or come with it
        found += [name for name, value in look["throttle"]["counters"].items() if value > first.setdefault(name, value)]
    asked = bool(first)
    for look in seen:
        for name, state in look["throttle"]["alerts"].items():
            asked = asked or state is not None
            found += [name] if state else []
        for index, gpu in enumerate(look["gpus"] or ()):
            asked = asked or gpu["throttle"] is not None
            found += [f"gpu{index}: {reason}" for reason in gpu["throttle"] or ()]
    return sorted(set(found)) if asked else None


def _temperatures(look: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield from ((name, value) for name, value in look["temperatures_c"].items() if value is not None)
    for index, gpu in enumerate(look["gpus"] or ()):
        if gpu["temperature_c"] is not None:
            yield f"gpu{index}", float(gpu["temperature_c"])


def _clocks(look: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield from ((name, clock["now_mhz"]) for name, clock in look["clocks"].items() if clock["now_mhz"] is not None)
    for index, gpu in enumerate(look["gpus"] or ()):
        if gpu["clock_mhz"] is not None:
            yield f"gpu{index}", float(gpu["clock_mhz"])


def _by_number(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.name if c.isdigit())
    return int(digits or 0), path.name


def _unused(name: str, taken: dict[str, Any]) -> str:
    """A name that is not taken yet: zones and devices may share one."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name} {number}", number + 1
    return free


def _hexadecimal(text: str | None) -> int | None:
    try:
        return None if text is None else int(text, 16)
    except ValueError:
        return None
