"""`edgekd data`: make, check, convert and fetch data sets."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.session import DeviceOption, JsonOption, QuietOption, SeedOption, SetOption, refuse_idle, session_of
from edgekd.errors import DataError, UserError

if TYPE_CHECKING:
    from edgekd.data.check import CheckReport
_IN_A_RECIPE = (
    "`data label` takes it from a recipe in place of the folder: name: label; data: {root: DIR, classes: [...]}; student: "
    "{model: mobilenetv2-ssd-lite}, which it does not look at; teachers: [{name: one, onnx: FILE, class_names: [...]}]"
)

app = typer.Typer(no_args_is_help=True, help="Make, check, convert and fetch data sets.")

FormatOption = Annotated[str, typer.Option("--format", help="auto, voc, coco or yolo.", metavar="NAME")]
TeacherOption = Annotated[
    list[Path] | None,
    typer.Option("--teacher", "-t", help="A detector as ONNX, or a run of edgekd; repeatable.", metavar="FILE|RUN"),
]
SplitsOption = Annotated[list[str] | None, typer.Option("--split", help="Only this split; repeatable.", metavar="NAME")]


@app.command()
def make(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the data set.", metavar="DIR")],
    train: Annotated[int, typer.Option("--train", min=0, help="Training images.")] = 800,
    val: Annotated[int, typer.Option("--val", min=0, help="Validation images.")] = 200,
    test: Annotated[int, typer.Option("--test", min=0, help="Test images.")] = 0,
    seed: SeedOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw synthetic scenes with several classes as a VOC data set; the same from the same seed on any machine."""
    session = session_of(context)
    from edgekd.console import Terminal
    from edgekd.data.scenes import SCENE_CLASSES, make_scenes
    from edgekd.machine import usable_threads

    counts = {name: count for name, count in (("train", train), ("val", val), ("test", test)) if count}
    cores = min(8, usable_threads()) if sum(counts.values()) >= 100 else 1  # starting processes takes a second or two
    with Terminal(session.quiet).counting("scenes") as progress:
        root = make_scenes(out, counts=counts, seed=session.seed or 0, processes=cores, progress=progress)
    body = {"root": str(root), "format": "voc", "classes": list(SCENE_CLASSES), "images": counts, "synthetic": True}
    what = ", ".join(f"{count} {name}" for name, count in counts.items())
    session.finish(body, lambda: typer.echo(f"{root}: synthetic scenes, {what} images"))


@app.command()
def check(
    context: typer.Context,
    root: Annotated[Path, typer.Argument(help="The data set's folder.", metavar="DIR")],
    format: FormatOption = "auto",
    split: SplitsOption = None,
    classes: Annotated[str | None, typer.Option("--classes", help="Class names, with commas.", metavar="A,B")] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            "--sheet", help="Draw a contact sheet of images with boxes (? difficult, * crowd).", metavar="FILE.png"
        ),
    ] = None,
    most: Annotated[int, typer.Option("--max-problems", min=0, help="Most problems printed; --json has all.")] = 100,
    seed: SeedOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Count and measure a data set and name every bad file; exits 2 if training on it would be wrong."""
    session = session_of(context)
    from edgekd.artifact import require_file
    from edgekd.console import Terminal
    from edgekd.data.check import check_dataset

    if sheet is not None:
        require_file(sheet, (".png", ".jpg", ".jpeg", ".webp"))
    names = [name.strip() for name in classes.split(",")] if classes else None
    terminal = Terminal(session.quiet)
    with terminal.counting("images") as progress:
        report = check_dataset(root, format=format, splits=split, class_names=names, progress=progress)
    drawn = None
    if sheet is not None and report.splits:
        try:
            drawn = _draw_sheet(report, sheet, session.seed or 0)
        except DataError as error:  # the report says why the set cannot be read whole
            terminal.warn(f"no contact sheet: {error}")
    body = {**report.to_dict(), "contact_sheet": None if drawn is None else str(drawn)}
    session.finish(body, lambda: typer.echo(report.text(most) + (f"\ncontact sheet: {drawn}" if drawn else "")))
    if session.quiet:
        for problem in (report.errors + report.warnings)[:most]:
            typer.echo(f"{problem.rule.severity}: {problem}", err=True)
    if not report.ok:
        raise typer.Exit(2)


def _draw_sheet(report: CheckReport, path: Path, seed: int) -> Path:
    from edgekd.data import read_dataset
    from edgekd.data.check import write_contact_sheet

    largest = max(report.splits, key=lambda split: split.images).name
    dataset = read_dataset(report.root, largest, format=report.format, class_names=report.class_names)
    if path.exists() and _is_image_of(path, report):
        raise UserError(f"--sheet {path} is an image of the data set", fix="give it a name of its own")
    return write_contact_sheet(dataset, path, seed=seed)


def _is_image_of(path: Path, report: CheckReport) -> bool:
    from edgekd.data.reading import open_source

    source = open_source(report.root, report.format)
    images = (raw.path for split in source.splits() for raw in source.scan(split, []))
    return any(path.name == image.name and image.exists() and path.samefile(image) for image in images)


@app.command()
def split(
    context: typer.Context,
    root: Annotated[Path, typer.Argument(help="The data set's folder.", metavar="DIR")],
    val: Annotated[float, typer.Option("--val", min=0, max=1, help="Share of the images for validation.")] = 0.2,
    test: Annotated[float, typer.Option("--test", min=0, max=1, help="Share of the images for the test.")] = 0.0,
    format: FormatOption = "auto",
    part: Annotated[
        str | None,
        typer.Option("--from", help="Divide this split of a set that has some; needs --out.", metavar="NAME"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a new data set there instead.", metavar="DIR")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="With --out: hard-link the images, not copy them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; show what would be.")] = False,
    seed: SeedOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw splits for a data set that lacks them, every class spread over them and equal pictures kept together.

    Writes the files that name the splits and touches nothing else. A set with a split `train` but nothing to measure on:
    --from train --out NEW writes another one in the same layout, with `train` divided and its other splits as they are.
    """
    session = session_of(context)
    refuse_idle(context, {"--out": {"link"} if out is None else ()})
    from dataclasses import asdict

    from edgekd.console import Terminal
    from edgekd.data.split import split_dataset

    with Terminal(session.quiet).counting("images") as progress:
        report = split_dataset(
            root,
            val=val,
            test=test,
            seed=session.seed or 0,
            format=format,
            part=part,
            out=out,
            link=link,
            dry_run=dry_run,
            progress=progress,
        )
    body = {
        **asdict(report),
        "root": str(root),
        "files": [str(path) for path in report.files],
        "problems": [problem.to_dict() for problem in report.problems],
        "dry_run": dry_run,
    }

    def show() -> None:
        for problem in report.problems[:20]:
            typer.echo(f"note: {problem}", err=True)
        for name, images in report.images.items():
            objects = ", ".join(f"{label} {count}" for label, count in sorted(report.objects[name].items()))
            typer.echo(f"{name}: {images} images; {objects or 'no objects'}")
        if report.duplicates:
            typer.echo(f"{report.duplicates} images have the pixels of another one: they stay together")
        if report.left_out:
            typer.echo(f"left out: {', '.join(report.left_out)} (no images, or some of those divided)")
        typer.echo(f"{'would write' if dry_run else 'written'}: {', '.join(map(str, report.files))}")

    session.finish(body, show)


@app.command()
def label(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of images; or a recipe with data.root, data.classes and teachers.", metavar="DIR|RECIPE"
        ),
    ],
    teacher: TeacherOption = None,
    classes: Annotated[str | None, typer.Option("--classes", help="What to find, with commas.", metavar="A,B")] = None,
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Lowest score that becomes a label.")] = 0.5,
    sets: SetOption = None,
    json: JsonOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Have teachers annotate a folder of images that has no annotations; `data split`, `init` and `run` come next.

    A recipe says what a folder, --teacher and --classes cannot, such as what an ONNX file's outputs are.

    Writes instances_all.json (COCO) into the folder. Figures on such labels say how far a student agrees with its
    teachers, not how often it is right: correct at least the validation part by hand.
    """
    session = session_of(context)
    from edgekd.console import Terminal
    from edgekd.labelling import label_images, recipe_of
    from edgekd.recipe_file import load_recipe

    if source.is_dir() or (teacher and not source.exists()):
        refuse_idle(context, {"a recipe": {"sets"}})
        names = [name.strip() for name in (classes or "").split(",") if name.strip()]
        checked = recipe_of(source, teacher or (), names)
    else:
        refuse_idle(context, {"a folder of images": {"teacher", "classes"}})
        checked = load_recipe(source, session.overrides, needs=("data", "teachers"))
    terminal = Terminal(session.quiet)
    try:
        with terminal.counting("images") as progress:
            report = label_images(
                checked, score=score, device=session.device or "auto", progress=progress, note=terminal.note
            )
    except UserError as error:
        if not (teacher and "declare" in (error.fix or "")):
            raise
        # --classes says here what to find, and nothing of a file
        raise UserError(
            error.what, got=error.got, expected=error.expected, fix=f"{error.fix}. {_IN_A_RECIPE}"
        ) from error
    for path, reason in report.failures.items():
        terminal.warn(f"left out: {reason if path in reason else f'{path}: {reason}'}")
    if report.unknown:
        terminal.warn(f"no teacher knows {', '.join(report.unknown)}: nothing is labelled so")
    root = shlex.quote(str(source if source.is_dir() else report.file.parent))

    def show() -> None:
        objects = ", ".join(f"{name} {count}" for name, count in report.objects.items()) or "nothing found"
        typer.echo(f"{report.file}: {report.images} images; {objects}")
        look = f"edgekd data check {root} --sheet sheet.png"
        typer.echo(f"These are the teachers' opinions, which nobody has checked: look at them with `{look}`.")
        typer.echo(f"next: edgekd data split {root} --val 0.2")

    session.finish(report.to_dict(), show)


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="The data set's folder.", metavar="DIR")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the converted data set.", metavar="DIR")],
    to: Annotated[str, typer.Option("--to", help="voc, coco or yolo.", metavar="NAME")],
    format: FormatOption = "auto",
    split: SplitsOption = None,
    link: Annotated[bool, typer.Option("--link", help="Hard-link the images instead of copying them.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a data set in another layout, without loss of what edgekd reads.

    That is images, boxes, classes, ids, difficult and crowd; not masks, keypoints, or marks such as truncated.
    """
    session = session_of(context)
    from edgekd.data.convert import convert_dataset

    report = convert_dataset(source, out, to, format=format, splits=split, link=link)
    problems = [problem.to_dict() for problem in report.problems]
    body = {
        "out": str(report.out),
        "format": report.format,
        "images": dict(report.images),
        "objects": dict(report.objects),
        "problems": problems,
    }

    def show() -> None:
        for problem in report.problems[:20]:
            typer.echo(f"note: {problem}", err=True)
        if len(problems) > 20:
            typer.echo(f"note: and {len(problems) - 20} more; `edgekd data check` names each", err=True)
        for name, images in report.images.items():
            typer.echo(f"{report.out}: {report.format}, {name}: {images} images, {report.objects[name]} objects")

    session.finish(body, show)


@app.command()
def fetch(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="voc2007, voc2012 or coco2017.", metavar="NAME")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the data set.", metavar="DIR")],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Download a public data set from its official place; resumes, verifies, and tells how to do it by hand."""
    session = session_of(context)
    session.resume_hint = "the same command goes on with the download"
    from edgekd.console import Terminal
    from edgekd.data.fetch import fetch as fetch_dataset

    root = fetch_dataset(name, out, progress=Terminal(session.quiet).staged())
    session.finish({"name": name, "root": str(root)}, lambda: typer.echo(str(root)))
