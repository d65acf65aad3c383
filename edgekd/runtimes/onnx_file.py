"""Open a detector in an ONNX file: ours, which says everything in its metadata, or a foreign one, which is asked.

Files of ours follow the schema "edgekd.onnx/1". Of foreign ones, the class names and input size that Ultralytics' exporter
writes are read; the rest is declared or recognised by running the file once on a picture.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ArtifactError, RuntimeFailure, UserError
from edgekd.preprocess import normalise
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.auto_taps import shared_maps, taps_by_stride
from edgekd.runtimes.customs import BYTES, ONE, ZERO, Custom, custom_of
from edgekd.runtimes.first_nodes import PixelRange, beginning_of
from edgekd.runtimes.grids import grid_cells
from edgekd.runtimes.inner_picture import in_its_frame
from edgekd.runtimes.model_files import weights_precision
from edgekd.runtimes.onnx_seal import seal_note
from edgekd.runtimes.onnx_session import OnnxRuntime
from edgekd.runtimes.ort import OrtRuntime, with_extra_outputs
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.outputs import decode
from edgekd.runtimes.probe import Probe, Recognised
from edgekd.runtimes.recognise import recognise
from edgekd.types import DetectorSpec, ImageArray, PreprocessSpec

SCHEMA = "edgekd.onnx/1"
OnnxEngine = Literal["onnxruntime", "openvino"]
_NAME_KEYS = ("names", "class_names", "classes", "labels", "id2label", "categories", "character")
_FOREIGN_KEYS = (
    "resize",
    "channels",
    "mean",
    "std",
    "class_names",
    "output",
    "box_format",
    "score_activation",
    "background",
    "anchors",
)
_ALL_ZERO = (
    "every score of the probe picture is exactly 0: where the file is quantised, boxes and scores may share one tensor's "
    "scale, which leaves the latter nothing; quantise it without the operators behind the last convolutions"
)


@dataclass(frozen=True)
class OnnxDetector:
    """A detector in an ONNX file, with all that is needed to run it.

    Attributes:
        runtime: the open session.
        class_names: in label order.
        preprocess: how images are prepared.
        form: how outputs are read.
        facts: path, precision, target, provenance, and `notes` on what was recognised rather than declared.
        tap_grids: per tap, (channels, (height, width)) of the tensor at the input size.
        tap_tensors: per tap, declared or found, the tensor's name.
    """

    runtime: OnnxRuntime
    class_names: tuple[str, ...]
    preprocess: PreprocessSpec
    form: OutputFormat
    facts: Mapping[str, Any]
    tap_grids: Mapping[str, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    tap_tensors: Mapping[str, str] = field(default_factory=dict)


def open_onnx(
    path: Path,
    declared: OnnxTeacher | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    engine: OnnxEngine = "onnxruntime",
) -> OnnxDetector:
    """Open an ONNX file; what `declared` says wins over what a foreign file says. Our own say everything themselves.

    Raises:
        ArtifactError: missing, damaged, or not a detector. UserError: its outputs or size must be declared.
        MissingDependencyError: the engine or the provider is not there. RuntimeFailure: the provider fell back.
    """
    declared = declared or OnnxTeacher(name="detector", onnx=str(path))
    searched = declared.taps == "auto"
    if searched:
        declared = declared.model_copy(update={"taps": _found_taps(path, declared, provider, threads, engine)})
    taps = _tapped(declared)
    model: Path | bytes = with_extra_outputs(path, list(taps.values())) if taps else path
    runtime = _open(model, provider, threads, engine)
    try:
        metadata = runtime.metadata
        changed = seal_note(path, metadata)
        opening = _open_ours if metadata.get("edgekd.schema") else _open_foreign
        opened = opening(path, runtime, metadata, declared)
        notes = list(opened.facts["notes"])
        if searched:
            notes.append(_taps_note(opened.tap_grids, taps))
        if changed is not None:
            notes.append(changed)
        return replace(opened, tap_tensors=taps, facts={**opened.facts, "notes": tuple(notes)})
    except BaseException:
        runtime.close()
        raise


def _tapped(declared: OnnxTeacher) -> dict[str, str]:
    """Tap names to tensors; none where they are still to be found."""
    return {} if isinstance(declared.taps, str) else dict(declared.taps)


def _found_taps(
    path: Path, declared: OnnxTeacher, provider: str, threads: int | None, engine: OnnxEngine
) -> Mapping[str, str]:
    """`taps: auto`, by what the graph's maps measure on a picture."""
    names = shared_maps(path)
    runtime = _open(with_extra_outputs(path, names), provider, threads, engine)
    try:
        input_hw = _foreign_input_hw(path, runtime, runtime.metadata, declared)
        arrays = _look(path, runtime, input_hw)
    finally:
        runtime.close()
    return taps_by_stride(path, [(name, arrays[name].shape) for name in names], input_hw)


def _taps_note(grids: Mapping[str, tuple[int, tuple[int, int]]], taps: Mapping[str, str]) -> str:
    shown = (f"{tap} {taps[tap]} ({c} channels, {height}x{width})" for tap, (c, (height, width)) in grids.items())
    return f"taps {', '.join(shown)}, not declared: the last maps of their stride that two convolutions read"


def _look(
    path: Path, runtime: OnnxRuntime, input_hw: tuple[int, int], std: tuple[float, float, float] = ONE
) -> Mapping[str, Any]:
    """What a file gives for the probe picture, in bytes where it takes them.

    Raises:
        UserError: it fails at this size, which it leaves open. RuntimeFailure: it fails at its own.
    """
    spec = PreprocessSpec(input_hw, "stretch", ZERO, BYTES if runtime.takes_bytes else std)
    try:
        return runtime.run(normalise(probe_picture(input_hw), spec))
    except RuntimeFailure as error:
        if not runtime.dynamic_hw:
            raise
        height, width = input_hw
        raise UserError(
            f"{path}: it fails at {height}x{width}, though it says that it takes any size",
            got=error.got,
            fix="declare the `input_size` that it was exported with",
        ) from error


def _open(model: Path | bytes, provider: str, threads: int | None, engine: OnnxEngine) -> OnnxRuntime:
    if engine == "openvino":
        from edgekd.runtimes.openvino_runtime import OpenVinoRuntime

        return OpenVinoRuntime(model, provider, threads)
    return OrtRuntime(model, provider, threads)


def _open_ours(path: Path, runtime: OnnxRuntime, metadata: Mapping[str, str], declared: OnnxTeacher) -> OnnxDetector:
    if metadata["edgekd.schema"] != SCHEMA:
        raise ArtifactError(
            f"{path}: written by another version of edgekd", got=metadata["edgekd.schema"], expected=SCHEMA
        )
    try:
        spec = DetectorSpec.from_dict(json.loads(metadata["edgekd.spec"]))
        kind = json.loads(metadata["edgekd.output"])["kind"]
        provenance = dict(json.loads(metadata.get("edgekd.provenance", "{}")))
        thresholds = dict(json.loads(metadata.get("edgekd.thresholds", "{}")))
        provenance["run"] = dict(provenance.get("run") or {})
        if not all(value is None or isinstance(value, (int, float)) for value in thresholds.values()):
            raise TypeError(f"thresholds {thresholds}: not numbers")
    except (KeyError, TypeError, ValueError, ArtifactError) as error:
        said = error.got if isinstance(error, ArtifactError) else f"{type(error).__name__}: {error}"
        raise ArtifactError(f"{path}: its metadata is damaged", got=said) from error
    names = {"boxes-scores": ("boxes", "scores"), "detections": ("boxes", "scores", "labels")}.get(kind)
    if names is None or not set(names) <= set(runtime.output_names):
        raise ArtifactError(
            f"{path}: its outputs are not what its metadata says",
            got=f"kind {kind!r}, outputs {', '.join(runtime.output_names)}",
            expected="boxes and scores, or boxes, scores and labels",
        )
    if kind == "boxes-scores" and (columns := _columns_of(runtime, "scores")) not in (None, len(spec.class_names)):
        raise ArtifactError(
            f"{path}: its outputs are not what its metadata says",
            got=f"scores of {columns} classes",
            expected=f"of {len(spec.class_names)}: {', '.join(spec.class_names)}",
        )
    form = OutputFormat(kind, names, len(spec.class_names))
    height, width = runtime.input_shape[2:]
    input_hw = (height or spec.preprocess.input_hw[0], width or spec.preprocess.input_hw[1])
    preprocess = replace(spec.preprocess, input_hw=input_hw)
    notes = ["an edgekd export: format, preprocessing and classes from its metadata"]
    if unused := [key for key in _FOREIGN_KEYS if key in declared.model_fields_set]:
        notes.append(f"declared {', '.join(unused)}: not used, the file says it itself")
    facts = {
        "path": str(path),
        "precision": metadata.get("edgekd.precision", "fp32"),
        "target": metadata.get("edgekd.target"),
        "model": spec.model,
        "provenance": provenance,
        "thresholds": thresholds,
        "notes": tuple(notes),
    }
    class_names = spec.class_names
    taps = _tapped(declared)
    arrays = runtime.run(normalise(probe_picture(input_hw), preprocess)) if taps else {}
    return OnnxDetector(runtime, class_names, preprocess, form, facts, _tap_grids(path, arrays, taps))


def _columns_of(runtime: OnnxRuntime, output: str) -> int | None:
    """The extent of an output's last axis; None where the graph leaves it open."""
    shape = next(info.shape for info in runtime.outputs if info.name == output)
    return shape[-1] if shape else None


def _open_foreign(path: Path, runtime: OnnxRuntime, metadata: Mapping[str, str], declared: OnnxTeacher) -> OnnxDetector:
    input_hw = _foreign_input_hw(path, runtime, metadata, declared)
    if runtime.takes_bytes and (declared.mean is not None or declared.std is not None):
        raise UserError(
            f"{path}: it takes pixels as bytes, 0 to 255, which no mean or std can change",
            fix="leave `mean` and `std` out",
        )
    beginning = beginning_of(path, runtime.image_name)
    raw = _look(path, runtime, input_hw, BYTES if beginning.pixels == "0 to 255" else ONE)
    arrays = {name: np.array(value) for name, value in raw.items() if isinstance(value, np.ndarray)}
    taps = _tapped(declared)
    own = {n: _first_image(a, runtime.input_shape[0]) for n, a in arrays.items() if n not in taps.values()}
    inputs = tuple(info.name for info in runtime.inputs)

    def recognised(hw: tuple[int, int]) -> Recognised:
        probe = Probe(str(path), own, hw, metadata, runtime.channels_last)
        return recognise(probe, declared, names_in_metadata(metadata))

    inner_hw = input_hw
    if beginning.resized is not None:
        inner_hw = _inner_hw(path, runtime, input_hw, beginning.resized)
    found = in_its_frame(own, input_hw, inner_hw, recognised)
    if lacks_batch_axis(found.form, own):
        runtime.one_at_a_time()
    scores = _raw_scores(path, own, found.form, input_hw)
    a_row_a_cell = grid_cells(inner_hw, len(scores)) is not None
    custom = custom_of(found.form, inputs, metadata, a_row_a_cell=a_row_a_cell, sliced=beginning.sliced)
    base = custom.preprocess(input_hw, beginning, runtime.takes_bytes)
    preprocess = _declared_preprocess(base, input_hw, declared)
    notes = (
        *found.notes,
        *([_ALL_ZERO] if scores.size and not scores.any() else []),
        *_idle(found.form, declared),
        *_preprocess_notes(custom, preprocess, beginning.pixels, runtime, declared),
    )
    facts = {"path": str(path), "precision": _precision(path, runtime), "notes": notes}
    grids = _tap_grids(path, arrays, taps)
    return OnnxDetector(runtime, found.class_names, preprocess, found.form, facts, grids)


def _inner_hw(path: Path, runtime: OnnxRuntime, input_hw: tuple[int, int], resized: str) -> tuple[int, int]:
    """The size that the graph brings pictures to, of the tensor `resized`, at this size of the input."""
    with OrtRuntime(with_extra_outputs(path, [resized])) as opened:
        shape = _look(path, opened, input_hw)[resized].shape
    height, width = shape[1:3] if shape[-1] == 3 else shape[2:4]
    return int(height), int(width)


def _first_image(array: NDArray[Any], batch: int) -> NDArray[Any]:
    """One image's part of an output of a graph with a fixed batch; rows that name their image stay as they are."""
    whole = batch == 1 or array.ndim < 1 or array.shape[0] != batch or (array.ndim == 2 and array.shape[1] == 7)
    return array if whole else array[:1]


def _raw_scores(
    path: Path, arrays: Mapping[str, NDArray[Any]], form: OutputFormat, input_hw: tuple[int, int]
) -> NDArray[Any]:
    """(P, K) scores of a raw head's candidates; (0, 0) of finished detections, which are not read before there are any.

    Raises:
        UserError: the outputs are not what was recognised or declared.
    """
    if form.kind == "detections":
        return np.zeros((0, 0), np.float32)
    try:
        return decode(arrays, form, input_hw)[1]
    except RuntimeFailure as error:
        raise UserError(
            f"{path}: its outputs cannot be read as {form.kind} with boxes as {form.box_format}",
            got=str(error).replace("\n", " "),
            fix="declare another `output` or `box_format`, or leave them out; values that are not finite need another export",
        ) from error


def _idle(form: OutputFormat, declared: OnnxTeacher) -> list[str]:
    """What was declared to no effect, a sentence each."""
    notes = []
    if declared.background in ("first", "last") and form.kind.startswith("yolo"):
        notes.append(
            f"declared background: {declared.background}: not used, a head in one array has it among its classes"
        )
    if declared.anchors is not None and form.box_format not in ("grid-anchors", "grid-priors"):
        notes.append("declared anchors: not used, the boxes are decoded already or have none")
    return notes


def _preprocess_notes(
    custom: Custom, base: PreprocessSpec, inside: PixelRange | None, runtime: OnnxRuntime, declared: OnnxTeacher
) -> list[str]:
    """What was taken for granted about pictures, one sentence each."""
    notes = []
    if declared.resize == "auto":
        notes.append(f"images resized by {base.resize}, as is usual for {custom.whose}; `resize` declares it")
    if declared.mean is None and declared.std is None and not runtime.takes_bytes:
        span = {(ZERO, ONE): "scaled to [0, 1]", (ZERO, BYTES): "scaled to [0, 255]"}.get(
            (base.mean, base.std), f"normalised by mean {_listed(base.mean)} and std {_listed(base.std)}"
        )
        why = f"the graph itself normalises {inside}" if inside else f"as is usual for {custom.whose}"
        notes.append(
            f"pixels {span}, {base.channels.upper()}, not declared: {why}; `mean`, `std`, `channels` declare it"
        )
    return notes


def _listed(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"


def lacks_batch_axis(form: OutputFormat, arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether rows do not say of which image they are, so that images must come one at a time."""
    first = arrays[form.names[0]]
    named = form.kind == "detections" and len(form.names) == 1 and first.shape[-1] == 7
    return first.ndim == 2 and not named


def _foreign_input_hw(
    path: Path, runtime: OnnxRuntime, metadata: Mapping[str, str], declared: OnnxTeacher
) -> tuple[int, int]:
    """The graph's size where it is fixed, else the declared one, else the one in the metadata."""
    height, width = runtime.input_shape[2:]
    if height and width:
        if declared.input_size is not None and (height, width) != (declared.input_size,) * 2:
            raise UserError(
                f"{path}: input_size does not fit the file",
                got=declared.input_size,
                expected=f"{height}x{width}, which is fixed in the graph",
                fix="leave `input_size` out",
            )
        return height, width
    if declared.input_size is not None:
        return height or declared.input_size, width or declared.input_size
    size = _literal(metadata.get("imgsz"))
    size = (size, size) if isinstance(size, int) else size
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(v, int) and v > 0 for v in size):
        return height or size[0], width or size[1]
    raise UserError(
        f"{path}: the file takes any input size and does not say which it was trained for",
        got=f"input {runtime.inputs[0]}",
        fix="declare `input_size`, such as 640",
    )


def _declared_preprocess(base: PreprocessSpec, input_hw: tuple[int, int], declared: OnnxTeacher) -> PreprocessSpec:
    return PreprocessSpec(
        input_hw,
        base.resize if declared.resize == "auto" else declared.resize,
        base.mean if declared.mean is None else declared.mean,
        base.std if declared.std is None else declared.std,
        base.pad_value,
        base.channels if declared.channels == "auto" else declared.channels,
    )


def _precision(path: Path, runtime: OnnxRuntime) -> str:
    """Of most weights; without onnx, which reads them, what the inputs tell."""
    try:
        import onnx

        return weights_precision(onnx.load(str(path), load_external_data=False))
    except Exception:  # the session has read the file all the same
        return "fp16" if any(info.type == "tensor(float16)" for info in runtime.inputs) else "fp32"


def names_in_metadata(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Class names from the file: Ultralytics' `names` entry or another's, a dictionary or list as text, or a name a line, as
    RapidLayout's `character`; None without any."""
    text = next((metadata[key] for key in _NAME_KEYS if key in metadata), "")
    lines = text.split("\n") if "\n" in text.strip() and text.lstrip()[0] not in "{[(" else []
    names = [line.strip() for line in lines if line.strip()] or _literal(text)
    if isinstance(names, dict) and names and all(str(key).isdigit() for key in names):
        by_label = {int(key): name for key, name in names.items()}
        if sorted(by_label) != list(range(len(names))):
            return None
        names = [by_label[index] for index in range(len(names))]
    if isinstance(names, (list, tuple)) and {type(name) for name in names} in ({str}, {int}):
        return tuple(map(str, names))  # the classes of digits are numbers
    return None


def _literal(text: str | None) -> object:
    """A Python or JSON literal in a metadata string, or None; nothing is ever executed."""
    if not text:
        return None
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
    return value


def probe_picture(input_hw: tuple[int, int]) -> ImageArray:
    """The same smooth, colourful noise at any time: a picture on which a detector gives typical raw outputs."""
    height, width = input_hw
    coarse = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def _tap_grids(
    path: Path, arrays: Mapping[str, NDArray[Any]], taps: Mapping[str, str]
) -> dict[str, tuple[int, tuple[int, int]]]:
    grids = {}
    for tap, tensor in taps.items():
        shape: Sequence[int] = arrays[tensor].shape
        if len(shape) != 4:
            raise UserError(
                f"{path}: tap {tap!r} is not a feature map",
                got=f"{tensor} of shape {tuple(shape)}",
                expected="a tensor (B, C, H, W)",
            )
        grids[tap] = (int(shape[1]), (int(shape[2]), int(shape[3])))
    return grids
