"""The YOLO family by name: YOLOv3 and its tiny (anchors), nano and small (anchor-free)."""

from __future__ import annotations

from typing import Any

from edgekd.detectors.base import Detector
from edgekd.detectors.pyramid import check_input_hw, parse_options
from edgekd.detectors.yolo_free import YoloFree, YoloFreeOptions
from edgekd.detectors.yolov3 import YoloV3, yolov3_options
from edgekd.errors import RecipeError
from edgekd.recipe import ModelConfig
from edgekd.types import DetectorSpec, PreprocessSpec

_ANCHORED = ("yolov3", "yolov3-tiny")
_ANCHOR_FREE = ("yolo-nano", "yolo-small")


def yolo_spec_defaults(config: ModelConfig) -> tuple[PreprocessSpec, dict[str, Any]]:
    """The preprocessing (letterbox, RGB in [0, 1]) and the settings with every default written out.

    Raises:
        RecipeError: the input size is no multiple of 32, or an option is unknown or has a bad value.
    """
    input_hw = (config.input_size, config.input_size)
    check_input_hw(config.model, input_hw)
    preprocess = PreprocessSpec(input_hw, "letterbox", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if config.model in _ANCHORED:
        return preprocess, yolov3_options(config.model, input_hw, config.options).model_dump(mode="json")
    return preprocess, parse_options(YoloFreeOptions, config.model, config.options).model_dump(mode="json")


def build_yolo(spec: DetectorSpec) -> Detector:
    """The detector of `spec`, freshly initialised.

    Raises:
        RecipeError: no model of this family, an input size that is no multiple of 32, or a wrong option.
    """
    if spec.model in _ANCHORED:
        return YoloV3(spec)
    if spec.model in _ANCHOR_FREE:
        return YoloFree(spec)
    raise RecipeError("no model of the YOLO family", got=repr(spec.model), expected=", ".join(_ANCHORED + _ANCHOR_FREE))
