"""What this machine is, without root: board, processor, memory, GPUs, rails, versions. Unreadable facts are None."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from edgekd.device.jetson import jetson_facts
from edgekd.device.nvml import nvml_facts
from edgekd.device.power import power_rails
from edgekd.machine import cpu_model, memory_bytes, read_text, usable_threads


def machine_facts(root: Path = Path("/"), nvml: Any = None) -> dict[str, Any]:
    """Facts under the same names as `edgekd.bench.device.device_facts` where both have them."""
    groups = power_rails(root, nvml)
    memory, free = memory_bytes(root)
    return {
        "cpu": cpu_model(root),
        "machine": platform.machine(),
        "cores": None,
        "threads": os.cpu_count(),
        "usable_threads": usable_threads(root),
        "governor": read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_bytes": memory,
        "memory_available_bytes": free,
        "load": load(),
        "board": read_text(root / "sys/firmware/devicetree/base/model"),
        "jetson": jetson_facts(root),
        "nvml": None if nvml is None else nvml_facts(nvml),
        "power_sensors": [f"{group.source}: {rail.name}" for group in groups for rail in group.rails],
        "os": f"{_os_name(root)}{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
    }


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None


def _os_name(root: Path) -> str:
    for line in (read_text(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"') + ", "
    return ""
