"""COCO JSON (Lin et al., 2014, "Microsoft COCO: Common Objects in Context"): one file a split.

Labels follow the category ids, in order, over all splits together. Splits are annotations/instances_SPLIT.json,
SPLIT/_annotations.coco.json, or any JSON file of that content in `annotations/` or in the folder itself, under its own
name, or SPLIT/*.json, or SPLIT/annotations/*.json. Boxes are [x, y, width, height] in pixels; of segmentations, only the
box around polygons is read, and only where there is no other; of a turned box (CVAT's rotation), the one around it.
"""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.data.coco_json import (
    CocoError,
    attributes,
    categories,
    corners,
    declared_hw,
    flag,
    id_key,
    is_name,
    load_coco,
    looks_like_coco,
    stamp,
    whole,
)
from edgekd.data.layout import Format, RawImage, RawObject, is_part, is_regular, require_split, tails, usual_split
from edgekd.data.problems import Problem, labels_of_teachers, printable
from edgekd.errors import DataError

EDGEKD_ID = "edgekd_id"
"""Key of an image's own id, where that is no integer and so cannot be COCO's."""

_OTHER_TASKS = re.compile(r"^(captions|person_keypoints|stuff|panoptic|image_info)_")


def coco_files(root: Path) -> dict[str, Path]:
    """Split -> its JSON file; empty where `root` (a folder, or one such file) is not in COCO layout.

    Raises:
        DataError: two files that differ claim one split: none of them is to be preferred.
    """
    if root.is_file():
        return {_split_name(root): root} if root.suffix.lower() == ".json" and looks_like_coco(root) else {}
    found: dict[str, Path] = {}
    others: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*/_annotations.coco.json")):
        found[path.parent.name] = path
    for folder in (root / "annotations", root / "Annotations", root):
        if not folder.is_dir():
            continue
        paths = [path for path in sorted(folder.glob("[!.]*.json")) if path.is_file()]
        paths = [path for path in paths if not _OTHER_TASKS.match(path.name)]
        sure = {path for path in paths if path.name.startswith("instances_") or looks_like_coco(path)}
        for path in paths:
            # Beside train.json, val.json is a split even where it is empty or cut off: reading it says so.
            if path in sure or (sure and is_part(_split_name(path))):
                others.setdefault(_split_name(path), []).append(path)
    for split, paths in others.items():
        first = found.setdefault(split, paths[0])
        for path in paths:
            if path != first and not filecmp.cmp(first, path, shallow=False):
                raise DataError(
                    f"two files of {printable(root)} describe split {split!r}, and differ",
                    got=f"{printable(first)}, {printable(path)}",
                    expected="one",
                    fix="move the other one out of the data set",
                )
    if not found:
        for path in sorted((root / "annotations").glob("person_keypoints_*.json")):  # with boxes, like the others
            found[_split_name(path)] = path
    return found or _in_split_folders(root)


def _in_split_folders(root: Path) -> dict[str, Path]:
    """train/labels.json, val/annotations/instances.json, ...: the one such file of each folder called like a split."""
    found: dict[str, Path] = {}
    folders = [path for path in sorted(root.iterdir()) if is_part(path.name) and path.is_dir()] if root.is_dir() else []
    for folder in folders:
        paths = [*folder.glob("[!.]*.json"), *folder.glob("annotations/[!.]*.json")]
        paths = [path for path in paths if is_regular(path) and looks_like_coco(path)]
        if len(paths) == 1:
            found[folder.name] = paths[0]
    names = {path.relative_to(root / split) for split, path in found.items()}
    for folder in folders:  # one of the same name that is empty or cut off: reading it says so
        same = [folder / name for name in names if is_regular(folder / name)]
        if len(same) == 1:
            found.setdefault(folder.name, same[0])
    return found


class CocoSource:
    """A folder in COCO layout, or one COCO JSON file with its images beside it."""

    format: Format = "coco"

    def __init__(self, root: Path) -> None:
        """Find the JSON files.

        Raises:
            DataError: there is none.
        """
        self.root = root
        self._files = coco_files(root)
        if not self._files:
            raise DataError(f"{printable(root)} is not in COCO layout", expected="annotations/instances_SPLIT.json")

    def splits(self) -> tuple[str, ...]:
        """Splits by the names of the JSON files."""
        return tuple(self._files)

    def file(self, split: str) -> Path:
        """The split's JSON file."""
        return self._files[split]

    def class_names(self) -> tuple[str, ...]:
        """Category names in id order, over all splits.

        Raises:
            DataError: two splits give one id to different names.
        """
        return tuple(self.category_ids())

    def category_ids(self) -> Mapping[str, int]:
        """Category name -> id (the smallest, if it has several), in id order; see `class_names`."""
        by_id: dict[int, tuple[str, Path]] = {}
        by_name: dict[str, int] = {}
        for path in self._files.values():
            for identity, name in categories(path, *stamp(path)).items():
                other, before = by_id.setdefault(identity, (name, path))
                if other != name:
                    raise DataError(
                        f"{printable(path)}: category {identity} {name!r} contradicts {printable(before)}",
                        got=f"{identity}: {name!r}",
                        expected=f"{identity}: {other!r}",
                    )
                by_name[name] = min(identity, by_name.get(name, identity))
        return dict(sorted(by_name.items(), key=lambda entry: entry[1]))

    def scan(self, split: str, problems: list[Problem], limit: int | None = None) -> list[RawImage]:
        """See `layout.Source.scan`."""
        require_split(split, self.splits(), self.root)
        path = self._files[split]
        try:
            data = load_coco(path)
        except CocoError as error:
            problems.append(Problem("bad-annotation", path, str(error), error.line, split=split))
            return []
        info = data.get("info")
        teachers = info.get("teachers") if isinstance(info, dict) else None
        by = tuple(teachers) if isinstance(teachers, dict) else ()  # as edgekd.labelling writes it
        if by:
            problems.append(labels_of_teachers(path, by, "in `info`", split))
        reader = _Reader(path, split, self._image_folders(split), problems, by)
        return reader.read(data, limit)

    def _image_folders(self, split: str) -> list[Path]:
        path = self._files[split]
        base = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        own = [folder / (_called_like(split, folder) or split) for folder in (base, base / "images")]
        folders = [*own, base / "images", base / "data", path.parent, base]
        return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _called_like(split: str, place: Path) -> str | None:
    """The folder in `place` that is called like the split, or the only one that means the same: train2017 for train."""
    if not place.is_dir():
        return None
    with os.scandir(place) as entries:
        return usual_split([split], tuple(entry.name for entry in entries if entry.is_dir()), place)


@dataclass
class _Reader:
    """One JSON file on its way to `RawImage`s."""

    path: Path
    split: str
    folders: list[Path]
    problems: list[Problem]
    teachers: tuple[str, ...] = ()
    names: dict[int, str] = field(default_factory=dict)

    def read(self, data: Mapping[str, Any], limit: int | None) -> list[RawImage]:
        self.names = categories(self.path, *stamp(self.path))
        for identity, name in self.names.items():
            twin = next(other for other in self.names if self.names[other] == name)
            if twin != identity:
                self._report("repeated-category", f"ids {twin} and {identity} are both {name!r}", "categories")
        self._put_first_the_folder_of_all(data["images"][:limit])
        images, known = self._images(data["images"], limit)
        objects = self._objects(data["annotations"], known)
        return [
            RawImage(
                image_id,
                name,
                path,
                self.path,
                hw,
                tuple(objects.get(key, ())),
                item=item,
                numbers="left, top, width, height",
                teachers=self.teachers,
            )
            for key, (image_id, name, path, hw, item) in images.items()
        ]

    def _put_first_the_folder_of_all(self, entries: list[Any]) -> None:
        """One that holds every image as it is named is theirs, whatever another folder holds of the same names."""
        names = [entry.get("file_name") for entry in entries if isinstance(entry, dict)]
        texts = [name.replace("\\", "/") for name in names if is_name(name)]
        complete = (folder for folder in self.folders if all(os.path.isfile(folder / text) for text in texts))
        first = next(complete, None)
        if first is not None:
            self.folders = list(dict.fromkeys((first, *self.folders)))

    def _images(
        self, entries: list[Any], limit: int | None
    ) -> tuple[dict[str, tuple[str, str, Path, tuple[int, int], str]], set[str]]:
        """Images to read by COCO's id, and every id that the file knows (found or not)."""
        images: dict[str, tuple[str, str, Path, tuple[int, int], str]] = {}
        known: set[str] = set()
        own_ids: set[str] = set()
        owners: dict[Path, str] = {}
        for position, entry in enumerate(entries):
            item = f"images[{position}]"
            key = id_key(entry.get("id")) if isinstance(entry, dict) else None
            if key is None or not is_name(entry.get("file_name")):
                self._report("bad-annotation", "an image needs an id and a file_name", item)
                continue
            name = entry["file_name"].replace("\\", "/")
            item += f" (id {key})"
            own_id = str(entry.get(EDGEKD_ID, key))
            if key in known or own_id in own_ids:
                self._report("duplicate-id", f"image id {key if key in known else own_id} stands here before", item)
                continue
            known.add(key)
            own_ids.add(own_id)
            if limit is not None and len(known) > limit:
                continue
            path = self._find(name)
            if path is None:
                self._report("missing-image", f"{name!r} is not in {self._searched()}", item)
                continue
            if path in owners:
                self._report("shared-image", f"{name!r} is the file of image id {owners[path]} as well", item)
                continue
            owners[path] = key
            images[key] = (own_id, printable(name), path, declared_hw(entry), item)
        return images, known

    def _objects(self, entries: list[Any], known: set[str]) -> dict[str, list[RawObject]]:
        objects: dict[str, list[RawObject]] = {}
        ids: set[str] = set()
        for position, entry in enumerate(entries):
            item = f"annotations[{position}]"
            if not isinstance(entry, dict):
                self._report("bad-annotation", "an annotation must be an object", item)
                continue
            identity = id_key(entry.get("id"))
            if identity is not None:
                item += f" (id {identity})"
                if identity in ids:
                    self._report("repeated-annotation-id", f"annotation id {identity} stands here before", item)
                ids.add(identity)
            owner = id_key(entry.get("image_id"))
            if owner is None or owner not in known:
                self._report("orphan-annotation", f"no image has id {entry.get('image_id')!r}", item)
                continue
            try:
                obj = self._object(entry, item)
            except (CocoError, OverflowError) as error:
                self._report("bad-annotation", str(error), item)
                continue
            objects.setdefault(owner, []).append(obj)
        return objects

    def _object(self, entry: Mapping[str, Any], item: str) -> RawObject:
        box, category = corners(entry), whole(entry.get("category_id"))
        if category is None:
            raise CocoError(f"category_id must be an integer, got {entry.get('category_id')!r}")
        label: str | int = self.names.get(category, f"category_id {category}")
        difficult = flag(entry.get("difficult")) or flag(attributes(entry).get("difficult"))
        return RawObject(box, label, difficult, flag(entry.get("iscrowd")), item=item)

    def _find(self, name: str) -> Path | None:
        tries = (folder / text for text in tails(name) for folder in self.folders)
        return next((path for path in tries if os.path.isfile(path)), None)  # takes names too long or with a NUL

    def _searched(self) -> str:
        return ", ".join(printable(folder) for folder in self.folders) or "any folder of the data set"

    def _report(self, kind: str, message: str, item: str) -> None:
        self.problems.append(Problem(kind, self.path, message, item=item, split=self.split))


def _split_name(path: Path) -> str:
    if path.name == "_annotations.coco.json":
        return path.parent.name
    if path.stem.startswith(("instances_", "person_keypoints_")):
        return re.sub("^(instances|person_keypoints)_", "", path.stem)
    stem = re.sub(r"^annotations_|_(annotations|instances)$", "", path.stem)
    return "all" if stem in ("annotations", "instances", "_annotations.coco") else stem
