"""A file as a deployed detector: an image goes in, detections come out, each stage apart so that it can be timed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from edgekd import preprocess as _preprocess
from edgekd.boxes import have_extent
from edgekd.errors import ArtifactError, RuntimeFailure, UserError
from edgekd.labels import ClassMap, map_classes
from edgekd.postprocess import select_soft
from edgekd.preprocess import Geometry
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.base import Runtime
from edgekd.runtimes.engine_file import ENGINE_SUFFIXES
from edgekd.runtimes.model_files import external_files, sha256_model
from edgekd.runtimes.onnx_file import OnnxEngine, open_onnx
from edgekd.runtimes.onnx_seal import CHANGED
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.outputs import Arrays, decode
from edgekd.selection import DEFAULT_SELECTION, Selection, effective, idle
from edgekd.types import Detections, FloatArray, ImageArray, PreprocessSpec, SoftDetections

NaturalRuntime = Literal["torch", "onnxruntime", "tensorrt"]
RuntimeChoice = Literal["auto", "torch", "onnxruntime", "openvino", "tensorrt"]

LIGHT_NMS_IOU = 0.65
"""For answers that are fused or taught: wider than a deployed detector's, since fusion merges what is left."""

NATURAL: Mapping[str, NaturalRuntime] = {
    ".onnx": "onnxruntime",
    **dict.fromkeys((".pt", ".pth", ".ckpt"), "torch"),
    **dict.fromkeys(ENGINE_SUFFIXES, "tensorrt"),
}
"""What runs a file, by its suffix; a run folder is torch's."""


class Predictor:
    """A detector with all that it needs to answer an image.

    Args:
        name: for tables and messages.
        class_names: the labels of the runtime's outputs.
        preprocess: how images are prepared.
        runtime: what computes.
        form: how the runtime's outputs are read.
        selection: thresholds.
        facts: what is known of the file: path, precision, notes of recognition.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        preprocess: PreprocessSpec,
        runtime: Runtime,
        form: OutputFormat,
        *,
        selection: Selection = DEFAULT_SELECTION,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.preprocess = preprocess
        self.runtime = runtime
        self.form = form
        self.selection = selection
        self.facts = dict(facts or {})
        self.source_class_names = tuple(class_names)
        self.class_names = self.source_class_names
        self.class_map: ClassMap | None = None

    def prepare(self, image: ImageArray) -> tuple[FloatArray, Geometry]:
        """(H, W, 3) uint8 RGB to the (1, 3, h, w) float32 input tensor, and the map between their pixels."""
        return _preprocess.prepare(image, self.preprocess)

    def infer(self, tensor: FloatArray) -> Arrays:
        """Run the detector: the raw output arrays, valid until the next call.

        Raises:
            RuntimeFailure: the runtime failed.
        """
        return self.runtime.run(tensor)

    def finish(self, raw: Arrays, geometry: Geometry, item: int = 0) -> Detections:
        """Raw outputs of one image, `item` of the batch, to detections in its own pixels.

        Raises:
            RuntimeFailure: the outputs are not finite, or not of the format that was recognised.
        """
        boxes, scores = self.candidates(raw, item)
        selection = self.selection
        if self._nms_iou(selection.nms_iou) == 1:  # nothing is suppressed, so that nothing can vote
            selection = replace(selection, nms_iou=1.0, box_voting=None)
        return selection.place(boxes, scores, geometry)

    def candidates(self, raw: Arrays, item: int = 0) -> tuple[FloatArray, FloatArray]:
        """One image's (boxes (P, 4) input pixels, scores (P, classes)) before any selection, in `class_names`.

        Raises:
            RuntimeFailure, ArtifactError: see `outputs.decode`; names the detector, which may be one of many.
        """
        try:
            boxes, scores = decode(raw, self.form, self.preprocess.input_hw, item)
        except (RuntimeFailure, ArtifactError) as error:
            what = f"{self.name}: {error.what}"
            raise type(error)(what, got=error.got, expected=error.expected, fix=error.fix) from error
        return boxes, scores if self.class_map is None else self.class_map.project(scores)

    def soft_candidates(self, raw: Arrays, item: int = 0) -> SoftDetections:
        """One image's candidates after a light NMS with their class distributions, in input pixels."""
        boxes, scores = self.candidates(raw, item)
        return select_soft(
            boxes,
            scores,
            score_threshold=self.selection.score_threshold,
            nms_iou=self._nms_iou(LIGHT_NMS_IOU),
            max_detections=self.selection.max_detections,
        )

    @property
    def _merges(self) -> bool:
        """Whether several of the file's classes count as one, so that NMS must follow even a detector's own."""
        return self.class_map is not None and any(len(found) > 1 for found in self.class_map.sources)

    def _nms_iou(self, iou: float) -> float:
        return 1.0 if self.form.is_finished and not self._merges else iou

    def thresholds(self) -> dict[str, Any]:
        """What decides which candidates become detections, see `selection.effective`."""
        return effective(self.selection, self._inside, merges=self._merges)

    def not_applied(self) -> str | None:
        """What of `selection` can have no effect, since NMS is inside the file, see `selection.idle`."""
        return idle(self.selection, self._inside, merges=self._merges)

    @property
    def _inside(self) -> Mapping[str, Any] | None:
        return self.facts.get("thresholds") or {} if self.form.is_finished else None

    def soften(self, raw: Arrays, geometry: Geometry) -> SoftDetections:
        """Like `finish`, but candidates with whole class distributions after a light NMS."""
        found = self.soft_candidates(raw)
        placed = geometry.to_source(found.boxes_xyxy)
        inside = have_extent(placed)
        return SoftDetections(placed[inside], found.class_probs[inside])

    def detect(self, image: ImageArray) -> Detections:
        """All three stages: detections in the image's own pixels, best first."""
        tensor, geometry = self.prepare(image)
        return self.finish(self.infer(tensor), geometry)

    def answer(self, image: ImageArray) -> SoftDetections:
        """All three stages, keeping class distributions: what fusion and distillation work on."""
        tensor, geometry = self.prepare(image)
        return self.soften(self.infer(tensor), geometry)

    def warm(self, runs: int = 2) -> None:
        """Run on a grey picture, so that the first timed run is not the first."""
        height, width = self.preprocess.input_hw
        tensor, _ = self.prepare(np.full((height, width, 3), 114, np.uint8))
        for _ in range(runs):
            self.infer(tensor)

    def with_classes(self, class_names: Sequence[str], class_map: Mapping[str, str] | None = None) -> Predictor:
        """The same detector answering in another label set; classes that it does not share are dropped.

        The runtime is shared: closing either closes both.

        Raises:
            ClassMapError: nothing maps, or `class_map` names a class that is not there.
        """
        mapped = copy.copy(self)
        mapped.class_map = map_classes(self.source_class_names, class_names, class_map)
        mapped.class_names = tuple(class_names)
        if mapped.class_map.is_identity:
            mapped.class_map = None
        return mapped

    def own_selection(self) -> dict[str, Any]:
        """What the file says that it was measured with, as arguments of `with_selection`; empty where it says nothing."""
        said = self.facts.get("thresholds") or {}
        keys = ("nms_iou", "max_detections") if self.form.is_finished else ("nms_iou", "max_detections", "box_voting")
        return {key: said[key] for key in keys if said.get(key) is not None}

    def with_selection(
        self,
        *,
        score_threshold: float | None = None,
        nms_iou: float | None = None,
        max_detections: int | None = None,
        box_voting: float | None = None,
    ) -> Predictor:
        """The same detector with other thresholds, sharing the runtime; None leaves one as it is."""
        changes = {
            "score_threshold": score_threshold,
            "nms_iou": nms_iou,
            "max_detections": max_detections,
            "box_voting": box_voting,
        }
        other = copy.copy(self)
        other.selection = replace(self.selection, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
        return other

    def with_preprocess(self, preprocess: PreprocessSpec) -> Predictor:
        """The same detector with its pictures prepared in another way, sharing the runtime."""
        other = copy.copy(self)
        other.preprocess = preprocess
        return other

    def with_form(self, form: OutputFormat) -> Predictor:
        """The same detector with its outputs read in another way, sharing the runtime."""
        other = copy.copy(self)
        other.form = form
        return other

    def describe(self) -> dict[str, Any]:
        """What this is, in plain JSON types: runtime, provider, precision, input, classes, output format, file, hash."""
        path = self.facts.get("path")
        file = Path(path) if path is not None else None
        return {
            "name": self.name,
            "runtime": self.runtime.name,
            "provider": self.runtime.provider,
            "precision": self.facts.get("precision", "fp32"),
            "input_hw": list(self.preprocess.input_hw),
            "preprocess": self.preprocess.to_dict(),
            "class_names": list(self.class_names),
            "source_class_names": list(self.source_class_names),
            "unknown_classes": list(self.class_map.unknown_classes) if self.class_map is not None else [],
            "output": self.form.to_dict(),
            "notes": list(self.facts.get("notes", ())),
            "path": None if file is None else str(file),
            "sha256": None if file is None else sha256_model(file),
            "size_bytes": None if file is None else sum(part.stat().st_size for part in (file, *external_files(file))),
        }

    def taken_for_granted(self) -> tuple[str, ...]:
        """What was recognised or guessed of a foreign ONNX file, one sentence each; of our own, that a tool has changed it."""
        notes: tuple[str, ...] = tuple(self.facts.get("notes", ()))
        foreign = self.facts.get("model") is None and self.runtime.name in ("onnxruntime", "openvino")
        return notes if foreign else tuple(note for note in notes if note == CHANGED)

    def close(self) -> None:
        """Free the model."""
        self.runtime.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_predictor(
    path: str | Path,
    *,
    runtime: RuntimeChoice = "auto",
    provider: str | None = None,
    threads: int | None = None,
    score_threshold: float = 0.001,
    nms_iou: float = 0.5,
    max_detections: int = 100,
    box_voting: float | None = None,
    options: OnnxTeacher | None = None,
    cuda_graph: bool = False,
) -> Predictor:
    """A predictor from an ONNX file (ours or foreign), a detector checkpoint, a run folder, or an engine.

    Args:
        path: the file or folder.
        runtime: "auto" goes by what the file is; "openvino" runs ONNX files too.
        provider: ONNX Runtime's provider, or torch's or OpenVINO's device; the CPU if left out.
        threads: threads of one inference; the runtime's own choice if left out.
        score_threshold: candidates must score more than this.
        nms_iou: overlap above which the worse of two boxes of a class goes.
        max_detections: the best that are kept for an image.
        box_voting: overlap from which suppressed boxes move the one that is kept; None for none.
        options: what is declared of a foreign ONNX file.
        cuda_graph: engines only: capture an inference's work and launch it as a whole.

    Raises:
        ArtifactError: missing, damaged, not a detector, or an engine for another machine.
        UserError: a foreign file needs something declared.
        MissingDependencyError: the runtime or provider is not there. RuntimeFailure: the provider fell back.
    """
    path = Path(path)
    selection = Selection(score_threshold, nms_iou, max_detections, box_voting)
    choice = _runtime_for(path, runtime)
    if choice == "onnxruntime":
        engine: OnnxEngine = "openvino" if runtime == "openvino" else "onnxruntime"
        opened = open_onnx(path, options, provider=provider or "cpu", threads=threads, engine=engine)
        name = path.stem if options is None else options.name
        return Predictor(
            name,
            opened.class_names,
            opened.preprocess,
            opened.runtime,
            opened.form,
            selection=selection,
            facts=opened.facts,
        )
    if choice == "tensorrt":
        return _engine_predictor(path, selection, cuda_graph)
    return _torch_predictor(path, provider or "cpu", threads, selection)


def _runtime_for(path: Path, runtime: RuntimeChoice) -> NaturalRuntime:
    """What a file runs on by its kind; OpenVINO takes what ONNX Runtime does."""
    suffix = path.suffix.lower()
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder", expected="an ONNX file, a checkpoint or a run folder")
    natural = "torch" if path.is_dir() else NATURAL.get(suffix)
    if natural is None:
        raise ArtifactError(
            f"{path}: not a kind of file that detects",
            got=suffix or "a file without suffix",
            expected=".onnx, .pt, .engine, or a run folder",
        )
    if runtime not in ("auto", natural) and not (runtime == "openvino" and natural == "onnxruntime"):
        raise UserError(
            f"{path}: the runtime does not fit the file",
            got=f"runtime {runtime}",
            expected=natural,
            fix="leave the runtime out; `edgekd export` writes an ONNX file" if natural == "torch" else None,
        )
    return natural


def _torch_predictor(path: Path, device: str, threads: int | None, selection: Selection) -> Predictor:
    from edgekd.checkpoint import detector_file, load_with_facts
    from edgekd.runtimes.torch_runtime import TorchRuntime

    file = detector_file(path)
    detector, run = load_with_facts(file)
    spec = detector.spec
    name = path.name if path.is_dir() else (file.parent.name or file.stem)
    facts = {
        "path": str(file),
        "precision": "fp32",
        "model": spec.model,
        "provenance": {"run": run},
        "notes": ("a native checkpoint",),
    }
    form = OutputFormat("boxes-scores", ("boxes", "scores"), len(spec.class_names))
    runtime = TorchRuntime(detector, device, threads)
    return Predictor(name, spec.class_names, spec.preprocess, runtime, form, selection=selection, facts=facts)


def _engine_predictor(path: Path, selection: Selection, cuda_graph: bool) -> Predictor:
    from edgekd.runtimes.tensorrt_runtime import TensorRTRuntime

    runtime = TensorRTRuntime(path, cuda_graph=cuda_graph)
    manifest = runtime.manifest
    facts = {
        "path": str(path),
        "precision": manifest.precision,
        "thresholds": manifest.thresholds,
        "notes": (f"an engine of TensorRT {manifest.tensorrt}, buffers by {runtime.backend}",),
    }
    return Predictor(
        path.stem,
        manifest.class_names,
        manifest.preprocess_spec,
        runtime,
        manifest.output_format,
        selection=selection,
        facts=facts,
    )
