"""`report.html`: one page that asks nothing of a network, for a browser, a phone, dark mode and paper."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.artifact import require_file, versions, write_text
from edgekd.data.problems import printable
from edgekd.errors import ArtifactError
from edgekd.report import bars, dots, marks, words
from edgekd.report.commands import commands_of
from edgekd.report.figures import absent, compared, draw_all, profiled
from edgekd.report.pictures import Example, examples_of
from edgekd.report.sources import Sources, collect
from edgekd.report.table import write_table
from edgekd.report.training import run_facts

_TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_report(
    paths: Path | Sequence[Path],
    out: Path | None = None,
    tables: Sequence[Path] = (),
    warn: Callable[[str], None] = lambda _: None,
) -> Path:
    """Collect results into one HTML page, written atomically.

    Args:
        paths: what `edgekd run`, `bench` or `compare` wrote: folders, or result files. The first is what the page is about.
        out: the page; report.html in the first folder if left out.
        tables: the comparison as .md, .csv or .tex as well.
        warn: told of what should not go unseen, which the page says too.

    Returns:
        The page's path.

    Raises:
        ArtifactError: there is no result, or one that was named cannot be read. UserError: a table of another format.
    """
    sources = collect([paths] if isinstance(paths, Path) else paths)
    if sources.outdated is not None:
        warn(sources.outdated)
    out = sources.folder / "report.html" if out is None else Path(out)
    require_file(out, (".html", ".htm"))
    for file in tables:
        require_file(file)
    if tables:
        if sources.result is None:
            raise ArtifactError("there is no benchmark to make a table of", expected="a result.json of `edgekd bench`")
        texts = [write_table(sources.result, file.suffix) for file in tables]
        for file, text in zip(tables, texts, strict=True):
            write_text(file, text)
    write_text(out, render(sources))
    return out


def render(sources: Sources) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        number=words.number, points=words.points, ms=words.milliseconds, times=words.times, signed=words.signed,
        role=lambda role: words.ROLE_NAMES.get(role, role),
    )  # fmt: skip
    environment.globals.update(
        role_class=marks.role_class, mark_class=marks.mark_class, dash_class=marks.dash_class,
        stage_classes=bars.STAGE_CLASSES, sizes=dots.SIZES, nothing=words.NOTHING, slowest_layers=bars.slowest_layers,
    )  # fmt: skip
    figures = {name: tuple(map(Markup, pair)) for name, pair in draw_all(sources).items()}
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("page.html").render(
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        title=_title(sources),
        made_by=versions().get("edgekd"),
        figures=figures,
        runs=sources.runs,
        run_facts=run_facts(sources.runs),
        devices=[(name, device, words.device_answer(device)) for name, device in sources.devices],
        comparisons=[(name, found, words.comparison_answer(found)) for name, found in sources.comparisons],
        method_gain=words.method_gain,
        caveats=words.caveats,
        more_seeds=words.more_seeds,
        interval=words.interval,
        videos=sources.videos,
        recipe=sources.recipe,
        problems=sources.problems,
        outdated=sources.outdated,
        absent=absent(sources, figures),
        commands=commands_of(sources),
        **_of_result(sources, Markup),
    )
    return printable(page)  # names of files need not be UTF-8


def _of_result(sources: Sources, markup: Any) -> dict[str, Any]:
    """What the page says of a benchmark; all None or empty without one."""
    result = sources.result
    if result is None:
        first = [words.comparison_answer(c) for _, c in sources.comparisons]
        first += [words.device_answer(d) for _, d in sources.devices]
        synthetic = any(c["data"]["synthetic"] for _, c in sources.comparisons)
        return {"result": None, "answer": (first or [_video_answer(sources)])[0], "gain": None, "synthetic": synthetic,
                "examples": [], "agreement": None, "student": None, "reference": None}  # fmt: skip
    rows = result["rows"]
    student, reference = words.headline_student(rows), words.find(rows, result["reference"])
    pictured = sources.examples[1] if sources.examples else None
    two = _pictured(result)
    ends = [_called(row) for row in two]
    if len(set(ends)) < len(two):
        ends = [str(row["name"]) for row in two]
    counted = pictured and len(ends) == 2 and any(pictured["agreement"]["objects"].values())
    some = compared(rows)
    return {
        "result": result,
        "answer": words.answer(result),
        "gain": words.gain(result),
        "synthetic": result["data"]["synthetic"],
        "images": words.images(result),
        "compared": some,
        "class_names": dots.groups_of(rows, "per_class"),
        "class_rest": max(0, len(dots.groups_of(some, "per_class")) - dots.MOST_GROUPS),
        "profiled": profiled(rows),
        "student": student,
        "reference": reference,
        "differences": [(c, words.difference_points(c)) for c in result["comparisons"]],
        "examples": [(e, [(panel, markup(panel.picture)) for panel in e.panels]) for e in _examples(sources)],
        "ends": ends,
        "agreement": pictured["agreement"] if pictured and counted else None,
        "shown_score": pictured["shown_score"] if pictured else None,
    }


def _video_answer(sources: Sources) -> str:
    _, video = sources.videos[0]
    best = max(video["rows"], key=lambda row: row["fps"] or 0.0, default=None)
    if best is None or best["fps"] is None:
        return "Nothing was measured."
    return f"{best['name']} sustains {words.number(best['fps'], 1)} frames a second on {video['source']['name']}."


def _called(row: marks.Row) -> str:
    """A row in a sentence about two."""
    return {"ensemble": "the ensemble", "student": "the student", "student_distilled": "the student"}.get(
        row["role"], str(row["name"])
    )


def _pictured(result: Mapping[str, Any]) -> list[marks.Row]:
    """The two rows whose pictures `edgekd bench` chose: the reference, or the first, and the student, or the last."""
    rows = result["rows"]
    if not rows:
        return []
    first = words.find(rows, result["reference"]) or rows[0]
    second = words.headline_student(rows) or rows[-1]
    return [first] if first is second else [first, second]


def _examples(sources: Sources) -> list[Example]:
    """Pictures with what the two ends of the comparison found."""
    if sources.result is None or sources.saved is None or sources.examples is None:
        return []
    rows = sources.result["rows"]
    wanted = [(row["name"], words.subject(row, rows)[4:].capitalize()) for row in _pictured(sources.result)]
    folder, read = sources.examples
    return examples_of(folder, read["images"], sources.saved, wanted)


def _title(sources: Sources) -> str:
    """The recipe's name, or the data's, or the file's."""
    import yaml

    if sources.recipe is not None:
        try:
            recipe = yaml.safe_load(sources.recipe)
        except (yaml.YAMLError, ValueError):  # ValueError: a day that no month has
            recipe = None
        if isinstance(recipe, dict) and isinstance(recipe.get("name"), str):
            return str(recipe["name"])
    described: Sequence[Mapping[str, Any]] = [c for _, c in sources.comparisons]
    for found in ([sources.result] if sources.result else []) + list(described):
        if found["data"]["name"]:
            return " ".join(filter(None, (found["data"]["name"], found["data"].get("split"))))
    return sources.folder.resolve().name or "results"
