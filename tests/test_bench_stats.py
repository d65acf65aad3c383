from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from edgekd.device.stats import drift, has_settled, median_interval, median_ratio, percentiles, summarise


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
