"""A toy data set for tests: coloured squares and discs on noise, a few KB on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from edgekd.artifact import atomic_path
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.base import Detector, SoftTargets, Targets
from edgekd.losses import DistillBatch, TeacherView
from edgekd.preprocess import normalisation, resize
from edgekd.recipe import ModelConfig
from edgekd.teachers.base import TeacherOutput
from edgekd.training.distill import NO_ANSWERS
from edgekd.types import Dataset, Detections, ImageArray, ImageRecord, SoftDetections

CLASSES = ("square", "disc")


def toy_dataset(root: Path, count: int = 12, seed: int = 0, image_hw: tuple[int, int] = (72, 96)) -> Dataset:
    """`count` images with one to three objects each, written as PNG below `root`."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    h, w = image_hw
    records = []
    for index in range(count):
        image = rng.integers(90, 130, (h, w, 3)).astype(np.uint8)
        boxes, labels = [], []
        for _ in range(int(rng.integers(1, 4))):
            side = int(rng.integers(16, 32))
            x, y = int(rng.integers(0, w - side)), int(rng.integers(0, h - side))
            label = int(rng.integers(0, 2))
            if label == 0:
                cv2.rectangle(image, (x, y), (x + side - 1, y + side - 1), (230, 30, 30), -1)
            else:
                cv2.circle(image, (x + side // 2, y + side // 2), side // 2, (30, 30, 230), -1)
            boxes.append([x, y, x + side, y + side])
            labels.append(label)
        path = root / f"{index:04d}.png"
        whole, encoded = cv2.imencode(".png", image[:, :, ::-1])
        assert whole
        with atomic_path(path) as temporary:  # tests with several processes make the same set in each
            temporary.write_bytes(encoded.tobytes())
        no = np.zeros(len(boxes), bool)
        records.append(
            ImageRecord(path.stem, path, image_hw, np.array(boxes, np.float32), np.array(labels, np.int64), no, no)
        )
    return Dataset(root, "voc", "train", CLASSES, tuple(records))


class ToyTeacher:
    """A native detector as a teacher, as plain as it can be."""

    def __init__(self, detector: Detector, name: str = "toy") -> None:
        self.name, self.detector = name, detector.eval()
        self.preprocess = detector.spec.preprocess
        self.student_class_names = detector.spec.class_names
        self.class_map = None
        self.unknown_classes: tuple[str, ...] = ()
        self.tap_specs = detector.tap_specs

    def respond(self, images_u8: Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
        """Raw outputs, taps, and the 20 best rows as boxes."""
        scale, bias = (torch.from_numpy(v) for v in normalisation(self.preprocess))
        with torch.no_grad():
            output = self.detector(images_u8.float() * scale + bias, taps)
            if not boxes:
                return TeacherOutput(NO_ANSWERS, output, output.taps)
            rows, scores = self.detector.decode(output)
        best = scores.amax(-1).topk(min(20, scores.shape[1])).indices
        soft = SoftTargets(
            [b[i] for b, i in zip(rows, best, strict=True)], [s[i] for s, i in zip(scores, best, strict=True)]
        )
        return TeacherOutput(soft, output, output.taps)

    def answer(self, image: ImageArray) -> SoftDetections:
        """The same for one whole image."""
        resized, geometry = resize(image, self.preprocess)
        soft = self.respond(torch.from_numpy(resized.transpose(2, 0, 1).copy())[None]).soft
        boxes = geometry.to_source(soft.boxes_xyxy[0].numpy())
        return SoftDetections(boxes, soft.class_probs[0].numpy())

    def detect(self, image: ImageArray) -> Detections:
        """The best class of each row."""
        found = self.answer(image)
        return Detections(found.boxes_xyxy, found.class_probs.max(1), found.class_probs.argmax(1))


class BlackBox(ToyTeacher):
    """The same without anything inside to look at."""

    def __init__(self, detector: Detector, name: str = "black-box") -> None:
        super().__init__(detector, name)
        self._hidden = detector
        self.tap_specs = {}

    def respond(self, images_u8: Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
        """Boxes alone."""
        self.detector = self._hidden
        try:
            return TeacherOutput(super().respond(images_u8).soft)
        finally:
            self.detector = None  # type: ignore[assignment]


def toy_detector(
    model: str = "mobilenetv2-ssd-lite", input_size: int = 96, width: float = 0.25, seed: int = 0
) -> Detector:
    """A small untrained detector of the toy classes."""
    torch.manual_seed(seed)
    return build_detector(spec_for(ModelConfig(model=model, input_size=input_size, width=width), CLASSES))


def toy_batch(student: Detector, teachers: Sequence[ToyTeacher], taps: Sequence[str], epoch: int = 0) -> DistillBatch:
    """Two images with objects and one without, seen by the student and by each teacher at its own size."""
    generator = torch.Generator().manual_seed(7)
    h, w = student.spec.preprocess.input_hw
    images_u8 = torch.randint(0, 256, (3, 3, h, w), generator=generator).to(torch.uint8)
    scale, bias = (torch.from_numpy(v) for v in normalisation(student.spec.preprocess))
    images = images_u8.float() * scale + bias
    targets = Targets(
        [
            torch.tensor([[8.0, 8, 56, 60], [40, 30, 90, 80]]) * w / 96,
            torch.tensor([[20.0, 16, 70, 70]]) * w / 96,
            torch.zeros(0, 4),
        ],
        [torch.tensor([0, 1]), torch.tensor([1]), torch.zeros(0, dtype=torch.int64)],
    )
    views = []
    for teacher in teachers:
        size = teacher.preprocess.input_hw
        answer = teacher.respond(
            torch.nn.functional.interpolate(images_u8.float(), size=list(size)).to(torch.uint8),
            tuple(teacher.tap_specs),
        )
        ratio = torch.tensor([w / size[1], h / size[0]] * 2)
        soft = SoftTargets([b * ratio for b in answer.soft.boxes_xyxy], answer.soft.class_probs)
        views.append(TeacherView(teacher.name, 1 / len(teachers), soft, answer.dense, answer.taps))
    output = student(images, taps)
    return DistillBatch(images, output, targets, views, views[0].soft, epoch, 4)
