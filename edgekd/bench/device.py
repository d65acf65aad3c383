"""What this machine is: facts a figure depends on. Whatever cannot be read is None."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil

from edgekd.artifact import versions
from edgekd.device.jetson import jetson_facts
from edgekd.device.nvml import nvml_facts, open_nvml
from edgekd.device.power import power_rails

_CPU = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def device_facts() -> dict[str, Any]:
    """CPU, memory, load, GPU, operating system and versions, as plain JSON types."""
    memory, nvml = psutil.virtual_memory(), open_nvml()
    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(logical=True),
        "usable_threads": usable_threads(),
        "governor": _read(_CPU / "scaling_governor"),
        "clock_mhz": _clock_mhz(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "load": load(),
        "gpu": gpu_facts(),
        "board": _read(Path("/sys/firmware/devicetree/base/model")),
        "jetson": jetson_facts(),
        "nvml": None if nvml is None else nvml_facts(nvml),
        "power_sensors": [f"{group.source}: {rail.name}" for group in power_rails(nvml=nvml) for rail in group.rails],
        "os": _os_name(),
        "versions": versions(),
    }


def cpu_model() -> str | None:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    return platform.processor() or None


def usable_threads() -> int:
    """Logical CPUs that this process may run on: its affinity, cut by a container's quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    quota = (_read(Path("/sys/fs/cgroup/cpu.max")) or "max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        allowed = min(allowed, max(1, int(quota[0]) // int(quota[1])))
    return allowed


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None


class Contention:
    """What others (processes, a hypervisor) took from its making until it is asked."""

    def __init__(self) -> None:
        self._start = self._now()

    def facts(self) -> dict[str, float | None]:
        """Plain figures; None where the system does not say.

        cores_used_by_others: on average. steal: share of all cores' time that a hypervisor gave to other machines.
        waiting: share of the time that the measuring thread was ready to run but had no CPU (or its quota was spent).
        involuntary_switches: times a second that the main thread was made to yield its CPU.
        """
        start, now = self._start, self._now()
        elapsed = now["time"] - start["time"]

        def rate(key: str) -> float | None:
            before, after = start.get(key), now.get(key)
            return None if before is None or after is None or elapsed <= 0 else max(0.0, after - before) / elapsed

        busy, own, steal, cores = rate("busy"), rate("own"), rate("steal"), psutil.cpu_count() or 1
        found = {
            "cores_used_by_others": None if busy is None or own is None else max(0.0, busy - own),
            "steal": None if steal is None else steal / cores,
            "waiting": rate("waited"),
            "involuntary_switches": rate("switches"),
        }
        return {key: None if value is None else round(value, 3) for key, value in found.items()}

    def cores(self) -> float | None:
        """Cores used by others on average."""
        return self.facts()["cores_used_by_others"]

    @staticmethod
    def _now() -> dict[str, float]:
        found = {"time": time.monotonic()}
        with contextlib.suppress(OSError, psutil.Error):
            process, every = psutil.Process(), psutil.cpu_times()
            own = process.cpu_times()
            idle = every.idle + getattr(every, "iowait", 0.0)
            # `guest` time stands in `user` too.
            busy = sum(every) - idle - getattr(every, "guest", 0.0) - getattr(every, "guest_nice", 0.0)
            found.update(busy=busy, own=own.user + own.system)
            found.update(switches=process.num_ctx_switches().involuntary)
            if hasattr(every, "steal"):
                found.update(steal=every.steal)
        text = _read(Path("/proc/thread-self/schedstat"))
        if text is not None and len(text.split()) == 3:  # nanoseconds run, nanoseconds waited, times run
            found.update(waited=int(text.split()[1]) / 1e9)
        return found


def gpu_facts() -> dict[str, Any] | None:
    """The first CUDA device as torch sees it; None without one."""
    try:
        import torch

        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "count": torch.cuda.device_count(),
        }
    except (ImportError, RuntimeError, AssertionError):
        return None


def _clock_mhz() -> dict[str, float | None]:
    def mhz(name: str) -> float | None:
        text = _read(_CPU / name)
        return int(text) / 1000 if text and text.isdigit() else None

    return {"now": mhz("scaling_cur_freq"), "max": mhz("cpuinfo_max_freq")}


def _os_name() -> str:
    with contextlib.suppress(OSError, AttributeError):  # freedesktop_os_release: Linux, Python 3.10
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release()}"
    return platform.platform()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n ") or None
    except OSError:
        return None
