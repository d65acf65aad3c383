from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from edgekd.device.stats import (
    Interval,
    drift,
    has_settled,
    median_interval,
    median_ratio,
    median_ratio_between_runs,
    percentiles,
    summarise,
)


def test_nothing_is_cut_and_p99_waits_for_a_thousand() -> None:
    few = summarise(np.r_[np.full(98, 1.0), 50.0, 900.0])
    assert few == {"median": 1.0, "p90": 1.0, "p99": None, "max": 900.0, "samples": 100}
    many = summarise(np.arange(1, 1001.0).reshape(100, 10))
    assert many["p99"] == pytest.approx(np.percentile(np.arange(1, 1001), 99))
    assert many["p90"] == pytest.approx(900.1)
    with pytest.raises(ValueError, match="no latency samples"):
        summarise(np.zeros((0, 3)))


def test_percentiles_reach_both_ends() -> None:
    found = percentiles(np.arange(101.0).reshape(1, 101))
    assert found == [float(i) for i in range(101)]


def test_median_interval_covers_the_median_and_widens_with_rounds_that_differ() -> None:
    rng = np.random.default_rng(0)
    calm = rng.normal(10, 0.2, (20, 10))
    low, high = median_interval(calm)
    assert low < 10 < high
    assert high - low < 0.2
    moody = median_interval(calm * rng.normal(1, 0.3, (20, 1)))
    assert moody[1] - moody[0] > 5 * (high - low)


def test_ratio_interval_covers_the_truth_and_widens_with_drift() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(10, 0.2, (20, 10))
    twice = 2 * rng.normal(10, 0.2, (20, 10))
    ratio = median_ratio(twice, base)
    assert ratio.low < 2.0 < ratio.high
    assert ratio.high - ratio.low < 0.1
    assert not ratio.holds(1.0)
    mood = rng.normal(1, 0.3, (20, 1))  # whole rounds are slow or fast, for both alike
    wide = median_ratio(twice * mood, rng.normal(10, 0.2, (20, 10)))
    together = median_ratio(twice * mood, base * mood)
    assert wide.high - wide.low > 3 * (ratio.high - ratio.low)
    assert together.high - together.low < wide.high - wide.low


def test_resampling_a_long_measurement_takes_little_memory() -> None:
    long = np.random.default_rng(0).gamma(50, 0.2, (6000, 10))  # 30 s of a small student
    tracemalloc.start()
    try:
        median_interval(long)
        median_ratio(long, long, resamples=1000)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_the_same_artefact_twice_shows_no_difference() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.gamma(50, 0.2, (2, 20, 10))
    assert median_ratio(a, b).holds(1.0)
    same = median_ratio(a, a)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


def test_rounds_must_agree() -> None:
    with pytest.raises(ValueError, match="rounds differ"):
        median_ratio(np.ones((2, 3)), np.ones((3, 3)))


@pytest.mark.parametrize(
    ("times", "settled"),
    [
        ([1.0] * 19, False),  # too few to tell
        ([1.0] * 20, True),
        ([2.0] * 10 + [1.0] * 10, False),  # still getting faster
        ([9.0] * 50 + [1.0] * 10 + [1.02] * 10, True),
    ],
)
def test_settling(times: list[float], settled: bool) -> None:
    assert has_settled(times) is settled


def test_drift() -> None:
    assert drift(np.array([[1.0, 1.0], [1.5, 1.5]])) == pytest.approx(0.5)
    assert drift(np.ones((1, 4))) == 0.0


def rounds_at(*medians: float) -> np.ndarray:
    """(rounds, 3) whose medians are these, and whose means are not."""
    return np.array([[0.5 * m, m, 4.0 * m] for m in medians])


def test_intervals_are_of_medians_over_whole_rounds() -> None:
    # Of two rounds a resample holds the first alone, the second alone, or both, whose median lies between.
    assert median_interval(rounds_at(10.0, 20.0)) == [10.0, 20.0]
    one = median_ratio(rounds_at(10.0, 30.0), rounds_at(10.0, 10.0))
    assert (one.low, one.high) == (1.0, 3.0)
    low, high = median_interval(np.repeat(rounds_at(*range(1, 41)), 1, axis=0))
    assert 12 < low < 18 < 23 < high < 30  # a median of forty; their 2.5 and 97.5 % would be 2 and 39
    assert median_interval(rounds_at(1.23456, 1.23456)) == [1.235, 1.235]


def test_runs_apart_are_compared_by_their_medians_whatever_their_length() -> None:
    found = median_ratio_between_runs(rounds_at(*[30.0] * 9), rounds_at(*[10.0] * 4))
    assert (found.value, found.low, found.high) == (3.0, 3.0, 3.0)
    moody = median_ratio_between_runs(rounds_at(10.0, 20.0), rounds_at(5.0, 10.0))
    assert (moody.low, moody.high) == (1.0, 4.0)  # each run's rounds are drawn for themselves


@pytest.mark.parametrize("between", [median_ratio, median_ratio_between_runs])
def test_an_interval_holds_the_ratio_in_nineteen_cases_of_twenty(between: Callable[..., Interval]) -> None:
    rng, held = np.random.default_rng(0), 0
    for trial in range(120):
        mood = rng.normal(1, 0.05, (2, 20, 1))
        slow, quick = rng.gamma(80, [[[1.1 / 80]], [[1 / 80]]], (2, 20, 10)) * mood
        held += between(slow, quick, resamples=300, seed=trial).holds(1.1)
    assert 107 <= held <= 119


def test_a_median_has_settled_within_three_per_cent() -> None:
    assert has_settled([100.0] * 10 + [102.9] * 10)
    assert not has_settled([100.0] * 10 + [103.1] * 10)
    assert not has_settled([10.0] * 10 + [9.6] * 10)
    assert has_settled([1.0] * 9 + [99.0] + [1.0] * 9 + [99.0])  # by medians: one outlier a window moves none
    assert has_settled([7.0] * 3 + [1.0] * 9 + [99.0] + [1.0] * 10)


def test_drift_is_of_medians() -> None:
    assert drift(rounds_at(2.0, 2.0, 3.0, 3.0)) == pytest.approx(0.5)
    assert drift(np.array([[2.0, 2.0, 90.0], [3.0, 3.0, 3.0]])) == pytest.approx(0.5)
