"""The candidates worth distilling, best first, as recipes that `edgekd run` takes as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.artifact import write_text
from edgekd.console import Terminal
from edgekd.detectors.weights import can_be_narrowed, starts_from_imagenet
from edgekd.errors import DistillationSetupError, EdgeKDError, RecipeError
from edgekd.recipe import BenchConfig, DataConfig, DistillConfig, ExportConfig, ModelConfig, Recipe
from edgekd.recipe_file import dump_recipe

FAMILIES = (
    "yolo-small",
    "yolo-nano",
    "efficientnet-lite1-ssd-lite",
    "efficientnet-lite0-ssd-lite",
    "mobilenetv2-ssd-lite",
    "mobilenetv1-ssd-lite",
    "yolov3-tiny",
    "yolov3",
    "vgg16-ssd",
    "vgg11-ssd",
)
"""By COCO accuracy per multiply-accumulate as published for the family or its nearest relatives (YOLOX-Nano; EfficientDet-
Lite; SSDLite in the MobileNetV2 paper; YOLOv3; SSD300). MACs alone would put the networks first that waste most of them."""

HEURISTIC = (
    "accuracy is not measured: of each family the candidate with most MACs within the budget comes first, families in the "
    "order of their published COCO accuracy per MAC; then the rest, by MACs as a share of their family's first"
)

Row = Mapping[str, Any]

_ANY_DATA = "data/my-data"


def fits(row: Row, budget_ms: float) -> bool:
    """Whether a candidate was measured within the budget."""
    return "failed" not in row and bool(row["latency_ms"]["median"] <= budget_ms)


def ranked(rows: Sequence[Row], budget_ms: float) -> list[Row]:
    """The candidates within the budget, best first by `HEURISTIC`; without those that a wider or larger one also covers."""
    inside = [row for row in rows if fits(row, budget_ms)]
    edge = [row for row in inside if not any(_covers(other, row) for other in inside)]
    first: dict[str, Row] = {}
    for row in edge:
        if row["model"] not in first or row["macs"] > first[row["model"]]["macs"]:
            first[row["model"]] = row
    leaders = sorted(first.values(), key=lambda row: FAMILIES.index(row["model"]))
    rest = [row for row in edge if row is not first[row["model"]]]
    return leaders + sorted(rest, key=lambda row: -row["macs"] / first[row["model"]]["macs"])


def _covers(other: Row, row: Row) -> bool:
    """Whether `other` is the same family and precision, at least as wide and large, and not the same."""
    if (other["model"], other["precision"]) != (row["model"], row["precision"]):
        return False
    sizes = [(one["width"], one["input_size"]) for one in (other, row)]
    return sizes[0] != sizes[1] and all(a >= b for a, b in zip(*sizes, strict=True))


def write_recipes(
    rows: Sequence[Row], base: Recipe | None, data: DataConfig | None, out: Path, threads: int | None, budget_ms: float
) -> tuple[list[Path], list[str]]:
    """One recipe file a row, numbered in their order; returns the files and what the user should know.

    A file that is there stays as it is.

    Args:
        base: all but the student is taken from it. data: instead of the base's.
    """
    files, notes = [], list[str]()
    if rows and base is None and data is None:
        notes.append(f"data.root of the recipes is made up ({_ANY_DATA}): put yours there, or give --data")
    for number, row in enumerate(rows, 1):
        recipe = _checked(_recipe(row, base, data, threads), notes)
        file = out / f"{number:02d}-{recipe.name}.yaml"
        if file.exists():
            notes.append(f"{file.name} is there, edited or your own, and stays: move it away to have it written anew")
        else:
            write_text(file, _head(row, budget_ms) + dump_recipe(recipe, out))
        files.append(file)
    return files, list(dict.fromkeys(notes))


def combined(recipes: Sequence[Recipe]) -> Recipe | None:
    """The first recipe with the teachers of all; one that is named twice in the same words counts once.

    Raises:
        RecipeError: two different teachers have the same name.
    """
    if not recipes:
        return None
    teachers: dict[str, Any] = {}
    for teacher in (teacher for recipe in recipes for teacher in recipe.teachers):
        if teachers.setdefault(teacher.name, teacher) != teacher:
            raise RecipeError("two recipes have different teachers of the same name", got=teacher.name)
    return recipes[0].model_copy(update={"teachers": tuple(teachers.values())})


def _recipe(row: Row, base: Recipe | None, data: DataConfig | None, threads: int | None) -> Recipe:
    student: dict[str, Any] = {key: row[key] for key in ("model", "width", "input_size")}
    precisions = tuple(dict.fromkeys(("fp32", row["precision"])))
    if base is None:
        if starts_from_imagenet(row["model"], row["width"]):
            student["weights"] = "imagenet"
        section = data or DataConfig(root=_ANY_DATA)
        values: dict[str, Any] = {"name": row["name"], "data": section.model_dump()}
        values.update(bench=BenchConfig(threads=threads).model_dump())
        values.update(export=ExportConfig(precisions=precisions).model_dump(), student=student)
        return Recipe.model_validate(values)
    given, train = base.student, base.train
    if given.model == row["model"]:
        student["options"] = given.options
    student["weights"] = _weights(row, given)
    if student["weights"] is None or row["width"] not in (1.0, given.width):
        train = train.model_copy(update={"freeze_stride": 0})  # which needs features that are worth keeping
    return base.model_copy(
        update={
            "name": row["name"],
            "data": data or base.data,
            "student": ModelConfig(**student),
            "train": train,
            "export": base.export.model_copy(update={"precisions": precisions}),
            "bench": base.bench.model_copy(update={"threads": threads or base.bench.threads}),
        }
    )


def _weights(row: Row, given: ModelConfig) -> str | None:
    """What a candidate can start from, of what the base's student starts from."""
    model, width = row["model"], row["width"]
    if given.weights is None or (model, width) == (given.model, given.width):
        return given.weights
    if given.weights == "imagenet":
        return "imagenet" if starts_from_imagenet(model, width) else None
    can_be_cut = model == given.model and can_be_narrowed(model) and width < min(1.0, given.width)
    return given.weights if can_be_cut else None


def _checked(recipe: Recipe, notes: list[str]) -> Recipe:
    """The recipe as `edgekd run` will accept it: terms that do not fit this student give way to `response`."""
    if not recipe.teachers:
        notes.append("the recipes have no teachers yet: name them under `teachers`, or give a recipe with --teachers")
        return recipe
    try:
        _build_all(recipe)
    except DistillationSetupError as error:
        terms = ", ".join(term.loss for term in recipe.distill.terms)
        notes.append(f"{recipe.name}: response alone, since {terms} does not fit this student ({error.what})")
        plain = DistillConfig(detection_weight=recipe.distill.detection_weight)
        return recipe.model_copy(update={"distill": plain})
    except EdgeKDError as error:
        notes.append(f"the recipes could not be tried out: {error.what}")
    return recipe


def _build_all(recipe: Recipe) -> None:
    """What `edgekd run` does before it trains anything, but for weights, which may have to be downloaded."""
    from edgekd.data import read_dataset
    from edgekd.teaching import check_terms
    from edgekd.workspace import Workspace

    section = recipe.data
    train = read_dataset(Path(section.root), section.train, format=section.format, class_names=section.classes, limit=1)
    check_terms(Workspace(recipe, train, train, "cpu", Terminal(quiet=True)))


def _head(row: Row, budget_ms: float) -> str:
    latency, stages = row["latency_ms"], row["stages_ms"]
    apart = "" if stages["pre"] is None else f" ({stages['pre']:.2f} + {stages['infer']:.2f} + {stages['post']:.2f})"
    return (
        f"# From `edgekd plan`: {row['macs'] / 1e9:.3f} GMACs, {latency['median']:.2f} ms{apart} of {budget_ms:g} ms "
        f"in {row['precision']}, measured untrained.\n"
        f"# Next: edgekd run THIS_FILE --out runs/{row['name']}\n"
    )
