"""A deployed system under measurement: one detector, or several with their fusion, one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from edgekd.bench.entries import BenchEnsemble
from edgekd.bench.latency import Clock
from edgekd.postprocess import weighted_boxes_fusion
from edgekd.predictor import Predictor
from edgekd.types import Detections, ImageArray, SoftDetections

Fusion = Callable[[Sequence[SoftDetections]], Detections]
"""Several members' answers to one image into one answer."""


class System(Protocol):
    """What the benchmark runs: an answer for accuracy, stage times for latency."""

    def detect(self, image: ImageArray) -> Detections:
        """Answer one original image, in the data set's labels."""
        ...

    def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
        """Answer one image; nanoseconds spent in (pre, infer, post)."""
        ...


class SingleSystem:
    """One detector."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def detect(self, image: ImageArray) -> Detections:
        """As deployed."""
        return self.predictor.detect(image)

    def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
        """Nanoseconds of prepare, infer, finish."""
        predictor = self.predictor
        start = clock()
        tensor, geometry = predictor.prepare(image)
        prepared = clock()
        raw = predictor.infer(tensor)
        inferred = clock()
        predictor.finish(raw, geometry)
        return prepared - start, inferred - prepared, clock() - inferred


class EnsembleSystem:
    """All members one after the other on every image, then fusion: what deploying the ensemble would cost."""

    def __init__(self, members: Sequence[Predictor], fuse: Fusion) -> None:
        self.members = tuple(members)
        self.fuse = fuse

    def detect(self, image: ImageArray) -> Detections:
        """As deployed."""
        return self.fuse([member.answer(image) for member in self.members])

    def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
        """Nanoseconds of all members' prepare, all members' infer, all members' selection with the fusion."""
        pre = infer = post = 0
        answers = []
        for member in self.members:
            start = clock()
            tensor, geometry = member.prepare(image)
            prepared = clock()
            raw = member.infer(tensor)
            inferred = clock()
            answers.append(member.soften(raw, geometry))
            post += clock() - inferred
            pre += prepared - start
            infer += inferred - prepared
        start = clock()
        self.fuse(answers)
        return pre, infer, post + clock() - start


def fusion_of(ensemble: BenchEnsemble, members: Sequence[Predictor]) -> Fusion:
    """How a benchmark's ensemble fuses its members' answers, as `edgekd.teachers.ensemble` does it.

    Raises:
        UserError: a fusion that does not work on files.
    """
    iou, weights = ensemble.config.iou, ensemble.weights
    known = [None if member.class_map is None else member.class_map.known for member in members]
    every = np.ones(len(members[0].class_names), np.bool_)
    sees = [every if k is None else k for k in known]

    def fuse(answers: Sequence[SoftDetections]) -> Detections:
        fused = weighted_boxes_fusion(answers, weights, iou, known=sees)
        return fused.hard()

    return fuse
