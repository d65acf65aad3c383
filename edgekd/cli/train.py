"""`edgekd train`, `edgekd distill`, `edgekd run`: what a recipe does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.session import (
    DeviceOption,
    JsonOption,
    QuietOption,
    SeedOption,
    Session,
    SetOption,
    session_of,
)

if TYPE_CHECKING:
    from edgekd.training.train import RunResult

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.yaml.", metavar="RECIPE")]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", min=1, help="Trainings and exports at once; by default as a CPU has cores and memory."
    ),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for what is made.", metavar="DIR")]


def train(
    context: typer.Context,
    recipe: RecipeArgument,
    out: OutOption,
    sets: SetOption = None,
    json: JsonOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the recipe's student alone, on ground truth. The same command resumes a run that was cut off."""
    session = _begin(context, out)
    from edgekd.recipe_file import load_recipe
    from edgekd.stages import train_student
    from edgekd.workspace import open_workspace

    checked = load_recipe(recipe, session.overrides, needs=("data", "student"))
    with open_workspace(checked, out, device=session.device or "auto", quiet=session.quiet) as work:
        _finish_run(session, train_student(work, out))


def distill(
    context: typer.Context,
    recipe: RecipeArgument,
    out: OutOption,
    sets: SetOption = None,
    json: JsonOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the recipe's student with its teachers; teachers that are to be trained come first, in DIR/teachers."""
    session = _begin(context, out)
    from edgekd.recipe_file import load_recipe
    from edgekd.stages import distill_student, ready_teachers
    from edgekd.teaching import check_setup
    from edgekd.workspace import open_workspace

    checked = load_recipe(recipe, session.overrides, needs=("data", "student", "teachers"))
    with open_workspace(checked, out, device=session.device or "auto", quiet=session.quiet) as work:
        check_setup(work)
        teachers = ready_teachers(work, out / "teachers")
        _finish_run(session, distill_student(work, teachers, out, answers=out / "answers"))


def run(
    context: typer.Context,
    recipe: RecipeArgument,
    out: OutOption,
    sets: SetOption = None,
    json: JsonOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    jobs: JobsOption = None,
) -> None:
    """Do all of a recipe: teachers, student alone, distilled student, export, benchmark, report.

    Stages whose inputs have not changed are skipped, and what was cut off is resumed.
    """
    session = _begin(context, out)
    from edgekd.pipeline import run_recipe
    from edgekd.recipe_file import load_recipe

    checked = load_recipe(recipe, session.overrides, needs=("data", "student", "teachers"))
    result = run_recipe(checked, out, device=session.device or "auto", quiet=session.quiet, jobs=jobs)

    def show() -> None:
        typer.echo(result.table)
        typer.echo(f"\nreport: {result.report}")

    session.finish(result.to_dict(), show)
    if result.failures:
        raise typer.Exit(1)


def _begin(context: typer.Context, out: Path) -> Session:
    from edgekd.recipe_file import refuse_own_recipe

    session = session_of(context)
    refuse_own_recipe(out)
    session.resume_hint = f"what is done is in {out}; the same command goes on from there"
    return session


def _finish_run(session: Session, result: RunResult) -> None:
    def show() -> None:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items() if isinstance(v, int | float))
        typer.echo(
            f"{'nothing to do: ' if result.skipped else ''}{result.model}" + (f" ({figures})" if figures else "")
        )

    body = {"run": str(result.folder), "model": str(result.model), "metrics": result.metrics, "skipped": result.skipped}
    session.finish(body, show)
