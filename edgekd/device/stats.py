"""Latency in a few honest numbers: percentiles of everything measured, and ratios with bootstrap intervals.

Ships in bundles: a device and `edgekd bench` reckon alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

P99_NEEDS = 1000
"""Samples below which a 99th percentile would rest on fewer than ten values, and is not given."""

_AT_ONCE = 1 << 22
"""Values that resampling holds at most: a long measurement resampled as a whole would fill the memory."""


class Interval(NamedTuple):
    """An estimate with the 95 % interval that a bootstrap puts around it."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether `value` lies within, so that no difference from it is shown."""
        return self.low <= value <= self.high


def summarise(samples_ms: ArrayLike) -> dict[str, Any]:
    """Median, p90, p99 (None below `P99_NEEDS` samples), max and number of samples (any shape), to the microsecond.

    Percentiles are of every sample: no outlier is cut.

    Raises:
        ValueError: there are none.
    """
    values = np.asarray(samples_ms, np.float64).ravel()
    if not len(values):
        raise ValueError("no latency samples")
    return {
        "median": round(float(np.median(values)), 3),
        "p90": round(float(np.percentile(values, 90)), 3),
        "p99": round(float(np.percentile(values, 99)), 3) if len(values) >= P99_NEEDS else None,
        "max": round(float(values.max()), 3),
        "samples": len(values),
    }


def percentiles(samples_ms: ArrayLike) -> list[float]:
    """Percentiles 0, 1, ... 100 of all samples, in milliseconds: enough to draw their distribution from."""
    return [round(float(v), 3) for v in np.percentile(np.asarray(samples_ms, np.float64), np.arange(101))]


def median_ratio(
    numerator_ms: ArrayLike, denominator_ms: ArrayLike, *, resamples: int = 2000, seed: int = 0
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
    drawn = [_resampled_medians(rounds, resamples, np.random.default_rng(seed)) for rounds in (a, b)]  # the same draws
    return _ratio(a, b, drawn)


def median_ratio_between_runs(
    numerator_ms: ArrayLike, denominator_ms: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Like `median_ratio` for two runs of their own: rounds are resampled apart, and may differ in number.

    The interval holds what varied within each run, not what changed in the machine between them.
    """
    a, b = np.asarray(numerator_ms, np.float64), np.asarray(denominator_ms, np.float64)
    rng = np.random.default_rng(seed)
    return _ratio(a, b, [_resampled_medians(rounds, resamples, rng) for rounds in (a, b)])


def median_interval(samples_ms: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> list[float]:
    """[low, high] of the median's 95 % interval in milliseconds, from resampling whole rounds of (rounds, n)."""
    drawn = _resampled_medians(np.asarray(samples_ms, np.float64), resamples, np.random.default_rng(seed))
    return [round(float(v), 3) for v in np.percentile(drawn, [2.5, 97.5])]


def has_settled(recent_ms: Sequence[float], window: int = 10, tolerance: float = 0.03) -> bool:
    """Whether the medians of the last two windows agree within a relative tolerance."""
    if len(recent_ms) < 2 * window:
        return False
    before, after = np.median(recent_ms[-2 * window : -window]), np.median(recent_ms[-window:])
    return bool(abs(after - before) <= tolerance * before)


def drift(samples_ms: Any) -> float:
    """Relative change of the median from the first half of the rounds (rounds, n) to the second; 0 for one round."""
    half = len(samples_ms) // 2
    return float(np.median(samples_ms[half:]) / np.median(samples_ms[:half]) - 1.0) if half else 0.0


def timing_doubts(name: str, settled: bool, drifted: float, latency: Any) -> list[str]:
    """What a reader should know before believing one row's latency: a `drift`, and what `summarise` gave."""
    said = []
    if not settled:
        said.append(f"{name}: the median had not settled when the warm-up ended")
    if abs(drifted) > 0.1:
        said.append(f"{name}: the median moved by {drifted:+.0%} from the first half to the second")
    if latency["p90"] > 2 * latency["median"]:
        said.append(f"{name}: every tenth inference took over {latency['p90'] / latency['median']:.1f}x the median")
    return said


def _resampled_medians(rounds: Any, resamples: int, rng: np.random.Generator) -> Any:
    """(resamples,) medians of as many rounds as there are, drawn with replacement."""
    found, at_once = [], max(1, _AT_ONCE // rounds.size)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        picks = rng.integers(0, len(rounds), (count, len(rounds)))
        found.append(np.median(rounds[picks].reshape(count, -1), axis=1))
    return np.concatenate(found)


def _ratio(a: Any, b: Any, drawn: Sequence[Any]) -> Interval:
    low, high = np.percentile(drawn[0] / drawn[1], [2.5, 97.5])
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))
