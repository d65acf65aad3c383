"""`edgekd doctor`, `quantize`, `export`, `report`: what comes before and after training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgekd.artifact import is_onnx
from edgekd.cli.artifacts import DataOption, Target, export_data
from edgekd.cli.session import DeviceOption, JsonOption, QuietOption, SeedOption, SetOption, refuse_idle, session_of

if TYPE_CHECKING:
    from edgekd.export.engine_job import EngineResult


ENGINES = "Engines (--format engine)"


def doctor(context: typer.Context, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Say what this machine can do, and how to get what is missing."""
    session = session_of(context)
    from edgekd.doctor import examine, show

    found = examine()
    session.finish(found.to_dict(), lambda: show(found))
    if not found.ok:
        raise typer.Exit(1)


def quantize(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A finished run's folder.", metavar="RUN")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the fine-tuned run.", metavar="DIR")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Says data and settings; the run's own if not given.")
    ] = None,
    sets: SetOption = None,
    json: JsonOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Fine-tune a trained detector with int8 rounding in the loop, taught by its own fp32 self; then export the new run.

    `export.qat` and `export.target` of the recipe say how: --set export.qat.epochs=5 --set export.target=tensorrt.
    """
    session = session_of(context)
    from edgekd.errors import ArtifactError
    from edgekd.quantize import quantize_run
    from edgekd.recipe_file import RECIPE_FILE, load_recipe, refuse_own_recipe
    from edgekd.workspace import open_workspace

    if recipe is None and not source.is_dir():
        raise ArtifactError(f"{source} is no run folder", expected="one that `edgekd train` or `distill` wrote")
    checked = load_recipe(recipe or source / RECIPE_FILE, session.overrides, needs=("data",))
    refuse_own_recipe(out)
    with open_workspace(checked, out, device=session.device or "auto", quiet=session.quiet) as work:
        result = quantize_run(work, source, out)
    found = {"folder": str(out), "model": str(result.model), "metrics": result.metrics, "skipped": result.skipped}
    losses = ", ".join(f"{loss:.4g}" for loss in result.metrics.get("loss", ()))
    said = f"{'nothing to do: ' if result.skipped else ''}{result.model} (loss of each epoch: {losses})"
    laid_out = "" if checked.export.target == "x86" else f" --target {checked.export.target}"
    hint = f"next: edgekd export {shlex.quote(str(out))} --precision int8{laid_out} --out FILE"
    session.finish(found, lambda: typer.echo(f"{said}\n{hint}"))


def export(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(help="A run folder or a checkpoint; for an engine also an ONNX file.", metavar="RUN|CHECKPOINT"),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", metavar="FILE")],
    format: Annotated[
        Literal["onnx", "engine"], typer.Option("--format", help="ONNX, or a TensorRT engine for the GPU here.")
    ] = "onnx",
    precision: Annotated[Literal["fp32", "fp16", "int8"], typer.Option("--precision", help="Number format.")] = "fp32",
    target: Annotated[Target, typer.Option("--target", help="What int8 is laid out for.")] = "x86",
    calibration: Annotated[
        Literal["auto", "minmax", "entropy", "percentile"],
        typer.Option("--calibration", help="Of int8 ranges; auto takes the one with the best mAP."),
    ] = "auto",
    max_map_drop: Annotated[
        float,
        typer.Option(
            "--max-map-drop", min=0, help="AP50 points fp16 or int8 may lose; the worst layers go back to float32."
        ),
    ] = 1.0,
    nms: Annotated[bool, typer.Option("--nms", help="Also write FILE.nms.onnx, with NMS inside.")] = False,
    opset: Annotated[int, typer.Option("--opset", min=17, help="ONNX opset.")] = 17,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch size open.")] = False,
    data: DataOption = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="Split of --data to calibrate and compare on; train, val if not given."),
    ] = None,
    data_format: Annotated[
        str, typer.Option("--data-format", help="Of the data set: auto, voc, coco, yolo.", metavar="NAME")
    ] = "auto",
    batch: Annotated[
        str,
        typer.Option("--batch", help="N, or LEAST:USUAL:MOST for an open batch.", metavar="N", rich_help_panel=ENGINES),
    ] = "1",
    workspace: Annotated[
        int | None, typer.Option("--workspace", help="Limit of scratch memory, MiB.", rich_help_panel=ENGINES)
    ] = None,
    level: Annotated[
        int | None, typer.Option("--level", min=0, max=5, help="Optimisation level.", rich_help_panel=ENGINES)
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Later TensorRT may run it.", rich_help_panel=ENGINES)
    ] = False,
    hardware: Annotated[
        Literal["exact", "same-capability", "ampere+"],
        typer.Option("--hardware", help="Which GPUs may run it.", rich_help_panel=ENGINES),
    ] = "exact",
    dla: Annotated[
        int | None, typer.Option("--dla", min=0, help="A Jetson's DLA core.", rich_help_panel=ENGINES)
    ] = None,
    library_tactics: Annotated[
        bool,
        typer.Option("--library-tactics/--no-library-tactics", help="Try cuBLAS, cuDNN.", rich_help_panel=ENGINES),
    ] = True,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a detector as ONNX or as a TensorRT engine, checked against the original before it appears.

    The images come from the run's own recipe unless --data names others; int8 is calibrated on its training split.
    """
    session = session_of(context)
    engine_only = {"batch", "workspace", "level", "version_compatible", "hardware", "dla", "library_tactics"}
    refuse_idle(
        context,
        {
            "--data": {"split", "data_format"} if data is None else (),
            "--format engine": engine_only if format == "onnx" else (),
            "--format onnx": {"target", "nms"} if format == "engine" else (),
            "a run or checkpoint": {"opset", "dynamic_batch", "calibration"} if is_onnx(source) else (),
            "--precision int8": {"target", "calibration"} if precision != "int8" else (),
            "--precision fp16 or int8": {"max_map_drop"} if precision == "fp32" else (),
        },
    )
    from edgekd.console import Terminal
    from edgekd.export import export_run
    from edgekd.recipe import ExportConfig

    config = ExportConfig(
        nms=nms,
        opset=opset,
        dynamic_batch=dynamic_batch,
        target=target,
        calibration=calibration,
        map_budget=max_map_drop,
    )
    images = export_data(data, split, data_format) if data is not None else None
    say = Terminal(session.quiet).note
    if format == "engine":
        from edgekd.export.engine import EngineOptions
        from edgekd.export.engine_job import export_engine

        options = EngineOptions(
            workspace, level, _batch_profile(batch), version_compatible, hardware, dla, library_tactics
        )
        engine = export_engine(source, out, precision=precision, config=config, options=options, data=images, say=say)
        session.finish(engine.to_dict(), lambda: _show_engine(engine))
        return
    result = export_run(source, out, precision=precision, config=config, data=images, say=say)

    def show() -> None:
        for note in result.notes:
            typer.echo(f"note: {note}", err=True)
        for path in (result.path, result.complete):
            if path is not None:
                typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {result.precision}, parity checked")

    session.finish(result.to_dict(), show)


def _batch_profile(text: str) -> tuple[int, int, int]:
    """Read `--batch`: "4" is (4, 4, 4), "1:4:8" is an open batch.

    Raises:
        UserError: neither.
    """
    from edgekd.errors import UserError

    numbers = [int(part) for part in text.split(":") if part.isdigit()]
    if len(numbers) != text.count(":") + 1 or len(numbers) not in (1, 3):
        raise UserError("unknown --batch", got=text, expected="a number, or LEAST:USUAL:MOST such as 1:4:8")
    least, usual, most = numbers * 3 if len(numbers) == 1 else numbers
    return least, usual, most


def _show_engine(result: EngineResult) -> None:
    for note in result.notes:
        typer.echo(f"note: {note}", err=True)
    layers = ", ".join(f"{count} {kind}" for kind, count in result.manifest.layer_precisions().items())
    manifest, size = result.manifest, result.path.stat().st_size / 1e6
    where = f"TensorRT {manifest.tensorrt} on {manifest.device['name']}"
    typer.echo(f"{result.path}: {size:.2f} MB, {manifest.precision} for {where}; layers: {layers or 'unknown'}")


def report(
    context: typer.Context,
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of `edgekd run` or `compare`, or result files; the first leads.", metavar="DIR..."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write; DIR/report.html if not given.")
    ] = None,
    table: Annotated[
        list[Path] | None,
        typer.Option("--table", help="The comparison as .md, .csv or .tex as well; repeatable.", metavar="FILE"),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one self-contained HTML page of results: benchmarks, comparisons of methods, devices, videos."""
    session = session_of(context)
    from edgekd.console import Terminal
    from edgekd.report.page import write_report

    page = write_report(results, out, table or (), Terminal(session.quiet).warn)
    found = {"report": str(page), "tables": [str(file) for file in table or ()]}
    session.finish(found, lambda: typer.echo("\n".join(map(str, [page, *(table or ())]))))
