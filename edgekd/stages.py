"""The stages of a recipe that train: a teacher, the student alone, the student with its teachers.

What decides a stage's result (model, training settings, the images and boxes themselves, seed, teachers by content) goes
into its manifest's inputs; what does not (paths, worker counts, cache sizes) stays out, so that moving a data set or
using another machine repeats nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekd import ranks
from edgekd.artifact import is_current, sha256_file
from edgekd.detectors.base import Detector
from edgekd.detectors.prior_fit import prior_advice
from edgekd.recipe import CheckpointTeacher, DistillConfig, ModelConfig, TeacherConfig, TrainConfig, TrainedTeacher
from edgekd.recipe_file import write_recipe
from edgekd.selection import Selection
from edgekd.teaching import answering_identity, gather_teachers, hear_teachers, record_views
from edgekd.training.distill import Distiller
from edgekd.training.state import holds_another
from edgekd.training.train import RunResult, TrainJob, train_detector
from edgekd.workspace import Workspace


def train_student(work: Workspace, out: Path) -> RunResult:
    """The student on ground truth alone."""
    return _train(work, student_job(work, out), f"{work.recipe.student.model}")


def train_teacher(work: Workspace, config: TrainedTeacher, out: Path) -> RunResult:
    """A native teacher that the recipe has trained."""
    return _train(work, teacher_job(work, config, out), f"{config.name} ({config.train.model})")


def ready_teachers(work: Workspace, folder: Path) -> list[TeacherConfig]:
    """The recipe's teachers with those that are to be trained trained, in `folder`/NAME, and turned into checkpoints."""
    for config in work.recipe.teachers:
        if isinstance(config, TrainedTeacher):
            train_teacher(work, config, folder / config.name)
        else:
            work.terminal.note(f"{config.name}: ready made")
    return as_checkpoints(work.recipe.teachers, folder)


def as_checkpoints(teachers: Sequence[TeacherConfig], folder: Path) -> list[TeacherConfig]:
    """Teachers as they are read once those that are to be trained are there, in `folder`/NAME."""
    return [
        CheckpointTeacher(name=config.name, checkpoint=str(folder / config.name), weight=config.weight)
        if isinstance(config, TrainedTeacher)
        else config
        for config in teachers
    ]


def distill_student(work: Workspace, teachers: Sequence[TeacherConfig], out: Path, *, answers: Path) -> RunResult:
    """The student with its teachers; their answers to the training images are kept in `answers`/NAME."""
    job = distilled_job(work, teachers, out, answers=answers)
    return _train(work, job, f"{work.recipe.student.model}, distilled")


def student_job(work: Workspace, out: Path) -> TrainJob:
    """What decides the student alone."""
    return _job(work, work.recipe.student, work.recipe.train, out, work.recipe.seed)


def teacher_job(work: Workspace, config: TrainedTeacher, out: Path) -> TrainJob:
    """What decides a teacher that the recipe has trained."""
    seed = work.recipe.seed if config.seed is None else config.seed
    return _job(work, config.train, config.settings or work.recipe.train, out, seed)


def distilled_job(work: Workspace, teachers: Sequence[TeacherConfig], out: Path, *, answers: Path) -> TrainJob:
    """What decides the distilled student; the teachers' files are read for it."""
    recipe = work.recipe
    identities = [answering_identity(recipe, config) for config in teachers]
    distillation = {
        "distill": _distillation_identity(recipe.distill),
        "ensemble": recipe.ensemble.model_dump(mode="json"),
        "teachers": [{**one, "weight": config.weight} for one, config in zip(identities, teachers, strict=True)],
    }
    job = _job(work, recipe.student, recipe.train, out, recipe.seed, distillation)

    def make_distiller(student: Detector) -> Distiller:
        distiller = Distiller(student, gather_teachers(work, teachers, identities, answers), recipe.distill)
        hear_teachers(work, distiller, identities, answers)
        if recipe.distill.cache is not None:
            record_views(work, distiller, identities, answers.parent / "views")
        return distiller

    return replace(job, make_distiller=make_distiller, detection_weight=recipe.distill.detection_weight)


def is_trained(job: TrainJob) -> bool:
    """Whether the run is there, finished and from the same inputs."""
    return is_current(job.out, "run", job.inputs)


def _job(
    work: Workspace,
    model: ModelConfig,
    settings: TrainConfig,
    out: Path,
    seed: int,
    distillation: Mapping[str, Any] | None = None,
) -> TrainJob:
    inputs: dict[str, Any] = {
        "model": model.model_dump(mode="json", exclude={"weights"}),
        "weights": _weights_identity(model.weights),
        "train": settings.model_dump(mode="json"),
        "augment": work.recipe.augment.model_dump(mode="json"),
        "data": work.data_identity,
        "seed": seed,
        **(distillation or {}),
    }
    return TrainJob(
        dataset=work.train,
        val=work.val,
        model=model,
        train=settings,
        augment=work.recipe.augment,
        data=work.recipe.data,
        out=out,
        seed=seed,
        inputs=inputs,
        device=work.device,
        selection=Selection.of(work.recipe.bench),
    )


def _distillation_identity(config: DistillConfig) -> dict[str, Any]:
    """What decides the result: of a cache only which views there are, not where and whether they are kept."""
    identity: dict[str, Any] = config.model_dump(mode="json", exclude={"cache"})
    if config.cache is not None:
        identity["cache"] = {"views": config.cache.views, "seed": config.cache.seed}
    return identity


def _weights_identity(weights: str | None) -> str | None:
    return sha256_file(Path(weights)) if weights is not None and Path(weights).is_file() else weights


def _train(work: Workspace, job: TrainJob, label: str) -> RunResult:
    if work.replaced is not None and holds_another(job.out, job.inputs):
        _set_aside(work, job.out)
    if ranks.rank() == 0 and not is_trained(job):
        advice = prior_advice(job.model, job.dataset.class_names, job.dataset.records)
        if advice is not None:
            work.terminal.warn(f"{label}: {advice}")
    with work.terminal.training(label) as listener:
        result = train_detector(job, listener)
    accuracy = result.metrics.get("ap50")
    figures = "" if accuracy is None else f", AP50 {accuracy:.3f}"
    work.terminal.note(f"{label}: {'unchanged' if result.skipped else 'trained'}{figures}")
    # Beside the run, so that its export finds images to calibrate and to compare on without being told.
    if ranks.rank() == 0:
        write_recipe(work.recipe, job.out)
    return result


def _set_aside(work: Workspace, folder: Path) -> None:
    assert work.replaced is not None
    work.replaced.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := work.replaced / f"{folder.name}-{number}").exists():
        number += 1
    folder.rename(target)
    work.terminal.note(f"{folder.name} was made from other inputs: it is now {target}")
