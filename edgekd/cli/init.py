"""`edgekd init`: the recipe that suits a data set and its teachers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.artifacts import ClassesOption, DeclareOption, OutputOption, foreign_options, refuse_declared
from edgekd.cli.data import FormatOption, TeacherOption
from edgekd.cli.session import DeviceOption, JsonOption, QuietOption, session_of
from edgekd.errors import UserError


def init(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="The data set's folder: VOC, COCO or YOLO layout.", metavar="DATA")],
    teacher: TeacherOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write.", metavar="FILE")] = Path(
        "recipe.yaml"
    ),
    student: Annotated[str, typer.Option("--student", help="What is to be trained.", metavar="MODEL")] = (
        "mobilenetv2-ssd-lite"
    ),
    input_size: Annotated[
        int, typer.Option("--input-size", min=64, max=1280, help="Side of the student's input, pixels.")
    ] = 320,
    classes: ClassesOption = None,
    output: OutputOption = None,
    declare: DeclareOption = None,
    format: FormatOption = "auto",
    train: Annotated[str | None, typer.Option("--train", help="Split to train on.", metavar="NAME")] = None,
    val: Annotated[str | None, typer.Option("--val", help="Split to measure on.", metavar="NAME")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the recipe.")] = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Look at a data set and at detectors that may teach, and write the short recipe that suits them.

    Says now what `edgekd run` would say in an hour: a set without splits, a teacher that is not recognised, read wrongly,
    or knows none of the classes. What an ONNX file does not say of itself is declared with --classes, --output and
    --declare, for every ONNX file given. Without teachers the recipe trains two of its own.
    """
    session = session_of(context)
    from edgekd.artifact import require_file
    from edgekd.console import Terminal
    from edgekd.first_recipe import Asked, propose, write_recipe
    from edgekd.training.setup import uses_gpu

    require_file(out)
    if out.exists() and not force:
        raise UserError(f"{out} is there already", fix="give another --out, or --force to overwrite it")
    terminal = Terminal(session.quiet)
    on_gpu = uses_gpu(session.device or "auto")
    options = foreign_options(Path("teacher.onnx"), classes, output, None, declare)
    declared = {} if options is None else options.model_dump(exclude_unset=True, exclude={"name", "onnx"})
    asked = Asked(data, out, tuple(teacher or ()), declared, student, input_size, format, train, val, on_gpu)
    refuse_declared(context, asked.teachers, ("classes", "output", "declare"))  # its --input-size is the student's
    found = propose(asked, terminal)
    for note in found.notes:
        terminal.note(note)
    for warning in found.warnings:
        terminal.warn(warning)
    write_recipe(found, out)
    name = found.values["name"]
    words = ["edgekd", "run", str(out), "--out", f"runs/{name}"]
    words += [] if session.device in (None, "auto") else ["--device", session.device]
    body = {
        "recipe": str(out),
        "values": found.values,
        "reasons": {".".join(map(str, place)): why for place, why in found.reasons.items()},
        "notes": found.notes,
        "warnings": found.warnings,
        "next": words,
    }
    session.finish(body, lambda: typer.echo(f"{found.text}\nwritten: {out}\nnext:    {shlex.join(words)}"))
