"""Every module imports, and every `--help` prints, without the libraries that a machine may lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BLOCKER = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)
sys.meta_path.insert(0, Blocker())
"""
OPTIONAL = ("tensorrt", "pycuda", "onnx", "onnxruntime", "onnxscript", "openvino", "torchvision", "pynvml")
HEAVY = (*OPTIONAL, "torch", "numpy", "cv2", "PIL", "yaml", "lightning_fabric")

COMMANDS = (
    [],
    ["doctor"],
    ["data"],
    ["data", "make"],
    ["data", "check"],
    ["data", "convert"],
    ["data", "fetch"],
    ["data", "split"],
    ["data", "label"],
    ["plan"],
    ["train"],
    ["distill"],
    ["quantize"],
    ["export"],
    ["init"],
    ["bundle"],
    ["bench"],
    ["predict"],
    ["run"],
    ["compare"],
    ["report"],
    ["recipe"],
    ["recipe", "check"],
    ["recipe", "schema"],
)
HELP_LIMIT_S = 1.5
HELP_OVER_BARE = (
    4  # on a slow machine: as often the time of an app that does nothing; on an idle one it takes 2.6 times that
)


def run_blocked(code: str, blocked: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    source = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
    return subprocess.run([sys.executable, "-c", source, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_every_module_imports_without_optional_libraries() -> None:
    code = """
import importlib, pkgutil, edgekd
names = [module.name for module in pkgutil.walk_packages(edgekd.__path__, "edgekd.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""
    done = run_blocked(code, OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(list((ROOT / "edgekd").rglob("[a-z]*.py"))) - 1


def test_engines_are_built_and_measured_without_torch(tmp_path: Path) -> None:
    """Where TensorRT is there is not always a torch for its Python: ONNX in, engines and their ensemble's result out."""
    code = """
import sys
from pathlib import Path
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, make_dataset, write_detector
from tests.fake_tensorrt import ORIN, FakeTensorRT
sys.modules["tensorrt"] = FakeTensorRT("8.6.1")
from tests.host_buffers import HostBuffers
from edgekd.runtimes import tensorrt_runtime
from edgekd.export import engine_job
tensorrt_runtime.open_buffers = engine_job.open_buffers = lambda: HostBuffers(ORIN)
from edgekd.bench.runner import bench_artifacts
from edgekd.bench.entries import BenchArtifact, BenchEnsemble
from edgekd.recipe import BenchConfig
from edgekd.export import ExportData
folder = Path(sys.argv[1])
data = make_dataset(folder / "data", images=4)
source = write_detector(folder / "s.onnx", GOOD_BOXES, GOOD_SCORES)
built = engine_job.export_engine(source, folder / "s.engine", data=ExportData(val=data))
assert built.parity[-1].ap50 == built.parity[-1].ap50_reference > 0.9, built.parity
entries = [BenchArtifact(folder / "s.engine", name, "teacher") for name in ("one", "two")]
result = bench_artifacts(
    entries,
    data,
    config=BenchConfig(samples=20, warmup_seconds=0),
    out=folder / "result.json",
    ensemble=BenchEnsemble(("one", "two")),
    memory=False,
    energy_seconds=0,
)
assert [row["map"]["ap50"] > 0.9 for row in result["rows"]] == [True] * 4, result["rows"]
"""
    done = run_blocked(code, ("torch", "lightning_fabric", "onnxscript"), str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks() -> None:
    done = run_blocked("import onnx", OPTIONAL)
    assert done.returncode != 0
    assert "blocked by the test" in done.stderr


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, edgekd, edgekd.cli\nprint([name for name in ('torch', 'numpy', 'cv2') if name in sys.modules])"
    done = run_blocked(code, ())
    assert done.stdout.strip() == "[]", done.stderr


def cpu_seconds(code: str, *arguments: str) -> float:
    """Of a process of its own: in CPU time, since other tests run beside this one."""
    before = os.times()
    done = run_blocked(code, HEAVY, *arguments, "--help")
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    return after.children_user - before.children_user + after.children_system - before.children_system


BARE_APP = "import typer; app = typer.Typer(); app.command()(lambda: None); app()"


@pytest.mark.parametrize("command", [[], ["bench"]], ids=["edgekd", "bench"])
def test_help_prints_quickly_with_only_typer(command: list[str]) -> None:
    """Importing `edgekd.cli` imports what all commands' helps take: two show the time of each."""
    for _ in range(3):
        taken = cpu_seconds("from edgekd.cli import main; main()", *command)
        if taken < HELP_LIMIT_S or taken < HELP_OVER_BARE * cpu_seconds(BARE_APP):
            return
    pytest.fail(f"--help took {taken:.2f} s")


def test_every_help_prints_with_only_typer() -> None:
    code = """
import contextlib, io, json, sys
from edgekd.cli import main
before, printed = set(sys.modules), []
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = [*words, "--help"]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main()
    printed.append(shown.getvalue())
print(json.dumps({"printed": printed, "imported": sorted(name for name in set(sys.modules) - before if "edgekd" in name)}))
"""
    done = run_blocked(code, HEAVY, json.dumps(COMMANDS))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for command, text in zip(COMMANDS, told["printed"], strict=True):
        assert " ".join(["Usage: edgekd", *command, "[OPTIONS]"]) in text
    assert told["imported"] == [], "no help takes more than is imported for all"


def test_every_command_is_in_the_list_above() -> None:
    import typer.main

    from edgekd.cli import app

    found = [[]]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found.append([name])
        found += [[name, below] for below in getattr(command, "commands", {})]
    assert sorted(found) == sorted(COMMANDS)


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "edgekd", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout.startswith("edgekd ")
