"""The parity gate of one export: which images, which mAP, and every comparison that an artefact has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from edgekd.data.image_cache import ResizedImages
from edgekd.data.images import evenly_spread
from edgekd.errors import ParityError
from edgekd.export.float16 import LARGEST, overflow
from edgekd.export.images import PreparedImages, generated_images
from edgekd.export.parity import ParityReport, Run, compare, onnx_run, same_selection, torch_run, with_map, worst_layer
from edgekd.export.sensitivity import largest_magnitudes
from edgekd.preprocess import normalise
from edgekd.selection import Selection
from edgekd.types import Dataset, FloatArray, PreprocessSpec

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekd.detectors.base import Detector
    from edgekd.export.onnx import Precision

PARITY_IMAGES = 16
MAP_IMAGES = 200
_CACHE_MIB = 256


class MapMeter:
    """AP50 on (part of) a split of whatever runs; images are read and resized once.

    Attributes:
        images: how many the figures are from. one_object: AP50 points that one object of the rarest class is worth; 0
            where there is none, and no AP50.
    """

    def __init__(self, dataset: Dataset, preprocess: PreprocessSpec, thresholds: Selection) -> None:
        step = max(1, len(dataset) // MAP_IMAGES)
        self._records, self._class_names = dataset.records[::step][:MAP_IMAGES], dataset.class_names
        self.images = len(self._records)
        objects = np.bincount(np.concatenate([record.labels[record.trainable] for record in self._records]))
        there = objects[objects > 0]
        self.one_object = 100.0 / (len(there) * int(there.min())) if len(there) else 0.0
        self._preprocess, self._thresholds = preprocess, thresholds
        self._resized = ResizedImages(self._records, preprocess, _CACHE_MIB)

    def of(self, run: Run) -> float:
        """AP50 in [0, 1]."""
        from edgekd.bench.accuracy import evaluate

        found = []
        for index in range(self.images):
            image, geometry = self._resized[index]
            outputs = run(normalise(image, self._preprocess))
            found.append(self._thresholds.place(outputs["boxes"][0], outputs["scores"][0], geometry))
        return evaluate(self._records, found, self._class_names).ap50 or 0.0

    def of_model(self, model: bytes | ModelProto) -> float:
        """AP50 in [0, 1] of an exported model with decoded outputs."""
        return self.of(onnx_run(model))


@dataclass
class Gate:
    """Compares an export with its original, step by step; every step either adds a report or raises.

    Attributes:
        images, names: prepared inputs (1, 3, H, W) and what messages call them. generated: they are scenes.
        meter: mAP, where there is a split with the detector's classes.
        map_budget: AP50 points that fp16 and int8 may lose.
        reports, notes: what was found so far.
    """

    detector: Detector
    thresholds: Selection
    images: Sequence[FloatArray]
    names: Sequence[str]
    generated: bool
    meter: MapMeter | None
    map_budget: float
    reports: list[ParityReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _peaks: dict[str, float] = field(default_factory=dict)

    def against_torch(self, model: ModelProto, *, measure_map: bool) -> None:
        """The fp32 model against the detector it was traced from.

        Raises:
            ParityError: they differ.
        """
        report = self._compare(torch_run(self.detector), onnx_run(model), "fp32", "torch")
        if measure_map and self.meter is not None:
            pair = self.meter.of(torch_run(self.detector)), self.meter.of_model(model)
            report = with_map(report, *pair, self.meter.images, self.map_budget, self.meter.one_object)
        self._pass(report)

    def against_fp32(
        self, base: ModelProto, model: ModelProto, precision: Precision, ap50: tuple[float, float] | None
    ) -> None:
        """A converted model against the fp32 one.

        Args:
            ap50: of both, where it is known already.

        Raises:
            ParityError: they differ too much; names the worst output, and the layer where they part most.
        """
        report = self._compare(onnx_run(base), onnx_run(model), precision, "the fp32 export")
        if self.meter is not None:
            pair = ap50 or (self.meter.of_model(base), self.meter.of_model(model))
            report = with_map(report, *pair, self.meter.images, self.map_budget)
        if precision == "fp16":
            self._peaks = self._peaks or largest_magnitudes(base, self.images)
            if (beyond := overflow(model, self._peaks)) is not None:
                said = f"tensor {beyond[0]} reaches {beyond[1]:.6g}, and float16 no more than {LARGEST:g}"
                report = replace(report, failures=(*report.failures, said))
        hint = None
        if not report.ok and (worst := worst_layer(base, model, self.images[0])) is not None:
            hint = f"they part most at tensor {worst[0]} (relative error +{worst[1]:.1%})"
        self._pass(report, hint)

    def nms_inside(self, decoded: ModelProto, complete: ModelProto) -> None:
        """The form with NMS inside against selection outside.

        Raises:
            ParityError: they differ.
        """
        outside, inside = onnx_run(decoded), onnx_run(complete)
        for name, image in zip(self.names, self.images, strict=True):
            difference = same_selection(outside, inside, image, self.thresholds)
            if difference is not None:
                raise ParityError("NMS inside the file differs from NMS outside", got=f"{name}: {difference}")

    def _compare(self, reference: Run, candidate: Run, precision: Precision, against: str) -> ParityReport:
        return compare(
            reference,
            candidate,
            self.images,
            self.names,
            precision=precision,
            against=against,
            thresholds=self.thresholds,
            generated=self.generated,
        )

    def _pass(self, report: ParityReport, hint: str | None = None) -> None:
        report.check(hint)
        self.reports.append(report)
        if not report.confident:
            self.notes.append(f"{report.precision}: nothing scored over 0.3 on these images, so no detections to match")


def images_to_compare(
    dataset: Dataset | None, spec: PreprocessSpec
) -> tuple[Sequence[FloatArray], Sequence[str], bool]:
    """Some of a split's images, prepared, with their names; of generated scenes, and True, where there are none."""
    if dataset is None or not len(dataset):
        return *generated_images(spec), True
    prepared = PreparedImages(evenly_spread(dataset.records, PARITY_IMAGES), spec)
    return prepared, prepared.names, False


def make_gate(detector: Detector, dataset: Dataset | None, thresholds: Selection, map_budget: float) -> Gate:
    """The gate on a split's images, or on generated scenes where there is none."""
    spec = detector.spec
    images, names, generated = images_to_compare(dataset, spec.preprocess)
    gate = Gate(detector, thresholds, images, names, generated, None, map_budget)
    if dataset is None or generated:
        gate.notes.append("no data set at hand: compared on generated scenes, which says less than real images")
    elif dataset.class_names == spec.class_names:
        meter = MapMeter(dataset, spec.preprocess, thresholds)
        if meter.one_object:
            gate.meter = meter
        else:  # else int8 would choose its calibration by an AP50 of zero everywhere
            gate.notes.append("mAP was not compared: there is no object on the images to compare on")
    else:
        gate.notes.append("mAP was not compared: the data set's classes are not the detector's")
    return gate
