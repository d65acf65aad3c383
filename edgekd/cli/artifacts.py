"""Options about artefacts and data sets that several commands take, and what they mean."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgekd.artifact import is_onnx
from edgekd.cli.session import refuse_idle

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from edgekd.export import ExportData
    from edgekd.recipe import OnnxTeacher

Target = Literal["x86", "tensorrt"]
"""What int8 is laid out for: unsigned activations (x86) or signed and symmetric ones (tensorrt)."""


class RuntimeName(str, Enum):
    """What can run an ONNX file; an enumeration, since Typer takes no list of literals."""

    onnxruntime = "onnxruntime"
    openvino = "openvino"


DataOption = Annotated[Path | None, typer.Option("--data", help="A data set (VOC, COCO or YOLO).", metavar="DIR")]
FormatOption = Annotated[str, typer.Option("--format", help="Of the data set: auto, voc, coco, yolo.", metavar="NAME")]
BoxVotingOption = Annotated[
    float | None,
    typer.Option(
        "--box-voting",
        min=0,
        max=0.99,
        help="Suppressed boxes that overlap a kept one by more than this move it, each by its score: 0.6 is usual, 0 none. "
        "`predict` does what the file says if not told.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of one inference; all if not given.")
]

RuntimeOption = Annotated[RuntimeName | None, typer.Option("--runtime", help="What runs an ONNX file.")]

FOREIGN = "ONNX files not made by edgekd (normally found out)"
ClassesOption = Annotated[
    str | None,
    typer.Option(
        "--classes", help="coco, coco91, voc, or names with commas.", metavar="NAMES", rich_help_panel=FOREIGN
    ),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "--output",
        help="yolo, yolo-objectness, boxes-scores or detections.",
        metavar="KIND",
        rich_help_panel=FOREIGN,
    ),
]
InputSizeOption = Annotated[
    int | None, typer.Option("--input-size", min=32, help="Side of the input, pixels.", rich_help_panel=FOREIGN)
]
DeclareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--declare",
        help="Another key of a recipe's ONNX teachers: resize=stretch, channels=bgr, mean=[0.485,0.456,0.406], std=[...], "
        "box_format=..., score_activation=..., background=... Repeat it for more.",
        metavar="KEY=VALUE",
        rich_help_panel=FOREIGN,
    ),
]


def export_data(root: Path, split: str | None, format: str) -> ExportData:
    """Splits of `root` for calibration and comparison."""
    from edgekd.data import list_splits, read_dataset
    from edgekd.data.layout import usual_split
    from edgekd.export import ExportData

    if split is not None:
        only = read_dataset(root, split, format=format)
        return ExportData(only, only)
    there = list_splits(root, format)
    train, val = (
        read_dataset(root, found, format=format) if (found := usual_split(names, there, root)) else None
        for names in (("train", "trainval"), ("val", "test"))
    )
    return ExportData(train, val)


def provider_of(artifact: Path, device: str | None) -> str | None:
    """What a runtime is told for `--device`: torch takes an index, ONNX Runtime's short names do not."""
    if device in (None, "auto"):
        return None
    return device.partition(":")[0] if is_onnx(artifact) else device


def refuse_declared(
    context: typer.Context,
    artifacts: Sequence[Path],
    declaring: Collection[str] = ("classes", "output", "input_size", "declare"),
) -> None:
    """Refuse to be told about ONNX files, by the options `declaring`, where every artefact says everything itself.

    Raises:
        UserError: one of those options was given.
    """
    if any(context.params[name] not in (None, []) for name in declaring):
        from edgekd.runtimes.model_files import may_be_foreign

        if not any(map(may_be_foreign, artifacts)):
            refuse_idle(context, {"an ONNX file that edgekd did not make": declaring})


_DECLARABLE = (
    "resize",
    "channels",
    "mean",
    "std",
    "box_format",
    "score_activation",
    "background",
    "anchors",
    "input_size",
)
_OTHERWISE = {"class_names": "--classes", "classes": "--classes", "output": "--output"}
"""Keys of a recipe's ONNX teachers that have options of their own; messages about files name the keys."""


def foreign_options(
    artifact: Path, classes: str | None, output: str | None, input_size: int | None, declare: list[str] | None
) -> OnnxTeacher | None:
    """What the options declare of a foreign ONNX file; None when they declare nothing.

    Raises:
        RecipeError: a value that the recipe's `teachers` would not take either. UserError: not KEY=VALUE, or another key.
    """
    if classes is None and output is None and input_size is None and not declare:
        return None
    from pydantic import ValidationError

    from edgekd.labels import NAMED_LABEL_SETS
    from edgekd.recipe import OnnxTeacher
    from edgekd.recipe_problems import option_problem

    listed = classes not in (None, "auto", *NAMED_LABEL_SETS)
    names = tuple(name.strip() for name in str(classes).split(",")) if listed else classes
    given = {"class_names": names, "output": output, "input_size": input_size, **_declared_keys(declare or [])}
    try:
        return OnnxTeacher(
            name="detector", onnx=str(artifact), **{key: value for key, value in given.items() if value is not None}
        )
    except ValidationError as error:
        raise option_problem(error, class_names="classes", **{key: f"declare {key}" for key in _DECLARABLE}) from error


def _declared_keys(texts: list[str]) -> dict[str, Any]:
    """`--declare KEY=VALUE ...` as keys of a recipe's teacher.

    Raises:
        UserError: not KEY=VALUE with a key of `_DECLARABLE`.
    """
    import difflib

    import yaml

    from edgekd.errors import UserError

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or key not in _DECLARABLE:
            near = [_OTHERWISE[key]] if key in _OTHERWISE else difflib.get_close_matches(key, _DECLARABLE, n=1)
            raise UserError(
                "--declare takes KEY=VALUE",
                got=text,
                expected="one of " + ", ".join(_DECLARABLE),
                fix=f"did you mean {near[0]}?" if near and equals else None,
            )
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--declare {key}: not a value", got=value, expected="a word, or a list as [1, 2, 3]"
            ) from error
    return found
