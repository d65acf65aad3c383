"""`edgekd compare`: the student alone against each method, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.session import DeviceOption, JsonOption, QuietOption, SetOption, session_of
from edgekd.cli.train import OutOption


def compare(
    context: typer.Context,
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes that differ in their method alone.", metavar="RECIPE…")
    ],
    out: OutOption,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, with commas between.", metavar="N,N")] = "0,1,2",
    sets: SetOption = None,
    json: JsonOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the student alone and with each recipe's method, over seeds, and say whether the gain is real.

    Every run writes its own result; the same command goes on where an earlier one was cut off.
    """
    session = session_of(context)
    session.merge(sets=sets, json=json, device=device, quiet=quiet)
    session.resume_hint = f"what is done is in {out}; the same command goes on from there"
    from edgekd.compare import compare_recipes
    from edgekd.errors import UserError
    from edgekd.recipe_file import load_recipe

    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError as error:
        raise UserError("--seeds is not a list of whole numbers", got=seeds, expected="such as 0,1,2") from error
    checked = [load_recipe(path, session.overrides, needs=("data", "student", "teachers")) for path in recipes]
    result = compare_recipes(checked, numbers, out, device=session.device or "auto", quiet=session.quiet)

    def show() -> None:
        typer.echo(result.table)
        typer.echo(f"plot: {out / 'comparison.svg'}")

    session.finish(dict(result.data), show)
