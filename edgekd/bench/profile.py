"""Where an inference's time goes, layer by layer, as the runtime's own profiler sees it.

Profiling costs time itself, so the layers add up to more than the benchmark's latency: shares are what to read.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import write_json
from edgekd.bench.entries import BenchArtifact
from edgekd.bench.layers import Layer, read_layers
from edgekd.data.images import evenly_spread, load_image
from edgekd.predictor import Predictor, load_predictor
from edgekd.types import Dataset, FloatArray

RUNS = 30
SHOWN = 12
_UNRECORDED = 5
_IMAGES = 8
_ANOTHER = re.compile(r"[A-Za-z0-9]|_\d")
"""What follows a name if it only begins alike: conv2d_13 is not made of conv2d, conv2d_nchwc is."""
_PRODUCTS = ("Conv", "MatMul", "Gemm")
_SUFFIX = "_kernel_time"
_CAST = "InsertedPrecisionFreeCast_"
"""What ONNX Runtime puts before a name where a CPU computes float16 in float32."""


def add_profiles(
    result: dict[str, Any],
    artifacts: Sequence[BenchArtifact],
    dataset: Dataset,
    out: Path,
    *,
    provider: str | None = None,
) -> None:
    """Profile every artefact of a finished benchmark, put `profile` into its row, and write `out` again.

    Ensembles have none of their own: their members have. `profile` is None where the runtime has no profiler.
    """
    images = [load_image(path) for path in evenly_spread(dataset.records, _IMAGES)]
    by_name = {artifact.name: artifact for artifact in artifacts}
    threads = result["settings"]["threads"]
    for row in result["rows"]:
        row["profile"] = None
        artifact = by_name.get(row["name"])
        if artifact is not None:
            given = {"runtime": artifact.runtime, "provider": provider, "threads": threads, "options": artifact.options}
            with load_predictor(artifact.path, **given) as predictor:
                inputs = [predictor.prepare(image)[0] for image in images]
                row["profile"] = profile_predictor(predictor, artifact.path, inputs, threads)
    write_json(out, result)


def profile_predictor(
    predictor: Predictor, file: Path, inputs: Sequence[FloatArray], threads: int | None, runs: int = RUNS
) -> dict[str, Any] | None:
    """The layers of one artefact, slowest first; None where its runtime has no profiler.

    Args:
        inputs: prepared images, taken in turn.

    Returns:
        "tool", "runs", "total_ms" (the sum of the layers) and "layers": each with "name", "op", "ms" (median over runs),
        "share", "macs" and "gflops" (2 a multiply-accumulate; None where a layer has none that can be counted).
    """
    runtime = predictor.runtime
    turns = [inputs[i % len(inputs)] for i in range(_UNRECORDED + runs)]
    if runtime.name == "onnxruntime":
        times = _onnxruntime_times(file, runtime.provider, predictor.preprocess.input_hw, threads, turns)
        layers = read_layers(file, predictor.preprocess.input_hw)
    elif runtime.name == "tensorrt":
        times, layers = _tensorrt_times(file, turns), ()
    else:
        return None
    rows: list[dict[str, Any]] = [{"name": name, "op": op, "ms": round(ms, 5)} for (name, op), ms in times.items()]
    total = sum(row["ms"] for row in rows)
    counted = {name: layer for layer in layers for name in layer.names}
    for row in rows:
        macs = macs_of(row["name"], row["op"], counted)
        row["share"] = round(row["ms"] / total, 5) if total else 0.0
        row["macs"] = macs
        row["gflops"] = round(2 * macs / row["ms"] / 1e6, 3) if macs and row["ms"] else None
    rows.sort(key=lambda row: -row["ms"])
    return {"tool": runtime.name, "runs": runs, "total_ms": round(total, 4), "layers": rows}


def macs_of(name: str, op: str | None, counted: Mapping[str, Layer]) -> int | None:
    """Of a node of the optimised graph, which goes by the name of the node that it came from, with something added."""
    if op is None or not any(word in op for word in _PRODUCTS):
        return None
    name = name.removeprefix(_CAST)
    fitting = [known for known in counted if name.startswith(known) and not _ANOTHER.match(name, len(known))]
    return counted[max(fitting, key=len)].macs if fitting else None


_Times = dict[tuple[str, str | None], float]


def _onnxruntime_times(
    file: Path, provider: str, input_hw: tuple[int, int], threads: int | None, inputs: Sequence[FloatArray]
) -> _Times:
    """Median milliseconds by (node, operator)."""
    from edgekd.runtimes.ort import OrtRuntime

    with tempfile.TemporaryDirectory(prefix="edgekd-profile-") as folder:
        with OrtRuntime(file, provider, threads, input_hw=input_hw, profile=Path(folder) / "trace") as runtime:
            for tensor in inputs:
                runtime.run(tensor)
            trace = runtime.end_profile()
        return read_trace(json.loads(trace.read_text(encoding="utf-8")))


def read_trace(events: Sequence[Mapping[str, Any]], unrecorded: int = _UNRECORDED) -> _Times:
    """Median milliseconds by (node, operator) out of ONNX Runtime's trace; the first runs are left out."""
    seen: dict[tuple[str, str | None], list[float]] = {}
    done = 0
    for event in events:
        done += event["name"] == "model_run"  # comes after the nodes of its run
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX) and done >= unrecorded:
            key = event["name"][: -len(_SUFFIX)], event["args"].get("op_name")
            seen.setdefault(key, []).append(event["dur"] / 1e3)
    runs = max(1, done - unrecorded)
    return {key: float(np.median(times)) * len(times) / runs for key, times in seen.items()}


def _tensorrt_times(file: Path, inputs: Sequence[FloatArray]) -> _Times:
    """Median milliseconds by layer, as the builder named and fused them."""
    from edgekd.runtimes.tensorrt_runtime import TensorRTRuntime

    with TensorRTRuntime(file) as runtime:
        found = [runtime.layer_times(tensor) for tensor in inputs][_UNRECORDED:]
    return {(name, None): float(np.median([times[name] for times in found])) for name in found[0]}


def profile_text(result: Mapping[str, Any], shown: int = SHOWN) -> str:
    """The slowest layers of every row, as tables."""
    parts = []
    for row in result["rows"]:
        found = row.get("profile")
        if found is None:
            if row["role"] != "ensemble":
                way = "--runtime onnxruntime shows them" if row["runtime"] == "openvino" else "export it to ONNX"
                parts.append(f"{row['name']}: {row['runtime']} says nothing of its layers; {way}")
            continue
        layers = found["layers"][:shown]
        share = sum(layer["share"] for layer in layers)
        head = f"{row['name']}: the slowest {len(layers)} of {len(found['layers'])} layers take {share:.0%}"
        parts.append(
            "\n".join([f"{head} ({found['tool']}, {found['total_ms']:.2f} ms in all while profiled)", *_table(layers)])
        )
    return "\n\n".join(parts)


def _table(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    width = max([5, *(len(_short(layer["name"])) for layer in layers)])
    lines = [f"  {'layer':<{width}}  {'op':<16} {'ms':>8} {'share':>6} {'MMACs':>8} {'GFLOP/s':>8}"]
    for layer in layers:
        macs = "-" if layer["macs"] is None else f"{layer['macs'] / 1e6:.2f}"
        speed = "-" if layer["gflops"] is None else f"{layer['gflops']:.1f}"
        numbers = f"{layer['ms']:>8.3f} {layer['share']:>6.1%} {macs:>8} {speed:>8}"
        lines.append(f"  {_short(layer['name']):<{width}}  {(layer['op'] or '-')[:16]:<16} {numbers}")
    return lines


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:30]}...{name[-15:]}"
