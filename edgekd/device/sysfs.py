"""Reading the kernel's small text files: whatever cannot be read is None, never a guess."""

from __future__ import annotations

import contextlib
from pathlib import Path


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


CPU_BF16 = ("avx512_bf16", "amx_bf16")
"""Flags of x86 processors on which training in bf16 is faster than in fp32."""

ARM_BF16 = "bf16"
"""What an Arm processor that computes in bf16 says."""


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """What the processor says it can do, in the kernel's words; empty where it does not say."""
    lines = (read_text(root / "proc/cpuinfo") or "").splitlines()
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(line.partition(":")[2].split())


def emulates_bf16(root: Path = Path("/")) -> bool:
    """Whether this processor says what it can do, and bf16 is not among it: then bf16 is many times slower than fp32."""
    flags = cpu_flags(root)
    return bool(flags) and flags.isdisjoint((*CPU_BF16, ARM_BF16))
