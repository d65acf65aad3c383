"""Which range of each activation int8 should cover, measured on training images one at a time in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError, ExportError
from edgekd.types import FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")
PERCENTILE = 99.99
_BINS = 2048
_LEVELS = 128

Ranges = Mapping[str, tuple[float, float]]
"""Tensor name to (lowest, highest) value to represent."""


@dataclass(frozen=True)
class TensorStatistics:
    """What was seen of one tensor: `histogram` counts |x| in equal bins over [0, max(|lowest|, |highest|)]."""

    lowest: float
    highest: float
    histogram: NDArray[np.int64] | None = None

    @property
    def magnitude(self) -> float:
        """Largest absolute value."""
        return max(abs(self.lowest), abs(self.highest))

    def range(self, method: Method) -> tuple[float, float]:
        """(lowest, highest) by a calibration method.

        Raises:
            ValueError: a method other than minmax, without a histogram.
        """
        if method == "minmax" or not self.magnitude:
            return self.lowest, self.highest
        if self.histogram is None:
            raise ValueError(f"{method} calibration needs histograms")
        share = percentile_share(self.histogram) if method == "percentile" else entropy_share(self.histogram)
        limit = share * self.magnitude
        return max(self.lowest, -limit), min(self.highest, limit)


def collect(
    model: ModelProto, tensors: Sequence[str], images: Sequence[FloatArray], *, histograms: bool = False
) -> dict[str, TensorStatistics]:
    """Run the model on each image and keep statistics of inner tensors.

    Args:
        model: fp32, with the tensors in its graph.
        images: prepared inputs, each (1, 3, H, W) float32; read twice when histograms are wanted.

    Raises:
        DataError: no images.
        ExportError: an activation is not finite.
    """
    from edgekd.export.graph import open_session, with_outputs

    if not len(images):
        raise DataError("int8 calibration needs images", got="none")
    session = open_session(with_outputs(model, [name for name in tensors if name != "images"]))

    def observe(image: FloatArray) -> dict[str, FloatArray]:
        inner = [name for name in tensors if name != "images"]
        values = dict(zip(inner, session.run(inner, {"images": image}), strict=True))
        return {**values, "images": image} if "images" in tensors else values

    extremes: dict[str, tuple[float, float]] = {}
    for image in images:
        for name, value in observe(image).items():
            low, high = float(value.min()), float(value.max())
            if not np.isfinite([low, high]).all():
                raise ExportError("an activation is not finite while calibrating", got=f"tensor {name}")
            before = extremes.get(name, (low, high))
            extremes[name] = (min(low, before[0]), max(high, before[1]))
    if not histograms:
        return {name: TensorStatistics(*extremes[name]) for name in tensors}
    counts = {name: np.zeros(_BINS, np.int64) for name in tensors}
    for image in images:
        for name, value in observe(image).items():
            magnitude = max(map(abs, extremes[name]))
            if magnitude:
                bins = np.minimum(np.abs(value.reshape(-1)) * (_BINS / magnitude), _BINS - 1).astype(np.int64)
                counts[name] += np.bincount(bins, minlength=_BINS)
    return {name: TensorStatistics(*extremes[name], counts[name]) for name in tensors}


def percentile_share(histogram: NDArray[np.int64]) -> float:
    """Share of the histogram's width below which `PERCENTILE` per cent of the values lie."""
    total = np.cumsum(histogram)
    return float((np.searchsorted(total, total[-1] * PERCENTILE / 100.0) + 1) / len(histogram))


def entropy_share(histogram: NDArray[np.int64]) -> float:
    """Share of the histogram's width to keep so that quantising loses the least information (Migacz, GTC 2017).

    For every candidate limit the values are clipped to it (P) and P is rounded to 128 levels (Q); the limit with the
    least KL(P || Q) wins. The first bin is left out of the comparison: after a ReLU it holds the zeros, which any
    limit represents exactly.
    """
    counts = histogram.astype(np.float64)
    counts[0] = 0.0
    if not counts.sum():
        return 1.0
    best, best_share = np.inf, 1.0
    for limit in range(_LEVELS, len(counts) + 1, _LEVELS // 8):
        clipped = counts[:limit].copy()
        clipped[-1] += counts[limit:].sum()
        divergence = _kl(clipped, _rounded(counts[:limit]))
        if divergence < best:
            best, best_share = divergence, limit / len(counts)
    return best_share


def _rounded(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spread each of 128 levels' total evenly over those of its bins that are not empty."""
    level = np.arange(len(counts)) * _LEVELS // len(counts)
    filled = counts > 0
    totals = np.bincount(level, counts, _LEVELS)
    members = np.maximum(np.bincount(level, filled, _LEVELS), 1)
    return np.where(filled, (totals / members)[level], 0.0)


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """KL(p || q) of two histograms; infinite where q has nothing at all."""
    if not q.sum():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    at = p > 0
    return float((p[at] * np.log(p[at] / np.maximum(q[at], 1e-12))).sum())
