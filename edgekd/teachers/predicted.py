"""A teacher that is a deployed detector: whatever a `Predictor` can run can teach through its boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import DistillationSetupError
from edgekd.predictor import Predictor
from edgekd.preprocess import normalisation
from edgekd.runtimes.onnx_session import OnnxRuntime
from edgekd.runtimes.outputs import Arrays
from edgekd.teachers.base import TeacherOutput
from edgekd.types import BoolArray, Detections, ImageArray, SoftDetections

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edgekd.detectors.base import Detector, SoftTargets, TapSpec
    from edgekd.labels import ClassMap

ANSWER_THRESHOLD = 0.01
"""Candidates below this do not teach; on VOC that costs an ensemble no AP50 and halves the rows."""


class PredictorTeacher:
    """A teacher behind a predictor; see `edgekd.teachers.base.Teacher` for the attributes.

    Args:
        name: unique among the recipe's teachers.
        predictor: answers in its own classes, at thresholds for measuring.
        student_class_names: the label set of all answers.
        class_map: teacher class to student class, where names do not say it.
        tap_specs: what `taps` may name.
        tap_tensors: for each tap, the runtime's output that holds it.

    Attributes:
        predictor: the same detector, answering in the student's classes.
        class_map: from its own classes to the student's; None where both are the same.
        unknown_classes: student classes that this teacher does not know, so that its silence says nothing about them.
        known: (classes,) bool, False for these.

    Raises:
        ClassMapError: none of its classes is one of the student's.
    """

    def __init__(
        self,
        name: str,
        predictor: Predictor,
        student_class_names: Sequence[str],
        class_map: Mapping[str, str] | None = None,
        *,
        tap_specs: Mapping[str, TapSpec] | None = None,
        tap_tensors: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.predictor = predictor.with_classes(student_class_names, class_map)
        self.predictor.name = name
        self.preprocess = predictor.preprocess
        self.student_class_names = tuple(student_class_names)
        self.tap_specs: Mapping[str, TapSpec] = dict(tap_specs or {})
        self.detector: Detector | None = None
        self.class_map: ClassMap | None = self.predictor.class_map
        mapped = self.class_map
        self.unknown_classes: tuple[str, ...] = mapped.unknown_classes if mapped is not None else ()
        self.known: BoolArray = mapped.known if mapped is not None else np.ones(len(self.student_class_names), np.bool_)
        self._tap_tensors = dict(tap_tensors or {})
        self._answering = self.predictor.with_selection(score_threshold=ANSWER_THRESHOLD)

    def answer_at_most(self, max_detections: int) -> None:
        """Answer an image with so many boxes at most, for pictures that show more than the usual 100."""
        self.predictor = self.predictor.with_selection(max_detections=max_detections)
        self._answering = self._answering.with_selection(max_detections=max_detections)

    def respond(self, images_u8: Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
        """Answer a batch, see `Teacher.respond`.

        Raises:
            DistillationSetupError: an unknown tap, or images of another size.
        """
        import torch

        self._check_request(images_u8, taps)
        scale, bias = normalisation(self.preprocess)
        pixels = images_u8.cpu().numpy()[:, :: -1 if self.preprocess.channels == "bgr" else 1]
        images = np.ascontiguousarray(pixels * scale + bias, np.float32)
        runtime = self.predictor.runtime
        if len(images) > 1 and isinstance(runtime, OnnxRuntime):
            runtime.try_batch(images)
        size = len(images) if getattr(runtime, "dynamic_batch", False) else max(1, runtime.input_shape[0])
        answers: list[SoftDetections] = []
        maps: dict[str, list[Tensor]] = {tap: [] for tap in taps}
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            raw = self.predictor.infer(chunk)
            if boxes:
                answers.extend(self._answering.soft_candidates(raw, item) for item in range(len(chunk)))
            for tap in taps:
                maps[tap].append(self._tap(raw, tap)[: len(chunk)])
        return TeacherOutput(
            soft_targets_from(answers, images_u8.device),
            taps={tap: torch.cat(parts).to(images_u8.device) for tap, parts in maps.items()},
        )

    def _tap(self, raw: Arrays, tap: str) -> Tensor:
        import torch

        return torch.from_numpy(np.array(raw[self._tap_tensors[tap]], np.float32))  # copied: the runtime may reuse it

    def _check_request(self, images_u8: Tensor, taps: Sequence[str]) -> None:
        import torch

        unknown = [tap for tap in taps if tap not in self.tap_specs]
        if unknown:
            raise DistillationSetupError(
                f"teacher {self.name!r} has no such tap",
                got=", ".join(unknown),
                expected=", ".join(self.tap_specs) or "none: a black box has taps only where `taps` declares them",
            )
        if tuple(images_u8.shape[1:]) != (3, *self.preprocess.input_hw) or images_u8.dtype != torch.uint8:
            raise DistillationSetupError(
                f"teacher {self.name!r} was given images that are not at its input size",
                got=f"{tuple(images_u8.shape)} {images_u8.dtype}",
                expected=f"(B, 3, {self.preprocess.input_hw[0]}, {self.preprocess.input_hw[1]}) uint8",
            )

    def answer(self, image: ImageArray) -> SoftDetections:
        """Answer one original image with class distributions, after a light NMS, in its own pixels."""
        return self._answering.answer(image)

    def soften(self, raw: Any, geometry: Any, score_threshold: float = ANSWER_THRESHOLD) -> SoftDetections:
        """The last stage of `answer`, for whoever times the stages apart or wants candidates down to another score."""
        return self.predictor.with_selection(score_threshold=score_threshold).soften(raw, geometry)

    def detect(self, image: ImageArray) -> Detections:
        """Answer one original image as a deployed detector, in the student's labels."""
        return self.predictor.detect(image)

    def close(self) -> None:
        """Free the model."""
        self.predictor.close()


def soft_targets_from(answers: Sequence[SoftDetections], device: torch.device) -> SoftTargets:
    """Numpy answers as tensors on a device."""
    import torch

    from edgekd.detectors.base import SoftTargets

    return SoftTargets(
        [torch.from_numpy(np.ascontiguousarray(answer.boxes_xyxy)).to(device) for answer in answers],
        [torch.from_numpy(np.ascontiguousarray(answer.class_probs)).to(device) for answer in answers],
    )
