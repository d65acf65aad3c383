"""Half precision that fails is noticed, left, and remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgekd.artifact import read_manifest
from edgekd.detectors import shared_norm
from edgekd.errors import NonFiniteLossError
from edgekd.training.learning import LearningStep, StepInput
from edgekd.training.runlog import read_log
from edgekd.training.train import _Trainer, train_detector
from tests.test_distill import _stop_after
from tests.test_train import make_job, step_losses


class _Infinite(torch.autograd.Function):
    """Adds nothing to a loss and infinity to a gradient, as bf16 depthwise layers did on a CPU at 256 px, batch 24."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.full_like(ctx.saved_tensors[0], float("inf"))


@pytest.fixture
def bf16_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has trainings go in bf16 also where the processor has to emulate it."""
    monkeypatch.setattr("edgekd.training.setup.emulates_bf16", lambda: False)


def break_from_step_2(monkeypatch: pytest.MonkeyPatch, *, only_bf16: bool = True) -> None:
    original, original_step = LearningStep._losses, _Trainer._step
    now = 0

    def noted(self: _Trainer, *given: Any) -> dict[str, float]:
        nonlocal now
        now = self.progress.step
        return original_step(self, *given)

    def broken(self: LearningStep, step: StepInput) -> dict[str, Tensor]:
        in_bf16 = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):  # real bf16 fails on some CPUs by itself, and at another step
            losses = original(self, step)
        if now >= 2 and (in_bf16 or not only_bf16):
            losses["loss"] = losses["loss"] + _Infinite.apply(next(self.detector.parameters()))
        return losses

    monkeypatch.setattr(_Trainer, "_step", noted)
    monkeypatch.setattr(LearningStep, "_losses", broken)


@pytest.mark.parametrize("emulated", [False, True])
def test_bf16_goes_in_fp32_on_a_processor_that_would_emulate_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulated: bool
) -> None:
    monkeypatch.setattr("edgekd.training.setup.emulates_bf16", lambda: emulated)
    job = make_job(tmp_path, "run", epochs=1, precision="bf16", eval_every=9)
    train_detector(job)
    manifest = read_manifest(job.out)
    assert manifest is not None
    assert manifest.facts["precision"] == ("32-true" if emulated else "bf16-mixed")
    notes = [record["message"] for record in read_log(job.out) if record["event"] == "note"]
    assert any("emulate" in note for note in notes) == emulated


@pytest.mark.usefixtures("bf16_processor")
def test_a_run_leaves_bf16_when_its_gradient_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"epochs": 2, "precision": "bf16", "checkpoint_every": 1, "eval_every": 9}
    break_from_step_2(monkeypatch)
    whole = make_job(tmp_path, "whole", **settings)
    train_detector(whole)
    assert len(step_losses(whole.out)) == 6
    (told,) = [record for record in read_log(whole.out) if record["event"] == "warning"]
    assert told["step"] == 2
    assert "single precision" in told["message"]
    manifest = read_manifest(whole.out)
    assert manifest is not None
    assert manifest.facts["bf16_until"] == 2
    with monkeypatch.context() as cut:
        _stop_after(4, cut)
        with pytest.raises(RuntimeError, match="cut off"):
            train_detector(make_job(tmp_path, "cut", **settings))
    train_detector(make_job(tmp_path, "cut", **settings))  # remembers that it had left bf16
    assert step_losses(tmp_path / "cut") == step_losses(whole.out)


@pytest.mark.usefixtures("bf16_processor")
def test_single_precision_that_fails_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_from_step_2(monkeypatch, only_bf16=False)
    for precision in ("fp32", "bf16"):
        with pytest.raises(NonFiniteLossError, match="gradient"):
            train_detector(make_job(tmp_path, precision, epochs=2, precision=precision))


@pytest.mark.parametrize("bf16", [True, False])
def test_batch_norm_over_several_processes_keeps_its_statistics_in_single_precision(
    bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_norm, "world_size", lambda: 2)
    monkeypatch.setattr(shared_norm, "mean_over_ranks", lambda value: value)  # the other process has the same images
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    own, plain = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.1)) for _ in range(2))
    own.load_state_dict(plain.state_dict())
    shared_norm.share_batch_norm(own, on_gpu=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found, wanted = own(images), plain(torch.cat([images, images]))[:4]
    assert found.dtype == wanted.dtype == (torch.bfloat16 if bf16 else torch.float32)
    torch.testing.assert_close(found, wanted)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value)
