"""What `result.json` says: rows, speedups and comparisons out of raw measurements. Schema "edgekd.result/1"."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import sha256_json
from edgekd.bench.accuracy import Accuracy
from edgekd.bench.complexity import ArtifactFacts
from edgekd.bench.entries import BenchEnsemble
from edgekd.bench.latency import STAGES, Measurement
from edgekd.bench.matching import Float64Array, match_coco
from edgekd.bench.memory import PeakMemory
from edgekd.bench.precision_recall import percentile_interval, resampled_ap50, share_interval
from edgekd.device.stats import drift, median_interval, median_ratio, percentiles, summarise, timing_doubts
from edgekd.errors import ArtifactError
from edgekd.types import Dataset, Detections

SCHEMA = "edgekd.result/1"
RESAMPLES = 1000

PUBLISH_SAMPLES, PUBLISH_SECONDS, PUBLISH_WARMUP = 1000, 30.0, 2.0

_CONTENTION_WORTH_SAYING = (
    ("cores_used_by_others", 0.2, "other processes used {:.1f} cores"),
    ("steal", 0.02, "a hypervisor took {:.0%} of the cores' time"),
    ("waiting", 0.05, "the measuring thread waited for a CPU for {:.0%} of the time"),
)

Rows = list[dict[str, Any]]


def result_row(
    identity: dict[str, Any],
    facts: ArtifactFacts,
    accuracy: Accuracy,
    measurement: Measurement,
    memory: PeakMemory | None,
) -> dict[str, Any]:
    """One row; `speedup_vs_ensemble` is filled in by `compare`."""
    scores = accuracy.to_dict()
    curves = scores.pop("curves")
    medians = [summarise(measurement.stages_ms[..., i])["median"] for i in range(len(STAGES))]
    return {
        **identity,
        "sha256": facts.sha256,
        "precision": facts.precision,
        "latency_ms": {
            **summarise(measurement.total_ms),
            "median_interval": median_interval(measurement.total_ms),
            "percentiles": percentiles(measurement.total_ms),
        },
        "stages_ms": dict(zip(STAGES, medians, strict=True)),
        "device_ms": None if (device := measurement.device_ms) is None else _device_medians(device),
        "throughput": None,
        "mlperf": None,
        "settled": measurement.settled,
        "warmup_runs": measurement.warmup_runs,
        "drift": round(drift(measurement.total_ms), 4),
        "map": scores,
        "precision_at_recall": curves.get(""),
        "parameters": facts.parameters,
        "macs": facts.macs,
        "counted_from": facts.counted_from,
        "size_bytes": facts.size_bytes,
        "peak_memory_bytes": None if memory is None else memory.peak_bytes,
        "model_memory_bytes": None if memory is None else memory.model_bytes,
        "energy_mj": None,
        "speedup_vs_ensemble": None,
        "speedup_interval": None,
    }


def _device_medians(device_ms: Float64Array) -> dict[str, float]:
    """By the accelerator's own clock, where it has one: copies apart from computing."""
    return {
        key: round(float(np.median(device_ms[..., i])), 3) for i, key in enumerate(("copy_in", "compute", "copy_out"))
    }


def headline_rows(rows: Rows) -> tuple[int | None, int | None]:
    """(what speedups refer to, the student that the answer is about).

    The ensemble as it runs fastest, or the only teacher where there is no ensemble; the first distilled student, or the
    first student.
    """
    by_role: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_role.setdefault(row["role"], []).append(index)
    teachers = by_role.get("teacher", [])
    ensembles = sorted(by_role.get("ensemble", []), key=lambda index: float(rows[index]["latency_ms"]["median"]))
    reference = ensembles[0] if ensembles else teachers[0] if len(teachers) == 1 else None
    students = by_role.get("student_distilled", []) + by_role.get("student", [])
    return reference, students[0] if students else None


def compare(
    rows: Rows,
    dataset: Dataset,
    answers: Sequence[Sequence[Detections]],
    measured: Sequence[Measurement],
    reference: int | None,
    student: int | None,
    seed: int,
) -> list[dict[str, Any]]:
    """Fill in every row's AP50 interval and speedup over the reference, and give AP50 differences with intervals.

    Differences: each distilled student against the student alone that is most like it (`unlike` says in what it is not),
    and each student against the reference. All models answer the same resampled images, so the bootstrap is paired.
    """
    if reference is not None:
        for index, row in enumerate(rows):
            ratio = median_ratio(measured[reference].total_ms, measured[index].total_ms, seed=seed)
            row["speedup_vs_ensemble"] = round(ratio.value, 4)
            row["speedup_interval"] = [round(ratio.low, 4), round(ratio.high, 4)]
    matched = [match_coco(dataset.records, found, len(dataset.class_names)) for found in answers]
    drawn = resampled_ap50(matched, resamples=RESAMPLES, seed=seed)
    for row, values in zip(rows, drawn, strict=True):
        interval = share_interval(values)
        row["map"]["ap50_interval"] = None if interval is None else [round(v, 6) for v in interval[1:]]
    comparisons = []
    for a, b in _pairs(rows, reference):
        found = percentile_interval(drawn[a] - drawn[b])
        if found is not None:
            headline = a == student and b == reference
            comparisons.append(_comparison(rows[a], rows[b], found, len(dataset), headline))
    return comparisons


def _comparison(
    a: dict[str, Any], b: dict[str, Any], found: tuple[float, float, float], images: int, headline: bool
) -> dict[str, Any]:
    difference, low, high = found
    return {
        "metric": "ap50",
        "a": a["name"],
        "b": b["name"],
        "a_role": a["role"],
        "b_role": b["role"],
        "difference": round(difference, 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "confidence": 0.95,
        "method": "paired bootstrap over images",
        "resamples": RESAMPLES,
        "images": images,
        "difference_shown": not low <= 0.0 <= high,
        "headline": headline,
        "unlike": unlike(a, b),
    }


def _pairs(rows: Rows, reference: int | None) -> list[tuple[int, int]]:
    """Rows to compare: distilled against the one alone that is most like it, then students against the reference."""
    alone = [i for i, row in enumerate(rows) if row["role"] == "student"]
    distilled = [i for i, row in enumerate(rows) if row["role"] == "student_distilled"]
    pairs = []
    for index in distilled:
        differs = {other: unlike(rows[index], rows[other]) for other in alone}
        if alone:  # another network is a greater difference than another precision
            pairs.append((index, min(alone, key=lambda i: (any("network" in d for d in differs[i]), len(differs[i])))))
    if reference is not None:
        pairs += [(index, reference) for index in distilled + alone]
    return pairs


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """In what two rows are not one network deployed alike, so that training alone cannot explain a difference.

    Nothing if they are; rows of older results, which do not name the model, are told apart by their counts.
    """
    found = []
    other_input = a.get("input_hw") != b.get("input_hw")
    keys = ("model", "parameters", *(() if other_input else ("macs",)))
    known = [(a[key], b[key]) for key in keys if a.get(key) is not None and b.get(key) is not None]
    if a.get("parameters") is None or b.get("parameters") is None or a.get("counted_from") != b.get("counted_from"):
        found.append("a network not known to be the same")
    elif any(one != other for one, other in known):
        found.append("another network")
    if other_input:
        found.append("another input size")
    if a.get("precision") != b.get("precision"):
        found.append("another precision")
    return found


def ensemble_facts(ensemble: BenchEnsemble, execution: Sequence[str]) -> dict[str, Any]:
    """How the ensemble is put together, and how its members ran in each of its rows."""
    return {
        "name": ensemble.name,
        "members": list(ensemble.members),
        "weights": None if ensemble.weights is None else list(ensemble.weights),
        "fusion": ensemble.config.fusion,
        "iou": ensemble.config.iou,
        "execution": list(execution),
    }


def together(members: Sequence[ArtifactFacts]) -> ArtifactFacts:
    """An ensemble's facts: sums over its members, and one hash of their hashes."""
    parameters = [member.parameters for member in members]
    macs = [member.macs for member in members]
    precisions = list(dict.fromkeys(member.precision for member in members))
    return ArtifactFacts(
        members[0].file,
        sha256_json([member.sha256 for member in members]),
        sum(member.size_bytes for member in members),
        "+".join(precisions),
        None if None in parameters else sum(p for p in parameters if p is not None),
        None if None in macs else sum(m for m in macs if m is not None),
        members[0].counted_from,
    )


def warnings_of(rows: Rows, contention: Mapping[str, float | None], throttled: Sequence[str] | None) -> list[str]:
    """What a reader should know before believing the latencies."""
    said = []
    for key, limit, text in _CONTENTION_WORTH_SAYING:
        value = contention.get(key)
        if value is not None and value > limit:
            said.append(text.format(value) + " while latency was measured: it may be too high and too spread")
    if throttled:
        said.append("throttled while measuring: " + ", ".join(throttled))
    for row in rows:
        said += timing_doubts(row["name"], row["settled"], row["drift"], row["latency_ms"])
        if unknown := row.get("unknown_classes"):
            said.append(f"{row['name']} does not know {', '.join(unknown)}: it scores nothing there")
    return said


def unfit_to_publish(rows: Rows, settings: Mapping[str, Any], warnings: Sequence[str]) -> list[str]:
    """Why these figures should not be published as they are; nothing if they may be."""
    reasons = [text for text in warnings if "does not know" not in text]
    for row in rows:
        samples = row["latency_ms"]["samples"]
        seconds = samples * row["latency_ms"]["median"] / 1e3
        if samples < PUBLISH_SAMPLES or seconds < 0.9 * PUBLISH_SECONDS:
            reasons.append(
                f"{row['name']}: {samples} samples in about {seconds:.0f} s; at least {PUBLISH_SAMPLES} and "
                f"{PUBLISH_SECONDS:.0f} s are wanted"
            )
    if settings["warmup_seconds"] < PUBLISH_WARMUP:
        reasons.append(f"a warm-up of {settings['warmup_seconds']:g} s; at least {PUBLISH_WARMUP:g} s are wanted")
    return reasons


def read_result(path: Path) -> dict[str, Any]:
    """A `result.json`.

    Raises:
        ArtifactError: missing, damaged, or another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = data["schema"]
        rows = data["rows"]
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path}: no such file",
            expected="the result.json that `edgekd bench` writes",
            fix="run `edgekd bench` first",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a readable result", got=error, expected=SCHEMA) from error
    if found != SCHEMA or not isinstance(rows, list):
        raise ArtifactError(f"{path}: unknown schema", got=found, expected=SCHEMA)
    return dict(data)
