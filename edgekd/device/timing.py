"""Timing on the device: warm-up until the median settles, interleaved blocks, no sample cut.

The same rules as `edgekd.bench.latency`, which times stages of images and needs a newer Python than some devices have.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekd.device.stats import has_settled

BLOCK = 10
UNRECORDED = 2
_WARMUP_LIMIT = 5.0


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        samples: timed inferences of each at least. seconds: and each is timed for so long at least.
        limit_s: but for no longer than so, even if samples are missing then.
        warmup_s: at least so long, and until the median settles, or five times as long.
    """

    samples: int = 1000
    seconds: float = 30.0
    limit_s: float = 180.0
    warmup_s: float = 2.0
    seed: int = 0


@dataclass
class Timed:
    """One subject's samples.

    Attributes:
        blocks_ms: (rounds, BLOCK) milliseconds.
        settled: whether the warm-up ended because the median was stable.
        warmup_runs: inferences it took.
    """

    blocks_ms: Any
    settled: bool
    warmup_runs: int


def measure(
    subjects: Sequence[Callable[[int], object]],
    plan: Plan,
    clock: Callable[[], int] = time.perf_counter_ns,
    progress: Callable[[int, float], None] | None = None,
) -> list[Timed]:
    """Time every subject in randomised interleaved blocks (ABBA).

    Args:
        subjects: each runs one inference, told which sample this is.
        progress: called after each round with (samples of each, seconds of each on average).
    """
    warm = [_warm_up(subject, plan, clock) for subject in subjects]
    rng = np.random.RandomState(plan.seed)
    blocks: list[list[list[float]]] = [[] for _ in subjects]
    timed_s, spent_s = [0.0] * len(subjects), [0.0] * len(subjects)  # the latter with what is not recorded
    order = rng.permutation(len(subjects))
    done = 0
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while not _enough(done, min(timed_s), max(spent_s), plan):
            order = rng.permutation(len(subjects)) if done % 2 == 0 else order[::-1]
            for index in order.tolist():
                started = clock()
                blocks[index].append(_block(subjects[index], done * BLOCK, clock))
                spent_s[index] += (clock() - started) / 1e9
                timed_s[index] += sum(blocks[index][-1]) / 1e3
            gc.collect(0)
            done += 1
            if progress is not None:
                progress(done * BLOCK, sum(spent_s) / len(spent_s))
    finally:
        if was_enabled:
            gc.enable()
    return [Timed(np.asarray(b), settled, runs) for b, (settled, runs) in zip(blocks, warm)]


def _enough(rounds: int, least_s: float, most_s: float, plan: Plan) -> bool:
    if rounds < 2:  # an interval over rounds needs two
        return False
    return most_s >= plan.limit_s or (rounds * BLOCK >= plan.samples and least_s >= plan.seconds)


def _block(subject: Callable[[int], object], first: int, clock: Callable[[], int]) -> list[float]:
    for extra in range(UNRECORDED):
        subject(first + extra)
    times = []
    for i in range(BLOCK):
        start = clock()
        subject(first + i)
        times.append((clock() - start) / 1e6)
    return times


def _warm_up(subject: Callable[[int], object], plan: Plan, clock: Callable[[], int]) -> tuple[bool, int]:
    started, times_ms = clock(), []
    while True:
        start = clock()
        subject(0)
        now = clock()
        times_ms.append((now - start) / 1e6)
        elapsed = (now - started) / 1e9
        if elapsed >= plan.warmup_s and has_settled(times_ms):
            return True, len(times_ms)
        if elapsed >= max(_WARMUP_LIMIT, 5 * plan.warmup_s):
            return False, len(times_ms)
