"""`edgekd bundle`: a self-contained folder for the device; and what `edgekd bench --target` does with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.artifacts import (
    ClassesOption,
    DataOption,
    DeclareOption,
    FormatOption,
    InputSizeOption,
    OutputOption,
    Target,
    export_data,
    refuse_declared,
)
from edgekd.cli.bench_entries import declared
from edgekd.cli.session import JsonOption, QuietOption, refuse_idle, session_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekd.bench.entries import BenchArtifact
    from edgekd.cli.session import Session
    from edgekd.device.target import Target as Device
    from edgekd.export import ExportData
    from edgekd.export.onnx import Precision

PrecisionsOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="Of runs and checkpoints: fp32, fp16, int8, or several with commas; fp32 if not given.",
        metavar="NAMES",
    ),
]

ON_DEVICE = "On a device, by ssh"
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="The device to measure on.",
        metavar="ssh://[USER@]HOST[:PORT]",
        rich_help_panel=ON_DEVICE,
    ),
]
TargetPythonOption = Annotated[
    str,
    typer.Option(
        "--target-python",
        help="The Python to use there, as '~/venv/bin/python'.",
        metavar="PATH",
        rich_help_panel=ON_DEVICE,
    ),
]
SshConfigOption = Annotated[
    Path | None,
    typer.Option("--ssh-config", help="Instead of ~/.ssh/config.", metavar="FILE", rich_help_panel=ON_DEVICE),
]
TimeLimitOption = Annotated[
    float, typer.Option("--time-limit", min=1, help="Seconds until it is ended there.", rich_help_panel=ON_DEVICE)
]


def bundle(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(help="Run folders, checkpoints or ONNX files, as [ROLE:][NAME=]PATH.", metavar="ARTIFACT..."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to write; a bundle there is replaced.", metavar="DIR")
    ],
    precision: PrecisionsOption = None,
    target: Annotated[Target, typer.Option("--target", help="What int8 is laid out for.")] = "tensorrt",
    data: DataOption = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of --data to calibrate and compare on.", metavar="NAME")
    ] = None,
    format: FormatOption = "auto",
    classes: ClassesOption = None,
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    declare: DeclareOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a folder that checks and measures detectors on a device that has no edgekd.

    Copy it there and run `python3 bench.py`; or let `edgekd bench --target ssh://...` do both. An earlier bundle in --out is
    replaced only if nothing else lies in it, such as a result.json.
    """
    session = session_of(context)
    wanted = precisions_of(precision)
    refuse_idle(
        context,
        {
            "--data": {"split", "format"} if data is None else (),
            "--precision int8": {"target"} if "int8" not in (wanted or ()) else (),
        },
    )
    from edgekd.bench.entries import parse_artifact_argument
    from edgekd.console import Terminal
    from edgekd.device.bundle import make_bundle
    from edgekd.recipe import ExportConfig

    entries = [declared(parse_artifact_argument(text), classes, output, input_size, declare) for text in sources]
    refuse_declared(context, [entry.path for entry in entries])
    made = make_bundle(
        entries,
        out,
        precisions=wanted,
        config=ExportConfig(target=target),
        data=None if data is None else export_data(data, split, format),
        say=Terminal(session.quiet).note,
    )

    def show() -> None:
        for note in made.notes:
            typer.echo(f"note: {note}", err=True)
        models = ", ".join(model["file"] for model in made.models)
        typer.echo(f"{made.folder}: {made.size_bytes / 1e6:.1f} MB, {models}\non the device: python3 bench.py")

    session.finish(made.to_dict(), show)


def precisions_of(text: str | None) -> list[Precision] | None:
    """ "fp32,int8" as a list without repetitions.

    Raises:
        UserError: an unknown name.
    """
    from edgekd.errors import UserError

    if text is None:
        return None
    known: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError("unknown precision", got=repr(name), expected=", ".join(known))
    return [name for name in known if name in names]


def measure_on_target(
    session: Session,
    entries: list[BenchArtifact],
    device: Device,
    out: Path,
    data: ExportData | None,
    precisions: list[Precision] | None,
    settings: Mapping[str, object],
    limit_s: float,
) -> None:
    """Bundle the artefacts (unless they are a bundle), measure them on the device, write and show the result."""
    import tempfile

    from edgekd.artifact import write_json
    from edgekd.console import Terminal
    from edgekd.device.bundle import is_bundle, make_bundle
    from edgekd.device.bundle_rows import table
    from edgekd.device.target import bench_on_target

    say = Terminal(session.quiet).note
    kind = (session.device or "auto").partition(":")[0]
    arguments = [f"--provider={kind}", *(f"{name}={value}" for name, value in settings.items() if value is not None)]
    if len(entries) == 1 and is_bundle(entries[0].path):
        result = bench_on_target(entries[0].path, device, arguments=arguments, limit_s=limit_s, say=say)
    else:
        with tempfile.TemporaryDirectory(prefix="edgekd-bundle-") as folder:
            made = make_bundle(entries, Path(folder) / "bundle", precisions=precisions, data=data, say=say)
            for note in made.notes:
                say(f"note: {note}")
            result = bench_on_target(made.folder, device, arguments=arguments, limit_s=limit_s, say=say)
    write_json(out, result)
    session.finish(result, lambda: typer.echo(f"{table(result)}\n\nresult: {out}"))
