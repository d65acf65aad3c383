"""YOLO txt: one line an object, `class cx cy w h` as shares of the image, beside a YAML file that names the classes.

Splits are the YAML's train, val, test (or any key that leads to images): folders, lists of folders, or .txt files that
list images; `yolo_folders` finds them where no YAML names any. A label file lies where its image does, with the last
"images" of the path changed to "labels", or beside it. An image without a label file shows only background. A line of a
segmentation polygon becomes the box around it; where the YAML has kpt_shape, what follows a box are its keypoints.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgekd.data.foreign import kind_of_line
from edgekd.data.layout import (
    Format,
    RawImage,
    RawObject,
    files_under,
    is_image,
    is_part,
    is_validation,
    numbered_lines,
    require_split,
    split_advice,
    stem_of,
    unread_images,
    unread_message,
)
from edgekd.data.problems import Problem, labels_of_teachers, printable
from edgekd.data.sidecar import NAME, ImageNote, read_sidecar
from edgekd.data.yolo_folders import is_label, label_path, listed_image, names_beside, plain_splits
from edgekd.data.yolo_yaml import find_yaml, load_yaml, names_of, require_one_description, splits_of
from edgekd.errors import DataError

_BOX_NUMBERS = 5
_FEWEST_LINES, _MOSTLY = 8, 0.8
"""Polygons that look like a box and its keypoints, to be taken for such: of COCO's own, one in twenty does."""

_USUAL_BACKGROUND = 0.1
"""The share of a split that may lack label files unremarked: pictures of background are commonly kept so, up to a tenth."""


def is_yolo(root: Path) -> bool:
    """Whether `root` is in YOLO layout."""
    return find_yaml(root) is not None or (root.is_dir() and bool(plain_splits(root)))


@dataclass(frozen=True)
class _Listed:
    """An image of a split: its path, its name within the split, and the list's line that names it."""

    path: Path
    name: str
    listing: Path | None = None
    line: int | None = None


@dataclass
class _Polygons:
    """The polygons of a split so far: how many, where the first is and of how many numbers, and how many look like keypoints
    of two or three numbers each behind a box."""

    count: int = 0
    first: tuple[Path, int] | None = None
    like_keypoints: dict[int, int] = field(default_factory=lambda: {2: 0, 3: 0})

    def add(self, label: Path, values: list[float]) -> None:
        self.count += 1
        self.first = self.first or (label, len(values))
        for width in self.like_keypoints:
            self.like_keypoints[width] += _is_box_with_points(values, width)


class YoloSource:
    """A data set in YOLO layout: with a YAML file, or plain folders images/SPLIT and labels/SPLIT with classes.txt."""

    format: Format = "yolo"

    def __init__(self, root: Path) -> None:
        """Read the YAML file or find the folders.

        Raises:
            DataError: neither is there, or the YAML file is wrong.
        """
        self.root = root
        self._yaml = find_yaml(root)
        self._keypoints = self._says_keypoints = False
        self._polygons = _Polygons()
        folder = root if root.is_dir() else root.parent
        self._sidecar = read_sidecar(folder)
        require_one_description(root)
        if self._yaml:
            data = load_yaml(self._yaml)
            self._base, self._splits = splits_of(self._yaml, data)
            if not any(map(is_part, self._splits)):
                self._splits = {**plain_splits(folder), **self._splits}
            self._names = names_of(self._yaml, data)
            if self._names is None:
                self._names = names_beside(folder)
            self._keypoints, self._says_keypoints = data.get("kpt_shape") is not None, "kpt_shape" in data
        else:
            self._base, self._splits = folder, plain_splits(folder)
            self._names = names_beside(folder)
        if not self._splits:
            where = self._yaml or root
            raise DataError(f"{printable(where)} names no split", expected="train:, val: or test: with a path")

    def splits(self) -> tuple[str, ...]:
        """The YAML's splits, or the folders."""
        return tuple(self._splits)

    def class_names(self) -> tuple[str, ...] | None:
        """The YAML's names, or those of classes.txt where it has none."""
        return self._names

    def category_ids(self) -> Mapping[str, int] | None:
        """The ids of the COCO data set that this was converted from."""
        return self._sidecar.category_ids

    def scan(self, split: str, problems: list[Problem], limit: int | None = None) -> list[RawImage]:
        """See `layout.Source.scan`."""
        require_split(split, self.splits(), self.root)
        teachers = self._sidecar.teachers.get(self._sidecar.origin(split), ())
        if teachers:
            folder = self.root if self.root.is_dir() else self.root.parent
            problems.append(labels_of_teachers(folder / NAME, teachers, f"of {split!r}", split))
        listed = self._listed(split, problems)
        stems = Counter(stem_of(image.name) for image in listed)
        self._report_shared(split, listed, problems)
        raws: list[RawImage] = []
        ids: set[str] = set()
        self._polygons = _Polygons()
        for image in listed[:limit]:
            stem = stem_of(image.name)
            unique = stem if stems[stem] == 1 else printable(self._relative(image.path))
            raw = self._read(image, split, unique, problems)
            if raw.image_id in ids:
                problems.append(Problem("duplicate-id", image.path, f"id {raw.image_id!r} again", split=split))
                continue
            ids.add(raw.image_id)
            raws.append(replace(raw, teachers=teachers))
        self._report_keypoints(split, problems)
        self._report_other_names(split, raws, problems)
        lacking = self._report_misnamed(split, listed[:limit], problems)
        if limit is None:
            self._report_orphans(split, listed, lacking, problems)
        self._report_unlabelled(split, raws, problems)
        return raws

    def _report_unlabelled(self, split: str, raws: list[RawImage], problems: list[Problem]) -> None:
        """Tell of images without a label file where they are many: perhaps nobody has looked at them yet."""
        bare = [raw for raw in raws if not raw.annotation.exists()]
        if raws and len(bare) == len(raws):
            message = f"no image of split {split!r} has a label file; the first one's would be this"
            problems.append(Problem("unlabelled-split", raws[0].annotation, message, split=split))
        elif len(bare) > _USUAL_BACKGROUND * len(raws):
            message = f"{len(bare)} of the {len(raws)} images of split {split!r} have no label file, such as this one's: they "
            message += "are read as background (where that is so, an empty file says it)"
            problems.append(Problem("sparse-labels", bare[0].annotation, message, split=split))

    def _report_keypoints(self, split: str, problems: list[Problem]) -> None:
        """Tell of lines that are a box and its keypoints: as polygons they would give other boxes, and nothing would fail."""
        found = self._polygons
        for width, like in found.like_keypoints.items():
            if found.first and found.count >= _FEWEST_LINES and like >= _MOSTLY * found.count:
                label, numbers = found.first
                message = (
                    f"{like} of {found.count} polygons of split {split!r} are a box and points within it, as keypoints "
                )
                message += (
                    f"are: data.yaml must say so, with `kpt_shape: [{(numbers - _BOX_NUMBERS) // width}, {width}]`, or "
                    "`kpt_shape: null` if they are polygons all the same"
                )
                problems.append(Problem("keypoints-as-polygons", label, message, split=split))
                return

    def _is_above(self, folder: Path) -> bool:
        """Whether a folder lies above the data set: reading it could mean reading the whole disk."""
        return folder.resolve() in self._base.resolve().parents

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._base).as_posix() if path.is_relative_to(self._base) else path.as_posix()

    def _listed(self, split: str, problems: list[Problem]) -> list[_Listed]:
        """The split's images that exist, each once."""
        found: list[_Listed] = []
        for entry in self._splits[split]:
            if os.path.isdir(entry) and self._is_above(entry):
                message = f"split {split!r} is at {printable(entry)}, which holds the data set itself"
                problems.append(Problem("bad-layout", self._yaml or self.root, message, split=split))
            elif os.path.isdir(entry):
                paths = list(files_under(entry))
                found += [_Listed(path, path.relative_to(entry).as_posix()) for path in paths if is_image(path)]
                for path in unread_images(paths):
                    if label_path(path).is_file():
                        problems.append(Problem("unread-image", path, unread_message(path), split=split))
            elif os.path.isfile(entry):
                found += self._read_list(entry, split, problems)
            else:
                message = f"split {split!r} is at {printable(entry)}, which is not there{self._instead()}"
                problems.append(Problem("bad-layout", self._yaml or self.root, message, split=split))
        seen: set[Path] = set()
        unique = []
        for image in found:
            if image.path in seen:
                blame = image.listing or image.path
                message = f"{printable(image.path.name)} is listed twice"
                problems.append(Problem("repeated-image", blame, message, image.line, split=split))
                continue
            seen.add(image.path)
            unique.append(image)
        order = {stem: position for position, stem in enumerate(self._sidecar.order.get(split, ()))}
        return sorted(unique, key=lambda image: order.get(stem_of(image.name), len(order)))

    def _instead(self) -> str:
        """How to do without a split that was never exported, such as Roboflow's data.yaml names."""
        there = [name for name, entries in self._splits.items() if is_part(name) and any(map(os.path.exists, entries))]
        return f"; without it, {split_advice(self.root, there)}" if there and not any(map(is_validation, there)) else ""

    def _read_list(self, listing: Path, split: str, problems: list[Problem]) -> list[_Listed]:
        found: list[tuple[Path, int]] = []
        for line, text in numbered_lines(listing):
            path = listed_image(text, (listing.parent, self._base))
            if path is None:
                problems.append(Problem("missing-image", listing, f"{text!r} is not there", line, split=split))
                continue
            found.append((path, line))
        shared = os.path.commonpath([path.parent for path, _ in found]) if found else ""
        return [_Listed(path, path.relative_to(shared).as_posix(), listing, line) for path, line in found]

    def _read(self, image: _Listed, split: str, default_id: str, problems: list[Problem]) -> RawImage:
        label = label_path(image.path)
        objects: tuple[RawObject, ...] = ()
        if label.exists():
            objects = tuple(self._objects(label, split, problems))
        note = self._note(split, image)
        image_id = default_id
        if note:
            image_id = default_id if note.image_id is None else note.image_id
            if (note.difficult or note.crowd) and note.objects != len(objects):
                message = f"{note.objects} objects when edgekd.json was written, {len(objects)} now"
                problems.append(Problem("stale-sidecar", label, message, split=split))
            else:
                objects = tuple(
                    replace(obj, difficult=position in note.difficult, crowd=position in note.crowd)
                    for position, obj in enumerate(objects)
                )
        return RawImage(
            image_id,
            printable(image.name),
            image.path,
            label,
            None,
            objects,
            normalised=True,
            numbers="centre, width, height",
        )

    def _note(self, split: str, image: _Listed) -> ImageNote | None:
        """What edgekd.json says of an image. A list, such as `data split` writes, may name it from another folder on."""
        origin, name = self._sidecar.origin(split), image.name
        folder = self._base / "images" / origin
        if origin != split and image.path.is_relative_to(folder):
            name = image.path.relative_to(folder).as_posix()
        return self._sidecar.note(origin, stem_of(name))

    def _objects(self, label: Path, split: str, problems: list[Problem]) -> list[RawObject]:
        try:
            lines = numbered_lines(label)
        except DataError as error:
            problems.append(Problem("bad-annotation", label, str(error).replace("\n", ";"), split=split))
            return []
        objects = []
        for line, text in lines:
            try:
                index, box = parse_line(text, self._keypoints)
            except ValueError as error:
                problems.append(Problem("bad-annotation", label, str(error), line, split=split))
                continue
            objects.append(RawObject(box, self._label(index), line=line))
            if not self._says_keypoints and len(fields := text.split()) > _BOX_NUMBERS:
                self._polygons.add(label, [float(field) for field in fields])
        return objects

    def _label(self, index: int) -> str | int:
        """The class of this id. One beyond the data set's own names is no place among the names that were asked for."""
        if self._names is None:
            return index
        beyond = f"id {index} (the data set names 0 to {len(self._names) - 1})"
        return self._names[index] if 0 <= index < len(self._names) else beyond

    def _report_shared(self, split: str, listed: list[_Listed], problems: list[Problem]) -> None:
        """Name images that differ in their suffix only, and so have one label file."""
        first: dict[Path, Path] = {}
        for image in listed:
            label = label_path(image.path)
            if first.setdefault(label, image.path) != image.path and label.is_file():
                message = (
                    f"images {printable(first[label].name)} and {printable(image.path.name)} share it; both are read"
                )
                problems.append(Problem("ambiguous-image", label, message, split=split))

    def _report_other_names(self, split: str, raws: list[RawImage], problems: list[Problem]) -> None:
        """Name what LabelImg has left beside the labels, where it tells other classes by their numbers."""
        for path in sorted({raw.annotation.with_name("classes.txt") for raw in raws}):
            there = {number - 1: name for number, name in numbered_lines(path)} if path.is_file() else {}
            for index, name in enumerate(self._names or ()):
                if index in there and there[index].casefold() != name.casefold():
                    message = f"class {index} is {printable(there[index])!r} here, {name!r} in the data set"
                    problems.append(Problem("other-names", path, message, index + 1, split=split))
                    break

    def _report_misnamed(self, split: str, listed: list[_Listed], problems: list[Problem]) -> set[Path]:
        """Name label files that an image misses by a hair; returns the plain names of all labels that images lack."""
        labels = {image.path: label_path(image.path) for image in listed}
        lacking = {_plain(label): image for image, label in labels.items() if not label.is_file()}
        folders = {labels[image].parent for image in lacking.values()}
        for path in sorted({path for folder in folders for path in _texts(folder)} - set(labels.values())):
            image = lacking.get(_plain(path))
            own = image and image.with_name(path.stem + image.suffix)
            if image and own and (own == image or not own.exists()):  # else it is the label of one of another split
                message = f"the image of this label wants it to be called {printable(labels[image].name)}"
                problems.append(Problem("misnamed-label", path, message, split=split))
        return set(lacking)

    def _report_orphans(
        self, split: str, listed: list[_Listed], lacking: Collection[Path], problems: list[Problem]
    ) -> None:
        """Name label files without an image; only where the split's folders have label folders of their own."""
        unread = {problem.path for problem in problems if (problem.kind, problem.split) == ("unread-image", split)}
        wanted = {label_path(path) for path in {image.path for image in listed} | unread}
        for entry in self._splits[split]:
            if not os.path.isdir(entry) or "images" not in entry.parts or self._is_above(entry):
                continue
            for path in files_under(label_path(entry / "x.jpg").parent):
                if is_label(path) and path not in wanted and _plain(path) not in lacking:
                    problems.append(Problem("orphan-label", path, "no image in the split has this label", split=split))


def _texts(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if is_label(path)]


def _plain(label: Path) -> Path:
    """A label's path such that names meet which differ in case, or by an image's suffix (1.jpg.txt)."""
    stem = Path(label.stem)
    return label.parent / (stem.stem if is_image(stem) else stem.name).casefold()


def _is_box_with_points(values: list[float], width: int) -> bool:
    """Whether a line's numbers can be a box, then points of x, y (and 0, 1 or 2 for how they are seen) spread over it."""
    cx, cy, w, h = values[1:_BOX_NUMBERS]
    xs, ys = values[_BOX_NUMBERS::width], values[_BOX_NUMBERS + 1 :: width]
    if (len(values) - _BOX_NUMBERS) % width or (width == 3 and not set(values[7::3]) <= {0, 1, 2}):
        return False
    seen = [(x, y) for x, y in zip(xs, ys, strict=True) if x or y]  # 0 0 stands for a point that nobody has marked
    spread = [max(side) - min(side) for side in zip(*seen, strict=True)]
    within = all(abs(x - cx) <= 0.6 * w and abs(y - cy) <= 0.6 * h for x, y in seen)
    return bool(seen) and within and spread[0] >= w / 4 and spread[1] >= h / 4


def parse_line(text: str, keypoints: bool = False) -> tuple[int, tuple[float, float, float, float]]:
    """(class index, (x1, y1, x2, y2) as shares) of one line; with `keypoints`, what follows the box is passed over.

    Raises:
        ValueError: it is neither `class cx cy w h` nor `class x1 y1 x2 y2 x3 y3 ...`.
    """
    fields = text.split()
    try:
        values = [float(field) for field in fields]
    except ValueError:
        kind = kind_of_line(text)
        hint = f"; it looks like {kind.name}" if kind else ", where blanks part them" if "," in text else ""
        raise ValueError(f"not all numbers{hint}: {printable(text[:80])!r}") from None
    if not math.isfinite(values[0]) or values[0] != int(values[0]):
        raise ValueError(f"the class id is no whole number: {fields[0]!r}")
    if len(values) == 5 or (keypoints and len(values) > 5):
        cx, cy, w, h = values[1:5]
        return int(values[0]), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    if len(values) >= 7 and len(values) % 2 == 1:
        xs, ys = values[1::2], values[2::2]
        if not all(map(math.isfinite, values)):
            return int(values[0]), (math.nan,) * 4
        return int(values[0]), (min(xs), min(ys), max(xs), max(ys))
    hint = " (a score at the end makes it a prediction)" if len(values) == 6 else ""
    wanted = "class cx cy w h, or class and a polygon of 3 points or more"
    raise ValueError(f"{len(values)} numbers{hint}; expected {wanted}")
