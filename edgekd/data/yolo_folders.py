"""YOLO data sets that no YAML file describes: folders, or lists of images as Darknet has them, and classes.txt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edgekd.data.foreign import kind_of
from edgekd.data.layout import each_file, forms, is_hidden, is_image, is_part, is_regular, numbered_lines, tails
from edgekd.data.problems import printable
from edgekd.data.yolo_yaml import USUAL_SPLITS, distinct_names, find_yaml
from edgekd.errors import DataError

_NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "_darknet.labels", "train/_darknet.labels")


def is_label(path: Path) -> bool:
    """Whether the file name says that it holds labels, and is neither a list of a split's images nor of the classes."""
    return path.suffix.lower() == ".txt" and path.stem.casefold() != "classes" and not is_part(path.stem)


def names_beside(folder: Path) -> tuple[str, ...] | None:
    """Class names from classes.txt or a *.names file, one a line; None where there is no such file.

    LabelImg writes a classes.txt beside the labels of every folder, with the classes known by then: the longest counts.

    Raises:
        DataError: they repeat, there is none in it, two folders number them differently, or a line before the last one is
            empty: that would shift the ids.
    """
    for path in [folder / name for name in _NAME_FILES] + sorted(folder.glob("*.names")):
        if path.is_file():
            return _names_in(path)
    found = {
        path: _names_in(path) for path in sorted([*folder.glob("*/classes.txt"), *folder.glob("labels/*/classes.txt")])
    }
    if not found:
        return None
    longest = max(found, key=lambda path: len(found[path]))
    for path, names in found.items():
        if names != found[longest][: len(names)]:
            raise DataError(
                f"{printable(path)} and {printable(longest)} number the classes differently",
                got=f"{', '.join(names[:20])}; {', '.join(found[longest][:20])}",
                expected="the same order: class ids count lines",
                fix="if the labels of all folders count alike, a classes.txt in the data set's own folder settles it",
            )
    return found[longest]


def _names_in(path: Path) -> tuple[str, ...]:
    lines = numbered_lines(path)
    for expected, (number, _) in enumerate(lines, 1):
        if number != expected:
            raise DataError(
                f"{printable(path)}: line {expected} is empty, and class ids count lines",
                expected="one class name a line",
                fix="name the class whose id that line is, or take the line out if the labels do not count it",
            )
    return distinct_names(path, tuple(printable(text) for _, text in lines))


def plain_splits(root: Path) -> dict[str, list[Path]]:
    """The splits of a folder, each with its folders or list; empty where it is not in YOLO layout.

    The first of these that is there: lists that Darknet's *.data names; train.txt, val.txt, ... that list images with
    labels; images/SPLIT beside
    labels/SPLIT; images beside labels ("all"); SPLIT/images beside SPLIT/labels; images with their .txt beside them, in
    the folder itself ("all") or in a folder for each split.
    """
    texts = sorted((path for path in root.glob("*.txt") if is_part(path.stem) and is_regular(path)), key=_usual_order)
    if lists := _darknet_lists(root):
        return lists
    if any(map(_lists_labelled_images, texts)):  # one beside it that leads nowhere is a split too: reading it says so
        return {path.stem: [path] for path in texts}
    if _has_labels_apart(root):
        children = sorted(child for child in (root / "images").iterdir() if child.is_dir())
        if children and not any(is_image(path) for path in (root / "images").iterdir()):
            return {child.name: [child] for child in children}
        return {"all": [root / "images"]}
    folders = [child for child in sorted(root.iterdir()) if child.is_dir() and not is_hidden(child.name)]
    apart = [child for child in folders if _has_labels_apart(child) and not _is_whole(child)]
    if apart:
        return {child.name: [child / "images"] for child in apart}
    if _has_labels_beside(root):
        return {"all": [root]}
    return {child.name: [child] for child in folders if _has_labels_beside(child)}


def _darknet_lists(root: Path) -> dict[str, list[Path]]:
    """The lists that a *.data file names, such as obj.data ("train = data/train.txt"), if their images have labels."""
    lists: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.glob("[!.]*.data") if is_regular(path)):
        for _, text in numbered_lines(path):
            key, _, value = (part.strip() for part in text.partition("="))
            places = (
                root / value,
                root / value.replace("\\", "/").rsplit("/", 1)[-1],
            )  # mostly from where Darknet starts
            listing = next((place for place in places if is_regular(place)), None)
            if listing and listing.suffix.lower() == ".txt" and _lists_labelled_images(listing):
                lists.setdefault(key, [listing])
    return lists


def _usual_order(path: Path) -> tuple[int, str]:
    name = path.stem.casefold()
    return (USUAL_SPLITS.index(name) if name in USUAL_SPLITS else len(USUAL_SPLITS)), path.stem


def _has_labels_apart(folder: Path) -> bool:
    """Whether there are images/ and labels/, and not only other files in it: some tools keep XML in a folder of that name,
    or KITTI's text files."""
    if not ((folder / "images").is_dir() and (folder / "labels").is_dir()):
        return False
    others = False
    for path in each_file(folder / "labels"):
        if is_label(path) and kind_of(path) is None:
            return True
        others = others or path.stem.casefold() != "classes"
    return not others  # without a file, its images show nothing


def _is_whole(folder: Path) -> bool:
    """Whether a folder with images/ and labels/ is a data set of its own (an unpacked archive), and no split of one."""
    inside = [child.name for child in (folder / "images").iterdir() if child.is_dir()]
    named = find_yaml(folder) is not None or any((folder / name).is_file() for name in _NAME_FILES)
    return any(map(is_part, inside)) or (named and not is_part(folder.name))


def label_path(image: Path) -> Path:
    """Where an image's labels are: .../images/x.jpg -> .../labels/x.txt, or beside it where that is not there."""
    parts = list(image.parts)
    beside = image.with_suffix(".txt")
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            label = Path(*parts).with_suffix(".txt")
            return _in_any_form(label) or _in_any_form(beside) or label
    return _in_any_form(beside) or beside


def _in_any_form(path: Path) -> Path | None:
    """The file of this name, or of one that is the same to the eye; None where there is none."""
    return next((found for found in map(path.with_name, forms(path.name)) if found.is_file()), None)


def _has_labels_beside(folder: Path) -> bool:
    """Whether some image in the folder has a .txt of its name beside it."""
    names = {name for name in os.listdir(folder) if not name.startswith(".")}  # macOS leaves ._a.jpg and ._a.txt
    labels = (form for name in names if is_image(Path(name)) for form in forms(os.path.splitext(name)[0] + ".txt"))
    return any(label in names and kind_of(folder / label) is None for label in labels)


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
