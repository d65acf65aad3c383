"""`edgekd.json`: what VOC and YOLO layouts have no place for, so that converting there and back loses nothing.

It holds the class order, COCO's category ids, the order of a split's images where it is not the alphabet's, and for
each image only what departs from the layout's own rule: another image id, or flags of its objects. A data set without
it is read just as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.artifact import write_json
from edgekd.data.problems import printable
from edgekd.errors import DataError

NAME = "edgekd.json"
SCHEMA = "edgekd.dataset/1"


@dataclass(frozen=True)
class ImageNote:
    """What departs from the layout's rule for one image.

    Attributes:
        image_id: its id, if not the one that its file name gives.
        objects: how many objects its annotation had when this was written; flags hold only if it still has as many.
        difficult: positions of difficult objects.
        crowd: positions of crowd objects.
    """

    image_id: str | None = None
    objects: int = 0
    difficult: tuple[int, ...] = ()
    crowd: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sidecar:
    """The content of `edgekd.json`.

    Attributes:
        images: split -> image's file name without suffix -> note.
        order: split -> its images' file names without suffix; only needed where a layout lists no images.
        splits: all that were written with it; none in files of before.
        teachers: split -> those who annotated it, where `edgekd data label` did.
    """

    class_names: tuple[str, ...] | None = None
    category_ids: Mapping[str, int] | None = None
    images: Mapping[str, Mapping[str, ImageNote]] = field(default_factory=dict)
    order: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    teachers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def origin(self, split: str) -> str:
        """The split that notes speak of: the lone one that was written, where this one has been drawn from it since."""
        return split if split in self.splits or len(self.splits) != 1 else self.splits[0]

    def note(self, split: str, key: str) -> ImageNote | None:
        """The note on an image, if there is one."""
        return self.images.get(split, {}).get(key)


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write `edgekd.json` into the folder."""
    images = {
        split: {key: _note_to_dict(note) for key, note in notes.items()} for split, notes in sidecar.images.items()
    }
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "class_names": list(sidecar.class_names or ()),
        "category_ids": dict(sidecar.category_ids) if sidecar.category_ids else None,
        "splits": list(sidecar.splits),
        "order": {split: list(stems) for split, stems in sidecar.order.items()},
        "images": images,
    }
    if sidecar.teachers:
        data["teachers"] = {split: list(names) for split, names in sidecar.teachers.items()}
    write_json(folder / NAME, data)


def read_sidecar(folder: Path) -> Sidecar:
    """Read `edgekd.json`; an empty one where there is none.

    Raises:
        DataError: it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return Sidecar()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}, expected {SCHEMA!r}")
        names = tuple(str(name) for name in data["class_names"])
        ids = data["category_ids"]
        return Sidecar(
            names or None,
            {str(name): int(value) for name, value in ids.items()} if ids else None,
            {
                str(split): {str(key): _note_from_dict(note) for key, note in notes.items()}
                for split, notes in data["images"].items()
            },
            {str(split): tuple(map(str, stems)) for split, stems in data.get("order", {}).items()},
            tuple(map(str, data.get("splits", ()))),
            {str(split): tuple(map(str, names)) for split, names in data.get("teachers", {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{printable(path)} is damaged",
            got=f"{type(error).__name__}: {error}",
            fix="mend or delete it; without it, class order and flags that the layout cannot hold are lost",
        ) from error


def _note_to_dict(note: ImageNote) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if note.image_id is not None:
        data["id"] = note.image_id
    if note.difficult or note.crowd:
        data.update(objects=note.objects, difficult=list(note.difficult), crowd=list(note.crowd))
    return data


def _note_from_dict(data: Mapping[str, Any]) -> ImageNote:
    image_id = data.get("id")
    return ImageNote(
        None if image_id is None else str(image_id),
        int(data.get("objects", 0)),
        _positions(data.get("difficult", ())),
        _positions(data.get("crowd", ())),
    )


def _positions(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
