"""A first recipe: what a data set, its teachers and this machine ask for, each choice with its reason.

Only what differs from the defaults is written, so that it stays short enough to be read and changed by hand.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import atomic_path, is_onnx
from edgekd.console import Terminal
from edgekd.data import read_dataset
from edgekd.data.layout import find_split, split_advice
from edgekd.data.problems import printable
from edgekd.data.reading import open_source
from edgekd.detectors import spec_for
from edgekd.detectors.prior_fit import suited_options
from edgekd.detectors.weights import PUBLISHED
from edgekd.errors import ArtifactError, DataError, UserError
from edgekd.labels import some_of
from edgekd.machine import CPU_BF16, cpu_flags
from edgekd.recipe import CheckpointTeacher, ModelConfig, OnnxTeacher
from edgekd.recipe_draft import RecipeDraft
from edgekd.recipe_file import RESERVED_NAMES, WEIGHT_NAMES, load_recipe
from edgekd.teacher_check import examine, is_foreign
from edgekd.teachers import build_teacher
from edgekd.types import Dataset
from edgekd.workspace import doubts_about, require_objects

STUDENT = "mobilenetv2-ssd-lite"
BATCH_SIZE = 16
GPU_STEPS, GPU_EPOCHS = 8000, (20, 120)
CPU_STEPS, CPU_EPOCHS = 1500, (4, 120)
"""Optimiser steps of a training, and the fewest and most epochs that they may come to: small sets would be seen too often,
large ones not often enough. Without a GPU, what some cores do in tens of minutes at 320 px."""
CPU_FREEZE_STRIDE = 4
OWN_TEACHERS = {
    "gpu": ("vgg16-ssd", "efficientnet-lite1-ssd-lite"),
    "cpu": ("efficientnet-lite1-ssd-lite", "efficientnet-lite0-ssd-lite"),
}
"""What `edgekd run` trains where the user has no teachers: larger than the student, and pretrained, as small sets ask for."""


@dataclass(frozen=True)
class Asked:
    """What the user said.

    Attributes:
        root: the data set. out: the recipe's file. teachers: ONNX files, checkpoints, run folders.
        declared: keys of a recipe's ONNX teacher, of every ONNX file among the teachers that is none of edgekd's.
        format: of the data set. train, val: its splits, found out where None.
        on_gpu: whether the recipe is for a GPU.
    """

    root: Path
    out: Path
    teachers: tuple[Path, ...] = ()
    declared: Mapping[str, Any] = field(default_factory=dict)
    student: str = STUDENT
    input_size: int = 320
    format: str = "auto"
    train: str | None = None
    val: str | None = None
    on_gpu: bool = False


def propose(asked: Asked, terminal: Terminal) -> RecipeDraft:
    """The recipe that suits what was asked for; each teacher is opened once and tried on some labelled images.

    Raises:
        DataError: the data set cannot be read, or has no two splits. ArtifactError, ClassMapError, UserError: a teacher
            cannot be used as it is. RecipeError: no such student.
    """
    found = RecipeDraft({"name": _safe(os.path.basename(os.path.abspath(asked.root)), "mine")})
    teachers = teacher_entries(asked.teachers, asked.declared)
    train = _put_data(found, asked)
    student = ModelConfig(model=asked.student, input_size=asked.input_size)
    spec_for(student, train.class_names)  # a model or a size that cannot be is told before all else
    options = _put_student(found, student, train)
    if teachers:
        _put_teachers(found, teachers, train, asked.out, terminal)
    else:
        _put_own_teachers(found, student, options, asked.on_gpu)
    _put_training(found, student, len(train), asked.on_gpu)
    found.put("export", "precisions", ["fp32", "int8"], "int8 is calibrated on training images")
    return found


def write_recipe(found: RecipeDraft, out: Path) -> None:
    """Write it, unless `edgekd run` would not take it.

    Raises:
        RecipeError: it would not. UserError, ArtifactError: `out` cannot be written.
    """
    with atomic_path(out) as temporary:
        temporary.write_text(f"# From `edgekd init`, to be changed at will.\n{found.text}", encoding="utf-8")
        load_recipe(temporary, needs=("data", "student", "teacher-files"))


def epochs_for(images: int, batch_size: int, on_gpu: bool) -> int:
    """Epochs that come to `GPU_STEPS` or `CPU_STEPS`, within their bounds."""
    steps, (least, most) = (GPU_STEPS, GPU_EPOCHS) if on_gpu else (CPU_STEPS, CPU_EPOCHS)
    return max(least, min(most, round(steps * batch_size / images)))


def teacher_entries(
    paths: Sequence[Path], declared: Mapping[str, Any] | None = None
) -> list[OnnxTeacher | CheckpointTeacher]:
    """A recipe's entry for each file or run folder, named after it; no two names are the same.

    Args:
        declared: further keys of each ONNX file's entry.

    Raises:
        UserError: one that is neither, or is given twice.
    """
    entries: list[OnnxTeacher | CheckpointTeacher] = []
    taken = set(RESERVED_NAMES)
    seen: set[str] = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise UserError("a teacher is given twice", got=path, expected="different ones: an ensemble gains by that")
        seen.add(real)
        if not path.exists():
            raise ArtifactError(
                f"{path}: no such file or folder", expected="an ONNX file, a checkpoint or a run folder"
            )
        if path.suffix.lower() not in (".onnx", ".pt", ".pth") and not path.is_dir():
            raise UserError(
                f"{path} is no teacher that `edgekd init` knows",
                expected="an .onnx file, or a checkpoint (.pt) or run folder of edgekd",
                fix="export the detector to ONNX; or have it teach as a `module` that loads it (docs/teachers.md), added to "
                "the recipe by hand",
            )
        place = os.path.abspath(path)
        of_run = Path(place).parent if path.suffix == ".pt" and path.stem in ("model", "best") else Path(place)
        name = _unused(_safe(of_run.name if of_run.is_dir() else of_run.stem, "teacher"), taken)
        if is_onnx(path):
            entries.append(OnnxTeacher(name=name, onnx=place, **(declared or {})))
        else:
            entries.append(CheckpointTeacher(name=name, checkpoint=place))
    return entries


def _safe(name: str, otherwise: str) -> str:
    """The nearest name that a recipe takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or otherwise


def _unused(name: str, taken: set[str]) -> str:
    """The name, numbered if it has to be; capitals do not tell names apart, for not all file systems see them."""
    number, chosen = 1, name
    while chosen.lower() in taken:
        number += 1
        chosen = f"{name}-{number}"
    taken.add(chosen.lower())
    return chosen


def _put_data(found: RecipeDraft, asked: Asked) -> Dataset:
    source = open_source(asked.root, asked.format)
    splits = source.splits()
    names = {
        "train": _split_for(asked.train, ("train", "trainval"), splits, asked.root),
        "val": _split_for(asked.val, ("val", "test"), splits, asked.root),
    }
    train, val = (read_dataset(asked.root, name, format=asked.format) for name in names.values())
    require_objects(train, difficult=False)
    found.warnings += doubts_about(train, val)
    boxes = [r.boxes_xyxy[r.trainable] / np.tile(r.image_hw[::-1], 2) for r in train.records]
    sides = np.sqrt(np.prod(np.concatenate([b[:, 2:] - b[:, :2] for b in boxes]), 1)) * asked.input_size
    why = (
        f"{train.format.upper()} layout: {len(train)} images to train on, {len(val)} to measure on, {len(train.class_names)} "
        f"classes, {len(sides)} boxes; half are under {np.median(sides):.0f} px of the student's {asked.input_size}"
    )
    found.put("data", "root", _relative(asked.root, asked.out), why)
    if asked.format != "auto":
        found.put("data", "format", asked.format)
    for key, name in names.items():
        if name != key:
            found.put("data", key, name)
    return train


def _split_for(asked: str | None, names: Sequence[str], splits: tuple[str, ...], root: Path) -> str:
    """The first of the names that the data set has a split for; the name, where a recipe finds the split by it.

    Raises:
        DataError: it has none.
    """
    for name in names if asked is None else (asked,):
        with contextlib.suppress(DataError):
            find_split(name, splits, root)
            return name
    if asked is not None:
        find_split(asked, splits, root)
    raise DataError(
        f"{printable(root)} has no split {' or '.join(map(repr, names))}",
        got=f"the splits {', '.join(splits)}" if splits else "no split",
        expected="a split to train on, and another one to measure on",
        fix=split_advice(root, splits) if len(splits) == 1 else "name them: --train NAME --val NAME",
    )


def _put_student(found: RecipeDraft, student: ModelConfig, train: Dataset) -> dict[str, Any]:
    found.put("student", "model", student.model)
    if student.input_size != ModelConfig.model_fields["input_size"].default:
        found.put("student", "input_size", student.input_size)
    if student.model in PUBLISHED:
        why = f"{len(train)} images are few to learn features from; downloaded once, or a path to the file"
        found.put("student", "weights", "imagenet", why if len(train) < 100_000 else "")
    options, why = suited_options(student, train.class_names, train.records)
    if options:
        found.put("student", "options", options, why)
    return options


def _put_teachers(
    found: RecipeDraft,
    entries: Sequence[OnnxTeacher | CheckpointTeacher],
    train: Dataset,
    out: Path,
    terminal: Terminal,
) -> None:
    classes = train.class_names
    found.values["teachers"] = []
    unknown = set(classes)
    for number, entry in enumerate(entries):
        terminal.note(f"teacher {entry.name}: being opened and, unless edgekd made it, tried on training images")
        teacher = build_teacher(entry, classes)
        try:
            unknown &= set(teacher.unknown_classes)
            knows = len(classes) - len(teacher.unknown_classes)
            why = f"knows {knows} of the {len(classes)} classes"
            found.notes += [f"teacher {entry.name}: {taken}" for taken in teacher.predictor.taken_for_granted()]
            if is_foreign(teacher):
                judged = examine(train, f"teacher {entry.name}", teacher.predictor, teacher.known)
                (found.warnings if judged["doubtful"] else found.notes).append(judged["says"])
                if "ap50" in judged:
                    why += f"; AP50 {100 * judged['ap50']:.1f} on {judged['images']} training images"
                why += "; MAY BE READ WRONGLY, see what `edgekd init` says" if judged["doubtful"] else ""
        finally:
            teacher.close()
        key = "onnx" if isinstance(entry, OnnxTeacher) else "checkpoint"
        place = _relative(Path(getattr(entry, key)), out)
        foreign = is_foreign(teacher)  # edgekd's own files say themselves what can be declared of others
        declared = entry.model_dump(mode="json", exclude_unset=True, exclude={"name", key}) if foreign else {}
        found.values["teachers"].append({"name": entry.name, key: place, **declared})
        found.reasons["teachers", number, key] = why
    if unknown:
        named = [name for name in classes if name in unknown]
        found.warnings.append(f"no teacher knows {some_of(named)}: learned from ground truth alone")


def _put_own_teachers(found: RecipeDraft, student: ModelConfig, options: Mapping[str, Any], on_gpu: bool) -> None:
    found.values["teachers"] = []
    found.reasons["teachers",] = (
        "`edgekd run` trains these first; detectors of yours as `onnx:` or `checkpoint:` save that"
    )
    for model in OWN_TEACHERS["gpu" if on_gpu else "cpu"]:
        train: dict[str, Any] = {"model": model}
        if student.input_size != ModelConfig.model_fields["input_size"].default:
            train["input_size"] = student.input_size
        train["weights"] = "imagenet"
        own = {key: value for key, value in options.items() if key != "finest_stride" or model.endswith("-lite")}
        if own:
            train["options"] = own
        found.values["teachers"].append({"name": model.partition("-ssd")[0], "train": train})


def _put_training(found: RecipeDraft, student: ModelConfig, images: int, on_gpu: bool) -> None:
    batch_size = max(2, min(BATCH_SIZE, images // 4))
    epochs = epochs_for(images, batch_size, on_gpu)
    steps = epochs * max(1, images // batch_size)
    where = "on a GPU" if on_gpu else "without a GPU"
    aim = GPU_STEPS if on_gpu else CPU_STEPS
    found.put("train", "epochs", epochs, f"about {steps:,} steps; {aim:,} are aimed at {where}")
    if batch_size != BATCH_SIZE:
        found.put("train", "batch_size", batch_size, "a quarter of the training images")
    if on_gpu:
        return
    flags = [flag for flag in CPU_BF16 if flag in cpu_flags()]
    if flags:
        found.put("train", "precision", "bf16", f"this CPU has {flags[0]}; one without goes in fp32")
    if student.model in PUBLISHED:
        why = "the pretrained first layers stay as they are: most of a CPU step's time; leave it out on a GPU"
        found.put("train", "freeze_stride", CPU_FREEZE_STRIDE, why)


def _relative(path: Path, out: Path) -> str:
    """A path as the recipe in `out` finds it; taken literally, since that is how recipes resolve them."""
    place = os.path.relpath(os.path.abspath(path), os.path.abspath(out.parent))
    if place.startswith("~"):  # would be somebody's home
        return os.path.abspath(path)
    return f"./{place}" if place in WEIGHT_NAMES else place
