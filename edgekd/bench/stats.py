"""Latency in a few honest numbers: percentiles of everything measured, and ratios with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgekd.bench.matching import Float64Array

P99_NEEDS = 1000
"""Samples below which a 99th percentile would rest on fewer than ten values, and is not given."""


@dataclass(frozen=True)
class LatencySummary:
    """Percentiles in milliseconds of every sample: no outlier is cut."""

    median: float
    p90: float
    p99: float | None
    max: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, rounded to the microsecond."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


def summarise(samples_ms: Float64Array) -> LatencySummary:
    """Percentiles of one artefact's samples (any shape, at least one).

    Raises:
        ValueError: there are none.
    """
    values = np.asarray(samples_ms, np.float64).ravel()
    if not len(values):
        raise ValueError("no latency samples")
    p99 = float(np.percentile(values, 99)) if len(values) >= P99_NEEDS else None
    return LatencySummary(
        float(np.median(values)), float(np.percentile(values, 90)), p99, float(values.max()), len(values)
    )


def percentiles(samples_ms: Float64Array) -> list[float]:
    """Percentiles 0, 1, ... 100 of all samples, in milliseconds: enough to draw their distribution from."""
    return [round(float(v), 3) for v in np.percentile(np.asarray(samples_ms, np.float64), np.arange(101))]


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that a bootstrap puts around it."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether `value` lies within, so that no difference from it is shown."""
        return self.low <= value <= self.high


def median_ratio(
    numerator_ms: Float64Array,
    denominator_ms: Float64Array,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The ratio of two medians, with an interval from resampling whole rounds.

    Samples within a block follow each other closely and share the machine's mood, so single samples are not
    independent; blocks nearly are. Both artefacts' blocks of a round are drawn together, as they were measured.

    Args:
        numerator_ms: (rounds, samples a block) of one artefact. denominator_ms: likewise, same number of rounds.

    Raises:
        ValueError: the numbers of rounds differ.
    """
    a, b = np.asarray(numerator_ms, np.float64), np.asarray(denominator_ms, np.float64)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"rounds differ: {len(a)} and {len(b)}")
    ratio = float(np.median(a) / np.median(b))
    draws = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    drawn = np.median(a[draws].reshape(resamples, -1), axis=1) / np.median(b[draws].reshape(resamples, -1), axis=1)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(drawn, [tail, 100.0 - tail])
    return Interval(ratio, float(low), float(high))


def median_interval(samples_ms: Float64Array, *, resamples: int = 1000, seed: int = 0) -> list[float]:
    """[low, high] of the median's 95 % interval in milliseconds, from resampling whole rounds of (rounds, n)."""
    values = np.asarray(samples_ms, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    drawn = np.median(values[draws].reshape(resamples, -1), axis=1)
    return [round(float(v), 3) for v in np.percentile(drawn, [2.5, 97.5])]


def has_settled(recent_ms: Sequence[float], window: int = 10, tolerance: float = 0.03) -> bool:
    """Whether the medians of the last two windows agree within a relative tolerance."""
    if len(recent_ms) < 2 * window:
        return False
    before, after = np.median(recent_ms[-2 * window : -window]), np.median(recent_ms[-window:])
    return bool(abs(after - before) <= tolerance * before)


def drift(samples_ms: Float64Array) -> float:
    """Relative change of the median from the first half of the rounds (rounds, n) to the second; 0 for one round."""
    half = len(samples_ms) // 2
    if not half:
        return 0.0
    first, second = np.median(samples_ms[:half]), np.median(samples_ms[half:])
    return float(second / first - 1.0)


def median_ratio_between_runs(
    numerator_ms: Float64Array, denominator_ms: Float64Array, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Like `median_ratio` for two runs of their own: rounds are resampled apart, and may differ in number.

    The interval holds what varied within each run, not what changed in the machine between them.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for samples in (numerator_ms, denominator_ms):
        rounds = np.asarray(samples, np.float64)
        picks = rng.integers(0, len(rounds), (resamples, len(rounds)))
        drawn.append(np.median(rounds[picks].reshape(resamples, -1), axis=1))
    low, high = np.percentile(drawn[0] / drawn[1], [2.5, 97.5])
    return Interval(float(np.median(numerator_ms) / np.median(denominator_ms)), float(low), float(high))
