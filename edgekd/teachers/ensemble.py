"""Several teachers as one: their answers fused, or their raw outputs averaged where they mean the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.boxes import have_extent
from edgekd.errors import DistillationSetupError, UserError
from edgekd.postprocess import nms, select, select_soft, soft_nms, weighted_boxes_fusion
from edgekd.predictor import LIGHT_NMS_IOU
from edgekd.preprocess import Geometry
from edgekd.recipe import EnsembleConfig
from edgekd.selection import DEFAULT_SELECTION, Selection
from edgekd.teachers.predicted import ANSWER_THRESHOLD, PredictorTeacher
from edgekd.types import Detections, FloatArray, ImageArray, ImageRecord, SoftDetections

if TYPE_CHECKING:
    import torch

    from edgekd.detectors.base import Detector, DetectorOutput

AccuracyOf = Callable[[Sequence[ImageRecord], Sequence[Detections]], float]
"""How good detections are on labelled images; larger is better. AP50, as a rule."""

WEIGHT_STEPS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""What `learn_weights` tries for each teacher."""


class Ensemble:
    """Teachers that answer together, also as one deployed system: `prepare`, `infer` and `finish` apart.

    Args:
        teachers: at least one, all over the same classes.
        config: how they are fused.
        weights: one positive number a teacher, scaled to sum to 1; equal if left out.

    Attributes:
        weights: one a teacher, summing to 1.

    Raises:
        DistillationSetupError: "mean-outputs" for teachers whose raw outputs do not mean the same; says why.
        UserError: weights that are not positive, or not one a teacher.
    """

    def __init__(
        self,
        teachers: Sequence[PredictorTeacher],
        config: EnsembleConfig,
        weights: Sequence[float] | None = None,
        *,
        selection: Selection = DEFAULT_SELECTION,
    ) -> None:
        if not teachers:
            raise DistillationSetupError("an ensemble needs at least one teacher")
        if len({teacher.student_class_names for teacher in teachers}) > 1:
            raise DistillationSetupError("teachers of an ensemble must answer in the same classes")
        self.name = "ensemble"
        self.teachers = tuple(teachers)
        self.config = config
        self.selection = selection
        self.class_names = teachers[0].student_class_names
        self.weights = _shares(weights, len(teachers))
        self._detectors = _alike(self.teachers) if config.fusion == "mean-outputs" else ()

    def fuse(self, answers: Sequence[SoftDetections]) -> SoftDetections:
        """The teachers' answers to one image, in their order and in one frame, as one answer.

        Raises:
            DistillationSetupError: the fusion is "mean-outputs", which works on raw outputs: use `answer`.
        """
        return fuse(answers, self.weights, self.config, [teacher.known for teacher in self.teachers])

    def answer(self, image: ImageArray) -> SoftDetections:
        """Answer one original image with class distributions, in its own pixels, best first."""
        tensors, geometries = self.prepare(image)
        return self._soften(self.infer(tensors), geometries)

    def detect(self, image: ImageArray) -> Detections:
        """Answer one original image as one deployed system."""
        tensors, geometries = self.prepare(image)
        return self.finish(self.infer(tensors), geometries)

    def prepare(self, image: ImageArray) -> tuple[list[FloatArray], list[Geometry]]:
        """Every teacher's input tensor; teachers that prepare images alike share one."""
        done = {teacher.preprocess: teacher.predictor for teacher in self.teachers}
        prepared = {spec: predictor.prepare(image) for spec, predictor in done.items()}
        pairs = [prepared[teacher.preprocess] for teacher in self.teachers]
        return [tensor for tensor, _ in pairs], [geometry for _, geometry in pairs]

    def infer(self, tensors: Sequence[FloatArray]) -> list[Any]:
        """Every teacher's raw outputs."""
        if self._detectors:
            return _raw_outputs(self._detectors, tensors)
        return [teacher.predictor.infer(tensor) for teacher, tensor in zip(self.teachers, tensors, strict=True)]

    def finish(self, raw: Sequence[Any], geometries: Sequence[Geometry]) -> Detections:
        """Fuse raw outputs of one image to detections in its own pixels."""
        if self._detectors:
            return self.selection.place(*self._mean(raw), geometries[0])
        lowest = min(self.selection.score_threshold, ANSWER_THRESHOLD)  # what one doubts, another may be sure of
        return detections_of(self._soften(raw, geometries, lowest), self.config, self.selection)

    def _soften(
        self, raw: Sequence[Any], geometries: Sequence[Geometry], score_threshold: float = ANSWER_THRESHOLD
    ) -> SoftDetections:
        if self._detectors:
            boxes, scores = self._mean(raw)
            found = select_soft(
                boxes,
                scores,
                score_threshold=score_threshold,
                nms_iou=LIGHT_NMS_IOU,
                max_detections=self.selection.max_detections,
            )
            placed = geometries[0].to_source(found.boxes_xyxy)
            inside = have_extent(placed)
            return SoftDetections(placed[inside], found.class_probs[inside])
        triples = zip(self.teachers, raw, geometries, strict=True)
        return self.fuse([teacher.soften(outputs, geometry, score_threshold) for teacher, outputs, geometry in triples])

    def _mean(self, outputs: Sequence[DetectorOutput]) -> tuple[FloatArray, FloatArray]:
        """(boxes, scores) decoded from the weighted mean of logits and box codings."""
        import torch

        with torch.no_grad():
            boxes, scores = self._detectors[0].decode(mean_outputs(outputs, self.weights))
        mapped = self.teachers[0].predictor.class_map
        probs = scores[0].float().cpu().numpy()
        return boxes[0].float().cpu().numpy(), probs if mapped is None else mapped.project(probs)

    def describe(self) -> dict[str, Any]:
        """Members, weights and fusion, in plain JSON types."""
        return {
            "name": self.name,
            "fusion": self.config.fusion,
            "iou": self.config.iou,
            "weights": list(self.weights),
            "members": [teacher.predictor.describe() for teacher in self.teachers],
        }

    def close(self) -> None:
        """Free every member."""
        for teacher in self.teachers:
            teacher.close()


def fuse(
    answers: Sequence[SoftDetections],
    weights: Sequence[float],
    config: EnsembleConfig,
    known: Sequence[Any] | None = None,
) -> SoftDetections:
    """Several answers to one image as one, whatever the order of the models.

    Raises:
        DistillationSetupError: the fusion works on raw outputs.
    """
    if config.fusion == "wbf":
        return weighted_boxes_fusion(answers, weights, config.iou, known=known)
    if config.fusion == "mean-outputs":
        raise DistillationSetupError(
            "mean-outputs averages raw outputs, not answers", fix="ask the ensemble itself, or use `fusion: wbf`"
        )
    pooled = _pooled(answers, weights)
    confidence = pooled.class_probs.max(1, initial=0.0)
    labels = pooled.class_probs.argmax(1) if len(pooled) else np.zeros(0, np.int64)
    if config.fusion == "nms":
        rows = nms(pooled.boxes_xyxy, confidence, labels, config.iou)
        return SoftDetections(pooled.boxes_xyxy[rows], pooled.class_probs[rows])
    rows, decayed = soft_nms(pooled.boxes_xyxy, confidence, labels)
    factor = decayed / confidence[rows]
    return SoftDetections(pooled.boxes_xyxy[rows], pooled.class_probs[rows] * factor[:, None])


def detections_of(fused: SoftDetections, config: EnsembleConfig, selection: Selection) -> Detections:
    """What a deployed ensemble says: every class of a fused row that scores enough, as from a detector by itself.

    The best class of each row alone would leave an ensemble without the second guesses that mAP gives its members credit
    for. Rows of different best classes may lie on one object, so each class goes through NMS once more; after soft-NMS,
    which leaves overlapping rows on purpose, it does not.
    """
    return select(
        fused.boxes_xyxy,
        fused.class_probs,
        score_threshold=selection.score_threshold,
        nms_iou=1.0 if config.fusion == "soft-nms" else selection.nms_iou,
        max_detections=selection.max_detections,
    )


def _pooled(answers: Sequence[SoftDetections], weights: Sequence[float]) -> SoftDetections:
    """All rows, each scaled by its model's weight as a share of the largest, sorted by content alone."""
    scale = np.asarray(weights, np.float32) / max(weights)
    boxes = np.concatenate([answer.boxes_xyxy for answer in answers])
    probs = np.concatenate([answer.class_probs * share for answer, share in zip(answers, scale, strict=True)])
    order = np.lexsort([*probs.T, *boxes.T, -probs.max(1, initial=0.0)])
    return SoftDetections(boxes[order], probs[order])


def mean_outputs(outputs: Sequence[DetectorOutput], weights: Sequence[float]) -> DetectorOutput:
    """The weighted mean of raw outputs of detectors with equal layouts."""
    import torch

    from edgekd.detectors.base import DetectorOutput

    total = sum(weights)

    def mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
        shares = torch.tensor([weight / total for weight in weights], device=values[0].device)
        return torch.einsum("t,t...->...", shares, torch.stack([v.float().to(values[0].device) for v in values]))

    objectness = [output.objectness for output in outputs if output.objectness is not None]
    return DetectorOutput(
        mean([output.cls_logits for output in outputs]),
        mean([output.bbox_regression for output in outputs]),
        mean(objectness) if len(objectness) == len(outputs) else None,
    )


def _raw_outputs(detectors: Sequence[Detector], tensors: Sequence[FloatArray]) -> list[DetectorOutput]:
    import torch

    places = [next(detector.parameters()).device for detector in detectors]
    with torch.no_grad():
        return [
            detector(torch.from_numpy(tensor).to(place))
            for detector, tensor, place in zip(detectors, tensors, places, strict=True)
        ]


def _alike(teachers: Sequence[PredictorTeacher]) -> tuple[Detector, ...]:
    """The native detectors, if their raw outputs can be averaged.

    Raises:
        DistillationSetupError: a black box, or something that differs; says what.
    """
    blind = [teacher.name for teacher in teachers if teacher.detector is None]
    if blind:
        raise DistillationSetupError(
            "mean-outputs needs native teachers, whose raw outputs can be had",
            got=f"black boxes: {', '.join(blind)}",
            fix="use `fusion: wbf`",
        )
    detectors = tuple(teacher.detector for teacher in teachers if teacher.detector is not None)
    aspects: dict[str, Callable[[Detector], object]] = {
        "layout of the output rows": lambda detector: detector.layout(),
        "score activation": lambda detector: detector.score_activation,
        "classes": lambda detector: detector.spec.class_names,
        "preprocessing": lambda detector: detector.spec.preprocess,
    }
    first = detectors[0]
    for teacher in teachers:
        if teacher.class_map != teachers[0].class_map:
            maps = [one.class_map.changes() if one.class_map else "none" for one in (teacher, teachers[0])]
            raise DistillationSetupError(
                f"mean-outputs: {teachers[0].name!r} and {teacher.name!r} differ in their class map",
                got=maps[0],
                expected=maps[1],
                fix="use `fusion: wbf`, which works on boxes",
            )
    for what, aspect in aspects.items():
        for teacher, detector in zip(teachers, detectors, strict=True):
            if aspect(detector) != aspect(first):
                raise DistillationSetupError(
                    f"mean-outputs: {teachers[0].name!r} and {teacher.name!r} differ in {what}",
                    got=str(aspect(detector))[:300],
                    expected=str(aspect(first))[:300],
                    fix="use `fusion: wbf`, which works on boxes",
                )
    return detectors


def _shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0 / count,) * count
    if len(weights) != count or not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(
            "an ensemble needs one positive weight a teacher", got=list(weights), expected=f"{count} numbers above 0"
        )
    total = float(np.sort(weights).sum())
    return tuple(float(weight) / total for weight in weights)


def learn_weights(
    answers: Sequence[Sequence[SoftDetections]],
    records: Sequence[ImageRecord],
    config: EnsembleConfig,
    accuracy: AccuracyOf,
    *,
    known: Sequence[Any] | None = None,
) -> tuple[float, ...]:
    """Weights that make the fused answers most accurate on held-out images, by a small deterministic search.

    From equal weights, each of three rounds tries every step of `WEIGHT_STEPS` for every teacher and takes the best single
    change; it ends when none gains. A gain of less than 0.0005 counts as none, so that noise leaves the weights equal.

    Args:
        answers: one sequence a teacher, one answer an image.
        records: the images' ground truth.
        config: how answers are fused.
        accuracy: such as AP50, injected since measuring lies above this layer.
        known: one (classes,) bool a teacher.

    Returns:
        One weight a teacher, summing to 1.
    """

    def score(weights: Sequence[float]) -> float:
        fused = [fuse(image, weights, config, known) for image in zip(*answers, strict=True)]
        return accuracy(records, [detections_of(answer, config, DEFAULT_SELECTION) for answer in fused])

    best = [1.0] * len(answers)
    best_score = score(best)
    for _ in range(3 if len(answers) > 1 else 0):
        tried = []
        for teacher in range(len(answers)):
            for step in WEIGHT_STEPS:
                if step != best[teacher]:
                    candidate = [*best[:teacher], step, *best[teacher + 1 :]]
                    tried.append((score(candidate), candidate))
        top_score, top = max(tried, key=lambda entry: entry[0])
        if top_score < best_score + 0.0005:
            break
        best_score, best = top_score, top
    return _shares(best, len(answers))
