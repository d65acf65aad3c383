"""The student alone against the same student with each method, over seeds: is the gain real?

Everything but the method is held equal: schedule, data order, augmentation, seeds, images, teachers. Each run writes its own
result when it ends, so nothing is lost when a machine dies, and the same command goes on from there. Runs may be shared out
among processes and machines that see the same folder: each holds its own folder against the others.

    DIR/teachers/NAME/  answers/NAME/  alone/seed-N/  RECIPE/seed-N/{model.pt, ..., evaluation/}
        comparison.json  comparison.md  comparison.svg
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import MANIFEST_NAME, is_current, sha256_file, write_json, write_manifest, write_text
from edgekd.bench.accuracy import evaluate
from edgekd.bench.matching import match_coco
from edgekd.checkpoint import MODEL_FILE, load_detector
from edgekd.comparison import ALONE, Evaluated, summary, table_markdown
from edgekd.console import Terminal
from edgekd.data.image_cache import ResizedImages
from edgekd.errors import DataError, RecipeError, UserError
from edgekd.recipe import SEEDS, Recipe, TrainedTeacher
from edgekd.selection import Selection
from edgekd.side_by_side import Task, run_side_by_side, tasks_at_once
from edgekd.stages import distill_student, ready_teachers, train_student, train_teacher
from edgekd.teaching import check_setup
from edgekd.training.validate import detect_dataset
from edgekd.types import Detections
from edgekd.workspace import Workspace, has_objects, open_workspace

_EVALUATION = "evaluation"
"""Of a run: the folder with its detections on the validation images, and their accuracy."""


@dataclass(frozen=True)
class Run:
    """One training of the set: "alone" or a recipe's name, and a seed."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"


@dataclass(frozen=True)
class CompareJob:
    """A whole comparison, as it can be handed to another process.

    Attributes:
        recipes: alike but for their method. seeds: each once. out: the comparison's folder.
        bars: False where several processes write to one terminal.

    Raises:
        UserError: no recipes, repeated seeds or names.
        RecipeError: the recipes differ in more than their method.
    """

    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    out: Path
    device: str = "auto"
    quiet: bool = False
    bars: bool = True

    def __post_init__(self) -> None:
        _check(self.recipes, self.seeds)

    @property
    def runs(self) -> list[Run]:
        """Seed by seed, so that a table cut off early still compares like with like."""
        methods = [ALONE, *(recipe.name for recipe in self.recipes)]
        return [Run(method, seed) for seed in self.seeds for method in methods]

    @property
    def trained_teachers(self) -> dict[str, tuple[Recipe, TrainedTeacher]]:
        """The teachers that are to be trained, by name, with the first recipe that names each."""
        found: dict[str, tuple[Recipe, TrainedTeacher]] = {}
        for recipe in self.recipes:
            for config in recipe.teachers:
                if isinstance(config, TrainedTeacher):
                    found.setdefault(config.name, (recipe, config))
        return found

    def folder(self, run: Run) -> Path:
        """Where a run is."""
        return self.out / run.method / f"seed-{run.seed}"

    def recipe(self, run: Run) -> Recipe:
        """A run's recipe, without its seed."""
        return next((recipe for recipe in self.recipes if recipe.name == run.method), self.recipes[0])


@dataclass(frozen=True)
class Comparison:
    """What `comparison.json` holds, and the same as text."""

    folder: Path
    data: Mapping[str, Any]
    table: str


def compare(job: CompareJob, finished: Iterator[Run] | None = None, *, jobs: int | None = None) -> Comparison:
    """Train and evaluate every run that is not there yet, and compare.

    Args:
        finished: does the runs and tells of each when it is done; left out, they are done here.
        jobs: trainings at once, in processes of their own; None for as many as a CPU has cores and memory for.

    Raises:
        EdgeKDError: a teacher or a term cannot work, or there is nothing to measure on, said before anything is trained; or
            a run failed.
    """
    with open_workspace(job.recipes[0], job.out, device=job.device, quiet=job.quiet) as base:
        if not has_objects(base.val):
            raise DataError(
                f"{base.val.root}, split {base.val.split!r}: no object to be found, so that nothing can be compared",
                got=f"{len(base.val)} images",
                fix="name a labelled split in `data.val`; `edgekd data check` looks at all of them",
            )
        for recipe in job.recipes:
            check_setup(replace(base, recipe=recipe))
        found: dict[Run, Evaluated] = {}
        data: dict[str, Any] = {}

        def add(run: Run) -> None:
            nonlocal data
            found[run] = _read_evaluation(base, job, run)
            paired = [found[r] for r in job.runs if r in found and Run(ALONE, r.seed) in found]
            if any(one.method != ALONE for one in paired):
                data = summary(base, job.recipes, paired)
                write_json(job.out / "comparison.json", data)
                write_text(job.out / "comparison.md", table_markdown(data))

        if finished is None:
            at_once, tasks = tasks_at_once(base) if jobs is None else jobs, _tasks(job)
            if at_once > 1 and len(tasks) > 1:
                at_once = min(at_once, len(tasks))
                run_side_by_side(base, tasks, at_once, lambda _, run: None if run is None else add(run))
            finished = one_by_one(job, [run for run in job.runs if run not in found])
        for run in finished:
            add(run)
        from edgekd.report.gains import draw_comparison

        draw_comparison(data, job.out / "comparison.svg")
        return Comparison(job.out, data, table_markdown(data))


def _tasks(job: CompareJob) -> list[Task]:
    """The teachers that are not there and all runs, for processes of their own; none if every run is there.

    A run that is there is only looked at, but in its turn, so that the tables written on the way hold it.
    """
    if all((job.folder(run) / _EVALUATION / MANIFEST_NAME).is_file() for run in job.runs):
        return []
    job = replace(job, bars=False)
    teachers = [
        Task(f"teacher {name}", partial(_teacher_task, job=job, name=name))
        for name in job.trained_teachers
        if not (job.out / "teachers" / name / MANIFEST_NAME).is_file()
    ]
    names = tuple(task.name for task in teachers)
    return teachers + [
        Task(str(run), partial(_run_task, job=job, run=run), () if run.method == ALONE else names) for run in job.runs
    ]


def _teacher_task(work: Workspace, job: CompareJob, name: str) -> None:
    do_teacher(job, name)


def _run_task(work: Workspace, job: CompareJob, run: Run) -> Run:
    do_run(job, run)
    return run


def one_by_one(job: CompareJob, runs: Sequence[Run]) -> Iterator[Run]:
    """Do these runs in this process; tells of each when it is done."""
    for run in runs:
        do_run(job, run)
        yield run


def do_run(job: CompareJob, run: Run) -> None:
    """Train and evaluate one run, or finish what is there of it; teachers that it needs come first.

    Raises:
        UserError: another process is at this run.
    """
    recipe, folder = job.recipe(run), job.folder(run)
    if run.method != ALONE:
        for config in recipe.teachers:
            if isinstance(config, TrainedTeacher):
                do_teacher(job, config.name)
    with open_workspace(recipe, folder, device=job.device, terminal=_terminal(job, str(run))) as work:
        seeded = replace(work, recipe=recipe.model_copy(update={"seed": run.seed}))
        if run.method == ALONE:
            train_student(seeded, folder)
        else:
            teachers = ready_teachers(work, job.out / "teachers")
            distill_student(seeded, teachers, folder, answers=job.out / "answers")
        _evaluate(seeded, folder, run)


def do_teacher(job: CompareJob, name: str) -> None:
    """Train one teacher; waits for another process that is at it."""
    recipe, config = job.trained_teachers[name]
    folder = job.out / "teachers" / name
    with open_workspace(recipe, folder, device=job.device, wait=True, terminal=_terminal(job)) as work:
        train_teacher(work, config, folder)


def _terminal(job: CompareJob, about: str = "") -> Terminal:
    return Terminal(job.quiet, job.bars, about)


def _check(recipes: Sequence[Recipe], seeds: Sequence[int]) -> None:
    if not recipes or not seeds:
        raise UserError("compare needs at least one recipe and one seed")
    for what, values in (("recipe names", [r.name for r in recipes]), ("seeds", list(seeds))):
        if len(set(values)) != len(values):
            raise UserError(f"{what} repeat", got=", ".join(map(str, values)), expected="each once")
    if not all(seed in SEEDS for seed in seeds):
        raise UserError("a seed is out of range", got=", ".join(map(str, seeds)), expected=f"0 to {SEEDS.stop - 1}")
    if {ALONE, "teachers", "answers", "views"} & {r.name for r in recipes}:
        raise UserError(
            "a recipe may not be named alone, teachers, answers or views",
            fix="choose another `name` in the recipe: these are folders of the comparison",
        )
    first = recipes[0]
    for other in recipes[1:]:
        differing = [
            key for key in ("data", "student", "train", "augment") if getattr(first, key) != getattr(other, key)
        ]
        if Selection.of(first.bench) != Selection.of(other.bench):
            differing.append("thresholds in bench")
        if differing:
            raise RecipeError(
                f"recipes {first.name} and {other.name} differ in more than their method",
                got=f"different {', '.join(differing)}",
                expected="equal data, student, train, augment and thresholds, so that only the method can explain a difference",
            )
    trained: dict[str, Any] = {}
    for recipe in recipes:
        for teacher in recipe.teachers:
            if isinstance(teacher, TrainedTeacher):
                seed = recipe.seed if teacher.seed is None else teacher.seed
                decided_by = teacher.train, teacher.settings or recipe.train, seed
                if trained.setdefault(teacher.name, decided_by) != decided_by:
                    raise RecipeError(
                        "two recipes train different teachers of the same name, which is trained once",
                        got=teacher.name,
                        expected="equal `train`, `settings` and seed (its own, or the recipe's)",
                        fix="give one of them another name",
                    )


# -- evaluation ------------------------------------------------------------------------------------------------------


def _evaluation_inputs(work: Workspace, folder: Path) -> dict[str, Any]:
    selection = Selection.of(work.recipe.bench).to_dict()
    return {"model": sha256_file(folder / MODEL_FILE), "val": work.data_identity["val"], "selection": selection}


def _evaluate(work: Workspace, run_folder: Path, run: Run) -> None:
    folder, val = run_folder / _EVALUATION, work.val
    inputs = _evaluation_inputs(work, run_folder)
    if is_current(folder, _EVALUATION, inputs):
        return
    detector = load_detector(run_folder)
    images = ResizedImages(val.records, detector.spec.preprocess, cache_mib=0)
    with work.terminal.counting(f"evaluate {run}") as progress:
        found = detect_dataset(detector, images, selection=Selection.of(work.recipe.bench), progress=progress)
    figures = evaluate(val.records, found, val.class_names).to_dict()
    figures.pop("curves")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "detections.npz",
        counts=np.array([len(d) for d in found]),
        boxes=np.concatenate([d.boxes_xyxy for d in found]),
        scores=np.concatenate([d.scores for d in found]),
        labels=np.concatenate([d.labels for d in found]),
    )
    write_json(folder / "accuracy.json", figures)
    write_manifest(folder, _EVALUATION, inputs, ["detections.npz", "accuracy.json"], {"seed": run.seed})


def _read_evaluation(base: Workspace, job: CompareJob, run: Run) -> Evaluated:
    folder, val = job.folder(run) / _EVALUATION, base.val
    if not is_current(folder, _EVALUATION, _evaluation_inputs(base, job.folder(run))):
        raise UserError(f"{folder} is not the evaluation of {run}", fix="run the same command again")
    with np.load(folder / "detections.npz", allow_pickle=False) as saved:
        ends = np.cumsum(saved["counts"])
        found = [
            Detections(saved["boxes"][e - c : e], saved["scores"][e - c : e], saved["labels"][e - c : e])
            for e, c in zip(ends, saved["counts"], strict=True)
        ]
    figures = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
    return Evaluated(run.method, run.seed, figures, match_coco(val.records, found, len(val.class_names)))
