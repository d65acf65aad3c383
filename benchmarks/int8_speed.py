"""How much faster int8 is than fp32 on this CPU, on ONNX Runtime and on OpenVINO, and what it costs in mAP.

One process pinned to one core, one thread, the four (runtime, precision) pairs in turn, in a new random order each
round; medians of wall time and of CPU time (which other processes on the machine disturb less) of `infer` alone.
mAP is of the same files through the same runtimes. The last line is JSON.

    python benchmarks/int8_speed.py runs/bccd --data DIR --split test
    python benchmarks/int8_speed.py --untrained vgg16-ssd@300      # ratios only: speed does not depend on the weights
    python benchmarks/int8_speed.py --untrained mobilenetv2-ssd-lite@256 --width 0.35
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

THREADS = 1
RUNTIMES = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a run folder or checkpoint")
    parser.add_argument("--untrained", metavar="MODEL[@SIZE]", help="a detector with random weights instead")
    parser.add_argument("--width", type=float, default=1.0, help="of the untrained one")
    parser.add_argument("--data", type=Path, help="a data set: mAP of each file on --split")
    parser.add_argument("--split", default="test")
    parser.add_argument("--train-split", help="to calibrate on; the run's own recipe says it if left out")
    parser.add_argument("--rounds", type=int, default=60, help="of 5 inferences each")
    parser.add_argument("--core", type=int, help="the last one if left out")
    parser.add_argument("--keep", type=Path, help="folder for the ONNX files; files that are there are used")
    options = parser.parse_args()
    if (options.run is None) == (options.untrained is None):
        parser.error("give a run, or --untrained")
    core = max(os.sched_getaffinity(0)) if options.core is None else options.core
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(options, options.keep or Path(temporary))
        os.sched_setaffinity(0, {core})  # before any session is made, so that none of them asks for more threads
        result = measure(files, options)
    show(result)
    print(json.dumps(result))


def write_files(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """fp32 and int8 of one detector."""
    from edgekd.export import ExportData, export_run
    from edgekd.recipe import ExportConfig

    folder.mkdir(parents=True, exist_ok=True)
    files = {precision: folder / f"{precision}.onnx" for precision in PRECISIONS}
    if options.untrained is not None:
        write_untrained(options.untrained, options.width, files)
        return files
    data = None
    if options.train_split is not None:
        from edgekd.data import read_dataset

        data = ExportData(read_dataset(options.data, options.train_split))
    for precision in PRECISIONS:
        if not files[precision].is_file():
            config = ExportConfig(calibration="auto")
            export_run(options.run, files[precision], precision=precision, config=config, data=data, say=say)
    return files


def write_untrained(model: str, width: float, files: dict[str, Path]) -> None:
    """Random weights, calibrated on noise: as fast as trained ones."""
    import numpy as np
    import torch

    from edgekd.detectors import build_detector, spec_for
    from edgekd.export.onnx import describe, trace, write_model
    from edgekd.export.precision import to_int8
    from edgekd.recipe import ExportConfig, ModelConfig
    from edgekd.selection import Selection

    torch.manual_seed(0)
    name, _, size = model.partition("@")
    detector = build_detector(
        spec_for(ModelConfig(model=name, input_size=int(size) if size else None, width=width), ("a", "b", "c"))
    )
    base = trace(detector)
    describe(base, detector, precision="fp32", target="x86", thresholds=Selection())
    noise = np.random.default_rng(0).normal(size=(2, 1, 3, *detector.spec.preprocess.input_hw)).astype(np.float32)
    write_model(base, files["fp32"])
    write_model(to_int8(base, list(noise), config=ExportConfig()).model, files["int8"])


def measure(files: dict[str, Path], options: argparse.Namespace) -> dict[str, object]:
    from edgekd.artifact import versions
    from edgekd.errors import MissingDependencyError
    from edgekd.predictor import Predictor, load_predictor

    predictors: dict[str, Predictor] = {}
    for runtime in RUNTIMES:
        for precision, file in files.items():
            try:
                predictors[f"{runtime} {precision}"] = load_predictor(file, runtime=runtime, threads=THREADS)
            except MissingDependencyError as error:
                print(f"skipped: {error}", file=sys.stderr)
                break
    ap50 = {} if options.data is None else accuracies(predictors, options)
    wall, cpu = latencies(predictors, options.rounds)
    rows = {
        name: {"wall_ms": wall[name], "cpu_ms": cpu[name], "ap50": ap50.get(name), "images": ap50.get("images")}
        for name in predictors
    }
    ratios = {
        runtime: {
            kind: times[f"{runtime} fp32"] / times[f"{runtime} int8"] for kind, times in (("wall", wall), ("cpu", cpu))
        }
        for runtime in RUNTIMES
        if f"{runtime} int8" in rows
    }
    best = min(wall[name] for name in wall if name.endswith("int8"))
    return {
        "model": options.untrained or str(options.run.name),
        "rows": rows,
        "int8_over_fp32": ratios,
        "best_int8_over_onnxruntime_fp32": wall["onnxruntime fp32"] / best,
        "rounds": options.rounds,
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }


def accuracies(predictors: dict, options: argparse.Namespace) -> dict[str, float]:
    from edgekd.bench.accuracy import evaluate
    from edgekd.data import read_dataset
    from edgekd.data.images import load_image

    dataset = read_dataset(options.data, options.split)
    found = {name: [] for name in predictors}
    for record in dataset.records:
        image = load_image(record.path)
        for name, predictor in predictors.items():
            found[name].append(predictor.detect(image))
    scores = {name: evaluate(dataset.records, some, dataset.class_names).ap50 or 0.0 for name, some in found.items()}
    return {**scores, "images": len(dataset)}


def latencies(predictors: dict, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median (wall, CPU) milliseconds of one inference, by name; the first of each five is warm-up."""
    from edgekd.runtimes.onnx_file import probe_picture

    order, wall, cpu = list(predictors), {n: [] for n in predictors}, {n: [] for n in predictors}
    tensor, _ = predictors[order[0]].prepare(probe_picture(predictors[order[0]].preprocess.input_hw))
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            for position in range(6):
                start, used = time.perf_counter(), time.process_time()
                predictors[name].infer(tensor)
                if position:
                    cpu[name].append((time.process_time() - used) * 1e3)
                    wall[name].append((time.perf_counter() - start) * 1e3)
    return tuple({name: statistics.median(values) for name, values in times.items()} for times in (wall, cpu))


def show(result: dict) -> None:
    print(f"{'':20} {'wall ms':>8} {'CPU ms':>8} {'AP50':>7}")
    for name, row in result["rows"].items():
        ap50 = "" if row["ap50"] is None else f"{row['ap50'] * 100:7.2f}"
        print(f"{name:20} {row['wall_ms']:8.2f} {row['cpu_ms']:8.2f} {ap50}")
    for runtime, ratio in result["int8_over_fp32"].items():
        print(f"{runtime}: int8 is {ratio['wall']:.2f}x fp32 by wall time, {ratio['cpu']:.2f}x by CPU time")
    print(f"the fastest int8 is {result['best_int8_over_onnxruntime_fp32']:.2f}x ONNX Runtime's fp32")


def say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
