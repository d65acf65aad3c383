"""Throughput, MLPerf scenarios, parallel ensembles, affinity: what goes beyond one image at a time."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgekd.bench.affinity import affinity, parse_cpus, pinned
from edgekd.bench.entries import BenchArtifact, BenchEnsemble
from edgekd.bench.latency import MeasurementPlan, measure
from edgekd.bench.mlperf import early_stopping, least_queries, run_scenario
from edgekd.bench.result import unfit_to_publish, warnings_of
from edgekd.bench.runner import bench_artifacts
from edgekd.bench.systems import System
from edgekd.bench.throughput import measure_throughput, stream_of, throughput_facts
from edgekd.predictor import load_predictor
from edgekd.recipe import BenchConfig, OnnxTeacher
from edgekd.report.summary import publish_text, summary_text
from edgekd.types import Detections
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, POOR_SCORES, make_dataset, write_detector
from tests.onnx_zoo import EXPORTS, write
from tests.test_bench_latency import IMAGES, FakeClock, FakeSystem


def plainly(count: int, percentile: float) -> int | None:
    """The largest t for which t or fewer of `count` over the percentile have a chance of at most 1 %, summed plainly."""
    best = None
    for t in range(1, count):
        chance = sum(math.comb(count, k) * (1 - percentile) ** k * percentile ** (count - k) for k in range(t + 1))
        if chance > 0.01:
            break
        best = t
    return best


@pytest.mark.parametrize(
    ("count", "percentile"), [(63, 0.9), (64, 0.9), (200, 0.9), (661, 0.99), (662, 0.99), (900, 0.99)]
)
def test_early_stopping_is_a_binomial_bound(count: int, percentile: float) -> None:
    assert early_stopping(count, percentile) == plainly(count, percentile)


def test_least_queries_are_those_of_the_rules() -> None:
    assert (least_queries(0.9), least_queries(0.99)) == (64, 662)


class FakeStaged:
    """Takes 1 ms an image on a clock of its own, and 10 ms for the image 3."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.asked = clock, 0

    def prepare(self, image: Any) -> tuple[Any, Any]:
        return image, None

    def infer(self, tensor: Any) -> Any:
        self.asked += 1
        self.clock.spend(10.0 if int(tensor[0, 0, 0]) == 2 else 1.0)

    def finish(self, raw: Any, geometry: Any) -> Detections:
        return Detections.empty()

    def detect(self, image: Any) -> Detections:
        raise AssertionError("MLPerf's rules leave preparing untimed")


@pytest.mark.parametrize(("scenario", "samples", "least"), [("SingleStream", 1, 64), ("MultiStream", 8, 662)])
def test_scenarios(scenario: Any, samples: int, least: int) -> None:
    clock = FakeClock()
    staged = FakeStaged(clock)
    found = run_scenario(staged, IMAGES, scenario, seconds=0.01, clock=clock)
    assert found["queries"] == least
    assert staged.asked == samples * (least + 1)  # one query warms up
    assert found["samples_a_query"] == samples
    if samples == 1:  # a third of the images take 10 ms, so the 90th percentile does
        assert found["latency_ms"] == 10.0
    else:
        assert found["percentile_ms"] <= found["latency_ms"] <= 80.0
    assert "not a submission" in found["note"]
    assert any("600 s" in text for text in found["deviations"])
    longer = run_scenario(staged, IMAGES, "SingleStream", seconds=700.0, clock=clock)
    assert longer["seconds"] >= 700
    assert not any("600 s" in text for text in longer["deviations"])


def test_streams_run_at_once_and_errors_come_through() -> None:
    seen, lock = set[str](), threading.Lock()

    def slow(images: Any) -> None:
        with lock:
            seen.add(threading.current_thread().name)
        time.sleep(0.002)

    (rates,) = measure_throughput([[slow, slow, slow]], [2], IMAGES, rounds=2)
    assert len(seen) == 3
    facts = throughput_facts(rates, 3, 1, 2)
    assert facts["interval"][0] <= facts["images_per_s"] <= facts["interval"][1]
    assert 0 < facts["images_per_s"] <= 3 * 2 / 0.002

    def broken(images: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        measure_throughput([[broken, slow]], [1], IMAGES, rounds=2)


@pytest.mark.parametrize("case", ["Ultralytics v8, 11", "Ultralytics v8, dynamic"])
def test_a_batch_that_is_open_in_name_only_is_not_measured(tmp_path: Path, case: str) -> None:
    """What the file gives is one image's answer, however many it is given."""
    export = EXPORTS[case]
    path = write(export, tmp_path / "m.onnx")
    with load_predictor(path, threads=1, options=OnnxTeacher(name="m", onnx=str(path), **export.declared)) as predictor:
        answer, size = stream_of(predictor, 4)
        assert size == 1
        answer([np.zeros((64, 96, 3), np.uint8)] * 4)


def test_a_least_time_adds_rounds_for_all() -> None:
    clock = FakeClock()
    systems = [FakeSystem("a", clock, [], 1.0), FakeSystem("b", clock, [], 2.0)]
    plan = MeasurementPlan(20, seconds=1.0, warmup_seconds=0.0)
    told: list[tuple[int, int]] = []
    a, b = measure(systems, IMAGES, plan, clock=clock, progress=lambda *step: told.append(step))
    assert a.total_ms.shape == b.total_ms.shape == (25, 10)  # 4 ms each, so 250 for a second
    assert told[-1] == (25, 25)


def test_the_device_s_own_times_are_kept_apart() -> None:
    class Runtime:
        device_times = False

        def gpu_times(self) -> Any:
            assert self.device_times
            return SimpleNamespace(to_device=1.0, compute=5.0, to_host=0.5)

    clock = FakeClock()
    with_clock = System(FakeStaged(clock), [Runtime(), Runtime()])
    mixed = System(FakeStaged(clock), [Runtime(), object()])
    found, none = measure([with_clock, mixed], IMAGES, MeasurementPlan(20, warmup_seconds=0.0), clock=clock)
    assert found.device_ms is not None
    assert found.device_ms[0, 0].tolist() == [2.0, 10.0, 1.0]
    assert none.device_ms is None


def test_pinning_reaches_every_thread_and_ends() -> None:
    before = affinity()
    if before is None:
        pytest.skip("no affinity here")
    found: list[set[int]] = []
    go, done = threading.Event(), threading.Event()

    def watch() -> None:
        go.wait(10)
        found.append(os.sched_getaffinity(0))
        done.set()

    thread = threading.Thread(target=watch)
    thread.start()
    with pinned(parse_cpus(str(before[0]))):
        go.set()
        done.wait(10)
        assert affinity() == [before[0]]
    thread.join()
    assert found == [{before[0]}]
    assert affinity() == before
    assert parse_cpus(f"{before[0]}-{before[0]}") == (before[0],)


def test_a_whole_benchmark_under_load(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", images=6)
    good = write_detector(tmp_path / "good.onnx", GOOD_BOXES, GOOD_SCORES)
    poor = write_detector(tmp_path / "poor.onnx", GOOD_BOXES, POOR_SCORES)
    config = BenchConfig(
        samples=20, warmup_seconds=0, threads=2, mode="throughput", mlperf="SingleStream", mlperf_seconds=0.1, batch=4
    )
    result = bench_artifacts(
        [BenchArtifact(good, "one", "teacher"), BenchArtifact(poor, "two", "teacher"), BenchArtifact(good, "student")],
        dataset,
        config=config,
        out=tmp_path / "load.json",
        ensemble=BenchEnsemble(("one", "two")),
        memory=False,
        energy_seconds=0,
    )
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["one", "two", "ensemble", "ensemble-parallel", "student"]
    sequential, parallel = rows["ensemble"], rows["ensemble-parallel"]
    assert (sequential["execution"], sequential["threads"]) == ("sequential", 2)
    assert (parallel["execution"], parallel["threads"]) == ("parallel", 1)
    assert parallel["map"]["ap50"] == sequential["map"]["ap50"]
    quickest = min(sequential, parallel, key=lambda row: row["latency_ms"]["median"])
    assert result["reference"] == quickest["name"]
    assert result["ensemble"]["execution"] == ["sequential", "parallel"]
    for row in rows.values():
        assert row["throughput"]["streams"] == 2
        assert row["throughput"]["batch"] == 1  # the file takes one image at a time
        assert row["throughput"]["images_per_s"] > 0
        assert row["mlperf"]["queries"] >= 64
    assert result["files"]["detections"] == "load.detections.npz"
    assert (tmp_path / "load.examples" / "examples.json").is_file()
    assert not (tmp_path / "detections.npz").exists()
    assert result["settings"]["affinity"] == affinity()
    assert any("20 samples" in reason for reason in result["unfit_to_publish"])
    text = summary_text(result)
    assert "\nrun by onnxruntime (CPUExecutionProvider)\n" in text
    assert "student: SingleStream: " in text
    assert "intervals are 95 %" in text
    rows["student"]["runtime"] = "openvino"
    assert "ensemble-parallel: run by onnxruntime (CPUExecutionProvider); student: run by openvino" in summary_text(
        result
    )


@pytest.mark.parametrize(
    ("execution", "threads", "names"),
    [("parallel", 2, ["ensemble"]), ("sequential", 2, ["ensemble"]), ("both", 1, ["ensemble"])],
)
def test_how_an_ensemble_runs(tmp_path: Path, execution: Any, threads: int, names: list[str]) -> None:
    path = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES)
    result = bench_artifacts(
        [BenchArtifact(path, "one", "teacher"), BenchArtifact(path, "two", "teacher")],
        make_dataset(tmp_path / "data", images=2),
        config=BenchConfig(samples=20, warmup_seconds=0, threads=threads, ensemble=execution),
        out=tmp_path / "result.json",
        ensemble=BenchEnsemble(("one", "two")),
        memory=False,
        energy_seconds=0,
    )
    found = [row for row in result["rows"] if row["role"] == "ensemble"]
    assert [row["name"] for row in found] == names
    assert found[0]["execution"] == ("parallel" if execution == "parallel" else "sequential")


def test_parallel_members_answer_as_in_sequence(tmp_path: Path) -> None:
    from edgekd.bench.systems import Member, Parallel, ensemble_of
    from edgekd.predictor import load_predictor

    dataset = make_dataset(tmp_path / "data", images=1)
    files = [write_detector(tmp_path / f"{n}.onnx", GOOD_BOXES, s) for n, s in (("a", GOOD_SCORES), ("b", POOR_SCORES))]
    members = [Member(file.stem, load_predictor(file, threads=1), None) for file in files]
    fused = ensemble_of(BenchEnsemble(("a", "b")), members, dataset.class_names, BenchConfig())
    parallel = Parallel(fused)
    image = np.zeros((128, 128, 3), np.uint8)
    one, other = fused.detect(image), parallel.detect(image)
    parallel.close()
    assert len(one) > 0
    np.testing.assert_array_equal(one.boxes_xyxy, other.boxes_xyxy)
    np.testing.assert_array_equal(one.scores, other.scores)


def test_publish_says_both_ways() -> None:
    assert publish_text({"warnings": ["a"], "unfit_to_publish": []}).startswith("fit to publish")
    one = publish_text({"warnings": ["a", "b"], "unfit_to_publish": ["a", "too few"]})
    assert one == "not fit to publish: a note above; too few"
    assert "2 of the notes" in publish_text({"warnings": ["a", "b"], "unfit_to_publish": ["a", "b"]})


def test_what_spoils_a_measurement_is_said() -> None:
    row = {
        "name": "a", "settled": False, "drift": 0.3, "latency_ms": {"median": 1.0, "p90": 3.0, "samples": 200},
        "unknown_classes": ["cat"],
    }  # fmt: skip
    contention = {"cores_used_by_others": 1.0, "steal": 0.2, "waiting": 0.5, "involuntary_switches": 1.0}
    said = warnings_of([row], contention, ["gpu0: hot"])
    for words in ("1.0 cores", "hypervisor took 20%", "waited for a CPU for 50%", "gpu0: hot", "not settled", "+30%",
                  "3.0x the median", "does not know cat"):  # fmt: skip
        assert any(words in text for text in said), words
    settings = {"warmup_seconds": 1.0}
    reasons = unfit_to_publish([row], settings, said)
    assert any("200 samples in about 0 s" in text for text in reasons)
    assert not any("does not know" in text for text in reasons)
    calm = {**row, "settled": True, "drift": 0.0, "unknown_classes": [],
            "latency_ms": {"median": 10.0, "p90": 11.0, "samples": 3000}}  # fmt: skip
    assert (
        unfit_to_publish([calm], {"warmup_seconds": 2.0}, warnings_of([calm], dict.fromkeys(contention, 0.0), [])) == []
    )
