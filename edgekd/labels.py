"""Label sets and maps between them: COCO's and VOC's names, and a teacher's classes onto the student's."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.errors import ClassMapError
from edgekd.types import BoolArray, FloatArray

_VOC = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,"
    "sheep,sofa,train,tvmonitor"
)
_COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
VOC_CLASSES: tuple[str, ...] = tuple(_VOC.split(","))
COCO_CLASSES: tuple[str, ...] = tuple(_COCO.split(","))

_COCO_UNUSED_IDS = frozenset((0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


def _coco_by_id() -> tuple[str, ...]:
    names = iter(COCO_CLASSES)
    return tuple(f"(coco id {index}, unused)" if index in _COCO_UNUSED_IDS else next(names) for index in range(91))


COCO_BY_ID: tuple[str, ...] = _coco_by_id()
"""Names by COCO category id, 0 to 90, as torchvision's, TensorFlow's and DETR's detectors number them."""

COCO_UNUSED_IDS: tuple[int, ...] = tuple(sorted(_COCO_UNUSED_IDS))

NAMED_LABEL_SETS: Mapping[str, tuple[str, ...]] = {"coco": COCO_CLASSES, "coco91": COCO_BY_ID, "voc": VOC_CLASSES}

_SYNONYMS = (
    ("airplane", "aeroplane"),
    ("motorcycle", "motorbike"),
    ("couch", "sofa"),
    ("tv", "tvmonitor", "television"),
)
_CANONICAL = {name: group[0] for group in _SYNONYMS for name in group}


@dataclass(frozen=True)
class ClassMap:
    """Which class of a teacher is which class of the student.

    Attributes:
        source_names: the teacher's classes, in its label order. target_names: the student's.
        sources: for each student class, the teacher's labels that mean it; empty where the teacher does not know it.
    """

    source_names: tuple[str, ...]
    target_names: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]

    @property
    def is_identity(self) -> bool:
        """Whether projecting changes nothing."""
        return len(self.source_names) == len(self.target_names) and all(
            found == (index,) for index, found in enumerate(self.sources)
        )

    @property
    def known(self) -> BoolArray:
        """(targets,) bool: the student's classes that the teacher can see."""
        return np.array([bool(found) for found in self.sources])

    @property
    def unknown_classes(self) -> tuple[str, ...]:
        """The student's classes that the teacher does not know: its silence about them means nothing."""
        return tuple(name for name, found in zip(self.target_names, self.sources, strict=True) if not found)

    def changes(self) -> str:
        """What it does to classes whose names or places differ, in words."""
        to = {label: name for name, found in zip(self.target_names, self.sources, strict=True) for label in found}
        differing = {
            name: to.get(label, "nothing")
            for label, name in enumerate(self.source_names)
            if self.target_names[label : label + 1] != (to.get(label),)
        }
        return ", ".join(f"{name} -> {target}" for name, target in differing.items())

    def project(self, scores: FloatArray) -> FloatArray:
        """(P, source classes) scores to (P, target classes): the best of the sources, 0 where there is none."""
        if self.is_identity:
            return scores
        columns = scores.T
        # One row a class: quick both for heads that give (classes, P), which arrive here as a transposed view.
        projected = np.zeros((len(self.target_names), len(scores)), np.float32)
        for target, found in enumerate(self.sources):
            for label in found:
                np.maximum(projected[target], columns[label], out=projected[target])
        return projected.T


def map_classes(
    source_names: Sequence[str], target_names: Sequence[str], class_map: Mapping[str, str] | None = None
) -> ClassMap:
    """Map a teacher's classes onto the student's: by `class_map` where it names a class, by name otherwise.

    Names match as they stand, then whatever their case, spaces, underscores and hyphens, then through COCO's and VOC's
    different words for the same thing (airplane, aeroplane). Several teacher classes may map to one; "" in `class_map` drops
    a class.

    Raises:
        ClassMapError: nothing maps, or `class_map` names a class that is not there.
    """
    explicit: dict[int, int | None] = {}
    for source, target in (class_map or {}).items():
        label = _find(source, source_names, "teacher")
        if label in explicit:
            raise ClassMapError(
                "class_map names a class of the teacher twice",
                got=", ".join(repr(name) for name in class_map or {} if _key(name) == _key(source)),
                expected="one line a class",
            )
        explicit[label] = _find(target, target_names, "student") if target else None
    by_name = {name: index for index, name in enumerate(target_names)}  # "Car" and "car" may both be there
    by_key = {_key(name): index for index, name in reversed(list(enumerate(target_names)))}
    by_synonym = {_canonical(name): index for index, name in reversed(list(enumerate(target_names)))}
    sources: list[list[int]] = [[] for _ in target_names]
    for label, name in enumerate(source_names):
        alike = by_name.get(name, by_key.get(_key(name), by_synonym.get(_canonical(name))))
        own = explicit.get(label, alike)
        if own is not None:
            sources[own].append(label)
    if not any(sources):
        raise ClassMapError(
            "none of the teacher's classes is one of the student's",
            got=f"teacher: {_listed(source_names)}",
            expected=f"student: {_listed(target_names)}",
            fix="give `class_map` with teacher class: student class",
        )
    return ClassMap(tuple(source_names), tuple(target_names), tuple(tuple(found) for found in sources))


def _key(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", unicodedata.normalize("NFC", name)).casefold()


def _canonical(name: str) -> str:
    return _CANONICAL.get(_key(name), _key(name))


def _find(name: str, names: Sequence[str], whose: str) -> int:
    if name in names:
        return list(names).index(name)
    keys = [_key(other) for other in names]
    if _key(name) in keys:
        return keys.index(_key(name))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    raise ClassMapError(
        f"class_map names a class that the {whose} does not have",
        got=repr(name),
        expected=_listed(names),
        fix=f"did you mean {near[0]!r}?" if near else None,
    )


def some_of(names: Sequence[str], shown: int = 6) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:90])
    return shown if len(names) <= 90 else f"{shown}, ... ({len(names)} in all)"
