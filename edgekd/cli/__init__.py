"""The command line. Commands import what they need when they run, so that `--help` needs only Typer."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated

import typer

from edgekd import __version__
from edgekd.cli import bench, bundle, compare, data, deploy, init, plan, predict, recipes, train
from edgekd.cli.session import (
    CommandGroup,
    DebugOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    SeedOption,
    SetOption,
    session_of,
)
from edgekd.errors import UserError
from edgekd.torchrun import launched

__all__ = ["app", "main"]

app = typer.Typer(
    name="edgekd",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil an ensemble of object detectors into one small student, and prove it on the device.",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"edgekd {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    json: JsonOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    sets: SetOption = None,
) -> None:
    session_of(context)
    if launched() and context.invoked_subcommand not in ("train", "distill"):
        raise UserError(
            f"edgekd {context.invoked_subcommand} is for one process",
            got=f"one of {os.environ['WORLD_SIZE']} that torchrun started",
            expected="edgekd train or edgekd distill under torchrun",
        )


app.command()(deploy.doctor)
app.command()(init.init)
app.add_typer(data.app, name="data")
app.command()(plan.plan)
app.command()(train.train)
app.command()(train.distill)
app.command()(deploy.quantize)
app.command()(deploy.export)
app.command()(bundle.bundle)
app.command()(bench.bench)
app.command()(predict.predict)
app.command()(train.run)
app.command()(compare.compare)
app.command()(deploy.report)
app.add_typer(recipes.app, name="recipe")


def main() -> None:
    """Entry point of the `edgekd` command."""
    # OpenMP's threads spin for milliseconds while they wait for each other. Beside other work that takes the cores from, it
    # makes a training step twice as slow. Without any spin a thread sleeps between any two layers, and small networks on an
    # idle machine are up to three times slower. A short spin costs neither (benchmarks/thread_spinning.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # As Ctrl-C: temporary files are removed, and processes of this one's end, each after its step, before it does. Not of
    # several that torchrun has started: it ends the others when one fails, and these may wait where no signal is seen.
    if not launched():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    # An encoding that lacks a sign of a table, or of a file's name, is no reason to fail when all is done.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="edgekd")
