"""Energy per inference of whole systems, where this machine lets a user read its power."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgekd.device.nvml import open_nvml
from edgekd.device.power import choose_group, energy_per_inference, idle_reading, power_rails
from edgekd.runtimes.base import Runtime

IDLE_SECONDS = 5.0


def uses_gpu(runtime: Runtime) -> bool:
    """Whether a runtime computes on an NVIDIA GPU, by what it says of itself."""
    return runtime.name == "tensorrt" or runtime.provider.lower().startswith(("cuda", "tensorrt"))


def measure_energy(
    runs: Sequence[Callable[[], object]], on_gpu: Sequence[bool], seconds: float
) -> list[dict[str, Any] | None]:
    """Run each system alone for `seconds`, from image to detections; None for one whose power cannot be read.

    Args:
        runs: one inference each. on_gpu: whether each computes on a GPU, which decides whose power counts.
    """
    if seconds <= 0:
        return [None] * len(runs)
    groups = power_rails(nvml=open_nvml())
    chosen = [choose_group(groups, gpu) for gpu in on_gpu]
    idle = {
        group.source: idle_reading(group, min(seconds, IDLE_SECONDS))
        for group in {group.source: group for group in chosen if group is not None}.values()
    }
    return [
        None if group is None else energy_per_inference(run, group, seconds, idle[group.source])
        for run, group in zip(runs, chosen, strict=True)
    ]
