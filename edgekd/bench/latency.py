"""Timing artefacts against each other: real images, stages apart, interleaved blocks, nothing cut.

Drift of the machine (heat, other load) would favour whoever runs first, so no artefact runs alone for long: each round
visits all of them in a random order, the next round in the reverse of it (ABBA).
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edgekd.bench.matching import Float64Array
from edgekd.device.stats import has_settled
from edgekd.types import ImageArray

STAGES = ("pre", "infer", "post")

_SLOW_MS = 100.0

Clock = Callable[[], int]
"""Nanoseconds, like `time.perf_counter_ns`."""


class Timed(Protocol):
    """A deployed system, one image at a time, that says when each stage was over.

    Attributes:
        device_ms: of the latest inference, (copy in, compute, copy out) by the accelerator's own clock; None where the
            runtime does not say.
    """

    @property
    def device_ms(self) -> tuple[float, float, float] | None:
        """As above."""
        ...

    def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
        """Answer one image; nanoseconds spent in (pre, infer, post)."""
        ...


@dataclass(frozen=True)
class MeasurementPlan:
    """How to measure.

    Attributes:
        samples: timed inferences an artefact, rounded up to whole blocks.
        seconds: and each artefact is timed for so long at least.
        block: inferences in a row before the next artefact has its turn.
        unrecorded: inferences at the start of each block that refill caches and wake threads, not recorded.
        warmup_seconds: at least so long, and until the median settles.
        warmup_limit_seconds: but no longer than so, or five times the above; `settled` says if that cut it off.
    """

    samples: int = 200
    seconds: float = 0.0
    block: int = 10
    unrecorded: int = 2
    warmup_seconds: float = 1.0
    warmup_limit_seconds: float = 5.0
    seed: int = 0

    @property
    def rounds(self) -> int:
        """Blocks an artefact; at least two, so that an interval can be given."""
        return max(2, -(-self.samples // self.block))


@dataclass
class Measurement:
    """One artefact's samples.

    Attributes:
        stages_ms: (rounds, block, 3) milliseconds of pre, infer, post.
        settled: whether the warm-up ended because the median was stable.
        warmup_runs: inferences it took.
        device_ms: (rounds, block, 3) milliseconds of copy in, compute and copy out on the accelerator; None without.
    """

    stages_ms: Float64Array
    device_ms: Float64Array | None = None
    settled: bool = False
    warmup_runs: int = 0
    order: list[int] = field(default_factory=list)

    @property
    def total_ms(self) -> Float64Array:
        """(rounds, block) milliseconds from decoded image to detections."""
        return np.asarray(self.stages_ms.sum(-1), np.float64)


def measure(
    systems: Sequence[Timed],
    images: Sequence[ImageArray],
    plan: MeasurementPlan,
    *,
    clock: Clock = time.perf_counter_ns,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Warm every system up, then measure all of them in interleaved blocks over the same images.

    Args:
        systems: what to measure, in any order.
        images: decoded (H, W, 3) uint8 RGB; sample i of every system sees the same image.
        progress: called with (rounds done, rounds as far as can be told).

    Raises:
        ValueError: there are no images.
    """
    if not images:
        raise ValueError("latency needs at least one image")
    warm = [_warm_up(system, images, plan, clock) for system in systems]
    rng = np.random.default_rng(plan.seed)
    order = rng.permutation(len(systems))
    blocks: list[list[Float64Array]] = [[] for _ in systems]
    turns: list[list[int]] = [[] for _ in systems]
    seconds = np.zeros(len(systems))
    with _collector_resting() as collect:
        done = 0
        while done < plan.rounds or seconds.min(initial=np.inf) < plan.seconds:
            order = rng.permutation(len(systems)) if done % 2 == 0 else order[::-1]
            for position, index in enumerate(order.tolist()):
                turns[index].append(position)
                blocks[index].append(_block(systems[index], images, done * plan.block, plan, clock))
                seconds[index] += np.nansum(blocks[index][-1][:, : len(STAGES)]) / 1e3
                collect()
            done += 1
            if progress is not None:
                share = min(1.0, float(seconds.min()) / plan.seconds) if plan.seconds else 1.0
                left = max(plan.rounds, round(done / share) if share else plan.rounds)
                progress(done, max(done, left))
    measured = []
    for found, (settled, runs), turn in zip(blocks, warm, turns, strict=True):
        every = np.stack(found)
        device = every[..., len(STAGES) :]
        measured.append(
            Measurement(every[..., : len(STAGES)], None if np.isnan(device).any() else device, settled, runs, turn)
        )
    return measured


@contextlib.contextmanager
def _collector_resting() -> Iterator[Callable[[], int]]:
    """Python's garbage collector runs only when the yielded function is called, and then only over what is new."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _block(
    system: Timed, images: Sequence[ImageArray], first: int, plan: MeasurementPlan, clock: Clock
) -> Float64Array:
    """(block, 6) milliseconds: the stages, then the accelerator's own, NaN where it has none."""
    out = np.full((plan.block, 2 * len(STAGES)), np.nan)
    for extra in range(plan.unrecorded):
        system.stages_ns(images[(first + extra) % len(images)], clock)
    for i in range(plan.block):
        out[i, : len(STAGES)] = np.array(system.stages_ns(images[(first + i) % len(images)], clock)) / 1e6
        if (device := system.device_ms) is not None:
            out[i, len(STAGES) :] = device
    return out


def _warm_up(system: Timed, images: Sequence[ImageArray], plan: MeasurementPlan, clock: Clock) -> tuple[bool, int]:
    """(whether the median settled, inferences run)."""
    # One image over and over: different images would move the median by themselves.
    started, times_ms = clock(), list[float]()
    while True:
        times_ms.append(sum(system.stages_ns(images[0], clock)) / 1e6)
        elapsed = (clock() - started) / 1e9
        window = 10 if times_ms[-1] < _SLOW_MS else 5
        if elapsed >= plan.warmup_seconds and has_settled(times_ms, window):
            return True, len(times_ms)
        if elapsed >= max(plan.warmup_limit_seconds, 5 * plan.warmup_seconds):
            return False, len(times_ms)
