"""Box arithmetic in numpy. Boxes are (N, 4) float32 in pixels, xyxy unless a name says otherwise."""

from __future__ import annotations

import numpy as np

from edgekd.types import BoolArray, FloatArray


def area(boxes_xyxy: FloatArray) -> FloatArray:
    """(N,) areas in square pixels; a box with negative extent has none."""
    extent = np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0.0)
    return np.asarray(extent[:, 0] * extent[:, 1], np.float32)


def have_extent(boxes_xyxy: FloatArray) -> BoolArray:
    """(N,) which boxes are wider and higher than nothing; one clipped to an image that it lies beside is not."""
    return np.asarray((boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(1), np.bool_)


def iou_matrix(a_xyxy: FloatArray, b_xyxy: FloatArray) -> FloatArray:
    """(N, M) intersection over union of each of N boxes with each of M; 0 where the union is empty."""
    a, b = a_xyxy.T[:, :, None], np.ascontiguousarray(b_xyxy.T)[:, None, :]  # so that the inner loops run along memory
    width = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    height = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    np.maximum(width, 0.0, out=width)
    np.maximum(height, 0.0, out=height)
    width *= height  # the intersection, in place: large temporaries are what this costs
    union = area(a_xyxy)[:, None] + area(b_xyxy)[None, :]
    union -= width
    np.maximum(union, np.finfo(np.float32).tiny, out=union)
    width /= union
    return np.asarray(width, np.float32)


def xyxy_from_cxcywh(boxes_cxcywh: FloatArray) -> FloatArray:
    """Centre and extent to corners, (..., 4)."""
    half = boxes_cxcywh[..., 2:] * np.float32(0.5)
    centre = boxes_cxcywh[..., :2]
    return np.concatenate([centre - half, centre + half], axis=-1)


def cxcywh_from_xyxy(boxes_xyxy: FloatArray) -> FloatArray:
    """Corners to centre and extent, (..., 4)."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return np.concatenate([(low + high) * np.float32(0.5), high - low], axis=-1)
