"""`edgekd recipe`: check a recipe without running it, and print its JSON schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.session import JsonOption, QuietOption, SetOption, session_of

app = typer.Typer(no_args_is_help=True, help="Check a recipe, or print its JSON schema.")


@app.command()
def check(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.yaml.")],
    files: Annotated[bool, typer.Option("--files/--no-files", help="Also check that its files are there.")] = True,
    sets: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a recipe and print it with every default filled in."""
    session = session_of(context)
    from edgekd.recipe_file import dump_recipe, load_recipe

    checked = load_recipe(recipe, session.overrides, needs=("data", "student", "teacher-files") if files else ())
    session.finish(checked.model_dump(mode="json"), lambda: typer.echo(dump_recipe(checked, Path.cwd()), nl=False))


@app.command()
def schema(context: typer.Context, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Print the JSON schema of recipes, for editors."""
    session = session_of(context)
    session.merge(json=True)  # the schema is a JSON document whatever is asked for
    from edgekd.recipe_file import recipe_schema

    session.finish(recipe_schema(), lambda: None)
