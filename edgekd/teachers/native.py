"""Native detectors as teachers: besides boxes they give raw outputs and every tap."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgekd.checkpoint import detector_file, load_detector
from edgekd.detectors.base import Detector, DetectorOutput
from edgekd.predictor import Predictor
from edgekd.preprocess import normalisation
from edgekd.recipe import CheckpointTeacher
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.torch_runtime import TorchRuntime
from edgekd.teachers.base import TeacherOutput
from edgekd.teachers.predicted import PredictorTeacher, soft_targets_from
from edgekd.types import SoftDetections


class NativeTeacher(PredictorTeacher):
    """A `Detector` as a teacher: frozen, in eval mode, on its own device.

    Args:
        name: unique among the recipe's teachers.
        detector: taken over: moved to `device`, its gradients switched off.
        student_class_names: the label set of all answers.
        class_map: teacher class to student class, where names do not say it.
        device: where it runs.
        path: the checkpoint, for provenance.

    Raises:
        ClassMapError: none of its classes is one of the student's.
    """

    detector: Detector

    def __init__(
        self,
        name: str,
        detector: Detector,
        student_class_names: Sequence[str],
        class_map: dict[str, str] | None = None,
        *,
        device: str = "cpu",
        path: Path | None = None,
    ) -> None:
        spec = detector.spec
        facts = {"path": None if path is None else str(path), "model": spec.model, "notes": ("a native checkpoint",)}
        form = OutputFormat("boxes-scores", ("boxes", "scores"), len(spec.class_names))
        predictor = Predictor(
            name, spec.class_names, spec.preprocess, TorchRuntime(detector, device), form, facts=facts
        )
        super().__init__(name, predictor, student_class_names, class_map, tap_specs=detector.tap_specs)
        self.detector = detector.requires_grad_(False).eval()
        self.device = torch.device(device)

    @torch.no_grad()  # not inference_mode: the student's losses save the teacher's tensors for their backward pass
    def respond(self, images_u8: Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
        """Answer a batch with boxes, raw outputs and taps, see `Teacher.respond`.

        Raises:
            DistillationSetupError: an unknown tap, or images of another size.
        """
        self._check_request(images_u8, taps)
        scale, bias = (torch.from_numpy(values).to(self.device) for values in normalisation(self.preprocess))
        images = images_u8.to(self.device, torch.float32).mul_(scale).add_(bias)
        output = self.detector(images, taps)
        answers = self._answers(output) if boxes else []
        return TeacherOutput(soft_targets_from(answers, images_u8.device), output, output.taps)

    def _answers(self, output: DetectorOutput) -> list[SoftDetections]:
        boxes, scores = self.detector.decode(output)
        raw = {"boxes": boxes.float().cpu().numpy(), "scores": scores.float().cpu().numpy()}
        return [self._answering.soft_candidates(raw, item) for item in range(len(boxes))]


def native_teacher(config: CheckpointTeacher, class_names: Sequence[str], device: str) -> NativeTeacher:
    """The teacher in a checkpoint file or run folder.

    Raises:
        ArtifactError: missing or damaged. ClassMapError: its classes are none of the student's.
    """
    file = detector_file(Path(os.path.expanduser(config.checkpoint)))
    detector = load_detector(file)
    return NativeTeacher(config.name, detector, class_names, config.class_map, device=device, path=file)
