"""From annotations as files state them to `ImageRecord`s: the one place where boxes are clipped or refused.

The rules, in order, for each box, in pixels of the upright image (`problems.RULES` says how grave each is):

1. NaN or infinite values: refused. YOLO shares beyond 2: refused, since they are pixels.
2. x2 < x1 or y2 < y1: refused.
3. Wholly outside the image: refused. Otherwise it is clipped to the image, silently up to 1 px.
4. Less than `MIN_SIDE_PX` wide or high by then: refused.

Coordinates are rounded to 1e-9 px as they are read, which is finer than float32, coarser than the error of any sum in
float64, and so makes conversion between formats exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from edgekd.data.images import image_hw
from edgekd.data.layout import Numbers, RawImage, RawObject
from edgekd.data.problems import Problem, printable
from edgekd.errors import DataError
from edgekd.types import ImageRecord

MIN_SIDE_PX = 0.1
SILENT_OVERHANG_PX = 1.0
_DIGITS = 9
_SHARES_NEED_PX = 8
_FRAME_NEEDS_BOXES = 5
_SIZE_ROUNDING_PX, _SIZE_ROUNDING = 2, 0.02
_FAR_SHARE = 0.1
"""Of its own side, up to which a box beyond its image may be one that is drawn carelessly."""

_BEYOND = ("clipped-box", "outside-box", "inverted-box", "unnormalised-box")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Resolved:
    """A record beside what conversion needs over it.

    Attributes:
        record: the image as everything else sees it.
        boxes: (N, 4) float64, the record's boxes before rounding to float32.
        name: the image's file name within its split or image folder.
    """

    record: ImageRecord
    boxes: NDArray[np.float64]
    name: str


def resolve(
    raws: Sequence[RawImage], class_names: Sequence[str], split: str, problems: list[Problem]
) -> list[Resolved]:
    """Judge every image and box by the rules above; what is wrong goes to `problems`, images that cannot be read drop out."""
    index = {name: label for label, name in enumerate(class_names)}
    resolved = []
    before = len(problems)
    for raw in raws:
        try:
            hw = image_hw(raw.path)
        except DataError as error:
            problems.append(Problem("bad-image", raw.path, str(error).replace("\n", ";"), split=split))
            continue
        resolved.append(_resolve_one(_Judge(raw, hw, index, split, problems)))
    _report_shares(raws, resolved, split, problems)
    told = _report_sizes(raws, resolved, split, problems) or _report_numbers(raws, resolved, split, problems)
    if not told:
        _report_frame(raws, split, problems[before:], problems)
    return resolved


def _report_sizes(raws: Sequence[RawImage], resolved: Sequence[Resolved], split: str, problems: list[Problem]) -> bool:
    """Whether most images are of other sizes than their annotations say, and the boxes fit those: they would be wrong here.

    Boxes that fit the images instead, and reach beyond a size within them, tell that only the sizes are written wrongly.
    """
    sizes = {item.record.image_id: item.record.image_hw for item in resolved}
    stated = [raw for raw in raws if raw.image_id in sizes and raw.declared_hw and min(raw.declared_hw) > 0]
    others = [raw for raw in stated if _is_other_size(raw.declared_hw or (0, 0), sizes[raw.image_id])]
    found = [(raw, obj.box) for raw in others for obj in raw.objects if _is_finite(obj.box)]
    if len(others) <= len(stated) / 2 or len(found) < _FRAME_NEEDS_BOXES:
        return False
    boxes = np.array([box for _, box in found], np.float64)
    there = np.array([sizes[raw.image_id][::-1] for raw, _ in found], np.float64)
    said = np.array([(raw.declared_hw or (0, 0))[::-1] for raw, _ in found], np.float64)
    beyond, beyond_said = int(_is_beyond(boxes, there).sum()), int(_is_beyond(boxes, said).sum())
    if beyond_said > beyond or (beyond_said == beyond and not (said <= there).all()):
        return False
    (h, w), (said_h, said_w) = sizes[others[0].image_id], others[0].declared_hw or (0, 0)
    message = f"{len(others)} of {len(stated)} images are of another size than their annotations say, such as "
    message += f"{printable(others[0].path.name)} ({said_w} x {said_h} stated, {w} x {h} here), and the boxes fit those"
    if (said_h, said_w) == (w, h):
        message += ": where EXIF turns images, take its orientation out of them, or turn the boxes along"
    else:
        message += ": take the images that were annotated, or scale the boxes along"
    problems.append(Problem("boxes-of-other-sizes", others[0].annotation, message, split=split))
    return True


def _is_other_size(declared: tuple[int, int], hw: tuple[int, int]) -> bool:
    """Whether two sizes differ by more than rounding while images were resized."""
    return any(abs(a - b) > max(_SIZE_ROUNDING_PX, _SIZE_ROUNDING * b) for a, b in zip(declared, hw, strict=True))


def _report_numbers(
    raws: Sequence[RawImage], resolved: Sequence[Resolved], split: str, problems: list[Problem]
) -> bool:
    """Whether boxes of the split reach beyond their images, and none does once its numbers are read in another usual way.

    Boxes that are drawn carelessly reach beyond any side, by little; those of a corner taken for the centre, or of a far
    corner taken for a size, beyond one alone, and by a good part of themselves.
    """
    sizes = {item.record.image_id: item.record.image_hw for item in resolved}
    found = [(raw, obj) for raw in raws if raw.image_id in sizes for obj in raw.objects if _is_finite(obj.box)]
    if len(found) < _FRAME_NEEDS_BOXES:
        return False
    sides = np.array([sizes[raw.image_id][::-1] for raw, _ in found], np.float64)
    shares = np.array([raw.normalised for raw, _ in found])[:, None]
    corners = np.array([obj.box for _, obj in found], np.float64) * np.where(shares, np.tile(sides, 2), 1.0)
    beyond = int(_is_beyond(corners, sides).sum())
    written = found[0][0].numbers
    others = {way: _corners(_numbers(corners, written), way) for way in get_args(Numbers) if way != written}
    if not shares.any():
        others["y before x"] = corners[:, [1, 0, 3, 2]]
    ways = [way for way, other in others.items() if not _is_beyond(other, sides).any()]
    far = int(_is_beyond(corners, sides, _FAR_SHARE).sum())
    if far < _FRAME_NEEDS_BOXES or not ways:
        return False
    message = f"{beyond} of {len(found)} boxes reach beyond their image, and none does if the numbers are {ways[0]}"
    message += f"; this layout's are {written}"
    problems.append(Problem("boxes-of-other-numbers", found[0][0].annotation, message, split=split))
    return True


def _numbers(corners: NDArray[np.float64], written: Numbers) -> NDArray[np.float64]:
    """The four numbers as they stand in the file, (N, 4) float64, of (x1, y1, x2, y2)."""
    size = corners[:, 2:] - corners[:, :2]
    if written == "left, top, right, bottom":
        return corners
    return np.hstack([corners[:, :2] + (size / 2 if written == "centre, width, height" else 0), size])


def _corners(numbers: NDArray[np.float64], written: str) -> NDArray[np.float64]:
    """The inverse of `_numbers`."""
    if written == "left, top, right, bottom":
        return numbers
    start = numbers[:, :2] - (numbers[:, 2:] / 2 if written == "centre, width, height" else 0)
    return np.hstack([start, start + numbers[:, 2:]])


def _is_beyond(corners: NDArray[np.float64], sides: NDArray[np.float64], share: float = 0.0) -> NDArray[np.bool_]:
    """(N,) bool: the box reaches beyond its image, of (N, 2) width and height, by more than a share of itself, or has no
    extent."""
    low, high = corners[:, :2], corners[:, 2:]
    slack = np.maximum(SILENT_OVERHANG_PX, share * (high - low))
    wrong = (low < -slack) | (high > sides + slack) | (high <= low)
    return np.asarray(wrong.any(axis=1))


def _report_frame(raws: Sequence[RawImage], split: str, found: Sequence[Problem], problems: list[Problem]) -> None:
    """Most boxes reach beyond their image: they are of another kind (corners for a centre and a size), or of images
    that have been resized since."""
    count = sum(len(raw.objects) for raw in raws)
    beyond = sum(problem.kind in _BEYOND for problem in found)
    if count >= _FRAME_NEEDS_BOXES and beyond > count / 2:
        message = f"{beyond} of {count} boxes reach beyond their image: is this the layout's kind of box, and the same images?"
        problems.append(Problem("boxes-beyond-images", raws[0].annotation, message, split=split))


def _report_shares(raws: Sequence[RawImage], resolved: Sequence[Resolved], split: str, problems: list[Problem]) -> None:
    """Boxes that should be pixels and all end within the first one: an exporter wrote shares of the image."""
    ends = [[max(obj.box[2:]) for obj in raw.objects if _is_finite(obj.box)] for raw in raws if not raw.normalised]
    ends = [of_image for of_image in ends if of_image]
    smallest = min((min(item.record.image_hw) for item in resolved), default=0)
    if len(ends) > 1 and max(map(max, ends)) <= 1 and smallest > _SHARES_NEED_PX:
        message = f"all {sum(map(len, ends))} boxes end within the first pixel, in images of {smallest} px and more"
        problems.append(Problem("boxes-as-shares", raws[0].annotation, message, split=split))


def _is_finite(box: Box) -> bool:
    return all(map(math.isfinite, box))


def _resolve_one(judge: _Judge) -> Resolved:
    judge.size()
    kept: list[tuple[RawObject, int, Box]] = []
    for obj in judge.raw.objects:
        label, box = judge.label(obj), judge.box(obj)
        if label is not None and box is not None:
            judge.repeat(obj, label, box)
            kept.append((obj, label, box))
    boxes = np.array([box for _, _, box in kept], np.float64).reshape(-1, 4)
    record = ImageRecord(
        judge.raw.image_id,
        judge.raw.path,
        judge.hw,
        boxes.astype(np.float32),
        np.array([label for _, label, _ in kept], np.int64),
        np.array([obj.difficult for obj, _, _ in kept], np.bool_),
        np.array([obj.crowd for obj, _, _ in kept], np.bool_),
    )
    return Resolved(record, boxes, judge.raw.name)


@dataclass
class _Judge:
    """The rules applied to one image."""

    raw: RawImage
    hw: tuple[int, int]
    index: Mapping[str, int]
    split: str
    problems: list[Problem]
    seen: set[tuple[int, Box]] = field(default_factory=set)

    def size(self) -> None:
        declared = self.raw.declared_hw
        if declared is None or declared == self.hw:
            return
        h, w = self.hw
        if min(declared) <= 0:
            self._report("no-size", f"no usable image size; the image is {w} x {h}", None)
            return
        turned = ": EXIF turns the image, or the annotation exchanges width and height" if declared == (w, h) else ""
        self._report("size-mismatch", f"says {declared[1]} x {declared[0]}, the image is {w} x {h}{turned}", None)

    def label(self, obj: RawObject) -> int | None:
        if isinstance(obj.label, int):
            if 0 <= obj.label < len(self.index):
                return obj.label
            self._report("unknown-class", f"class id {obj.label} is not within 0..{len(self.index) - 1}", obj)
            return None
        if obj.label not in self.index:
            names = ", ".join(list(self.index)[:20]) + (", ..." if len(self.index) > 20 else "")
            self._report("unknown-class", f"class {obj.label!r} is none of: {names}", obj)
            return None
        return self.index[obj.label]

    def box(self, obj: RawObject) -> Box | None:
        """The clipped box, or None with the reason reported."""
        if not _is_finite(obj.box):
            return self._refuse("non-finite-box", f"box {_show(obj.box)}", obj)
        h, w = self.hw
        x1, y1, x2, y2 = obj.box
        if self.raw.normalised:
            if max(map(abs, obj.box)) > 2:
                return self._refuse("unnormalised-box", f"corners at {_show(obj.box)} of the image's sides", obj)
            x1, y1, x2, y2 = x1 * w, y1 * h, x2 * w, y2 * h
        x1, y1, x2, y2 = (round(value, _DIGITS) for value in (x1, y1, x2, y2))
        shown = f"box {_show((x1, y1, x2, y2))} in an image of {w} x {h}"
        if x2 < x1 or y2 < y1:
            return self._refuse("inverted-box", shown, obj)
        if x1 >= w or y1 >= h or x2 <= 0 or y2 <= 0:
            return self._refuse("outside-box", shown, obj)
        overhang = max(-x1, -y1, x2 - w, y2 - h)
        clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(w)), min(y2, float(h)))
        side = min(clipped[2] - clipped[0], clipped[3] - clipped[1])
        if side < MIN_SIDE_PX:
            return self._refuse("empty-box", shown, obj)
        if side <= 1:
            self._report("tiny-box", shown, obj)
        if overhang > SILENT_OVERHANG_PX:
            self._report("clipped-box", shown, obj)
        return clipped

    def repeat(self, obj: RawObject, label: int, box: Box) -> None:
        if (label, box) in self.seen:
            self._report("duplicate-box", f"{obj.label!r} at {_show(box)} stands in this image before", obj)
        self.seen.add((label, box))

    def _refuse(self, kind: str, message: str, obj: RawObject) -> Box | None:
        self._report(kind, message, obj)
        return None

    def _report(self, kind: str, message: str, obj: RawObject | None) -> None:
        line = (obj.label_line if kind == "unknown-class" else None) or obj.line if obj else None
        item = obj.item if obj else self.raw.item
        self.problems.append(Problem(kind, self.raw.annotation, message, line, item, self.split))


def _show(box: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box) + ")"
