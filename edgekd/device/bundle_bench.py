"""Measure the models of this bundle on this machine: `python3 bench.py`. Shipped in bundles as `bench.py`.

Needs Python 3.8, NumPy, and TensorRT (with its GPU) or ONNX Runtime. First every file is compared with its hash, then
every model with its golden outputs; only if all of that is well is anything timed. Times are of inference alone: from a
prepared input tensor to output arrays on the host.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import sha256_file, write_json
from edgekd.device.conditions import ConditionWatch
from edgekd.device.facts import machine_facts
from edgekd.device.golden import check, normalise
from edgekd.device.nvml import open_nvml
from edgekd.device.power import choose_group, energy_per_inference, idle_reading, power_rails
from edgekd.device.sessions import CHOICES, choose_provider, open_session
from edgekd.device.timing import BLOCK, Plan, Timed, drift, measure, median_ratio, summarise
from edgekd.errors import ArtifactError, EdgeKDError, ParityError

BUNDLE_SCHEMA = "edgekd.bundle/1"
RESULT_SCHEMA = "edgekd.device-result/1"


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


def read_bundle(folder: Path) -> dict[str, Any]:
    """The manifest of an intact bundle.

    Raises:
        ArtifactError: no bundle, another schema, or a file that is missing or changed.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: no readable bundle here", got=error, fix="make it again: edgekd bundle"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != BUNDLE_SCHEMA:
        raise ArtifactError(f"{folder}: not a bundle of this version", expected=BUNDLE_SCHEMA)
    for name, digest in manifest["files"].items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != digest:
            raise ArtifactError(
                f"{name} of this bundle is missing or has changed", fix="make the bundle again, or copy it again"
            )
    return {**manifest, "sha256": sha256_file(folder / "manifest.json")}


def run_bundle(
    folder: Path,
    *,
    provider: str = "auto",
    threads: int | None = None,
    plan: Plan = Plan(),  # noqa: B008 - frozen
    energy_s: float = 30.0,
    idle_s: float = 5.0,
    only: Sequence[str] = (),
    check_only: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Check and measure every model (or those whose file is in `only`); returns what result.json holds.

    Raises:
        ArtifactError: the bundle is damaged. ParityError: a model does not give its golden outputs.
        EdgeKDError: the runtime is not there or fails.
    """
    say("checking files")
    manifest = read_bundle(folder)
    entries = [entry for entry in manifest["models"] if not only or entry["file"] in only]
    if not entries:
        raise ArtifactError("no such model in this bundle", got=", ".join(only))
    cache = cache or folder / "engines"
    provider = choose_provider(folder / entries[0]["file"], entries[0], provider, threads, cache, say)
    subjects: list[Subject] = []
    try:
        with np.load(folder / manifest["golden"]["file"], allow_pickle=False) as golden:
            for entry in entries:
                say(f"{entry['name']} {entry['precision']}: comparing with golden outputs on {provider}")
                session = open_session(folder / entry["file"], entry, provider, threads, cache)
                subject = Subject(entry["name"], entry["role"], [entry], [session], [])
                subjects.append(subject)
                _check_golden(subject, golden)
        if check_only:
            checked = [subject.golden[0] for subject in subjects]
            return {"schema": RESULT_SCHEMA, "bundle": manifest["sha256"], "checked": checked}
        return _measured(manifest, subjects, plan, threads, energy_s, idle_s, say)
    finally:
        for subject in subjects:
            subject.sessions[0].close()


def _check_golden(subject: Subject, golden: Any) -> None:
    """Run the golden images, and stop at the first that does not give what it should."""
    entry, session = subject.entries[0], subject.sessions[0]
    images = golden[entry["golden"]["images"]]
    tensors = [normalise(image, entry["preprocess"]) for image in images]
    found = []
    for index, tensor in enumerate(tensors):
        outputs = {name: np.array(value) for name, value in session.run(tensor).items()}
        expected = {
            output["name"]: golden[f"{entry['golden']['outputs']}/{index}/{output['name']}"]
            for output in entry["outputs"]
        }
        found.append(check(entry, expected, outputs))
        if found[-1]["failure"]:
            raise ParityError(
                f"{entry['file']} does not give its golden outputs on this machine: nothing was timed",
                got=f"image {index}: {found[-1]['failure']}",
                expected=f"{entry['precision']} within {entry['tolerance']}",
                fix="int8 laid out for another target, or a runtime with a bug; try another --provider",
            )
    subject.inputs.append(tensors)
    subject.golden.append(
        {
            "file": entry["file"],
            "images": len(found),
            "confident": sum(result["confident"] for result in found),
            "matched": sum(result["matched"] for result in found),
            "scores_max_abs": max(result.get("scores_max_abs", 0.0) for result in found),
            "boxes_max_px": max(result.get("boxes_max_px", 0.0) for result in found),
        }
    )


def _measured(
    manifest: Mapping[str, Any],
    subjects: list[Subject],
    plan: Plan,
    threads: int | None,
    energy_s: float,
    idle_s: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    nvml = open_nvml()
    rows_of = subjects + _ensemble(subjects)
    group = choose_group(power_rails(nvml=nvml), subjects[0].sessions[0].uses_gpu)
    energies: list[dict[str, Any] | None] = [None] * len(rows_of)
    with ConditionWatch(nvml=nvml) as watch:
        idle = None
        if group is not None and energy_s > 0:
            say(f"idle power for {idle_s:g} s")
            idle = idle_reading(group, idle_s)
        say("warming up, then timing in interleaved blocks")
        timed = measure([subject.run for subject in rows_of], plan, progress=_told(say))
        if group is not None and energy_s > 0:
            for index, subject in enumerate(rows_of):
                say(f"{subject.name}: energy over {energy_s:g} s")
                energies[index] = energy_per_inference(_loop(subject), group, energy_s, idle)
    rows = [_row(*found, threads) for found in zip(rows_of, timed, energies)]
    reference = _compare(rows, timed, plan.seed)
    return {
        "schema": RESULT_SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": manifest["commit"],
        "bundle": manifest["sha256"],
        "device": machine_facts(nvml=nvml),
        "conditions": watch.result,
        "settings": {
            "mode": "single",
            "timed": "prepared input tensor to output arrays on the host",
            "samples": plan.samples,
            "seconds": plan.seconds,
            "limit_seconds": plan.limit_s,
            "warmup_seconds": plan.warmup_s,
            "threads": threads,
            "block": BLOCK,
            "seed": plan.seed,
            "order": "randomised interleaved blocks (ABBA)",
            "energy_seconds": energy_s if group is not None else None,
            "idle_seconds": idle_s if group is not None else None,
        },
        "rows": rows,
        "reference": reference,
        "warnings": _warnings(rows, watch.result),
    }


def _told(say: Callable[[str], None]) -> Callable[[int, float], None]:
    last = [0.0]

    def progress(samples: int, seconds: float) -> None:
        if seconds - last[0] >= 5:
            last[0] = seconds
            say(f"{samples} samples, {seconds:.0f} s of each model")

    return progress


def _loop(subject: Subject) -> Callable[[], None]:
    count = [0]

    def run() -> None:
        subject.run(count[0])
        count[0] += 1

    return run


def _ensemble(subjects: list[Subject]) -> list[Subject]:
    """All teachers of the best precision there is, one after the other, where there are two or more."""
    teachers = [subject for subject in subjects if subject.role == "teacher"]
    kinds = [kind for kind in ("fp32", "fp16", "int8") if any(t.entries[0]["precision"] == kind for t in teachers)]
    same = [teacher for teacher in teachers if teacher.entries[0]["precision"] == kinds[0]] if kinds else []
    if len(same) < 2:
        return []
    parts = [(t.entries[0], t.sessions[0], t.inputs[0]) for t in same]
    return [Subject("ensemble", "ensemble", [p[0] for p in parts], [p[1] for p in parts], [p[2] for p in parts])]


def _row(subject: Subject, timed: Timed, energy: dict[str, Any] | None, threads: int | None) -> dict[str, Any]:
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


def _compare(rows: list[dict[str, Any]], timed: Sequence[Timed], seed: int) -> str | None:
    """Fill in speedups over the ensemble, or over the only teacher; returns its name."""
    ensembles = [i for i, row in enumerate(rows) if row["role"] == "ensemble"]
    teachers = [i for i, row in enumerate(rows) if row["role"] == "teacher"]
    reference = ensembles[0] if ensembles else teachers[0] if len(teachers) == 1 else None
    if reference is None:
        return None
    for row, found in zip(rows, timed):
        ratio, low, high = median_ratio(timed[reference].blocks_ms, found.blocks_ms, seed)
        row["speedup_vs_ensemble"] = round(ratio, 4)
        row["speedup_interval"] = [round(low, 4), round(high, 4)]
    return str(rows[reference]["name"])


def _warnings(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> list[str]:
    said = []
    if conditions["throttled"]:
        said.append("throttled while measuring: " + ", ".join(conditions["throttled"]))
    for row in rows:
        name = f"{row['name']} {row['precision']}"
        if not row["settled"]:
            said.append(f"{name}: the median had not settled when the warm-up ended")
        if abs(row["drift"]) > 0.1:
            said.append(f"{name}: the median moved by {row['drift']:+.0%} from the first half to the second")
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
    return "\n".join(lines + [f"warning: {text}" for text in result["warnings"]])


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and measure the models of this bundle on this machine.")
    parser.add_argument("--provider", choices=CHOICES, default="auto", help="what runs the models")
    parser.add_argument("--threads", type=int, help="threads of one inference on the CPU")
    parser.add_argument("--samples", type=int, default=1000, help="timed inferences of each, at least")
    parser.add_argument("--seconds", type=float, default=30.0, help="and each is timed for so long, at least")
    parser.add_argument("--limit", type=float, default=180.0, help="but for no longer than so")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds of warm-up, at least")
    parser.add_argument("--energy-seconds", type=float, default=30.0, help="of running for energy; 0: none")
    parser.add_argument("--idle-seconds", type=float, default=5.0, help="of idling before, for energy above idle")
    parser.add_argument("--only", action="append", default=[], metavar="FILE", help="only this model; repeatable")
    parser.add_argument("--check", action="store_true", help="compare with golden outputs, time nothing")
    parser.add_argument("--cache", type=Path, help="folder for engines; engines/ if not given")
    parser.add_argument("--out", type=Path, default=Path("result.json"), help="the file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; returns the exit code: 0, 1 where the machine or a model fails, 2 for what a user can mend."""
    given = _arguments(arguments)
    try:
        result = run_bundle(
            Path(__file__).resolve().parent,
            provider=given.provider,
            threads=given.threads,
            plan=Plan(given.samples, given.seconds, given.limit, given.warmup),
            energy_s=given.energy_seconds,
            idle_s=given.idle_seconds,
            only=given.only,
            check_only=given.check,
            cache=given.cache,
            say=lambda text: print(text, flush=True),
        )
        write_json(given.out, result)
    except EdgeKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror}", file=sys.stderr)
        return 1
    print("all golden outputs agree" if given.check else table(result))
    print(f"result: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
