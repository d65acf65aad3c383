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
from edgekd.bench.stats import has_settled
from edgekd.types import ImageArray

STAGES = ("pre", "infer", "post")

_SLOW_MS = 100.0

Clock = Callable[[], int]
"""Nanoseconds, like `time.perf_counter_ns`."""


class Timed(Protocol):
    """A deployed system, one image at a time, that says when each stage was over."""

    def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
        """Answer one image; nanoseconds spent in (pre, infer, post)."""
        ...


@dataclass(frozen=True)
class MeasurementPlan:
    """How to measure.

    Attributes:
        samples: timed inferences an artefact, rounded up to whole blocks.
        block: inferences in a row before the next artefact has its turn.
        unrecorded: inferences at the start of each block that refill caches and wake threads, not recorded.
        warmup_seconds: at least so long, and until the median settles.
        warmup_limit_seconds: but no longer than so, or five times the above; `settled` says if that cut it off.
    """

    samples: int = 200
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
    """

    stages_ms: Float64Array
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
        progress: called with (rounds done, rounds).

    Raises:
        ValueError: there are no images.
    """
    if not images:
        raise ValueError("latency needs at least one image")
    rounds, block = plan.rounds, plan.block
    measured = [Measurement(np.empty((rounds, block, len(STAGES)))) for _ in systems]
    for system, result in zip(systems, measured, strict=True):
        result.settled, result.warmup_runs = _warm_up(system, images, plan, clock)
    rng = np.random.default_rng(plan.seed)
    order = rng.permutation(len(systems))
    with _collector_resting() as collect:
        for done in range(rounds):
            order = rng.permutation(len(systems)) if done % 2 == 0 else order[::-1]
            for position, index in enumerate(order.tolist()):
                measured[index].order.append(position)
                measured[index].stages_ms[done] = _block(systems[index], images, done * block, plan, clock)
                collect()
            if progress is not None:
                progress(done + 1, rounds)
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
    """(block, 3) milliseconds."""
    out = np.empty((plan.block, len(STAGES)))
    for extra in range(plan.unrecorded):
        system.stages_ns(images[(first + extra) % len(images)], clock)
    for i in range(plan.block):
        out[i] = system.stages_ns(images[(first + i) % len(images)], clock)
    return out / 1e6


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
