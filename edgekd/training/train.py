"""The training loop: one for students, teachers and distillation, in one process or in several started by torchrun.

Several processes share each batch, and give the losses that one process would give: BatchNorm and every loss are normalised
over the whole batch (`ranks`). Only the first process writes and evaluates.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from edgekd import ranks
from edgekd.artifact import atomic_path, is_current, read_manifest, write_manifest
from edgekd.checkpoint import BEST_FILE, MODEL_FILE, save_detector
from edgekd.console import Listener
from edgekd.data.image_cache import ResizedImages
from edgekd.data.loader import Batch, TrainLoader
from edgekd.detectors import spec_for
from edgekd.detectors.base import Detector
from edgekd.detectors.prior_fit import fitted_spec
from edgekd.detectors.shared_norm import share_batch_norm
from edgekd.errors import UserError
from edgekd.recipe import AugmentConfig, DataConfig, ModelConfig, TrainConfig
from edgekd.selection import DEFAULT_SELECTION, Selection
from edgekd.training.distill import Clock, Distiller, term_parameters
from edgekd.training.heap import give_back, kept
from edgekd.training.learning import Adversary, LearningStep, StepInput, check_finite
from edgekd.training.runlog import METRICS_FILE, RunLog
from edgekd.training.setup import (
    StopSignals,
    fitting_threads,
    frozen_layers,
    initial_detector,
    lr_factor,
    make_fabric,
    make_optimizer,
    moving_average,
    without_bf16,
)
from edgekd.training.state import RunState, clear_leftovers, refuse_foreign, require_best
from edgekd.training.validate import detect_dataset
from edgekd.types import Dataset

_LOWEST_SCORE = 0.01
"""Of detections that count while a run goes on: selection is quicker than from 0.001, and AP50 hardly lower."""
MEASURE_EVERY = 50
"""Steps between measurements of each loss's gradient norm, later on; each costs a backward pass a part."""


def is_measured(step: int) -> bool:
    """Whether gradient norms are measured at a step: often at first, while warm-up changes them by the step.

    Measured at steps 0 and 50 alone, terms have pulled 16 times as hard as detection in between (benchmarks/).
    """
    return step % MEASURE_EVERY == 0 or (step < MEASURE_EVERY and (step % 8 == 0 or step in (1, 2, 4)))


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
        selection: how candidates become detections where the run is measured.
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
    selection: Selection = DEFAULT_SELECTION


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the shipped detector's file, and what was measured of that detector."""

    folder: Path
    model: Path
    metrics: dict[str, Any]
    skipped: bool = False


def train_detector(job: TrainJob, listener: Listener | None = None) -> RunResult:
    """Train a detector, resuming a run of the same inputs that was cut off.

    Raises:
        ArtifactError: `job.out` holds a run of other inputs.
        NonFiniteLossError: a loss became NaN or infinite.
        DistillationSetupError: a term cannot be built for this pair.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint has been written, or the result.
    """
    if len(job.dataset) == 0:
        raise UserError("the training split holds no images", got=f"{job.dataset.root}, split {job.dataset.split}")
    if is_current(job.out, "run", job.inputs):
        manifest = read_manifest(job.out)
        assert manifest is not None
        return RunResult(job.out, job.out / MODEL_FILE, dict(manifest.facts.get("metrics", {})), skipped=True)
    refuse_foreign(job.out, job.inputs)
    if ranks.rank() == 0:
        clear_leftovers(job.out)
    trainer = _Trainer(job)
    on_gpu = trainer.fabric.device.type == "cuda"
    with (
        contextlib.nullcontext() if on_gpu else kept(),
        fitting_threads(trainer.learner.detector, job.train.batch_size, on_gpu),
        RunLog(job.out, start_step=trainer.progress.step, listener=listener, enabled=trainer.is_first) as log,
    ):
        return trainer.run(log)


class _Trainer:
    def __init__(self, job: TrainJob) -> None:
        self.job, self.cfg = job, job.train
        self.fabric = make_fabric(job.device, job.train)
        self.is_first = self.fabric.is_global_zero
        torch.manual_seed(job.seed)
        if self.cfg.deterministic:  # without it torch refuses every product of matrices on a GPU
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Also off: a teacher may have been trained in this process, with settings of its own.
        torch.use_deterministic_algorithms(self.cfg.deterministic)
        spec = fitted_spec(spec_for(job.model, job.dataset.class_names), job.dataset.records)
        detector, pretrained = initial_detector(job.model, spec)
        distiller = job.make_distiller(detector) if job.make_distiller is not None else None
        self.notes = [*self._notes(pretrained), *(distiller.matched if distiller is not None else ())]
        self.learner = LearningStep(detector, distiller, job.detection_weight)
        self.loader = self._make_loader(distiller)
        self.total_steps = max(1, self.cfg.epochs * math.ceil(self.loader.steps_per_epoch / self.cfg.accumulate))
        if self.cfg.channels_last:
            detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.learner.channels_last = True
        ema = moving_average(detector, self.cfg.ema)  # of what lies otherwise in memory it would take thrice as long
        if ranks.world_size() > 1:
            share_batch_norm(detector, on_gpu=self.fabric.device.type == "cuda")
        extra = list(term_parameters(distiller))
        self.frozen = frozen_layers(detector, self.cfg.freeze_stride, pretrained=pretrained)
        on_cpu = self.fabric.device.type == "cpu"
        optimizer = make_optimizer(detector, extra, self.cfg, pretrained=pretrained, on_cpu=on_cpu)
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.module, self.optimizer = self.fabric.setup(self.learner, optimizer)
        if ema is not None:
            ema.to(self.fabric.device)
        adversary = distiller.adversary_parameters() if distiller is not None else []
        self.adversary = Adversary(adversary) if adversary else None
        self._val_images: ResizedImages | None = None
        if job.val is not None:
            preprocess = detector.spec.preprocess
            self._val_images = ResizedImages(job.val.records, preprocess, job.data.cache_mib // 2)
        self._signals, self._stop = StopSignals(), False
        adam = None if self.adversary is None else self.adversary.optimizer
        self.state = RunState(self.learner, ema, self.optimizer, adam, self.fabric.strategy.precision)
        self.state.load(job.out)
        self.progress = self.state.progress
        if self.cfg.select == "best" and self.progress.best >= 0:
            require_best(job.out)
        self.learner.single_precision = self.progress.bf16_until is not None
        # A run may have been cut off between the last step of an epoch and the checkpoint after it.
        self.progress.batch = min(self.progress.batch, self.loader.steps_per_epoch)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, log: RunLog) -> RunResult:
        try:
            with self._signals.caught():
                for note in self.notes if self.progress.step == 0 else ():
                    log.write({"event": "note", "step": 0, "message": note})
                for epoch in range(self.progress.epoch, self.cfg.epochs):
                    self._epoch(epoch, log)
                    if self._is_eval_epoch(epoch):
                        self._evaluate(log)
                    self.progress.epoch, self.progress.batch = epoch + 1, 0
                    self._save_state()
                    give_back()
                return self._finish()
        finally:
            self.loader.close()

    def _epoch(self, epoch: int, log: RunLog) -> None:
        self.learner.train()
        for layer in self.frozen:
            layer.eval()
        if self.learner.distiller is not None and self.progress.batch == 0:  # else it has begun, before the cut
            for entry in self.learner.distiller.terms:
                entry.term.begin_epoch(epoch, self.cfg.epochs)
        clock_start, images_seen = time.perf_counter(), 0
        gathered: list[dict[str, float]] = []  # of the batches of one optimiser step; checkpoints lie between steps
        for batch in self.loader.epoch(epoch, self.progress.batch):
            self.progress.batch += 1
            last_of_epoch = self.progress.batch == self.loader.steps_per_epoch
            update = self.progress.batch % self.cfg.accumulate == 0 or last_of_epoch
            gathered.append(self._step(batch, epoch, update))
            images_seen += len(batch.image_ids) * ranks.world_size()
            if not update:
                continue
            elapsed = time.perf_counter() - clock_start
            losses = {name: fmean(one[name] for one in gathered if name in one) for name in gathered[-1]}
            gathered = []
            self._log_step(log, epoch, losses, images_seen / max(elapsed, 1e-9))
            self.progress.step += 1
            every = self.cfg.checkpoint_every
            if self._stop or (isinstance(every, int) and self.progress.step % every == 0):
                self._save_state()
            if self._stop:
                raise KeyboardInterrupt

    def _step(self, batch: Batch, epoch: int, update: bool) -> dict[str, float]:
        step = self.progress.step
        factor = lr_factor(step, self.total_steps, self.cfg)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        gathered = (self.progress.batch - 1) % self.cfg.accumulate  # batches of this optimiser step before this one
        # An epoch's last step may have fewer batches: its gradient is their mean too.
        batches = min(self.cfg.accumulate, self.loader.steps_per_epoch - (self.progress.batch - 1 - gathered))
        # On a step's first batch, so that no gradient is gathered with weights that have not been measured yet.
        measure = self.learner.distiller is not None and is_measured(step) and gathered == 0
        clock = Clock(epoch, self.cfg.epochs)
        with self.fabric.no_backward_sync(self.module, enabled=not update):
            losses: dict[str, Tensor] = self.module(StepInput(batch, clock, measure))
            values = self._shared(losses)
            check_finite(values, step, batch.image_ids)
            self.fabric.backward(losses["loss"] / batches)
        if self.adversary is not None and self.learner.adversary is not None:
            self.adversary.gather(self.learner.adversary / batches)
        if update:
            norm = self.fabric.clip_gradients(
                self.module, self.optimizer, max_norm=self.cfg.clip_norm or float("inf"), error_if_nonfinite=False
            )
            if norm is not None and not torch.isfinite(norm) and self._precision() != "16-mixed":
                if self._precision() == "bf16-mixed" and not self.learner.single_precision:
                    self._leave_bf16()
                    return values
                check_finite({"gradient": float(norm)}, step, batch.image_ids)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.adversary is not None:
                self.adversary.step()
            if self.state.ema is not None:
                self.state.ema.update_parameters(self.learner.detector)
        return values

    def _leave_bf16(self) -> None:
        """Leave this step out, and go on in single precision: bf16 on CPUs has given such gradients where fp32 does not."""
        self.learner.single_precision, self.progress.bf16_until = True, self.progress.step
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary is not None:
            self.adversary.forget()

    def _shared(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """The whole batch's losses, and on the same way whether any rank was told to stop: then all do, at one step."""
        own = [value.detach().float() for value in losses.values()]
        noted = torch.full_like(own[0], float(self._signals.noted))
        *values, stop = ranks.mean_over_ranks(torch.stack([*own, noted])).tolist()
        self._stop = stop > 0
        return dict(zip(losses, values, strict=True))

    # -- evaluation, logging, finishing --------------------------------------------------------------------------

    def _shipping_detector(self) -> Detector:
        detector = self.learner.detector if self.state.ema is None else self.state.ema.module
        assert isinstance(detector, Detector)
        return detector

    def _is_eval_epoch(self, epoch: int) -> bool:
        if self.job.val is None or epoch + 1 == self.cfg.epochs:
            return self.job.val is not None
        every = max(1, self.cfg.epochs // 8) if self.cfg.eval_every == "auto" else self.cfg.eval_every
        return (epoch + 1) % every == 0

    def _evaluate(self, log: RunLog) -> None:
        from edgekd.bench.accuracy import evaluate
        from edgekd.bench.runner import fingerprint

        if not self.is_first or self._val_images is None or self.job.val is None:
            return
        detector = self._shipping_detector()
        selection = replace(self.job.selection, score_threshold=_LOWEST_SCORE)
        found = detect_dataset(detector, self._val_images, batch_size=self.cfg.batch_size, selection=selection)
        accuracy = evaluate(self.job.val.records, found, self.job.val.class_names)
        metrics = {"ap50": accuracy.ap50, "ap": accuracy.ap, "voc07": accuracy.voc07, "images": len(self.job.val)}
        step = self.progress.step
        log.write({"event": "eval", "step": step, "epoch": self.progress.epoch, "map": metrics})
        score = metrics["ap50"] if metrics["ap50"] is not None else 0.0
        if self.cfg.select == "last" or score > self.progress.best:
            self.progress.metrics = metrics  # of the weights that ship
        if score > self.progress.best:
            self.progress.best = score
            chosen_on = fingerprint(self.job.val)  # by which a benchmark knows that its figures are optimistic
            facts = {"metrics": metrics, "step": step, "chosen_on": chosen_on}
            save_detector(self.job.out / BEST_FILE, detector, facts)

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
        if self.progress.bf16_until == self.progress.step:
            message = (
                "a gradient was not finite in bf16: this step is left out, and the run goes on in single precision"
            )
            log.write({"event": "warning", "step": self.progress.step, "message": message})
        pull, distiller = self.learner.pull, self.learner.distiller
        self.learner.pull = None
        if distiller is None or pull is None:
            log.write(record)
            return
        record["gradient_ratio"] = pull.ratio
        record["pull"] = {"det": pull.detection, **pull.terms}
        record["weights"] = {entry.label: distiller.weight_of(i) for i, entry in enumerate(distiller.terms)}
        if self.progress.step % MEASURE_EVERY:  # a few steps, and those of warm-up, say little of what a term will do
            log.write(record)
            return
        statistics = {f"{e.label}.{k}": v for e in distiller.terms for k, v in e.term.statistics().items()}
        if statistics:
            record["statistics"] = statistics
        log.write(record)
        for message in (*self.state.guard.check(pull), *distiller.warnings()):
            log.write({"event": "warning", "step": self.progress.step, "message": message})

    def _finish(self) -> RunResult:
        if self.is_first:
            self._write_result()
        told = torch.tensor(float(self._signals.noted), device=self.fabric.device)
        if ranks.mean_over_ranks(told) > 0:  # since the last step, while it was measured: what follows is not begun
            raise KeyboardInterrupt
        return RunResult(self.job.out, self.job.out / MODEL_FILE, dict(self.progress.metrics))

    def _write_result(self) -> None:
        out, progress = self.job.out, self.progress
        facts: dict[str, Any] = {"metrics": progress.metrics, "seed": self.job.seed}
        best = out / BEST_FILE
        if self.cfg.select == "best" and best.is_file():
            payload = best.read_bytes()
            with atomic_path(out / MODEL_FILE) as temporary:
                temporary.write_bytes(payload)
        else:
            made_from = {"step": progress.step, "inputs": dict(self.job.inputs)}
            save_detector(out / MODEL_FILE, self._shipping_detector(), facts | made_from)
        facts |= {
            "steps": progress.step,
            "spec": self.learner.detector.spec.to_dict(),
            "device": str(self.fabric.device),
            "precision": self._precision(),
            "bf16_until": progress.bf16_until,
            "world_size": self.fabric.world_size,
        }
        files = [name for name in (MODEL_FILE, BEST_FILE, METRICS_FILE) if (out / name).is_file()]
        write_manifest(out, "run", self.job.inputs, files, facts)

    def _save_state(self) -> None:
        self.state.save(self.job.out, self.job.inputs)

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
            plan=distiller.plan if distiller is not None else None,
            stores=distiller.stores if distiller is not None else (),
            rank=ranks.rank(),
            world_size=ranks.world_size(),
        )

    def _notes(self, pretrained: bool) -> list[str]:
        """What a recipe's author may not expect of the training that begins."""
        job, notes = self.job, list[str]()
        if job.model.weights is not None:
            cut = "" if pretrained else f", cut to its width of {job.model.width:g}"
            notes.append(f"the backbone begins with weights of {job.model.weights}{cut}")
        if without_bf16(self.cfg, self.fabric.device.type == "cuda"):
            notes.append("this processor has no bf16 and would emulate it, many times slower: the run goes in fp32")
        if job.augment.mosaic and self.cfg.epochs <= (last := job.augment.close_mosaic_epochs):
            notes.append(
                f"no mosaics: the last {last} epochs go without (augment.close_mosaic_epochs), and there are no more"
            )
        if self.cfg.select == "best" and job.val is not None:
            notes.append(
                f"the best of several evaluations on {job.val.split} ships (train.select: best): its figures on that split "
                "are optimistic, another split tells"
            )
        return notes

    def _precision(self) -> str:
        return str(self.fabric.strategy.precision.precision)
