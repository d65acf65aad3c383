"""What the kernel says of this machine, and of the container that it may be seen from.

Whatever cannot be read is None, never a guess. Ships in bundles: Python 3.8 and its standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

_ROOT = Path("/")

CPU_BF16 = ("avx512_bf16", "amx_bf16")
"""Flags of x86 processors on which training in bf16 is faster than in fp32."""

ARM_BF16 = "bf16"
"""What an Arm processor that computes in bf16 says."""


def read_text(path: Path) -> str | None:
    """A file's text without padding; None if it is missing, forbidden, empty, or its device does not answer."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n\t ") or None
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """A file's whole number; None if there is none."""
    text = read_text(path)
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return int(text, 0)
    return None


def scaled(path: Path, factor: float) -> float | None:
    """A file's whole number times `factor`; None if there is none."""
    value = read_int(path)
    return None if value is None else value * factor


def cpu_model(root: Path = _ROOT) -> str | None:
    """The processor's name."""
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return platform.processor() or None


def cpu_flags(root: Path = _ROOT) -> frozenset[str]:
    """What the processor says it can do, in the kernel's words; empty where it does not say."""
    lines = (read_text(root / "proc/cpuinfo") or "").splitlines()
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(line.partition(":")[2].split())


def emulates_bf16(root: Path = _ROOT) -> bool:
    """Whether this processor says what it can do, and bf16 is not among it: then bf16 is many times slower than fp32."""
    flags = cpu_flags(root)
    return bool(flags) and flags.isdisjoint((*CPU_BF16, ARM_BF16))


def usable_threads(root: Path = _ROOT) -> int:
    """Logical CPUs that this process may run on: its affinity, cut by a container's quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    quota = (read_text(root / "sys/fs/cgroup/cpu.max") or "max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        allowed = min(allowed, max(1, int(quota[0]) // int(quota[1])))
    return allowed


def memory_bytes(root: Path = _ROOT) -> tuple[int | None, int | None]:
    """(all, what programs may still take) of the memory, or what a container's limit leaves of either."""
    facts = _kilobytes(read_text(root / "proc/meminfo"))
    total, free = facts.get("MemTotal"), facts.get("MemAvailable")
    group = root / "sys/fs/cgroup"
    limit, used = read_int(group / "memory.max"), read_int(group / "memory.current")
    if limit is None or used is None or (total is not None and limit >= total):
        return total, free
    cached = (read_text(group / "memory.stat") or "").partition("\ninactive_file ")[2].partition("\n")[0]
    left = max(0, limit - used + int(cached or 0))  # files that were read are forgotten when programs need the room
    return limit, left if free is None else min(free, left)


def _kilobytes(text: str | None) -> dict[str, int]:
    """ "NAME: N kB" lines as bytes by name."""
    lines = (line.replace(":", " ").split() for line in (text or "").splitlines())
    return {words[0]: int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}
