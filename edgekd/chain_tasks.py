"""What of a chain can go side by side: its trainings and exports, each with what it needs, as far as they are not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edgekd.artifact import Manifest, read_manifest, sha256_file, sha256_json, write_manifest
from edgekd.checkpoint import detector_file
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.prior_fit import fitted_spec
from edgekd.errors import EdgeKDError
from edgekd.export import ExportData, export_run
from edgekd.export.onnx import Precision
from edgekd.recipe import CheckpointTeacher, Recipe, TeacherConfig, TrainedTeacher
from edgekd.selection import Selection
from edgekd.side_by_side import Task
from edgekd.stages import (
    as_checkpoints,
    distill_student,
    distilled_job,
    is_trained,
    student_job,
    teacher_job,
    train_student,
    train_teacher,
)
from edgekd.teaching import ask_ahead
from edgekd.training.setup import fills_one_thread
from edgekd.workspace import Workspace


def chain_tasks(work: Workspace, out: Path, exports: Exports, *, asks_of_images: bool) -> list[Task]:
    """The trainings and exports that are still to be done, or to be done again since their inputs have changed.

    With `asks_of_images`, each teacher that is trained is asked about the training images as soon as it is.

    A distillation that gains from all cores waits for them: it begins when the student alone has been trained, and exports
    wait for it. A small one shares them with the student alone and the first exports.
    """
    recipe = work.recipe
    teachers = as_checkpoints(recipe.teachers, out / "teachers")
    untrained = [
        (config, ready)
        for config, ready in zip(recipe.teachers, teachers, strict=True)
        if isinstance(config, TrainedTeacher)
        and not is_trained(teacher_job(work, config, out / "teachers" / config.name))
    ]
    alone = not is_trained(student_job(work, out / "student"))
    distilled = bool(untrained) or not is_trained(
        distilled_job(work, teachers, out / "distilled", answers=out / "answers")
    )
    asked = distilled and asks_of_images
    tasks = [
        Task(ready.name, partial(_teacher, config=config, ready=ready if asked else None, out=out))
        for config, ready in untrained
    ]
    shares = _distils_on_one_thread(work)
    if distilled:
        needs = [config.name for config, _ in untrained] + ([] if shares else [_ALONE])
        tasks.append(Task(_DISTILLED, partial(_distil, teachers=teachers, out=out), tuple(needs)))
    if alone:
        tasks.append(Task(_ALONE, partial(_train_alone, out=out)))
    changed = {task.name for task in tasks}
    for one in wanted_exports(recipe, teachers, out):
        if one.task in changed or not exports.is_current(work, one):
            tasks.append(Task(one.file, one.make, (one.task,) if shares else (one.task, _DISTILLED)))
    return tasks


_ALONE, _DISTILLED = "the student alone", "the distilled student"


def _distils_on_one_thread(work: Workspace) -> bool:
    spec = fitted_spec(spec_for(work.recipe.student, work.train.class_names), work.train.records)
    return fills_one_thread(build_detector(spec), work.recipe.train.batch_size)


def _teacher(work: Workspace, config: TrainedTeacher, ready: TeacherConfig | None, out: Path) -> None:
    train_teacher(work, config, out / "teachers" / config.name)
    if isinstance(ready, CheckpointTeacher):
        ask_ahead(work, ready, out / "answers")


def _train_alone(work: Workspace, out: Path) -> None:
    train_student(work, out / "student")


def _distil(work: Workspace, teachers: Sequence[TeacherConfig], out: Path) -> None:
    distill_student(work, teachers, out / "distilled", answers=out / "answers")


# -- export ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """One file for the device.

    Attributes:
        name: of the model, as the benchmark's rows have it. task: that trains it, if any. source: its run's folder.
        path: of the file.
    """

    name: str
    task: str
    source: Path
    precision: Precision
    path: Path

    @property
    def file(self) -> str:
        """The file's name, unique in the chain."""
        return self.path.name

    def inputs(self, work: Workspace) -> dict[str, Any]:
        """What decides the file."""
        recipe = work.recipe
        return {
            "source": sha256_file(detector_file(self.source)),
            "precision": self.precision,
            "config": recipe.export.model_dump(mode="json", exclude={"precisions"}),
            "thresholds": Selection.of(recipe.bench).to_dict(),
            "data": work.data_identity,
        }

    def make(self, work: Workspace) -> dict[str, Any] | EdgeKDError:
        """Write the file; what decided it, or why it could not be made in a precision below fp32.

        Raises:
            EdgeKDError: fp32 could not be made, without which there is nothing to measure.
        """
        inputs = self.inputs(work)
        try:
            export_run(
                self.source,
                self.path,
                precision=self.precision,
                config=work.recipe.export,
                thresholds=Selection.of(work.recipe.bench),
                data=ExportData(work.train, work.val),
                say=lambda text: work.terminal.note(f"{self.file}: {text}"),
            )
        except EdgeKDError as error:
            if self.precision == "fp32":
                raise
            return error
        return inputs


def wanted_exports(recipe: Recipe, teachers: Sequence[TeacherConfig], out: Path) -> list[Export]:
    """Native teachers in fp32, since they are what students are compared with; both students as the recipe asks."""
    native = [(t.name, t.name, Path(t.checkpoint)) for t in teachers if isinstance(t, CheckpointTeacher)]
    students = (("student", _ALONE, out / "student"), ("distilled", _DISTILLED, out / "distilled"))
    fp32: Precision = "fp32"
    wanted = [(*model, fp32) for model in native]
    wanted += [(*model, precision) for model in students for precision in recipe.export.precisions]
    return [
        Export(name, task, source, precision, out / "export" / f"{name}.{precision}.onnx")
        for name, task, source, precision in wanted
    ]


@dataclass
class Exports:
    """The folder of exported files, with what each was made from, and what could not be made."""

    folder: Path
    failed: dict[str, EdgeKDError] = field(default_factory=dict)

    def is_current(self, work: Workspace, one: Export) -> bool:
        """Whether the file is there, intact and from the same inputs."""
        manifest = read_manifest(self.folder) if self.folder.is_dir() else None
        if manifest is None or not self._is_intact(manifest, one.file):
            return False
        return sha256_json(manifest.inputs.get(one.file)) == sha256_json(one.inputs(work))

    def note(self, file: str, result: Any) -> None:
        """Keep what came of a task: of an export, that is; anything else is kept by itself.

        What was said of the other files stays only where they are still the same: else a damaged one would be vouched for.
        """
        if isinstance(result, EdgeKDError):
            self.failed[file] = result
        elif isinstance(result, dict):
            manifest = read_manifest(self.folder)
            made = (
                {} if manifest is None else {n: i for n, i in manifest.inputs.items() if self._is_intact(manifest, n)}
            )
            made[file] = result
            write_manifest(self.folder, "onnx", made, sorted(made), {})

    def _is_intact(self, manifest: Manifest, file: str) -> bool:
        return (self.folder / file).is_file() and sha256_file(self.folder / file) == manifest.files.get(file)
