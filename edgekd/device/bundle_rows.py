"""What a device's result.json says of each model: rows, speedups over the ensemble, warnings, a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekd.device.roof import share_of_roof
from edgekd.device.stats import drift, median_ratio, summarise, timing_doubts
from edgekd.device.timing import Timed


@dataclass
class Subject:
    """One row: a model, or all teachers one after the other.

    Attributes:
        entries: manifest entries. sessions: one each. inputs: per entry, prepared tensors.
    """

    name: str
    role: str
    entries: list[Mapping[str, Any]]
    sessions: list[Any]
    inputs: list[list[Any]]
    golden: list[dict[str, Any]] = field(default_factory=list)

    def run(self, sample: int) -> None:
        """One inference of every session."""
        for session, tensors in zip(self.sessions, self.inputs):
            session.run(tensors[sample % len(tensors)])


def ensemble_of(subjects: list[Subject]) -> list[Subject]:
    """All teachers of the best precision there is, one after the other, where there are two or more."""
    teachers = [subject for subject in subjects if subject.role == "teacher"]
    kinds = [kind for kind in ("fp32", "fp16", "int8") if any(t.entries[0]["precision"] == kind for t in teachers)]
    same = [teacher for teacher in teachers if teacher.entries[0]["precision"] == kinds[0]] if kinds else []
    if len(same) < 2:
        return []
    parts = [(t.entries[0], t.sessions[0], t.inputs[0]) for t in same]
    return [Subject("ensemble", "ensemble", [p[0] for p in parts], [p[1] for p in parts], [p[2] for p in parts])]


def row_of(subject: Subject, timed: Timed, energy: dict[str, Any] | None, threads: int | None) -> dict[str, Any]:
    """One row, under the names that `edgekd bench` uses; what is not known on the device is None."""
    entries, session = subject.entries, subject.sessions[0]
    one = entries[0] if len(entries) == 1 else None
    latency = summarise(timed.blocks_ms)
    return {
        "name": subject.name,
        "role": subject.role,
        "artifact": " + ".join(entry["file"] for entry in entries),
        "runtime": session.runtime,
        "provider": session.provider,
        "threads": threads,
        "input_hw": [list(entry["preprocess"]["input_hw"]) for entry in entries],
        "sha256": one["sha256"] if one else None,
        "precision": "+".join(sorted({entry["precision"] for entry in entries})),
        "latency_ms": latency,
        "stages_ms": {"pre": None, "infer": latency["median"], "post": None},
        "settled": timed.settled,
        "warmup_runs": timed.warmup_runs,
        "drift": round(drift(timed.blocks_ms), 4),
        "map": None,
        "parameters": one["parameters"] if one else None,
        "macs": one["macs"] if one else None,
        "size_bytes": sum(entry["size_bytes"] for entry in entries),
        "peak_memory_bytes": None,
        "energy_mj": energy["gross_mj"] if energy else None,
        "energy": energy,
        "golden": subject.golden[0] if subject.golden else None,
        "session": session.facts if one else None,
        "speedup_vs_ensemble": None,
        "speedup_interval": None,
    }


def add_speedups(rows: list[dict[str, Any]], timed: Sequence[Timed], seed: int) -> str | None:
    """Fill in speedups over the ensemble, or over the only teacher; returns its name."""
    ensembles = [i for i, row in enumerate(rows) if row["role"] == "ensemble"]
    teachers = [i for i, row in enumerate(rows) if row["role"] == "teacher"]
    reference = ensembles[0] if ensembles else teachers[0] if len(teachers) == 1 else None
    if reference is None:
        return None
    for row, found in zip(rows, timed):
        ratio, low, high = median_ratio(timed[reference].blocks_ms, found.blocks_ms, seed=seed)
        row["speedup_vs_ensemble"] = round(ratio, 4)
        row["speedup_interval"] = [round(low, 4), round(high, 4)]
    return str(rows[reference]["name"])


def add_roof(rows: Sequence[dict[str, Any]], subjects: Sequence[Subject], machine: Mapping[str, Any] | None) -> None:
    """Put each row's share of the machine's roof into it; an ensemble's counts are the sums of its members'."""
    for row, subject in zip(rows, [*subjects, *ensemble_of(list(subjects))]):
        counts: list[Any] = [entry["macs"] for entry in subject.entries]
        layers: list[Any] = [entry["bytes_moved"] for entry in subject.entries]
        macs = None if None in counts else sum(counts)
        moved = None if None in layers else [count for found in layers for count in found]
        row["roof"] = share_of_roof(machine, row["precision"], macs, moved, row["latency_ms"]["median"])


def warnings_of(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> list[str]:
    """What a reader should know before believing the figures."""
    said = []
    if conditions["throttled"]:
        said.append("throttled while measuring: " + ", ".join(conditions["throttled"]))
    for row in rows:
        name = f"{row['name']} {row['precision']}"
        said += timing_doubts(name, row["settled"], row["drift"], row["latency_ms"])
        built = set((row["session"] or {}).get("layer_precisions") or ()) - {"unknown"}
        if built and row["precision"] not in built:
            said.append(f"{name}: TensorRT built no layer in {row['precision']}, only in " + ", ".join(sorted(built)))
    loose = [name for name, clock in conditions["before"]["clocks"].items() if clock["pinned"] is False]
    if loose:
        said.append("clocks are free to change: " + ", ".join(loose))
    return said


def table(result: Mapping[str, Any]) -> str:
    """A result's rows and warnings for a terminal."""
    lines = [f"{'model':<28} {'precision':<9} {'median ms':>9} {'p90':>8} {'p99':>8} {'mJ':>9}"]
    for row in result["rows"]:
        latency = row["latency_ms"]
        numbers = (latency["median"], latency["p90"], latency["p99"], row["energy_mj"])
        shown = ["-" if value is None else f"{value:.2f}" for value in numbers]
        lines.append(f"{row['name']:<28} {row['precision']:<9} {shown[0]:>9} {shown[1]:>8} {shown[2]:>8} {shown[3]:>9}")
    first = result["rows"][0]
    lines.append(f"run by {first['runtime']} ({first['provider']})")
    return "\n".join(lines + [f"warning: {text}" for text in result["warnings"]])
