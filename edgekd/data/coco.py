"""COCO JSON (Lin et al., 2014, "Microsoft COCO: Common Objects in Context"): one file a split.

Labels follow the category ids, in order, over all splits together. Splits are annotations/instances_SPLIT.json,
SPLIT/_annotations.coco.json, or any JSON file of that content in `annotations/` or in the folder itself, under its own
name. Boxes are [x, y, width, height] in pixels; segmentation masks are not read.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from edgekd.data.layout import Format, RawImage, RawObject, require_split
from edgekd.data.problems import Problem, printable
from edgekd.errors import DataError

EDGEKD_ID = "edgekd_id"
"""Key of an image's own id, where that is no integer and so cannot be COCO's."""

_OTHER_TASKS = re.compile(r"^(captions|person_keypoints|stuff|panoptic|image_info)_")
_SNIFFED_BYTES = 1 << 30


def coco_files(root: Path) -> dict[str, Path]:
    """Split -> its JSON file; empty where `root` (a folder, or one such file) is not in COCO layout."""
    if root.is_file():
        return {_split_name(root): root} if root.suffix.lower() == ".json" and _looks_like_coco(root) else {}
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*/_annotations.coco.json")):
        found[path.parent.name] = path
    for folder in (root / "annotations", root / "Annotations", root):
        if not folder.is_dir():
            continue
        for path in sorted(folder.glob("[!.]*.json")):
            if _OTHER_TASKS.match(path.name) or not path.is_file():
                continue
            if path.name.startswith("instances_") or _looks_like_coco(path):
                found.setdefault(_split_name(path), path)
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
            DataError: two splits give one id to different names, or one name to different ids.
        """
        return tuple(self.category_ids())

    def category_ids(self) -> Mapping[str, int]:
        """Category name -> id, in id order; see `class_names`."""
        by_id: dict[int, str] = {}
        by_name: dict[str, int] = {}
        for path in self._files.values():
            for identity, name in _categories(path, *_stamp(path)).items():
                if by_id.setdefault(identity, name) != name or by_name.setdefault(name, identity) != identity:
                    raise DataError(
                        f"{printable(path)}: category {identity} {name!r} contradicts another category of the data set",
                        got=f"{identity}: {name!r}",
                        expected=f"{identity}: {by_id[identity]!r}, {by_name.get(name, identity)}: {name!r}",
                    )
        return {by_id[identity]: identity for identity in sorted(by_id)}

    def scan(self, split: str, problems: list[Problem], limit: int | None = None) -> list[RawImage]:
        """See `layout.Source.scan`."""
        require_split(split, self.splits(), self.root)
        path = self._files[split]
        try:
            data = _load(path)
        except CocoError as error:
            problems.append(Problem("bad-annotation", path, str(error), error.line, split=split))
            return []
        reader = _Reader(path, split, self._image_folders(split), problems)
        return reader.read(data, limit)

    def _image_folders(self, split: str) -> list[Path]:
        path = self._files[split]
        base = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        folders = [base / split, base / "images" / split, base / "images", base / "data", path.parent, base]
        return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


class CocoError(ValueError):
    """A file is no COCO JSON; `line` is where, if that is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class _Reader:
    """One JSON file on its way to `RawImage`s."""

    path: Path
    split: str
    folders: list[Path]
    problems: list[Problem]
    names: dict[int, str] = field(default_factory=dict)

    def read(self, data: Mapping[str, Any], limit: int | None) -> list[RawImage]:
        self.names = _categories(self.path, *_stamp(self.path))
        images, known = self._images(data["images"], limit)
        objects = self._objects(data["annotations"], known)
        return [
            RawImage(image_id, name, path, self.path, hw, tuple(objects.get(key, ())), item=item)
            for key, (image_id, name, path, hw, item) in images.items()
        ]

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
            if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not _is_name(entry.get("file_name")):
                self._report("bad-annotation", "an image needs an id and a file_name", item)
                continue
            key, name = str(entry["id"]), entry["file_name"].replace("\\", "/")
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
            images[key] = (own_id, printable(name), path, _declared_hw(entry), item)
        return images, known

    def _objects(self, entries: list[Any], known: set[str]) -> dict[str, list[RawObject]]:
        objects: dict[str, list[RawObject]] = {}
        ids: set[str] = set()
        for position, entry in enumerate(entries):
            item = f"annotations[{position}]"
            if not isinstance(entry, dict):
                self._report("bad-annotation", "an annotation must be an object", item)
                continue
            if _is_id(entry.get("id")):
                identity = str(entry["id"])
                item += f" (id {identity})"
                if identity in ids:
                    self._report("repeated-annotation-id", f"annotation id {identity} stands here before", item)
                ids.add(identity)
            if str(entry.get("image_id")) not in known:
                self._report("orphan-annotation", f"no image has id {entry.get('image_id')!r}", item)
                continue
            try:
                obj = self._object(entry, item)
            except (CocoError, OverflowError) as error:
                self._report("bad-annotation", str(error), item)
                continue
            objects.setdefault(str(entry["image_id"]), []).append(obj)
        return objects

    def _object(self, entry: Mapping[str, Any], item: str) -> RawObject:
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise CocoError(f"bbox must be [x, y, width, height], got {str(box)[:80]}")
        category = entry.get("category_id")
        if not _is_integer(category):
            raise CocoError(f"category_id must be an integer, got {category!r}")
        x, y, w, h = map(float, box)
        flags = [0 if entry.get(key) is None else entry[key] for key in ("difficult", "iscrowd")]
        if not all(flag in (0, 1) for flag in flags):
            raise CocoError(f"iscrowd and difficult must be 0 or 1, got {flags}")
        label: str | int = self.names.get(int(category), f"category_id {category}")
        return RawObject((x, y, x + w, y + h), label, bool(flags[0]), bool(flags[1]), item=item)

    def _find(self, name: str) -> Path | None:
        for folder in self.folders:
            if os.path.isfile(folder / name):  # unlike Path.is_file, it takes names too long or with a NUL
                return folder / name
        return None

    def _searched(self) -> str:
        return ", ".join(printable(folder) for folder in self.folders) or "any folder of the data set"

    def _report(self, kind: str, message: str, item: str) -> None:
        self.problems.append(Problem(kind, self.path, message, item=item, split=self.split))


def _load(path: Path) -> Mapping[str, Any]:
    """A COCO file with its three lists.

    Raises:
        CocoError: unreadable, malformed, or without them.
    """
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        message = "the file is empty" if path.stat().st_size == 0 else f"malformed JSON: {error.msg}"
        raise CocoError(message, error.lineno) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CocoError(f"not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CocoError("no COCO file: the outermost value is no object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise CocoError(f"no COCO file: {key!r} is {'no list' if key in data else 'missing'}")
    return data


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=64)
def _categories(path: Path, mtime_ns: int, size: int) -> dict[int, str]:
    """Category id -> name of one file, without parsing the rest of what may be hundreds of megabytes.

    A file that cannot be parsed has none; `scan` reports it.

    Raises:
        DataError: the categories are wrong in themselves.
    """
    try:
        entries = _category_entries(path.read_bytes().decode("utf-8-sig"), path)
    except (OSError, ValueError, RecursionError):
        return {}
    names: dict[int, str] = {}
    for position, entry in enumerate(entries):
        where = f"{printable(path)}: categories[{position}]"
        if not isinstance(entry, dict) or not _is_integer(entry.get("id")) or not _is_name(entry.get("name")):
            raise DataError(f"{where} needs an integer id and a name", got=str(entry)[:100])
        if entry["id"] in names or entry["name"] in names.values():
            raise DataError(f"{where} repeats an id or a name", got=f"{entry['id']}: {entry['name']!r}")
        names[int(entry["id"])] = entry["name"]
    return names


def _category_entries(text: str, path: Path) -> list[Any]:
    decoder = json.JSONDecoder()
    for match in re.finditer(r'"categories"\s*:\s*(?=\[)', text):
        try:
            entries, _ = decoder.raw_decode(text, match.end())
        except ValueError:
            continue
        if entries and all(isinstance(entry, dict) and "name" in entry for entry in entries):
            return list(entries)
    return list(_load(path)["categories"])


def _looks_like_coco(path: Path) -> bool:
    try:
        if path.stat().st_size > _SNIFFED_BYTES:
            return True
        data = path.read_bytes()
    except OSError:
        return False
    return b'"images"' in data and (b'"annotations"' in data or b'"categories"' in data)


def _split_name(path: Path) -> str:
    if path.name == "_annotations.coco.json":
        return path.parent.name
    if path.stem.startswith("instances_"):
        return path.stem.removeprefix("instances_")
    stem = re.sub(r"^annotations_|_(annotations|instances)$", "", path.stem)
    return "all" if stem in ("annotations", "instances", "_annotations.coco") else stem


def _declared_hw(entry: Mapping[str, Any]) -> tuple[int, int]:
    h, w = entry.get("height"), entry.get("width")
    return (int(h), int(w)) if _is_integer(h) and _is_integer(w) else (0, 0)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value != ""
