"""Run a native detector over a data set in batches: used during training, where speed matters more than isolation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from edgekd.data.images import load_image
from edgekd.detectors.base import Detector
from edgekd.preprocess import Geometry, geometry_for, normalisation, resize
from edgekd.selection import DEFAULT_SELECTION, Selection
from edgekd.types import Dataset, Detections, ImageArray


class ResizedImages:
    """The data set's images at the detector's input size, kept in memory up to a budget (an epoch asks again)."""

    def __init__(self, dataset: Dataset, detector: Detector, cache_mib: int) -> None:
        self.dataset, self.spec = dataset, detector.spec.preprocess
        h, w = self.spec.input_hw
        self.capacity = cache_mib * 2**20 // (h * w * 3)
        self._kept: dict[int, ImageArray] = {}

    def __getitem__(self, index: int) -> tuple[ImageArray, Geometry]:
        record = self.dataset.records[index]
        if index in self._kept:
            return self._kept[index], geometry_for(record.image_hw, self.spec)
        image, geometry = resize(load_image(record.path), self.spec)
        if len(self._kept) < self.capacity:
            self._kept[index] = image
        return image, geometry


def detect_dataset(
    detector: Detector,
    images: ResizedImages,
    *,
    batch_size: int = 16,
    selection: Selection = DEFAULT_SELECTION,
    progress: Callable[[int, int], None] | None = None,
) -> list[Detections]:
    """Detections of every image, in the data set's order and the original images' pixels."""
    device = next(detector.parameters()).device
    scale, bias = (torch.from_numpy(v).to(device) for v in normalisation(detector.spec.preprocess))
    found: list[Detections] = []
    training = detector.training
    detector.eval()
    try:
        for start in range(0, len(images.dataset), batch_size):
            stop = min(start + batch_size, len(images.dataset))
            items = [images[index] for index in range(start, stop)]
            batch = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image, _ in items])).to(device)
            with torch.no_grad():
                output = detector((batch.float() * scale + bias).contiguous(memory_format=torch.channels_last))
                boxes, scores = (v.float().cpu().numpy() for v in detector.decode(output))
            for (_, geometry), image_boxes, image_scores in zip(items, boxes, scores, strict=True):
                kept = selection.select(image_boxes, image_scores)
                found.append(Detections(geometry.to_source(kept.boxes_xyxy), kept.scores, kept.labels))
            if progress is not None:
                progress(stop, len(images.dataset))
    finally:
        detector.train(training)
    return found
