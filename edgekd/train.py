"""The training loop: one for students, teachers and distillation.

Under torchrun every process gets its share of each batch, but this has not been tested yet, and losses are normalised by each
process's own objects: do not expect the losses of one process.

Built on Lightning Fabric, which owns devices, precision and distribution and leaves the loop to be read here. Chosen over
Accelerate because it keeps no global state, patches nothing, and needs no model hub.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from edgekd.artifact import MANIFEST_NAME, atomic_path, is_current, read_manifest, sha256_json, write_manifest
from edgekd.checkpoint import BEST_FILE, LAST_FILE, MODEL_FILE, STATE_SCHEMA, read_payload, save_detector
from edgekd.data.loader import Batch, TrainLoader
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.base import Detector
from edgekd.distill import Clock, Distiller, term_parameters
from edgekd.errors import ArtifactError, UserError
from edgekd.learning import LearningStep, StepInput, check_finite
from edgekd.recipe import AugmentConfig, DataConfig, ModelConfig, TrainConfig
from edgekd.runlog import METRICS_FILE, Listener, RunLog, read_log
from edgekd.types import Dataset
from edgekd.validate import ResizedImages, detect_dataset

MEASURE_EVERY = 50
"""Steps between measurements of each loss's gradient norm; each costs a backward pass a part."""


@dataclass(frozen=True)
class TrainJob:
    """Everything that decides a run.

    Attributes:
        dataset: what to learn from. val: what to evaluate on, or None.
        model, train, augment, data: the recipe's sections.
        out: the run's folder. seed: of weights, data order and augmentation. device: "auto", "cpu", "cuda", "cuda:1".
        inputs: what decides the result, for the manifest: a finished run with equal inputs is not run again, and one cut
            off with equal inputs is taken up where it was.
        make_distiller: builds the terms for the student; None trains on ground truth alone.
        detection_weight: of the ground-truth loss.
    """

    dataset: Dataset
    val: Dataset | None
    model: ModelConfig
    train: TrainConfig
    augment: AugmentConfig
    data: DataConfig
    out: Path
    seed: int
    inputs: Mapping[str, Any]
    device: str = "auto"
    make_distiller: Callable[[Detector], Distiller] | None = None
    detection_weight: float = 1.0


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the shipped detector's file, and what was measured last."""

    folder: Path
    model: Path
    metrics: dict[str, Any]
    skipped: bool = False


@dataclass
class _Progress:
    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -1.0
    metrics: dict[str, Any] = field(default_factory=dict)


def train_detector(job: TrainJob, listener: Listener | None = None) -> RunResult:
    """Train a detector, resuming a run of the same inputs that was cut off.

    Raises:
        ArtifactError: `job.out` holds a run of other inputs.
        NonFiniteLossError: a loss became NaN or infinite.
        DistillationSetupError: a term cannot be built for this pair.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint has been written.
    """
    if len(job.dataset) == 0:
        raise UserError("the training split holds no images", got=f"{job.dataset.root}, split {job.dataset.split}")
    if is_current(job.out, "run", job.inputs):
        manifest = read_manifest(job.out)
        assert manifest is not None
        return RunResult(job.out, job.out / MODEL_FILE, dict(manifest.facts.get("metrics", {})), skipped=True)
    _refuse_foreign(job)
    trainer = _Trainer(job)
    with RunLog(job.out, start_step=trainer.progress.step, listener=listener, enabled=trainer.is_first) as log:
        return trainer.run(log)


def _refuse_foreign(job: TrainJob) -> None:
    """A folder with another run's state is never overwritten."""
    state = job.out / LAST_FILE
    held = None
    if (job.out / MANIFEST_NAME).is_file():
        manifest = read_manifest(job.out)
        held = sha256_json(manifest.inputs) if manifest is not None else None
    elif state.is_file():
        held = read_payload(state, STATE_SCHEMA).get("inputs")
    if held is not None and held != sha256_json(job.inputs):
        raise ArtifactError(
            f"{job.out} holds a run that was made with another recipe, data or seed",
            fix="choose another --out, or move that folder away",
        )


class _Trainer:
    def __init__(self, job: TrainJob) -> None:
        self.job, self.cfg = job, job.train
        self.fabric = _fabric(job)
        self.is_first = self.fabric.is_global_zero
        torch.manual_seed(job.seed)
        if self.cfg.deterministic:
            torch.use_deterministic_algorithms(True)
        detector = build_detector(spec_for(job.model, job.dataset.class_names))
        if job.model.weights is not None:
            from edgekd.detectors.weights import load_backbone_weights

            load_backbone_weights(detector, job.model.weights)
        distiller = job.make_distiller(detector) if job.make_distiller is not None else None
        learner = LearningStep(detector, distiller, job.detection_weight)
        self.learner = learner
        self.loader = self._make_loader(distiller)
        self.total_steps = max(1, self.cfg.epochs * math.ceil(self.loader.steps_per_epoch / self.cfg.accumulate))
        self.ema = (
            AveragedModel(detector, multi_avg_fn=_ema_update(self.cfg.ema), use_buffers=True) if self.cfg.ema else None
        )
        if self.cfg.channels_last:
            detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            learner.channels_last = True
        optimizer = _make_optimizer(detector, list(term_parameters(distiller)), self.cfg)
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.module, self.optimizer = self.fabric.setup(learner, optimizer)
        if self.ema is not None:
            self.ema.to(self.fabric.device)
        adversary = distiller.adversary_parameters() if distiller is not None else []
        self.adversary = torch.optim.Adam(adversary, lr=1e-3, betas=(0.5, 0.999)) if adversary else None
        self.progress = _Progress()
        self._stop_signal: int | None = None
        self._val_images = None if job.val is None else ResizedImages(job.val, detector, job.data.cache_mib // 2)
        self._weak: dict[str, list[float]] = {}
        self._resume()

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, log: RunLog) -> RunResult:
        try:
            with self._signals():
                for epoch in range(self.progress.epoch, self.cfg.epochs):
                    self._epoch(epoch, log)
                    if self._is_eval_epoch(epoch):
                        self._evaluate(log)
                    self.progress.epoch, self.progress.batch = epoch + 1, 0
                    self._save_state()
        finally:
            self.loader.close()
        return self._finish()

    def _epoch(self, epoch: int, log: RunLog) -> None:
        self.learner.train()
        if self.learner.distiller is not None and self.progress.batch == 0:  # else it has begun, before the cut
            for entry in self.learner.distiller.terms:
                entry.term.begin_epoch(epoch, self.cfg.epochs)
        clock_start, images_seen = time.perf_counter(), 0
        for batch in self.loader.epoch(epoch, self.progress.batch):
            self.progress.batch += 1
            last_of_epoch = self.progress.batch == self.loader.steps_per_epoch
            update = self.progress.batch % self.cfg.accumulate == 0 or last_of_epoch
            losses = self._step(batch, epoch, update)
            images_seen += len(batch.image_ids)
            if not update:
                continue
            elapsed = time.perf_counter() - clock_start
            self._log_step(log, epoch, losses, images_seen / max(elapsed, 1e-9))
            self.progress.step += 1
            every = self.cfg.checkpoint_every
            if self._stop_signal is not None or (isinstance(every, int) and self.progress.step % every == 0):
                self._save_state()
            if self._stop_signal is not None:
                raise KeyboardInterrupt

    def _step(self, batch: Batch, epoch: int, update: bool) -> dict[str, float]:
        step = self.progress.step
        factor = lr_factor(step, self.total_steps, self.cfg)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        measure = self.learner.distiller is not None and step % MEASURE_EVERY == 0 and update
        clock = Clock(epoch, self.cfg.epochs, step)
        with self.fabric.no_backward_sync(self.module, enabled=not update):
            losses: dict[str, Tensor] = self.module(StepInput(batch, clock, measure))
            values = {name: float(value.detach()) for name, value in losses.items()}
            check_finite(values, step, batch.image_ids)
            self.fabric.backward(losses["loss"] / self.cfg.accumulate)
        if self.adversary is not None and "adversary" in losses:
            self._adversary_step(losses["adversary"])
        if update:
            norm = self.fabric.clip_gradients(
                self.module, self.optimizer, max_norm=self.cfg.clip_norm or float("inf"), error_if_nonfinite=False
            )
            if norm is not None and not torch.isfinite(norm) and self._precision() != "16-mixed":
                check_finite({"gradient": float(norm)}, step, batch.image_ids)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update_parameters(self.learner.detector)
        return values

    def _adversary_step(self, loss: Tensor) -> None:
        assert self.adversary is not None
        assert self.learner.distiller is not None
        # The student's backward reached the discriminators too: what they learn comes from their own loss alone.
        self.adversary.zero_grad(set_to_none=True)
        parameters = self.learner.distiller.adversary_parameters()
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = self.fabric.all_reduce(gradient, reduce_op="mean")
        self.adversary.step()
        self.adversary.zero_grad(set_to_none=True)

    # -- evaluation, logging, finishing --------------------------------------------------------------------------

    def _shipping_detector(self) -> Detector:
        detector = self.learner.detector if self.ema is None else self.ema.module
        assert isinstance(detector, Detector)
        return detector

    def _is_eval_epoch(self, epoch: int) -> bool:
        if self.job.val is None or epoch + 1 == self.cfg.epochs:
            return self.job.val is not None
        every = max(1, self.cfg.epochs // 8) if self.cfg.eval_every == "auto" else self.cfg.eval_every
        return (epoch + 1) % every == 0

    def _evaluate(self, log: RunLog) -> None:
        from edgekd.bench.accuracy import evaluate

        if not self.is_first or self._val_images is None or self.job.val is None:
            return
        detector = self._shipping_detector()
        found = detect_dataset(detector, self._val_images, batch_size=self.cfg.batch_size)
        accuracy = evaluate(self.job.val.records, found, self.job.val.class_names)
        metrics = {"ap50": accuracy.ap50, "ap": accuracy.ap, "voc07": accuracy.voc07, "images": len(self.job.val)}
        self.progress.metrics = metrics
        step = self.progress.step
        log.write({"event": "eval", "step": step, "epoch": self.progress.epoch, "map": metrics})
        score = metrics["ap50"] if metrics["ap50"] is not None else 0.0
        if score > self.progress.best:
            self.progress.best = score
            save_detector(self.job.out / BEST_FILE, detector, {"metrics": metrics, "step": step})

    def _log_step(self, log: RunLog, epoch: int, losses: dict[str, float], images_per_s: float) -> None:
        record: dict[str, Any] = {
            "event": "step",
            "step": self.progress.step,
            "steps": self.total_steps,
            "epoch": epoch,
            "epochs": self.cfg.epochs,
            "losses": losses,
            "lr": self.optimizer.param_groups[-1]["lr"],
            "images_per_s": round(images_per_s, 2),
        }
        pull, distiller = self.learner.pull, self.learner.distiller
        if distiller is not None and pull is not None:
            record["gradient_ratio"] = pull.ratio
            record["pull"] = {"det": pull.detection, **pull.terms}
            record["weights"] = {entry.label: distiller.weight_of(i) for i, entry in enumerate(distiller.terms)}
            statistics = {f"{e.label}.{k}": v for e in distiller.terms for k, v in e.term.statistics().items()}
            if statistics:
                record["statistics"] = statistics
            self.learner.pull = None
        log.write(record)
        if distiller is not None and "pull" in record:
            self._guard(log, record["pull"])
            for entry in distiller.terms:
                if (message := entry.term.warning()) is not None:
                    log.write(
                        {"event": "warning", "step": self.progress.step, "message": f"term {entry.label}: {message}"}
                    )

    def _guard(self, log: RunLog, pull: dict[str, float]) -> None:
        """Say so when a term moves nothing, or drowns detection, over three measurements in a row."""
        for name, norm in pull.items():
            if name == "det" or pull["det"] <= 0:
                continue
            history = self._weak.setdefault(name, [])
            history.append(norm / pull["det"])
            recent = history[-3:]
            if len(history) != 3:
                continue
            verdict = (
                "moves next to nothing" if max(recent) < 0.01 else "drowns detection" if min(recent) > 20 else None
            )
            if verdict is not None:
                message = f"term {name} {verdict}: its gradient is {recent[-1]:.3g}x the detection loss's"
                log.write({"event": "warning", "step": self.progress.step, "message": message})

    def _finish(self) -> RunResult:
        out, progress = self.job.out, self.progress
        if self.is_first:
            facts = {
                "metrics": progress.metrics,
                "step": progress.step,
                "seed": self.job.seed,
                "inputs": dict(self.job.inputs),
            }
            best = out / BEST_FILE
            if self.cfg.select == "best" and best.is_file():
                payload = best.read_bytes()
                with atomic_path(out / MODEL_FILE) as temporary:
                    temporary.write_bytes(payload)
            else:
                save_detector(out / MODEL_FILE, self._shipping_detector(), facts)
            files = [name for name in (MODEL_FILE, BEST_FILE, METRICS_FILE) if (out / name).is_file()]
            write_manifest(
                out,
                "run",
                self.job.inputs,
                files,
                {
                    "metrics": progress.metrics,
                    "seed": self.job.seed,
                    "steps": progress.step,
                    "spec": self.learner.detector.spec.to_dict(),
                    "device": str(self.fabric.device),
                    "precision": self._precision(),
                    "world_size": self.fabric.world_size,
                },
            )
        self.fabric.barrier()
        return RunResult(out, out / MODEL_FILE, dict(progress.metrics))

    # -- state ---------------------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        if not self.is_first:
            return
        progress = self.progress
        payload = {
            "schema": STATE_SCHEMA,
            "inputs": sha256_json(self.job.inputs),
            "learner": self.learner.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "adversary": None if self.adversary is None else self.adversary.state_dict(),
            "rng": torch.get_rng_state(),
            "weak": self._weak,
            "progress": {
                "epoch": progress.epoch,
                "batch": progress.batch,
                "step": progress.step,
                "best": progress.best,
                "metrics": progress.metrics,
            },
        }
        with atomic_path(self.job.out / LAST_FILE) as temporary:
            torch.save(payload, temporary)

    def _resume(self) -> None:
        path = self.job.out / LAST_FILE
        if not path.is_file():
            return
        payload = read_payload(path, STATE_SCHEMA)
        self.learner.load_state_dict(payload["learner"])
        if self.ema is not None:
            self.ema.load_state_dict(payload["ema"])
        self.optimizer.load_state_dict(payload["optimizer"])
        if self.adversary is not None:
            self.adversary.load_state_dict(payload["adversary"])
        torch.set_rng_state(payload["rng"])
        self._weak = payload["weak"]
        self.progress = _Progress(**payload["progress"])
        steps = self.loader.steps_per_epoch
        if self.progress.batch >= steps:  # cut off between the last step of an epoch and the checkpoint after it
            self.progress.batch = steps

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint; a second Ctrl-C at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            self._stop_signal = number

        import threading

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _make_loader(self, distiller: Distiller | None) -> TrainLoader:
        return TrainLoader(
            self.job.dataset,
            preprocess=spec_for(self.job.model, self.job.dataset.class_names).preprocess,
            augment=self.job.augment,
            batch_size=self.cfg.batch_size,
            seed=self.job.seed,
            epochs=self.cfg.epochs,
            workers=self.job.data.workers,
            cache_mib=self.job.data.cache_mib,
            difficult=self.cfg.difficult,
            extra_hw=distiller.loader_hw if distiller is not None else (),
            answers=distiller.loader_answers if distiller is not None else (),
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
        )

    def _precision(self) -> str:
        return str(self.fabric._precision.precision)


def _fabric(job: TrainJob) -> Any:
    """Fabric for this machine; under torchrun, for all the processes it started."""
    import logging
    import warnings

    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    from lightning_fabric import Fabric

    on_gpu = job.device.startswith("cuda") or (job.device == "auto" and torch.cuda.is_available())
    if job.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "device cuda was asked for, but torch sees no GPU",
            got=f"torch {torch.__version__}",
            fix="run `edgekd doctor`, install a CUDA build of torch, or use --device cpu",
        )
    precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}.get(
        job.train.precision, "bf16-mixed" if on_gpu else "32-true"
    )
    if precision == "16-mixed" and not on_gpu:
        raise UserError("train.precision: fp16 needs a GPU", fix="use fp32 or bf16 on a CPU")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices: Any = local
    if world == 1 and ":" in job.device:
        devices = [int(job.device.split(":")[1])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(
            accelerator="cuda" if on_gpu else "cpu",
            devices=devices,
            num_nodes=max(1, world // max(1, local)),
            strategy="ddp_find_unused_parameters_true" if world > 1 else "auto",
            precision=precision,  # type: ignore[arg-type]
        )
        fabric.launch()
    return fabric


def lr_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate at a step as a share of its peak: linear warm-up, then cosine or constant."""
    warmup = min(1000, math.ceil(0.05 * total_steps)) if config.warmup_steps == "auto" else config.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    share = (step - warmup) / max(1, total_steps - warmup)
    return config.final_lr_factor + (1 - config.final_lr_factor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _make_optimizer(detector: Detector, extra: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay on weights alone; the backbone at its own learning rate; the terms' parameters with the head's."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in detector.named_parameters():
        is_backbone = name.startswith("backbone.")
        if is_backbone and config.backbone_lr_factor == 0:
            parameter.requires_grad_(False)
            continue
        groups.setdefault((is_backbone, parameter.ndim > 1), []).append(parameter)
    for parameter in extra:
        groups.setdefault((False, parameter.ndim > 1), []).append(parameter)
    settings: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr": config.lr * (config.backbone_lr_factor if is_backbone else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (is_backbone, decays), parameters in groups.items()
    ]
    settings.sort(key=lambda group: group["lr"])
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(settings, lr=config.lr)


def _ema_update(decay: float) -> Callable[[Any, Any, Any], None]:
    def update(averaged: Any, current: Any, count: Any) -> None:
        # Early on a short memory, so that the average is not held back by the first, random weights.
        now = min(decay, (1 + float(count)) / (10 + float(count)))
        if averaged[0].is_floating_point():  # torch hands over one kind of tensor at a time
            torch._foreach_lerp_(averaged, current, 1 - now)
        else:  # BatchNorm's counters
            torch._foreach_copy_(averaged, current)

    return update


__all__ = ["RunResult", "TrainJob", "lr_factor", "read_log", "train_detector"]
