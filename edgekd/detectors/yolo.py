"""What a recipe leaves out of the YOLO family: YOLOv3 and its tiny (anchors), nano and small (anchor-free)."""

from __future__ import annotations

from typing import Any

from edgekd.detectors.pyramid import check_input_hw, parse_options
from edgekd.detectors.yolo_free import YoloFreeOptions
from edgekd.detectors.yolov3 import yolov3_options
from edgekd.recipe import ModelConfig
from edgekd.types import PreprocessSpec


def yolo_spec_defaults(config: ModelConfig) -> tuple[PreprocessSpec, dict[str, Any]]:
    """The preprocessing (letterbox, RGB in [0, 1]) and the settings with every default written out.

    Raises:
        RecipeError: the input size is no multiple of 32, or an option is unknown or has a bad value.
    """
    input_hw = (config.input_size, config.input_size)
    check_input_hw(config.model, input_hw)
    preprocess = PreprocessSpec(input_hw, "letterbox", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if config.model in ("yolov3", "yolov3-tiny"):
        return preprocess, yolov3_options(config.model, input_hw, config.options).model_dump(mode="json")
    return preprocess, parse_options(YoloFreeOptions, config.model, config.options).model_dump(mode="json")
