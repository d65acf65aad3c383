"""All that a GPU is needed for, in one call: buffers, engines, parity, latency, training speed, each stage by itself.

    python benchmarks/gpu/run.py --data DIR --split test --student RUN --teachers A.onnx B.onnx --out DIR --minutes 9

Every stage is a process with a time limit of its own and writes DIR/STAGE.json as it goes, so that what is done stays,
whatever happens to the rest. A stage that cannot run says why. README.md beside this file says what each measures.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import summary_page  # noqa: E402
from record import Record, read_record  # noqa: E402

STAGES = {  # name: share of the minutes; what a stage leaves goes to those after it
    "facts": 0.3,
    "buffers": 0.4,
    "bundle": 2.0,
    "training": 4.0,
    "latency_torch": 2.0,
    "engines": 8.0,
    "latency_engines": 3.0,
    "device_bundle": 3.0,
}
ON_TENSORRT = ("engines", "latency_engines", "device_bundle")
"""Stages that run under --engine-python; they need no torch."""

_GRACE_S, _LEAST_S = 3.0, 20.0
"""A stage's time to end by itself when it is told to, and what each gets at least while there is time: imports take some."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--data", type=Path, required=True, help="a data set (VOC, COCO or YOLO)")
    parser.add_argument("--split", default="test", help="its split that mAP is measured on")
    parser.add_argument("--images", type=int, default=500, help="images of it, at most")
    parser.add_argument("--student", type=Path, required=True, help="a run folder or checkpoint of edgekd")
    parser.add_argument("--teachers", type=Path, nargs="*", default=[], help="ONNX files; two or more make an ensemble")
    parser.add_argument("--bundle", type=Path, help="made earlier by `edgekd bundle`; made here if left out")
    parser.add_argument("--engine-python", default=sys.executable, help="a command: the Python that has TensorRT")
    parser.add_argument("--level", type=int, help="the builder's optimisation level, 0 to 5")
    parser.add_argument("--no-library-tactics", action="store_true", help="TensorRT without cuBLAS and cuDNN")
    parser.add_argument("--recipes", type=Path, nargs="*", help="whose cost is measured; recipes/methods if left out")
    parser.add_argument(
        "--recipe-images", type=int, help="training images to state GPU-hours for; --data's if left out"
    )
    parser.add_argument("--step-images", type=int, default=256, help="training images that steps are timed on")
    parser.add_argument("--step-seconds", type=float, default=4.0, help="that each kind of step is timed for")
    parser.add_argument("--samples", type=int, default=1000, help="timed inferences of each, at least")
    parser.add_argument("--seconds", type=float, default=3.0, help="and each is timed for so long, at least")
    parser.add_argument("--energy-seconds", type=float, default=2.0, help="of running for energy; 0: none")
    parser.add_argument("--device", default="auto", help="torch's: auto, cpu, cuda, cuda:1")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all stages together")
    parser.add_argument("--stages", default=",".join(STAGES), help="which to run, in this order")
    parser.add_argument("--copy-to", type=Path, help="a folder that summary.md and all.json are copied to each time")
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    unknown = set(options.stages.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    for path in (options.data, options.student, *options.teachers, *filter(None, [options.bundle])):
        if not path.exists():
            parser.error(f"{path}: no such file or folder")
    return options


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    options = arguments(given)
    if options.one:
        run_stage(options.one, options)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    names = [name for name in STAGES if name in options.stages.split(",")]
    for position, name in enumerate(names):
        later = sum(STAGES[other] for other in names[position:])
        left_s = max(0.0, end - time.monotonic())
        limit_s = min(left_s, max(_LEAST_S, left_s * STAGES[name] / later))
        python = shlex.split(options.engine_python) if name in ON_TENSORRT else [sys.executable]
        print(f"{name}: {limit_s:.0f} s at most", flush=True)
        supervise([*python, str(HERE / "run.py"), *given, "--one", name], options.out, name, limit_s)
        summarise(options)
    print((options.out / "summary.md").read_text(encoding="utf-8"))
    return 0


def supervise(command: list[str], out: Path, name: str, limit_s: float) -> None:
    """Run a stage's process, end it when its time is up, and put what became of it into its JSON."""
    (out / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
    started, log = time.monotonic(), out / f"{name}.log"
    reason = None
    with log.open("w", encoding="utf-8") as stream:
        try:
            # A group of its own, so that a compiler's workers end with it; not a session, which would outlive a job.
            child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp)
        except OSError as error:
            Record(out, name).end("failed", f"{command[0]}: {error.strerror}")
            return
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            reason = f"cut off after {limit_s:.0f} s"
        except (
            BaseException
        ):  # Ctrl-C or SIGTERM: the stage does not go on alone, and its JSON does not say that it does
            end_group(child)
            Record(out, name, read_record(out / f"{name}.json")).end("cut off", "the whole call was ended")
            raise
        end_group(child)
    record = Record(out, name, read_record(out / f"{name}.json"))
    record.data["seconds"] = round(time.monotonic() - started, 1)
    if reason is not None:
        record.end("cut off", reason)
    elif record.data["status"] == "running":  # it died without a word in its JSON
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no output"]
        record.end("failed", f"exit code {code}: {last[0][:300]}")
    else:
        record.write()
    print(f"  {record.data['status']}" + (f": {record.data['reason']}" if record.data["reason"] else ""), flush=True)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a process and those it started; nothing happens to one that has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
            return


def run_stage(name: str, options: argparse.Namespace) -> Record:
    """One stage, in this process; what goes wrong stands in its record."""
    from importlib import import_module

    record = Record(options.out, name)
    record.write()
    try:
        from edgekd.errors import MissingDependencyError

        home = {"training": "training", "latency_torch": "torch_rows"}.get(name, "stages")
        try:
            getattr(import_module(home), name)(options, record)
        except (ImportError, MissingDependencyError) as error:
            record.end("not run", " ".join(str(error).split())[:500])
            return record
    except Exception as error:  # whatever it is, the other stages go on, and this one says it
        import traceback

        traceback.print_exc()
        record.end("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        return record
    if record.data["status"] == "running":
        record.end("done")
    return record


def summarise(options: argparse.Namespace) -> None:
    """summary.md and all.json out of every stage's JSON in the folder, those of earlier calls among them."""
    from edgekd.artifact import write_json, write_text

    found = {name: read_record(options.out / f"{name}.json") for name in STAGES}
    found = {name: data for name, data in found.items() if data}
    write_json(options.out / "all.json", {"schema": "edgekd.gpu/1", "stages": found})
    write_text(options.out / "summary.md", summary_page.markdown(found))
    if options.copy_to is not None:
        options.copy_to.mkdir(parents=True, exist_ok=True)
        for file in ("all.json", "summary.md"):
            shutil.copyfile(options.out / file, options.copy_to / file)


if __name__ == "__main__":
    sys.exit(main())
