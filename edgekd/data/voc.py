"""Pascal VOC: one XML file an image (Everingham et al., 2010, "The Pascal Visual Object Classes Challenge").

Frame: VOC counts pixels from 1 and includes both ends, so xmin, ymin, xmax, ymax become x1 = xmin - 1, y1 = ymin - 1,
x2 = xmax, y2 = ymax, for whole and fractional numbers alike, in every VOC layout; `data convert` writes by the inverse.
Only an object's own <bndbox> is read: boxes of its <part>s are not objects; where CVAT says that it is turned, the
box around that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgekd.data.foreign import kind_of
from edgekd.data.layout import (
    IMAGE_SUFFIXES,
    PARTS,
    UNREAD_SUFFIXES,
    Format,
    RawImage,
    each_file,
    files_under,
    forms,
    index_by_stem,
    is_hidden,
    is_part,
    numbered_lines,
    require_split,
    stem_of,
    tails,
    unread_message,
)
from edgekd.data.problems import Problem, labels_of_teachers, printable
from edgekd.data.sidecar import NAME, read_sidecar
from edgekd.data.voc_annotation import AnnotationError, XmlError, read_annotation
from edgekd.errors import DataError

_ANNOTATIONS = ("Annotations", "annotations", "Annotation", "xml", "labels")
_IMAGES = ("JPEGImages", "Images", "images", "img", "imgs", "PNGImages", "data")


def voc_bases(root: Path) -> list[Path]:
    """The folders in VOC layout at `root`: itself, or nested ones such as VOCdevkit/VOC2007."""
    if not root.is_dir():
        return []
    if _is_base(root):
        return [root]
    for parent in (root, root / "VOCdevkit"):
        if parent.is_dir():
            nested = [child for child in _folders(parent) if _has_image_sets(child)]
            if nested:
                return nested
    if _split_folders(root):
        return [root]
    return [child for child in _folders(root) if _is_base(child)]


class VocSource:
    """A folder in VOC layout.

    Splits are the files of ImageSets/Main, or train.txt, val.txt, ... in the folder itself, as PaddleDetection has them.
    Without them, each subfolder with XML files is a split, or each of Annotations/ where all are called like splits, and a
    folder with nothing but annotations and images is one split, "all".
    """

    format: Format = "voc"

    def __init__(self, root: Path) -> None:
        """Find the layout at `root`.

        Raises:
            DataError: none or several are there.
        """
        bases = voc_bases(root)
        if not bases:
            raise DataError(f"{printable(root)} is not in VOC layout", expected="Annotations/*.xml and JPEGImages/")
        if len(bases) > 1:
            choices = ", ".join(printable(base) for base in bases)
            raise DataError(f"{printable(root)} holds several VOC data sets", expected=f"one of {choices}")
        self.root = root
        self.base = bases[0]
        self._sidecar = read_sidecar(self.base)
        self._lists = _split_lists(self.base)
        self._folders = {} if self._lists else {folder.name: folder for folder in _split_folders(self.base)}
        self._parts: tuple[str, ...] = () if self._lists or self._folders else _parts(self.base)
        self._annotations: dict[Path, dict[str, list[Path]]] = {}
        self._images: dict[Path, dict[str, list[Path]]] = {}
        self._unread: dict[Path, dict[str, list[Path]]] = {}
        self._folded: dict[Path, dict[str, list[Path]]] = {}

    def splits(self) -> tuple[str, ...]:
        """Names of the lists, or of folders, or ("all",)."""
        return tuple(self._lists) or tuple(self._folders) or self._parts or ("all",)

    def class_names(self) -> tuple[str, ...]:
        """The order that `data convert` kept, or the names found over all splits, sorted (VOC's own order as well)."""
        if self._sidecar.class_names:
            return self._sidecar.class_names
        found: set[str] = set()
        for split in self.splits():
            for key in dict.fromkeys(key for key, _ in self._entries(split)):
                path = self._annotation_path(split, key)
                try:
                    found.update(_object_names(path) if path else ())
                except (OSError, XmlError):  # reported by whoever scans that split
                    continue
        return tuple(sorted(found))

    def category_ids(self) -> Mapping[str, int] | None:
        """The ids of the COCO data set that this was converted from."""
        return self._sidecar.category_ids

    def scan(self, split: str, problems: list[Problem], limit: int | None = None) -> list[RawImage]:
        """See `layout.Source.scan`."""
        require_split(split, self.splits(), self.root)
        teachers = self._sidecar.teachers.get(self._sidecar.origin(split), ())
        if teachers:
            problems.append(labels_of_teachers(self.base / NAME, teachers, f"of {split!r}", split))
        listing = self._lists.get(split)
        found: dict[str, RawImage] = {}
        seen: dict[str, int | None] = {}
        owners: dict[Path, Path] = {}
        for key, line in self._entries(split)[:limit]:
            if key in seen:
                assert listing is not None  # a folder names nothing twice
                message = f"{key!r} stands in line {seen[key]} already"
                problems.append(Problem("repeated-image", listing, message, line, split=split))
                continue
            seen[key] = line
            raw = self._read(split, key, line, problems)
            if raw is None:
                continue
            if raw.image_id in found:
                problems.append(Problem("duplicate-id", raw.annotation, f"id {raw.image_id!r} again", split=split))
                continue
            if raw.path in owners:
                message = f"{printable(raw.path.name)} is the image of {printable(owners[raw.path].name)} as well"
                problems.append(Problem("shared-image", raw.annotation, message, split=split))
                continue
            owners[raw.path] = raw.annotation
            found[raw.image_id] = replace(raw, teachers=teachers)
        if listing is None and limit is None:
            self._report_unannotated(split, {raw.path for raw in found.values()}, problems)
        return list(found.values())

    def _report_unannotated(self, split: str, used: set[Path], problems: list[Problem]) -> None:
        """Name images without an XML file, where no list says which images are meant."""
        images = self._images.get(self._image_folder(split), {})
        for path in (path for stem, paths in images.items() if self._is_of(split, stem) for path in paths):
            if path not in used and not self._annotation_path(split, stem_of(path.name)):
                problems.append(Problem("unannotated-image", path, "no annotation has its name", split=split))

    def _read(self, split: str, key: str, line: int | None, problems: list[Problem]) -> RawImage | None:
        path = self._annotation_path(split, key)
        if path is None:  # only a list can name what is not there
            message = f"{key!r} has no annotation in {printable(self._annotation_folder(split))}"
            problems.append(Problem("missing-annotation", self._lists[split], message, line, split=split))
            return None
        blame = (self._lists[split], line) if split in self._lists else (path, None)
        try:
            declared, file_name, objects = read_annotation(path)
        except (XmlError, AnnotationError) as error:
            problems.append(Problem("bad-annotation", path, str(error), error.line, split=split))
            return None
        except OSError as error:
            problems.append(Problem("bad-annotation", path, str(error.strerror), split=split))
            return None
        image = self._find_image(split, key, file_name, path, problems)
        if image is None:
            kind, message = self._missing(self._image_folder(split), key)
            problems.append(Problem(kind, blame[0], message, blame[1], split=split))
            return None
        note = self._sidecar.note(self._sidecar.origin(split), printable(key))
        image_id = note.image_id if note and note.image_id is not None else printable(key)
        name = printable(key + image.suffix)
        return RawImage(image_id, name, image, path, declared, objects)

    def _missing(self, folder: Path, key: str) -> tuple[str, str]:
        """Kind of problem and message where there is no image that can be read."""
        if folder not in self._unread:
            self._unread[folder] = index_by_stem(folder, UNREAD_SUFFIXES)
        unread = self._unread[folder].get(printable(key))
        if unread:
            return "unread-image", unread_message(unread[0])
        return "missing-image", f"no image for {key!r} in {printable(folder)}"

    def _entries(self, split: str) -> list[tuple[str, int | None]]:
        """(image key, line in the split's file) in order."""
        if split in self._lists:
            return [(self._key(split, text), line) for line, text in numbered_lines(self._lists[split])]
        return [(key, None) for key in self._annotation_index(split) if self._is_of(split, key)]

    def _is_of(self, split: str, key: str) -> bool:
        """Whether an image belongs to the split by the folder that it lies in."""
        return split not in self._parts or key.startswith(f"{split}/")

    def _key(self, split: str, text: str) -> str:
        """An image key out of a line, which may carry folders, a file suffix or a flag (as class_split.txt do)."""
        if self._annotation_path(split, text):
            return text
        key = text.rsplit(None, 1)[0] if re.search(r"\s-?[01]$", text) else text
        stem, suffix = os.path.splitext(key)
        trimmed = stem if suffix.lower() in IMAGE_SUFFIXES | {".xml"} else key
        tries = [trimmed, *tails("/" + trimmed)[1:]]  # "JPEGImages/1.jpg" and "/home/me/voc/JPEGImages/1.jpg" name 1
        return next((name for name in tries if self._annotation_path(split, name)), key)

    def _annotation_folder(self, split: str) -> Path:
        base = self._folders.get(split, self.base)
        return _annotation_folder(base) or base / "Annotations"

    def _annotation_index(self, split: str) -> dict[str, list[Path]]:
        base = self._folders.get(split, self.base)
        if base not in self._annotations:
            self._annotations[base] = index_by_stem(self._annotation_folder(split), {".xml"})
        return self._annotations[base]

    def _annotation_path(self, split: str, key: str) -> Path | None:
        found = _named(self._annotation_index(split), printable(key))
        return found[0] if found else None

    def _image_folder(self, split: str) -> Path:
        base = self._folders.get(split, self.base)
        return next((base / name for name in _IMAGES if (base / name).is_dir()), base)

    def _find_image(
        self, split: str, key: str, file_name: str, annotation: Path, problems: list[Problem]
    ) -> Path | None:
        folder = self._image_folder(split)
        if folder not in self._images:
            self._images[folder] = index_by_stem(folder, IMAGE_SUFFIXES)
        by_stem = self._images[folder]
        other = _named(by_stem, stem_of(file_name)) if file_name else []
        choices = _named(by_stem, printable(key)) or other or self._in_other_letters(split, key)
        if other and choices[0] not in other:
            message = (
                f"<filename> names another image, {printable(other[0].name)}; {printable(choices[0].name)} is used"
            )
            problems.append(Problem("ambiguous-image", annotation, message, split=split))
        if len(choices) <= 1:
            return choices[0] if choices else None
        named = [path for path in choices if path.name == file_name]
        chosen = (named or choices)[0]
        names = ", ".join(printable(path.name) for path in choices)
        message = f"images {names} share the name; {printable(chosen.name)} is used"
        problems.append(Problem("ambiguous-image", annotation, message, split=split))
        return chosen

    def _in_other_letters(self, split: str, key: str) -> list[Path]:
        """The one image whose name differs in case only, as Windows and macOS would find it."""
        folder = self._image_folder(split)
        if folder not in self._folded:
            folded = self._folded.setdefault(folder, {})
            for stem, paths in self._images[folder].items():
                if not self._annotation_path(split, stem):
                    folded.setdefault(stem.casefold(), []).extend(paths)
        found = self._folded[folder].get(printable(key).casefold(), [])
        return found if len(found) == 1 else []


def _named(index: Mapping[str, list[Path]], stem: str) -> list[Path]:
    """The files of this name, or of one that is the same to the eye."""
    return next((index[form] for form in forms(stem) if form in index), [])


def _object_names(path: Path) -> set[str]:
    try:
        return {str(obj.label) for obj in read_annotation(path)[2]}
    except AnnotationError:
        return set()


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name))


def _has_image_sets(folder: Path) -> bool:
    return bool(_list_files(folder))


def _list_files(base: Path) -> list[Path]:
    for folder in (base / "ImageSets" / "Main", base / "ImageSets"):
        files = sorted(path for path in folder.glob("[!.]*.txt") if path.is_file())
        if files:
            return files
    return []


def _split_lists(base: Path) -> dict[str, Path]:
    """Split -> its file, leaving out the files a class of the official sets (aeroplane_train.txt)."""
    paths = _list_files(base)
    if not paths and _annotation_folder(base) is not None:
        paths = sorted(path for path in base.glob("*.txt") if is_part(path.stem) and path.is_file())
    files = {path.stem: path for path in paths}
    return {split: path for split, path in files.items() if not _is_class_list(split, path, files)}


def _is_class_list(split: str, path: Path, files: Mapping[str, Path]) -> bool:
    parts = PARTS | files.keys() if any(map(is_part, files)) else files.keys()
    if "_" not in split or split.rsplit("_", 1)[1] not in parts:
        return False
    lines = numbered_lines(path)
    return bool(lines) and re.search(r"\s-?[01]$", lines[0][1]) is not None


def _annotation_folder(folder: Path) -> Path | None:
    for name in _ANNOTATIONS:
        if not (folder / name).is_dir():
            continue
        files = each_file(folder / name) if name == "labels" else files_under(folder / name)  # YOLO's, most likely
        if any(map(_may_be_voc, files)):
            return folder / name
    return folder if any(map(_may_be_voc, folder.iterdir())) else None


def _parts(base: Path) -> tuple[str, ...]:
    """The folders of the annotation folder that hold all of it and are called like splits: Annotations/train, /val."""
    folder = _annotation_folder(base)
    keys = index_by_stem(folder, {".xml"}) if folder else {}
    tops = sorted({key.rpartition("/")[0].partition("/")[0] for key in keys})
    return tuple(tops) if len(tops) > 1 and all(map(is_part, tops)) else ()


def _may_be_voc(path: Path) -> bool:
    return path.suffix.lower() == ".xml" and not path.name.startswith(".") and kind_of(path) is None


def _is_base(folder: Path) -> bool:
    return _has_image_sets(folder) or _annotation_folder(folder) is not None


def _split_folders(base: Path) -> list[Path]:
    """Subfolders that are splits of their own: XML files beside images, as some labelling services export."""
    if _annotation_folder(base) is not None:
        return []
    return [child for child in _folders(base) if _annotation_folder(child) is not None]
