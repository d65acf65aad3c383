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
    recipes: Annotated[list[Path], typer.Argument(help="Recipes, such as recipes/demo.yaml.", metavar="RECIPE...")],
    files: Annotated[bool, typer.Option("--files/--no-files", help="Also check that its files are there.")] = True,
    sets: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a recipe and print it with every default filled in; of several, say of each whether it is right."""
    session = session_of(context)
    from edgekd.errors import RecipeError
    from edgekd.recipe_file import dump_recipe, load_recipe

    needs = ("data", "student", "teacher-files") if files else ()
    if len(recipes) == 1:
        checked = load_recipe(recipes[0], session.overrides, needs=needs)
        session.finish(checked.model_dump(mode="json"), lambda: typer.echo(dump_recipe(checked, Path.cwd()), nl=False))
        return
    rows, problems = dict[str, object](), list[object]()
    for path in recipes:
        try:
            rows[str(path)] = load_recipe(path, session.overrides, needs=needs).model_dump(mode="json")
            if not (session.json or session.quiet):
                typer.echo(f"{path}: ok")
        except RecipeError as error:
            typer.echo(f"error: {error}", err=True)
            rows[str(path)], problems = None, [*problems, *(error.problems or (error,))]
    session.finish({"recipes": rows, "problems": [str(problem) for problem in problems]}, lambda: None)
    if None in rows.values():
        raise typer.Exit(2)


@app.command()
def schema(context: typer.Context, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Print the JSON schema of recipes, for editors."""
    session = session_of(context)
    session.merge(json=True)  # the schema is a JSON document whatever is asked for
    from edgekd.recipe_file import recipe_schema

    session.finish(recipe_schema(), lambda: None)
