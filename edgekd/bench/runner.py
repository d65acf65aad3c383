"""One benchmark: every artefact, and their ensemble, over the same images on this machine, into `result.json`."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import sha256_file, source_commit, write_json
from edgekd.bench.accuracy import Accuracy, evaluate
from edgekd.bench.affinity import affinity, opencv_threads
from edgekd.bench.device import device_facts
from edgekd.bench.entries import BenchArtifact, BenchEnsemble, check_entries
from edgekd.bench.examples import agreement, choose_examples, write_examples
from edgekd.bench.latency import MeasurementPlan
from edgekd.bench.measuring import Measured, Progress, measure_all
from edgekd.bench.result import (
    SCHEMA,
    compare,
    ensemble_facts,
    headline_rows,
    result_row,
    unfit_to_publish,
    warnings_of,
)
from edgekd.bench.roof import add_roof
from edgekd.bench.saved import Saved, SavedRow, save
from edgekd.bench.subjects import Opener, Subject
from edgekd.errors import DataError
from edgekd.labels import some_of
from edgekd.machine import usable_threads
from edgekd.predictor import Predictor
from edgekd.recipe import BenchConfig
from edgekd.selection import OPTIONS
from edgekd.types import LABELLED_BY_TEACHERS, Dataset


def bench_artifacts(
    artifacts: Sequence[BenchArtifact],
    dataset: Dataset,
    *,
    config: BenchConfig,
    out: Path,
    ensemble: BenchEnsemble | None = None,
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
    plan = MeasurementPlan(
        config.samples,
        config.seconds,
        _block(config.samples),
        warmup_seconds=config.warmup_seconds,
        seed=seed,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(opencv_threads(threads))
        opener = Opener(dataset, config, threads, provider, stack)
        subjects = [opener.detector(artifact) for artifact in artifacts]
        if ensemble is not None:
            after = 1 + max(i for i, subject in enumerate(subjects) if subject.name in ensemble.members)
            subjects[after:after] = opener.ensembles(ensemble, subjects)
        found = measure_all(subjects, opener, dataset, config, plan, ensemble, memory, energy_seconds, tell)
    accuracies = [evaluate(dataset.records, answers, dataset.class_names) for answers in found.answers]
    rows = _rows(found, accuracies)
    roof = add_roof(rows, [[Path(load["path"]) for load in subject.loads] for subject in found.subjects], threads)
    reference, student = headline_rows(rows)
    comparisons = compare(rows, dataset, found.answers, found.latencies, reference, student, seed)
    settings = _settings(config, threads, plan, found, energy_seconds)
    warnings = warnings_of(rows, found.contention, found.conditions["throttled"])
    warnings += [f"{s.name}: {said}" for s in subjects for said in _about_batch(s)]
    if not accuracies[0].objects:
        warnings.append(
            f"split {dataset.split!r} has no object: accuracy cannot be measured on it (`edgekd data check`)"
        )
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "device": device_facts(),
        "conditions": {**found.conditions, "contention": found.contention},
        "data": _data_facts(dataset, synthetic, accuracies[0].objects),
        "settings": settings,
        "roof": roof,
        "ensemble": None
        if ensemble is None
        else ensemble_facts(ensemble, [s.execution for s in subjects if s.execution is not None]),
        "rows": rows,
        "reference": None if reference is None else rows[reference]["name"],
        "comparisons": comparisons,
        "warnings": warnings + _about_accuracy(found.subjects, dataset, accuracies[0]),
        "unfit_to_publish": unfit_to_publish(rows, settings, warnings),
    }
    first = reference if reference is not None else 0
    second = student if student is not None else len(rows) - 1
    _write(out, result, dataset, found, accuracies, (first, second), seed)
    return result


def _settings(
    config: BenchConfig, threads: int, plan: MeasurementPlan, found: Measured, energy_seconds: float
) -> dict[str, Any]:
    return {
        **config.model_dump(mode="json"),
        "threads": threads,
        "affinity": affinity(),
        "seed": plan.seed,
        "rounds": len(found.latencies[0].stages_ms),
        "block": plan.block,
        "unrecorded_a_block": plan.unrecorded,
        "latency_images": found.latency_images,
        "cores_used_by_others": found.contention["cores_used_by_others"],
        "order": "randomised interleaved blocks (ABBA)",
        "energy_seconds": energy_seconds,
    }


def files_beside(out: Path) -> tuple[Path, Path]:
    """(the detections' file, the examples' folder) of a result; they carry its name, so that one folder can hold two."""
    prefix = "" if out.stem == "result" else f"{out.stem}."
    return out.parent / f"{prefix}detections.npz", out.parent / f"{prefix}examples"


def _write(
    out: Path,
    result: dict[str, Any],
    dataset: Dataset,
    found: Measured,
    accuracies: Sequence[Accuracy],
    shown: tuple[int, int],
    seed: int,
) -> None:
    detections, examples = files_beside(out)
    rows = zip(found.subjects, found.answers, found.latencies, accuracies, strict=True)
    saved_rows = tuple(SavedRow(s.name, answers, m.stages_ms, a.curves) for s, answers, m, a in rows)
    save(detections, Saved(tuple(r.image_id for r in dataset.records), dataset.class_names, saved_rows))
    first, second = (found.answers[index] for index in shown)
    chosen = choose_examples(dataset.records, first, second, seed=seed)
    write_examples(examples, dataset, chosen, agreement(dataset.records, first, second, dataset.class_names))
    result["files"] = {
        "detections": detections.name,
        "detections_sha256": sha256_file(detections),
        "examples": f"{examples.name}/examples.json",
    }
    write_json(out, result)


def _about_accuracy(subjects: Sequence[Subject], dataset: Dataset, accuracy: Accuracy) -> list[str]:
    """What a reader should know of the accuracies; nothing that makes them unfit to publish."""
    told = [f"{s.name}: {said}" for s in subjects for said in _about_thresholds(s)]
    shown = fingerprint(dataset)
    if chosen := [s.name for s in subjects if _chosen_on(s) == shown]:
        told.append(
            f"{', '.join(chosen)}: the best of several evaluations on these very images (train.select: best), so accuracy "
            "here is optimistic"
        )
    if dataset.by_teachers:
        told.append(f"split {dataset.split!r} {LABELLED_BY_TEACHERS}")
    absent = [name for name, one in accuracy.per_class.items() if not one.objects]
    if absent and accuracy.objects:
        which = f"{len(absent)} of the {len(dataset.class_names)} classes"
        told.append(f"split {dataset.split!r} has no object of {which}, and AP leaves them out: {some_of(absent)}")
    return told


def _about_thresholds(subject: Subject) -> list[str]:
    """Which thresholds had no effect on a detector, or are not its own; members of ensembles have rows of their own."""
    answering = subject.system.staged
    if not isinstance(answering, Predictor):
        return []
    if said := answering.not_applied():
        return [said]
    own, used = answering.own_selection(), answering.selection.to_dict()
    other = [f"{OPTIONS[key]} {value:g}" for key, value in own.items() if used[key] != value]
    return [f"its own recipe measures it with {' '.join(other)}"] if other and not answering.form.is_finished else []


def _about_batch(subject: Subject) -> list[str]:
    """What a batch fixed in the file costs; members of ensembles have rows of their own."""
    runtime: Any = subject.members[0].predictor.runtime
    batch = int(runtime.input_shape[0])
    if len(subject.members) > 1 or batch == 1 or getattr(runtime, "dynamic_batch", False):
        return []
    return [
        f"its batch is fixed at {batch}, so that each image waits for an inference of {batch}: export it with a batch of 1"
    ]


def _chosen_on(subject: Subject) -> str | None:
    """The images, by their `fingerprint`, on which training chose these weights among others, if it did."""
    facts = subject.members[0].predictor.facts if len(subject.members) == 1 else {}
    run = facts.get("provenance", {}).get("run", {})
    return None if (chosen := run.get("chosen_on")) is None else str(chosen)


def _rows(found: Measured, accuracies: Sequence[Accuracy]) -> list[dict[str, Any]]:
    rows = []
    for index, (subject, accuracy) in enumerate(zip(found.subjects, accuracies, strict=True)):
        runtime = subject.members[0].predictor.runtime
        answering: Any = subject.system.staged
        mapped = getattr(answering, "class_map", None)
        identity = {
            "name": subject.name,
            "role": subject.role,
            "artifact": subject.artifact,
            "model": None if len(subject.members) > 1 else subject.members[0].predictor.facts.get("model"),
            "execution": subject.execution,
            "runtime": runtime.name,
            "provider": runtime.provider,
            "cuda_graph": getattr(runtime, "cuda_graph", None),
            "threads": subject.threads,
            "input_hw": [list(member.predictor.preprocess.input_hw) for member in subject.members],
            "unknown_classes": [] if mapped is None else list(mapped.unknown_classes),
            "thresholds": answering.thresholds() if isinstance(answering, Predictor) else None,
        }
        row = result_row(identity, subject.facts, accuracy, found.latencies[index], found.peaks[index])
        energy = found.energies[index]
        row.update(
            energy_mj=None if energy is None else energy["gross_mj"],
            energy=energy,
            throughput=found.throughputs[index],
            mlperf=found.scenarios[index],
        )
        rows.append(row)
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
        "fingerprint": fingerprint(dataset),
    }


def fingerprint(dataset: Dataset) -> str:
    """A hash of a split's image names, ground truth and classes: figures over two splits compare if it is equal."""
    digest = hashlib.sha256(json.dumps(dataset.class_names).encode())
    for record in dataset.records:
        digest.update(json.dumps([record.image_id, record.image_hw]).encode())
        for column in (record.boxes_xyxy, record.labels, record.difficult, record.crowd):
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def _block(samples: int) -> int:
    """Inferences a block: at least ten rounds, for an interval over rounds to mean something."""
    return min(10, max(2, samples // 10))
