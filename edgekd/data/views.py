"""Views: augmented looks at images, as plain numbers that can be replayed at any size.

A view says which window of which image lands where in the picture, mirrored or not, and with which colours. Because
it is only numbers, the same view can be rendered for a student at 320 px and for a teacher at 640 px, and any boxes
in original pixels (ground truth, a teacher's stored answers) can be carried into it. Rendering and box mapping share
one geometry, `_placement.Axis`, so they cannot drift apart.

The augmentations are those of SSD (Liu et al., 2016: photometric distortion, zoom out, crop with a minimum IoU,
flip) and the four-image mosaic of YOLOv4 (Bochkovskiy et al., 2020).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from edgekd.boxes import iou_matrix
from edgekd.data._photometric import Photometric, distort, sample_photometric
from edgekd.data._placement import Axis, place_axis
from edgekd.errors import ArtifactError, DataError
from edgekd.preprocess import resize
from edgekd.recipe import AugmentConfig
from edgekd.types import Dataset, FloatArray, ImageArray, ImageRecord, IntArray, PreprocessSpec

Rect = tuple[float, float, float, float]

_GREY = 114
_MIN_IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # SSD's choices; 0 is "any crop"
_CROP_ROUNDS, _CROP_TRIES = 3, 40
_MOSAIC_CENTRE = (0.3, 0.7)  # where the four pictures meet, as a share of the view's sides
_MOSAIC_ZOOM = (0.5, 1.5)  # magnification against the same image shown whole


@dataclass(frozen=True)
class ViewPart:
    """One window of one image, and where it goes.

    Attributes:
        record_index: index into `Dataset.records`.
        image_hw: (height, width) of that image, pixels.
        window_xyxy: original pixels; may reach beyond the image, where the view shows its fill colour.
        target_xyxy: where the window lands, in [0, 1] of the view's width and height.
        flip: mirrored left to right.
        flip_vertical: mirrored top to bottom.
    """

    record_index: int
    image_hw: tuple[int, int]
    window_xyxy: Rect
    target_xyxy: Rect = (0.0, 0.0, 1.0, 1.0)
    flip: bool = False
    flip_vertical: bool = False


@dataclass(frozen=True)
class View:
    """An augmented look at one image (one part) or four (a mosaic).

    Attributes:
        parts: what is shown where; they do not overlap.
        photometric: colour distortion of the images (not of the fill), or None.
        fill: RGB of what no image covers, 0..255.
    """

    parts: tuple[ViewPart, ...]
    photometric: Photometric | None = None
    fill: tuple[int, int, int] = (_GREY, _GREY, _GREY)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> View:
        """Inverse of `to_dict`.

        Raises:
            ArtifactError: a key is missing or has the wrong type.
        """
        try:
            drawn = data["photometric"]
            parts = tuple(
                ViewPart(
                    int(part["record_index"]),
                    cast(tuple[int, int], tuple(int(v) for v in part["image_hw"])),
                    cast(Rect, tuple(float(v) for v in part["window_xyxy"])),
                    cast(Rect, tuple(float(v) for v in part["target_xyxy"])),
                    bool(part["flip"]),
                    bool(part.get("flip_vertical", False)),  # views written before there was such a thing
                )
                for part in data["parts"]
            )
            fill = cast(tuple[int, int, int], tuple(int(v) for v in data["fill"]))
            return cls(parts, None if drawn is None else Photometric(**drawn), fill)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError("a view is damaged", got=f"{type(error).__name__}: {error}") from error


# ---------------------------------------------------------------------------------------------------- drawing views


def view_rng(seed: int, epoch: int, image_id: str) -> np.random.Generator:
    """The random stream of one image in one epoch: a pure function of its arguments on every machine."""
    stable_hash = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "little")
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, stable_hash]))


def sample_view(
    record_index: int,
    dataset: Dataset,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    aspect: float | None,
    fill: int = _GREY,
) -> View:
    """Draw a view of one image (and of three others, for a mosaic).

    Args:
        record_index: the image.
        dataset: where it and a mosaic's other images come from.
        config: chances and ranges.
        rng: consumed; see `view_rng`.
        aspect: None stretches the window to the picture; a number widens the window to that width / height first, so
            that stretching keeps shapes, which is how letterboxed detectors train.
        fill: grey level of what no image covers.
    """
    photometric = sample_photometric(rng, config.photometric)
    if rng.random() < config.mosaic:
        parts = _mosaic_parts(record_index, dataset, config, rng, aspect)
    else:
        record = dataset.records[record_index]
        window = _expand(_sample_window(record, config, rng), aspect)
        parts = (ViewPart(record_index, record.image_hw, window, (0.0, 0.0, 1.0, 1.0), *_sample_flips(config, rng)),)
    return View(parts, photometric, (fill, fill, fill))


def _sample_flips(config: AugmentConfig, rng: np.random.Generator) -> tuple[bool, bool]:
    """(left to right, top to bottom); nothing is drawn for a flip that is off, so that old seeds keep their views."""
    horizontal = bool(rng.random() < config.flip)
    return horizontal, config.flip_vertical > 0 and bool(rng.random() < config.flip_vertical)


def _sample_window(record: ImageRecord, config: AugmentConfig, rng: np.random.Generator) -> Rect:
    """Zoom out, then crop, in whole pixels so that nothing is lost to rounding when rendered."""
    h, w = record.image_hw
    left, top, width, height = 0, 0, w, h
    if rng.random() < config.zoom_out:
        ratio = rng.uniform(1.0, config.zoom_out_max)
        width, height = round(w * ratio), round(h * ratio)
        left, top = -int(rng.integers(width - w + 1)), -int(rng.integers(height - h + 1))
    window = np.array([left, top, left + width, top + height], np.float64)
    if rng.random() < config.iou_crop:
        window = _sample_crop(window, record.boxes_xyxy[record.trainable], config.min_crop, rng)
    return cast(Rect, tuple(float(v) for v in window))


def _sample_crop(
    canvas: NDArray[np.float64], boxes: FloatArray, min_side: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A crop of `canvas` (4,) that holds the centre of a box whose IoU with the crop is at least a drawn minimum.

    SSD draws the minimum once and tries 50 times; here three minima get 40 tries each, all drawn at once, and the
    whole canvas is the answer when none succeeds. Crops have an aspect ratio within 1:2 and 2:1.
    """
    size = canvas[2:] - canvas[:2]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    for _ in range(_CROP_ROUNDS):
        min_iou = _MIN_IOUS[int(rng.integers(len(_MIN_IOUS)))]
        sides = np.maximum(1.0, np.floor(size * rng.uniform(min_side, 1.0, (_CROP_TRIES, 2))))
        starts = canvas[:2] + np.floor((size - sides) * rng.random((_CROP_TRIES, 2)))
        crops = np.concatenate([starts, starts + sides], axis=1)
        good = (sides[:, 0] <= 2 * sides[:, 1]) & (sides[:, 1] <= 2 * sides[:, 0])
        if len(boxes):
            inside = ((centres > crops[:, None, :2]) & (centres < crops[:, None, 2:])).all(-1)
            good &= (inside & (iou_matrix(crops.astype(np.float32), boxes) >= min_iou)).any(1)
        if good.any():
            return np.asarray(crops[int(good.argmax())])
    return canvas


def _mosaic_parts(
    record_index: int, dataset: Dataset, config: AugmentConfig, rng: np.random.Generator, aspect: float | None
) -> tuple[ViewPart, ...]:
    """Four images around a drawn centre, each at a drawn zoom and shifted at random inside its quadrant."""
    others = rng.integers(len(dataset), size=3)
    cx, cy = (float(v) for v in rng.uniform(*_MOSAIC_CENTRE, 2))
    targets: tuple[Rect, ...] = ((0.0, 0.0, cx, cy), (cx, 0.0, 1.0, cy), (0.0, cy, cx, 1.0), (cx, cy, 1.0, 1.0))
    parts = []
    for index, target in zip([record_index, *others.tolist()], targets, strict=True):
        record = dataset.records[index]
        h, w = record.image_hw
        whole = _expand((0.0, 0.0, float(w), float(h)), aspect)
        zoom = float(rng.uniform(*_MOSAIC_ZOOM))
        width = (whole[2] - whole[0]) * (target[2] - target[0]) / zoom
        height = (whole[3] - whole[1]) * (target[3] - target[1]) / zoom
        left = float(rng.uniform(min(0.0, w - width), max(0.0, w - width)))
        top = float(rng.uniform(min(0.0, h - height), max(0.0, h - height)))
        window = (left, top, left + width, top + height)
        parts.append(ViewPart(index, record.image_hw, window, target, *_sample_flips(config, rng)))
    return tuple(parts)


def _expand(window: Rect, aspect: float | None) -> Rect:
    """The smallest window around the same centre with width / height = `aspect`."""
    if aspect is None:
        return window
    x1, y1, x2, y2 = window
    width, height = x2 - x1, y2 - y1
    dx = max(0.0, height * aspect - width) / 2
    dy = max(0.0, width / aspect - height) / 2
    return (x1 - dx, y1 - dy, x2 + dx, y2 + dy)


# -------------------------------------------------------------------------------------------------------- geometry


def _axes(part: ViewPart, out_hw: tuple[int, int]) -> tuple[Axis, Axis] | None:
    """(x, y) maps of a part at an output size, or None where it shows no pixel of its image."""
    (h, w), (x1, y1, x2, y2), (u1, v1, u2, v2) = part.image_hw, part.window_xyxy, part.target_xyxy
    cell_x, cell_y = (round(u1 * out_hw[1]), round(u2 * out_hw[1])), (round(v1 * out_hw[0]), round(v2 * out_hw[0]))
    along_x = place_axis((x1, x2), w, cell_x, part.flip)
    along_y = place_axis((y1, y2), h, cell_y, part.flip_vertical)
    return None if along_x is None or along_y is None else (along_x, along_y)


def render_view(view: View, load: Callable[[int], ImageArray], out_hw: tuple[int, int]) -> ImageArray:
    """The view as an (H, W, 3) uint8 RGB picture of its own memory.

    Each part is cropped first and resized once, by the resizer that deployment uses, straight to its final size.

    Args:
        view: what to show.
        load: record index to its image, (H, W, 3) uint8 RGB; never written to.
        out_hw: (height, width), pixels.

    Raises:
        DataError: an image's size is not the one in its record.
    """
    out = np.empty((*out_hw, 3), np.uint8)
    placed = [(part, axes) for part in view.parts if (axes := _axes(part, out_hw)) is not None]
    covered = sum((x.place[1] - x.place[0]) * (y.place[1] - y.place[0]) for _, (x, y) in placed)
    if covered < out_hw[0] * out_hw[1]:
        out.reshape(out_hw[0], -1)[:] = np.tile(np.array(view.fill, np.uint8), out_hw[1])  # whole rows copy fast
    for part, (x, y) in placed:
        image = load(part.record_index)
        if image.shape[:2] != part.image_hw:
            raise DataError(
                f"image {part.record_index} of the data set has another size than its record says",
                got=f"{image.shape[1]} x {image.shape[0]} pixels",
                expected=f"{part.image_hw[1]} x {part.image_hw[0]}",
                fix="check the data set with `edgekd data check`",
            )
        place_hw = (y.place[1] - y.place[0], x.place[1] - x.place[0])
        patch, _ = resize(image[slice(*y.crop), slice(*x.crop)], PreprocessSpec(place_hw))
        if part.flip or part.flip_vertical:
            # cv2's code: 1 left to right, 0 top to bottom, -1 both
            code = -1 if part.flip and part.flip_vertical else int(part.flip)
            patch = np.asarray(cv2.flip(patch, code), np.uint8)
        if view.photometric is not None:
            patch = distort(patch, view.photometric)
        out[slice(*y.place), slice(*x.place)] = patch
    return out


def boxes_in_view(
    view: View,
    boxes: Mapping[int, FloatArray],
    out_hw: tuple[int, int],
    *,
    min_size_px: float = 2.0,
) -> tuple[FloatArray, IntArray]:
    """Carry boxes of the original images into the view; those whose centre is not shown are dropped, which is SSD's rule.

    Args:
        view: the view.
        boxes: record index to its (N, 4) boxes in original pixels; images that are absent have none.
        out_hw: (height, width) of the picture, pixels.
        min_size_px: boxes narrower or lower than this after clipping are dropped.

    Returns:
        (K, 4) float32 boxes in output pixels, clipped to where their image is shown, and the (K, 2) int64 rows
        (record index, row in that record's boxes) they came from.
    """
    kept_boxes, kept_rows = [np.zeros((0, 4), np.float32)], [np.zeros((0, 2), np.int64)]
    for part in view.parts:
        axes = _axes(part, out_hw)
        source = np.asarray(boxes.get(part.record_index, ()), np.float64).reshape(-1, 4)
        if axes is None or not len(source):
            continue
        x, y = (np.sort(axis.to_output(source[:, i::2]), axis=1) for i, axis in enumerate(axes))
        moved = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
        low = np.array([axis.cell[0] for axis in axes] * 2, np.float64)
        high = np.array([axis.cell[1] for axis in axes] * 2, np.float64)
        clipped = np.clip(moved, low, high)
        sides = clipped[:, 2:] - clipped[:, :2]
        centre = (moved[:, :2] + moved[:, 2:]) / 2
        keep = (sides >= min_size_px).all(1) & (sides > 0).all(1)
        keep &= ((centre >= low[:2]) & (centre < high[:2])).all(1)
        rows = np.flatnonzero(keep)
        kept_boxes.append(clipped[rows].astype(np.float32))
        kept_rows.append(np.stack([np.full_like(rows, part.record_index), rows], axis=1))
    return np.concatenate(kept_boxes), np.concatenate(kept_rows)
