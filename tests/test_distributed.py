"""Two processes started by torchrun: the losses of one process, and no hang when one of them fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from edgekd import ranks
from edgekd.cli import app
from edgekd.data.scenes import SCENE_CLASSES, make_scenes
from edgekd.errors import UserError
from edgekd.training.runlog import read_log
from edgekd.workspace import locked

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, STEPS = 2, 6

# Every kind of normaliser: counts of positives, of confidence, of cells, of objects; statistics over the batch; banks; a game.
TERMS = [
    {"loss": "response"},
    {"loss": "pkd", "gradient_ratio": 0.3},
    {"loss": "gkd", "params": {"min_side": 6.0}},
    {"loss": "decoupled"},
    {"loss": "information_map"},
    {"loss": "adversarial"},
    {"loss": "mgd"},
]


def recipe(folder: Path) -> Path:
    make_scenes(folder / "scenes", counts={"train": 12, "val": 2}, image_hw=(96, 128))
    from edgekd.checkpoint import save_detector
    from edgekd.detectors import build_detector, spec_for
    from edgekd.recipe import ModelConfig

    torch.manual_seed(5)
    teacher = build_detector(
        spec_for(ModelConfig(model="mobilenetv2-ssd-lite", input_size=96, width=0.35), SCENE_CLASSES)
    )
    save_detector(folder / "teacher.pt", teacher, {})
    body = {
        "name": "distributed",
        "data": {"root": str(folder / "scenes"), "workers": 0},
        "student": {"model": "mobilenetv2-ssd-lite", "input_size": 96, "width": 0.25},
        "teachers": [{"name": "t", "checkpoint": str(folder / "teacher.pt")}],
        # Small steps: AdamW, or large ones, multiply even double precision's rounding fiftyfold at each step.
        "train": {"epochs": EPOCHS, "batch_size": 4, "checkpoint_every": 1, "optimizer": "sgd", "lr": 0.0001},
        "distill": {"terms": TERMS},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    return path


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def edgekd(*arguments: str, by: tuple[str, ...] = TORCHRUN, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *by, str(ROOT / "tests" / "distributed_child.py"), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=3600)


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(folder) if record["event"] == "step"]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """In one go, since processes are slow to start: equal losses, one process failing, and going on after it."""
    path, one, two = recipe(tmp_path), tmp_path / "one", tmp_path / "two"
    command = ("distill", str(path), "--device", "cpu", "--out")
    alone = edgekd(*command, str(one), by=())
    assert alone.returncode == 0, alone.stderr[-3000:]

    broken = edgekd(*command, str(two), FAIL_AT="2")
    assert broken.returncode != 0
    assert "process 1: error: the disk of the second process is gone" in broken.stderr
    assert "exitcode  : 2" in broken.stderr
    assert len(steps(two)) == 2

    whole = edgekd(*command, str(two))
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert whole.stdout.count("model.pt") == 1, "more than one process told the result"

    ours, theirs = steps(two), steps(one)
    assert [record["step"] for record in ours] == list(range(STEPS))
    for a, b in zip(ours, theirs, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-6), f"step {b['step']}"
    for key in ("pull", "weights", "statistics"):
        assert ours[0][key] == pytest.approx(theirs[0][key], rel=1e-6), key
    weights = [torch.load(folder / "model.pt", weights_only=True)["weights"] for folder in (one, two)]
    for name, value in weights[0].items():
        # Each holds values of about 0.1, whose sums over a batch may be taken in another order: a float32's last places,
        # more of them on one kind of CPU than on another (4e-7 has been seen).
        np.testing.assert_allclose(weights[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_commands_for_one_process_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    told = CliRunner().invoke(app, ["run", "recipe.yaml", "--out", "out"])
    assert told.exit_code == 2
    assert "edgekd run is for one process" in told.stderr


def test_a_rank_alone_is_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts of job arrays set RANK too: the command still speaks, and still holds its folder against others."""
    monkeypatch.setenv("RANK", "1")
    told = CliRunner().invoke(app, ["recipe", "schema"])
    assert told.exit_code == 0
    assert told.stdout
    with locked(tmp_path), pytest.raises(UserError, match="another edgekd process"), locked(tmp_path):
        pass


def test_a_number_of_processes_without_torchrun_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="not as torchrun does") as told, ranks.joined(on_gpu=False):
        pass
    assert "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in str(told.value)
