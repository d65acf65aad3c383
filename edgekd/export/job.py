"""One export from a run to a file: trace, convert, compare with the original, and only then put it in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import atomic_path, require_file, sha256_file
from edgekd.checkpoint import checkpoint_facts, detector_file, load_detector
from edgekd.data.images import evenly_spread
from edgekd.detectors.base import Detector
from edgekd.errors import DataError, ExportError, ParityError, UserError
from edgekd.export.float16 import to_float16
from edgekd.export.gate import Gate, make_gate
from edgekd.export.graph import set_metadata
from edgekd.export.images import ExportData as ExportData
from edgekd.export.images import PreparedImages
from edgekd.export.onnx import Precision, describe, detections_form, trace, write_model
from edgekd.export.opset import require_opset
from edgekd.export.parity import ParityReport
from edgekd.export.precision import Int8Result, to_int8
from edgekd.export.qat import learned_ranges, unused_ranges
from edgekd.export.sensitivity import half_with_worst_kept
from edgekd.recipe import ExportConfig
from edgekd.runtimes.onnx_seal import sealed
from edgekd.selection import Selection

if TYPE_CHECKING:
    from onnx import ModelProto

PARITY_KEY = "edgekd.parity"
"""Metadata: JSON list of the parity reports that the file passed."""


@dataclass(frozen=True)
class ExportResult:
    """What was written, and the evidence that it is right.

    Attributes:
        path: the form with decoded boxes and scores. complete: the form with NMS inside, if asked for.
        parity: one report a comparison: torch against fp32, then fp32 against the precision asked for.
        int8: how an int8 model was made, without the model.
        notes: what the user should know, such as that only generated images were at hand.
    """

    path: Path
    complete: Path | None
    precision: Precision
    target: str
    parity: tuple[ParityReport, ...]
    int8: dict[str, Any] | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with sizes and hashes of the files."""
        files = [path for path in (self.path, self.complete) if path is not None]
        return {
            "path": str(self.path),
            "complete": None if self.complete is None else str(self.complete),
            "precision": self.precision,
            "target": self.target,
            "files": {file.name: {"sha256": sha256_file(file), "size_bytes": file.stat().st_size} for file in files},
            "parity": [report.to_dict() for report in self.parity],
            "int8": self.int8,
            "notes": list(self.notes),
        }


def export_run(
    source: Path,
    out: Path,
    *,
    precision: Precision = "fp32",
    config: ExportConfig | None = None,
    thresholds: Selection | None = None,
    data: ExportData | None = None,
    say: Callable[[str], None] | None = None,
) -> ExportResult:
    """Export a run folder or checkpoint to `out`, past the parity gate.

    With `config.nms` the form with NMS inside is written beside it, as NAME.nms.onnx. Nothing appears under the final
    names before every check has passed.

    Args:
        thresholds: of the run's own recipe if left out.
        data: real images; taken from the run's own recipe if left out. Without any, fp32 and fp16 are compared on
            generated scenes, which the result's notes say.
        say: told what is going on, a line a step.

    Raises:
        ArtifactError: no detector at `source`.
        UserError: `out` is no .onnx file, or cannot be written; an opset that is not known here.
        DataError: int8 without images.
        ExportError: exporting or converting failed.
        ParityError: the export does not agree with the original; names the worst output and layer.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".onnx" or out.is_dir():
        raise UserError("an export goes to an .onnx file", got=out, expected="a name such as student.onnx")
    config, thresholds, say = config or ExportConfig(), thresholds or thresholds_of_run(source), say or _silent
    require_opset(config.opset)
    for file in (out, complete_path(out)) if config.nms else (out,):
        require_file(file)
    detector = load_detector(source)
    notes: list[str] = []
    if data is None:
        data, notes = data_of_run(source)
    calibration = _calibration(detector, data, config, notes) if precision == "int8" else ()
    say(f"tracing {detector.spec.model}")
    base = trace(detector, opset=config.opset, dynamic_batch=config.dynamic_batch)
    target = config.target
    describe(base, detector, precision="fp32", target=target, thresholds=thresholds, facts=_provenance(source))
    gate = make_gate(detector, None if data is None else data.for_parity, thresholds, config.map_budget)
    say(f"comparing with torch on {len(gate.images)} images")
    gate.against_torch(base, measure_map=precision == "fp32")
    model, int8 = base, None
    if precision != "fp32":
        say(f"converting to {precision}, and comparing with fp32")
        evaluate = None if gate.meter is None else gate.meter.of_model
        if precision == "fp16":
            model, kept = _half_within(gate, base)
            if kept:
                notes.append(
                    f"{len(kept)} convolutions stay in float32, where float16 loses too much: {', '.join(kept)}"
                )
        else:
            found = checkpoint_facts(source)
            learned = learned_ranges(base, found, target)
            notes += [said] if (said := unused_ranges(found, target)) else []
            int8 = to_int8(base, calibration, config=config, evaluate=evaluate, learned=learned)
            model = int8.model
            gate.against_fp32(base, model, precision, int8.ap50_pair)
    set_metadata(model, {PARITY_KEY: [report.to_dict() for report in gate.reports]})
    complete = detections_form(model, thresholds) if config.nms else None
    if complete is not None:
        gate.nms_inside(model, complete)
    say(f"writing {out.name}")
    _write(out, model, complete)
    notes = [*notes, *gate.notes, *_float_notes(int8)]
    written = None if complete is None else complete_path(out)
    facts = None if int8 is None else int8.facts
    return ExportResult(out, written, precision, target, tuple(gate.reports), facts, tuple(notes))


def complete_path(out: Path) -> Path:
    """Where the form with NMS inside goes: student.int8.onnx -> student.int8.nms.onnx."""
    return out.with_name(f"{out.stem}.nms.onnx")


def thresholds_of_run(source: Path) -> Selection:
    """What the run's own recipe measures with; the usual thresholds where there is none."""
    from edgekd.recipe_file import RECIPE_FILE, load_recipe

    recipe_file = (source if source.is_dir() else source.parent) / RECIPE_FILE
    try:
        return Selection.of(load_recipe(recipe_file).bench) if recipe_file.is_file() else Selection()
    except UserError:  # `data_of_run` notes it
        return Selection()


def data_of_run(source: Path) -> tuple[ExportData | None, list[str]]:
    """The data set that a run's own recipe names, or None with a note why not."""
    from edgekd.data import read_dataset
    from edgekd.recipe_file import RECIPE_FILE, load_recipe

    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    recipe_file = folder / RECIPE_FILE
    if not recipe_file.is_file():
        return None, []
    try:
        section = load_recipe(recipe_file).data
        train, val = (
            read_dataset(Path(section.root), split, format=section.format, class_names=section.classes)
            for split in (section.train, section.val)
        )
    except UserError as error:
        return None, [f"the run's own data set cannot be used: {error.what}"]
    return ExportData(train, val), []


def _provenance(source: Path) -> dict[str, Any]:
    """Where the weights came from, without this machine's paths."""
    file = detector_file(source)
    facts = checkpoint_facts(source)
    named = {key: facts[key] for key in ("metrics", "seed", "step", "inputs", "chosen_on") if key in facts}
    return {"checkpoint": {"name": file.name, "sha256": sha256_file(file)}, "run": named}


def _half_within(gate: Gate, base: ModelProto) -> tuple[ModelProto, tuple[str, ...]]:
    """The float16 model that passes the gate, with the convolutions that stay float32 for it: none, or as few as it takes.

    Raises:
        ExportError, ParityError: none does; says what stands in the way of all in float16.
    """
    try:
        model = to_float16(base)
        gate.against_fp32(base, model, "fp16", None)
    except (ExportError, ParityError):
        for kept, other in half_with_worst_kept(base, gate.images):
            with contextlib.suppress(ParityError):
                gate.against_fp32(base, other, "fp16", None)
                return other, kept
        raise
    return model, ()


def _silent(_: str) -> None:
    return None


def _calibration(detector: Detector, data: ExportData | None, config: ExportConfig, notes: list[str]) -> PreparedImages:
    """Images to calibrate int8 on."""
    dataset = None if data is None else (data.train or data.val)
    if data is None or dataset is None or not len(dataset):
        raise DataError(
            "int8 needs training images to calibrate on",
            got="; ".join(notes) or "no data set, and no recipe beside the checkpoint that names one",
            fix="give the data set with --data DIR (and --split NAME)",
        )
    if not data.train:
        notes.append(f"calibrated on split {dataset.split!r}, since no training split was given")
    return PreparedImages(evenly_spread(dataset.records, config.calibration_images), detector.spec.preprocess)


def _float_notes(int8: Int8Result | None) -> list[str]:
    if int8 is None:
        return []
    notes = []
    if int8.float_stem:
        notes.append(
            f"the first {len(int8.float_stem)} convolutions stay in float: with so few channels int8 is slower"
        )
    if int8.kept_float:
        kept = ", ".join(int8.kept_float)
        notes.append(f"{len(int8.kept_float)} convolutions stay in float to hold the mAP budget: {kept}")
    return notes


def _write(out: Path, model: ModelProto, complete: ModelProto | None) -> None:
    """Both files under temporary names first, then both into place."""
    with atomic_path(out) as temporary:
        temporary.write_bytes(sealed(model))
        if complete is not None:
            write_model(complete, complete_path(out))
