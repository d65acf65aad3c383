"""Known inputs with known answers: whether a model on this device still is the detector that was bundled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekd.boxes import iou_matrix
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.outputs import decode

CONFIDENT = 0.3
"""Candidates that score this much in the expected answer are looked for in the device's."""

_NEARLY = 0.67
_MOST_COMPARED = 300


def normalise(image_u8: Any, preprocess: Mapping[str, Any]) -> Any:
    """(h, w, 3) uint8 RGB at input size to (1, 3, h, w) float32, as `edgekd.preprocess.normalise` does it."""
    mean, std = (np.array(preprocess[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    scale, bias = (1.0 / (255.0 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    chw = np.ascontiguousarray(image_u8.transpose(2, 0, 1)[:: -1 if preprocess.get("channels") == "bgr" else 1])
    out = np.multiply(chw, scale, dtype=np.float32)
    out += bias
    return out[None]


def check(model: Mapping[str, Any], expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Compare one image's outputs; `failure` says what is beyond tolerance, or is None.

    Args:
        model: its entry in the manifest, with `tolerance`.
        expected, found: output name to array.
    """
    tolerance, form = model["tolerance"], OutputFormat.from_dict(model["output_format"])
    input_hw = tuple(model["preprocess"]["input_hw"])
    boxes, scores = decode(expected, form, input_hw)
    other_boxes, other_scores = decode(found, form, input_hw)
    confident, matched = _matched(boxes, scores, other_boxes, other_scores, tolerance["match_iou"])
    result: dict[str, Any] = {"confident": confident, "matched": matched, "failure": None}
    if confident and matched < tolerance["matched"] * confident:
        result["failure"] = f"only {matched} of {confident} confident candidates are found again"
    if boxes.shape != other_boxes.shape:  # finished detections: a weak one more or less is no failure
        if form.kind != "detections":
            result["failure"] = f"{len(other_boxes)} candidates instead of {len(boxes)}"
        return result
    gap = np.abs(scores - other_scores)
    result["scores_max_abs"] = float(gap.max()) if gap.size else 0.0
    result["boxes_max_px"] = float(np.abs(boxes - other_boxes).max()) if boxes.size else 0.0
    if form.kind != "detections":
        result["failure"] = result["failure"] or _beyond(boxes, scores, other_boxes, other_scores, tolerance)
    return result


def _beyond(boxes: Any, scores: Any, other_boxes: Any, other_scores: Any, tolerance: Mapping[str, Any]) -> str | None:
    gap = float(np.abs(scores - other_scores).max()) if scores.size else 0.0
    if tolerance["scores"] is not None and gap > tolerance["scores"]:
        return f"a score differs by {gap:.3g}, {tolerance['scores']:g} allowed"
    if tolerance["boxes_px"] is None:
        # Rounding may move any one value; a detector that lost its weights moves nearly all of them.
        apart = float(np.linalg.norm(scores - other_scores) / max(float(np.linalg.norm(scores)), 1e-6))
        return f"scores differ by {apart:.0%} of their size" if apart > 0.5 else None
    size = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])[:, None]
    over = np.abs(boxes - other_boxes) - (tolerance["boxes_px"] + tolerance["boxes_relative"] * np.abs(size))
    if boxes.size and float(over.max()) > 0:
        row = int(over.max(1).argmax())
        return f"box {row} is {other_boxes[row].tolist()} instead of {boxes[row].tolist()}"
    return None


def _matched(boxes: Any, scores: Any, other_boxes: Any, other_scores: Any, iou: float) -> tuple[int, int]:
    """(confident candidates, how many have a partner of their class that overlaps enough)."""
    confident = matched = 0
    for label in range(scores.shape[1]):
        rows = np.flatnonzero(scores[:, label] >= CONFIDENT)
        rows = rows[np.argsort(-scores[rows, label], kind="stable")][:_MOST_COMPARED]
        others = np.flatnonzero(other_scores[:, label] >= CONFIDENT * _NEARLY)
        confident += len(rows)
        if len(rows) and len(others):
            matched += int((iou_matrix(boxes[rows], other_boxes[others]) >= iou).any(1).sum())
    return confident, matched
