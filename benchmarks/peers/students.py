"""edgekd's student under measurement: a trained one, or one of the same shape without training; as ONNX, fp32 and int8."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import edgekd.export
from edgekd.artifact import sha256_file, sha256_json
from edgekd.checkpoint import load_detector
from edgekd.data.images import decode_image
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.base import Detector
from edgekd.export.graph import copy_of
from edgekd.export.onnx import Precision, describe, detections_form, trace, write_model
from edgekd.export.precision import convert
from edgekd.preprocess import prepare
from edgekd.recipe import ExportConfig, ModelConfig
from edgekd.selection import Selection

FAMILY = "mobilenetv2-ssd-lite"
CALIBRATION_IMAGES = 32


@dataclass(frozen=True)
class Student:
    """A student at one input size.

    Attributes:
        detector: in torch. fp32, int8, finished: its ONNX files; `finished` is fp32 with NMS in the graph.
    """

    detector: Detector
    trained: bool
    fp32: Path
    int8: Path
    finished: Path


def load(checkpoint: Path | None, size: int | None, class_names: Sequence[str]) -> Detector:
    """A trained detector, at another input size if asked; without a checkpoint an untrained one over `class_names`."""
    if checkpoint is None:
        torch.manual_seed(0)
        return build_detector(spec_for(ModelConfig(model=FAMILY, input_size=size or 320), class_names)).eval()
    detector = load_detector(checkpoint)
    if size is None or detector.spec.preprocess.input_hw == (size, size):
        return detector
    spec = replace(detector.spec, preprocess=replace(detector.spec.preprocess, input_hw=(size, size)))
    other = build_detector(spec)
    other.load_state_dict(detector.state_dict())
    return other.eval()


def export(detector: Detector, trained: bool, folder: Path, thresholds: Selection, images: Sequence[bytes]) -> Student:
    """The ONNX files of a student; files of the same weights and the same exporter are used again."""
    size = detector.spec.preprocess.input_hw[0]
    weights = {name: float(value.double().sum()) for name, value in detector.state_dict().items()}
    facts = {"spec": detector.spec.to_dict(), "weights": weights, "thresholds": thresholds.to_dict()}
    exporter = [sha256_file(file) for file in sorted(Path(edgekd.export.__file__).parent.glob("*.py"))]
    key = sha256_json(json.loads(json.dumps([facts, exporter, len(images)])))[:10]
    stem = f"{detector.spec.model}-{size}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}.{kind}.onnx" for kind in ("fp32", "int8", "finished")]
    calibration = [prepare(decode_image(data), detector.spec.preprocess)[0] for data in images[:CALIBRATION_IMAGES]]
    if not all(file.is_file() for file in files):
        print(f"  exporting {stem}", file=sys.stderr)
        traced, config = trace(detector), ExportConfig()
        precisions: list[Precision] = ["fp32", "int8", "fp32"]
        for file, precision in zip(files, precisions, strict=True):
            model, finished = copy_of(traced), file == files[-1]
            used = thresholds if finished else Selection()
            describe(model, detector, precision=precision, target=config.target, thresholds=used)
            model = convert(model, precision, config, calibration)
            write_model(detections_form(model, used) if finished else model, file)
    return Student(detector, trained, *files)
