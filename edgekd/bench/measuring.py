"""Everything that is measured of a benchmark's subjects: answers, latency, throughput, scenarios, energy, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgekd.bench.device import Contention
from edgekd.bench.energy import measure_energy, uses_gpu
from edgekd.bench.entries import BenchEnsemble
from edgekd.bench.latency import Measurement, MeasurementPlan, measure
from edgekd.bench.memory import PeakMemory, peak_memory
from edgekd.bench.mlperf import LIBRARY_IMAGES, run_scenario
from edgekd.bench.subjects import Opener, Subject
from edgekd.bench.throughput import measure_throughput, stream_of, throughput_facts
from edgekd.data.images import evenly_spread, load_image
from edgekd.device.conditions import ConditionWatch
from edgekd.device.nvml import open_nvml
from edgekd.machine import usable_threads
from edgekd.recipe import BenchConfig
from edgekd.types import Dataset, Detections, ImageArray

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total); the stages are "accuracy", "latency", "throughput", an MLPerf scenario, "memory"."""

LATENCY_IMAGES = 32
_MEMORY_IMAGES = 4


@dataclass
class Measured:
    """All subjects with what was found out about each, in one order."""

    subjects: list[Subject]
    answers: list[list[Detections]]
    latencies: list[Measurement]
    energies: list[dict[str, Any] | None]
    peaks: list[PeakMemory | None]
    throughputs: list[dict[str, Any] | None]
    scenarios: list[dict[str, Any] | None]
    contention: dict[str, float | None]
    conditions: dict[str, Any]
    latency_images: int


def measure_all(
    subjects: list[Subject],
    opener: Opener,
    dataset: Dataset,
    config: BenchConfig,
    plan: MeasurementPlan,
    ensemble: BenchEnsemble | None,
    memory: bool,
    energy_seconds: float,
    tell: Progress,
) -> Measured:
    """Answers to every image first, then all that is timed, then memory, which runs in processes of its own."""
    answers = _answer_all(subjects, dataset, tell)
    images = [load_image(path) for path in evenly_spread(dataset.records, LATENCY_IMAGES)]
    with ConditionWatch(nvml=open_nvml()) as watch:
        contention = Contention()
        latencies = measure(
            [subject.system for subject in subjects],
            images,
            plan,
            progress=lambda done, total: tell("latency", done, total),
        )
        others = contention.facts()
        throughputs = _throughput_of_all(subjects, opener, images, config, ensemble, plan.seed, tell)
        scenarios = _scenario_of_all(subjects, dataset, config, plan.seed, tell)
        energies = _energy_of_all(subjects, images, energy_seconds)
    peaks: list[PeakMemory | None] = [None] * len(subjects)
    if memory:
        peaks = _memory_of_all(subjects, dataset, tell)
    return Measured(
        subjects, answers, latencies, energies, peaks, throughputs, scenarios, others, watch.result, len(images)
    )


def _answer_all(subjects: Sequence[Subject], dataset: Dataset, tell: Progress) -> list[list[Detections]]:
    """Every subject's answer to every image. Each image is decoded once, and each detector run on it once: an ensemble
    is given what its members computed.
    """
    answers: list[list[Detections]] = [[] for _ in subjects]
    for done, record in enumerate(dataset.records, 1):
        image = load_image(record.path)
        computed: dict[str, tuple[Any, Any]] = {}
        for subject, found in zip(subjects, answers, strict=True):
            names = [member.name for member in subject.members]
            if subject.role != "ensemble":
                tensor, geometry = subject.system.staged.prepare(image)
                computed[subject.name] = subject.system.staged.infer(tensor), geometry
                found.append(subject.system.staged.finish(*computed[subject.name]))
            elif subject.shares_outputs:  # at the same time or one after the other: the same outputs
                raws, geometries = zip(*(computed[name] for name in names), strict=True)
                found.append(subject.system.staged.finish(list(raws), list(geometries)))
            else:
                found.append(subject.system.detect(image))
        tell("accuracy", done, len(dataset))
    return answers


def _memory_of_all(subjects: Sequence[Subject], dataset: Dataset, tell: Progress) -> list[PeakMemory | None]:
    paths = evenly_spread(dataset.records, _MEMORY_IMAGES)
    found = []
    for done, subject in enumerate(subjects, 1):
        found.append(peak_memory(subject.loads, paths))
        tell("memory", done, len(subjects))
    return found


def _energy_of_all(
    subjects: Sequence[Subject], images: Sequence[ImageArray], seconds: float
) -> list[dict[str, Any] | None]:
    def runner(subject: Subject) -> Callable[[], object]:
        turn = itertools.cycle(images)
        return lambda: subject.system.detect(next(turn))

    on_gpu = [any(uses_gpu(member.predictor.runtime) for member in subject.members) for subject in subjects]
    return measure_energy([runner(subject) for subject in subjects], on_gpu, seconds)


def _throughput_of_all(
    subjects: Sequence[Subject],
    opener: Opener,
    images: Sequence[ImageArray],
    config: BenchConfig,
    ensemble: BenchEnsemble | None,
    seed: int,
    tell: Progress,
) -> list[dict[str, Any] | None]:
    """Images a second on streams that share the machine's threads, each with models of its own."""
    if config.mode != "throughput":
        return [None] * len(subjects)
    usable = config.threads or usable_threads()
    streams = config.streams or usable
    threads = max(1, usable // streams)
    runs, batches = [], []
    for subject in subjects:
        group = ensemble if subject.role == "ensemble" else None
        pairs = [stream_of(opener.staged(opener.copies(subject, threads), group), config.batch) for _ in range(streams)]
        runs.append([stream for stream, _ in pairs])
        batches.append(pairs[0][1])
    rates = measure_throughput(
        runs,
        batches,
        images,
        seconds=config.seconds,
        seed=seed,
        progress=lambda done, total: tell("throughput", done, total),
    )
    return [throughput_facts(rate, streams, threads, batch, seed) for rate, batch in zip(rates, batches, strict=True)]


def _scenario_of_all(
    subjects: Sequence[Subject], dataset: Dataset, config: BenchConfig, seed: int, tell: Progress
) -> list[dict[str, Any] | None]:
    """Each alone, by MLPerf's rules, where a scenario was asked for."""
    scenario = config.mlperf
    if scenario is None:
        return [None] * len(subjects)
    images = [load_image(path) for path in evenly_spread(dataset.records, LIBRARY_IMAGES)]
    return [
        run_scenario(
            subject.system.staged,
            images,
            scenario,
            seconds=config.mlperf_seconds,
            seed=seed,
            progress=lambda done, total, name=subject.name: tell(f"{scenario}: {name}", done, total),  # type: ignore[misc]
        )
        for subject in subjects
    ]
