"""The annotation files of each layout; the images lie in place already (`convert` puts them there)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import yaml
from numpy.typing import NDArray

from edgekd.artifact import write_json, write_text
from edgekd.data.coco import EDGEKD_ID
from edgekd.data.layout import stem_of
from edgekd.data.sidecar import ImageNote, Sidecar, write_sidecar
from edgekd.data.yolo_folders import label_path
from edgekd.data.yolo_yaml import NOT_SPLITS
from edgekd.errors import DataError
from edgekd.types import ImageRecord

_DIGITS = 9
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


@dataclass(frozen=True)
class Placed:
    """An image with its name in the new layout.

    Attributes:
        boxes: (N, 4) float64 xyxy pixels: the record's, before rounding to float32.
        name: file name within the image folder, with "/" between folders, unique; in VOC and YOLO also without its suffix.
    """

    record: ImageRecord
    boxes: NDArray[np.float64]
    name: str


@dataclass(frozen=True)
class Content:
    """All that a writer writes; `splits` in order, empty ones included; `teachers` of those that these have annotated."""

    class_names: tuple[str, ...]
    category_ids: Mapping[str, int] | None
    splits: Mapping[str, list[Placed]]
    teachers: Mapping[str, tuple[str, ...]]


def image_folder(to: str, split: str) -> str:
    """Where a layout keeps a split's images, relative to the data set."""
    return {"voc": "JPEGImages", "coco": split, "yolo": f"images/{split}"}[to]


def write_voc(folder: Path, content: Content) -> None:
    """Annotations/*.xml, ImageSets/Main/*.txt, edgekd.json.

    Raises:
        DataError: a class name that XML, as VOC readers read it, cannot hold.
    """
    for name in content.class_names:
        if _NOT_XML.search(name) or name != name.strip():
            raise DataError(f"class name {name!r} cannot stand in a VOC annotation", fix="rename the class")
    written: set[str] = set()
    for split, rows in content.splits.items():
        write_text(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem_of(row.name)}\n" for row in rows))
        for row in rows:
            if row.name not in written:
                path = folder / "Annotations" / f"{stem_of(row.name)}.xml"
                _write(path, _voc_xml(row, content.class_names))
            written.add(row.name)
    (folder / "Annotations").mkdir(exist_ok=True)
    write_sidecar(folder, _sidecar(content, in_folders=False))


def write_coco(folder: Path, content: Content) -> None:
    """annotations/instances_SPLIT.json, with object ids counted over the split."""
    known = content.category_ids or {}
    ids = [known[name] for name in content.class_names if name in known]
    complete = len(ids) == len(content.class_names)
    if not complete or ids != sorted(set(ids)):  # the classes may be in another order than theirs
        ids = list(range(1, len(content.class_names) + 1))
    categories = [
        {"id": i, "name": name, "supercategory": ""} for i, name in zip(ids, content.class_names, strict=True)
    ]
    for split, rows in content.splits.items():
        own = all(re.fullmatch(r"0|[1-9]\d{0,17}", row.record.image_id) for row in rows)
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for position, row in enumerate(rows, 1):
            number = int(row.record.image_id) if own else position
            h, w = row.record.image_hw
            images.append({"id": number, "file_name": row.name, "height": h, "width": w})
            if not own:
                images[-1][EDGEKD_ID] = row.record.image_id
            annotations += _coco_objects(row, number, len(annotations), ids)
        data: dict[str, object] = {"images": images, "annotations": annotations, "categories": categories}
        if split in content.teachers:
            data = {"info": {"teachers": dict.fromkeys(content.teachers[split])}, **data}
        write_json(folder / "annotations" / f"instances_{split}.json", data)


def write_yolo(folder: Path, content: Content) -> None:
    """labels/SPLIT/*.txt, data.yaml, edgekd.json. Numbers have all their digits, so that pixels come back exactly.

    Raises:
        DataError: a split's name means something else in data.yaml.
    """
    reserved = sorted(set(content.splits) & NOT_SPLITS)
    if reserved:
        raise DataError(f"a split cannot be named {reserved[0]!r} in data.yaml", fix="rename the split")
    for split, rows in content.splits.items():
        (folder / "labels" / split).mkdir(parents=True)
        for row in rows:
            h, w = row.record.image_hw
            lines = []
            for (x1, y1, x2, y2), label in zip(row.boxes.tolist(), row.record.labels.tolist(), strict=True):
                shares = ((x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h)
                lines.append(f"{label} " + " ".join(f"{share!r}" for share in shares) + "\n")
            image = folder / image_folder("yolo", split) / row.name  # whose own folder may be called images as well
            _write(label_path(image), "".join(lines))
    data = {split: f"images/{split}" for split in content.splits}
    names = dict(enumerate(content.class_names))
    text = yaml.safe_dump({**data, "nc": len(names), "names": names}, sort_keys=False, allow_unicode=True)
    write_text(folder / "data.yaml", text)
    write_sidecar(folder, _sidecar(content, in_folders=True))


def _write(path: Path, text: str) -> None:
    """Plainly: the whole folder is moved into place when it is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _voc_xml(row: Placed, class_names: tuple[str, ...]) -> str:
    record = row.record
    h, w = record.image_hw
    lines = [
        "<annotation>",
        "\t<folder>JPEGImages</folder>",
        f"\t<filename>{escape(row.name)}</filename>",
        f"\t<size><width>{w}</width><height>{h}</height><depth>3</depth></size>",
        "\t<segmented>0</segmented>",
    ]
    for (x1, y1, x2, y2), label, difficult, crowd in _objects(row):
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True)
        lines += [
            "\t<object>",
            f"\t\t<name>{escape(class_names[label])}</name>",
            f"\t\t<difficult>{int(difficult)}</difficult>",
            *(["\t\t<crowd>1</crowd>"] if crowd else []),
            "\t\t<bndbox>" + "".join(f"<{tag}>{_number(value)}</{tag}>" for tag, value in corners) + "</bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _coco_objects(row: Placed, image_number: int, before: int, ids: list[int]) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for (x1, y1, x2, y2), label, difficult, crowd in _objects(row):
        w, h = round(x2 - x1, _DIGITS), round(y2 - y1, _DIGITS)
        entry: dict[str, object] = {
            "id": before + len(entries) + 1,
            "image_id": image_number,
            "category_id": ids[label],
            "bbox": [_number(value) for value in (x1, y1, w, h)],
            "area": _number(w * h),
            "iscrowd": int(crowd),
        }
        if difficult:
            entry["difficult"] = 1
        entries.append(entry)
    return entries


def _objects(row: Placed) -> Iterable[tuple[list[float], int, bool, bool]]:
    record = row.record
    columns = (row.boxes.tolist(), record.labels.tolist(), record.difficult.tolist(), record.crowd.tolist())
    return zip(*columns, strict=True)


def _number(value: float) -> int | float:
    """Whole numbers without a point, others to 1e-9."""
    value = round(value, _DIGITS)
    return int(value) if value == int(value) else value


def _sidecar(content: Content, in_folders: bool) -> Sidecar:
    """Notes on what the layout cannot hold; `in_folders`: it lists no images and flags no objects (YOLO)."""
    images: dict[str, dict[str, ImageNote]] = {}
    order: dict[str, tuple[str, ...]] = {}
    for split, rows in content.splits.items():
        stems = tuple(stem_of(row.name) for row in rows)
        if in_folders and stems != tuple(sorted(stems)):
            order[split] = stems
        for row in rows:
            record, stem = row.record, stem_of(row.name)
            image_id = None if record.image_id == stem else record.image_id
            marked = in_folders and bool((record.difficult | record.crowd).any())
            if image_id is None and not marked:
                continue
            difficult = tuple(np.flatnonzero(record.difficult).tolist()) if in_folders else ()
            crowd = tuple(np.flatnonzero(record.crowd).tolist()) if in_folders else ()
            images.setdefault(split, {})[stem] = ImageNote(image_id, len(record.labels), difficult, crowd)
    return Sidecar(content.class_names, content.category_ids, images, order, tuple(content.splits), content.teachers)
