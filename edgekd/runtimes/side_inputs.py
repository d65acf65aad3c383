"""Inputs besides the image that exports have: sizes, scales, masks of padding, thresholds. What each is fed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.runtimes.tensor_info import TensorInfo

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_HEIGHT_FIRST = ("im_shape", "image_shape", "img_shape", "image_size", "img_size", "im_info", "input_shape")
_WIDTH_FIRST = ("target", "orig", "size")
# Word in the name and value; low thresholds, so that edgekd's own decide.
_NUMBERS = (("iou", 0.65), ("score", 0.001), ("conf", 0.001), ("thresh", 0.001), ("max", 300), ("topk", 300))


def can_feed(info: TensorInfo) -> bool:
    """Whether `value_for` knows what this input wants."""
    return value_for(info, 1, (32, 64)) is not None


def value_for(info: TensorInfo, batch: int, input_hw: tuple[int, int]) -> NDArray[Any] | None:
    """What an input besides the image is fed, so that boxes come back in input pixels; None if it is unknown.

    RT-DETR's `orig_target_sizes` are (width, height), DETR's `target_sizes`, PaddleDetection's `im_shape` and Keras'
    `image_shape` (height, width), `scale_factor` 1; `pixel_mask`, of Hugging Face's DETR, says that nothing is padding.
    """
    name, rank = info.name.lower(), len(info.shape)
    if info.type not in TYPES:
        return None
    values: NDArray[Any] | None = None
    if rank == 2 and "scale" in name:
        values = np.ones((batch, info.shape[-1] or 2))
    elif rank == 2 and (name == "target_sizes" or any(word in name for word in _HEIGHT_FIRST)):
        values = np.array([[*input_hw, 1][: info.shape[-1] or 2]] * batch)
    elif rank == 2 and info.shape[-1] in (2, None) and (_whole(info) or any(word in name for word in _WIDTH_FIRST)):
        values = np.array([input_hw[::-1]] * batch)
    elif rank == 3 and "mask" in name:
        size = tuple(known or extent for known, extent in zip(info.shape[1:], input_hw, strict=True))
        values = np.ones((batch, *size))
    elif rank <= 1 and (number := next((value for word, value in _NUMBERS if word in name), None)) is not None:
        values = np.full((1,) * rank, number)
    return None if values is None else values.astype(TYPES[info.type])


def _whole(info: TensorInfo) -> bool:
    return info.type in ("tensor(int64)", "tensor(int32)")
