"""How threads should wait for each other: torch's (OpenMP) and ONNX Runtime's, on an idle machine and beside busy processes.

    python benchmarks/thread_spinning.py --out result.json

Each setting runs in a process of its own, in turns, `--rounds` times; the medians are kept. Random weights and inputs, since
only time is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from edgekd.artifact import source_commit, versions
from edgekd.machine import cpu_model

TORCH = {
    "spin (libgomp's default)": {},
    "sleep (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin shortly (edgekd)": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"},
}
ONNX = {
    "spin (ONNX Runtime's default)": {},
    "sleep (allow_spinning=0)": {"session.intra_op.allow_spinning": "0"},
    "spin within a run (edgekd)": {"session.force_spinning_stop": "1"},
}
MODELS = (("yolo-nano", 160, 0.5), ("mobilenetv2-ssd-lite", 320, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(_torch(args.threads) if args.child == "torch" else _onnx(json.loads(args.child), args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _export(Path(folder))
        machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": args.threads}
        result: dict[str, Any] = {**machine, "versions": versions(), "commit": source_commit()}
        for where, busy in (("idle", 0), ("beside one busy process a core", os.cpu_count() or 1)):
            with _Busy(busy):
                result[where] = _compare(args, Path(folder))
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _compare(args: argparse.Namespace, models: Path) -> dict[str, dict[str, float]]:
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for name, variables in TORCH.items():
            rounds.setdefault(f"torch: {name}", []).append(_child("torch", args, models, variables))
        for name, options in ONNX.items():
            rounds.setdefault(f"onnxruntime: {name}", []).append(_child(json.dumps(options), args, models, {}))
    return {name: {key: round(median(one[key] for one in all), 2) for key in all[0]} for name, all in rounds.items()}


def _child(what: str, args: argparse.Namespace, models: Path, variables: dict[str, str]) -> dict[str, float]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, __file__, "--child", what, "--threads", str(args.threads), "--models", str(models)]
    done = subprocess.run(command, env={**clean, **variables}, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _torch(threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    found = {}
    for model, size, width in MODELS:
        detector, batch = _detector(model, size, width), torch.rand(8, 3, size, size)
        detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = batch.to(memory_format=torch.channels_last)

        def step(detector: Any = detector, batch: Any = batch) -> None:
            output = detector(batch)
            sum(tensor.square().mean() for tensor in vars(output).values() if torch.is_tensor(tensor)).backward()

        found[f"{model} {size} px, a training step of 8, ms"] = _ms(step, 4)
        detector.eval()
        with torch.inference_mode():
            found[f"{model} {size} px, an image, ms"] = _ms(lambda d=detector, b=batch: d(b[:1]), 40)
    return found


def _onnx(options: dict[str, str], args: argparse.Namespace) -> dict[str, float]:
    import numpy as np
    import onnxruntime

    sessions = []
    for model, _, _ in MODELS:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = args.threads, 1
        for key, value in options.items():
            settings.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(args.models / f"{model}.onnx", settings, ["CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        feed = {entry.name: np.random.default_rng(0).random(entry.shape, np.float32)}
        sessions.append(lambda s=session, f=feed: s.run(None, f))
    found = {
        f"{model} {size} px, an image, ms": _ms(run, 60) for run, (model, size, _) in zip(sessions, MODELS, strict=True)
    }
    found["both in turn, as an ensemble runs, ms"] = _ms(lambda: [run() for run in sessions], 30)
    return found


def _ms(work: Callable[[], object], times: int) -> float:
    for _ in range(max(2, times // 10)):
        work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return median(found) * 1e3


def _detector(model: str, size: int, width: float) -> Any:
    from edgekd.detectors import build_detector, spec_for
    from edgekd.recipe import ModelConfig

    return build_detector(spec_for(ModelConfig(model=model, input_size=size, width=width), ("a", "b", "c")))  # type: ignore[arg-type]


def _export(folder: Path) -> None:
    from edgekd.export import export_onnx

    for model, size, width in MODELS:
        export_onnx(_detector(model, size, width).eval(), folder / f"{model}.onnx")


class _Busy:
    """Processes that do nothing but keep a core each busy."""

    def __init__(self, count: int) -> None:
        self.processes = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(count)]

    def __enter__(self) -> None:
        for process in self.processes:
            process.start()

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.terminate()


def _spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    main()
