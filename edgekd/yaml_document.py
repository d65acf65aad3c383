"""YAML read with the place of every key and value, so that an error can name file, line and column.

Only the JSON subset of YAML 1.2 is understood: `no` and `1e-3` mean what they look like (a word and a number), there
are no dates, no octal numbers and no tags. Anchors, aliases and merge keys work, within a limit.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]
"""Where a value is in a document: mapping keys and list indices from the root."""

MAX_BYTES = 1 << 20
MAX_VALUES = 10_000
_TAG = "tag:yaml.org,2002:"
_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, order=True)
class Place:
    """A position in a file (line and column from 1), or an override on the command line (line 0)."""

    line: int
    column: int
    source: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a document."""

    place: Place
    path: KeyPath
    message: str

    def __str__(self) -> str:
        key = f"{dotted(self.path)}: " if self.path else ""
        return f"{self.place}: {key}{self.message}"


class DocumentError(Exception):
    """The text cannot be read as a document at all; `problem` says where and why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass
class Document:
    """A value out of YAML, and where its parts stand.

    Attributes:
        data: plain Python: dict, list, str, int, float, bool, None.
        keys: for each mapping entry the place of its key, by path.
        values: for each value its place, by path; the root is ().
        texts: numbers, true and false as they were written, by path: 08, which may have been meant for a text.
        problems: what was wrong but did not stop the reading, such as a key given twice.
    """

    data: Any
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """Where `path` stands (its key, if asked), or the nearest enclosing value that has a place."""
        for length in range(len(path), -1, -1):
            tables = (self.keys, self.values) if key or length < len(path) else (self.values, self.keys)
            for table in tables:
                if path[:length] in table:
                    return table[path[:length]]
        raise KeyError(path)

    def set(self, path: KeyPath, value: Document, place: Place) -> None:
        """Put `value` at `path`, making mappings and lists on the way; their place, and its own, is `place` from now on.

        Raises:
            LookupError: the path leads through something that is not a mapping or a list with that entry.
        """
        parent = self.data
        exact: list[str | int] = []
        for part, below in itertools.pairwise(path):
            exact.append(_entry(parent, part, exact))
            made: Any = [] if str(below) == "0" else {}
            if isinstance(parent, dict) and parent.get(exact[-1]) is None:
                parent[exact[-1]] = made
            elif isinstance(parent, list) and exact[-1] == len(parent):
                parent.append(made)
            parent = parent[exact[-1]]
            if parent is made:
                self.keys[tuple(exact)] = self.values[tuple(exact)] = place
        exact.append(_entry(parent, path[-1], exact))
        if isinstance(parent, list) and exact[-1] == len(parent):
            parent.append(value.data)
        else:
            parent[exact[-1]] = value.data
        target = tuple(exact)
        tables: tuple[dict[KeyPath, Any], ...] = (self.keys, self.values, self.texts)
        for table in tables:
            for known in [known for known in table if known[: len(target)] == target]:
                del table[known]
        self.texts |= {(*target, *below): text for below, text in value.texts.items()}
        self.keys[target] = self.values[target] = place


def dotted(path: Sequence[str | int]) -> str:
    """`("teachers", 0, "onnx")` as `teachers.0.onnx`, the way --set writes it."""
    return ".".join(str(part) for part in path)


def _entry(parent: Any, part: str | int, path: Sequence[str | int]) -> str | int:
    """`part` as an index into `parent`, checked."""
    here = dotted(path) or "the recipe"
    if isinstance(parent, dict):
        return str(part)
    if not isinstance(parent, list):
        raise LookupError(f"{here} is not a mapping or a list, it has no {part!r}")
    if not str(part).isdigit() or int(part) > len(parent):
        raise LookupError(f"{here} is a list of {len(parent)}: expected an index from 0 to {len(parent)}, got {part!r}")
    return int(part)


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the scalar types of YAML 1.2's core schema instead of YAML 1.1's."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own attribute)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version would take for another type: to YAML 1.1 alone, 08 and 1e3 are texts."""


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)


class _Builder:
    """Turns composed nodes into plain values, noting places and counting what aliases expand to."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.document = Document(None)
        self.count = 0
        self.open: set[int] = set()

    def place(self, node: yaml.Node) -> Place:
        return Place(node.start_mark.line + 1, node.start_mark.column + 1, self.source)

    def fail(self, node: yaml.Node, path: KeyPath, message: str) -> DocumentError:
        return DocumentError(Problem(self.place(node), path, message))

    def note(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self.document.problems.append(Problem(self.place(node), path, message))

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise self.fail(node, path, f"aliases expand to more than {MAX_VALUES:,} values: not a recipe")
        if id(node) in self.open:
            raise self.fail(node, path, "an alias contains itself")
        self.document.values[path] = self.place(node)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return self.sequence(node, path)
            assert isinstance(node, yaml.ScalarNode)
            return self.scalar(node, path)
        finally:
            self.open.discard(id(node))

    def sequence(self, node: yaml.SequenceNode, path: KeyPath) -> list[Any]:
        if node.tag != _TAG + "seq":
            self.note(node, path, f"tags such as {node.tag!r} are not understood")
        return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        if node.tag != _TAG + "map":
            self.note(node, path, f"tags such as {node.tag!r} are not understood")
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.note(key_node, path, "a key must be a word, not a list or a mapping")
            elif key_node.tag == _TAG + "merge":
                merged = {**self.merge(value_node, path), **merged}
            elif key_node.value in own:
                self.note(
                    key_node, (*path, key_node.value), f"given twice; the first is on line {lines[key_node.value]}"
                )
            else:
                key = str(key_node.value)
                lines[key] = key_node.start_mark.line + 1
                own[key] = self.build(value_node, (*path, key))
                self.document.keys[(*path, key)] = self.place(key_node)
        return {**merged, **own}

    def merge(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        """The value of a `<<` key: a mapping, or a list of mappings of which earlier ones win."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        here = self.document.values[path]
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                self.note(part, path, "<< wants a mapping (an alias of one), or a list of them")
                continue
            merged = {**self.build(part, path), **merged}
        self.document.values[path] = here
        return merged

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "str":
            if _HALVES.search(text):  # how Python has a file name's bytes that are no UTF-8
                self.note(node, path, "not text in UTF-8: a file or folder of such a name must be renamed first")
            return _HALVES.sub("?", text)
        if kind == "null":
            return None
        self.document.texts[path] = text
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            if kind == "int":
                return int(text)
            if kind == "float":
                value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
                if math.isfinite(value):
                    return value
        except ValueError:
            pass
        if kind in ("int", "float"):
            self.note(node, path, f"got {text[:40]}, expected a finite number")
            return 0
        self.note(node, path, f"tags such as {node.tag!r} are not understood")
        return text


def read_document(text: str, source: str) -> Document:
    """Read YAML text; `source` is the file's name as errors should show it.

    Raises:
        DocumentError: not YAML, several documents, or aliases that expand without end.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        builder = _Builder(source)
        if node is None:
            builder.document.values[()] = Place(1, 1, source)
        else:
            builder.document.data = builder.build(node, ())
        return builder.document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line + 1, mark.column + 1, source) if mark else Place(1, 1, source)
        raise DocumentError(Problem(place, (), _syntax_message(error))) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = error.character if isinstance(error.character, int) else ord(error.character)
        message = f"character U+{character:04X} is not allowed in YAML: is this a text file?"
        raise DocumentError(Problem(Place(line, 1, source), (), message)) from error
    except RecursionError as error:
        raise DocumentError(Problem(Place(1, 1, source), (), "nested too deeply: not a recipe")) from error


def yaml_text(data: object, **layout: Any) -> str:
    """YAML that `read_document` reads back as it was, and so do others; keys in their order.

    Args:
        layout: of `yaml.dump`, such as width.
    """
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **layout)
    return text


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's words, with a remedy for the commonest slips."""
    problem, context = error.problem or "not YAML", error.context or ""
    if "'\\t'" in problem:
        return "a tab: YAML indents with spaces only"
    if "single document" in context:
        return "a second document starts here (---): a recipe is one document"
    if "mapping values are not allowed" in problem:
        return "not YAML: a second ': ' here; put a text that contains one in quotes, or check the indentation"
    return f"not YAML: {problem}" + (f" {context}" if context else "")
