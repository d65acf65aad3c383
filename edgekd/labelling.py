"""Images that nobody has annotated, annotated by teachers, so that everything else finds a data set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekd.artifact import require_file, sha256_json, write_json
from edgekd.data import detect_format
from edgekd.data.images import load_image
from edgekd.data.layout import files_under, is_image, unread_images, unread_message
from edgekd.data.problems import printable
from edgekd.data.reading import require_class_names
from edgekd.errors import DataError, DistillationSetupError, EdgeKDError, TeacherError, UserError
from edgekd.first_recipe import STUDENT, teacher_entries
from edgekd.recipe import DataConfig, ModelConfig, Recipe
from edgekd.selection import DEFAULT_SELECTION
from edgekd.teachers import build_teacher
from edgekd.teachers.ensemble import Ensemble
from edgekd.teaching import most_boxes, teacher_identity
from edgekd.types import Detections
from edgekd.workspace import resolved_device

FILE_NAME = "instances_all.json"


@dataclass(frozen=True)
class LabelReport:
    """What the teachers found.

    Attributes:
        file: COCO JSON beside the images, with each box's score. objects: class to number of boxes.
        failures: path to reason, of images that cannot be read.
        notes: what was taken for granted, mostly of foreign teachers, a sentence each: without labels nothing tests it.
        unknown: classes that no teacher knows.
    """

    file: Path
    images: int
    objects: Mapping[str, int]
    failures: Mapping[str, str]
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        facts = {"images": self.images, "objects": dict(self.objects), "failures": dict(self.failures)}
        return {"file": str(self.file), **facts, "notes": list(self.notes), "unknown": list(self.unknown)}


def recipe_of(folder: Path, teachers: Sequence[Path], classes: Sequence[str]) -> Recipe:
    """As much of a recipe as labelling asks for: a folder of images, detectors, and what to look for.

    Raises:
        UserError: no teacher, or one that is none; see `first_recipe.teacher_entries`.
    """
    if not teachers:
        raise UserError(f"{folder} is a folder of images, and no teacher is given", fix="--teacher FILE, once for each")
    data = DataConfig(root=os.path.abspath(folder), classes=tuple(classes) or None)
    student = ModelConfig(model=STUDENT)  # which a recipe must have, and labelling does not look at
    return Recipe(name="label", data=data, student=student, teachers=tuple(teacher_entries(teachers)))


def label_images(
    recipe: Recipe,
    *,
    score: float = 0.5,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> LabelReport:
    """Write `data.root`/instances_all.json with what the recipe's ensemble finds in the images there.

    Boxes of `score` or more become annotations. Nothing is written unless there are none yet. `note` is told the report's
    notes before the first image is looked at.

    Raises:
        DataError: the folder has annotations, or no images, or `data.classes` is missing, repeats a name or has a blank one.
        DistillationSetupError: a teacher has still to be trained, or nothing at all is found.
        UserError: the folder cannot be written to.
    """
    root, classes = Path(recipe.data.root), recipe.data.classes
    _require_unlabelled(root)
    if not classes:
        raise DataError(
            "the classes are missing: no annotation says what to look for",
            expected="a list of class names that the teachers know",
            fix="`--classes cat,dog`, or in a recipe's data section classes: [cat, dog]",
        )
    require_class_names(classes, printable(root))  # or no command could read what is written
    require_file(root / FILE_NAME)  # before teachers look at thousands of images
    files = list(files_under(root))
    paths = [path for path in files if is_image(path)]
    most, where = most_boxes(recipe), resolved_device(device)
    built = [build_teacher(config, classes, device=where, max_detections=most) for config in recipe.teachers]
    selection = replace(DEFAULT_SELECTION, max_detections=most)
    ensemble = Ensemble(built, recipe.ensemble, [config.weight for config in recipe.teachers], selection=selection)
    notes = [f"teacher {one.name}: {taken}" for one in built for taken in one.predictor.taken_for_granted()]
    if recipe.ensemble.weights == "learned" and len(built) > 1:
        notes.append("ensemble.weights: learned needs labels, so each teacher counts by its `weight`")
    for said in notes:
        note(said)
    unknown = [name for name in classes if all(name in teacher.unknown_classes for teacher in built)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    failures = {str(path): unread_message(path) for path in unread_images(files)}
    for done, path in enumerate(paths, 1):
        try:
            picture = load_image(path)
        except DataError as error:
            failures[str(path)] = str(error)
        else:
            name = path.relative_to(root).as_posix()
            images.append({"id": done, "file_name": name, "height": picture.shape[0], "width": picture.shape[1]})
            try:
                found = ensemble.detect(picture)
            except EdgeKDError as error:
                raise TeacherError(
                    f"teachers cannot label {name}: {error.what}", got=error.got, expected=error.expected, fix=error.fix
                ) from error
            annotations += _annotations(found, done, len(annotations), score)
        if progress is not None:
            progress(done, len(paths))
    ensemble.close()
    if not annotations:
        raise DistillationSetupError(
            f"no teacher finds anything in any of the {len(images)} images",
            got=f"no box of score {score:g} or more",
            fix="a lower --score; or are these the classes, and the pictures, that the teachers know?",
        )
    members = {config.name: sha256_json(teacher_identity(config)) for config in recipe.teachers}
    about = "Answers of teachers, checked by nobody (edgekd data label)"
    data = {
        "info": {"description": about, "teachers": members, "fusion": recipe.ensemble.fusion, "score": score},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
    }
    write_json(root / FILE_NAME, data)
    counts = Counter(classes[entry["category_id"] - 1] for entry in annotations)
    objects = {name: counts[name] for name in classes}
    return LabelReport(root / FILE_NAME, len(images), objects, failures, tuple(notes), tuple(unknown))


def _require_unlabelled(root: Path) -> None:
    """Raise unless there are images without annotations in any layout.

    Raises:
        DataError: there are annotations, or no images.
    """
    try:
        form = detect_format(root)
    except DataError as error:
        if "but no annotations" in error.what:
            return
        expected = "a folder with images in it, and no annotations"
        raise DataError(f"{root} cannot be labelled", got=error.what, expected=expected) from error
    raise DataError(
        f"{root} has annotations already",
        got=f"a data set in {form} layout",
        fix="`edgekd run` distils on it as it is; move the annotations away to have teachers make new ones",
    )


def _annotations(found: Detections, image: int, before: int, score: float) -> list[dict[str, Any]]:
    """COCO's entries for one image's detections of `score` or more; ids follow `before`."""
    entries: list[dict[str, Any]] = []
    for box, sure, label in zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
        if sure < score:
            continue
        x1, y1, x2, y2 = (round(value, 2) for value in box)
        side = (round(x2 - x1, 2), round(y2 - y1, 2))
        entries.append(
            {
                "id": before + len(entries) + 1,
                "image_id": image,
                "category_id": label + 1,
                "bbox": [x1, y1, *side],
                "area": round(side[0] * side[1], 2),
                "iscrowd": 0,
                "score": round(sure, 4),
            }
        )
    return entries
