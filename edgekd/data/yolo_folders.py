"""YOLO data sets that no YAML file describes: folders, or lists of images as Darknet has them, and classes.txt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edgekd.data.layout import is_image, numbered_lines, tails
from edgekd.data.problems import printable
from edgekd.data.yolo_yaml import USUAL_SPLITS, distinct_names
from edgekd.errors import DataError

NO_LABELS = frozenset({"classes.txt", *(f"{split}.txt" for split in USUAL_SPLITS)})
"""Text files that may lie among labels and are none."""

_NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "_darknet.labels", "train/_darknet.labels")


def names_beside(folder: Path) -> tuple[str, ...] | None:
    """Class names from classes.txt or a *.names file, one a line; None where there is no such file.

    Raises:
        DataError: they repeat, or there is none in it.
    """
    for path in [folder / name for name in _NAME_FILES] + sorted(folder.glob("*.names")):
        if path.is_file():
            return distinct_names(path, tuple(printable(text) for _, text in numbered_lines(path)))
    return None


def plain_splits(root: Path) -> dict[str, list[Path]]:
    """The splits of a folder, each with its folders or list; empty where it is not in YOLO layout.

    The first of these that is there: train.txt, val.txt, ... that list images with labels; images/SPLIT beside
    labels/SPLIT; images beside labels ("all"); SPLIT/images beside SPLIT/labels; images with their .txt beside them, in
    the folder itself ("all") or in a folder for each split.
    """
    lists = {name: [root / f"{name}.txt"] for name in USUAL_SPLITS if _lists_labelled_images(root / f"{name}.txt")}
    if lists:
        return lists
    if (root / "images").is_dir() and (root / "labels").is_dir():
        children = sorted(child for child in (root / "images").iterdir() if child.is_dir())
        if children and not any(is_image(path) for path in (root / "images").iterdir()):
            return {child.name: [child] for child in children}
        return {"all": [root / "images"]}
    folders = [child for child in sorted(root.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    apart = [child for child in folders if (child / "images").is_dir() and (child / "labels").is_dir()]
    if apart:
        return {child.name: [child / "images"] for child in apart}
    if _has_labels_beside(root):
        return {"all": [root]}
    return {child.name: [child] for child in folders if _has_labels_beside(child)}


def label_path(image: Path) -> Path:
    """Where an image's labels are: .../images/x.jpg -> .../labels/x.txt, or beside it where that is not there."""
    parts = list(image.parts)
    beside = image.with_suffix(".txt")
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            label = Path(*parts).with_suffix(".txt")
            return beside if not label.is_file() and beside.is_file() else label
    return beside


def _has_labels_beside(folder: Path) -> bool:
    """Whether some image in the folder has a .txt of its name beside it."""
    names = set(os.listdir(folder))
    return any(is_image(Path(name)) and os.path.splitext(name)[0] + ".txt" in names for name in names)


def _lists_labelled_images(path: Path) -> bool:
    """Whether a file lists images, of which some among the first have labels."""
    try:
        lines = numbered_lines(path)[:100]
    except DataError:
        return False
    images = [listed_image(text, (path.parent,)) for _, text in lines if is_image(Path(text))]
    return any(image and label_path(image).is_file() for image in images)


def listed_image(text: str, folders: Sequence[Path]) -> Path | None:
    """The image that a line of a list names, from one of the folders; None where there is none.

    Lists also hold paths from the author's disk, or from where Darknet was started ("data/obj_train_data/1.jpg").
    """
    tries = (folder / tail for tail in tails(text) for folder in folders)
    path = next((path for path in tries if os.path.isfile(path)), None)  # takes any text
    return path and Path(os.path.normpath(path))
