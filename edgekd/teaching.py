"""The recipe's teachers put to work: checked before anything is trained, loaded, asked, weighted, fused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgekd import ranks
from edgekd.artifact import is_current, sha256_file, sha256_json, write_json, write_manifest
from edgekd.checkpoint import detector_file
from edgekd.data.view_plan import ViewPlan
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.prior_fit import fitted_spec
from edgekd.errors import ArtifactError, DistillationSetupError
from edgekd.labels import some_of
from edgekd.recipe import (
    CacheConfig,
    CheckpointTeacher,
    ModuleTeacher,
    OnnxTeacher,
    Recipe,
    TeacherConfig,
    TorchvisionTeacher,
    TrainedTeacher,
)
from edgekd.runtimes.model_files import sha256_model
from edgekd.selection import DEFAULT_SELECTION
from edgekd.teacher_check import check_reading, is_foreign
from edgekd.teachers import build_teacher
from edgekd.teachers.answers import ask, collect_answers
from edgekd.teachers.base import Teacher
from edgekd.teachers.cache import GIB, Recording, estimate, fill_fused, make_room
from edgekd.teachers.ensemble import Ensemble, learn_weights
from edgekd.teachers.module import module_content
from edgekd.teachers.native import NativeTeacher
from edgekd.teachers.predicted import PredictorTeacher
from edgekd.training.distill import Answers, Distiller, TeacherSet, fuse_answers
from edgekd.training.setup import frozen_layers, initial_detector
from edgekd.types import Detections, ImageArray, ImageRecord, SoftDetections
from edgekd.workspace import Workspace, resolved_device

WEIGHT_IMAGES = 300
"""Training images that learned ensemble weights are fitted on, about."""

PROBED_IMAGES = 16
"""Training images on which teachers whose boxes nothing reads are tried, lest one that finds nothing teach its features."""


def check_setup(work: Workspace) -> bool:
    """Build everything once, untrained where it must be, so that a mistake shows before hours of training.

    Returns:
        See `check_terms`.

    Raises:
        EdgeKDError: what `check_terms` raises; or weights that cannot be had, or do not fit what is asked of them.
    """
    asks_of_images = check_terms(work)
    recipe, classes, records = work.recipe, work.train.class_names, work.train.records
    trained = [teacher for teacher in recipe.teachers if isinstance(teacher, TrainedTeacher)]
    for model, settings in ((recipe.student, recipe.train), *((t.train, t.settings or recipe.train) for t in trained)):
        detector, pretrained = initial_detector(model, fitted_spec(spec_for(model, classes), records))
        frozen_layers(detector, settings.freeze_stride, pretrained=pretrained)
    return asks_of_images


def check_terms(work: Workspace) -> bool:
    """Build the student, the teachers and the distillation terms, without the weights that training begins with.

    Returns:
        Whether teachers will be asked about whole training images: see `Distiller.answers_from_images`.

    Raises:
        EdgeKDError: a model option, a teacher, a class map, the fusion or a distillation term is wrong.
    """
    recipe, classes, records = work.recipe, work.train.class_names, work.train.records
    student = build_detector(fitted_spec(spec_for(recipe.student, classes), records))
    built: list[PredictorTeacher] = []
    for config in recipe.teachers:
        if isinstance(config, TrainedTeacher):
            spec = fitted_spec(spec_for(config.train, classes), records)
            built.append(NativeTeacher(config.name, build_detector(spec), classes))
        else:
            built.append(build_teacher(config, classes))
    ensemble = Ensemble(built, recipe.ensemble)
    distiller = Distiller(student, TeacherSet(tuple(built), ensemble.weights, ensemble.fuse), recipe.distill)
    ensemble.close()
    unknown = [name for name in classes if all(name in teacher.unknown_classes for teacher in built)]
    if unknown:
        work.terminal.warn(f"no teacher knows {some_of(unknown)}: learned from ground truth alone")
    return distiller.answers_from_images


def most_boxes(recipe: Recipe) -> int:
    """How many boxes a teacher answers an image with at most: the usual 100, or more where the recipe measures more."""
    return max(DEFAULT_SELECTION.max_detections, recipe.bench.max_detections)


def _loaded(work: Workspace, config: TeacherConfig) -> PredictorTeacher:
    device = resolved_device(work.device)
    return build_teacher(config, work.train.class_names, device=device, max_detections=most_boxes(work.recipe))


def gather_teachers(
    work: Workspace, teachers: Sequence[TeacherConfig], identities: Sequence[Mapping[str, Any]], answers: Path
) -> TeacherSet:
    """Load the teachers, weigh them, and look whether foreign ones are read rightly."""
    built = [_loaded(work, config) for config in teachers]
    weights = ensemble_weights(work, teachers, answers)
    ensemble = Ensemble(built, work.recipe.ensemble, weights=weights)
    _check_readings(work, list(zip(teachers, built, identities, strict=True)), answers)
    return TeacherSet(tuple(built), ensemble.weights, ensemble.fuse)


def hear_teachers(
    work: Workspace, distiller: Distiller, identities: Sequence[Mapping[str, Any]], answers: Path
) -> None:
    """Ask each teacher about every training image, where a term reads boxes and they are not to run online."""
    built = distiller.set.teachers
    if not distiller.answers_from_images:
        _check_heard(work, built, [_probe(work, one) for one in built], "the training images with most boxes")
        return
    collected = [_collect(work, one, known, answers) for one, known in zip(built, identities, strict=True)]
    _check_heard(work, built, collected, f"the {len(work.train)} training images")
    if work.recipe.ensemble.fusion == "mean-outputs":  # works on raw outputs, so answers cannot be fused afterwards
        members = [one for one in built if isinstance(one, PredictorTeacher)]  # `gather_teachers` builds no others
        selection = replace(DEFAULT_SELECTION, max_detections=most_boxes(work.recipe))
        ensemble = Ensemble(members, work.recipe.ensemble, weights=distiller.set.weights, selection=selection)
        identity = {"members": list(identities), "weights": distiller.set.weights}
        fused: Answers = _collect(work, _Together(ensemble), identity, answers)
    else:
        fused = fuse_answers(collected, distiller.set.fuse)
    distiller.set = replace(distiller.set, answers=tuple(collected), fused_answers=fused)


def _probe(work: Workspace, teacher: Teacher) -> Answers:
    """A teacher's answers to the few images with most boxes."""
    crowded = sorted(work.train.records, key=lambda record: -len(record.labels))[:PROBED_IMAGES]
    return {record.image_id: ask(teacher, record) for record in crowded}


def ask_ahead(work: Workspace, config: CheckpointTeacher, answers: Path) -> None:
    """Ask a teacher about every training image as soon as it is there, so that distillation finds its answers."""
    _collect(work, _loaded(work, config), answering_identity(work.recipe, config), answers)


def record_views(work: Workspace, distiller: Distiller, identities: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Have the teachers look once at the views that the run will show, so that training need not run them.

    Args:
        work: the recipe has a `distill.cache`. distiller: learns from the cache afterwards.
        identities: the teachers' content. folder: of the cache, unless the recipe names one.

    Raises:
        DistillationSetupError: it may not be kept, and the recipe has no fallback. TeacherError: a teacher fails.
    """
    recipe, config = work.recipe, work.recipe.distill.cache
    assert config is not None
    student = spec_for(recipe.student, work.train.class_names).preprocess
    seed = recipe.seed if config.seed is None else config.seed
    plan = ViewPlan(work.train, recipe.augment, student, seed, recipe.train.epochs, config.views)
    distiller.plan = plan
    if not distiller.online:
        work.terminal.note(
            "teacher cache: nothing to keep, since the answers to whole images serve every view; training shows "
            f"{config.views} views of each image all the same, and new ones each epoch without `distill.cache`"
        )
        return
    root = Path(os.path.expanduser(config.folder)) if config.folder is not None else folder
    members = zip(distiller.set.teachers, distiller.wanted, identities, strict=True)
    data = {"images": work.data_identity["train"], "classes": list(work.train.class_names)}
    recordings = [
        Recording(one, wanted, plan, root, {"teacher": known, "data": data}) for one, wanted, known in members
    ]
    try:
        _check_room(work, config, recordings)
    except DistillationSetupError as error:
        if config.fallback == "error":
            raise
        work.terminal.warn(f"{error.what}: teachers run at every step")
        return
    ranks.barrier()  # no process writes before all have looked at the room
    stores = []
    for recording in recordings:
        with work.terminal.counting(f"views for {recording.teacher.name}") as progress:
            stores.append(recording.fill(progress))
    if distiller.wanted[0].soft and len(stores) > 1:
        fusion = {"ensemble": recipe.ensemble.model_dump(mode="json"), "weights": list(distiller.set.weights)}
        stores.append(fill_fused(recordings, stores, distiller.set.fuse, student.input_hw, fusion))
    ranks.barrier()
    distiller.stores = tuple(stores)


def _check_room(work: Workspace, config: CacheConfig, recordings: Sequence[Recording]) -> None:
    """Show what the cache will take before anything is written.

    Raises:
        DistillationSetupError: it may not be kept.
    """
    if not config.features and any(one.wanted.taps or one.wanted.dense for one in recordings):
        raise DistillationSetupError(
            "the terms read feature maps or raw outputs, which `distill.cache.features: false` does not keep",
            fix="`features: true`, or `distill.cache.fallback: online`",
        )
    needed = estimate(recordings)
    slots = len(recordings[0].plan.slots)
    what = f"teacher cache: {len(recordings)} teachers x {slots} views x {len(work.train)} images"
    work.terminal.note(f"{what}: {needed} (budget {config.disk_budget_gib:g} GiB)")
    refused: DistillationSetupError | None = None
    if ranks.rank() == 0:  # alone: of several that delete old stores at once, some would find them still in use
        try:
            make_room(recordings[0].root, [one.folder for one in recordings], needed, int(config.disk_budget_gib * GIB))
        except DistillationSetupError as error:
            refused = error
    if (refused := ranks.gather(refused)[0]) is not None:
        raise refused


def _check_readings(
    work: Workspace, teachers: Sequence[tuple[TeacherConfig, PredictorTeacher, Mapping[str, Any]]], answers: Path
) -> None:
    """Say how well foreign detectors agree with the training labels; native ones carry their own preprocessing."""
    for config, teacher, identity in teachers:
        for taken in teacher.predictor.taken_for_granted():
            work.terminal.note(f"teacher {teacher.name}: {taken}")
        if not is_foreign(teacher):
            continue
        work.terminal.note(f"teacher {teacher.name}: tried on training images")  # for up to a minute
        with ranks.first_goes_first():
            found = check_reading(work.train, config, teacher, identity, answers, work.data_identity["train"])
        (work.terminal.warn if found["doubtful"] else work.terminal.note)(found["says"])


def _check_heard(work: Workspace, teachers: Sequence[Teacher], collected: Sequence[Answers], where: str) -> None:
    """Warn of teachers that say nothing at all.

    Raises:
        DistillationSetupError: none says anything.
    """
    silent = [
        teacher.name
        for teacher, answers in zip(teachers, collected, strict=True)
        if not any(len(answer) for answer in answers.values())
    ]
    if len(silent) == len(teachers):
        raise DistillationSetupError(
            f"no teacher finds anything in any of {where}",
            got=f"no box from {', '.join(silent)}",
            fix="train longer (`train.epochs`, or the teacher's own `settings`), or on more images",
        )
    for name in silent:
        work.terminal.warn(f"teacher {name} finds nothing in any of {where}")


def ensemble_weights(work: Workspace, teachers: Sequence[TeacherConfig], answers: Path) -> tuple[float, ...]:
    """Each teacher's share: as the recipe gives it, or fitted to AP50 on every few of the training images."""
    given = [config.weight for config in teachers]
    if work.recipe.ensemble.weights == "given" or len(teachers) < 2:
        return tuple(weight / sum(given) for weight in given)
    identities = [answering_identity(work.recipe, config) for config in teachers]
    fusion = work.recipe.ensemble.model_dump(mode="json")
    data = {"images": work.data_identity["train"], "classes": list(work.train.class_names)}
    inputs = {"teachers": identities, "ensemble": fusion, "data": data}
    # Each ensemble has its own: a comparison's recipes may fit theirs at the same time.
    folder = answers / "weights" / sha256_json(inputs)[:16]
    with ranks.first_goes_first():
        if not is_current(folder, "weights", inputs):
            if any("run" in one for one in identities):
                work.terminal.warn(
                    "weights are fitted on images that trained teachers have seen: they favour overfitting"
                )
            with torch.random.fork_rng(devices=[]):  # what is drawn afterwards is the same where they are there already
                fitted = _fitted_weights(work, teachers, identities, answers)
            write_json(folder / "weights.json", list(fitted))
            write_manifest(folder, "weights", inputs, ["weights.json"], {})
    return tuple(json.loads((folder / "weights.json").read_text(encoding="utf-8")))


def _fitted_weights(
    work: Workspace, teachers: Sequence[TeacherConfig], identities: Sequence[Mapping[str, Any]], answers: Path
) -> tuple[float, ...]:
    from edgekd.bench.accuracy import evaluate

    built = [_loaded(work, config) for config in teachers]
    collected = [_collect(work, one, known, answers) for one, known in zip(built, identities, strict=True)]
    records = work.train.records[:: max(1, len(work.train) // WEIGHT_IMAGES)]

    def ap50(records: Sequence[ImageRecord], found: Sequence[Detections]) -> float:
        return evaluate(records, found, work.train.class_names).ap50 or 0.0

    return learn_weights(
        [[one[record.image_id] for record in records] for one in collected],
        records,
        work.recipe.ensemble,
        ap50,
        known=[one.known for one in built],
    )


@dataclass(frozen=True)
class _Together:
    """An ensemble in the place of a teacher, as far as answering goes."""

    ensemble: Ensemble
    name: str = "ensemble"
    detector: None = None

    @property
    def student_class_names(self) -> tuple[str, ...]:
        return self.ensemble.class_names

    def answer(self, image: ImageArray) -> SoftDetections:
        return self.ensemble.answer(image)


def _collect(work: Workspace, teacher: Any, identity: Mapping[str, Any], answers: Path) -> dict[str, SoftDetections]:
    with work.terminal.counting(f"answers of {teacher.name}") as progress:
        return collect_answers(teacher, work.train, answers / teacher.name, identity, progress)


def answering_identity(recipe: Recipe, config: TeacherConfig) -> dict[str, Any]:
    """What decides a teacher's answers: what it is, and how many boxes it may give where these are more than usual."""
    most = most_boxes(recipe)
    return teacher_identity(config) | ({"max_detections": most} if most > DEFAULT_SELECTION.max_detections else {})


def teacher_identity(config: TeacherConfig) -> dict[str, Any]:
    """What a teacher is, by content: its files' hashes and how it is read; not its name, path or weight."""
    identity: dict[str, Any] = config.model_dump(mode="json", exclude={"name", "weight", "checkpoint", "onnx"})
    if isinstance(config, CheckpointTeacher):
        identity["run"] = sha256_file(detector_file(Path(config.checkpoint)))
    elif isinstance(config, OnnxTeacher):
        if not Path(config.onnx).is_file():
            raise ArtifactError(f"{config.onnx}: no such file", expected=f"the ONNX file of teacher {config.name}")
        identity["sha256"] = sha256_model(Path(config.onnx))
    elif isinstance(config, ModuleTeacher):
        identity["content"] = module_content(config)
    elif isinstance(config, TorchvisionTeacher) and config.weights is not None:
        weights = Path(os.path.expanduser(config.weights))
        if weights.is_file():
            identity["sha256"] = sha256_file(weights)
    return identity
