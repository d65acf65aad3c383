"""benchmarks/gpu: each stage by itself, on a stand-in for TensorRT and on the CPU, and what happens when one is cut off."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "gpu"
sys.path.insert(0, str(SCRIPTS))

import estimate  # noqa: E402
import record  # noqa: E402
import run  # noqa: E402
import stages  # noqa: E402
import summary_page  # noqa: E402

from edgekd.checkpoint import save_detector  # noqa: E402
from edgekd.data.scenes import make_scenes  # noqa: E402
from edgekd.detectors import build_detector, spec_for  # noqa: E402
from edgekd.detectors.complexity import count_macs  # noqa: E402
from edgekd.errors import ParityError  # noqa: E402
from edgekd.recipe import ModelConfig  # noqa: E402
from edgekd.recipe_file import load_recipe  # noqa: E402
from tests.export_double import CLASSES, ToyDetector, traced  # noqa: E402
from tests.fake_tensorrt import ORIN, FakeTensorRT  # noqa: E402
from tests.host_buffers import HostBuffers  # noqa: E402

Options = Callable[..., argparse.Namespace]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", counts={"train": 8, "val": 4, "test": 4})


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "model.pt"
    config = ModelConfig(model="yolo-nano", input_size=64, width=0.25)
    save_detector(path, build_detector(spec_for(config, CLASSES)), {})
    return path


@pytest.fixture
def options(scenes: Path, student: Path, tmp_path: Path) -> Options:
    def make(**changed: Any) -> argparse.Namespace:
        given = ["--data", str(scenes), "--student", str(student), "--out", str(tmp_path / "out")]
        quick = ["--samples", "20", "--seconds", "0", "--energy-seconds", "0", "--step-seconds", "0.01"]
        found = run.arguments([*given, *quick])
        vars(found).update(changed)
        return found

    return make


@pytest.fixture(scope="module")
def bundled(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student in three precisions and two teachers, by the script's own stage."""
    from edgekd.export import export_run, job

    folder = tmp_path_factory.mktemp("bundled")
    checkpoint = folder / "best.pt"
    checkpoint.write_bytes(b"stands for a checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "trace", traced)
        patch.setattr(job, "load_detector", lambda source: ToyDetector())
        patch.setattr(job, "checkpoint_facts", lambda source: {})
        teachers = [folder / "one.onnx", folder / "two.onnx"]
        export_run(checkpoint, teachers[0])
        teachers[1].write_bytes(teachers[0].read_bytes())
        given = ["--data", str(scenes), "--student", str(checkpoint), "--out", str(folder / "out")]
        made = run.run_stage("bundle", run.arguments([*given, "--teachers", *map(str, teachers)]))
    assert made.data["status"] == "done", made.data["reason"]
    files = ["student.fp32.onnx", "student.fp16.onnx", "student.int8.onnx", "one.fp32.onnx", "two.fp32.onnx"]
    assert [model["file"] for model in made.data["models"]] == files
    return folder / "out" / "bundle"


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorRT:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = FakeTensorRT("8.6.1")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    for module in ("edgekd.runtimes.tensorrt_runtime", "edgekd.export.engine_job"):
        monkeypatch.setattr(f"{module}.open_buffers", lambda: HostBuffers(ORIN))
    return fake


def read(options: argparse.Namespace, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((options.out / f"{stage}.json").read_text(encoding="utf-8"))
    return found


def test_engines_whole(bundled: Path, options: Options, tensorrt: FakeTensorRT) -> None:
    given = options(bundle=bundled, no_library_tactics=True)
    run.run_stage("engines", given)
    found = read(given, "engines")
    assert (found["status"], found["tensorrt"]) == ("done", "8.6.1"), found["reason"]
    names = [f"{row['name']} {row['precision']}" for row in found["engines"]]
    assert names == ["student fp32", "student fp16", "student int8", "one fp16", "two fp16"]
    for row in found["engines"]:
        assert row["precision"] in row["layer_precisions"]
        assert row["parity"][-1]["ok"]
        assert 0 <= row["build_s"] <= row["seconds"]
    run.run_stage("latency_engines", given)
    found = read(given, "latency_engines")
    assert found["status"] == "done", found["reason"]
    rows = {row["name"]: row for row in found["result"]["rows"]}
    graphs = {name for name, row in rows.items() if row["cuda_graph"] and row["role"] != "ensemble"}
    assert graphs == {f"{name}+graph" for name in rows if f"{name}+graph" in rows}
    assert len(graphs) == 5
    assert rows["ensemble"]["role"] == "ensemble"
    assert all(row["map"]["ap50"] is not None and row["device_ms"]["compute"] >= 0 for row in rows.values())
    run.summarise(given)
    text = (given.out / "summary.md").read_text(encoding="utf-8")
    assert "student-int8+graph" in text
    assert "TensorRT 8.6.1" in text


def test_one_engine_that_fails_leaves_the_others(
    bundled: Path, options: Options, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = stages._build

    def one_fails(given: Any, entry: Any, precision: str, data: Any) -> Any:
        if precision == "int8":
            raise ParityError("the engine does not agree", got="1 of 9")
        return build(given, entry, precision, data)

    monkeypatch.setattr(stages, "_build", one_fails)
    given = options(bundle=bundled)
    run.run_stage("engines", given)
    found = read(given, "engines")
    assert found["status"] == "done"
    assert [("reason" in row) for row in found["engines"]] == [False, False, True, False, False]
    assert "1 of 9" in summary_page._engines(found)


@pytest.mark.parametrize("stage", ["engines", "latency_engines", "device_bundle"])
def test_without_tensorrt_engine_stages_say_so(stage: str, bundled: Path, options: Options) -> None:
    given = options(bundle=bundled)
    run.run_stage(stage, given)
    found = read(given, stage)
    assert found["status"] == "not run"
    assert "TensorRT cannot be imported" in found["reason"]


def test_without_a_bundle_that_is_said(options: Options, tensorrt: FakeTensorRT) -> None:
    given = options()
    for stage in ("engines", "device_bundle"):
        run.run_stage(stage, given)
        assert (read(given, stage)["status"], read(given, stage)["reason"][:18]) == ("not run", "there is no bundle")


def test_buffers_are_exercised() -> None:
    found = stages.exercise(HostBuffers(ORIN), 4096)
    assert (found["round_trip"], found["graph"]) == (True, True)
    assert found["to_device_gb_s"] > 0


def test_torch_on_a_cpu_is_measured_and_the_rest_named(options: Options) -> None:
    given = options(device="cpu")
    run.run_stage("latency_torch", given)
    found = read(given, "latency_torch")
    assert found["status"] == "done", found["reason"]
    first, *rest = found["rows"]
    assert (first["name"], first["latency_ms"]["samples"]) == ("torch eager fp32", 20)
    assert len(rest) == 3
    assert all("no CUDA" in row["reason"] for row in rest)


RECIPE = """
name: tiny
data: {root: here}
student: {model: yolo-nano, input_size: 64, width: 0.25}
teachers:
  - name: big
    train: {model: yolo-nano, input_size: 64, width: 0.5}
  - name: other
    train: {model: yolo-nano, input_size: 64, width: 0.25}
train: {epochs: 100, batch_size: 4, precision: fp32}
distill:
  terms: [{loss: response}, {loss: adversarial, gradient_ratio: 0.5}]
"""


def test_training_is_timed_and_its_hours_counted(options: Options, tmp_path: Path) -> None:
    recipe, broken = tmp_path / "tiny.yaml", tmp_path / "broken.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    broken.write_text(RECIPE.replace("yolo-nano", "yolo-huge"), encoding="utf-8")
    given = options(device="cpu", recipes=[broken, recipe], recipe_images=4000)
    run.run_stage("training", given)
    found = read(given, "training")
    assert found["status"] == "done", found["reason"]
    wrong, tiny = found["recipes"]
    assert "yolo-huge" in wrong["reason"]
    names = [one["name"] for one in tiny["trainings"]]
    assert names == ["student alone", "big", "other", "distilled"]
    alone, big, other, distilled = tiny["trainings"]
    assert other["images_per_s"] == alone["images_per_s"], "the same training is timed once"
    for one in (alone, big, distilled):
        assert all(rate > 0 for rate in one["images_per_s"].values())
        assert one["hours"] == pytest.approx(one["s_per_step"] * 100 * 1000 / 3600, abs=1e-4)
    whole = sum(one["hours"] for one in tiny["trainings"]) + tiny["answers_hours"]
    assert tiny["hours"] == pytest.approx(whole, abs=2e-3)
    assert "no GPU-hours" in found["notes"][0]
    assert "tiny: distilled (yolo-nano)" in summary_page._training(found)


@pytest.mark.parametrize(("term", "looks"), [("adversarial", 100), ("response", 1)])
def test_what_a_recipe_costs_is_reckoned_from_its_arithmetic(tmp_path: Path, term: str, looks: int) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("adversarial", term), encoding="utf-8")
    found = estimate.operations(load_recipe(tmp_path / "tiny.yaml"), images=10)
    small, big = (
        2 * count_macs(build_detector(spec_for(ModelConfig(model="yolo-nano", input_size=64, width=width), ["a"] * 20)))
        for width in (0.25, 0.5)
    )
    alone = 3 * small * 10 * 100
    assert found == {
        "student alone": alone,
        "teacher big": 3 * big * 10 * 100,
        "teacher other": alone,
        "distilled": alone + (small + big) * 10 * looks,
    }


CHILD = """
import subprocess, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from record import Record
record = Record(Path({out!r}), "engines")
record.add("engines", {{"name": "first", "precision": "fp32"}})
{then}
"""


def child(out: Path, then: str) -> list[str]:
    return [sys.executable, "-c", CHILD.format(paths=[str(SCRIPTS), str(ROOT)], out=str(out), then=then)]


def ended(pid: int) -> bool:
    """Within a few seconds, or taken over by a first process that has not collected it."""
    for _ in range(50):
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_stage_cut_off_keeps_what_it_found_and_takes_its_children_along(tmp_path: Path) -> None:
    out = tmp_path
    record.Record(out, "facts").end("done")
    before = (out / "facts.json").read_bytes()
    then = "inner = subprocess.Popen(['sleep', '60']); record.set(inner=inner.pid); inner.wait()"
    started = time.monotonic()
    run.supervise(child(out, then), out, "engines", 3.0)
    assert time.monotonic() - started < 20
    found = json.loads((out / "engines.json").read_text(encoding="utf-8"))
    assert (found["status"], found["reason"]) == ("cut off", "cut off after 3 s")
    assert [row["name"] for row in found["engines"]] == ["first"]
    assert ended(found["inner"])
    assert (out / "facts.json").read_bytes() == before


def test_ending_the_whole_call_ends_its_stage(tmp_path: Path) -> None:
    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.supervise(child(tmp_path, "__import__('time').sleep(60)"), tmp_path, "engines", 60.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found = json.loads((tmp_path / "engines.json").read_text(encoding="utf-8"))
    assert (found["status"], found["reason"]) == ("cut off", "the whole call was ended")


@pytest.mark.parametrize(
    ("then", "reason"),
    [("import os; print('the last word', flush=True); os._exit(3)", "exit code 3: the last word"), ("1 / 0", "Zero")],
)
def test_a_stage_that_dies_says_how(tmp_path: Path, then: str, reason: str) -> None:
    run.supervise(child(tmp_path, then), tmp_path, "engines", 30.0)
    found = json.loads((tmp_path / "engines.json").read_text(encoding="utf-8"))
    assert found["status"] == "failed"
    assert reason in found["reason"]
    assert len(found["engines"]) == 1


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    run.supervise([str(tmp_path / "python3.10")], tmp_path, "engines", 5.0)
    found = json.loads((tmp_path / "engines.json").read_text(encoding="utf-8"))
    assert (found["status"], "No such file" in found["reason"]) == ("failed", True)


def test_one_call(scenes: Path, student: Path, tmp_path: Path) -> None:
    """As a user starts it: stages in processes of their own, what cannot run named, exit code 0, and a copy."""
    command = [sys.executable, str(SCRIPTS / "run.py"), "--data", str(scenes), "--student", str(student)]
    command += ["--out", str(tmp_path / "out"), "--copy-to", str(tmp_path / "copy"), "--minutes", "5"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--stages", "buffers,engines"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    every = json.loads((tmp_path / "copy" / "all.json").read_text(encoding="utf-8"))["stages"]
    assert {name: data["status"] for name, data in every.items()} == {"buffers": "not run", "engines": "not run"}
    assert "TensorRT cannot be imported" in (tmp_path / "copy" / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", [["--stages", "buffers,engine"], ["--bundle", "nowhere"]])
def test_mistakes_are_told_before_anything_runs(
    wrong: list[str], options: Options, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--data", str(scenes), "--student", str(scenes), "--out", str(tmp_path / "no"), *wrong])
    assert stop.value.code == 2
    assert wrong[1].split(",")[-1] in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_cell_does_not_break_its_row() -> None:
    assert summary_page.table(("a",), [["x | y\nz"], [None], [True]]).splitlines()[2:] == [
        "| x / y z |",
        "|  |",
        "| yes |",
    ]
