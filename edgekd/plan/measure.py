"""Measuring untrained candidates: exported as students are, then timed here from image to detections, or on a device.

What a network answers does not change how long it takes, so nothing is trained. Selection is the exception: an untrained
head scores everything alike. The threshold is set to let as many candidates pass as NMS takes at most, which is what a
trained head fills at the 0.001 of `edgekd bench`; at a higher threshold a student is a little faster than planned.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekd.bench.affinity import opencv_threads
from edgekd.bench.complexity import describe_artifact
from edgekd.bench.roof import bytes_moved, cpu_roof
from edgekd.device.roof import share_of_roof
from edgekd.errors import EdgeKDError
from edgekd.export.images import PreparedImages
from edgekd.plan.candidates import Candidate, Shape
from edgekd.postprocess import PRE_NMS_TOP_K
from edgekd.recipe import ExportConfig
from edgekd.types import ImageArray

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekd.device.target import Target

Row = dict[str, Any]
Layout = Literal["x86", "tensorrt"]

_CALIBRATION_IMAGES = 8
_NMS_IOU = 0.5


@dataclass
class Exporter:
    """Writes untrained candidates as ONNX files; a shape is traced once for all its precisions.

    Attributes:
        images: files to calibrate int8 on. layout: of int8.
    """

    class_names: tuple[str, ...]
    images: Sequence[Path]
    layout: Layout
    folder: Path
    _traced: dict[Shape, Path] = field(default_factory=dict)

    def write(self, candidate: Candidate) -> Path:
        """The candidate's file.

        Raises:
            ExportError: it cannot be exported.
        """
        import onnx

        from edgekd.export.onnx import write_model
        from edgekd.export.precision import convert

        out = self.folder / f"{candidate.name}.onnx"
        if candidate.shape not in self._traced:
            file = self.folder / f"{candidate.shape.name}.traced.onnx"
            self._traced[candidate.shape] = write_model(self._trace(candidate.shape), file)
        model = onnx.load(str(self._traced[candidate.shape]))
        calibration: Sequence[Any] = ()
        if candidate.precision == "int8":
            calibration = PreparedImages(self.images[:_CALIBRATION_IMAGES], self._spec(candidate.shape).preprocess)
        return write_model(convert(model, candidate.precision, ExportConfig(target=self.layout), calibration), out)

    def _spec(self, shape: Shape) -> Any:
        from edgekd.detectors import spec_for

        return spec_for(shape.config, self.class_names)

    def _trace(self, shape: Shape) -> ModelProto:
        import torch

        from edgekd.detectors import build_detector
        from edgekd.export.onnx import describe, trace
        from edgekd.selection import Selection

        torch.manual_seed(0)
        detector = build_detector(self._spec(shape)).eval()
        model = trace(detector)
        facts = {"untrained": True}
        describe(model, detector, precision="fp32", target=self.layout, thresholds=Selection(), facts=facts)
        return model


@dataclass
class Here:
    """Candidates on this machine's processor, end to end.

    Attributes:
        images: decoded (H, W, 3) uint8 RGB. samples: timed images each.
    """

    exporter: Exporter
    images: Sequence[ImageArray]
    threads: int | None
    samples: int = 60
    warmup_s: float = 0.3

    def measure(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Row]]:
        """One after the other."""
        for candidate in candidates:
            try:
                yield candidate, self._row(candidate, self.exporter.write(candidate))
            except EdgeKDError as error:
                yield candidate, _failed(candidate, error)

    def _row(self, candidate: Candidate, file: Path) -> Row:
        from edgekd.bench.latency import MeasurementPlan, measure
        from edgekd.bench.systems import System
        from edgekd.predictor import load_predictor

        with load_predictor(file, threads=self.threads, nms_iou=_NMS_IOU) as predictor, opencv_threads(self.threads):
            scores = predictor.candidates(predictor.infer(predictor.prepare(self.images[0])[0]))[1].ravel()
            threshold = float(np.sort(scores)[-1 - min(PRE_NMS_TOP_K, scores.size - 1)])
            plan = MeasurementPlan(self.samples, warmup_seconds=self.warmup_s)
            [timed] = measure([System(predictor.with_selection(score_threshold=threshold))], self.images, plan)
        pre, infer, post = (round(float(np.median(timed.stages_ms[..., stage])), 3) for stage in range(3))
        total = timed.total_ms
        row = _row(candidate, file, infer, cpu_roof(self.threads))
        row["latency_ms"] = {
            "median": round(float(np.median(total)), 3),
            "p90": round(float(np.percentile(total, 90)), 3),
            "samples": int(total.size),
        }
        row["stages_ms"] = {"pre": pre, "infer": infer, "post": post}
        return row


@dataclass
class There:
    """Candidates on a device that is reached by ssh: inference, since image preparation and NMS do not run there.

    Attributes:
        host_ms: added to each for preparation and NMS. arguments: of the bundle's bench.py.
    """

    exporter: Exporter
    target: Target
    host_ms: float
    arguments: Sequence[str]
    limit_s: float
    say: Callable[[str], None]

    def measure(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Row]]:
        """All in one bundle."""
        from edgekd.bench.entries import BenchArtifact
        from edgekd.device.bundle import make_bundle
        from edgekd.device.target import bench_on_target

        files: dict[str, tuple[Candidate, Path]] = {}
        for candidate in candidates:
            try:
                files[candidate.name] = candidate, self.exporter.write(candidate)
            except EdgeKDError as error:
                yield candidate, _failed(candidate, error)
        if not files:
            return
        entries = [BenchArtifact(file, name) for name, (_, file) in files.items()]
        with tempfile.TemporaryDirectory(prefix="edgekd-plan-") as folder:
            made = make_bundle(entries, Path(folder) / "bundle")
            result = bench_on_target(
                made.folder, self.target, arguments=self.arguments, limit_s=self.limit_s, say=self.say
            )
        for found in result["rows"]:
            if found["name"] in files:
                candidate, file = files[found["name"]]
                yield candidate, self._row(candidate, file, found)

    def _row(self, candidate: Candidate, file: Path, found: Row) -> Row:
        latency = found["latency_ms"]
        row = _row(candidate, file, latency["median"], None)
        row["roof"] = found.get("roof") or row["roof"]
        row["latency_ms"] = {
            "median": round(latency["median"] + self.host_ms, 3),
            "p90": round(latency["p90"] + self.host_ms, 3),
            "samples": latency["samples"],
        }
        row["stages_ms"] = {"pre": None, "infer": latency["median"], "post": None}
        row["device"] = {"runtime": found["runtime"], "provider": found["provider"]}
        return row


def _row(candidate: Candidate, file: Path, infer_ms: float, machine: Any) -> Row:
    shape = candidate.shape
    facts = describe_artifact(file)
    roof = share_of_roof(machine, candidate.precision, facts.macs, bytes_moved(file), infer_ms)
    return {
        "name": candidate.name,
        "model": shape.model,
        "width": shape.width,
        "input_size": shape.input_size,
        "precision": candidate.precision,
        "macs": facts.macs,
        "parameters": facts.parameters,
        "size_bytes": facts.size_bytes,
        "roof": roof,
    }


def _failed(candidate: Candidate, error: EdgeKDError) -> Row:
    return {"name": candidate.name, "failed": str(error)}
