"""From a detector to an ONNX file that needs nothing else: decoded boxes and scores, or finished detections."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from edgekd.artifact import atomic_path, source_commit, versions
from edgekd.detectors.base import Detector
from edgekd.errors import ExportError
from edgekd.export.graph import RAW_KEY, name_nodes, opset_of, prune, set_metadata, strip_notes
from edgekd.export.nms import append_nms
from edgekd.export.opset import NATIVE, to_opset_17
from edgekd.recipe import ExportConfig
from edgekd.runtimes.onnx_seal import sealed
from edgekd.selection import Selection
from edgekd.types import FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto

SCHEMA = "edgekd.onnx/1"
Precision = Literal["fp32", "fp16", "int8"]


class _Deployed(nn.Module):
    """A detector as it is exported: image tensor to boxes, scores, then the raw outputs that decoding starts from."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.detector(images)
        boxes, scores = self.detector.decode(output)
        raw = (output.cls_logits, output.bbox_regression)
        return (boxes, scores, *raw) if output.objectness is None else (boxes, scores, *raw, output.objectness)


def trace(detector: Detector, *, opset: int = 17, dynamic_batch: bool = False) -> ModelProto:
    """The detector as an fp32 ONNX model: "images" (1, 3, H, W) to "boxes" (1, P, 4) and "scores" (1, P, K).

    Works on a copy in eval mode on the CPU, so the caller's detector is untouched. BatchNorm is folded away. With
    `dynamic_batch` the first dimension is named "batch" throughout.

    Raises:
        ExportError: the exporter failed, left a BatchNorm, or gave another opset than was asked for.
    """
    h, w = detector.spec.preprocess.input_hw
    module = _Deployed(copy.deepcopy(detector).float().cpu().eval())
    _fold_batch_norms(module)
    _write_over_nothing(module)
    images = torch.zeros(2 if dynamic_batch else 1, 3, h, w)  # 2, since the exporter takes a 1 for a constant
    with torch.no_grad():
        raw = ["cls_logits", "bbox_regression", "objectness"][: len(module(images)) - 2]
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                optimize=True,
                opset_version=max(opset, NATIVE),
                input_names=["images"],
                output_names=["boxes", "scores", *(f"raw_{name}" for name in raw)],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch's exporter failed on {detector.spec.model}", got=f"{type(error).__name__}: {error}"
        ) from error
    if program is None:
        raise ExportError(f"torch's exporter gave nothing for {detector.spec.model}")
    return _finish(program.model_proto, opset, {name: f"raw_{name}" for name in raw})


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each BatchNorm into the convolution right before it, where that is plain to see: in a row, or as `norm_pairs` says.

    The exporter folds the rest too, but takes each apart first, which is 40 % of an export's time.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for parent in module.modules():
        pairs: Iterable[tuple[str, str]] = getattr(parent, "norm_pairs", ())
        if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
            pairs = pairwise(name for name, _ in parent.named_children())
        for first, second in pairs:
            conv, norm = getattr(parent, first), getattr(parent, second)
            if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d:
                setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                setattr(parent, second, nn.Identity())


def _write_over_nothing(module: nn.Module) -> None:
    """Activations make new tensors: to take those in place apart is some 8 % of what the exporter does."""
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]


def _finish(model: ModelProto, opset: int, raw: Mapping[str, str]) -> ModelProto:
    """Keep two outputs, remember where the raw ones are, and check what the exporter may do silently."""
    from onnx import checker, helper

    strip_notes(model)
    name_nodes(model)
    outputs = [output for output in model.graph.output if output.name in ("boxes", "scores")]
    kept = [type(output).FromString(output.SerializeToString()) for output in outputs]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    prune(model)
    left = sorted({node.op_type for node in model.graph.node if node.op_type == "BatchNormalization"})
    if left:
        raise ExportError("BatchNormalization is left in the exported graph: it was not optimised", got=left)
    if opset == 17:
        to_opset_17(model)
    if opset_of(model) != opset:  # the exporter may keep another one, and say so in a log line alone
        raise ExportError(
            "the exporter gave another opset than was asked for",
            got=opset_of(model),
            expected=opset,
            fix=f"ask for opset {opset_of(model)}",
        )
    # The oldest file version that fits: older runtimes (TensorRT 8, ONNX Runtime 1.1x) then read it too.
    model.ir_version = max(8, helper.find_min_ir_version_for(list(model.opset_import)))
    made = {name for node in model.graph.node for name in node.output}
    set_metadata(model, {RAW_KEY: {name: tensor for name, tensor in raw.items() if tensor in made}})
    try:
        checker.check_model(model, full_check=True)
    except (checker.ValidationError, RuntimeError) as error:
        raise ExportError("the exported graph is not valid", got=f"{type(error).__name__}: {error}") from error
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's progress lines and notes about packages that are not needed."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.onnx._internal.exporter._compat")
    loggers = [logging.getLogger(name) for name in (*names, "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def describe(
    model: ModelProto,
    detector: Detector,
    *,
    precision: Precision,
    target: str,
    thresholds: Selection,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write into a model's metadata all that `bench` and `predict` need, and where it came from."""
    set_metadata(
        model,
        {
            "edgekd.schema": SCHEMA,
            "edgekd.spec": detector.spec.to_dict(),
            "edgekd.output": {"kind": "boxes-scores"},
            "edgekd.precision": precision,
            "edgekd.target": target,
            "edgekd.thresholds": thresholds.to_dict(),
            "edgekd.provenance": {"versions": versions(), "commit": source_commit(), **(facts or {})},
        },
    )
    model.producer_name = "edgekd"


def detections_form(model: ModelProto, thresholds: Selection) -> ModelProto:
    """The same model with NMS inside, and its metadata saying so."""
    complete = append_nms(model, thresholds)
    set_metadata(complete, {"edgekd.output": {"kind": "detections"}, "edgekd.thresholds": thresholds.to_dict()})
    return complete


def write_model(model: ModelProto, out: Path) -> Path:
    """Write a model file atomically."""
    with atomic_path(out) as temporary:
        temporary.write_bytes(sealed(model))
    return Path(out)


def export_onnx(
    detector: Detector,
    out: Path,
    *,
    config: ExportConfig | None = None,
    precision: Precision = "fp32",
    nms: bool = False,
    thresholds: Selection | None = None,
    calibration: Sequence[FloatArray] = (),
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Export one file, written atomically. No parity gate: `edgekd.export.export_run` is this with one.

    Args:
        config: target, opset, dynamic batch, calibration method.
        nms: the form that ends in detections.
        calibration: int8 only: prepared training images, each (1, 3, H, W) float32.
        facts: what to add to the provenance, plain JSON types.

    Raises:
        ExportError: the exporter failed.
        DataError: int8 without calibration images.
    """
    from edgekd.export.precision import convert

    config, thresholds = config or ExportConfig(), thresholds or Selection()
    model = trace(detector, opset=config.opset, dynamic_batch=config.dynamic_batch)
    describe(model, detector, precision=precision, target=config.target, thresholds=thresholds, facts=facts)
    model = convert(model, precision, config, calibration)
    return write_model(detections_form(model, thresholds) if nms else model, out)
