"""`report.html`: one page without outside references or scripts, for a browser, a phone, dark mode and paper."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.artifact import write_text
from edgekd.bench.matching import Float64Array
from edgekd.bench.result import read_result
from edgekd.bench.saved import Saved, read_saved
from edgekd.errors import ArtifactError
from edgekd.report import plots, words
from edgekd.report.pictures import Example, examples_of
from edgekd.report.table import write_table_markdown
from edgekd.report.training import TrainingRun, accuracy_plot, loss_plot, run_facts, training_runs

__all__ = ["write_report", "write_table_markdown"]

WIDE, NARROW = 880.0, 326.0
_HERE = Path(__file__).resolve().parent
_MAX_RECIPE_CHARACTERS = 20_000


@dataclass
class _Found:
    """Everything that a report can be made of; all but the result may be missing."""

    result: Mapping[str, Any]
    saved: Saved | None = None
    examples: list[Example] = field(default_factory=list)
    runs: list[TrainingRun] = field(default_factory=list)
    recipe: str | None = None
    missing: list[str] = field(default_factory=list)


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Collect a folder's results into one HTML page, written atomically.

    Args:
        run_dir: what `edgekd run` made (with bench/result.json), a folder with a result.json, or that file itself.
        out: the page; report.html in the folder if left out.

    Returns:
        The page's path.

    Raises:
        ArtifactError: there is no result, or it cannot be read.
    """
    run_dir = Path(run_dir)
    file = _result_file(run_dir)
    folder = run_dir if run_dir.is_dir() else run_dir.parent
    out = folder / "report.html" if out is None else Path(out)
    write_text(out, render(_collect(folder, file)))
    return out


def _result_file(run_dir: Path) -> Path:
    candidates = [run_dir] if run_dir.is_file() else [run_dir / "bench" / "result.json", run_dir / "result.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ArtifactError(
        f"{run_dir}: nothing to report",
        got="a folder without bench/result.json or result.json" if run_dir.is_dir() else "no such folder",
        expected="what `edgekd run` or `edgekd bench` wrote",
        fix="run `edgekd run RECIPE --out DIR` or `edgekd bench ... --out DIR/result.json` first",
    )


def _collect(folder: Path, file: Path) -> _Found:
    found = _Found(read_result(file))
    names = found.result.get("files") or {}
    # Names in a result are joined bare, so that a stranger's file cannot point anywhere else.
    detections = file.parent / Path(str(names.get("detections", "detections.npz"))).name
    try:
        found.saved = read_saved(detections)
        found.examples = examples_of(file.parent / "examples", found.saved, _panels(found.result))
    except ArtifactError as error:
        found.missing.append(error.what)
    found.runs = training_runs(folder)
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        found.recipe = recipe.read_text(encoding="utf-8", errors="replace")[:_MAX_RECIPE_CHARACTERS]
    return found


def _panels(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The models whose detections are shown: the reference, or the other end of the table, and the student."""
    rows = result["rows"]
    student, reference = words.headline_student(rows), words.find(rows, result.get("reference"))
    shown = [row for row in (reference, student) if row is not None] or list(rows[:1])
    return [(row["name"], f"{words.subject(row, rows)[4:].capitalize()}") for row in shown]


def render(found: _Found) -> str:
    """The page's HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=words.number, points=words.points, ms=words.milliseconds, times=words.times, role=_role_name
    )
    environment.globals["role_class"] = plots.role_class
    environment.globals["mark_class"] = plots.mark_class
    environment.globals["dash_class"] = plots.dash_class
    result = found.result
    rows = result["rows"]
    student, reference = words.headline_student(rows), words.find(rows, result.get("reference"))
    compared = [row for row in rows if row["role"] != "teacher"] or rows
    figures = {name: tuple(Markup(picture) for picture in pair) for name, pair in _figures(found, compared).items()}
    examples = [(example, [(panel, Markup(panel.picture)) for panel in example.panels]) for example in found.examples]
    template = environment.from_string((_HERE / "page.html").read_text(encoding="utf-8"))
    return template.render(
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        result=result,
        data=result["data"],
        device=result["device"],
        settings=result["settings"],
        rows=rows,
        compared=compared,
        student=student,
        reference=reference,
        title=_title(found),
        answer=words.answer(result),
        gain=words.gain(result),
        comparisons=[(c, words.difference_points(c)) for c in result["comparisons"]],
        images=words.images(result),
        figures=figures,
        class_rest=_class_rest(compared),
        run_facts=run_facts(found.runs),
        runs=found.runs,
        examples=examples,
        recipe=found.recipe,
        missing=found.missing,
        commands=_commands(found),
    )


def _role_name(role: str) -> str:
    return words.ROLE_NAMES.get(role, role)


def _title(found: _Found) -> str:
    """The recipe's name, or the data's."""
    import yaml

    if found.recipe is not None:
        try:
            recipe = yaml.safe_load(found.recipe)
        except yaml.YAMLError:
            recipe = None
        if isinstance(recipe, dict) and isinstance(recipe.get("name"), str):
            return str(recipe["name"])
    return f"{found.result['data']['name']} {found.result['data']['split']}"


def _figures(found: _Found, compared: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Plots by name, each for a wide and a narrow page; a plot without data is left out."""
    rows = found.result["rows"]
    sizes = (WIDE, NARROW)
    figures: dict[str, tuple[str, ...]] = {}
    if any(row["map"]["ap50"] is not None for row in rows):
        figures["tradeoff"] = tuple(plots.tradeoff_plot(rows, size) for size in sizes)
    if rows:
        figures["stages"] = tuple(plots.stage_plot(rows, size) for size in sizes)
    samples: dict[str, Float64Array] = {}
    if found.saved is not None:
        samples = {row.name: row.stages_ms.sum(-1) for row in found.saved.rows if row.stages_ms.size}
    if any(row["name"] in samples for row in rows):
        figures["spread"] = tuple(plots.spread_plot(rows, samples, size) for size in sizes)
    if any(row.get("precision_at_recall") for row in rows):
        figures["recall"] = tuple(plots.recall_plot(rows, size) for size in sizes)
    if any(figure["ap50"] is not None for row in compared[:1] for figure in row["map"]["per_class"].values()):
        figures["classes"] = tuple(plots.class_plot(compared, size)[0] for size in sizes)
    if any(run.accuracy for run in found.runs):
        figures["accuracy"] = tuple(accuracy_plot(found.runs, size) for size in sizes)
    for index, run in enumerate(found.runs):
        if run.losses:
            figures[f"loss{index}"] = (loss_plot(run, 430.0), loss_plot(run, NARROW))
    return {name: (pair[0], pair[1]) for name, pair in figures.items()}


def _class_rest(compared: Sequence[Mapping[str, Any]]) -> int:
    figures = compared[0]["map"]["per_class"].values() if compared else ()
    return max(0, sum(figure["ap50"] is not None for figure in figures) - plots.MOST_CLASSES)


def _commands(found: _Found) -> list[str]:
    """What to type to get these figures again."""
    result = found.result
    settings, data = result["settings"], result["data"]
    commands = ["edgekd run recipe.yaml --out RUN"] if found.recipe is not None else []
    ensemble = result.get("ensemble")
    files = [
        shlex.quote(f"{row['role']}:{row['name']}={row['artifact']}")
        for row in result["rows"]
        if row["role"] != "ensemble"
    ]
    tail = [
        f"--data {shlex.quote(str(data['name']))} --split {shlex.quote(str(data['split']))}",
        f"--samples {settings['samples']} --warmup {settings['warmup_seconds']:g} --threads {settings['threads']} "
        f"--score {settings['score_threshold']:g} --iou {settings['nms_iou']:g} "
        f"--max-detections {settings['max_detections']} --seed {settings['seed']}"
        + (" --ensemble" if ensemble else ""),
        "--out result.json",
    ]
    commands.append(" \\\n    ".join(["edgekd bench", *files, *tail]))
    return commands
