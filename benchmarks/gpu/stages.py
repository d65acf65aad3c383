"""The stages on buffers and engines, through edgekd's own functions."""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import Record

from edgekd.errors import EdgeKDError, MissingDependencyError

COPY_BYTES = 64 << 20
STUDENT_PRECISIONS = ("fp32", "fp16", "int8")
ENSEMBLE_PRECISION = "fp16"
"""Of the teachers' engines: what one would deploy, and the same as the student they are compared with."""


def facts(options: argparse.Namespace, record: Record) -> None:
    """What this machine is."""
    from edgekd.bench.device import device_facts

    record.set(device=device_facts(), nvidia_smi=_nvidia_smi())
    import torch

    record.set(torch={"version": torch.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.is_available()})
    record.set(tensorrt=_tensorrt_version())


def _tensorrt_version() -> str | None:
    from edgekd.runtimes.trt_api import tensorrt

    try:
        return str(tensorrt().__version__)
    except MissingDependencyError:
        return None


def _nvidia_smi() -> str | None:
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,temperature.gpu,pstate"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def buffers(options: argparse.Namespace, record: Record) -> None:
    """Every way to the GPU's memory: round trip, graph capture, event timing, and one context with torch."""
    from edgekd.runtimes.buffers import BACKENDS
    from edgekd.runtimes.cuda_buffers import open_cuda_buffers

    for name in BACKENDS:
        try:
            opened = open_cuda_buffers(name)
        except (ImportError, EdgeKDError) as error:
            record.add("backends", {"name": name, "reason": " ".join(str(error).split())[:300]})
            continue
        try:
            record.add("backends", {"name": name, **exercise(opened)})
        finally:
            opened.close()
        record.data["backends"][-1]["torch_after_close"] = _torch_still_works()
        record.write()
    if all("reason" in entry for entry in record.data["backends"]):
        record.end("not run", record.data["backends"][-1]["reason"])


def exercise(opened: Any, size: int = COPY_BYTES) -> dict[str, Any]:
    """Round trip, copy speed by the GPU's events, a graph that really copies, memory that torch can read."""
    found: dict[str, Any] = {"device": opened.device.to_dict()}
    with opened.active():
        stream, address = opened.stream(), opened.alloc(size)
        there, back = opened.pinned((size // 4,), np.float32), opened.pinned((size // 4,), np.float32)
        there[...] = np.random.default_rng(0).random(len(there), np.float32)
        start, copied, end = opened.event(), opened.event(), opened.event()
        up, down = [], []
        for _ in range(20):
            back[...] = -1
            start.record(stream)
            opened.copy_to_device(address, there, stream)
            copied.record(stream)
            opened.copy_to_host(back, address, stream)
            end.record(stream)
            opened.synchronise(stream)
            up.append(copied.elapsed_ms(start))
            down.append(end.elapsed_ms(copied))
        found["round_trip"] = bool(np.array_equal(there, back))
        for way, times in (("to_device_gb_s", up), ("to_host_gb_s", down)):
            median = statistics.median(times)
            found[way] = round(size / median / 1e6, 2) if median else None
        back[...] = -1
        graph = opened.capture(stream, lambda: opened.copy_to_host(back, address, stream))
        ran_at_capture = bool((back != -1).any())
        graph.launch(stream)
        opened.synchronise(stream)
        found["graph"] = not ran_at_capture and bool(np.array_equal(there, back))
        graph.close()
        found["shared_with_torch"] = _torch_reads(address, there)
        opened.free(address)
    return found


def _torch_reads(address: int, expected: Any) -> bool | None:
    """Whether torch sees the backend's memory, as it does in one primary context alone; None without torch's CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None

    seen = {"shape": expected.shape, "typestr": "<f4", "data": (address, False), "version": 3}
    memory = types.SimpleNamespace(__cuda_array_interface__=seen)
    return bool(np.array_equal(torch.as_tensor(memory, device="cuda").cpu().numpy(), expected))


def _torch_still_works() -> bool | None:
    try:
        import torch
    except ImportError:
        return None
    return float(torch.ones(8, device="cuda").sum()) == 8.0 if torch.cuda.is_available() else None


def bundle(options: argparse.Namespace, record: Record) -> None:
    """The ONNX files that everything else starts from, with golden outputs: `edgekd bundle`, unless given."""
    from edgekd.bench.entries import BenchArtifact
    from edgekd.device.bundle_bench import read_bundle

    if options.bundle is None:
        from edgekd.cli.artifacts import export_data
        from edgekd.device.bundle import make_bundle

        teachers = [BenchArtifact(path, path.stem, "teacher") for path in options.teachers]
        sources = [BenchArtifact(options.student, "student", "student_distilled"), *teachers]
        data = export_data(options.data, None, "auto")
        made = make_bundle(
            sources, bundle_folder(options), precisions=STUDENT_PRECISIONS, data=data, say=lambda text: print(text)
        )
        record.set(notes=list(made.notes))
    manifest = read_bundle(bundle_folder(options))
    keys = ("name", "role", "file", "precision", "sha256", "size_bytes", "input")
    record.set(sha256=manifest["sha256"], models=[{key: model[key] for key in keys} for model in manifest["models"]])


def bundle_folder(options: argparse.Namespace) -> Path:
    return options.bundle or options.out / "bundle"


def models_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The bundle's entries.

    Raises:
        MissingDependencyError: there is no bundle yet.
    """
    from edgekd.device.bundle_bench import read_bundle
    from edgekd.errors import ArtifactError

    try:
        return list(read_bundle(bundle_folder(options))["models"])
    except ArtifactError as error:
        raise MissingDependencyError("there is no bundle", got=error.what, fix="stage `bundle`, or --bundle") from error


def engines(options: argparse.Namespace, record: Record) -> None:
    """`edgekd export --format engine` of every model: build time, precisions by layer, parity and mAP with its ONNX."""
    from edgekd.runtimes.trt_api import tensorrt

    trt = tensorrt()
    record.set(tensorrt=trt.__version__, numpy=np.__version__)
    data = _measured_on(options)
    students, teachers = _by_role(models_of(options))
    for entry in (*students, *teachers):
        precision = _engine_precision(entry)
        row = {"name": entry["name"], "role": entry["role"], "onnx": entry["file"], "precision": precision}
        started = time.monotonic()
        try:
            row |= _build(options, entry, precision, data)
        except MissingDependencyError:
            raise
        except EdgeKDError as error:  # the other precisions are worth having
            row["reason"] = " ".join(str(error).split())[:600]
        record.add("engines", row | {"seconds": round(time.monotonic() - started, 1)})
    if all("reason" in row for row in record.data["engines"]):
        record.end("failed", "no engine was built: " + record.data["engines"][0]["reason"])


def _build(options: argparse.Namespace, entry: dict[str, Any], precision: Any, data: Any) -> dict[str, Any]:
    from edgekd.export.engine import EngineOptions
    from edgekd.export.engine_job import export_engine
    from edgekd.export.images import ExportData

    said: list[tuple[float, str]] = []

    def say(text: str) -> None:
        print(text, flush=True)
        said.append((time.monotonic(), text))

    result = export_engine(
        bundle_folder(options) / entry["file"],
        engine_file(options, entry, precision),
        precision=precision,
        options=EngineOptions(level=options.level, library_tactics=not options.no_library_tactics),
        data=ExportData(val=data),
        say=say,
    )
    building = next(i for i, (_, text) in enumerate(said) if text.startswith("building"))
    found = result.to_dict()
    manifest = result.manifest
    return {
        "file": result.path.name,
        "build_s": round(said[building + 1][0] - said[building][0], 1),
        "size_bytes": result.path.stat().st_size,
        "memory_bytes": manifest.memory_bytes,
        "flags": list(manifest.flags),
        "strongly_typed": manifest.strongly_typed,
        "buffers": manifest.provenance["buffers"],
        "layers": len(manifest.layers),
        **{key: found[key] for key in ("layer_precisions", "parity", "notes")},
    }


def engine_file(options: argparse.Namespace, entry: dict[str, Any], precision: str) -> Path:
    return options.out / "engines" / f"{entry['file'].rsplit('.', 2)[0]}.{precision}.engine"


def _engine_precision(entry: dict[str, Any]) -> Any:
    return ENSEMBLE_PRECISION if (entry["role"], entry["precision"]) == ("teacher", "fp32") else entry["precision"]


def _by_role(models: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    teachers = [entry for entry in models if entry["role"] == "teacher"]
    return [entry for entry in models if entry["role"] != "teacher"], teachers


def _measured_on(options: argparse.Namespace) -> Any:
    """The split that figures are of, thinned evenly to --images."""
    from edgekd.data import read_dataset

    dataset = read_dataset(options.data, options.split, format="auto")
    step = max(1, -(-len(dataset) // options.images))
    return replace(dataset, records=dataset.records[::step])


def latency_engines(options: argparse.Namespace, record: Record) -> None:
    """`edgekd bench` of every engine, with and without a CUDA graph, and of the teachers as an ensemble."""
    from edgekd.bench.entries import BenchArtifact
    from edgekd.bench.runner import bench_artifacts
    from edgekd.cli.bench_entries import asked_ensemble, bench_config, with_graphs
    from edgekd.runtimes.trt_api import tensorrt

    tensorrt()
    entries = []
    for entry in models_of(options):
        precision = _engine_precision(entry)
        file = engine_file(options, entry, precision)
        if file.is_file():
            entries.append(BenchArtifact(file, f"{entry['name']}-{precision}", entry["role"]))
    if not entries:
        raise MissingDependencyError("there are no engines", fix="stage `engines` comes first")
    entries = with_graphs(entries)
    result = bench_artifacts(
        entries,
        _measured_on(options),
        config=bench_config(samples=options.samples, seconds=options.seconds, ensemble="both"),
        out=options.out / "engines" / "result.json",
        ensemble=asked_ensemble(entries, None),
        energy_seconds=options.energy_seconds,
        memory=False,
    )
    record.set(result=result)


def device_bundle(options: argparse.Namespace, record: Record) -> None:
    """The bundle's own program, as on a device: golden outputs first, then latency and energy of the student's files."""
    students, _ = _by_role(models_of(options))
    folder = options.out / "device"
    shutil.copytree(bundle_folder(options), folder, dirs_exist_ok=True)
    out = options.out / "device.result.json"
    command = [sys.executable, "-B", str(folder / "bench.py"), "--provider", "tensorrt", "--out", str(out)]
    command += ["--samples", str(options.samples), "--seconds", str(options.seconds), "--idle-seconds", "2"]
    command += ["--energy-seconds", str(options.energy_seconds)]
    for entry in students:
        command += ["--only", entry["file"]]
    done = subprocess.run(command, stdout=None, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        import json

        record.set(result=json.loads(out.read_text(encoding="utf-8")))
        return
    reason = " ".join(done.stderr.split())[-600:]
    record.end("not run" if done.returncode == MissingDependencyError.exit_code else "failed", reason)
