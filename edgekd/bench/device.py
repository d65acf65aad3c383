"""What this machine is: facts a figure depends on. Whatever cannot be read is None."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import psutil

from edgekd.artifact import versions
from edgekd.device.facts import machine_facts
from edgekd.device.nvml import open_nvml
from edgekd.machine import read_text, scaled


def device_facts() -> dict[str, Any]:
    """CPU, memory, load, GPU, operating system and versions, as plain JSON types: what a device says too, and more."""
    return {
        **machine_facts(nvml=open_nvml()),
        "cores": psutil.cpu_count(logical=False),
        "clock_mhz": _clock_mhz(),
        "gpu": gpu_facts(),
        "versions": versions(),
    }


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
        text = read_text(Path("/proc/thread-self/schedstat"))
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
    clocks = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    return {"now": scaled(clocks / "scaling_cur_freq", 1e-3), "max": scaled(clocks / "cpuinfo_max_freq", 1e-3)}
