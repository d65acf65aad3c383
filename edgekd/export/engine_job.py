"""One engine from a run, checkpoint or ONNX file: precision in the ONNX, TopK, plan, parity on this device, manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import atomic_path, is_onnx, require_file, sha256_file, source_commit, versions
from edgekd.errors import ArtifactError, MissingDependencyError, UserError
from edgekd.export.engine import BuiltEngine, EngineOptions, build_engine, graph_precision
from edgekd.export.engine_parity import compare_engine
from edgekd.export.graph import RAW_KEY, metadata_of, name_nodes
from edgekd.export.parity import ParityReport
from edgekd.export.topk import CANDIDATES, with_top_candidates
from edgekd.recipe import ExportConfig
from edgekd.runtimes.buffers import Buffers, open_buffers
from edgekd.runtimes.engine_file import ENGINE_SUFFIXES, EngineManifest, manifest_path, write_engine_manifest
from edgekd.runtimes.model_files import external_files
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.tensorrt_runtime import TensorRTRuntime
from edgekd.selection import Selection
from edgekd.types import PreprocessSpec

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekd.export.job import ExportData
    from edgekd.export.onnx import Precision
    from edgekd.runtimes.onnx_session import OnnxRuntime

_REFUSED_BY_TENSORRT = ("dynamic-scale", "scale", "int32-bias", "zero-point", "operator")

_NOT_DECLARED = (
    "`edgekd export` takes no declarations, only files that need none: class names in the metadata (Ultralytics' `names`), "
    "a fixed input size, decoded boxes"
)
_DECODED_IN_HALF = (
    "nothing in the file says where its boxes are decoded, so float16 does that too: they are in steps of a quarter of a "
    "pixel from 256 on, of half a pixel from 512 on",
)


@dataclass(frozen=True)
class EngineResult:
    """What was written, and the evidence that it is right.

    Attributes:
        parity: the export's reports, then the engine against the ONNX it was built from; None for outputs that are
            not decoded boxes and scores. notes: what the user should know.
    """

    path: Path
    manifest: EngineManifest
    parity: tuple[ParityReport, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "path": str(self.path),
            "manifest": str(manifest_path(self.path)),
            "precision": self.manifest.precision,
            "tensorrt": self.manifest.tensorrt,
            "device": dict(self.manifest.device),
            "layer_precisions": self.manifest.layer_precisions(),
            "files": {self.path.name: {"sha256": self.manifest.plan_sha256, "size_bytes": self.path.stat().st_size}},
            "parity": [report.to_dict() for report in self.parity],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Model:
    """An ONNX detector, ready to become an engine, and what is known of it; `notes` are for the user.

    Attributes:
        reference: what the engine must agree with: `proto`, or the fp32 graph that it was converted from here.
    """

    proto: ModelProto
    class_names: tuple[str, ...]
    preprocess: PreprocessSpec
    form: OutputFormat
    reference: ModelProto
    notes: tuple[str, ...] = ()


def export_engine(
    source: Path,
    out: Path,
    *,
    precision: Precision = "fp32",
    config: ExportConfig | None = None,
    options: EngineOptions | None = None,
    data: ExportData | None = None,
    say: Callable[[str], None] | None = None,
    buffers: Buffers | None = None,
) -> EngineResult:
    """Build an engine for the GPU here, past the parity gate, with its manifest beside it.

    Args:
        source: a run folder, a checkpoint, or an ONNX file (ours or foreign) whose precision is the one asked for; an
            fp32 one is converted to fp16.
        out: FILE.engine. Nothing appears there before every check has passed; the manifest comes last.
        data: real images to calibrate and compare on, the engine included; of the run's own recipe if left out.
        buffers: device memory, which stays the caller's.

    Raises:
        UserError: `out` is no engine's name, or the source does not fit what was asked for.
        MissingDependencyError: no TensorRT, no GPU, or this TensorRT cannot do what was asked for.
        ExportError, ParityError: building failed, or the engine does not agree with its ONNX.
    """
    source, out = Path(source), Path(out)
    if out.suffix not in ENGINE_SUFFIXES or out.is_dir():
        raise UserError("an engine goes to an .engine file", got=out, expected="a name such as student.engine")
    require_file(out)
    config, options = config or ExportConfig(), options or EngineOptions()
    say = say or (lambda _: None)
    rebuild = _rebuild(source, out, precision, config, options, data)
    if data is None and not is_onnx(source):  # the last hop needs real images as much as those before it
        from edgekd.export.job import data_of_run

        data, _ = data_of_run(source)
    device_memory = buffers or open_buffers()
    try:
        with tempfile.TemporaryDirectory(prefix="edgekd-engine-") as folder:
            file, reports, notes = _as_onnx(source, Path(folder), precision, config, options, data, say)
            model = _read(file, precision)
        say(f"building for {device_memory.device.name}; this takes minutes at a high optimisation level")
        with device_memory.active():
            built = build_engine(model.proto, options, device_memory.device)
        manifest = _manifest(source, out, model, precision, built, options, device_memory, rebuild)
        return _compare_and_write(out, model, built, manifest, data, config, device_memory, (reports, notes), say)
    finally:
        if buffers is None:
            device_memory.close()


def _as_onnx(
    source: Path,
    folder: Path,
    precision: Precision,
    config: ExportConfig,
    options: EngineOptions,
    data: ExportData | None,
    say: Callable[[str], None],
) -> tuple[Path, tuple[ParityReport, ...], tuple[str, ...]]:
    """The source as an ONNX file; runs and checkpoints go through `export_run`, laid out for TensorRT."""
    if is_onnx(source):
        if not source.is_file():
            raise ArtifactError(f"{source}: no such file", expected="an ONNX file, a checkpoint or a run folder")
        return source, (), ()
    from edgekd.export.job import export_run

    open_batch = config.dynamic_batch or options.batch != (1, 1, 1)
    changed = {"target": "tensorrt", "nms": False, "dynamic_batch": open_batch}
    config = config.model_copy(update=changed)
    file = folder / "model.onnx"
    result = export_run(source, file, precision=precision, config=config, data=data, say=say)
    return file, result.parity, result.notes


def _read(file: Path, precision: Precision) -> _Model:
    """An ONNX file as the graph that TensorRT gets: in the asked precision, candidates cut by TopK."""
    import onnx

    from edgekd.runtimes.onnx_file import open_onnx

    try:
        opened = open_onnx(file)
    except (ArtifactError, MissingDependencyError):
        raise
    except UserError as error:  # its advice is to declare something
        fix = f"{error.fix}; {_NOT_DECLARED}" if error.fix else _NOT_DECLARED
        raise UserError(error.what, got=error.got, expected=error.expected, fix=fix) from error
    opened.runtime.close()
    form, preprocess, class_names = opened.form, opened.preprocess, opened.class_names
    _check_inputs(file, opened.runtime)
    if form.is_finished:
        raise UserError(
            f"{file}: NMS is inside this ONNX file, which an engine must not have",
            fix="give the form with decoded boxes and scores; NMS runs outside",
        )
    model = reference = onnx.load(str(file))
    found = graph_precision(model)
    notes: tuple[str, ...] = ()
    if found == "fp32" and precision == "fp16":
        from edgekd.export.float16 import to_float16

        if RAW_KEY not in metadata_of(model):
            notes = _DECODED_IN_HALF
        name_nodes(model)
        model = to_float16(reference)
    elif found != precision:
        raise UserError(
            f"{file}: precision lives in the ONNX file, and this one has another",
            got=found,
            expected=precision,
            fix=f"ask for --precision {found}, or export {precision} from the run",
        )
    if precision == "int8":
        _check_int8(file, model)
    if can_be_cut(form, model):
        ends = form.names[0], form.names[1]
        same, model = reference is model, with_top_candidates(model, ends, CANDIDATES)
        reference = model if same else with_top_candidates(reference, ends, CANDIDATES)
    return _Model(model, class_names, preprocess, form, reference, notes)


def _check_inputs(file: Path, runtime: OnnxRuntime) -> None:
    """Refuse what `TensorRTRuntime` could not feed, before minutes of building."""
    if len(runtime.inputs) == 1 and len(runtime.inputs[0].shape) == 4 and not runtime.channels_last:
        return
    raise UserError(
        f"{file}: an engine takes images channels first, and nothing else",
        got="inputs " + "; ".join(map(str, runtime.inputs)),
        expected="one input (B, 3, H, W)",
        fix="export it so: fold other inputs into the graph as constants",
    )


def can_be_cut(form: OutputFormat, model: ModelProto) -> bool:
    """Whether TopK may choose among candidates: (B, P, 4) boxes and (B, P, K) probabilities, one below the other."""
    plain = form.kind == "boxes-scores" and form.activation == "none" and form.background == "none"
    if not plain or len(form.names) != 2 or form.channels_first or form.box_format.startswith("grid-"):
        return False
    shapes = {output.name: output.type.tensor_type.shape.dim for output in model.graph.output}
    boxes, scores = (shapes[name] for name in form.names)
    return len(boxes) == len(scores) == 3 and 0 < boxes[1].dim_value == scores[1].dim_value


def _check_int8(file: Path, model: ModelProto) -> None:
    from edgekd.export.lint import lint_qdq

    findings = [finding for finding in lint_qdq(model, "tensorrt") if finding.code in _REFUSED_BY_TENSORRT]
    if findings:
        raise UserError(
            f"{file}: TensorRT refuses this int8 model",
            got="; ".join(map(str, findings[:5])) + (f"; {len(findings) - 5} more" if len(findings) > 5 else ""),
            expected="symmetric int8: zero points 0, float biases",
            fix="export it with --precision int8 --target tensorrt",
        )


def _manifest(
    source: Path,
    out: Path,
    model: _Model,
    precision: Precision,
    built: BuiltEngine,
    options: EngineOptions,
    buffers: Buffers,
    rebuild: str,
) -> EngineManifest:
    metadata = metadata_of(model.proto)
    spec = metadata.get("edgekd.spec")
    provenance = metadata.get("edgekd.provenance")
    serialised = model.proto.SerializeToString(deterministic=True)
    return EngineManifest(
        plan_sha256=hashlib.sha256(built.plan).hexdigest(),
        onnx_sha256=hashlib.sha256(serialised).hexdigest(),
        source=_source(source, out),
        precision=precision,
        tensorrt=built.tensorrt,
        device=buffers.device.to_dict(),
        strongly_typed=built.strongly_typed,
        flags=built.flags,
        version_compatible=options.version_compatible,
        hardware=options.hardware,
        options=options.to_dict(),
        inputs=built.inputs,
        outputs=built.outputs,
        profile=_profile(built, options),
        layers=tuple(built.layers),
        memory_bytes=built.memory_bytes,
        class_names=model.class_names,
        preprocess=model.preprocess.to_dict(),
        form=model.form.to_dict(),
        spec=None if spec is None else json.loads(spec),
        parity=None,
        provenance={
            "versions": versions(),
            "commit": source_commit(),
            "buffers": buffers.name,
            "onnx": None if provenance is None else json.loads(provenance),
        },
        rebuild=rebuild,
        thresholds=json.loads(metadata.get("edgekd.thresholds", "{}")),
    )


def _profile(built: BuiltEngine, options: EngineOptions) -> tuple[int, int, int]:
    fixed = next(iter(built.inputs.values()))["shape"][0]
    return options.batch if fixed < 0 else (fixed, fixed, fixed)


def _source(source: Path, out: Path) -> dict[str, Any]:
    """Name and hash of the source; its path from the engine where both lie on one drive, with those of its weights."""
    from edgekd.checkpoint import detector_file

    file = source if is_onnx(source) else detector_file(source)
    files = [file, *external_files(file)]
    hashes = [sha256_file(part) for part in files]
    try:
        start = out.resolve().parent
        paths = [Path(os.path.relpath(part.resolve(), start)).as_posix() for part in files]
    except ValueError:
        return {"name": file.name, "sha256": hashes[0], "path": None, "weights": {}}
    weights = dict(zip(paths[1:], hashes[1:], strict=True))
    return {"name": file.name, "sha256": hashes[0], "path": paths[0], "weights": weights}


def _rebuild(
    source: Path,
    out: Path,
    precision: Precision,
    config: ExportConfig,
    options: EngineOptions,
    data: ExportData | None,
) -> str:
    """The command that builds this engine again, with every option that decides what it is or what it was judged by."""
    usual = EngineOptions()
    asked: list[tuple[str, object, object]] = [
        ("--opset", config.opset, 17),
        ("--max-map-drop", config.map_budget if precision != "fp32" else 1.0, 1.0),
        ("--calibration", config.calibration if precision == "int8" and not is_onnx(source) else "auto", "auto"),
        ("--batch", ":".join(map(str, options.batch)), ":".join(map(str, usual.batch))),
        ("--workspace", options.workspace_mib, usual.workspace_mib),
        ("--level", options.level, usual.level),
        ("--hardware", options.hardware, usual.hardware),
        ("--dla", options.dla_core, usual.dla_core),
    ]
    words = ["edgekd", "export", str(source), "--format", "engine", "--precision", precision, "--out", str(out)]
    for name, value, ordinary in asked:
        words += [name, f"{value}"] if value != ordinary else []
    words += ["--dynamic-batch"] if config.dynamic_batch else []
    words += ["--version-compatible"] if options.version_compatible else []
    words += [] if options.library_tactics else ["--no-library-tactics"]
    dataset = None if data is None else data.train or data.val
    if data is not None and dataset is not None:
        words += ["--data", str(dataset.root), "--data-format", dataset.format]
        words += ["--split", dataset.split] if data.train is data.val else []
    return shlex.join(words)


def _compare_and_write(
    out: Path,
    model: _Model,
    built: BuiltEngine,
    manifest: EngineManifest,
    data: ExportData | None,
    config: ExportConfig,
    buffers: Buffers,
    before: tuple[Sequence[ParityReport], Sequence[str]],
    say: Callable[[str], None],
) -> EngineResult:
    """Run the plan from a temporary folder, compare, and only then write it to its place; the manifest last.

    Beside its place the folder would stay there, hidden and large, when the process is killed.
    """
    reports, notes = [*before[0]], [*before[1], *model.notes, *built.notes]
    with tempfile.TemporaryDirectory(prefix="edgekd-engine-") as folder:
        trial = Path(folder) / out.name
        trial.write_bytes(built.plan)
        # Paths to the source are from the engine's own folder: from this one they might name another file.
        write_engine_manifest(trial, replace(manifest, source={**manifest.source, "path": None, "weights": {}}))
        if model.form.kind == "boxes-scores":
            say("comparing the engine with its ONNX")
            with TensorRTRuntime(trial, buffers=buffers) as runtime:
                dataset = None if data is None else data.for_parity
                thresholds = Selection(**manifest.thresholds)
                report, more = compare_engine(runtime, model.reference, dataset, thresholds, config.map_budget)
            report.check()
            reports.append(report)
            notes += more
            manifest = replace(manifest, parity=report.to_dict())
        else:
            notes.append("not compared: its outputs are not decoded boxes and scores")
    say(f"writing {out}")
    with atomic_path(out) as temporary:
        temporary.write_bytes(built.plan)
    write_engine_manifest(out, manifest)
    return EngineResult(out, manifest, tuple(reports), tuple(notes))
