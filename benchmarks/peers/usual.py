"""The usual path from a JPEG to boxes, as tutorials write it: what edgekd's deployed path is measured against.

Pillow decodes, converts and resizes (bilinear), numpy divides by 255 and normalises, the model runs eagerly under
`inference_mode`, and boxes are suppressed class by class. Nothing in it is made slow on purpose: no needless copies, arrays
stay float32, and scores are cut before anything else is done with the boxes.

NMS comes in the three forms that plain numpy code takes in practice. All take (P, 4) boxes and (P, K) scores, keep the best
`top_k` candidates and then at most `limit` detections, and give exactly what `edgekd.postprocess.select` gives.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Boxes (N, 4), scores (N,), labels (N,), best first."""

TOP_K = 1000


def prepare(data: bytes, input_hw: tuple[int, int], mean: Any, std: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """JPEG bytes to a normalised (1, 3, h, w) float32 tensor, and the image's (width, height)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    small = image.resize((input_hw[1], input_hw[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.float32) / 255.0
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))[None], image.size


def greedy(boxes: np.ndarray, scores: np.ndarray, iou: float, limit: int | None = None) -> np.ndarray:
    """Rows that greedy NMS keeps, best first: the loop of Fast R-CNN's CPU version, which most code descends from."""
    x1, y1, x2, y2 = boxes.T
    areas = (x2 - x1) * (y2 - y1)
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(order) and (limit is None or len(kept) < limit):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        width = np.maximum(0.0, np.minimum(x2[best], x2[rest]) - np.maximum(x1[best], x1[rest]))
        height = np.maximum(0.0, np.minimum(y2[best], y2[rest]) - np.maximum(y1[best], y1[rest]))
        inter = width * height
        order = rest[~(inter / (areas[best] + areas[rest] - inter) > iou)]
    return np.array(kept, np.int64)


def matrix(boxes: np.ndarray, scores: np.ndarray, iou: float, limit: int | None = None) -> np.ndarray:
    """The same rows from one matrix of all overlaps."""
    order = np.argsort(-scores, kind="stable")
    sorted_boxes = boxes[order]
    low = np.maximum(sorted_boxes[:, None, :2], sorted_boxes[None, :, :2])
    high = np.minimum(sorted_boxes[:, None, 2:], sorted_boxes[None, :, 2:])
    extent = np.maximum(0.0, high - low)
    inter = extent[..., 0] * extent[..., 1]
    areas = (sorted_boxes[:, 2] - sorted_boxes[:, 0]) * (sorted_boxes[:, 3] - sorted_boxes[:, 1])
    over = inter / (areas[:, None] + areas[None, :] - inter) > iou
    gone = np.zeros(len(order), bool)
    kept: list[int] = []
    for row in range(len(order)):
        if gone[row]:
            continue
        kept.append(row)
        if limit is not None and len(kept) == limit:
            break
        gone |= over[row]
    return order[np.array(kept, np.int64)]


def candidates(boxes: np.ndarray, scores: np.ndarray, score: float, top_k: int = TOP_K) -> Found:
    """Every (box, class) pair over the score threshold, the best `top_k` of them."""
    rows, labels = np.nonzero(scores > score)
    values = scores[rows, labels]
    if len(values) > top_k:
        best = np.sort(np.argpartition(-values, top_k - 1)[:top_k])
        rows, labels, values = rows[best], labels[best], values[best]
    return boxes[rows], values, labels


def nms_per_class(boxes: np.ndarray, scores: np.ndarray, score: float, iou: float, limit: int) -> Found:
    """NMS in each class by itself, then the best of all: what most tutorials do."""
    found, values, labels = candidates(boxes, scores, score)
    kept = [rows[greedy(found[rows], values[rows], iou)] for rows in _rows_by_class(labels)]
    order = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    order = np.sort(order)
    order = order[np.argsort(-values[order], kind="stable")][:limit]
    return found[order], values[order], labels[order]


def _rows_by_class(labels: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def nms_offset(boxes: np.ndarray, scores: np.ndarray, score: float, iou: float, limit: int) -> Found:
    """One NMS for all classes, each moved to a place of its own (torchvision's and Ultralytics' trick)."""
    found, values, labels = candidates(boxes, scores, score)
    kept = greedy(_apart(found, labels), values, iou, limit)
    return found[kept], values[kept], labels[kept]


def nms_matrix(boxes: np.ndarray, scores: np.ndarray, score: float, iou: float, limit: int) -> Found:
    """Classes apart again, and one matrix of all overlaps."""
    found, values, labels = candidates(boxes, scores, score)
    kept = matrix(_apart(found, labels), values, iou, limit)
    return found[kept], values[kept], labels[kept]


def _apart(boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Boxes moved apart by class; in float64, since float32 would lose the places that decide close calls."""
    wide = boxes.astype(np.float64)
    span = wide.max(initial=0.0) - wide.min(initial=0.0) + 1.0
    return wide + (labels * span)[:, None]


PLAIN_NMS = {"per class": nms_per_class, "class offset": nms_offset, "class offset, matrix": nms_matrix}


class UsualPath:
    """The whole of it, one image at a time, in the form that `edgekd.bench.latency` times."""

    device_ms = None

    def __init__(self, detector: torch.nn.Module, score: float, iou: float, limit: int) -> None:
        self.detector = detector.eval()
        self.spec = detector.spec.preprocess
        self.thresholds = (score, iou, limit)

    def stages_ns(self, data: bytes, clock: Any) -> tuple[int, int, int]:
        start = clock()
        array, size = prepare(data, self.spec.input_hw, self.spec.mean, self.spec.std)
        prepared = clock()
        with torch.inference_mode():
            boxes, scores = self.detector.decode(self.detector(torch.from_numpy(array)))
        inferred = clock()
        self.finish(boxes[0].numpy(), scores[0].numpy(), size)
        return prepared - start, inferred - prepared, clock() - inferred

    def finish(self, boxes: np.ndarray, scores: np.ndarray, size: tuple[int, int]) -> Found:
        found, values, labels = nms_per_class(boxes, scores, *self.thresholds)
        h, w = self.spec.input_hw
        scale = np.array([size[0] / w, size[1] / h] * 2, np.float32)
        return np.clip(found * scale, 0, np.array([*size, *size], np.float32)), values, labels
