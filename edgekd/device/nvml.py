"""NVIDIA's management library on desktops and servers, through nvidia-ml-py where that is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from edgekd.device.rails import PowerRail, RailGroup

THROTTLE_REASONS = {
    "power cap": 0x4,
    "hardware slowdown": 0x8,
    "software thermal": 0x20,
    "hardware thermal": 0x40,
    "power brake": 0x80,
}
"""Bits of nvmlDeviceGetCurrentClocksThrottleReasons that mean slower than asked for (idle clocks do not)."""


def open_nvml() -> Any | None:
    """The initialised `pynvml` module; None without it, without a driver or without a GPU."""
    try:
        import pynvml
    except Exception:  # a broken installation raises whatever its libraries raise
        return None
    try:
        pynvml.nvmlInit()
        return pynvml if pynvml.nvmlDeviceGetCount() > 0 else None
    except Exception:  # NVMLError of any kind: no driver, no permission
        return None


def nvml_facts(nvml: Any) -> list[dict[str, Any]]:
    """What each GPU is; a fact that the driver does not give is None."""
    driver = _ask(nvml, "nvmlSystemGetDriverVersion")
    found = []
    for handle in _handles(nvml):
        memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
        limit = _ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle)
        found.append(
            {
                "name": _text(_ask(nvml, "nvmlDeviceGetName", handle)),
                "driver": _text(driver),
                "memory_bytes": None if memory is None else int(memory.total),
                "power_limit_w": None if limit is None else limit / 1000,
                "persistence": _flag(_ask(nvml, "nvmlDeviceGetPersistenceMode", handle)),
            }
        )
    return found


def nvml_conditions(nvml: Any) -> list[dict[str, Any]]:
    """Temperature, clocks and throttle reasons of each GPU now."""
    found = []
    for handle in _handles(nvml):
        reasons = _ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        found.append(
            {
                "temperature_c": _ask(nvml, "nvmlDeviceGetTemperature", handle, 0),
                "clock_mhz": _ask(nvml, "nvmlDeviceGetClockInfo", handle, 1),
                "max_clock_mhz": _ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, 1),
                "throttle": None
                if reasons is None
                else [name for name, bit in THROTTLE_REASONS.items() if int(reasons) & bit],
            }
        )
    return found


def nvml_rails(nvml: Any) -> RailGroup | None:
    """One rail a GPU: its energy counter (Volta and later), else its power; None if neither can be read.

    The total is the one GPU on which this process computes; of several, the driver is asked, since CUDA may count them in
    another order and see only some. Nothing is the total where that cannot be told, as within a container.
    """
    rails = []
    ours = []
    for index, handle in enumerate(_handles(nvml)):
        name = f"gpu{index}"
        if any(
            process.pid == os.getpid() for process in _ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or ()
        ):
            ours.append(name)
        if _ask(nvml, "nvmlDeviceGetTotalEnergyConsumption", handle) is not None:
            rails.append(PowerRail(name, _milli(nvml, "nvmlDeviceGetTotalEnergyConsumption", handle), True))
        elif _ask(nvml, "nvmlDeviceGetPowerUsage", handle) is not None:
            rails.append(PowerRail(name, _milli(nvml, "nvmlDeviceGetPowerUsage", handle)))
    names = [rail.name for rail in rails]
    total = names if len(names) == 1 else [name for name in names if ours == [name]]
    return RailGroup("nvml", tuple(rails), tuple(total)) if rails else None


def _handles(nvml: Any) -> list[Any]:
    count = _ask(nvml, "nvmlDeviceGetCount") or 0
    found = (_ask(nvml, "nvmlDeviceGetHandleByIndex", index) for index in range(count))
    return [handle for handle in found if handle is not None]


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:
    """An answer, or None where this GPU, driver or version of pynvml has none."""
    try:
        return getattr(nvml, function)(*arguments)
    except Exception:  # NVMLError_NotSupported and its kin
        return None


def _milli(nvml: Any, function: str, handle: Any) -> Callable[[], float | None]:
    def read() -> float | None:
        value = _ask(nvml, function, handle)
        return None if value is None else value / 1000

    return read


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _flag(value: Any) -> bool | None:
    return None if value is None else bool(value)
