"""The last hop of the parity gate: an engine against ONNX Runtime on the very graph that it was built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import ParityError
from edgekd.export.gate import MapMeter, images_to_compare
from edgekd.export.parity import Outputs, ParityReport, Run, compare, onnx_run, with_map
from edgekd.runtimes.tensorrt_runtime import TensorRTRuntime
from edgekd.selection import Selection
from edgekd.types import Dataset, FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekd.export.onnx import Precision

_COMPARED_ROWS = 100
"""Candidates compared one by one; the rest of a TopK is noise near zero."""


def compare_engine(
    runtime: TensorRTRuntime, model: ModelProto, dataset: Dataset | None, thresholds: Selection, map_budget: float
) -> tuple[ParityReport, list[str]]:
    """Raw candidates, matched detections, and mAP where the data set has the detector's classes; with notes.

    Args:
        runtime: the engine, with outputs of the form boxes-scores.
        model: what it was built from.
        dataset: real images; generated scenes serve where there are none.
    """
    manifest = runtime.manifest
    images, names, generated = images_to_compare(dataset, manifest.preprocess_spec)
    form = manifest.output_format
    reference, candidate = (_named(run, form.names[:2]) for run in (onnx_run(model), runtime.run))
    precisions: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}
    report = compare(
        reference,
        candidate,
        images,
        names,
        precision=precisions[manifest.precision],
        against=f"ONNX Runtime on the same graph (TensorRT {manifest.tensorrt} on {runtime.provider})",
        thresholds=thresholds,
        generated=generated,
        align=aligned,
    )
    if dataset is None or generated:
        return report, ["no data set at hand: the engine was compared on generated scenes"]
    if dataset.class_names == manifest.class_names:
        meter = MapMeter(dataset, manifest.preprocess_spec, thresholds)
        report = with_map(report, meter.of(reference), meter.of(candidate), meter.images, map_budget)
    return report, []


def _named(run: Any, names: Sequence[str]) -> Run:
    """A run whose outputs go by "boxes" and "scores", in float32, one image alone."""

    def one(image: FloatArray) -> Outputs:
        found: Mapping[str, Any] = run(image)
        return {
            role: np.array(found[name][:1], np.float32) for role, name in zip(("boxes", "scores"), names, strict=True)
        }

    return one


def aligned(truth: Outputs, found: Outputs) -> tuple[Outputs, Outputs]:
    """The reference's best rows, and for each the row of the other side that is nearest to it.

    TopK orders rows by score, and rounding swaps rows of nearly equal scores.

    Raises:
        ParityError: one side has rows of another width.
    """
    for role in ("boxes", "scores"):
        if truth[role].shape[2] != found[role].shape[2]:
            raise ParityError(f"output {role!r} has another shape", got=found[role].shape, expected=truth[role].shape)
    best = np.argsort(-truth["scores"][0].max(1), kind="stable")[:_COMPARED_ROWS]
    boxes, scores = truth["boxes"][0][best], truth["scores"][0][best]
    size = np.maximum((boxes[:, 2:] - boxes[:, :2]).max(1), 1.0)[:, None]
    distance = np.abs(found["boxes"][0][None] - boxes[:, None]).max(2) / size
    distance += np.abs(found["scores"][0][None] - scores[:, None]).max(2)
    rows = np.where(np.isfinite(distance), distance, np.inf).argmin(1)
    return (
        {"boxes": boxes[None], "scores": scores[None]},
        {"boxes": found["boxes"][:, rows], "scores": found["scores"][:, rows]},
    )
