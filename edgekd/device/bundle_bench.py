"""Measure the models of this bundle on this machine: `python3 bench.py`, which `edgekd.device.bundle_start` is there.

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
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import sha256_file, write_json
from edgekd.device.bundle_rows import Subject, add_roof, add_speedups, ensemble_of, row_of, table, warnings_of
from edgekd.device.conditions import ConditionWatch
from edgekd.device.facts import machine_facts
from edgekd.device.golden import check, normalise
from edgekd.device.nvml import open_nvml
from edgekd.device.power import choose_group, energy_per_inference, idle_reading, power_rails
from edgekd.device.roof import machine_roof
from edgekd.device.sessions import CHOICES, choose_provider, open_session
from edgekd.device.timing import BLOCK, Plan, measure
from edgekd.errors import ArtifactError, EdgeKDError, ParityError

BUNDLE_SCHEMA = "edgekd.bundle/1"
RESULT_SCHEMA = "edgekd.device-result/1"


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
    files = [entry["file"] for entry in manifest["models"]]
    if unknown := [name for name in only if name not in files]:
        raise ArtifactError("no such model in this bundle", got=", ".join(unknown), expected=", ".join(files))
    entries = [entry for entry in manifest["models"] if not only or entry["file"] in only]
    cache = cache or folder / "engines"
    passed_over: list[str] = []
    provider = choose_provider(folder / entries[0]["file"], entries[0], provider, threads, cache, passed_over.append)
    for text in passed_over:
        say(text)
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
        result = _measured(manifest, subjects, plan, threads, energy_s, idle_s, say)
        result["roof"] = {"cpu": None, "gpu": None}
        if not subjects[0].sessions[0].uses_gpu:  # a GPU's peak cannot be measured with what is here
            say("measuring this machine's peak")
            products = {name: (folder / file).read_bytes() for name, file in manifest["roof"].items()}
            result["roof"]["cpu"] = machine_roof(products, threads)
        add_roof(result["rows"], subjects, result["roof"]["cpu"])
        if result["device"]["jetson"] is not None:  # whose GPU is what it is bought for
            result["warnings"] += passed_over
        return result
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
    rows_of = subjects + ensemble_of(subjects)
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
    rows = [row_of(*found, threads) for found in zip(rows_of, timed, energies)]
    reference = add_speedups(rows, timed, plan.seed)
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
        "warnings": warnings_of(rows, watch.result),
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
            Path(__file__).resolve().parents[2],  # of edgekd/device/ in a bundle
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
