"""Precision lives in the ONNX file: fp32 as traced, fp16 with float32 inputs and outputs, int8 as explicit Q/DQ."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import DataError, ExportError
from edgekd.export.calibration import METHODS, Method, Ranges, TensorStatistics, collect
from edgekd.export.float16 import to_float16
from edgekd.export.graph import set_metadata
from edgekd.export.lint import INT8_KEY, lint_qdq
from edgekd.export.placement import Target, float_stem, int8_nodes, tensors_to_quantise
from edgekd.export.qdq import quantise
from edgekd.export.sensitivity import MEASURED_IMAGES, Evaluate, keep_worst, output_damage, rank_layers
from edgekd.recipe import ExportConfig
from edgekd.types import FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekd.export.onnx import Precision

log = logging.getLogger(__name__)


def convert(
    model: ModelProto,
    precision: Precision,
    config: ExportConfig,
    calibration: Sequence[FloatArray] = (),
    *,
    evaluate: Evaluate | None = None,
) -> ModelProto:
    """An fp32 model in another precision, its metadata saying so.

    Args:
        calibration: int8 only: prepared training images, each (1, 3, H, W) float32.
        evaluate: AP50 of a model; lets int8 choose its calibration and keep layers in float by what they cost.

    Raises:
        DataError: int8 without images.
        ExportError: the result does not pass the checker or the Q/DQ linter.
    """
    if precision == "fp32":
        return model
    if precision == "fp16":
        return to_float16(model)
    return to_int8(model, calibration, config=config, evaluate=evaluate).model


@dataclass(frozen=True)
class Int8Result:
    """An int8 model and how it came to be.

    Attributes:
        method: calibration method used.
        tried: AP50 (or, without an evaluation, relative output error) by calibration method.
        ap50: of the model, in [0, 1]; None where there was nothing to evaluate on.
        reference_ap50: of the fp32 model.
        float_stem: the first convolutions, left in float because they are faster so.
        kept_float: convolutions left in float because of what they cost, worst first.
        images: how many it was calibrated on. reduce_range: whether weights have 7 bits.
    """

    model: ModelProto
    method: Method
    tried: dict[str, float] = field(default_factory=dict)
    ap50: float | None = None
    reference_ap50: float | None = None
    float_stem: tuple[str, ...] = ()
    kept_float: tuple[str, ...] = ()
    images: int = 0
    reduce_range: bool = False

    @property
    def ap50_pair(self) -> tuple[float, float] | None:
        """AP50 of fp32 and of int8, where both were measured."""
        return None if self.ap50 is None or self.reference_ap50 is None else (self.reference_ap50, self.ap50)

    @property
    def facts(self) -> dict[str, Any]:
        """Plain JSON types: everything but the model."""
        return {
            "calibration": self.method,
            "calibration_images": self.images,
            "tried": self.tried,
            "reduce_range": self.reduce_range,
            "float_stem": list(self.float_stem),
            "kept_float": list(self.kept_float),
            "ap50": self.ap50,
            "reference_ap50": self.reference_ap50,
        }


def to_int8(
    model: ModelProto,
    images: Sequence[FloatArray],
    *,
    config: ExportConfig,
    evaluate: Evaluate | None = None,
    learned: Ranges | None = None,
) -> Int8Result:
    """Static int8 for `config.target`, calibrated on images.

    With `evaluate`, calibration "auto" takes the method with the best AP50, and when the model loses more than
    `config.map_budget` AP50 points, the layers that hurt most are measured and kept in float, as few as it takes.

    Args:
        images: prepared training images, each (1, 3, H, W) float32.
        learned: ranges of activations that fine-tuning settled (`qat.learned_ranges`); calibration leaves them alone.

    Raises:
        DataError: no images.
        ExportError: the result does not pass the linter.
    """
    if not len(images):
        raise DataError(
            "int8 needs training images to calibrate on", got="none", fix="give the data set with --data and --split"
        )
    target: Target = config.target
    narrow = weight_limit(target) < 127
    nodes = set(int8_nodes(model, target))
    histograms = config.calibration != "minmax"
    statistics = collect(model, tensors_to_quantise(model, nodes, target), images, histograms=histograms)
    methods = METHODS if config.calibration == "auto" else (config.calibration,)
    job = _Int8Job(model, nodes, target, narrow, statistics, images, evaluate, learned or {})
    result = job.best_of(methods)
    if evaluate is not None:
        result = job.within_budget(result, evaluate, config.map_budget / 100.0)
    stem = tuple(float_stem(model, target))
    result = replace(result, images=len(images), reduce_range=narrow, float_stem=stem)
    set_metadata(result.model, {"edgekd.precision": "int8", "edgekd.target": target, INT8_KEY: result.facts})
    findings = lint_qdq(result.model, target)
    if findings:
        raise ExportError(
            f"the int8 graph has {len(findings)} faults for {target}", got="; ".join(map(str, findings[:5]))
        )
    return result


@dataclass(frozen=True)
class _Int8Job:
    """What stays the same while calibration methods and kept layers are tried."""

    model: ModelProto
    nodes: set[str]
    target: Target
    reduce_range: bool
    statistics: dict[str, TensorStatistics]
    images: Sequence[FloatArray]
    evaluate: Evaluate | None
    learned: Ranges

    def ranges(self, method: Method) -> Ranges:
        return {**{name: seen.range(method) for name, seen in self.statistics.items()}, **self.learned}

    def best_of(self, methods: Sequence[Method]) -> Int8Result:
        """Quantise by each method; keep the best AP50, or, with nothing to evaluate on, the least output error."""
        found: list[tuple[float, Method, ModelProto]] = []
        for method in methods:
            model = quantise(self.model, self.ranges(method), self.nodes, self.target, reduce_range=self.reduce_range)
            found.append((self._cost(model, alone=len(methods) == 1), method, model))
        cost, method, model = min(found, key=lambda entry: entry[0])
        tried: dict[str, float] = {name: abs(value) for value, name, _ in found} if len(found) > 1 else {}
        return Int8Result(model, method, tried, None if self.evaluate is None else -cost)

    def _cost(self, model: ModelProto, *, alone: bool) -> float:
        if self.evaluate is not None:
            return -self.evaluate(model.SerializeToString())
        return 0.0 if alone else output_damage(self.model, model, self.images[:MEASURED_IMAGES])

    def within_budget(self, result: Int8Result, evaluate: Evaluate, budget: float) -> Int8Result:
        """Leave the layers that hurt most in float, 1, 2, 4, ... of them, until AP50 is within `budget` of fp32's."""
        reference = evaluate(self.model.SerializeToString())
        best = replace(result, reference_ap50=reference)
        if best.ap50 is None or reference - best.ap50 <= budget:
            return best
        ranges = self.ranges(result.method)
        ranking = rank_layers(self.model, ranges, self.images, self.target, reduce_range=self.reduce_range)
        variants = keep_worst(self.model, ranges, self.nodes, ranking, self.target, reduce_range=self.reduce_range)
        for kept, model in variants:
            ap50 = evaluate(model.SerializeToString())
            log.info("int8 with %d layers in float: AP50 %.4f (fp32 %.4f)", len(kept), ap50, reference)
            if ap50 > (best.ap50 or 0.0):
                best = replace(best, model=model, ap50=ap50, kept_float=kept)
            if reference - ap50 <= budget:
                break
        return best


def weight_limit(target: Target) -> int:
    """The largest step of an int8 weight on this machine: 63 on x86 without VNNI, where 8-bit products saturate."""
    return 63 if target == "x86" and not has_vnni() else 127


def has_vnni() -> bool:
    """Whether this CPU multiplies unsigned by signed bytes without saturating (x86 VNNI); True off x86."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags
