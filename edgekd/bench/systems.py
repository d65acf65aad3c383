"""A deployed system under measurement: one detector, or an ensemble with its fusion, one image at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgekd.bench.entries import BenchEnsemble
from edgekd.bench.latency import Clock
from edgekd.predictor import Predictor, Selection
from edgekd.recipe import BenchConfig
from edgekd.types import Detections, ImageArray


class Staged(Protocol):
    """What `Predictor` and `Ensemble` have in common: three stages that can be called apart."""

    def prepare(self, image: ImageArray) -> tuple[Any, Any]:
        """Image to (input tensors, geometries)."""
        ...

    def infer(self, tensor: Any, /) -> Any:
        """Input tensors to raw outputs, computed when it returns."""
        ...

    def finish(self, raw: Any, geometry: Any, /) -> Detections:
        """Raw outputs to detections in the image's own pixels."""
        ...

    def detect(self, image: ImageArray) -> Detections:
        """All three."""
        ...


class System:
    """Runs a detector or an ensemble, saying how long each stage took."""

    def __init__(self, staged: Staged) -> None:
        self.staged = staged

    def detect(self, image: ImageArray) -> Detections:
        """As deployed, in the data set's labels."""
        return self.staged.detect(image)

    def stages_ns(self, image: ImageArray, clock: Clock) -> tuple[int, int, int]:
        """Answer one image; nanoseconds spent in (pre, infer, post). An ensemble's fusion is part of post."""
        start = clock()
        tensor, geometry = self.staged.prepare(image)
        prepared = clock()
        raw = self.staged.infer(tensor)
        inferred = clock()
        self.staged.finish(raw, geometry)
        return prepared - start, inferred - prepared, clock() - inferred


@dataclass(frozen=True)
class Member:
    """One detector of an ensemble.

    Attributes:
        predictor: in its own classes.
        class_map: its classes onto the data set's, where names do not say it.
    """

    name: str
    predictor: Predictor
    class_map: Mapping[str, str] | None


def ensemble_of(
    ensemble: BenchEnsemble, members: Sequence[Member], class_names: Sequence[str], config: BenchConfig
) -> Staged:
    """The members as one deployed system: all of them on every image, one after the other, then fusion.

    Raises:
        UserError: a fusion that does not work on these files, or weights that are not positive.
    """
    from edgekd.teachers.ensemble import Ensemble
    from edgekd.teachers.predicted import PredictorTeacher

    teachers = [PredictorTeacher(m.name, m.predictor, class_names, m.class_map) for m in members]
    selection = Selection(config.score_threshold, config.nms_iou, config.max_detections)
    return Ensemble(teachers, ensemble.config, ensemble.weights, selection=selection)
