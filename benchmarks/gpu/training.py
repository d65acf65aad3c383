"""How fast students learn, whether the loader keeps up, and what whole recipes cost in GPU-hours."""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import Record

from edgekd.checkpoint import save_detector
from edgekd.console import Terminal
from edgekd.data import list_splits, read_dataset
from edgekd.data.images import load_image
from edgekd.data.loader import Batch
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.base import Detector
from edgekd.recipe import CheckpointTeacher, ModelConfig, Recipe, TeacherConfig, TrainConfig, TrainedTeacher
from edgekd.recipe_file import load_recipe
from edgekd.teachers import build_teacher
from edgekd.teachers.ensemble import Ensemble
from edgekd.teachers.predicted import PredictorTeacher
from edgekd.teaching import record_views, teacher_identity
from edgekd.training.distill import Answers, Distiller, TeacherSet, fuse_answers
from edgekd.training.setup import uses_gpu
from edgekd.training.train import (  # the very step of `edgekd train`, which no other function runs alone
    TrainJob,
    _Trainer,
)
from edgekd.types import ImageRecord, SoftDetections
from edgekd.workspace import Workspace

HELD_BATCHES = 8
WARM_STEPS = 5
ANSWERED = 16
RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes" / "methods"


def training(options: argparse.Namespace, record: Record) -> None:
    """For each recipe: seconds a step of the student alone, with its teachers, and of each teacher that it trains."""
    on_gpu = uses_gpu(options.device)
    record.set(device=torch.cuda.get_device_name() if on_gpu else "cpu", torch=torch.__version__)
    if not on_gpu:
        record.set(notes=["no CUDA here: these are this CPU's rates, and its hours are no GPU-hours"])
    paths = options.recipes if options.recipes is not None else sorted(RECIPES.glob("*.yaml"))
    known: dict[str, dict[str, Any]] = {}
    for path in paths:
        with tempfile.TemporaryDirectory(prefix="edgekd-gpu-") as folder:
            try:
                record.add("recipes", _recipe(options, path, Path(folder), known))
            except Exception as error:  # one recipe's trouble is not the others'
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                record.add("recipes", {"name": path.stem, "reason": reason})
    if record.data.get("recipes") and all("reason" in row for row in record.data["recipes"]):
        record.end("failed", record.data["recipes"][0]["reason"])


def _recipe(options: argparse.Namespace, path: Path, folder: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One recipe's rates and hours; trainings that it shares with an earlier one (`known`) are not timed again."""
    recipe = _without_weights(load_recipe(path, [f"data.root={options.data}"], needs=("data", "student", "teachers")))
    whole = len(read_dataset(recipe.data.root, _train_split(recipe), format=recipe.data.format))
    images = options.recipe_images or whole
    dataset = read_dataset(recipe.data.root, _train_split(recipe), format=recipe.data.format, limit=options.step_images)
    device = options.device
    if device == "auto":
        device = "cuda" if uses_gpu(device) else "cpu"
    work = Workspace(recipe, dataset, dataset, device, Terminal(quiet=True))

    def timed(label: str, model: ModelConfig, settings: TrainConfig, **more: Any) -> dict[str, Any]:
        key = "" if more else repr((model, settings, recipe.augment))
        if key not in known or more:
            job = _job(work, model, settings, folder / label, **more)
            known[key] = rates(job, options.step_seconds)
        return {"name": label, **known[key], "hours": _hours(known[key]["s_per_step"], settings, images)}

    alone = timed("student alone", recipe.student, recipe.train)
    trained = [one for one in recipe.teachers if isinstance(one, TrainedTeacher)]
    teachers = [timed(one.name, one.train, one.settings or recipe.train) for one in trained]
    asked: list[float] = []
    distilled = timed(
        "distilled", recipe.student, recipe.train, make_distiller=_distiller_of(work, folder, asked), weighted=True
    )
    answers_h = sum(asked) * images / 3600
    hours = sum(row["hours"] for row in (alone, distilled, *teachers)) + answers_h
    return {
        "name": recipe.name,
        "batch_size": recipe.train.batch_size,
        "epochs": recipe.train.epochs,
        "images": images,
        "timed_on": len(dataset),
        "trainings": [alone, *teachers, distilled],
        "answers_hours": round(answers_h, 4),
        "hours": round(hours, 3),
    }


def _train_split(recipe: Recipe) -> str:
    """The recipe's, or `trainval` where a data set has no other."""
    there = list_splits(recipe.data.root, recipe.data.format)
    return recipe.data.train if recipe.data.train in there or "trainval" not in there else "trainval"


def _without_weights(recipe: Recipe) -> Recipe:
    """Untrained: the arithmetic is the same, and nothing needs fetching."""
    bare = {"weights": None}
    teachers: list[TeacherConfig] = [
        one.model_copy(update={"train": one.train.model_copy(update=bare)}) if isinstance(one, TrainedTeacher) else one
        for one in recipe.teachers
    ]
    return recipe.model_copy(update={"student": recipe.student.model_copy(update=bare), "teachers": tuple(teachers)})


def _job(
    work: Workspace,
    model: ModelConfig,
    settings: TrainConfig,
    out: Path,
    make_distiller: Callable[[Detector], Distiller] | None = None,
    weighted: bool = False,
) -> TrainJob:
    recipe = work.recipe
    return TrainJob(
        dataset=work.train,
        val=None,
        model=model,
        train=settings,
        augment=recipe.augment,
        data=recipe.data,
        out=out,
        seed=recipe.seed,
        inputs={},
        device=work.device,
        make_distiller=make_distiller,
        detection_weight=recipe.distill.detection_weight if weighted else 1.0,
    )


def _distiller_of(work: Workspace, folder: Path, asked: list[float]) -> Callable[[Detector], Distiller]:
    """As `edgekd distill` makes it, but that teachers it would train are untrained, and answer whole images with the
    ground truth, as good ones would; the seconds that each really takes for an image go into `asked`.
    """
    recipe, records = work.recipe, work.train.records
    ready = [_untrained(work, one, folder) if isinstance(one, TrainedTeacher) else one for one in recipe.teachers]

    def make(student: Detector) -> Distiller:
        built = [build_teacher(one, work.train.class_names, device=work.device) for one in ready]
        ensemble = Ensemble(built, recipe.ensemble)
        teachers = TeacherSet(tuple(built), ensemble.weights, ensemble.fuse)
        if recipe.distill.answers != "online":
            asked.extend(_seconds_of(teacher, records) for teacher in built)
            known = {record.image_id: _truth(record, len(work.train.class_names)) for record in records}
            every: tuple[Answers, ...] = tuple(known for _ in built)
            teachers = replace(teachers, answers=every, fused_answers=fuse_answers(every, ensemble.fuse))
        distiller = Distiller(student, teachers, recipe.distill)
        if recipe.distill.cache is not None:
            record_views(work, distiller, [teacher_identity(one) for one in ready], folder / "views")
        return distiller

    return make


def _untrained(work: Workspace, config: TrainedTeacher, folder: Path) -> CheckpointTeacher:
    file = folder / config.name / "model.pt"
    save_detector(file, build_detector(spec_for(config.train, work.train.class_names)).eval(), {})
    return CheckpointTeacher(name=config.name, checkpoint=str(file), weight=config.weight)


def _truth(record: ImageRecord, classes: int) -> SoftDetections:
    probs = np.full((len(record.labels), classes), 0.1 / classes, np.float32)
    probs[np.arange(len(record.labels)), record.labels] += 0.9
    return SoftDetections(record.boxes_xyxy.astype(np.float32), probs)


def _seconds_of(teacher: PredictorTeacher, records: Sequence[ImageRecord]) -> float:
    """Of one answer, from the file on; the first, which warms up, apart."""
    images = records[: ANSWERED + 1]
    teacher.answer(load_image(images[0].path))
    started = time.perf_counter()
    for record in images[1:]:
        teacher.answer(load_image(record.path))
    return (time.perf_counter() - started) / max(1, len(images) - 1)


def rates(job: TrainJob, seconds: float) -> dict[str, Any]:
    """Images a second of the loader alone, of steps on batches that lie on the device, and of both together.

    The loader is what holds a training back where both together are slower than the steps alone.
    """
    trainer = _Trainer(job)
    trainer.learner.train()
    if trainer.learner.distiller is not None:
        for entry in trainer.learner.distiller.terms:
            entry.term.begin_epoch(0, job.train.epochs)
    try:
        size = job.train.batch_size
        first = _rate(trainer.loader.epoch(0), lambda batch: None, seconds, size)  # decoding every file
        coming = _endless(trainer)
        held = [batch.to(trainer.fabric.device) for batch in itertools.islice(coming, HELD_BATCHES)]

        def step(batch: Batch) -> None:
            trainer._step(batch, 0, True)
            trainer.progress.step += 1

        for batch in itertools.islice(itertools.cycle(held), WARM_STEPS):
            step(batch)
        found = {
            "loader_first_epoch": first,
            "loader": _rate(coming, lambda batch: None, seconds / 2, size),
            "step": _rate(itertools.cycle(held), step, seconds, size),
            "both": _rate(coming, step, seconds, size),
        }
        coming.close()
        precision = trainer._precision()
    finally:
        trainer.loader.close()
    return {
        "model": job.model.model,
        "precision": precision,
        "images_per_s": {name: float(f"{rate:.4g}") for name, rate in found.items()},
        "s_per_step": float(f"{size / found['both']:.4g}"),
        "loader_bound": found["both"] < 0.9 * found["step"],
        "peak_gpu_bytes": _peak(),
    }


def _endless(trainer: Any) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from trainer.loader.epoch(epoch % trainer.cfg.epochs)


def _rate(batches: Iterable[Batch], use: Callable[[Batch], None], seconds: float, size: int) -> float:
    """Images a second over so many seconds at least, or as long as there are batches; the GPU is waited for."""
    count, started = 0, time.perf_counter()
    for batch in batches:
        use(batch)
        count += 1
        if time.perf_counter() - started >= seconds:
            break
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count * size / (time.perf_counter() - started)


def _peak() -> int | None:
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _hours(s_per_step: float, settings: TrainConfig, images: int) -> float:
    """Of all steps; evaluations and what a term does once an epoch are not in it."""
    return round(s_per_step * settings.epochs * max(1, images // settings.batch_size) / 3600, 4)
