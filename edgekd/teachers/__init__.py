"""What can teach a student: native checkpoints, any ONNX file, any torch module, and ensembles of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgekd.errors import ClassMapError, DistillationSetupError
from edgekd.recipe import CheckpointTeacher, ModuleTeacher, OnnxTeacher, TeacherConfig, TorchvisionTeacher

if TYPE_CHECKING:
    from edgekd.teachers.predicted import PredictorTeacher

__all__ = ["build_teacher"]


def build_teacher(
    config: TeacherConfig, class_names: Sequence[str], *, device: str = "cpu", max_detections: int | None = None
) -> PredictorTeacher:
    """The teacher that a recipe describes, answering in the student's classes.

    Args:
        config: one entry of the recipe's `teachers`; paths as they are, already resolved.
        class_names: the student's.
        device: where native teachers and torch modules run, such as "cpu" or "cuda:0". ONNX files run on CUDA too when
            this is a CUDA device and ONNX Runtime can.
        max_detections: the best boxes that it answers an image with; the usual 100 if left out.

    Raises:
        ArtifactError: its file is missing or damaged. ClassMapError: its classes are none of the student's.
        MissingDependencyError: a package that it needs is not there. UserError: something must be declared.
        DistillationSetupError: the teacher has still to be trained.
    """
    try:
        teacher = _built(config, class_names, device)
    except ClassMapError as error:
        what = f"teacher {config.name!r}: {error.what}"
        raise ClassMapError(what, got=error.got, expected=error.expected, fix=error.fix) from error
    if max_detections is not None:
        teacher.answer_at_most(max_detections)
    return teacher


def _built(config: TeacherConfig, class_names: Sequence[str], device: str) -> PredictorTeacher:
    if isinstance(config, CheckpointTeacher):
        from edgekd.teachers.native import native_teacher

        return native_teacher(config, class_names, device)
    if isinstance(config, OnnxTeacher):
        from edgekd.teachers.onnx import onnx_teacher

        return onnx_teacher(config, class_names, device)
    if isinstance(config, ModuleTeacher):
        from edgekd.teachers.module import module_teacher

        return module_teacher(config, class_names, device)
    if isinstance(config, TorchvisionTeacher):
        from edgekd.teachers.torchvision import torchvision_teacher

        return torchvision_teacher(config, class_names, device)
    raise DistillationSetupError(
        f"teacher {config.name!r} has still to be trained",
        got=f"train: {config.train.model}",
        fix="`edgekd run` trains it first; or train it by itself and give `checkpoint: RUN_FOLDER` instead",
    )
