"""Finding what a page can be made of: result files by their schema, wherever they lie in the folders that are named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.artifact import read_manifest, sha256_file
from edgekd.bench.examples import read_examples
from edgekd.bench.saved import Saved, read_saved
from edgekd.errors import ArtifactError
from edgekd.report.shape import COMPARISON, DEVICE_RESULT, EXAMPLES, RESULT, VIDEO, Shape, fit, measured
from edgekd.report.training import TrainingRun, training_runs

_MOST_JSON_BYTES = 50_000_000
_MOST_RECIPE_CHARACTERS = 20_000
_PLACES = ("bench/result.json", "result.json", "*.json", "bench/*.json", "*/result.json", "*/comparison.json")
_SHAPES: Mapping[str, Shape] = {
    "edgekd.result": RESULT,
    "edgekd.device-result": DEVICE_RESULT,
    "edgekd.comparison": COMPARISON,
    "edgekd.video-bench": VIDEO,
}
_VERSION = "1"
_SCHEMAS = ", ".join(f"{kind}/{_VERSION}" for kind in _SHAPES)


@dataclass
class Sources:
    """What was found; any of it may be missing, but never all.

    Attributes:
        result: of `edgekd bench`, fitted to its shape. devices, comparisons, videos: (file, contents), likewise.
        examples: an examples.json's contents, with its folder.
        problems: what could not be read, and why.
        outdated: why the benchmark may be of an earlier recipe than the one beside it; None where nothing says so.
    """

    folder: Path
    result: dict[str, Any] | None = None
    devices: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    comparisons: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    videos: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    saved: Saved | None = None
    examples: tuple[Path, Mapping[str, Any]] | None = None
    runs: list[TrainingRun] = field(default_factory=list)
    recipe: str | None = None
    problems: list[str] = field(default_factory=list)
    outdated: str | None = None


def collect(paths: Sequence[Path]) -> Sources:
    """Read everything that `paths` (folders, or result files) hold.

    Raises:
        ArtifactError: there is no result among them, or a file that was named cannot be read.
    """
    first = Path(paths[0])
    found = Sources(first if first.is_dir() else first.parent)
    seen: set[Path] = set()
    for path in map(Path, paths):
        named = path.is_file()
        for file in [path] if named else _candidates(path):
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                _take(found, file)
            except ArtifactError as error:
                if named:
                    raise
                if file.name in ("result.json", "comparison.json"):
                    found.problems.append(_in_one_line(error, file.parent))
    if not (found.result or found.devices or found.comparisons or found.videos):
        raise ArtifactError(
            f"{first}: nothing to report",
            got="; ".join(found.problems) or ("a folder without results" if first.is_dir() else "no such folder"),
            expected="what `edgekd run`, `edgekd bench` or `edgekd compare` wrote",
            fix="run `edgekd run RECIPE --out DIR` or `edgekd bench ... --out DIR/result.json` first",
        )
    found.runs = training_runs(found.folder)  # the first one's alone: others' runs may go by the same names
    recipe = found.folder / "recipe.yaml"
    if recipe.is_file():
        found.recipe = recipe.read_text(encoding="utf-8", errors="replace")[:_MOST_RECIPE_CHARACTERS]
        if (found.folder / "bench" / "result.json").resolve() in seen:
            try:
                found.outdated = _outdated(found.folder, recipe)
            except ArtifactError as error:
                found.problems.append(_in_one_line(error, found.folder))
    return found


def _outdated(folder: Path, recipe: Path) -> str | None:
    """Whether a chain's benchmark was measured before its recipe, or before a run that is not finished yet.

    Nothing is said of a result that is not the chain's own, since no manifest speaks of it.

    Raises:
        ArtifactError: a manifest that would tell is damaged.
    """
    manifest = read_manifest(folder / "bench")
    if manifest is None or manifest.files.get("result.json") != sha256_file(folder / "bench" / "result.json"):
        return None
    measured_with = manifest.facts.get("recipe")
    again = [run for run in ("student", "distilled") if (folder / run).is_dir() and not _is_finished(folder / run)]
    if again:
        why = f"{' and '.join(again)} {'is' if len(again) == 1 else 'are'} being trained again, or never finished"
    elif measured_with is not None and measured_with != sha256_file(recipe):
        why = "the recipe has changed since"
    else:
        return None
    return (
        f"measured before this recipe: {why}. The figures are of an earlier one; `edgekd run recipe.yaml --out DIR` measures "
        "again what has changed"
    )


def _is_finished(run: Path) -> bool:
    return read_manifest(run) is not None


def _candidates(folder: Path) -> list[Path]:
    files = [file for place in _PLACES for file in sorted(folder.glob(place)) if file.is_file()]
    return [file for file in dict.fromkeys(files) if file.stat().st_size <= _MOST_JSON_BYTES]


def _take(found: Sources, file: Path) -> None:
    """Put one file where it belongs.

    Raises:
        ArtifactError: it is not a result.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file.name}: not a readable result", got=error, expected=_SCHEMAS) from error
    schema = data.get("schema") if isinstance(data, dict) else None
    kind, _, version = str(schema).partition("/")
    if kind not in _SHAPES or not isinstance(data.get("rows"), list):
        raise ArtifactError(f"{file.name}: unknown schema", got=schema, expected=_SCHEMAS)
    if version != _VERSION:
        found.problems.append(f"{file.name} is {schema}, of another version: what is not known here is left out")
    if kind == "edgekd.result":
        if found.result is not None:
            found.problems.append(f"{file.name} in {file.parent.name}: a second benchmark, one a page")
            return
        found.result = measured(data, RESULT)
        _take_pictures(found, file)
    elif kind == "edgekd.device-result":
        found.devices.append((file.name, measured(data, DEVICE_RESULT)))
    else:
        places = found.comparisons if kind == "edgekd.comparison" else found.videos
        places.append((file.name, fit(data, _SHAPES[kind])))


def _take_pictures(found: Sources, file: Path) -> None:
    """Detections and examples beside a result. Names in it are joined bare, so that a stranger's points nowhere else."""
    assert found.result is not None
    names = found.result["files"]
    detections = file.parent / Path(names["detections"] or "detections.npz").name
    listed = Path(names["examples"] or "examples/examples.json")
    examples = file.parent / (listed.parent.name.strip(".") or "examples") / listed.name
    try:
        if detections.is_file():
            if names["detections_sha256"] not in (None, sha256_file(detections)):
                raise ArtifactError(f"{detections.name} is not the file that {file.name} was written with")
            found.saved = read_saved(detections)
        if examples.is_file():
            found.examples = examples.parent, fit(read_examples(examples), EXAMPLES)
    except ArtifactError as error:
        found.problems.append(f"pictures: {_in_one_line(error, file.parent)}")


def _in_one_line(error: ArtifactError, folder: Path) -> str:
    """Without the machine's own paths: pages are passed on."""
    return " ".join(error.what.replace(f"{folder}/", "").split())
