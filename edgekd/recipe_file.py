"""Recipes from files: the whole of a recipe is checked before anything runs, and every mistake is reported at once.

Each mistake comes with file, line and column, the key, what was found, what was expected, and the nearest valid name.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgekd.artifact import write_text
from edgekd.errors import RecipeError, UserError
from edgekd.recipe import LOSSES, MODELS, Recipe
from edgekd.recipe_problems import schema_problems
from edgekd.yaml_document import MAX_BYTES, Document, DocumentError, KeyPath, Place, Problem, read_document, yaml_text

RECIPE_FILE = "recipe.yaml"
"""What a run calls its recipe."""
_WRITTEN = "# Written by edgekd: the whole recipe of what lies here, with every default.\n"
SCHEMA_URL = "https://json-schema.org/draft/2020-12/schema"
_HASH = re.compile(r"""\s*(#|[^\s"'\[{].*\s#)""", re.DOTALL)
WEIGHT_NAMES = ("imagenet",)
"""What `weights` may say besides a path."""

_STUDENTS = ("student", "student-fp16", "student-int8", "distilled", "distilled-fp16", "distilled-int8")
RESERVED_NAMES = (*_STUDENTS, "ensemble", "ensemble-parallel")
"""Rows of the benchmark, which teachers cannot be called like."""


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, needs: Collection[str] = ()) -> Recipe:
    """Read and check a recipe.

    Paths inside it become absolute: they are looked for beside the recipe, then in the working directory (for
    overrides the other way round).

    Args:
        path: the YAML file.
        overrides: "a.b=c" each, c being YAML; list entries by index, as in "teachers.0.weight=2".
        needs: sections whose files must be there ("data", "student", "teachers"); "teachers" also
            asks for at least one, "teacher-files" does not.

    Raises:
        RecipeError: with all problems in its message and in its `problems`.
    """
    path = Path(path)
    document = _open(path)
    problems = document.problems + _apply_overrides(document, overrides)
    if not isinstance(document.data, dict):
        message = "the file is empty" if document.data is None else f"got a {_kind(document.data)} as the whole file"
        _raise(path, [Problem(document.place(()), (), f"{message}, expected a mapping with name, data, student")])
    problems += _name_problems(document)
    problems += _resolve_paths(document, path.parent, needs)
    if "teachers" in needs and document.data.get("teachers") in (None, []):
        problems.append(Problem(document.place(("teachers",)), ("teachers",), "needs at least one teacher"))
    recipe, found = schema_problems(document)
    known = {problem.path for problem in problems}
    if any(path[:1] == ("teachers",) and path[-1:] == ("name",) for path in known):
        known.add(())  # the schema's own check of names, which knows no line
    problems += [problem for problem in found if problem.path not in known]
    if problems or recipe is None:
        _raise(path, problems)
    return recipe


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Put the whole recipe beside what is made from it.

    Raises:
        UserError: see `refuse_own_recipe`.
    """
    refuse_own_recipe(folder)
    write_text(folder / RECIPE_FILE, _WRITTEN + dump_recipe(recipe, folder))


def refuse_own_recipe(folder: Path) -> None:
    """A recipe of the user's in the folder that a run works in is never overwritten by the run's.

    Raises:
        UserError: there is one.
    """
    file = folder / RECIPE_FILE
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    if text.startswith(_WRITTEN) or not text.strip():
        return
    with contextlib.suppress(DocumentError):
        data = read_document(text, RECIPE_FILE).data
        if "#" not in text and isinstance(data, dict) and set(data) == set(Recipe.model_fields):
            return  # as earlier versions wrote it, with every section and without a first line
    raise UserError(
        f"{file} is a file of yours, and the run's own recipe would take its place",
        fix="choose another --out; a folder below it will do",
    )


def dump_recipe(recipe: Recipe, folder: Path) -> str:
    """The whole recipe with all defaults as YAML, its paths relative to `folder`, in which it is to be written."""
    data = recipe.model_dump(mode="json")
    for key_path in _file_keys(data):
        parent, value = _parent(data, key_path), str(_parent(data, key_path)[key_path[-1]])
        if os.path.isabs(value):
            parent[key_path[-1]] = os.path.relpath(value, folder.resolve())
    return yaml_text(data, width=120)


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": SCHEMA_URL, "title": "edgekd recipe", **{k: v for k, v in schema.items() if k != "title"}}


def _raise(path: Path, problems: Sequence[Problem]) -> NoReturn:
    ordered = sorted(problems, key=lambda problem: problem.place)
    count = "1 problem" if len(ordered) == 1 else f"{len(ordered)} problems"
    lines = [f"{path}: {count}, nothing was run", *(f"  {problem}" for problem in ordered)]
    raise RecipeError("\n".join(lines), problems=ordered)


def _open(path: Path) -> Document:
    """The document in a file, with the commonest confusions told apart."""
    if path.is_dir():
        raise RecipeError(f"{path} is a folder", expected="a recipe, such as recipes/demo.yaml")
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path()
        names = sorted(item.name for pattern in ("*.yaml", "*.yml") for item in folder.glob(pattern))
        near = difflib.get_close_matches(path.name, names, 1, 0.5)
        raise RecipeError(
            f"there is no recipe {path}",
            expected=", ".join(names[:10]) or None,
            fix=f"did you mean {folder / near[0]}?" if near else None,
        ) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read", got=error.strerror) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path} is no recipe", got="a larger file", expected=f"at most {MAX_BYTES:,} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not a text file in UTF-8", expected="a YAML recipe") from error
    try:
        return read_document(text, str(path))
    except DocumentError as error:
        _raise(path, [error.problem])


def _apply_overrides(document: Document, overrides: Sequence[str]) -> list[Problem]:
    """Put `--set` values into the document; returns what is wrong with them."""
    problems: list[Problem] = []
    for text in overrides:
        place = Place(0, 0, f"--set {text}")
        key, equals, value_text = text.partition("=")
        path: KeyPath = tuple(key.strip().split("."))
        if not equals or not all(path):
            problems.append(Problem(place, (), "expected KEY=VALUE, such as train.epochs=3 or teachers.0.weight=2"))
            continue
        if _HASH.match(value_text):  # a comment in a file; here it belongs to what was meant, such as a folder "set #2"
            value_text = json.dumps(value_text.strip(), ensure_ascii=False)
        try:
            value = read_document(value_text, str(place))
            problems += [Problem(place, path, problem.message) for problem in value.problems]
            if document.data is None:
                document.data = {}
            document.set(path, value, place)
        except DocumentError as error:
            problems.append(Problem(place, path, error.problem.message))
        except LookupError as error:
            problems.append(Problem(place, path, str(error.args[0])))
    return problems


def _name_problems(document: Document) -> list[Problem]:
    """Unknown models and losses, and teachers of the same name."""
    problems: list[Problem] = []
    data = document.data
    named: list[tuple[KeyPath, tuple[str, ...], str]] = [(("student", "model"), MODELS, "model")]
    teachers = data.get("teachers") if isinstance(data.get("teachers"), list) else []
    named += [(("teachers", i, "train", "model"), MODELS, "model") for i in range(len(teachers))]
    terms = _get(data, ("distill", "terms"))
    if isinstance(terms, list):
        named += [(("distill", "terms", i, "loss"), LOSSES, "loss") for i in range(len(terms))]
    for path, names, what in named:
        value = _get(data, path)
        if isinstance(value, str) and value not in names:
            near = difflib.get_close_matches(value, names, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"unknown {what} {value!r}, expected one of {', '.join(names)}{hint}"
            problems.append(Problem(document.place(path), path, message))
    first: dict[str, int] = {}
    for index in range(len(teachers)):
        path = ("teachers", index, "name")
        name = _get(data, path)
        if name in RESERVED_NAMES:
            problems.append(Problem(document.place(path), path, f"{name!r} is taken: it names a row of the benchmark"))
        elif isinstance(name, str) and first.setdefault(name, index) != index:
            problems.append(Problem(document.place(path), path, f"teacher {first[name]} is called {name!r} too"))
    return problems


def _file_keys(data: dict[str, Any]) -> Iterator[KeyPath]:
    """Paths of the keys whose values are files or folders."""
    candidates: list[KeyPath] = [("data", "root"), ("student", "weights")]
    teachers = data.get("teachers")
    for index in range(len(teachers) if isinstance(teachers, list | tuple) else 0):
        candidates += [("teachers", index, *rest) for rest in (("checkpoint",), ("onnx",), ("train", "weights"))]
    for path in candidates:
        value = _get(data, path)
        if isinstance(value, str) and value and value not in WEIGHT_NAMES:
            yield path


def _resolve_paths(document: Document, folder: Path, needs: Collection[str]) -> list[Problem]:
    """Make the recipe's paths absolute; problems for those that are needed and absent."""
    problems: list[Problem] = []
    for path in _file_keys(document.data):
        parent, value = _parent(document.data, path), Path(os.path.expanduser(_get(document.data, path)))
        place = document.place(path)
        # "..": of a folder that is a link also where it leads, from which `dump_recipe` counts
        bases = [folder, folder.resolve(), Path()] if place.line else [Path(), folder]
        choices = list(dict.fromkeys(Path(os.path.abspath(base / value)) for base in bases))
        there = [choice for choice in choices if choice.exists()]
        parent[path[-1]] = str((there or choices)[0])
        if not there and (path[0] in needs or (path[0] == "teachers" and "teacher-files" in needs)):
            message = f"there is no {' nor '.join(str(choice) for choice in choices)}"
            problems.append(Problem(place, path, message))
    return problems


def _get(data: Any, path: KeyPath) -> Any:
    """The value at `path`, or None."""
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _parent(data: Any, path: KeyPath) -> Any:
    return _get(data, path[:-1])


def _kind(value: object) -> str:
    return {list: "list", str: "text", bool: "true or false"}.get(type(value), "number")
