"""Tasks side by side: the same results as one after another, each after what it needs, and clean ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekd import pipeline
from edgekd.chain_tasks import Exports, chain_tasks
from edgekd.checkpoint import load_detector
from edgekd.data.scenes import make_scenes
from edgekd.errors import EdgeKDError, ParityError, RuntimeFailure, UserError
from edgekd.machine import usable_threads
from edgekd.pipeline import run_recipe
from edgekd.recipe_file import load_recipe
from edgekd.side_by_side import Task, run_side_by_side
from edgekd.stages import distill_student, ready_teachers, train_student
from edgekd.workspace import Workspace, open_workspace

# VGG has few layers: its export takes half of the time that one of MobileNet takes.
TINY = """\
name: tiny
data: {root: scenes, workers: 0}
student: {model: vgg11-ssd, input_size: 96, width: 0.25}
teachers:
  - {name: one, train: {model: vgg11-ssd, input_size: 96, width: 0.25}, seed: 1}
train: {epochs: 1, batch_size: 4}
export: {precisions: [fp32]}
bench: {samples: 20, warmup_seconds: 0, threads: 1}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side_by_side")
    make_scenes(folder / "scenes", counts={"train": 8, "val": 4})
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return folder


@pytest.fixture
def work(home: Path, tmp_path: Path) -> Workspace:
    with open_workspace(load_recipe(home / "tiny.yaml"), tmp_path / "work", quiet=True) as opened:
        return opened


# -- tasks -----------------------------------------------------------------------------------------------------------


def _times(work: Workspace, seconds: float) -> tuple[float, float, int]:
    began = time.time()
    time.sleep(seconds)
    return began, time.time(), torch.get_num_threads()


def _until(work: Workspace, told: Path) -> tuple[float, float, int]:
    began = time.time()
    _wait_for(told.exists)
    return began, time.time(), torch.get_num_threads()


def _fail(work: Workspace, error: Exception) -> None:
    raise error


def _give(work: Workspace, thing: Any) -> Any:
    return thing


def _die(work: Workspace) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_begins_after_what_it_needs(work: Workspace, tmp_path: Path) -> None:
    tasks = [
        Task("last", partial(_times, seconds=0.01), needs=("slow", "quick", "made long ago")),
        Task("slow", partial(_until, told=tmp_path / "beside")),  # however long it takes to start a process here
        Task("quick", partial(_times, seconds=0.01)),
        Task("beside", partial(_times, seconds=0.01), needs=("quick",)),
    ]
    results: dict[str, tuple[float, float, int]] = {}

    def done(name: str, result: tuple[float, float, int]) -> None:
        results[name] = result
        (tmp_path / name).touch()

    run_side_by_side(work, tasks, 2, done)
    assert list(results)[-1] == "last"
    assert results["last"][0] >= results["slow"][1]
    assert results["beside"][0] >= results["quick"][1]
    cores = usable_threads()
    assert results["slow"][2] == max(1, cores // 2), "two share the cores"
    assert results["last"][2] == cores, "one alone has them all"


def test_what_a_task_gives_comes_back_and_what_it_raises_is_raised(work: Workspace) -> None:
    results: dict[str, Any] = {}
    error = ParityError("differs", got="3", expected="4", fix="mend")
    tasks = [
        Task("error as a result", partial(_give, thing=error)),
        Task("a", partial(_fail, error=UserError("no such thing", fix="buy it")), needs=("error as a result",)),
    ]
    with pytest.raises(UserError, match="no such thing") as caught:
        run_side_by_side(work, tasks, 1, results.__setitem__)
    assert caught.value.fix == "buy it"
    assert {name: str(result) for name, result in results.items()} == {"error as a result": str(error)}


def test_a_killed_process_is_told(work: Workspace) -> None:
    with pytest.raises(RuntimeFailure, match="ended from outside"):
        run_side_by_side(work, [Task("a", _die), Task("b", partial(_times, seconds=30))], 2)


# -- a chain's tasks ---------------------------------------------------------------------------------------------------


def tasks_of(home: Path, out: Path, *overrides: str) -> dict[str, tuple[str, ...]]:
    with open_workspace(load_recipe(home / "tiny.yaml", overrides), out, quiet=True) as work:
        return {task.name: task.needs for task in chain_tasks(work, out, Exports(out / "export"), asks_of_images=True)}


def state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_detector(folder / "model.pt").state_dict())


def test_a_small_students_chain_fills_the_cores(home: Path, tmp_path: Path) -> None:
    assert tasks_of(home, tmp_path) == {
        "one": (),
        "the distilled student": ("one",),
        "the student alone": (),
        "one.fp32.onnx": ("one",),
        "student.fp32.onnx": ("the student alone",),
        "distilled.fp32.onnx": ("the distilled student",),
    }


def test_a_large_students_distillation_has_the_cores_for_itself(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.training.setup.SMALL_BATCH_MACS", 0)
    needs = tasks_of(home, tmp_path)
    assert needs["the distilled student"] == ("one", "the student alone")
    assert needs["one.fp32.onnx"] == ("one", "the distilled student")


class _EnoughSeen(Exception):
    """What was to be started has been told."""


@pytest.mark.slow
def test_same_weights_as_one_after_another(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    started: list[set[str]] = []

    def counted(work: Workspace, tasks: list[Task], at_once: int, done: Any) -> None:
        started.append({task.name for task in tasks})
        if len(started) > 1:
            raise _EnoughSeen
        run_side_by_side(work, tasks, at_once, done)

    monkeypatch.setattr(pipeline, "run_side_by_side", counted)
    monkeypatch.setattr("edgekd.bench.measuring.peak_memory", lambda *_: None)  # a process for each row
    apart, together = tmp_path / "apart", tmp_path / "together"
    with open_workspace(load_recipe(home / "tiny.yaml"), apart, quiet=True) as work:
        teachers = ready_teachers(work, apart / "teachers")
        train_student(work, apart / "student")
        distill_student(work, teachers, apart / "distilled", answers=apart / "answers")
    result = run_recipe(load_recipe(home / "tiny.yaml"), together, quiet=True, jobs=2)
    assert [len(names) for names in started] == [6]
    assert [row["name"] for row in result.result["rows"]] == ["one", "student", "distilled"]
    for name in ("teachers/one", "student", "distilled"):
        again = state(together / name)
        for key, value in state(apart / name).items():
            torch.testing.assert_close(again[key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
    files = [path.relative_to(apart) for path in sorted(apart.rglob("*")) if path.is_file()]
    there = {path.relative_to(together) for path in together.rglob("*") if path.is_file()}
    # Answers are named after the teacher's very bits, in which two processes may differ; logs after the time.
    assert {file for file in files if not {"tensorboard", "answers"} & set(file.parts)} <= there
    # Done again: nothing; and only what hangs on a change.
    run_recipe(load_recipe(home / "tiny.yaml"), together, quiet=True, jobs=2)
    assert len(started) == 1
    with pytest.raises(_EnoughSeen):
        run_recipe(load_recipe(home / "tiny.yaml", ["distill.detection_weight=2"]), together, quiet=True, jobs=2)
    assert started[1:] == [{"the distilled student", "distilled.fp32.onnx"}]


def test_an_error_of_one_is_told(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "teachers").mkdir(parents=True)
    (tmp_path / "out" / "teachers" / "one").touch()  # where a folder should go
    with pytest.raises((EdgeKDError, OSError)):
        run_recipe(load_recipe(home / "tiny.yaml"), tmp_path / "out", quiet=True, jobs=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_none_outlives_the_first(home: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "edgekd", "run", str(home / "tiny.yaml"), "--out", str(out), "--jobs", "2"]
    environment = {**os.environ, "EDGEKD_TEST_MARK": str(out)}
    first = subprocess.Popen(
        [*command, "--set", "train.epochs=2000"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background has it ignored
    )
    try:
        _wait_for(lambda: len(list(out.glob("**/metrics.jsonl"))) == 2)
        assert len(_marked(out)) >= 3
        first.send_signal(number)
        first.wait(300)
        if number != signal.SIGKILL:
            assert first.returncode == 130
            assert not _marked(out), "the first ends last: what waits for it may take all else for done"
        _wait_for(lambda: not _marked(out))
    finally:
        first.kill()
        for process in _marked(out):
            os.kill(process, signal.SIGKILL)


def _wait_for(condition: object, seconds: float = 300) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def _marked(out: Path) -> list[int]:
    """Processes that were started with our mark in their environment; no zombies, nor what Python keeps count with.

    multiprocessing's resource tracker ends itself when the process that it counts for has ended, and so after it.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"EDGEKD_TEST_MARK={out}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if marked and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
