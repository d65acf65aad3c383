"""`edgekd plan`: which students fit a latency budget on the very device, and recipes to distil them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from edgekd.cli.artifacts import FormatOption, Target, ThreadsOption
from edgekd.cli.bundle import ON_DEVICE, SshConfigOption, TargetOption, TargetPythonOption, precisions_of
from edgekd.cli.session import DeviceOption, JsonOption, QuietOption, SetOption, refuse_idle, session_of

if TYPE_CHECKING:
    from edgekd.device.target import Target as Device
    from edgekd.plan.job import Asked
    from edgekd.plan.measure import Layout
    from edgekd.recipe import DataConfig
    from edgekd.types import Dataset

CANDIDATES = "Candidates"
_GENERIC_CLASSES = 20


def plan(
    context: typer.Context,
    max_latency_ms: Annotated[
        float, typer.Option("--max-latency-ms", min=0.01, help="Most milliseconds an image, from pixels to boxes.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for recipes and plan.json.", metavar="DIR")],
    teachers: Annotated[
        list[Path] | None,
        typer.Option("--teachers", help="A recipe to take data and teachers from; repeatable.", metavar="RECIPE"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A data set (VOC, COCO or YOLO): its images and classes.", metavar="DIR"),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split to take images from; the training one if not given.")
    ] = None,
    format: FormatOption = "auto",
    threads: ThreadsOption = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=1, help="Seconds after which nothing more is measured.")
    ] = 300.0,
    top: Annotated[int, typer.Option("--top", min=1, help="Recipes to write.")] = 6,
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, fp16, int8, with commas.", rich_help_panel=CANDIDATES)
    ] = "fp32,int8",
    models: Annotated[
        str | None, typer.Option("--models", help="With commas; every family if not given.", rich_help_panel=CANDIDATES)
    ] = None,
    widths: Annotated[
        str | None, typer.Option("--widths", help="Such as 0.5,1; 0.35 to 1.4.", rich_help_panel=CANDIDATES)
    ] = None,
    input_sizes: Annotated[
        str | None, typer.Option("--input-sizes", help="Such as 224,320; 160 to 416.", rich_help_panel=CANDIDATES)
    ] = None,
    int8_layout: Annotated[
        Target | None,
        typer.Option(
            "--int8-layout", help="x86 here and tensorrt on a --target, if not given.", rich_help_panel=CANDIDATES
        ),
    ] = None,
    target: TargetOption = None,
    target_python: TargetPythonOption = "python3",
    ssh_config: SshConfigOption = None,
    host_ms: Annotated[
        float,
        typer.Option(
            "--host-ms",
            min=0,
            help="With --target, where inference alone is timed: to be left for preparing images and NMS.",
            rich_help_panel=ON_DEVICE,
        ),
    ] = 0.0,
    sets: SetOption = None,
    json: JsonOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Find the largest students that fit a latency budget, by measuring untrained ones, and write recipes to distil them.

    Accuracy is not measured: of what fits, the network with more multiply-accumulates is taken for the abler one. Cut it
    off at any time: the same command goes on where it was.
    """
    session = session_of(context)
    refuse_idle(
        context,
        {
            "--target": {"target_python", "ssh_config", "host_ms"} if target is None else (),
            "--data": {"format"} if data is None else (),
            "--teachers": {"sets"} if not teachers else (),
            "--data or --teachers": {"split"} if data is None and not teachers else (),
        },
    )
    from edgekd.bench.roof import cpu_roof
    from edgekd.console import Terminal
    from edgekd.device.target import parse_target
    from edgekd.machine import usable_threads
    from edgekd.plan.candidates import INPUT_SIZES, WIDTHS, grid
    from edgekd.plan.job import Asked, make_plan
    from edgekd.plan.recipes import combined
    from edgekd.plan.table import plan_text
    from edgekd.recipe import MODELS
    from edgekd.recipe_file import load_recipe
    from edgekd.workspace import locked

    terminal = Terminal(session.quiet)
    base = combined([load_recipe(path, session.overrides, needs=("data", "teacher-files")) for path in teachers or ()])
    section = _data_section(data, format) if data is not None else None
    images = _images(section or (base.data if base is not None else None), split)
    names = images.class_names if images is not None else tuple(f"class{i}" for i in range(_GENERIC_CLASSES))
    there = None if target is None else parse_target(target, python=target_python, ssh_config=ssh_config)
    layout: Layout = int8_layout or ("x86" if there is None else "tensorrt")
    asked = Asked(
        max_latency_ms,
        threads if there is not None else threads or usable_threads(),
        time_limit,
        top,
        there,
        host_ms,
        layout,
        _arguments(there, session.device, threads),
    )
    session.resume_hint = f"the same command goes on with what is in {out / 'plan.json'}"
    with locked(out), terminal.counting("counting MACs") as progress:
        candidates = grid(
            [name.strip() for name in models.split(",")] if models else MODELS,
            _numbers("--widths", widths, float) or WIDTHS,
            _numbers("--input-sizes", input_sizes, int) or INPUT_SIZES,
            precisions_of(precision) or ["fp32"],
            names,
            most_macs=_most_macs(asked, cpu_roof(asked.threads)) if there is None else None,
            progress=progress,
        )
        found = make_plan(
            candidates,
            asked,
            out,
            class_names=names,
            images=images,
            base=base,
            data=section,
            say=terminal.note,
        )
    session.finish(found, lambda: typer.echo(f"{plan_text(found)}\n\nplan: {out / 'plan.json'}"))


def _most_macs(asked: Asked, roof: dict[str, object]) -> float | None:
    """More than the machine's peak could do in the budget."""
    peaks = roof["gmacs_per_s"]
    assert isinstance(peaks, dict)
    known = [peak for peak in peaks.values() if peak is not None]
    return asked.budget_ms * max(known) * 1e6 if known else None


def _data_section(root: Path, format: str) -> DataConfig:
    """A recipe's `data` for a folder, with its own names for the splits."""
    from edgekd.data import list_splits
    from edgekd.data.layout import usual_split
    from edgekd.recipe import DataConfig

    there = list_splits(root, format)
    train, val = (
        usual_split(names, there, root) or there[position]
        for names, position in ((("train", "trainval"), 0), (("val", "test"), -1))
    )
    return DataConfig.model_validate({"root": str(root.resolve()), "format": format, "train": train, "val": val})


def _images(section: DataConfig | None, split: str | None) -> Dataset | None:
    from edgekd.data import read_dataset

    if section is None:
        return None
    return read_dataset(section.root, split or section.train, format=section.format, class_names=section.classes)


def _arguments(target: Device | None, device: str | None, threads: int | None) -> tuple[str, ...]:
    """Of the bundle's bench.py: short, since there are many candidates."""
    if target is None:
        return ()
    kind = (device or "auto").partition(":")[0]
    short = ("--samples=60", "--seconds=0", "--warmup=0.3", "--energy-seconds=0")
    return (f"--provider={kind}", *short, *(() if threads is None else (f"--threads={threads}",)))


Number = TypeVar("Number", int, float)


def _numbers(option: str, text: str | None, kind: type[Number]) -> list[Number]:
    """ "0.5,1" as numbers.

    Raises:
        UserError: it is something else.
    """
    from edgekd.errors import UserError

    try:
        return [kind(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option}: not {what} with commas between", got=text) from error
