"""A comparison on two-node Ray clusters: a worker is killed in the middle, and nothing is lost.

Not part of the usual environment, since Ray is large: pip install -e '.[ray]', then pytest tests/test_cluster.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from edgekd.data.scenes import make_scenes
from edgekd.training.runlog import read_log

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 12


@pytest.fixture
def cluster() -> Iterator[str]:
    """A head without room for runs and two machines with a CPU each; gives its address."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1)
        yield nodes.address
    finally:
        nodes.shutdown()


def recipes(folder: Path) -> list[str]:
    make_scenes(folder / "scenes", counts={"train": 8, "val": 4}, image_hw=(96, 128))
    paths = []
    for name, loss in (("response", "response"), ("with-feature", "feature")):
        body = {
            "name": name,
            "data": {"root": "scenes", "workers": 0},
            "student": {"model": "mobilenetv2-ssd-lite", "input_size": 96, "width": 0.25},
            "teachers": [{"name": "t", "train": {"model": "mobilenetv2-ssd-lite", "input_size": 96, "width": 0.35}}],
            "train": {"epochs": EPOCHS, "batch_size": 4},
            "distill": {"terms": [{"loss": loss}]},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(body), encoding="utf-8")
        paths.append(path.name)
    return paths


def compare(folder: Path, out: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgekd", "compare", *recipes(folder), "--seeds", "0", "--out", out]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*command, "--device", "cpu", *arguments],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(driver: subprocess.Popen[str], run: Path) -> int:
    """The process that is at a run, once it has been through a few epochs."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and driver.poll() is None:
        if (run / "last.pt").is_file() and len(read_log(run)) >= 4:
            return int((run / ".edgekd.lock").read_text())
        time.sleep(0.02)
    raise AssertionError(f"the run did not come so far: {driver.communicate()[0] if driver.poll() is not None else ''}")


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(tmp_path: Path, cluster: str) -> None:
    driver = compare(tmp_path, "out", "--launcher", "ray", RAY_ADDRESS=cluster)
    run = tmp_path / "out" / "alone" / "seed-0"
    worker = wait_for_checkpoint(driver, run)
    os.kill(worker, signal.SIGKILL)
    reached = len(read_log(run))
    output, _ = driver.communicate(timeout=1800)
    assert driver.returncode == 0, output
    assert "alone, seed 0: its worker was lost" in output
    assert not (run / "manifest.json").is_file() or reached < 2 * EPOCHS, "the worker was killed too late"
    steps = [record["step"] for record in read_log(run) if record["event"] == "step"]
    assert steps == list(range(2 * EPOCHS)), "it did not go on where it was"
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["method"] for row in data["rows"]] == ["alone", "response", "with-feature"]

    here = compare(tmp_path, "here")  # one process, never killed
    assert here.wait(1800) == 0
    for method in ("alone", "response", "with-feature"):
        ours, theirs = (
            torch.load(tmp_path / where / method / "seed-0" / "model.pt", weights_only=True)["weights"]
            for where in ("out", "here")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), method


@pytest.mark.slow
def test_no_cluster_and_too_small_a_cluster_are_told(tmp_path: Path, cluster: str) -> None:
    driver = compare(tmp_path, "out", "--launcher", "ray", "--cpus", "64", RAY_ADDRESS=cluster)
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 2
    assert "no machine of the Ray cluster has what a run takes" in output
    driver = compare(tmp_path, "out", "--launcher", "ray", RAY_ADDRESS="127.0.0.1:1")
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 2
    assert "no Ray cluster can be reached" in output
