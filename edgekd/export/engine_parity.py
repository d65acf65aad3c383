"""The last hop of the parity gate: an engine against ONNX Runtime on the graph that it was built from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import ParityError
from edgekd.export.gate import MapMeter, images_to_compare
from edgekd.export.parity import Outputs, ParityReport, Run, compare, with_map
from edgekd.runtimes.base import Runtime
from edgekd.runtimes.ort import OrtRuntime
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.outputs import decode
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
        model: what it was built from, before it was converted to fp16 if that was done for this engine.
        dataset: real images; generated scenes serve where there are none.
    """
    manifest = runtime.manifest
    images, names, generated = images_to_compare(dataset, manifest.preprocess_spec)
    input_hw = manifest.preprocess_spec.input_hw
    with OrtRuntime(model.SerializeToString()) as same_graph:
        reference, candidate = (_decoded(one, manifest.output_format, input_hw) for one in (same_graph, runtime))
        precisions: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}
        report = compare(
            reference,
            candidate,
            images,
            names,
            precision=precisions[manifest.precision],
            against=f"ONNX Runtime on its graph (TensorRT {manifest.tensorrt} on {runtime.provider})",
            thresholds=thresholds,
            generated=generated,
            align=aligned,
        )
        if dataset is None or generated:
            return report, ["no data set at hand: the engine was compared on generated scenes"]
        if dataset.class_names == manifest.class_names:
            meter = MapMeter(dataset, manifest.preprocess_spec, thresholds)
            report = with_map(
                report, meter.of(reference), meter.of(candidate), meter.images, map_budget, meter.one_object
            )
    return report, []


def _decoded(runtime: Runtime, form: OutputFormat, input_hw: tuple[int, int]) -> Run:
    """A run that gives corners in input pixels and probabilities, however the detector codes them, of one image alone."""

    def one(image: FloatArray) -> Outputs:
        boxes, scores = decode(runtime.run(image), form, input_hw)
        return {"boxes": np.array(boxes[None]), "scores": np.array(scores[None])}

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
