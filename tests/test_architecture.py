"""Imports point down only, and only a module of its own imports a heavy optional library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edgekd"


def layers(page: str) -> dict[str, int]:
    """The page's table: a module or a package (with all that is in it) and its layer."""
    found = {"__init__": 0, "__main__": 8}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[0].isdigit():
            names = (word.strip("`/").replace("/", ".") for word in cells[1].split() if word.startswith("`"))
            found |= dict.fromkeys(names, int(cells[0]))
    return found


LAYERS = layers((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))

# Who may name these at all; everyone who does must do it inside a function.
OPTIONAL = {"tensorrt": ("runtimes", "export"), "pycuda": ("runtimes",)}
LAZY = ("tensorrt", "pycuda", "cuda", "onnx", "onnxruntime", "onnxscript", "openvino", "torchvision", "pynvml")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit(module: str) -> str:
    """`edgekd.data.voc` belongs to `data`, but `edgekd.data.loader` has a row of its own."""
    parts = module.split(".")
    if ".".join(parts[1:3]) in LAYERS:
        return ".".join(parts[1:3])
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, path: Path, inside: bool = False) -> list[tuple[str, int, bool]]:
    """(module, line, whether inside a function) of every import that runs."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module in ("edgekd",):
                names = [f"edgekd.{alias.name}" for alias in node.names]
            found += [(name, node.lineno, inside) for name in names]
        else:
            in_function = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            found += imports(node, path, in_function)
    return found


def parsed(path: Path) -> list[tuple[str, int, bool]]:
    return imports(ast.parse(path.read_text(encoding="utf-8")), path)


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    own = unit(module_name(path))
    assert own in LAYERS, f"{path}: no layer; add it to the table of ARCHITECTURE.md"
    for name, line, _ in parsed(path):
        if name.split(".")[0] != "edgekd" or unit(name).startswith("__"):
            continue
        target = unit(name)
        assert target in LAYERS, f"{path}:{line}: imports {name}, which has no layer"
        assert LAYERS[target] <= LAYERS[own], f"{path}:{line}: {own} (layer {LAYERS[own]}) imports {target} above it"


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_optional_libraries_are_imported_inside_functions(path: Path) -> None:
    for name, line, inside in parsed(path):
        library = name.split(".")[0]
        assert library not in LAZY or inside, f"{path}:{line}: {library} at the top of a module"
        if library in OPTIONAL:
            assert unit(module_name(path)).split(".")[0] in OPTIONAL[library], (
                f"{path}:{line}: {library} belongs elsewhere"
            )


def test_every_entry_of_the_table_exists() -> None:
    assert max(LAYERS.values()) == 8
    assert LAYERS["data"] < LAYERS["data.loader"]
    for name in LAYERS:
        path = PACKAGE / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), f"{name} is gone: remove its layer"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import edgekd.data.voc", [("edgekd.data.voc", False)]),
        ("from edgekd import data", [("edgekd.data", False)]),
        ("def f():\n    import onnx", [("onnx", True)]),
        ("class A:\n    def f(self):\n        from edgekd.cli import app", [("edgekd.cli", True)]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx", [("typing", False)]),
        ("try:\n    import onnx\nexcept ImportError:\n    pass", [("onnx", False)]),
    ],
)
def test_the_reader_sees_imports(source: str, expected: list[tuple[str, bool]]) -> None:
    found = imports(ast.parse(source), Path("x.py"))
    assert [(name, inside) for name, _, inside in found] == expected
