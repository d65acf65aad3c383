"""Native detectors by name. Importing this costs nothing: torch and the families are loaded when one is built."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgekd.errors import RecipeError
from edgekd.recipe import ModelConfig
from edgekd.types import DetectorSpec, PreprocessSpec

if TYPE_CHECKING:
    from edgekd.detectors.base import Detector

__all__ = ["DETECTORS", "build_detector", "spec_for"]


def _ssd(spec: DetectorSpec) -> Detector:
    from edgekd.detectors.ssd import SSD

    return SSD(spec)


def _yolov3(spec: DetectorSpec) -> Detector:
    from edgekd.detectors.yolov3 import YoloV3

    return YoloV3(spec)


def _yolo_free(spec: DetectorSpec) -> Detector:
    from edgekd.detectors.yolo_free import YoloFree

    return YoloFree(spec)


DETECTORS: dict[str, Callable[[DetectorSpec], Detector]] = {
    "vgg16-ssd": _ssd,
    "vgg11-ssd": _ssd,
    "mobilenetv1-ssd-lite": _ssd,
    "mobilenetv2-ssd-lite": _ssd,
    "efficientnet-lite0-ssd-lite": _ssd,
    "efficientnet-lite1-ssd-lite": _ssd,
    "yolov3": _yolov3,
    "yolov3-tiny": _yolov3,
    "yolo-nano": _yolo_free,
    "yolo-small": _yolo_free,
}


def spec_for(config: ModelConfig, class_names: Sequence[str]) -> DetectorSpec:
    """The whole description of a detector that a recipe asks for, with every default of its family written out.

    Raises:
        RecipeError: an unknown model, an option that the model does not have or a bad value of one, no classes.
    """
    _check_name(config.model)
    if not class_names:
        raise RecipeError(f"model {config.model!r} needs at least one class", got="no class names")
    preprocess, options = _family_defaults(config)
    return DetectorSpec(config.model, tuple(class_names), preprocess, config.width, dict(options))


def build_detector(spec: DetectorSpec) -> Detector:
    """The detector of `spec`, freshly initialised from torch's global generator.

    Raises:
        RecipeError: an unknown model, or settings with which it cannot be built.
    """
    _check_name(spec.model)
    return DETECTORS[spec.model](spec)


def _family_defaults(config: ModelConfig) -> tuple[PreprocessSpec, Mapping[str, Any]]:
    if config.model.endswith(("-ssd", "-ssd-lite")):
        from edgekd.detectors.ssd_options import ssd_spec_defaults

        return ssd_spec_defaults(config)
    from edgekd.detectors.yolo import yolo_spec_defaults

    return yolo_spec_defaults(config)


def _check_name(model: str) -> None:
    if model in DETECTORS:
        return
    near = difflib.get_close_matches(model, DETECTORS, n=1)
    raise RecipeError(
        "unknown model",
        got=repr(model),
        expected="one of " + ", ".join(DETECTORS),
        fix=f"did you mean {near[0]!r}?" if near else None,
    )
