"""Timing on the device: warm-up until the median settles, interleaved blocks, no sample cut.

The same rules and names as `edgekd.bench.latency` and `edgekd.bench.stats`, which need a newer Python than some devices
have; `tests/test_bundle.py` checks that both give the same figures.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

P99_NEEDS = 1000
BLOCK = 10
UNRECORDED = 2
_WINDOW = 10
_TOLERANCE = 0.03
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
    spent_s = [0.0] * len(subjects)
    order = rng.permutation(len(subjects))
    done = 0
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while not _enough(done, min(spent_s), max(spent_s), plan):
            order = rng.permutation(len(subjects)) if done % 2 == 0 else order[::-1]
            for index in order.tolist():
                started = clock()
                blocks[index].append(_block(subjects[index], done * BLOCK, clock))
                spent_s[index] += (clock() - started) / 1e9
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


def has_settled(recent_ms: Sequence[float]) -> bool:
    """Whether the medians of the last two windows agree."""
    if len(recent_ms) < 2 * _WINDOW:
        return False
    before, after = np.median(recent_ms[-2 * _WINDOW : -_WINDOW]), np.median(recent_ms[-_WINDOW:])
    return bool(abs(after - before) <= _TOLERANCE * before)


def summarise(blocks_ms: Any) -> dict[str, Any]:
    """Percentiles in milliseconds of every sample; p99 only from `P99_NEEDS` samples on."""
    values = np.asarray(blocks_ms, np.float64).ravel()
    p99 = round(float(np.percentile(values, 99)), 3) if len(values) >= P99_NEEDS else None
    return {
        "median": round(float(np.median(values)), 3),
        "p90": round(float(np.percentile(values, 90)), 3),
        "p99": p99,
        "max": round(float(values.max()), 3),
        "samples": len(values),
    }


def drift(blocks_ms: Any) -> float:
    """Relative change of the median from the first half of the rounds to the second."""
    half = len(blocks_ms) // 2
    return float(np.median(blocks_ms[half:]) / np.median(blocks_ms[:half]) - 1.0) if half else 0.0


def median_ratio(a_ms: Any, b_ms: Any, seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """(ratio of medians a / b, low, high): a 95 % interval from resampling whole rounds, paired."""
    a, b = np.asarray(a_ms, np.float64), np.asarray(b_ms, np.float64)
    rng = np.random.RandomState(seed)
    ratios = []
    for _ in range(resamples):
        drawn = rng.randint(0, len(a), len(a))
        ratios.append(np.median(a[drawn]) / np.median(b[drawn]))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(a) / np.median(b)), float(low), float(high)
