"""Bundles: what is in them, that they run alone, and that nothing is timed before it is right."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.artifact import sha256_file
from edgekd.bench.entries import BenchArtifact
from edgekd.device import bundle_start, timing
from edgekd.device.bundle import Bundle, is_bundle, make_bundle
from edgekd.device.bundle_bench import read_bundle, run_bundle
from edgekd.device.bundle_program import program_modules
from edgekd.device.bundle_rows import warnings_of
from edgekd.device.golden import check, normalise
from edgekd.device.sessions import open_session
from edgekd.errors import ArtifactError, EdgeKDError, MissingDependencyError, ParityError, RuntimeFailure, UserError
from edgekd.export import ExportData
from edgekd.preprocess import normalise as reference_normalise
from edgekd.recipe import OnnxTeacher
from edgekd.types import PreprocessSpec
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, NAMES, POOR_SCORES, make_dataset, write_detector
from tests.onnx_zoo import EXPORTS, INPUT_HW, write

QUICK = timing.Plan(samples=20, seconds=0, warmup_s=0)
STANDARD = {*sys.stdlib_module_names, "numpy", "onnxruntime", "tensorrt", "edgekd"}
GPU_ONLY = {"pycuda", "cuda", "torch", "pynvml", "psutil"}
"""Imported only where they are there: the ways to GPU memory, and NVML."""


def write_model(path: Path, scores: np.ndarray = GOOD_SCORES) -> Path:
    return write_detector(path, GOOD_BOXES, scores)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ExportData:
    return ExportData(val=make_dataset(tmp_path_factory.mktemp("data"), images=5))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: ExportData) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    sources = [
        BenchArtifact(write_model(folder / "a.onnx"), "first teacher", "teacher"),
        BenchArtifact(write_model(folder / "b.onnx", POOR_SCORES), "second/teacher", "teacher"),
        BenchArtifact(write_model(folder / "s.onnx"), "student", "student_distilled"),
    ]
    return make_bundle(sources, folder / "out", data=data)


@pytest.fixture
def copy(made: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


def bench(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """bench.py as on a device: from another folder, with nothing of this tree on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    quick = ("--samples", "20", "--seconds", "0", "--warmup", "0", "--provider", "cpu", "--threads", "1")
    return subprocess.run(
        [python, "-B", str(folder / "bench.py"), *quick, *arguments],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env=environment,
        timeout=120,
    )


def test_contents(made: Bundle) -> None:
    manifest = read_bundle(made.folder)
    present = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == present - {"manifest.json"}
    assert all(sha256_file(made.folder / name) == digest for name, digest in manifest["files"].items())
    files = [model["file"] for model in manifest["models"]]
    assert files == ["first-teacher.fp32.onnx", "second-teacher.fp32.onnx", "student.fp32.onnx"]
    model = manifest["models"][0]
    assert model["input"] == {"name": "images", "shape": [1, 3, 64, 64], "dtype": "tensor(float)"}
    assert [output["name"] for output in model["outputs"]] == ["boxes", "scores"]
    assert (model["class_names"], model["precision"]) == (list(NAMES), "fp32")
    assert not manifest["golden"]["generated"]
    with np.load(made.folder / "golden.npz", allow_pickle=False) as golden:
        assert golden[model["golden"]["images"]].dtype == np.uint8
        assert golden[f"{model['golden']['outputs']}/0/scores"].shape == (1, 3, 2)
    assert str(made.folder.parent) not in (made.folder / "manifest.json").read_text(encoding="utf-8")


def test_the_same_bundle_has_the_same_hash(made: Bundle, data: ExportData, tmp_path: Path) -> None:
    source = made.folder.parent / "s.onnx"
    first, second = (make_bundle([BenchArtifact(source, "s")], tmp_path / name, data=data) for name in "ab")
    assert first.sha256 == second.sha256 != made.sha256


def test_runs_alone(made: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = bench(made.folder, "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["first teacher", "second/teacher", "student", "ensemble"]
    assert (result["reference"], result["bundle"]) == ("ensemble", made.sha256)
    for row in rows.values():
        assert row["latency_ms"]["samples"] >= 20
        assert row["latency_ms"]["p99"] is None, "twenty samples have no 99th percentile"
        assert 0 < row["latency_ms"]["median"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["max"]
        low, high = row["speedup_interval"]
        assert low <= row["speedup_vs_ensemble"] <= high
    assert rows["ensemble"]["speedup_vs_ensemble"] == 1.0
    assert rows["student"]["golden"]["images"] == 4
    assert rows["student"]["golden"]["matched"] == rows["student"]["golden"]["confident"] > 0
    assert not (made.folder / "result.json").exists()
    assert not list(made.folder.rglob("__pycache__"))


def test_golden_outputs_come_before_timing(copy: Path) -> None:
    write_model(copy / "student.fp32.onnx", POOR_SCORES)  # another detector, under a manifest that vouches for it
    vouch(copy, "student.fp32.onnx")
    said: list[str] = []
    with pytest.raises(ParityError, match=r"student.fp32.onnx .* nothing was timed"):
        run_bundle(copy, provider="cpu", threads=1, plan=QUICK, say=said.append)
    assert not any("timing" in line for line in said)
    done = bench(copy, "--out", str(copy.parent / "result.json"))
    assert done.returncode == 1
    assert "golden outputs" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (copy.parent / "result.json").exists()
    fine = bench(copy, "--only", "first-teacher.fp32.onnx", "--check", "--out", str(copy.parent / "result.json"))
    assert fine.returncode == 0, fine.stderr


def vouch(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][name] = sha256_file(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("name", ["student.fp32.onnx", "golden.npz", "edgekd/device/power.py"])
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_file_stops_everything(copy: Path, name: str, damage: str) -> None:
    if damage == "gone":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(ArtifactError, match="missing or has changed"):
        read_bundle(copy)


def test_a_bundle_of_another_kind(tmp_path: Path) -> None:
    for text in ("", "[]", '{"schema": "edgekd.bundle/99"}'):
        (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
        with pytest.raises(ArtifactError):
            read_bundle(tmp_path)
    assert not is_bundle(tmp_path)


def test_what_is_missing_is_said(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependencyError, match="TensorRT"):
        run_bundle(made.folder, provider="tensorrt", plan=QUICK, say=lambda text: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="ONNX Runtime cannot be imported"):
        run_bundle(made.folder, provider="cpu", plan=QUICK, say=lambda text: None)


def test_a_device_without_numpy_is_told_so(copy: Path) -> None:
    (copy / "numpy.py").write_text("raise ImportError('none here')", encoding="utf-8")
    done = bench(copy)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: NumPy is missing: none here\n  fix: ")


def test_a_python_that_is_too_old_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JetPack 4 has Python 3.6, which must be able to read the file that says so."""
    ast.parse(program_source().read_text(encoding="utf-8"), feature_version=(3, 6))
    with monkeypatch.context() as older:
        older.setattr(sys, "version_info", (3, 6, 9))
        assert bundle_start.main() == 2
    assert "this Python is too old" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_not_passed_over(made: Bundle) -> None:
    with pytest.raises(ArtifactError, match=r"got: +studnet\.onnx\n +expected: +first-teacher\.fp32\.onnx, "):
        run_bundle(made.folder, only=["student.fp32.onnx", "studnet.onnx"], say=lambda text: None)


def test_auto_says_what_it_passes_over(made: Bundle) -> None:
    said: list[str] = []
    found = run_bundle(made.folder, plan=QUICK, check_only=True, say=said.append)
    assert len(found["checked"]) == 3
    assert any(line.startswith("tensorrt is not used:") for line in said)


@pytest.mark.parametrize("jetson", [None, {"model": "Orin"}])
def test_a_jetson_that_is_measured_without_tensorrt_is_warned_of(
    made: Bundle, monkeypatch: pytest.MonkeyPatch, jetson: dict[str, str] | None
) -> None:
    from edgekd.device import bundle_bench

    facts = bundle_bench.machine_facts
    monkeypatch.setattr(bundle_bench, "machine_facts", lambda nvml: {**facts(nvml=nvml), "jetson": jetson})
    quiet: dict[str, Any] = {"threads": 1, "plan": QUICK, "energy_s": 0.0, "say": lambda text: None}
    result = run_bundle(made.folder, only=["student.fp32.onnx"], **quiet)
    warned = [text for text in result["warnings"] if "is not used" in text]
    assert [text.split()[0] for text in warned] == ([] if jetson is None else ["tensorrt", "cuda"])
    assert "\nrun by onnxruntime (CPUExecutionProvider)" in bundle_bench.table(result)


def test_energy_where_there_is_a_rail(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.device import bundle_bench
    from edgekd.device.rails import PowerRail, RailGroup

    group = RailGroup("rapl", (PowerRail("package-0", lambda: 12.0),), ("package-0",))
    monkeypatch.setattr(bundle_bench, "power_rails", lambda nvml: (group,))
    quiet: dict[str, Any] = {"provider": "cpu", "threads": 1, "plan": QUICK, "say": lambda text: None}
    result = run_bundle(made.folder, energy_s=0.1, idle_s=0.05, only=["student.fp32.onnx"], **quiet)
    energy = result["rows"][0]["energy"]
    assert (energy["rail"], energy["mean_w"], energy["idle_w"]) == ("package-0", 12.0, 12.0)
    assert result["rows"][0]["energy_mj"] == energy["gross_mj"] > 0
    assert energy["above_idle_mj"] == 0.0
    assert result["settings"]["energy_seconds"] == 0.1


def test_what_killed_processes_left_is_taken_up_or_removed(made: Bundle, data: ExportData, tmp_path: Path) -> None:
    dead, living, theirs = (tmp_path / f".out.{name}" for name in ("dead0000", "living00", "notes000"))
    for folder in (dead, living):
        (folder / "new").mkdir(parents=True)
        (folder / "new" / "half.onnx").touch()
    shutil.copytree(made.folder, dead / "old")  # killed between two renames, with engines that took minutes
    (dead / "old" / "engines").mkdir()
    (dead / "old" / "engines" / "0.engine").touch()
    theirs.mkdir()
    (theirs / "notes.txt").touch()
    held = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        make_bundle([BenchArtifact(made.folder.parent / "s.onnx", "s")], tmp_path / "out", data=data)
    finally:
        os.close(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.living00", ".out.notes000", "out"]
    assert (tmp_path / "out" / "engines" / "0.engine").is_file()
    assert list(theirs.iterdir()) == [theirs / "notes.txt"]


def test_a_process_holds_the_bundle_that_it_writes(made: Bundle, data: ExportData, tmp_path: Path) -> None:
    source = [BenchArtifact(made.folder.parent / "s.onnx", "s")]

    def say(text: str) -> None:
        if first:
            first.clear()
            make_bundle(source, tmp_path / "out", data=data)  # as of another process, in the midst of this one

    first = ["not yet"]
    make_bundle(source, tmp_path / "out", data=data, say=say)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_bundle_is_replaced_and_nothing_else(made: Bundle, data: ExportData, tmp_path: Path) -> None:
    source = [BenchArtifact(made.folder.parent / "s.onnx", "s")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("dear diary", encoding="utf-8")
    with pytest.raises(UserError, match="no bundle"):
        make_bundle(source, tmp_path / "mine", data=data)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]
    first = make_bundle(source, tmp_path / "out", data=data)
    for name in ("result.json", "edgekd/mine.txt"):
        (tmp_path / "out" / name).write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"edgekd/mine.txt, result.json"):
        make_bundle(source, tmp_path / "out", data=data)
    assert (tmp_path / "out/result.json").read_text(encoding="utf-8") == "x"
    for name in ("result.json", "edgekd/mine.txt"):
        (tmp_path / "out" / name).unlink()
    for name in ("engines/0.engine", "edgekd/__pycache__/x.pyc"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("x", encoding="utf-8")
    again = make_bundle([*source, BenchArtifact(made.folder.parent / "a.onnx", "a")], tmp_path / "out", data=data)
    assert again.sha256 != first.sha256
    assert (tmp_path / "out/engines/0.engine").is_file(), "the program's own, which it knows by their hashes"
    assert not (tmp_path / "out/edgekd/__pycache__").exists()
    assert not (tmp_path / "out/model.fp32.onnx").exists()
    assert make_bundle(source, tmp_path / "out", data=data).sha256 == first.sha256
    broken = [*source, BenchArtifact(tmp_path / "none.onnx", "none")]
    with pytest.raises(ArtifactError):
        make_bundle(broken, tmp_path / "out", data=data)
    assert read_bundle(tmp_path / "out")["sha256"] == first.sha256, "a failure leaves the earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])  # EFBIG: `ulimit -f`, or 4 GB on a USB stick
def test_a_full_disk_is_not_the_source_s_fault(
    made: Bundle, data: ExportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr("edgekd.device.bundle.shutil.copyfile", full)
    source = made.folder.parent / "s.onnx"
    with pytest.raises(EdgeKDError) as caught:
        make_bundle([BenchArtifact(source, "s")], tmp_path / "out", data=data)
    assert caught.value.what == f"{tmp_path / 'out'} cannot be written"
    assert str(source) not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_is_bundled_as_it_is(made: Bundle, data: ExportData, tmp_path: Path) -> None:
    source = [BenchArtifact(made.folder.parent / "s.onnx", "s")]
    bundle = make_bundle(source, tmp_path / "out", data=data, precisions=["fp32"])
    assert sha256_file(tmp_path / "out/model.fp32.onnx") == sha256_file(source[0].path) == bundle.models[0]["sha256"]
    with pytest.raises(UserError, match="bundled as it is"):
        make_bundle(source, tmp_path / "other", data=data, precisions=["int8"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "taken", [("FLOAT", (3, *INPUT_HW)), ("FLOAT", (2, 3, *INPUT_HW)), ("DOUBLE", (1, 3, *INPUT_HW))]
)
def test_a_model_that_the_program_cannot_feed_is_not_bundled(
    taken: tuple[str, tuple[int, ...]], data: ExportData, tmp_path: Path
) -> None:
    source = write(replace(EXPORTS["YOLO-NAS raw"], inputs={"images": taken}), tmp_path / "m.onnx")
    options = OnnxTeacher(name="m", onnx=str(source), class_names=("cat", "dog", "cow"))
    with pytest.raises(ArtifactError, match="one image at a time"):
        make_bundle([BenchArtifact(source, "m", options=options)], tmp_path / "out", data=data)


def test_an_onnx_runtime_that_is_too_old_is_told_so(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 1.10 says it, the newest that NumPy 1.17 of JetPack 5 takes: what is wrong stands behind the C++ place."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(
            "[ONNXRuntimeError] : 1 : FAIL : Load model from x.onnx failed:/onnxruntime_src/onnxruntime/core/graph/"
            "model_load_utils.h:47 void onnxruntime::model_load_utils::ValidateOpsetForDomain(const std::unordered_map<"
            "std::basic_string<char>, int>&, const onnxruntime::logging::Logger&, bool, const string&, int) ONNX Runtime "
            "only *guarantees* support for models stamped with official released onnx opset versions. Opset 17 is not."
        )

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(RuntimeFailure, match=r"failed: ONNX Runtime only[\s\S]*pip install -U onnxruntime"):
        run_bundle(made.folder, provider="cpu", plan=QUICK, say=lambda text: None)


def test_what_onnx_runtime_fails_at_while_running_is_an_error_of_edgekd(made: Bundle) -> None:
    entry = read_bundle(made.folder)["models"][0]
    session = open_session(made.folder / entry["file"], entry, "cpu", 1, made.folder)
    with pytest.raises(RuntimeFailure, match=f"{entry['file']}: ONNX Runtime failed"):
        session.run(np.zeros((1, 3, 8, 8), np.float32))


def test_every_precision_of_a_checkpoint(tmp_path: Path, data: ExportData, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.export import job
    from tests.export_double import ToyDetector, traced

    monkeypatch.setattr(job, "trace", traced)
    monkeypatch.setattr(job, "load_detector", lambda source: ToyDetector())
    monkeypatch.setattr(job, "checkpoint_facts", lambda source: {})
    checkpoint = tmp_path / "best.pt"
    checkpoint.write_bytes(b"stands for a checkpoint")
    bundle = make_bundle(
        [BenchArtifact(checkpoint, "toy")], tmp_path / "out", precisions=["fp32", "fp16", "int8"], data=data
    )
    assert [m["file"] for m in bundle.models] == ["model.fp32.onnx", "model.fp16.onnx", "model.int8.onnx"]
    assert [m["half_inside"] for m in bundle.models] == [False, True, False]
    assert bundle.models[2]["target"] == "tensorrt"
    found = run_bundle(bundle.folder, provider="cpu", threads=1, check_only=True, say=lambda text: None)
    assert [entry["scores_max_abs"] < 1e-3 for entry in found["checked"]] == [True] * 3


def test_the_program_needs_only_numpy() -> None:
    for relative, path in {**program_modules(), "bench.py": program_source()}.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in STANDARD | GPU_ONLY, f"{relative}:{node.lineno}: {name}"


def test_the_program_runs_on_the_numpy_of_jetpack_5(made: Bundle) -> None:
    """NumPy 1.17 has no `numpy.typing`; nothing may ask for it when it runs."""
    modules = [path[: -len(".py")].replace("/", ".") for path in program_modules() if not path.endswith("__init__.py")]
    code = "import sys, importlib; sys.modules['numpy.typing'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    command = [sys.executable, "-B", "-c", code, *modules, "bench"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=made.folder)
    assert done.returncode == 0, done.stderr


def program_source() -> Path:
    return Path(bundle_start.__file__)


SINCE_3_9 = {"Callable", "Mapping", "Sequence", "Iterator", "Iterable", "dict", "list", "tuple", "set", "type"}


@pytest.mark.parametrize("path", sorted({*program_modules().values(), program_source()}), ids=lambda path: path.stem)
def test_the_program_is_python_3_8(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    generic = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "collections.abc"
        for alias in node.names
    } | {"dict", "list", "tuple", "set", "type"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert "strict" not in {word.arg for word in node.keywords}, f"{path}:{node.lineno}: zip's strict is 3.10's"
        # Annotations are never evaluated; what stands in an assignment is.
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            name = node.value.value
            assert not (isinstance(name, ast.Name) and name.id in generic), f"{path}:{node.lineno}: subscripted in 3.9"


def old_python() -> str | None:
    """A Python 3.8 with NumPy and ONNX Runtime: EDGEKD_PYTHON38, or python3.8 on the path."""
    for name in (os.environ.get("EDGEKD_PYTHON38"), shutil.which("python3.8")):
        code = "import sys, numpy, onnxruntime; sys.exit(sys.version_info[:2] != (3, 8))"
        if name and subprocess.run([name, "-c", code], capture_output=True).returncode == 0:
            return name
    return None


def test_runs_on_python_3_8(made: Bundle, tmp_path: Path) -> None:
    python = old_python()
    if python is None:
        pytest.skip("no Python 3.8 with NumPy and ONNX Runtime: name one in EDGEKD_PYTHON38")
    done = bench(made.folder, "--out", str(tmp_path / "result.json"), python=python)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["device"]["python"].startswith("3.8")


def test_the_same_tensor_as_edgekd() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    spec = PreprocessSpec((12, 20))
    assert np.array_equal(normalise(image, spec.to_dict()), reference_normalise(image, spec))


class FakeClock:
    """Every call to a subject takes as long as it is told; reading the clock takes no time."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def subject(self, ms: float, calls: list[str], name: str) -> Any:
        def run(_: int) -> None:
            calls.append(name)
            self.now += int(ms * 1e6)

        return run


@pytest.mark.parametrize(
    ("plan", "samples"),
    [
        (timing.Plan(samples=100, seconds=0, warmup_s=0), 100),
        (timing.Plan(samples=20, seconds=0.59, warmup_s=0), 590),  # 10 ms of a block's 12 are recorded
        (timing.Plan(samples=10_000, seconds=60, limit_s=0.2, warmup_s=0), 170),
    ],
)
def test_how_long_is_measured(plan: timing.Plan, samples: int) -> None:
    clock, calls = FakeClock(), list[str]()
    found = timing.measure([clock.subject(1, calls, "a"), clock.subject(1, calls, "b")], plan, clock)
    assert [timed.blocks_ms.size for timed in found] == [samples, samples]
    assert np.allclose(found[0].blocks_ms, 1.0)
    assert all(timed.settled for timed in found)


def test_blocks_alternate() -> None:
    clock, calls = FakeClock(), list[str]()
    timing.measure([clock.subject(1, calls, "a"), clock.subject(2, calls, "b")], QUICK, clock)
    rounds = calls[40:]  # after 20 of warm-up each
    size = timing.BLOCK + timing.UNRECORDED
    firsts = [rounds[at] for at in range(0, len(rounds), size)]
    assert len(firsts) == 4
    assert firsts[:2] == firsts[:1:-1], "ABBA"


def entry(precision: str, kind: str = "boxes-scores") -> dict[str, Any]:
    from dataclasses import asdict

    from edgekd.export.parity import TOLERANCES
    from edgekd.runtimes.output_format import OutputFormat

    names = ("boxes", "scores") if kind == "boxes-scores" else ("boxes", "scores", "labels")
    return {
        "tolerance": asdict(TOLERANCES[precision]),  # type: ignore[index]
        "output_format": OutputFormat(kind, names, 2).to_dict(),  # type: ignore[arg-type]
        "preprocess": PreprocessSpec((64, 64)).to_dict(),
    }


@pytest.mark.parametrize(
    ("precision", "shift_px", "score_gap", "wrong"),
    [
        ("fp32", 0.0, 0.0, None),
        ("fp32", 0.01, 1e-4, None),
        ("fp32", 0.0, 0.01, "a score differs"),
        ("fp32", 0.5, 0.0, "box"),
        ("int8", 0.5, 0.02, None),
        ("int8", 30.0, 0.0, "only"),
        ("int8", 0.0, 0.75, "only"),
    ],
)
def test_golden_tolerances(precision: str, shift_px: float, score_gap: float, wrong: str | None) -> None:
    expected = {"boxes": GOOD_BOXES[None].astype(np.float32), "scores": GOOD_SCORES[None].astype(np.float32)}
    found = {"boxes": expected["boxes"] + shift_px, "scores": np.maximum(expected["scores"] - score_gap, 0)}
    failure = check(entry(precision), expected, found)["failure"]
    assert (failure is None) == (wrong is None), failure
    assert wrong is None or failure.startswith(wrong)


def test_golden_finished_detections_may_lose_a_weak_one() -> None:
    def answer(count: int) -> dict[str, np.ndarray]:
        scores = np.array([0.9, 0.8, 0.01], np.float32)[:count]
        return {"boxes": GOOD_BOXES[:count].astype(np.float32), "scores": scores, "labels": np.array([0, 1, 0])[:count]}

    model = entry("fp32", "detections")
    assert check(model, answer(3), answer(2))["failure"] is None
    assert check(model, answer(3), answer(1))["failure"].startswith("only 1 of 2")


@pytest.fixture
def orin_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a fake TensorRT of some version, and an Orin's facts, in place of what is not here."""
    from types import SimpleNamespace

    from tests.fake_tensorrt import ORIN, FakeTensorRT
    from tests.host_buffers import HostBuffers

    def install(version: str, device: Any = ORIN) -> Any:
        fake = FakeTensorRT(version, device)
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        monkeypatch.setattr("edgekd.device.engines.CudaDriver", lambda: SimpleNamespace(facts=lambda: device))
        monkeypatch.setattr("edgekd.runtimes.tensorrt_runtime.open_buffers", lambda: HostBuffers(device))
        return fake

    return install


def fake_versions() -> tuple[str, ...]:
    from tests.fake_tensorrt import VERSIONS

    return VERSIONS


@pytest.mark.parametrize("version", fake_versions())
def test_engines_are_built_once_and_kept_by_all_that_decides_them(
    made: Bundle, tmp_path: Path, orin_with: Any, version: str
) -> None:
    from dataclasses import replace

    from tests.fake_tensorrt import ORIN

    settings: dict[str, Any] = {"plan": QUICK, "only": ["student.fp32.onnx"], "cache": tmp_path, "say": lambda _: None}
    fake = orin_with(version)
    first = run_bundle(made.folder, **settings)["rows"][0]
    assert (first["runtime"], first["session"]["from_cache"]) == ("tensorrt", True), "built when it was chosen"
    assert first["session"]["flags"] == ["no TF32"]
    assert fake._builds == 1
    again = orin_with(version)
    run_bundle(made.folder, **settings)
    assert again._builds == 0
    (engine,) = tmp_path.glob("*.engine")
    engine.write_bytes(b"damaged")
    damaged = orin_with(version)
    run_bundle(made.folder, **settings)
    assert damaged._builds == 1
    rebooted = orin_with(version, replace(ORIN, memory_bytes=ORIN.memory_bytes - 4096, cuda="12.8"))
    run_bundle(made.folder, **settings)
    assert rebooted._builds == 0, "a few pages more for the kernel make no other device"
    for change in ({"l4t": "36.3.0"}, {"compute_capability": "8.9"}, {"memory_bytes": 64 << 30}):
        other = orin_with(version, replace(ORIN, **change))
        run_bundle(made.folder, **settings)
        assert other._builds == 1
    assert len(list(tmp_path.glob("*.engine"))) == 4


STEADY = {
    "name": "toy",
    "precision": "fp16",
    "settled": True,
    "drift": 0.0,
    "latency_ms": {"median": 2.0, "p90": 2.5},
    "session": None,
}


def test_a_long_tail_is_said() -> None:
    row = {**STEADY, "latency_ms": {"median": 2.0, "p90": 7.0}}
    said = warnings_of([row], {"throttled": [], "before": {"clocks": {}}})
    assert said == ["toy fp16: every tenth inference took over 3.5x the median"]


@pytest.mark.parametrize(
    ("built", "said"),
    [
        ({"fp32": 9}, ["toy fp16: TensorRT built no layer in fp16, only in fp32"]),
        ({"fp16": 1, "fp32": 8}, []),
        ({"unknown": 9}, []),
        (None, []),
    ],
)
def test_an_engine_that_is_not_in_its_precision_is_said(built: dict[str, int] | None, said: list[str]) -> None:
    session = None if built is None else {"layer_precisions": built}
    row = {**STEADY, "session": session}
    assert warnings_of([row], {"throttled": [], "before": {"clocks": {}}}) == said


def test_nms_inside_is_not_given_to_tensorrt(data: ExportData, tmp_path: Path, orin_with: Any) -> None:
    """Its outputs grow with the picture, and TensorRT would write past what was allocated for one row."""
    import onnx

    from edgekd.export.onnx import detections_form
    from edgekd.selection import Selection

    orin_with("8.6.1")
    model = onnx.load(str(write_model(tmp_path / "plain.onnx")))
    onnx.save(detections_form(model, Selection()), str(tmp_path / "nms.onnx"))
    bundle = make_bundle([BenchArtifact(tmp_path / "nms.onnx", "toy")], tmp_path / "out", data=data)
    settings: dict[str, Any] = {"check_only": True, "cache": tmp_path / "engines"}
    with pytest.raises(RuntimeFailure, match="NMS is inside"):
        run_bundle(bundle.folder, provider="tensorrt", say=lambda _: None, **settings)
    said: list[str] = []
    assert run_bundle(bundle.folder, say=said.append, **settings)["checked"]
    assert any(line.startswith("tensorrt is not used") and "NMS is inside" in line for line in said)


@pytest.mark.parametrize("version", fake_versions())
def test_every_precision_of_a_run_becomes_an_engine_on_the_device(
    data: ExportData, tmp_path: Path, orin_with: Any, version: str
) -> None:
    fake = orin_with(version)
    model = helpful_detector(tmp_path / "fp32.onnx")
    bundle = make_bundle([BenchArtifact(path, path.stem) for path in model], tmp_path / "out", data=data)
    result = run_bundle(bundle.folder, plan=QUICK, energy_s=0, cache=tmp_path / "engines", say=lambda _: None)
    rows = {row["precision"]: row["session"] for row in result["rows"]}
    assert set(rows) == {"fp32", "fp16"}
    assert fake._builds == 2
    weak = tuple(int(part) for part in version.split(".")[:2]) < (10, 12)
    assert rows["fp16"]["flags"] == (["FP16", "PREFER_PRECISION_CONSTRAINTS"] if weak else [])


def helpful_detector(path: Path) -> list[Path]:
    """The same detector in fp32 and fp16."""
    import onnx

    from edgekd.export.float16 import to_float16
    from edgekd.export.graph import RAW_KEY, name_nodes, set_metadata

    model = onnx.load(str(write_model(path)))
    name_nodes(model)
    set_metadata(model, {RAW_KEY: {"features": "features"}})
    half = path.with_name("fp16.onnx")
    onnx.save(to_float16(model), str(half))
    return [path, half]
