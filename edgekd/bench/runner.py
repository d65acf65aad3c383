"""One benchmark: every artefact, and their ensemble, over the same images on this machine, into `result.json`."""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import source_commit, write_json
from edgekd.bench.accuracy import Accuracy, evaluate
from edgekd.bench.complexity import ArtifactFacts, describe_artifact
from edgekd.bench.device import Contention, device_facts, usable_threads
from edgekd.bench.energy import measure_energy, uses_gpu
from edgekd.bench.entries import BenchArtifact, BenchEnsemble, Role, check_entries
from edgekd.bench.examples import agreement, choose_examples, write_examples
from edgekd.bench.latency import Measurement, MeasurementPlan, measure
from edgekd.bench.memory import PeakMemory, peak_memory
from edgekd.bench.result import SCHEMA, compare, ensemble_facts, headline_rows, result_row, together, warnings_of
from edgekd.bench.saved import Saved, SavedRow, save
from edgekd.bench.systems import Member, System, ensemble_of
from edgekd.data.images import load_image
from edgekd.device.conditions import ConditionWatch
from edgekd.device.nvml import open_nvml
from edgekd.errors import DataError
from edgekd.predictor import RuntimeChoice, load_predictor
from edgekd.recipe import BenchConfig
from edgekd.types import Dataset, Detections, ImageArray

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total); the stages are "accuracy", "latency", "memory"."""

LATENCY_IMAGES = 32
_MEMORY_IMAGES = 4


@dataclass
class _Subject:
    """One row while it is being measured."""

    name: str
    role: Role
    artifact: str
    system: System
    members: tuple[Member, ...]
    facts: ArtifactFacts
    loads: list[dict[str, Any]]
    shares_outputs: bool = False  # an ensemble that works on what its members compute by themselves


def bench_artifacts(
    artifacts: Sequence[BenchArtifact],
    dataset: Dataset,
    *,
    config: BenchConfig,
    out: Path,
    ensemble: BenchEnsemble | None = None,
    runtime: RuntimeChoice = "auto",
    provider: str | None = None,
    seed: int = 0,
    synthetic: bool = False,
    memory: bool = True,
    energy_seconds: float = 10.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure accuracy, latency, memory and energy, compare, and write `out` with its detections and examples beside it.

    Args:
        artifacts: what to measure, in the order of the table.
        dataset: the split; all of its images count for accuracy, an even selection for latency.
        config: samples, warm-up, threads and the thresholds that all artefacts share.
        out: `result.json`; `detections.npz` and `examples/` are written into the same folder.
        ensemble: several of the artefacts as one deployed system.
        seed: of the order of measurement, the bootstraps and the choice of examples.
        memory: measure peak memory, in a fresh process an artefact.
        energy_seconds: each runs alone for so long where power can be read; 0 leaves energy out.
        synthetic: the data is generated; said wherever figures from it are shown.

    Returns:
        What `out` holds, schema "edgekd.result/1".

    Raises:
        UserError: an artefact cannot be read or mapped to the data's classes, or names repeat.
    """
    check_entries(artifacts, ensemble)
    if not dataset.records:
        raise DataError(f"{dataset.root}: split {dataset.split!r} has no images")
    tell = progress or (lambda stage, done, total: None)
    threads = config.threads or usable_threads()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_opencv_threads(threads))
        subjects = _open(artifacts, dataset, config, threads, runtime, provider, stack)
        if ensemble is not None:
            after = 1 + max(i for i, subject in enumerate(subjects) if subject.name in ensemble.members)
            subjects.insert(after, _ensemble_subject(ensemble, subjects, dataset, config))
        answers = _answer_all(subjects, dataset, tell)
        plan = MeasurementPlan(config.samples, _block(config.samples), warmup_seconds=config.warmup_seconds, seed=seed)
        images = [load_image(dataset.records[i].path) for i in _evenly(len(dataset), LATENCY_IMAGES)]
        watch = stack.enter_context(ConditionWatch(nvml=open_nvml()))
        contention = Contention()
        measured = measure(
            [subject.system for subject in subjects],
            images,
            plan,
            progress=lambda done, total: tell("latency", done, total),
        )
        others = contention.cores()
        energies = _energy_of_all(subjects, images, energy_seconds)
        peaks = _memory_of_all(subjects, dataset, tell) if memory else [None] * len(subjects)
    accuracies = [evaluate(dataset.records, found, dataset.class_names) for found in answers]
    rows = _rows(subjects, accuracies, measured, peaks, threads)
    for row, energy in zip(rows, energies, strict=True):
        row.update(energy_mj=None if energy is None else energy["gross_mj"], energy=energy)
    reference, student = headline_rows(rows)
    speedups_and_comparisons = compare(rows, dataset, answers, measured, reference, student, seed)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "device": device_facts(),
        "conditions": watch.result,
        "data": _data_facts(dataset, synthetic, accuracies[0].objects),
        "settings": {
            **config.model_dump(mode="json"),
            "threads": threads,
            "seed": seed,
            "rounds": plan.rounds,
            "block": plan.block,
            "unrecorded_a_block": plan.unrecorded,
            "latency_images": len(images),
            "mode": "single",
            "cores_used_by_others": others,
            "order": "randomised interleaved blocks (ABBA)",
            "energy_seconds": energy_seconds,
        },
        "ensemble": None if ensemble is None else ensemble_facts(ensemble),
        "rows": rows,
        "reference": None if reference is None else rows[reference]["name"],
        "comparisons": speedups_and_comparisons,
        "warnings": [*warnings_of(rows, measured, others), *_throttling(watch.result)],
        "files": {"detections": "detections.npz", "examples": "examples/examples.json"},
    }
    folder = out.parent
    pairs = zip(subjects, answers, measured, accuracies, strict=True)
    saved_rows = tuple(SavedRow(s.name, found, m.stages_ms, a.curves) for s, found, m, a in pairs)
    save(folder / "detections.npz", Saved(tuple(r.image_id for r in dataset.records), dataset.class_names, saved_rows))
    first = reference if reference is not None else 0
    second = student if student is not None else len(rows) - 1
    chosen = choose_examples(dataset.records, answers[first], answers[second], seed=seed)
    agreed = agreement(dataset.records, answers[first], answers[second], dataset.class_names)
    write_examples(folder / "examples", dataset, chosen, agreed)
    write_json(out, result)
    return result


def _open(
    artifacts: Sequence[BenchArtifact],
    dataset: Dataset,
    config: BenchConfig,
    threads: int,
    runtime: RuntimeChoice,
    provider: str | None,
    stack: contextlib.ExitStack,
) -> list[_Subject]:
    """Load every artefact, answering in the data set's classes."""
    subjects = []
    for artifact in artifacts:
        settings: dict[str, Any] = {
            "path": str(artifact.path),
            "runtime": runtime,
            "provider": provider,
            "threads": threads,
            "score_threshold": config.score_threshold,
            "nms_iou": config.nms_iou,
            "max_detections": config.max_detections,
            "cuda_graph": artifact.cuda_graph,
        }
        predictor = stack.enter_context(load_predictor(**settings, options=artifact.options))
        class_map = (artifact.options.class_map if artifact.options is not None else None) or artifact.class_map
        options = None if artifact.options is None else artifact.options.model_dump(mode="json")
        subjects.append(
            _Subject(
                artifact.name,
                artifact.role,
                _shown_path(artifact.path),
                System(predictor.with_classes(dataset.class_names, class_map)),
                (Member(artifact.name, predictor, class_map),),
                describe_artifact(artifact.path, predictor.preprocess.input_hw),
                [{**settings, "path": str(artifact.path.resolve()), "options": options}],
            )
        )
    return subjects


def _ensemble_subject(
    ensemble: BenchEnsemble, subjects: Sequence[_Subject], dataset: Dataset, config: BenchConfig
) -> _Subject:
    by_name = {subject.name: subject for subject in subjects}
    chosen = [by_name[name] for name in ensemble.members]
    members = tuple(member for subject in chosen for member in subject.members)
    return _Subject(
        ensemble.name,
        "ensemble",
        " + ".join(subject.artifact for subject in chosen),
        System(ensemble_of(ensemble, members, dataset.class_names, config)),
        members,
        together([subject.facts for subject in chosen]),
        [settings for subject in chosen for settings in subject.loads],
        shares_outputs=ensemble.config.fusion != "mean-outputs",
    )


def _answer_all(subjects: Sequence[_Subject], dataset: Dataset, tell: Progress) -> list[list[Detections]]:
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
            elif subject.shares_outputs:
                raws, geometries = zip(*(computed[name] for name in names), strict=True)
                found.append(subject.system.staged.finish(list(raws), list(geometries)))
            else:
                found.append(subject.system.detect(image))
        tell("accuracy", done, len(dataset))
    return answers


def _memory_of_all(subjects: Sequence[_Subject], dataset: Dataset, tell: Progress) -> list[PeakMemory | None]:
    paths = [dataset.records[i].path for i in _evenly(len(dataset), _MEMORY_IMAGES)]
    found = []
    for done, subject in enumerate(subjects, 1):
        found.append(peak_memory(subject.loads, paths))
        tell("memory", done, len(subjects))
    return found


def _energy_of_all(
    subjects: Sequence[_Subject], images: Sequence[ImageArray], seconds: float
) -> list[dict[str, Any] | None]:
    def runner(subject: _Subject) -> Callable[[], object]:
        turn = itertools.cycle(images)
        return lambda: subject.system.detect(next(turn))

    on_gpu = [any(uses_gpu(member.predictor.runtime) for member in subject.members) for subject in subjects]
    return measure_energy([runner(subject) for subject in subjects], on_gpu, seconds)


def _throttling(conditions: dict[str, Any]) -> list[str]:
    found = conditions["throttled"]
    return ["throttled while measuring: " + ", ".join(found)] if found else []


def _rows(
    subjects: Sequence[_Subject],
    accuracies: Sequence[Accuracy],
    measured: Sequence[Measurement],
    peaks: Sequence[PeakMemory | None],
    threads: int,
) -> list[dict[str, Any]]:
    rows = []
    for subject, accuracy, measurement, peak in zip(subjects, accuracies, measured, peaks, strict=True):
        runtime = subject.members[0].predictor.runtime
        identity = {
            "name": subject.name,
            "role": subject.role,
            "artifact": subject.artifact,
            "runtime": runtime.name,
            "provider": runtime.provider,
            "cuda_graph": getattr(runtime, "cuda_graph", None),
            "threads": threads,
            "input_hw": [list(member.predictor.preprocess.input_hw) for member in subject.members],
        }
        rows.append(result_row(identity, subject.facts, accuracy, measurement, peak))
    return rows


def _data_facts(dataset: Dataset, synthetic: bool, objects: int) -> dict[str, Any]:
    return {
        "name": dataset.root.resolve().name,
        "format": dataset.format,
        "split": dataset.split,
        "images": len(dataset),
        "objects": objects,
        "class_names": list(dataset.class_names),
        "synthetic": synthetic,
    }


def _shown_path(path: Path) -> str:
    """A path for a file that others will read: relative where it can be, the bare name otherwise."""
    if not path.is_absolute():
        return path.as_posix()
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name


def _evenly(total: int, wanted: int) -> list[int]:
    """At most `wanted` of `total` indices, evenly spread."""
    return [int(i) for i in np.unique(np.linspace(0, total - 1, min(total, wanted)).round())]


def _block(samples: int) -> int:
    """Inferences a block: at least ten rounds, for an interval over rounds to mean something."""
    return min(10, max(2, samples // 10))


@contextlib.contextmanager
def _opencv_threads(threads: int) -> Iterator[None]:
    """OpenCV resizes with all cores unless told otherwise."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(threads)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
