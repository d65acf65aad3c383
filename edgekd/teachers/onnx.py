"""Any detector in an ONNX file as a teacher: a black box, with inner tensors as taps where they are declared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edgekd.detectors.base import TapSpec
from edgekd.predictor import Predictor
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.onnx_file import open_onnx
from edgekd.runtimes.ort import has_provider
from edgekd.teachers.predicted import PredictorTeacher


def onnx_teacher(config: OnnxTeacher, class_names: Sequence[str], device: str) -> PredictorTeacher:
    """The teacher in an ONNX file.

    Raises:
        ArtifactError: missing, damaged, or not a detector. UserError: something must be declared.
        ClassMapError: its classes are none of the student's. MissingDependencyError: ONNX Runtime is not there.
    """
    # A GPU build of ONNX Runtime is a separate package: without it, the teacher runs on the CPU and says so.
    provider = "cuda" if device.startswith("cuda") and has_provider("cuda") else "cpu"
    opened = open_onnx(Path(os.path.expanduser(config.onnx)), config, provider=provider)
    predictor = Predictor(
        config.name, opened.class_names, opened.preprocess, opened.runtime, opened.form, facts=opened.facts
    )
    taps = {name: TapSpec(name, "neck", channels, grid) for name, (channels, grid) in opened.tap_grids.items()}
    return PredictorTeacher(
        config.name, predictor, class_names, config.class_map, tap_specs=taps, tap_tensors=opened.tap_tensors
    )
