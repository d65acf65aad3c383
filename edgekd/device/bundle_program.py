"""What a bundle holds beside its models: the program, which is edgekd's own modules, and a page that says how to run it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
PROGRAM = "edgekd.device.bundle_start"


def program_modules() -> dict[str, Path]:
    """Path in the bundle to source file, of every module of edgekd that the program can reach, itself not included."""
    found: dict[str, Path] = {}
    pending = [PROGRAM]
    while pending:
        name = pending.pop()
        parts = name.split(".")
        for depth in range(1, len(parts)):  # packages on the way
            package = "/".join(parts[:depth]) + "/__init__.py"
            found.setdefault(package, PACKAGE.parent / package)
        file = _source_of(name)
        relative = file.relative_to(PACKAGE.parent).as_posix()
        if relative in found and name != PROGRAM:
            continue
        if name != PROGRAM:
            found[relative] = file
        pending += _imported(file)
    return found


def _source_of(module: str) -> Path:
    path = PACKAGE.parent / module.replace(".", "/")
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def _imported(file: Path) -> list[str]:
    """Modules of edgekd that a file imports anywhere when it runs."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    checked = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    return [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgekd.") and id(node) not in checked
        if node.module is not None
    ]


def write_program(folder: Path) -> None:
    """bench.py and the modules it needs, under their own names, so that they find each other as they do here."""
    shutil.copyfile(_source_of(PROGRAM), folder / "bench.py")
    for relative, source in program_modules().items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if relative.endswith("/__init__.py") and relative.count("/") > 1:
            target.write_text('"""Part of edgekd, as far as a bundle needs it."""\n', encoding="utf-8")
        else:
            shutil.copyfile(source, target)


def readme(models: Sequence[dict[str, Any]]) -> str:
    """README.md of a bundle, from the manifest's entries."""
    rows = "\n".join(
        f"| `{model['file']}` | {model['name']} | {model['role']} | {model['precision']} | "
        f"{model['size_bytes'] / 1e6:.2f} MB | {'x'.join(map(str, model['input']['shape']))} |"
        for model in models
    )
    return f"""# Detectors to be measured on this device

| file | detector | role | precision | size | input |
|---|---|---|---|---|---|
{rows}

Needs Python 3.8 or later, NumPy 1.17 or later, and either TensorRT 8.5 or later (on a Jetson it comes with JetPack 5.1 and
later) or ONNX Runtime (`pip install onnxruntime`). Nothing is installed, nothing needs root, nothing is sent anywhere.

```
python3 bench.py --check          # only compare with the golden outputs
python3 bench.py                  # check, then measure; writes result.json
python3 bench.py --provider cpu   # or tensorrt, cuda; the best that is there if not given
```

Every file is compared with its hash in `manifest.json`, then every model with its golden outputs (`golden.npz`), before
anything is timed. Engines are built here on the first run, which takes minutes, and kept in `engines/` under the model's
hash, TensorRT's version, the GPU and the L4T release.

For steady figures on a Jetson, choose a power mode and pin the clocks first: `sudo nvpmodel -m 0`, `sudo jetson_clocks`.
"""
