"""The training loop: it learns, it logs, and a run that was killed goes on as if it had not been."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric

from edgekd.artifact import is_current, sha256_json, write_manifest
from edgekd.bench.runner import fingerprint
from edgekd.checkpoint import STATE_SCHEMA, checkpoint_facts, load_detector
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.base import Detector, Targets
from edgekd.errors import ArtifactError, NonFiniteLossError, RecipeError, UserError
from edgekd.recipe import AugmentConfig, DataConfig, ModelConfig, TrainConfig
from edgekd.selection import Selection
from edgekd.training.learning import LearningStep, StepInput
from edgekd.training.runlog import RunLog, read_log
from edgekd.training.setup import StopSignals, fitting_threads, make_fabric, make_optimizer, moving_average
from edgekd.training.state import RunState
from edgekd.training.train import TrainJob, _Trainer, lr_factor, train_detector
from edgekd.training.validate import detect_dataset
from tests.toy import toy_dataset, toy_detector

MODEL = ModelConfig(model="mobilenetv2-ssd-lite", input_size=96, width=0.25)


def make_job(folder: Path, out: str = "run", **train: object) -> TrainJob:
    settings = {"epochs": 3, "batch_size": 4, "eval_every": 3, **train}
    dataset = toy_dataset(folder / "images")
    return TrainJob(
        dataset=dataset,
        val=dataset,
        model=MODEL,
        train=TrainConfig(**settings),  # type: ignore[arg-type]
        augment=AugmentConfig(),
        data=DataConfig(root="unused", workers=0, cache_mib=16),
        out=folder / out,
        seed=3,
        device="cpu",
        inputs={"settings": repr(settings)},
    )


def step_losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["losses"]["loss"]) for r in read_log(folder) if r["event"] == "step"]


def test_a_run_learns_logs_and_leaves_a_detector(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=10)
    result = train_detector(job)
    losses = [loss for _, loss in step_losses(job.out)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    record = next(r for r in read_log(job.out) if r["event"] == "step")
    assert {"step", "epoch", "losses", "lr", "images_per_s"} <= set(record)
    assert any((job.out / "tensorboard").iterdir())
    detector = load_detector(result.folder)
    assert detector.spec.class_names == job.dataset.class_names
    assert result.metrics["images"] == len(job.dataset)
    assert not detector.training


def test_determinism_is_one_run_s_and_possible_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    enabled = []
    for index, asked in enumerate((True, False)):
        train_detector(make_job(tmp_path, f"run-{index}", epochs=1, eval_every=9, deterministic=asked))
        enabled.append(torch.are_deterministic_algorithms_enabled())
    assert enabled == [True, False]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # or torch refuses products of matrices there


def test_a_run_is_measured_with_its_recipe_s_thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Selection] = []

    def detect(*arguments: object, **options: object) -> object:
        asked.append(options["selection"])  # type: ignore[arg-type]
        return detect_dataset(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("edgekd.training.train.detect_dataset", detect)
    wanted = Selection(0.001, 0.4, 7, 0.6)
    train_detector(replace(make_job(tmp_path, epochs=1), selection=wanted))
    assert asked == [replace(wanted, score_threshold=0.01)]


def test_the_moving_average_lies_in_memory_as_the_weights_do(tmp_path: Path) -> None:
    trainer = _Trainer(make_job(tmp_path))
    average = trainer.state.ema
    assert average is not None
    pairs = list(zip(average.module.parameters(), trainer.learner.detector.parameters(), strict=True))
    assert any(weight.is_contiguous(memory_format=torch.channels_last) for _, weight in pairs if weight.ndim == 4)
    assert all(own.stride() == weight.stride() for own, weight in pairs)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    train_detector(job)
    before = (job.out / "model.pt").stat().st_mtime_ns
    again = train_detector(job)
    assert again.skipped
    assert (job.out / "model.pt").stat().st_mtime_ns == before


def test_another_runs_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    train_detector(job)
    before = (job.out / "model.pt").read_bytes()
    with pytest.raises(ArtifactError, match="another recipe"):
        train_detector(replace(job, inputs={"other": 1}))
    assert (job.out / "model.pt").read_bytes() == before


def test_a_model_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    job.out.mkdir(exist_ok=True)
    (job.out / "model.pt").write_text("mine")
    with pytest.raises(ArtifactError, match="no run there wrote"):
        train_detector(job)
    assert (job.out / "model.pt").read_text() == "mine"


def test_a_best_checkpoint_of_another_tool_is_left_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    job.out.mkdir(exist_ok=True)
    (job.out / "best.pt").write_bytes(b"ultralytics")
    with pytest.raises(ArtifactError, match=r"holds a best\.pt that no run there wrote"):
        train_detector(job)
    assert (job.out / "best.pt").read_bytes() == b"ultralytics"


def test_a_manifest_of_another_tool_is_not_called_damaged(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    job.out.mkdir(exist_ok=True)
    (job.out / "manifest.json").write_text('{"name": "app"}')
    with pytest.raises(ArtifactError, match="is not edgekd's") as caught:
        train_detector(job)
    assert "move that file away" in str(caught.value)


def test_what_a_killed_process_left_of_a_checkpoint_is_cleared(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    job.out.mkdir(exist_ok=True)
    (job.out / ".last.abc123.pt").write_bytes(b"half")
    (job.out / ".notes.pt").write_bytes(b"mine")
    train_detector(job)
    assert not list(job.out.glob(".last.*"))
    assert (job.out / ".notes.pt").is_file()


@pytest.mark.parametrize("part", ["inputs", "files", "facts"])
def test_a_manifest_whose_parts_are_of_other_types_is_damaged(tmp_path: Path, part: str) -> None:
    write_manifest(tmp_path, "run", {}, [], {})
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: []}))
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        is_current(tmp_path, "run", {})


def test_a_damaged_line_of_a_log_costs_that_line_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\x00{"st\n[]\nnull\n{"step": "x"}\n{"step": 2}\n')
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    RunLog(tmp_path, start_step=2).close()
    assert [record["step"] for record in read_log(tmp_path)] == [1]


def test_a_damaged_state_says_how_to_begin_anew(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    train_detector(job)
    (job.out / "manifest.json").unlink()
    (job.out / "last.pt").write_bytes((job.out / "last.pt").read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="move it away, and training begins anew"):
        train_detector(job)
    torch.save({"schema": STATE_SCHEMA, "inputs": sha256_json(job.inputs), "learner": {}}, job.out / "last.pt")
    with pytest.raises(ArtifactError, match="move it away, and training begins anew"):  # of another version of edgekd
        train_detector(job)
    (job.out / "last.pt").unlink()
    (job.out / "model.pt").unlink()
    assert not train_detector(job).skipped


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:1000]), Path.unlink])
def test_a_lost_best_detector_is_not_shipped(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    job = make_job(tmp_path, epochs=1, select="best")
    train_detector(job)
    shipped = (job.out / "model.pt").read_bytes()
    damage(job.out / "best.pt")
    with pytest.raises(ArtifactError, match=r"best\.pt: the run is to ship it"):
        train_detector(job)
    assert (job.out / "model.pt").read_bytes() == shipped


def test_the_same_seed_gives_the_same_losses(tmp_path: Path) -> None:
    first, second = make_job(tmp_path, "a", epochs=2), make_job(tmp_path, "b", epochs=2)
    train_detector(first)
    train_detector(second)
    assert step_losses(first.out) == step_losses(second.out)


_CHILD = """
import sys
from pathlib import Path
from tests.test_train import make_job
from edgekd.training.train import train_detector
train_detector(make_job(Path(sys.argv[1]), "killed", epochs=4, checkpoint_every=2))
"""


def _start_child(folder: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", _CHILD, str(folder)], env=env, stderr=subprocess.DEVNULL)


def _wait_for_steps(child: subprocess.Popen[bytes], out: Path, steps: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and child.poll() is None:
        if (out / "last.pt").is_file() and len(step_losses(out)) >= steps:
            return
        time.sleep(0.02)
    assert child.poll() is None, "the child ended before it could be stopped"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_step_for_step(tmp_path: Path, how: signal.Signals) -> None:
    whole = make_job(tmp_path, "whole", epochs=4, checkpoint_every=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_detector(whole)
        child = _start_child(tmp_path)
        _wait_for_steps(child, tmp_path / "killed", 5)
        child.send_signal(how)
        child.wait(600)
        reached = len(step_losses(tmp_path / "killed"))
        assert 5 <= reached < 12, "the child was not stopped in the middle"
        train_detector(make_job(tmp_path, "killed", epochs=4, checkpoint_every=2))
    finally:
        torch.set_num_threads(threads)
    assert step_losses(tmp_path / "killed") == step_losses(whole.out)
    ours, theirs = (load_detector(tmp_path / name).state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_fp16_goes_on_with_its_gradient_scale(tmp_path: Path) -> None:
    from lightning_fabric.plugins.precision import MixedPrecision

    learner = LearningStep(toy_detector(), None, 1.0)
    scales = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=512.0), None):
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        state = RunState(learner, None, torch.optim.SGD(learner.parameters()), None, precision)
        state.load(tmp_path)
        state.save(tmp_path, {})
        assert precision.scaler is not None
        scales.append(precision.scaler.get_scale())
    assert scales == [512.0, 512.0]  # anew it would begin at 65,536, and leave out the steps that overflow


def test_only_a_second_ctrl_c_ends_a_run_at_once() -> None:
    signals = StopSignals()
    with signals.caught():
        for _ in range(2):  # a service manager tells a whole group, and so does the process that started this one
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.noted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_during_the_last_measurement_stops_what_would_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, epochs=1)

    def told(*arguments: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return detect_dataset(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("edgekd.training.train.detect_dataset", told)
    with pytest.raises(KeyboardInterrupt):
        train_detector(job)
    assert train_detector(job).skipped, "the run itself is finished"


@pytest.mark.parametrize(("omp", "batch_size", "expected"), [(None, 2, 1), (None, 10**6, 2), ("2", 2, 2)])
def test_a_small_network_gets_one_thread(
    omp: str | None, batch_size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with fitting_threads(_detector(), batch_size, on_gpu=False):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_steps_gradient_is_the_mean_of_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many as there are: an epoch's last step may have fewer."""
    losses: list[float] = []
    shares: list[float] = []
    forward, backward = LearningStep.forward, Fabric.backward

    def forwarded(self: LearningStep, step: StepInput) -> dict[str, torch.Tensor]:
        found = forward(self, step)
        losses.append(float(found["loss"].detach()))
        return found

    def backwarded(self: Fabric, tensor: torch.Tensor) -> None:
        shares.append(float(tensor.detach()) / losses[-1])
        backward(self, tensor)

    monkeypatch.setattr(LearningStep, "forward", forwarded)
    monkeypatch.setattr(Fabric, "backward", backwarded)
    train_detector(make_job(tmp_path, epochs=2, accumulate=2))
    assert shares == pytest.approx([1 / 2, 1 / 2, 1] * 2)


def test_accumulation_takes_fewer_steps(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1, accumulate=2)
    train_detector(job)
    assert len(step_losses(job.out)) == 2  # three batches: one step of two, one of the rest


def test_a_step_s_logged_losses_are_the_mean_of_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, seen = LearningStep.forward, list[float]()

    def forwarded(self: LearningStep, step: StepInput) -> dict[str, torch.Tensor]:
        found = forward(self, step)
        seen.append(float(found["loss"].detach()))
        return found

    monkeypatch.setattr(LearningStep, "forward", forwarded)
    job = make_job(tmp_path, epochs=2, accumulate=2)
    train_detector(job)
    wanted = [(seen[0] + seen[1]) / 2, seen[2], (seen[3] + seen[4]) / 2, seen[5]]
    assert [loss for _, loss in step_losses(job.out)] == pytest.approx(wanted)


def test_a_non_finite_loss_stops_with_its_name_step_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)
    kind = type(_detector())
    original = kind.detection_losses
    calls = []

    def poisoned(self: Detector, output: object, targets: Targets) -> dict[str, torch.Tensor]:
        losses = original(self, output, targets)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 3:
            losses["box"] = losses["box"] * float("nan")
        return losses

    monkeypatch.setattr(kind, "detection_losses", poisoned)
    with pytest.raises(NonFiniteLossError) as caught:
        train_detector(job)
    assert "step 2" in str(caught.value)
    assert "det_box" in str(caught.value)
    assert any(record.image_id in str(caught.value) for record in job.dataset.records)


def _detector() -> Detector:
    from edgekd.detectors import build_detector, spec_for

    return build_detector(spec_for(MODEL, ("a", "b")))


@pytest.mark.parametrize(
    ("optimizer", "extra"), [("sgd", {"lr": 0.01}), ("adamw", {"ema": 0.0}), ("adamw", {"backbone_lr_factor": 0.0})]
)
def test_settings_run(tmp_path: Path, optimizer: str, extra: dict[str, object]) -> None:
    job = make_job(tmp_path, epochs=1, optimizer=optimizer, **extra)
    train_detector(job)
    assert all(loss == loss for _, loss in step_losses(job.out))


def test_a_frozen_backbone_stays(tmp_path: Path) -> None:
    torch.manual_seed(3)
    fresh = {k: v.clone() for k, v in _detector().named_parameters() if k.startswith("backbone.")}
    job = make_job(tmp_path, epochs=1, backbone_lr_factor=0.0)
    train_detector(job)
    trained = dict(load_detector(job.out).named_parameters())
    assert fresh
    assert all(torch.equal(trained[name], value) for name, value in fresh.items())


def test_frozen_layers_keep_their_weights_and_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = build_detector(spec_for(MODEL, ["a"])).state_dict()
    backbone = {
        name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")
    }
    torch.save(backbone, tmp_path / "backbone.pth")
    job = make_job(tmp_path, epochs=1, freeze_stride=8)
    job = replace(job, model=MODEL.model_copy(update={"weights": str(tmp_path / "backbone.pth")}))
    after = load_detector(train_detector(job).folder).get_submodule("backbone").state_dict()
    kept = {name for name, value in after.items() if torch.equal(value, backbone[name])}
    # features.7 is the first block of stride 16
    frozen = {name for name in after if int(name.split(".")[1]) < 7}
    assert frozen <= kept
    assert not {name for name in kept - frozen if "num_batches" not in name}


@pytest.mark.parametrize(("width", "words"), [(0.25, None), (0.5, "cut to its width of 0.25")])
def test_what_a_backbone_begins_with_is_told_once(tmp_path: Path, width: float, words: str | None) -> None:
    assert MODEL.width == 0.25
    source = build_detector(spec_for(MODEL.model_copy(update={"width": width}), ["a"])).get_submodule("backbone")
    torch.save(source.state_dict(), tmp_path / "backbone.pth")
    job = make_job(tmp_path, epochs=1)
    job = replace(job, model=MODEL.model_copy(update={"weights": str(tmp_path / "backbone.pth")}))
    heard: list[str] = []
    train_detector(job, lambda record: heard.append(record["message"]) if record["event"] == "note" else None)
    assert [record["message"] for record in read_log(job.out) if record["event"] == "note"] == heard
    (told,) = heard
    assert str(tmp_path / "backbone.pth") in told
    assert (", cut to" in told) == (words is not None)
    assert words is None or words in told


def test_a_run_too_short_for_mosaics_says_so(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    job = replace(job, augment=job.augment.model_copy(update={"mosaic": 0.5}))
    train_detector(job)
    (told,) = [record["message"] for record in read_log(job.out) if record["event"] == "note"]
    assert "close_mosaic_epochs" in told


def test_a_backbone_from_nothing_is_not_frozen(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mobilenetv2-ssd-lite without `weights`"):
        train_detector(make_job(tmp_path, freeze_stride=4))


def test_select_best_ships_the_best(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=2, eval_every=1, select="best")
    train_detector(job)
    assert (job.out / "model.pt").read_bytes() == (job.out / "best.pt").read_bytes()
    assert job.val is not None
    assert checkpoint_facts(job.out)["chosen_on"] == fingerprint(job.val)


@pytest.mark.parametrize(("select", "told"), [("best", 0.7), ("last", 0.2)])
def test_a_run_tells_the_figures_of_the_detector_that_it_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, told: float
) -> None:
    figures = itertools.chain([0.7], itertools.repeat(0.2))  # worse after the first epoch
    monkeypatch.setattr(
        "edgekd.bench.accuracy.evaluate", lambda *_: SimpleNamespace(ap50=next(figures), ap=0.1, voc07=0.1)
    )
    job = make_job(tmp_path, epochs=2, eval_every=1, select=select)
    result = train_detector(job)
    assert result.metrics["ap50"] == checkpoint_facts(job.out)["metrics"]["ap50"] == told
    assert train_detector(job).metrics["ap50"] == told  # read again from the manifest
    assert ("optimistic" in (job.out / "metrics.jsonl").read_text()) == (select == "best")


def test_cuda_without_a_gpu_is_the_users_mistake(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(UserError, match="GPU"):
        train_detector(replace(make_job(tmp_path), device="cuda"))


def test_learning_rate_warms_up_then_falls_to_its_floor() -> None:
    config = TrainConfig(warmup_steps=10, final_lr_factor=0.1)
    factors = [lr_factor(step, 100, config) for step in range(100)]
    assert factors[0] < factors[5] < factors[10] == pytest.approx(1.0)
    assert factors[99] == pytest.approx(0.1, abs=0.01)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_the_log_is_json_line_by_line(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    train_detector(job)
    for line in (job.out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("factor", "pretrained", "share"), [("auto", True, 0.3), ("auto", False, 1.0), (0.5, True, 0.5), (0.5, False, 0.5)]
)
def test_a_pretrained_backbone_learns_more_slowly(factor: float | str, pretrained: bool, share: float) -> None:
    detector = _detector()
    config = TrainConfig(lr=0.01, backbone_lr_factor=factor)  # type: ignore[arg-type]
    groups = make_optimizer(detector, [], config, pretrained=pretrained, on_cpu=True).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in detector.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.01 * (share if name.startswith("backbone.") else 1.0))


def test_lightning_says_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    make_fabric("cpu", TrainConfig(precision="bf16"))
    assert capfd.readouterr() == ("", "")


def test_the_moving_average_is_that_of_all_weights_and_buffers() -> None:
    detector = toy_detector()
    average = moving_average(detector, 0.9)
    assert average is not None
    expected = [tensor.detach().clone() for tensor in (*detector.parameters(), *detector.buffers())]
    for count in range(4):
        with torch.no_grad():
            for tensor in (*detector.parameters(), *detector.buffers()):
                tensor.add_(1)
        average.update_parameters(detector)
        keep = 0.0 if count == 0 else min(0.9, (1 + count) / (10 + count))
        for index, tensor in enumerate((*detector.parameters(), *detector.buffers())):
            if tensor.is_floating_point():
                expected[index] = keep * expected[index] + (1 - keep) * tensor.detach()
            else:
                expected[index] = tensor.detach().clone()
    found = [*average.module.parameters(), *average.module.buffers()]
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert int(average.n_averaged) == 4
    assert moving_average(detector, 0.0) is None


def test_the_optimiser_is_one_kernel_on_a_cpu_alone() -> None:
    config = TrainConfig(optimizer="adamw")
    for on_cpu in (True, False):
        optimizer = make_optimizer(toy_detector(), [], config, pretrained=False, on_cpu=on_cpu)
        assert optimizer.defaults["fused"] is (True if on_cpu else None)
