"""What teachers say about each training image, asked once and kept on disk.

An answer is a teacher's `SoftDetections` on the whole image, in the image's own pixels. Augmentation maps it through each
view as it maps ground truth, so any number of teachers, at any input size, cost nothing a step.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import atomic_path, is_current, sha256_file, sha256_json, write_manifest
from edgekd.data.images import load_image
from edgekd.errors import DistillationSetupError, EdgeKDError, TeacherError
from edgekd.teachers.base import Teacher
from edgekd.teachers.claims import fill_together
from edgekd.types import Dataset, ImageRecord, SoftDetections

SHARD_IMAGES = 256
"""Images a shard: what is lost at most when the machine is cut off."""

Progress = Callable[[int, int], None]


def collect_answers(
    teacher: Teacher, dataset: Dataset, folder: Path, identity: Mapping[str, Any], progress: Progress | None = None
) -> dict[str, SoftDetections]:
    """The teacher's answer to every image of `dataset`, by image id; from `folder` where they are there already.

    Args:
        teacher: asked image by image through `Teacher.answer`.
        dataset: the training split.
        folder: where shards are kept. Shards of the same identity are reused, so a run cut off goes on where it was; those
            of others stay, since a comparison's recipes may read one teacher in several ways, by turns and side by side.
        identity: what decides the answers besides the images: the teacher's file hash and settings.
        progress: called with (images done, images in all).

    Raises:
        DistillationSetupError: a black box finds nothing in any image, so it is read wrongly. A native teacher cannot
            be: it may be young, and still teach by its features.
    """
    inputs = {
        "identity": dict(identity),
        "classes": list(teacher.student_class_names),
        "images": [[record.image_id, *_file_facts(record)] for record in dataset.records],
    }
    key = sha256_json(inputs)[:16]
    shards = [dataset.records[start : start + SHARD_IMAGES] for start in range(0, len(dataset), SHARD_IMAGES)]
    names = [f"{key}-{index:05d}.npz" for index in range(len(shards))]
    finished = is_current(folder, "answers", inputs)
    answers: dict[str, SoftDetections] = {}

    def ready(name: str, whole: bool) -> bool:
        found = _read_shard(folder / name, len(teacher.student_class_names))
        answers.update(found or {})
        return found is not None

    def make(name: str) -> None:
        found = {}
        for record in shards[names.index(name)]:
            found[record.image_id] = _as_stored(ask(teacher, record))
            if progress is not None:
                progress(len(answers) + len(found), len(dataset))
        _write_shard(folder / name, found)
        answers.update(found)

    if fill_together(folder, names, ready, make):
        finished = False
    if progress is not None:
        progress(len(dataset), len(dataset))
    if teacher.detector is None and not any(len(answer) for answer in answers.values()):
        raise DistillationSetupError(
            f"teacher {teacher.name} finds nothing in any of the {len(dataset)} training images",
            expected="boxes of the student's classes",
            fix="check its class map, preprocessing and output format with `edgekd predict`",
        )
    if not finished:
        write_manifest(folder, "answers", inputs, names, {"teacher": teacher.name, "images": len(dataset)})
    return answers


def _as_stored(answer: SoftDetections) -> SoftDetections:
    """Rounded as a shard rounds it, so that a run that reads its answers back repeats the one that asked for them."""
    return SoftDetections(answer.boxes_xyxy, answer.class_probs.astype(np.float16).astype(np.float32))


def ask(teacher: Teacher, record: ImageRecord) -> SoftDetections:
    """One training image put to a teacher.

    Raises:
        TeacherError: it cannot answer. DataError: the image cannot be read.
    """
    image = load_image(record.path)
    try:
        return teacher.answer(image)
    except (EdgeKDError, ValueError) as error:
        what = error.what if isinstance(error, EdgeKDError) else str(error)
        raise TeacherError(
            f"teacher {teacher.name} cannot answer {record.path.name}: {what}",
            got=getattr(error, "got", None),
            expected=getattr(error, "expected", None),
            fix=getattr(error, "fix", None) or f"try it alone: edgekd predict FILE {record.path.name} --out DIR",
        ) from error


def _file_facts(record: ImageRecord) -> tuple[int, str]:
    """Size and content hash: a changed image must be asked about again even if its name and date stay."""
    return record.path.stat().st_size, sha256_file(record.path)[:16]


def _write_shard(path: Path, answers: Mapping[str, SoftDetections]) -> None:
    counts = np.array([len(answer) for answer in answers.values()], np.int64)
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez(
            stream,
            ids=np.array(list(answers), dtype=np.str_),
            counts=counts,
            boxes=np.concatenate([answer.boxes_xyxy for answer in answers.values()]),
            # Half precision is finer than any teacher's calibration and halves the disk.
            probs=np.concatenate([answer.class_probs for answer in answers.values()]).astype(np.float16),
        )


def _read_shard(path: Path, num_classes: int) -> dict[str, SoftDetections] | None:
    """A shard's answers, or None when it is missing or damaged (it is then made)."""
    try:
        with np.load(path, allow_pickle=False) as data:
            ids, counts, boxes, probs = data["ids"], data["counts"], data["boxes"], data["probs"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if probs.ndim != 2 or probs.shape[-1] != num_classes or counts.sum() != len(boxes) or len(ids) != len(counts):
        return None
    ends = np.cumsum(counts)
    return {
        str(name): SoftDetections(boxes[end - count : end], probs[end - count : end].astype(np.float32))
        for name, end, count in zip(ids, ends, counts, strict=True)
    }
