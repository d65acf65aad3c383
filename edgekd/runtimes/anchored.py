"""Raw heads with anchors: maps in levels, or rows, whose boxes are coded relative to anchors, which no ONNX file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.boxes import xyxy_from_cxcywh
from edgekd.runtimes.grids import grid_cells
from edgekd.types import Array, FloatArray

MOST_ANCHORS = 9
PRIOR_VARIANCES = (0.1, 0.2)
"""Of SSD's coding, Liu et al. 2016 (arXiv 1512.02325), as its authors' code scales centres and extents."""
CELL = 32
"""Pixels that YOLOv2's configurations have their anchors in."""


@dataclass(frozen=True)
class AnchorSet:
    """What a published network's head is decoded with.

    Attributes:
        sizes: width and height of each anchor in input pixels, flat, fine to coarse.
        squared: extents are (2 sigmoid)^2 anchors and centres reach half a cell beyond theirs, as in YOLOv5; otherwise
            exponentials, as in YOLOv2 to v4.
        centre_scales: YOLOv4's factor on the centre's sigmoid, a level; empty for 1.
        softmax: class scores are of a softmax, as YOLOv2's.
        in_rows: boxes stand in rows beside their scores, all anchors of a cell after each other, coded as SSD's are.
    """

    sizes: tuple[float, ...]
    squared: bool
    centre_scales: tuple[float, ...] = ()
    softmax: bool = False
    in_rows: bool = False


def _from_cells(*sizes: float) -> tuple[float, ...]:
    return tuple(CELL * size for size in sizes)


def _squares(*sides: float) -> tuple[float, ...]:
    return tuple(side for side in sides for _ in "wh")


_V3 = (10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326)
_V4 = (12, 16, 19, 36, 40, 28, 36, 75, 76, 55, 72, 146, 142, 110, 192, 243, 459, 401)
_V3_TINY = (10, 14, 23, 27, 37, 58, 81, 82, 135, 169, 344, 319)
_V4_TINY = (23, 27, 37, 58, 81, 82, 81, 82, 135, 169, 344, 319)  # its finer level has the second to fourth of v3's six
_V2 = _from_cells(0.57273, 0.677385, 1.87446, 2.06253, 3.33843, 5.47434, 7.88282, 3.52778, 9.77052, 9.16828)
_V2_VOC = _from_cells(1.3221, 1.73145, 3.19275, 4.00944, 5.05587, 8.09892, 9.47112, 4.84053, 11.2364, 10.0071)
_V2_TINY_VOC = _from_cells(1.08, 1.19, 3.42, 4.41, 6.63, 11.38, 9.42, 5.11, 16.62, 10.52)
ANCHOR_SETS: dict[str, AnchorSet] = {
    "yolov2": AnchorSet(_V2, squared=False, softmax=True),
    "yolov2-voc": AnchorSet(_V2_VOC, squared=False, softmax=True),
    "yolov2-tiny-voc": AnchorSet(_V2_TINY_VOC, squared=False, softmax=True),
    "yolov3": AnchorSet(_V3, squared=False),
    "yolov3-tiny": AnchorSet(_V3_TINY, squared=False),
    "yolov4": AnchorSet(_V4, squared=False, centre_scales=(1.2, 1.1, 1.05)),
    "yolov4-tiny": AnchorSet(_V4_TINY, squared=False, centre_scales=(1.05, 1.05)),
    "yolov5": AnchorSet(_V3, squared=True),
    "yolov7": AnchorSet(_V4, squared=True),
    "yolov7-tiny": AnchorSet(_V3, squared=True),
    "retinaface": AnchorSet(_squares(16, 32, 64, 128, 256, 512), squared=False, in_rows=True),
}
"""Of the authors' own configurations, fine to coarse: three levels, two of the tiny ones of v3 and v4, one of v2. RetinaFace's
are those of its PyTorch version (Deng et al. 2019, arXiv 1905.00641), two a cell at strides 8, 16 and 32."""
OF_MAPS = ", ".join(name for name, anchors in ANCHOR_SETS.items() if not anchors.in_rows)
"""The sets that maps may be decoded with, in words."""


def grid_of(shape: Sequence[int], values: int, input_hw: tuple[int, int]) -> tuple[int, int, int] | None:
    """(anchors, height, width) of a map with `values` an anchor: (B, A V, h, w), (B, h, w, A V), (B, A, h, w, V) or
    (B, h, w, A, V); None if the shape is none of these at a usual stride."""
    item = tuple(shape[1:])
    forms: list[tuple[int, int, int]] = []
    if len(item) == 4 and item[3] == values:
        forms = [(item[0], item[1], item[2]), (item[2], item[0], item[1])]
    elif len(item) == 3:
        turned = ((item[0], item[1], item[2]), (item[2], item[0], item[1]))
        forms = [(channels // values, height, width) for channels, height, width in turned if channels % values == 0]
    usual = [tuple(-(-extent // stride) for extent in input_hw) for stride in (4, 8, 16, 32, 64, 128)]
    return next((form for form in forms if 0 < form[0] <= MOST_ANCHORS and form[1:] in usual), None)


def candidates_of(
    arrays: Sequence[Array], item: int, values: int, input_hw: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """((P, values) raw values, (P, 4) column, row, stride and place in `AnchorSet.sizes` of each), level by level.

    Raises:
        ValueError: an array is no map with anchors.
    """
    tables, places, before = [], [], 0
    for array in arrays:
        grid = grid_of(array.shape, values, input_hw)
        if grid is None:
            raise ValueError(f"{array.shape} is no map of {values} values an anchor")
        anchors, height, width = grid
        part = array[item]
        if part.ndim == 3 and part.shape[1:] == (height, width):
            part = part.reshape(anchors, values, height, width).transpose(2, 3, 0, 1)
        elif part.ndim == 4 and part.shape[:3] == grid:
            part = part.transpose(1, 2, 0, 3)
        tables.append(np.asarray(part, np.float32).reshape(-1, values))
        row, column, anchor = np.indices((height, width, anchors)).reshape(3, -1)
        stride = np.full(len(row), -(-input_hw[0] // height))
        places.append(np.stack([column, row, stride, anchor + before], 1))
        before += anchors
    return np.concatenate(tables), np.concatenate(places).astype(np.float32)


def decoded(raw: FloatArray, places: FloatArray, anchors: AnchorSet, levels: int, *, squashed: bool) -> FloatArray:
    """(P, 4) corners in input pixels out of raw values (P, 4).

    Args:
        squashed: the sigmoid has been applied in the graph.

    Raises:
        ValueError: there are not as many anchors as the maps have.
    """
    sizes = np.array(anchors.sizes, np.float32).reshape(-1, 2)
    index = places[:, 3].astype(int)
    if index.max(initial=-1) + 1 != len(sizes):
        raise ValueError(f"{len(sizes)} anchors for maps of {index.max(initial=-1) + 1}")
    scales = np.array(anchors.centre_scales or (2.0 if anchors.squared else 1.0,) * levels, np.float32)
    scale = scales[index * levels // len(sizes)][:, None]
    centre = raw[:, :2] if squashed else _sigmoid(raw[:, :2])
    centre = (centre * scale - (scale - 1) / 2 + places[:, :2]) * places[:, 2:3]
    if anchors.squared:
        extent = (2 * (raw[:, 2:] if squashed else _sigmoid(raw[:, 2:]))) ** 2 * sizes[index]
    else:
        extent = np.exp(np.minimum(raw[:, 2:], 20.0)) * sizes[index]
    return xyxy_from_cxcywh(np.concatenate([centre, extent], 1))


def prior_cells(rows: int, anchors: int, input_hw: tuple[int, int]) -> FloatArray | None:
    """(P, 3) x, y and stride of every cell, if so many rows are those of grids with an equal share of the anchors in each.

    Args:
        anchors: how many there are over all levels.
    """
    for levels in range(1, anchors + 1):
        if anchors % levels == 0 and rows % (anchors // levels) == 0:
            cells = grid_cells(input_hw, rows // (anchors // levels))
            if cells is not None and len(np.unique(cells[:, 2])) == levels:
                return cells
    return None


def from_priors(offsets: FloatArray, sizes: Sequence[float], input_hw: tuple[int, int]) -> FloatArray:
    """(P, 4) SSD's offsets from priors to corners in input pixels.

    Args:
        offsets: of the centre in tenths of the prior, and logarithms of the extent in fifths, cell by cell, all priors of a
            cell after each other.
        sizes: width and height of each prior in input pixels, flat, fine to coarse.

    Raises:
        ValueError: there are not as many rows as the priors have.
    """
    shapes = np.array(sizes, np.float32).reshape(-1, 2)
    cells = prior_cells(len(offsets), len(shapes), input_hw)
    if cells is None:
        raise ValueError(f"{len(offsets)} rows are not those of {len(shapes)} priors")
    levels = np.unique(cells[:, 2], return_inverse=True)[1].reshape(-1)
    each = len(offsets) // len(cells)
    index = (levels[:, None] * each + np.arange(each)).reshape(-1)
    middles = np.repeat((cells[:, :2] + 0.5) * cells[:, 2:], each, 0)
    centre = middles + PRIOR_VARIANCES[0] * offsets[:, :2] * shapes[index]
    extent = np.exp(np.minimum(PRIOR_VARIANCES[1] * offsets[:, 2:], 20.0)) * shapes[index]
    return xyxy_from_cxcywh(np.asarray(np.concatenate([centre, extent], 1), np.float32))


def _sigmoid(values: FloatArray) -> FloatArray:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -80.0, 80.0))), np.float32)
