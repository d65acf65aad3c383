"""A deployed system under measurement: one detector, or an ensemble with its fusion, one image at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgekd.bench.entries import BenchEnsemble
from edgekd.bench.latency import Clock
from edgekd.predictor import Predictor
from edgekd.recipe import BenchConfig
from edgekd.selection import Selection
from edgekd.types import Detections, ImageArray

if TYPE_CHECKING:
    from edgekd.teachers.ensemble import Ensemble


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
    """Runs a detector or an ensemble, saying how long each stage took.

    Args:
        staged: the system.
        runtimes: what computes for it; the accelerator's own times are those of all together.
    """

    def __init__(self, staged: Staged, runtimes: Sequence[Any] = ()) -> None:
        self.staged = staged
        # Runtimes never time themselves, but one with a clock of its own can be asked for it.
        self._clocked = runtimes if all(hasattr(runtime, "gpu_times") for runtime in runtimes) else ()
        for runtime in self._clocked:
            runtime.device_times = True

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

    @property
    def device_ms(self) -> tuple[float, float, float] | None:
        """Of the latest inference: milliseconds of copy to the device, compute, copy back, by the device's clock."""
        if not self._clocked:
            return None
        times = [runtime.gpu_times() for runtime in self._clocked]
        return sum(t.to_device for t in times), sum(t.compute for t in times), sum(t.to_host for t in times)


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


class Parallel:
    """An ensemble whose members compute at the same time, each on its own thread; otherwise as in sequence."""

    def __init__(self, ensemble: Ensemble) -> None:
        self.prepare, self.finish = ensemble.prepare, ensemble.finish
        self._infers = [teacher.predictor.infer for teacher in ensemble.teachers]
        self._pool = ThreadPoolExecutor(len(self._infers), "edgekd-member")

    def infer(self, tensors: Sequence[Any]) -> list[Any]:
        """Every member's raw outputs, in order."""
        pairs = zip(self._infers, tensors, strict=True)
        return [future.result() for future in [self._pool.submit(infer, tensor) for infer, tensor in pairs]]

    def detect(self, image: ImageArray) -> Detections:
        """All three stages."""
        tensors, geometries = self.prepare(image)
        return self.finish(self.infer(tensors), geometries)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def ensemble_of(
    ensemble: BenchEnsemble, members: Sequence[Member], class_names: Sequence[str], config: BenchConfig
) -> Ensemble:
    """The members as one deployed system: all of them on every image, one after the other, then fusion.

    Raises:
        UserError: a fusion that does not work on these files, or weights that are not positive.
    """
    from edgekd.teachers.ensemble import Ensemble
    from edgekd.teachers.predicted import PredictorTeacher

    teachers = [PredictorTeacher(m.name, m.predictor, class_names, m.class_map) for m in members]
    selection = Selection.of(config)
    return Ensemble(teachers, ensemble.config, ensemble.weights, selection=selection)
