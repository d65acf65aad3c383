"""What can teach: anything that answers an image with boxes and class probabilities, perhaps with taps too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from edgekd.types import Detections, ImageArray, PreprocessSpec, SoftDetections

if TYPE_CHECKING:  # an ensemble of ONNX files or engines is deployed without torch
    from torch import Tensor

    from edgekd.detectors.base import Detector, DetectorOutput, SoftTargets, TapSpec
    from edgekd.labels import ClassMap


@dataclass(frozen=True)
class TeacherOutput:
    """One teacher's answer to a batch, in the frame of the teacher's own input tensor.

    Attributes:
        soft: candidates after the teacher's own light NMS, class probabilities already in the student's label set; of no
            images where boxes were not asked for.
        dense: raw outputs on the teacher's own priors; None for black boxes.
        taps: the maps that were asked for, each (B, C, H, W).
    """

    soft: SoftTargets
    dense: DetectorOutput | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """One teacher. Never trained, never given a gradient.

    Attributes:
        name: unique among the recipe's teachers.
        preprocess: how it wants its images.
        student_class_names: the label set its answers come in.
        class_map: from its own classes to these; None where both are the same.
        unknown_classes: those of them that it does not know, so that its silence says nothing about them.
        tap_specs: what `taps` may name; empty for a black box without declared taps.
        detector: the native detector behind it, or None. Row-by-row distillation needs it.
    """

    name: str
    preprocess: PreprocessSpec
    student_class_names: tuple[str, ...]
    class_map: ClassMap | None
    unknown_classes: tuple[str, ...]
    tap_specs: Mapping[str, TapSpec]
    detector: Detector | None

    def respond(self, images_u8: Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
        """Answer a batch: images (B, 3, h, w) uint8 RGB, already at `preprocess.input_hw`; without boxes `soft` is empty."""
        ...

    def answer(self, image: ImageArray) -> SoftDetections:
        """Answer one original image with class distributions: preprocess as deployed, run, light NMS; original frame."""
        ...

    def detect(self, image: ImageArray) -> Detections:
        """Answer one original image as a deployed detector would: preprocess, run, NMS; student's labels."""
        ...
