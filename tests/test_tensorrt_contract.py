"""Every TensorRT name, enum member and keyword that edgekd uses, against NVIDIA's own bindings of each version.

On when EDGEKD_TENSORRT_CONTRACT=1 or CI=true; a stated skip where the wheels cannot be had. What the source uses is
always collected and held against the names that the stand-in keeps.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import fake_tensorrt
from tests.fake_tensorrt import NAMES, VERSIONS
from tests.real_tensorrt import Unavailable, surface

PACKAGE = Path(__file__).resolve().parent.parent / "edgekd"
SPEAKING = re.compile(r"\b_?trt\.\w")
MODULES = [
    path.relative_to(PACKAGE).as_posix()
    for path in sorted(PACKAGE.rglob("*.py"))
    if SPEAKING.search(path.read_text(encoding="utf-8")) and path.name != "doctor.py"  # it asks in a process of its own
]
"""All that speaks to TensorRT; there its objects go by these names."""
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "image": "ITensor",
    "edge": "ITensor",
    "layer": "ILayer",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "timing_cache": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "levels": "HardwareCompatibilityLevel",
}
CREATED = {"Builder": "Builder", "OnnxParser": "OnnxParser", "Runtime": "Runtime"}


@dataclass(frozen=True)
class Use:
    """One name of TensorRT in the source.

    Attributes:
        owner: the class, or "" for the module itself. tested: behind `hasattr`, `optional` or `getattr`.
        positional, keywords: of a call; None where it is not called.
    """

    owner: str
    member: str
    where: str
    tested: bool = False
    positional: int | None = None
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.owner or 'tensorrt'}.{self.member}"


def owner_of(node: ast.expr) -> str | None:
    """The TensorRT class that an expression is (or holds members of); "" for the module; None for anything else."""
    if isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name.lstrip("_") == "trt":
            return ""
        if isinstance(node, ast.Attribute) and owner_of(node.value) == "":
            return node.attr
        plain = isinstance(node, ast.Name) or (isinstance(node.value, ast.Name) and node.value.id == "self")
        return OBJECTS.get(name.lstrip("_")) if plain else None
    return None


def uses(source: str, where: str) -> Iterator[Use]:
    """Every name of TensorRT in a module's source."""
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    loops = {
        node.target.id: [element.value for element in node.iter.elts if isinstance(element, ast.Constant)]
        for node in ast.walk(tree)
        if isinstance(node, ast.For)
        and isinstance(node.target, ast.Name)
        and isinstance(node.iter, ast.Tuple | ast.List)
    }
    for node in ast.walk(tree):
        place = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and (owner := owner_of(node.value)) is not None:
            call = called.get(id(node))
            if call is None:
                yield Use(owner, node.attr, place)
            else:
                spread = any(isinstance(argument, ast.Starred) for argument in call.args)
                names = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
                yield Use(owner, node.attr, place, False, None if spread else len(call.args), names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            owner = owner_of(node.args[0])
            if node.func.id in ("hasattr", "getattr", "optional") and owner:
                asked = node.args[1]
                members = [asked.value] if isinstance(asked, ast.Constant) else []
                if isinstance(asked, ast.Name):
                    members = loops.get(asked.id, [])
                # `optional` raises by itself; a bare `hasattr` on a name that cannot be seen could hide a misspelling.
                assert members or node.func.id == "optional", f"{place}: cannot see which members are asked for"
                for member in members:
                    yield Use(owner, str(member), place, True)


def all_uses() -> list[Use]:
    return [use for name in MODULES for use in uses((PACKAGE / name).read_text(encoding="utf-8"), name)]


def problems(found: list[Use], classes: dict[str, Any], module: Any) -> list[str]:
    """Uses that a version does not have: names outright, keywords and counts of arguments by the docstring."""
    feature_tested = {(use.owner, use.member) for use in found if use.tested}
    wrong = []
    for use in found:
        if (use.owner, use.member) in feature_tested:
            continue
        if use.owner == "":
            if use.member not in module:
                wrong.append(str(use))
        elif use.member not in classes.get(use.owner, ()):
            wrong.append(str(use))
        elif use.positional is not None and isinstance(classes[use.owner], dict):
            wrong += _call_problems(use, classes[use.owner][use.member])
    return wrong


def signatures(doc: str, member: str) -> list[list[tuple[str, bool]]]:
    """pybind11's first lines: for each overload its arguments without self, (name, has a default)."""
    found = []
    for text in re.findall(rf"\b{re.escape(member)}\(self: [^,)]+(?:, )?(.*?)\) -> ", doc):
        arguments = re.findall(r"(\w+): (?:[^,\[=]|\[[^\]]*\])+(= (?:<[^>]*>|[^,]+))?", text)
        found.append([(name, bool(default)) for name, default in arguments])
    return found


def _call_problems(use: Use, doc: str) -> list[str]:
    overloads = signatures(doc, use.member)
    given = (use.positional or 0) - (use.member == "__init__")  # which is given its self
    for arguments in overloads:
        names = [name for name, _ in arguments]
        needed = [name for name, default in arguments[given:] if not default]
        if given <= len(names) and set(use.keywords) <= set(names) and set(needed) <= set(use.keywords):
            return []
    return [f"{use}({use.positional} arguments, {use.keywords}) fits none of {overloads}"] if overloads else []


def test_the_source_is_read_right() -> None:
    source = """
def f(trt, builder, config):
    config.set_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.TacticSource, "CUDNN"):
        pass
    optional(trt.BuilderFlag, "FP16", "TensorRT 8")
    for name in ("A", "B"):
        hasattr(trt.BuilderFlag, name)
    self._context.infer_shapes()
    other.config.set_flag(1, flag=2)
"""
    found = {(use.owner, use.member, use.tested, use.positional) for use in uses(source, "x.py")}
    assert found == {
        ("IBuilderConfig", "set_flag", False, 1),
        ("", "BuilderFlag", False, None),
        ("BuilderFlag", "TF32", False, None),
        ("", "TacticSource", False, None),
        ("TacticSource", "CUDNN", True, None),
        ("BuilderFlag", "FP16", True, None),
        ("BuilderFlag", "A", True, None),
        ("BuilderFlag", "B", True, None),
        ("IExecutionContext", "infer_shapes", False, 0),
    }


def test_only_one_module_imports_tensorrt() -> None:
    importing = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        only_asks_which = set(re.findall(r"\btensorrt\.(\w+)", text)) == {"__version__"}
        if re.search(r"^\s*(import|from) tensorrt\b", text, re.MULTILINE) and not only_asks_which:
            importing.append(path.relative_to(PACKAGE).as_posix())
    assert importing == ["runtimes/trt_api.py"]
    assert {"runtimes/trt_api.py", "runtimes/tensorrt_runtime.py", "export/engine.py"} <= set(MODULES)


def test_enough_is_seen() -> None:
    found = all_uses()
    seen = {(use.owner, use.member) for use in found}
    for expected in [
        ("IBuilderConfig", "set_memory_pool_limit"),
        ("IExecutionContext", "execute_async_v3"),
        ("BuilderFlag", "FP16"),
        ("BuilderFlag", "INT8"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("OnnxParser", "get_error"),
        ("ICudaEngine", "device_memory_size_v2"),
        ("HardwareCompatibilityLevel", "AMPERE_PLUS"),
        ("TacticSource", "CUDNN"),
        ("IOptimizationProfile", "set_shape"),
    ]:
        assert expected in seen
    assert len(seen) > 60


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_is_one_the_stand_in_knows(version: str) -> None:
    classes = {name: {*fake_tensorrt.members(version, name), "__init__"} for name in NAMES["classes"]}
    assert problems(all_uses(), classes, {*classes, "__version__"}) == []


def test_every_feature_test_asks_for_something_real() -> None:
    for use in all_uses():
        if use.tested:
            assert any(use.member in fake_tensorrt.members(version, use.owner) for version in VERSIONS), str(use)


ON = os.environ.get("EDGEKD_TENSORRT_CONTRACT") == "1" or os.environ.get("CI") == "true"
real = pytest.mark.skipif(not ON, reason="set EDGEKD_TENSORRT_CONTRACT=1 to check against NVIDIA's bindings")


@pytest.fixture(scope="module", params=VERSIONS)
def bindings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the real bindings of a version have."""
    try:
        return surface(request.param, sorted(NAMES["classes"]))
    except Unavailable as reason:
        pytest.skip(f"the bindings of TensorRT {request.param} cannot be had here: {reason}")


@real
def test_every_use_is_in_the_real_bindings(bindings: dict[str, Any]) -> None:
    assert problems(all_uses(), bindings["classes"], bindings["module"]) == []


@real
def test_the_stand_ins_names_are_the_real_ones(bindings: dict[str, Any]) -> None:
    for name in NAMES["classes"]:
        theirs = {member for member in bindings["classes"].get(name, ()) if not member.startswith("_")}
        assert theirs == fake_tensorrt.members(bindings["version"], name), name


@real
def test_the_stand_ins_arguments_are_the_real_ones(bindings: dict[str, Any]) -> None:
    checked = 0
    for fake in vars(fake_tensorrt).values():
        if not (inspect.isclass(fake) and issubclass(fake, fake_tensorrt.Strict) and fake._as):
            continue
        for member, function in vars(fake).items():
            overloads = signatures(bindings["classes"][fake._as].get(member, ""), member)
            if member.startswith("_") or not inspect.isfunction(function) or not overloads:
                continue
            names = list(inspect.signature(function).parameters)[1:]
            fits = [overload for overload in overloads if [n for n, _ in overload][: len(names)] == names]
            assert fits, f"{fake._as}.{member}: {names} is none of {overloads}"
            checked += 1
    assert checked > 20


@real
def test_a_builder_without_a_gpu_raises_what_is_caught(bindings: dict[str, Any]) -> None:
    assert bindings["builder"] == "TypeError"


@pytest.mark.parametrize(
    ("use", "wrong"),
    [
        (Use("IBuilderConfig", "set_flag", "", positional=1), False),
        (Use("IBuilderConfig", "set_flag", "", positional=0, keywords=("flag",)), False),
        (Use("IBuilderConfig", "set_flag", "", positional=0, keywords=("flags",)), True),
        (Use("IBuilderConfig", "set_flag", "", positional=2), True),
        (Use("IBuilderConfig", "set_flag", "", positional=0), True),
        (Use("IBuilderConfig", "set_flog", "", positional=1), True),
        (Use("IBuilderConfig", "build", "", positional=1), False),
        (Use("IBuilderConfig", "build", "", positional=2), False),
        (Use("", "IBuilderConfig", ""), False),
        (Use("", "IBuilderconfig", ""), True),
    ],
)
def test_a_wrong_use_is_found(use: Use, wrong: bool) -> None:
    docs = {
        "set_flag": "set_flag(self: t.t.IBuilderConfig, flag: t.t.BuilderFlag) -> None\n\n\nAdds a flag(self: x) -> y",
        "build": "build(*args, **kwargs)\nOverloaded function.\n\n1. build(self: C, a: List[int], b: int = <X.Y: 0>) -> int",
    }
    assert bool(problems([use], {"IBuilderConfig": docs}, {"IBuilderConfig"})) is wrong
