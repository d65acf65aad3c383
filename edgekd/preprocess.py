"""From an original image to a detector's input tensor, and boxes back again.

There is one resizer (OpenCV, bilinear) for training, evaluation and the device: Pillow's differs by up to 33 of 255,
which is enough to move detections.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from edgekd.types import FloatArray, ImageArray, PreprocessSpec


@dataclass(frozen=True)
class Geometry:
    """The affine map from a source image to an input tensor: x_in = x_src * scale_x + shift_x, likewise y.

    Attributes:
        source_hw: (height, width) of the source image, pixels.
        input_hw: (height, width) of the input tensor, pixels.
    """

    source_hw: tuple[int, int]
    input_hw: tuple[int, int]
    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float

    def to_input(self, boxes_xyxy: FloatArray) -> FloatArray:
        """(N, 4) source pixels to input pixels, not clipped."""
        scale, shift = self._vectors()
        boxes: FloatArray = np.asarray(boxes_xyxy, np.float32).reshape(-1, 4) * scale + shift
        return boxes

    def to_source(self, boxes_xyxy: FloatArray) -> FloatArray:
        """(N, 4) input pixels to source pixels, clipped to the source image."""
        scale, shift = self._vectors()
        h, w = self.source_hw
        boxes: FloatArray = (np.asarray(boxes_xyxy, np.float32).reshape(-1, 4) - shift) / scale
        inside: FloatArray = np.clip(boxes, 0.0, np.array([w, h, w, h], np.float32))
        return inside

    def _vectors(self) -> tuple[FloatArray, FloatArray]:
        scale = np.array([self.scale_x, self.scale_y] * 2, np.float32)
        shift = np.array([self.shift_x, self.shift_y] * 2, np.float32)
        return scale, shift


def geometry_for(source_hw: tuple[int, int], spec: PreprocessSpec) -> Geometry:
    """The map that `prepare` will apply to an image of this size."""
    (h, w), (ih, iw) = source_hw, spec.input_hw
    if spec.resize == "stretch":
        return Geometry(source_hw, spec.input_hw, iw / w, ih / h, 0.0, 0.0)
    scale = min(ih / h, iw / w)
    nh, nw = max(1, round(h * scale)), max(1, round(w * scale))
    left, top = ((iw - nw) // 2, (ih - nh) // 2) if spec.resize == "letterbox" else (0, 0)
    return Geometry(source_hw, spec.input_hw, nw / w, nh / h, float(left), float(top))


def resize(image: ImageArray, spec: PreprocessSpec) -> tuple[ImageArray, Geometry]:
    """Stretch or letterbox an (H, W, 3) uint8 RGB image to `spec.input_hw`; still uint8."""
    geometry = geometry_for((image.shape[0], image.shape[1]), spec)
    ih, iw = spec.input_hw
    if spec.resize == "stretch":
        return _resize(image, ih, iw), geometry
    nh = round(geometry.scale_y * image.shape[0])
    nw = round(geometry.scale_x * image.shape[1])
    top, left = int(geometry.shift_y), int(geometry.shift_x)
    canvas = np.full((ih, iw, 3), spec.pad_value, np.uint8)
    canvas[top : top + nh, left : left + nw] = _resize(image, nh, nw)
    return canvas, geometry


def _resize(image: ImageArray, height: int, width: int) -> ImageArray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def normalisation(spec: PreprocessSpec) -> tuple[FloatArray, FloatArray]:
    """(scale, bias), each (3, 1, 1) float32, with input = uint8 * scale + bias: one multiply-add, in the spec's order."""
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (spec.mean, spec.std))
    return (1.0 / (255.0 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def normalise(image: ImageArray, spec: PreprocessSpec) -> FloatArray:
    """(H, W, 3) uint8 RGB at input size to (1, 3, H, W) float32, contiguous.

    The channels are taken apart while a value is still one byte, several times cheaper than afterwards, and the rest is done
    in place.
    """
    scale, bias = normalisation(spec)
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes if spec.channels == "rgb" else planes[::-1]))
    out = planes.astype(np.float32)
    out *= scale
    out += bias
    return out[None]


def prepare(image: ImageArray, spec: PreprocessSpec) -> tuple[FloatArray, Geometry]:
    """An (H, W, 3) uint8 RGB image to the (1, 3, h, w) float32 input tensor and the map between their pixels."""
    resized, geometry = resize(image, spec)
    return normalise(resized, spec), geometry
