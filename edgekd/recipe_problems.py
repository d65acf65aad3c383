"""What is wrong with a recipe, in words: pydantic's errors against the schema, put the way a person would.

A value that may be one of several types is one problem here, not one for each type; an unknown key comes with the
nearest valid one, wherever in the recipe that belongs.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from edgekd.errors import RecipeError
from edgekd.recipe import TEACHER_KINDS, Recipe
from edgekd.yaml_document import Document, KeyPath, Problem, dotted

_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "a number greater than"),
    "greater_than_equal": ("ge", "a number not below"),
    "less_than": ("lt", "a number less than"),
    "less_than_equal": ("le", "a number not above"),
}


def schema_problems(document: Document) -> tuple[Recipe | None, list[Problem]]:
    """Validate a document that is a mapping: the recipe if it is right, and every problem if not."""
    try:
        # Strict, so that `epochs: true` is no 1; by way of JSON, since in strict Python a list is not a tuple.
        return Recipe.model_validate_json(json.dumps(document.data), strict=True), []
    except ValidationError as error:
        groups: dict[KeyPath, list[ErrorDetails]] = {}
        for detail in error.errors(include_url=False):
            groups.setdefault(_key_path(detail, document.data), []).append(detail)
        return None, [
            _problem(document, path, said)
            for path, details in groups.items()
            if (said := _relevant(path, details, groups))
        ]


def option_problem(error: ValidationError, **options: str) -> RecipeError:
    """The first mistake in values that options of the command line gave; `options`: field -> option, if called otherwise."""
    detail = error.errors(include_url=False)[0]
    field = str(detail["loc"][0])
    option = options.get(field, field.replace("_", "-"))
    return RecipeError(f"--{option}: {detail['msg'].removeprefix('Value error, ')}", got=str(detail["input"]))


def _key_path(detail: ErrorDetails, data: Any) -> KeyPath:
    """An error's place in the document: pydantic's location without the names of union members."""
    path: list[str | int] = []
    last = len(detail["loc"]) - 1
    for index, part in enumerate(detail["loc"]):
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if inside:
            data = data[part]
        elif not (index == last and detail["type"] == "missing"):
            continue
        path.append(part)
    return tuple(path)


def _relevant(path: KeyPath, details: list[ErrorDetails], groups: Mapping[KeyPath, object]) -> list[ErrorDetails]:
    """Without "expected 'auto'" or another type for a list or mapping whose entries are what is wrong."""
    deeper = any(other[: len(path)] == path and len(other) > len(path) for other in groups)
    others = ("literal_error", "tuple_type", "dict_type")
    return [d for d in details if not (deeper and isinstance(d["input"], list | dict) and d["type"] in others)]


def _problem(document: Document, path: KeyPath, details: list[ErrorDetails]) -> Problem:
    """One problem out of all that pydantic says about one value."""
    kinds = {detail["type"] for detail in details}
    value = details[0]["input"]
    if "extra_forbidden" in kinds:
        return Problem(document.place(path, key=True), path, f"unknown key{_key_hint(path, document.data)}")
    if "missing" in kinds:
        place = document.place(path[:-1], key=isinstance(path[-1], str))
        return Problem(place, path, _missing_message(path, document.data, value))
    if "union_tag_not_found" in kinds:
        return Problem(document.place(path), path, _teacher_message(value))
    if "value_error" in kinds:
        said = next(detail["msg"] for detail in details if detail["type"] == "value_error")
        return Problem(document.place(path), path, said.removeprefix("Value error, "))
    names = [name for detail in details if detail["type"] == "literal_error" for name in _literals(detail)]
    wanted = [_expected(detail) for detail in details if detail["type"] != "literal_error"]
    if names:
        wanted.append(("one of " if len(names) > 1 else "") + ", ".join(names))
    no_text = kinds == {"string_type"} and isinstance(value, bool | int | float)
    got = document.texts.get(path, _shown(value)) if no_text else _shown(value)
    message = f"got {got}, expected {' or '.join(dict.fromkeys(wanted))}"
    near = difflib.get_close_matches(value.lower(), names, 1, 0.4) if isinstance(value, str) else []
    if near:
        message += f"; did you mean {near[0]}?"
    elif no_text:
        message += f'; write "{got}" in quotes'
    return Problem(document.place(path), path, message)


def _literals(detail: ErrorDetails) -> list[str]:
    return [text or number for text, number in re.findall(r"'([^']*)'|(-?\d+)", str(detail["ctx"]["expected"]))]


def _expected(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _TYPES:
        return _TYPES[kind]
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{words} {context[key]:g}"
    if kind == "string_pattern_mismatch":
        return "letters, digits, '.', '_' and '-', starting with a letter or digit"
    if kind == "too_long":
        return f"{context['max_length']} values"
    return detail["msg"][:1].lower() + detail["msg"][1:]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _missing_message(path: KeyPath, data: Any, parent: object) -> str:
    if isinstance(parent, list) or isinstance(path[-1], int):
        return f"expected {int(path[-1]) + 1} values or more, got {_shown(parent)}"
    section = _section(path[:-1], data)
    words = section.model_fields[str(path[-1])].description if section else None
    return "missing" + (f": {words}" if words else ", and it has no default")


def _teacher_message(value: object) -> str:
    if not isinstance(value, dict):
        return f"got {_shown(value)}, expected a mapping with name and one of {', '.join(TEACHER_KINDS)}"
    present = [kind for kind in TEACHER_KINDS if kind in value]
    if present:
        return f"has {' and '.join(present)}, expected exactly one of {', '.join(TEACHER_KINDS)}"
    near = [n for key in value if key != "name" for n in difflib.get_close_matches(key, TEACHER_KINDS, 1)]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"says not what the teacher is, expected one of {', '.join(TEACHER_KINDS)}{hint}"


def _section(path: KeyPath, data: Any) -> type[BaseModel] | None:
    """The part of the schema that describes the mapping at `path`."""
    model: type[BaseModel] | None = Recipe
    for part in path:
        data = data[part]
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation if model and part in model.model_fields else None
            choices = list(_models(annotation))
        model = next((m for m in choices if len(choices) == 1 or _fits(m, data)), None)
    return model


def _fits(model: type[BaseModel], data: object) -> bool:
    """Whether `model` is the kind of teacher that `data` is."""
    return isinstance(data, dict) and any(kind in data and kind in model.model_fields for kind in TEACHER_KINDS)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _key_hint(path: KeyPath, data: Any) -> str:
    """ "; did you mean epochs?", or where in the recipe a key of that name belongs."""
    key = str(path[-1])
    section = _section(path[:-1], data)
    if section is None:
        return ""
    near = difflib.get_close_matches(key, section.model_fields, 1, 0.7)
    if near:
        return f"; did you mean {near[0]}?"
    homes = [f"{key} at the top level"] if key in Recipe.model_fields else []
    nested = _nested_names()
    for known in difflib.get_close_matches(key, nested, 1, 0.8):
        homes += [dotted((name, known)) for name in nested[known]]
    if homes:
        return f"; did you mean {' or '.join(homes[:3])}?"
    near = difflib.get_close_matches(key, section.model_fields, 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"; {hint}expected one of {', '.join(section.model_fields)}"


def _nested_names() -> dict[str, list[str]]:
    """Keys within the sections, each with the sections that have it; a teacher's are left out."""
    found: dict[str, list[str]] = {}
    for name, field in Recipe.model_fields.items():
        for model in _models(field.annotation) if name != "teachers" else ():
            for key in model.model_fields:
                found.setdefault(key, []).append(name)
    return found
