"""`edgekd compare`: the student alone against each method, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from edgekd.cli.session import DeviceOption, JsonOption, QuietOption, SetOption, session_of
from edgekd.cli.train import JobsOption, OutOption
from edgekd.errors import UserError


def compare(
    context: typer.Context,
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes that differ in their method alone.", metavar="RECIPE…")
    ],
    out: OutOption,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, with commas between.", metavar="N,N")] = "0,1,2",
    launcher: Annotated[
        Literal["local", "ray"], typer.Option("--launcher", help="Here, or on an existing Ray cluster.")
    ] = "local",
    cpus: Annotated[float, typer.Option("--cpus", min=0.1, help="With ray: CPUs that each run takes.")] = 1.0,
    gpus: Annotated[
        float | None,
        typer.Option("--gpus", min=0, help="With ray: GPUs that each run takes; 1 if the cluster has any."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Do the INDEX-th of COUNT shares of the runs, no table.", metavar="INDEX/COUNT"),
    ] = None,
    jobs: JobsOption = None,
    sets: SetOption = None,
    json: JsonOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the student alone and with each recipe's method, over seeds, and say whether the gain is real.

    Every run writes its own result; the same command goes on where an earlier one was cut off.
    """
    session = session_of(context)
    if jobs is not None and (only is not None or launcher == "ray"):
        raise UserError(
            "--jobs goes with neither --only nor --launcher ray",
            fix="start one process a share; Ray is told by --cpus how many runs fit a machine",
        )
    session.resume_hint = f"what is done is in {out}; the same command goes on from there"
    from edgekd.compare import CompareJob, one_by_one
    from edgekd.compare import compare as compare_job
    from edgekd.recipe_file import load_recipe

    try:
        numbers = tuple(int(part) for part in seeds.split(","))
    except ValueError as error:
        raise UserError("--seeds is not a list of whole numbers", got=seeds, expected="such as 0,1,2") from error
    checked = tuple(load_recipe(path, session.overrides, needs=("data", "student", "teachers")) for path in recipes)
    job = CompareJob(checked, numbers, out.resolve(), session.device or "auto", session.quiet)
    if only is not None:
        done = [str(run) for run in one_by_one(job, job.runs[_share(only)])]
        session.finish({"done": done}, lambda: typer.echo(f"done: {'; '.join(done) or 'no runs in this share'}"))
        return
    if launcher == "ray":
        from edgekd.cluster import Resources, on_ray

        result = compare_job(job, on_ray(job, Resources(cpus, gpus)))
    else:
        result = compare_job(job, jobs=jobs)

    def show() -> None:
        typer.echo(result.table)
        typer.echo(f"plot: {out / 'comparison.svg'}")

    session.finish(dict(result.data), show)


def _share(only: str) -> slice:
    """ "2/8" to every eighth run from the third on."""
    index, _, count = only.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError("--only is not INDEX/COUNT", got=only, expected="such as 0/6, 1/6, ... 5/6")
    return slice(int(index), None, int(count))
