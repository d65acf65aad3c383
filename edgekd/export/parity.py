"""Whether an exported detector still is the detector: raw tensors, matched detections, and mAP, against tolerances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.boxes import iou_matrix
from edgekd.errors import ParityError
from edgekd.export.graph import GraphIndex, open_session, with_outputs
from edgekd.selection import Selection
from edgekd.types import Detections, FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekd.detectors.base import Detector
    from edgekd.export.onnx import Precision

Outputs = Mapping[str, FloatArray]
Run = Callable[[FloatArray], Outputs]
"""(1, 3, H, W) float32 to {"boxes": (1, P, 4) input pixels, "scores": (1, P, K)}."""

Align = Callable[[Outputs, Outputs], tuple[Outputs, Outputs]]
"""(reference, candidate) to the same with rows in one order."""

CONFIDENT = 0.3
"""Detections that score this much are looked for on the other side."""
_NEARLY = 0.67
"""A partner may score this share of `CONFIDENT`: a score near the line must not count as a lost detection."""


@dataclass(frozen=True)
class Tolerance:
    """What may differ at a precision.

    Attributes:
        scores: largest absolute difference of any score; None: not judged, since rounding is the point of int8.
        boxes_px: largest difference of any box coordinate, in input pixels, plus `boxes_relative` of its size.
        match_iou: overlap that a detection and its partner need.
        matched: least share of confident detections that have a partner.
        map_points: AP50 points that may be lost; None: the caller's budget.
    """

    scores: float | None
    boxes_px: float | None
    boxes_relative: float
    match_iou: float
    matched: float
    map_points: float | None


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(1e-3, 0.05, 1e-3, 0.9, 0.99, 0.1),
    "fp16": Tolerance(0.02, 1.0, 0.02, 0.9, 0.95, None),
    "int8": Tolerance(None, None, 0.0, 0.7, 0.8, None),
}


@dataclass(frozen=True)
class OutputDifference:
    """The worst difference of one output over all images, and where it is.

    Attributes:
        max_abs: largest absolute difference. max_rel: largest difference as a share of max(1, |reference|).
        image: name of the image. index: position within the output, without the batch.
        reference, candidate: the two values there.
    """

    output: str
    max_abs: float
    max_rel: float
    image: str
    index: tuple[int, ...]
    reference: float
    candidate: float

    def __str__(self) -> str:
        return (
            f"{self.output}[{', '.join(map(str, self.index))}] of {self.image}: "
            f"{self.candidate:.6g} instead of {self.reference:.6g}"
        )


@dataclass(frozen=True)
class ParityReport:
    """What was compared, how far it differs, and what is beyond tolerance.

    Attributes:
        against: what the reference was, such as "torch fp32".
        images: how many were compared. generated: they are generated scenes, not the user's.
        confident, matched: confident detections on both sides, and how many of them have a partner.
        ap50_reference, ap50: in [0, 1]; None where there was nothing to evaluate on.
        failures: what is beyond tolerance; empty when all is well.
    """

    precision: Precision
    against: str
    images: int
    generated: bool
    outputs: tuple[OutputDifference, ...]
    confident: int
    matched: int
    tolerance: Tolerance
    ap50_reference: float | None = None
    ap50: float | None = None
    map_images: int = 0
    failures: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything is within tolerance."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "ok": self.ok}

    def check(self, hint: str | None = None) -> None:
        """Pass, or raise.

        Raises:
            ParityError: something is beyond tolerance; names the worst output.
        """
        if self.failures:
            raise ParityError(
                f"the {self.precision} export does not agree with {self.against} on {self.images} images",
                got="; ".join(self.failures),
                expected=f"{self.tolerance}",
                fix=hint,
            )


def torch_run(detector: Detector) -> Run:
    """A native detector in eval mode on the CPU as a reference."""
    import copy

    import torch

    module = copy.deepcopy(detector).float().cpu().eval()

    def run(image: FloatArray) -> Outputs:
        with torch.no_grad():
            boxes, scores = module.decode(module(torch.from_numpy(image)))
        return {"boxes": boxes.numpy(), "scores": scores.numpy()}

    return run


def onnx_run(model: ModelProto | bytes) -> Run:
    """An exported model on ONNX Runtime's CPU provider: all its outputs by name."""
    session = open_session(model)
    names = [output.name for output in session.get_outputs()]

    def run(image: FloatArray) -> Outputs:
        return dict(zip(names, session.run(names, {"images": image}), strict=True))

    return run


def compare(
    reference: Run,
    candidate: Run,
    images: Sequence[FloatArray],
    names: Sequence[str],
    *,
    precision: Precision,
    against: str,
    thresholds: Selection,
    generated: bool = False,
    align: Align | None = None,
) -> ParityReport:
    """Run both on every image and judge by the precision's tolerances; mAP is added by `with_map`.

    Args:
        images: each (1, 3, H, W) float32, prepared. names: one a image, for messages.
        align: which rows of the raw outputs belong together, where their order may differ; detections need none.
    """
    tolerance = TOLERANCES[precision]
    worst: dict[str, OutputDifference] = {}
    failures: dict[str, str] = {}
    confident = matched = 0
    for name, image in zip(names, images, strict=True):
        truth, found = reference(image), candidate(image)
        total, partners = match_detections(
            _selected(truth, thresholds), _selected(found, thresholds), tolerance.match_iou
        )
        confident, matched = confident + total, matched + partners
        if align is not None:
            truth, found = align(truth, found)
        for output in ("scores", "boxes"):
            difference = _difference(output, truth[output], found[output], name)
            if output not in worst or not difference.max_abs <= worst[output].max_abs:
                worst[output] = difference
            if not _within(output, truth, found, tolerance):
                failures[output] = str(worst[output])
    if confident and matched < tolerance.matched * confident:
        failures["matched"] = f"only {matched} of {confident} confident detections have a partner"
    return ParityReport(
        precision,
        against,
        len(images),
        generated,
        tuple(worst[output] for output in sorted(worst)),
        confident,
        matched,
        tolerance,
        failures=tuple(failures.values()),
    )


def with_map(
    report: ParityReport, reference: float, candidate: float, images: int, budget: float, one_object: float = 0.0
) -> ParityReport:
    """The report with AP50 of both sides, in [0, 1], judged by the tolerance or else by `budget` AP50 points.

    The tolerance gives way to `one_object`, the points that one object is worth: on few images, scores that a detector hardly
    trained gives alike change places by rounding alone.
    """
    allowed = budget if report.tolerance.map_points is None else max(report.tolerance.map_points, one_object)
    lost = 100.0 * (reference - candidate)
    failures = report.failures
    if not lost <= allowed + 1e-9:
        failures = (*failures, f"{lost:.2f} AP50 points lost on {images} images, {allowed:g} allowed")
    return replace(report, ap50_reference=reference, ap50=candidate, map_images=images, failures=failures)


def _difference(output: str, truth: FloatArray, found: FloatArray, image: str) -> OutputDifference:
    if truth.shape != found.shape:
        raise ParityError(f"output {output!r} has another shape", got=found.shape, expected=truth.shape)
    gap = np.abs(found.astype(np.float64) - truth)
    gap[~np.isfinite(gap)] = np.inf
    at = np.unravel_index(int(gap.argmax()), gap.shape)
    relative = gap / np.maximum(1.0, np.abs(truth))
    place = tuple(int(i) for i in at[1:])
    return OutputDifference(
        output, float(gap[at]), float(relative.max()), image, place, float(truth[at]), float(found[at])
    )


def _within(output: str, truth: Outputs, found: Outputs, tolerance: Tolerance) -> bool:
    if not np.isfinite(found[output]).all():
        return False
    gap = np.abs(found[output] - truth[output])
    if output == "scores":
        return tolerance.scores is None or bool((gap <= tolerance.scores).all())
    if tolerance.boxes_px is None:
        return True
    boxes = truth["boxes"]
    size = np.maximum(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])[..., None]
    return bool((gap <= tolerance.boxes_px + tolerance.boxes_relative * size).all())


def _selected(outputs: Outputs, thresholds: Selection) -> Detections:
    boxes, scores = outputs["boxes"][0], outputs["scores"][0]
    finite = np.isfinite(boxes).all(1) & np.isfinite(scores).all(1)
    confident = replace(thresholds, score_threshold=max(CONFIDENT * _NEARLY, thresholds.score_threshold))
    return confident.select(boxes[finite], scores[finite])


def match_detections(one: Detections, other: Detections, iou: float) -> tuple[int, int]:
    """(confident detections of both sides, how many have a partner on the other side: same label, IoU >= `iou`)."""
    overlap = iou_matrix(one.boxes_xyxy, other.boxes_xyxy) >= iou
    overlap &= one.labels[:, None] == other.labels[None, :]
    sure, sure_other = one.scores >= CONFIDENT, other.scores >= CONFIDENT
    total = int(sure.sum() + sure_other.sum())
    return total, int(overlap[sure].any(1).sum() + overlap[:, sure_other].any(0).sum())


def worst_layer(reference: ModelProto, candidate: ModelProto, image: FloatArray) -> tuple[str, float] | None:
    """The tensor at which two versions of one graph part most: (its name, the rise in relative error there).

    Compares every float tensor that both graphs hold by the same name, in graph order; None if they share none.
    """
    first, second = GraphIndex(reference), GraphIndex(candidate)
    shared = [name for name in first.producer if name in second.producer and name]
    runs = [open_session(with_outputs(model, shared), optimised=False) for model in (reference, candidate)]
    truth, found = (run.run(shared, {"images": image}) for run in runs)
    before, worst = 0.0, None
    for name, a, b in zip(shared, truth, found, strict=True):
        if not np.issubdtype(a.dtype, np.floating) or not a.size or a.shape != b.shape:
            continue
        error = float(np.linalg.norm((b - a).astype(np.float64)) / max(float(np.linalg.norm(a)), 1e-9))
        if worst is None or not error - before <= worst[1]:
            worst = (name, error - before)
        before = error
    return worst


def same_selection(decoded: Run, complete: Run, image: FloatArray, thresholds: Selection) -> str | None:
    """Whether the form with NMS gives what `select` gives on the decoded form; what differs, or None."""
    raw, found = decoded(image), complete(image)
    wanted = replace(thresholds, box_voting=None).select(raw["boxes"][0], raw["scores"][0])
    if len(wanted) != len(found["scores"]):
        return f"{len(found['scores'])} detections instead of {len(wanted)}"
    if len(wanted) and not np.allclose(wanted.scores, found["scores"], atol=1e-4):
        return f"scores differ by {np.abs(wanted.scores - found['scores']).max():.2g}"
    total, partners = match_detections(
        wanted, Detections(found["boxes"], found["scores"], np.asarray(found["labels"], np.int64)), 0.99
    )
    return None if partners == total else f"{total - partners} of {total} confident detections have no partner"
