"""Trainings side by side: the same results as one after another, and clean ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from edgekd import side_by_side
from edgekd.checkpoint import load_detector
from edgekd.data.scenes import make_scenes
from edgekd.errors import EdgeKDError, RuntimeFailure
from edgekd.recipe import CheckpointTeacher
from edgekd.recipe_file import load_recipe
from edgekd.side_by_side import train_independent
from edgekd.workspace import open_workspace

TINY = """\
name: tiny
data: {root: scenes, workers: 0}
student: {model: mobilenetv2-ssd-lite, input_size: 96, width: 0.25}
teachers:
  - {name: one, train: {model: mobilenetv2-ssd-lite, input_size: 96, width: 0.25}, seed: 1}
train: {epochs: 1, batch_size: 4}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side_by_side")
    make_scenes(folder / "scenes", counts={"train": 8, "val": 4})
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return folder


def trained(home: Path, out: Path, jobs: int | None, *overrides: str) -> dict[str, dict[str, torch.Tensor]]:
    with open_workspace(load_recipe(home / "tiny.yaml", overrides), out, quiet=True) as work:
        teachers, student = train_independent(work, out / "teachers", out / "student", jobs)
    assert isinstance(teachers[0], CheckpointTeacher)
    return {
        "teacher": dict(load_detector(Path(teachers[0].checkpoint) / "model.pt").state_dict()),
        "student": dict(load_detector(student.model).state_dict()),
    }


def test_same_weights_as_one_after_another(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    apart = trained(home, tmp_path / "apart", 1)
    started: list[int] = []
    run_all = side_by_side._run_all

    def counted(trainings: list[side_by_side._Training], at_once: int) -> None:
        started.append(at_once)
        run_all(trainings, at_once)

    monkeypatch.setattr(side_by_side, "_run_all", counted)
    together = trained(home, tmp_path / "together", 2)
    assert started == [2]
    for name, state in apart.items():
        for key, value in state.items():
            torch.testing.assert_close(together[name][key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
    trained(home, tmp_path / "together", 2)
    assert started == [2], "what is there is not trained again"


def test_an_error_of_one_is_told(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "teachers").mkdir(parents=True)
    (tmp_path / "out" / "teachers" / "one").touch()  # where a folder should go
    with pytest.raises((EdgeKDError, OSError)):
        trained(home, tmp_path / "out", 2)
    (tmp_path / "out" / "teachers" / "one").unlink()
    assert trained(home, tmp_path / "out", 2)


def test_a_killed_process_is_told(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_train", _die)
    with pytest.raises(RuntimeFailure, match="ended from outside"):
        trained(home, tmp_path / "out", 2)


def _die(training: side_by_side._Training) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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
        _wait_for(lambda: not _marked(out))
        if number == signal.SIGINT:
            assert first.returncode == 130
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
    """Processes that were started with our mark in their environment, zombies aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"EDGEKD_TEST_MARK={out}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
