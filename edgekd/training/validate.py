"""Run a native detector over a data set in batches: used during training, where speed matters more than isolation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from edgekd.data.image_cache import ResizedImages
from edgekd.detectors.base import Detector
from edgekd.preprocess import normalisation
from edgekd.selection import DEFAULT_SELECTION, Selection
from edgekd.types import Detections


def detect_dataset(
    detector: Detector,
    images: ResizedImages,
    *,
    batch_size: int = 16,
    selection: Selection = DEFAULT_SELECTION,
    progress: Callable[[int, int], None] | None = None,
) -> list[Detections]:
    """Detections of every image, in their order and the original images' pixels."""
    device = next(detector.parameters()).device
    scale, bias = (torch.from_numpy(v).to(device) for v in normalisation(detector.spec.preprocess))
    found: list[Detections] = []
    training = detector.training
    detector.eval()
    try:
        for start in range(0, len(images), batch_size):
            stop = min(start + batch_size, len(images))
            items = [images[index] for index in range(start, stop)]
            batch = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image, _ in items])).to(device)
            with torch.no_grad():
                output = detector((batch.float() * scale + bias).contiguous(memory_format=torch.channels_last))
                boxes, scores = (v.float().cpu().numpy() for v in detector.decode(output))
            for (_, geometry), image_boxes, image_scores in zip(items, boxes, scores, strict=True):
                found.append(selection.place(image_boxes, image_scores, geometry))
            if progress is not None:
                progress(stop, len(images))
    finally:
        detector.train(training)
    return found
