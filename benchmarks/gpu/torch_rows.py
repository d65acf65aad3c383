"""torch and torch.compile on the same GPU, measured by the benchmark's own loop."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from record import Record
from stages import _measured_on

from edgekd.bench.accuracy import evaluate
from edgekd.bench.complexity import describe_artifact
from edgekd.bench.latency import MeasurementPlan
from edgekd.bench.measuring import measure_all
from edgekd.bench.result import result_row
from edgekd.bench.subjects import Subject
from edgekd.bench.systems import Member, System
from edgekd.checkpoint import detector_file, load_detector
from edgekd.cli.bench_entries import bench_config
from edgekd.detectors.base import Detector, DetectorOutput
from edgekd.predictor import Predictor
from edgekd.runtimes.outputs import OutputFormat
from edgekd.runtimes.tensorrt_runtime import GpuTimes
from edgekd.runtimes.torch_runtime import TorchRuntime
from edgekd.training.setup import uses_gpu
from edgekd.types import FloatArray

VARIANTS = {"eager fp32": (False, False), "eager fp16": (True, False)}
VARIANTS |= {"compiled fp32": (False, True), "compiled fp16": (True, True)}
"""Name to (half precision, torch.compile with CUDA graphs)."""


def latency_torch(options: argparse.Namespace, record: Record) -> None:
    """The student's checkpoint in torch; one variant after the other, each put down as soon as it is measured."""
    on_gpu = uses_gpu(options.device)
    place = ("cuda" if options.device == "auto" else options.device) if on_gpu else "cpu"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as in the fp32 engines
    record.set(device=torch.cuda.get_device_name() if on_gpu else "cpu", torch=torch.__version__)
    file = detector_file(options.student)
    for name, (half, compiled) in VARIANTS.items():
        if not on_gpu and (half or compiled):
            record.add("rows", {"name": f"torch {name}", "reason": "no CUDA: only eager fp32 runs on a CPU"})
            continue
        try:
            detector = load_detector(file)
            runtime = GpuTorch(detector, place, half, compiled) if on_gpu else TorchRuntime(detector, place)
            record.add("rows", _row(options, f"torch {name}", file, runtime, "fp16" if half else "fp32"))
        except Exception as error:  # a compiler fails in its own ways, and the others are still worth having
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            record.add("rows", {"name": f"torch {name}", "reason": reason})
    if all("reason" in row for row in record.data["rows"]):
        record.end("failed", record.data["rows"][0]["reason"])


def _row(options: argparse.Namespace, name: str, file: Path, runtime: TorchRuntime, precision: str) -> dict[str, Any]:
    dataset = _measured_on(options)
    assert runtime.detector is not None
    spec = runtime.detector.spec
    form = OutputFormat("boxes-scores", ("boxes", "scores"), len(spec.class_names))
    predictor = Predictor(name, spec.class_names, spec.preprocess, runtime, form, facts={"path": str(file)})
    config = bench_config(samples=options.samples, seconds=options.seconds)
    subject = Subject(
        name,
        "student_distilled",
        file.name,
        System(predictor.with_classes(dataset.class_names), [runtime]),
        (Member(name, predictor, None),),
        describe_artifact(file),
        [],
        torch.get_num_threads(),
    )
    plan = MeasurementPlan(config.samples, config.seconds, warmup_seconds=config.warmup_seconds)
    tell: Any = lambda stage, done, total: None  # noqa: E731
    opener: Any = None  # asked only for throughput
    found = measure_all([subject], opener, dataset, config, plan, None, False, options.energy_seconds, tell)
    accuracy = evaluate(dataset.records, found.answers[0], dataset.class_names)
    identity = {"name": name, "role": subject.role, "runtime": runtime.name, "provider": runtime.provider}
    row = result_row(identity, subject.facts, accuracy, found.latencies[0], None)
    energy = found.energies[0]
    return {
        **{key: value for key, value in row.items() if key != "precision_at_recall"},
        "precision": precision,
        "energy": energy,
        "conditions": found.conditions,
    }


class GpuTorch(TorchRuntime):
    """A detector on a GPU with page-locked host memory on both sides, as an engine has it, and with the GPU's clock.

    Args:
        half: the network in float16; boxes and scores are decoded in float32.
        compiled: by torch.compile, replayed as CUDA graphs.
    """

    def __init__(self, detector: Detector, device: str, half: bool, compiled: bool) -> None:
        super().__init__(detector, device)
        network = copy.deepcopy(detector).half() if half else detector

        def answer(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            output = network(images.half() if half else images)
            parts = (output.cls_logits, output.bbox_regression, output.objectness)
            return detector.decode(DetectorOutput(*(None if part is None else part.float() for part in parts)))

        self._answer: Any = torch.compile(answer, mode="reduce-overhead") if compiled else answer
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        self._host = torch.empty(self.input_shape, pin_memory=True)
        self._out: dict[str, torch.Tensor] = {}
        self.device_times = False

    def run(self, images: FloatArray) -> Mapping[str, Any]:
        """One inference: (1, 3, H, W) float32; the arrays are valid until the next call."""
        self._host.copy_(torch.from_numpy(images))
        with torch.inference_mode():
            self._events[0].record()
            given = self._host.to(self.provider, non_blocking=True)
            self._events[1].record()
            found = dict(zip(self.output_names, self._answer(given), strict=True))
            self._events[2].record()
            for name, value in found.items():
                if name not in self._out:
                    self._out[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                self._out[name].copy_(value, non_blocking=True)
            self._events[3].record()
        self._events[3].synchronize()
        return {name: value.numpy() for name, value in self._out.items()}

    def gpu_times(self) -> GpuTimes:
        """GPU time of the latest inference."""
        start, copied, computed, done = self._events
        return GpuTimes(start.elapsed_time(copied), copied.elapsed_time(computed), computed.elapsed_time(done))
