from __future__ import annotations

import gc

import numpy as np
import pytest

from edgekd.bench.latency import Clock, MeasurementPlan, measure
from edgekd.device import timing
from edgekd.types import ImageArray

IMAGES = [np.full((4, 4, 3), i, np.uint8) for i in range(3)]


class FakeClock:
    """A machine whose time passes only when something runs, and whose speed drifts."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift = 0.0, drift

    def __call__(self) -> int:
        return int(self.now)

    def spend(self, ms: float) -> int:
        took = ms * 1e6 * (1 + self.drift * self.now / 1e9)
        self.now += took
        return int(took)


class FakeSystem:
    device_ms: tuple[float, float, float] | None = None

    def __init__(self, name: str, clock: FakeClock, log: list[tuple[str, int]], ms: float, first_ms: float = 0) -> None:
        self.name, self.clock, self.log, self.ms, self.extra = name, clock, log, ms, first_ms

    def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
        self.log.append((self.name, int(image[0, 0, 0])))
        slow, self.extra = self.extra, self.extra * 0.5
        return self.clock.spend(self.ms), self.clock.spend(2 * self.ms + slow), self.clock.spend(self.ms)


def run(drift: float = 0.0, samples: int = 100, first_ms: float = 0.0) -> tuple[list, list[tuple[str, int]]]:
    clock, log = FakeClock(drift), list[tuple[str, int]]()
    systems = [FakeSystem("a", clock, log, 1.0, first_ms), FakeSystem("b", clock, log, 2.0)]
    plan = MeasurementPlan(samples=samples, warmup_seconds=0.1)
    return measure(systems, IMAGES, plan, clock=clock), log


def test_stages_and_shape() -> None:
    (a, b), _ = run()
    assert a.stages_ms.shape == (10, 10, 3)
    assert a.stages_ms[0, 0].tolist() == [1.0, 2.0, 1.0]
    assert b.total_ms.tolist() == np.full((10, 10), 8.0).tolist()


def test_rounds_interleave_in_both_orders_over_the_same_images() -> None:
    (a, b), log = run()
    # Each round both have a turn; a pair of rounds is mirrored, so the places add up to the same.
    assert [x + y for x, y in zip(a.order, b.order, strict=True)] == [1] * 10
    assert sum(a.order) == sum(b.order) == 5
    measured = log[a.warmup_runs + b.warmup_runs :]
    assert [i for name, i in measured if name == "a"] == [i for name, i in measured if name == "b"]
    assert {i for _, i in measured} == {0, 1, 2}


def test_a_block_goes_on_with_the_images_and_leaves_its_first_runs_out() -> None:
    clock, log = FakeClock(), list[tuple[str, int]]()

    class ColdAfterTheOther(FakeSystem):
        def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
            cold = [name for name, _ in log[-2:]] != [self.name] * 2  # its first two runs of a turn
            stages = super().stages_ns(image, clock)
            return stages[0] + self.clock.spend(50 * cold), *stages[1:]

    systems = [ColdAfterTheOther(name, clock, log, 1.0) for name in "ab"]
    (a, b) = measure(systems, IMAGES, MeasurementPlan(samples=40, warmup_seconds=0.1), clock=clock)
    assert (a.total_ms.max(), b.total_ms.max()) == (4.0, 4.0)
    shown = [image for name, image in log[a.warmup_runs + b.warmup_runs :] if name == "a"]
    assert shown == [(10 * turn + i) % 3 for turn in range(4) for i in (0, 1, *range(10))]


def test_every_system_is_timed_for_the_seconds_asked_for() -> None:
    clock = FakeClock()
    systems = [FakeSystem(name, clock, [], ms) for name, ms in (("quick", 1.0), ("slow", 10.0))]
    plan = MeasurementPlan(samples=20, seconds=2.0, warmup_seconds=0.1)
    quick, slow = measure(systems, IMAGES, plan, clock=clock)
    assert 2000 <= quick.total_ms.sum() < 2041
    assert len(slow.total_ms) == len(quick.total_ms) == 50  # rounds of all alike


def test_drift_hits_all_alike() -> None:
    (a, b), _ = run(drift=0.5, samples=200)
    assert np.median(b.total_ms) / np.median(a.total_ms) == pytest.approx(2.0, rel=0.02)
    assert np.median(a.total_ms[-5:]) > 1.3 * np.median(a.total_ms[:5])


def test_warm_up_goes_on_until_settled() -> None:
    (quick, _), _ = run()
    (slow, _), _ = run(first_ms=1000.0)
    assert quick.settled
    assert slow.settled
    assert quick.warmup_runs == 25  # 0.1 s at 4 ms
    assert slow.warmup_runs >= 20
    assert slow.total_ms.max() < 4.1  # the slow start is not in the samples

    class NeverSettles(FakeSystem):
        def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
            self.ms *= 1.05
            return super().stages_ns(image, clock)

    clock = FakeClock()
    plan = MeasurementPlan(samples=20, warmup_seconds=0.1, warmup_limit_seconds=0.5)
    (result,) = measure([NeverSettles("n", clock, [], 1.0)], IMAGES, plan, clock=clock)
    assert not result.settled


def test_collector_rests_only_while_measuring() -> None:
    seen = []

    class Watching(FakeSystem):
        def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
            seen.append(gc.isenabled())
            return super().stages_ns(image, clock)

    clock = FakeClock()
    (result,) = measure([Watching("w", clock, [], 1.0)], IMAGES, MeasurementPlan(20, warmup_seconds=0.0), clock=clock)
    assert gc.isenabled()
    assert not any(seen[result.warmup_runs :])


def test_no_images() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        measure([], [], MeasurementPlan())


def test_a_device_records_for_as_long_as_asked() -> None:
    clock = FakeClock()
    plan = timing.Plan(samples=10, seconds=6.0, warmup_s=0.0)
    (timed,) = timing.measure([lambda sample: clock.spend(100.0)], plan, clock)
    assert timed.blocks_ms.sum() == pytest.approx(6000.0)  # the runs before each block are no part of it
