"""Boxes that a head leaves undecoded, as offsets or distances from the cells of its grids, made into corners in pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import Sequence

import numpy as np

from edgekd.boxes import xyxy_from_cxcywh
from edgekd.types import FloatArray

GRID_STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32), (16, 32, 64), (8, 16, 32, 64, 128))
"""Of anchor-free heads, told apart by the number of candidates."""


@lru_cache(maxsize=4)
def grid_cells(input_hw: tuple[int, int], candidates: int) -> FloatArray | None:
    """(P, 3) x, y and stride of every cell of the grids that have so many cells in all; None if no grids do."""
    for strides in GRID_STRIDES:
        sizes = [(-(-input_hw[0] // stride), -(-input_hw[1] // stride)) for stride in strides]
        if sum(height * width for height, width in sizes) == candidates:
            cells = [
                np.insert(np.indices(size)[::-1].reshape(2, -1).T, 2, strides[level], 1)
                for level, size in enumerate(sizes)
            ]
            return np.concatenate(cells).astype(np.float32)
    return None


def is_map(shape: Sequence[int], input_hw: tuple[int, int]) -> bool:
    """Whether an output of this shape is a feature map (B, C, h, w) at a usual stride of the input."""
    sizes = [tuple(-(-extent // stride) for extent in input_hw) for stride in (4, 8, 16, 32, 64, 128)]
    return len(shape) == 4 and tuple(shape[2:]) in sizes and min(shape[2:]) > 1


def from_offsets(boxes: FloatArray, input_hw: tuple[int, int]) -> FloatArray:
    """(P, 4) YOLOX's centres from the cell, in cells, and logarithms of the extent in cells, to corners in pixels.

    Raises:
        ValueError: the candidates are not the cells of any grids.
    """
    cells = _cells(boxes, input_hw)
    stride = cells[:, 2:]
    extent = np.exp(np.minimum(boxes[:, 2:], 20.0))  # what is larger is no box, and must not become infinite
    return xyxy_from_cxcywh(np.concatenate([(boxes[:, :2] + cells[:, :2]) * stride, extent * stride], 1))


def from_distances(values: FloatArray, input_hw: tuple[int, int], *, centred: bool) -> FloatArray:
    """(P, 4 R) distributions over R distances to the left, top, right and bottom side, to corners in pixels.

    Generalized Focal Loss, Li et al. 2020 (arXiv 2006.04388), eq. 3: a distance is the mean of its distribution, in
    strides; R = 1 has the distance itself. They count from the cell's centre, in NanoDet-Plus from its corner.

    Raises:
        ValueError: the candidates are not the cells of any grids, or have no multiple of four values.
    """
    cells = _cells(values, input_hw)
    bins = values.reshape(len(values), 4, -1)
    if bins.shape[2] > 1:
        powers = np.exp(bins - bins.max(2, keepdims=True))
        bins = (powers * np.arange(bins.shape[2], dtype=np.float32)).sum(2, keepdims=True) / powers.sum(
            2, keepdims=True
        )
    distances = bins[:, :, 0]
    centres = cells[:, :2] + (0.5 if centred else 0.0)
    corners = np.concatenate([centres - distances[:, :2], centres + distances[:, 2:]], 1)
    return np.asarray(corners * cells[:, 2:], np.float32)


def _cells(boxes: FloatArray, input_hw: tuple[int, int]) -> FloatArray:
    cells = grid_cells(input_hw, len(boxes))
    if cells is None:
        raise ValueError(f"{len(boxes)} candidates are not the cells of strides 8, 16, 32 or the like")
    return cells
