"""What a training loop stands on: devices and processes, the optimiser, the learning rate, the moving average, signals.

Lightning Fabric owns devices, precision and distribution. Chosen over Accelerate because it keeps no global state, patches
nothing, and needs no model hub.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from edgekd import ranks
from edgekd.detectors import build_detector
from edgekd.detectors.backbones.layers import Backbone
from edgekd.detectors.base import Detector
from edgekd.detectors.complexity import count_macs
from edgekd.errors import RecipeError, UserError
from edgekd.machine import emulates_bf16
from edgekd.recipe import ModelConfig, TrainConfig
from edgekd.torchrun import launched
from edgekd.types import DetectorSpec


def uses_gpu(device: str) -> bool:
    """Whether "auto", "cpu", "cuda" or "cuda:1" means a GPU here.

    Raises:
        UserError: a GPU was asked for, but there is none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "device cuda was asked for, but torch sees no GPU",
            got=f"torch {torch.__version__}",
            fix="run `edgekd doctor`, install a CUDA build of torch, or use --device cpu",
        )
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def without_bf16(config: TrainConfig, on_gpu: bool) -> bool:
    """Whether bf16 is asked of a CPU that would emulate it.

    Measured on an EPYC with no more than AVX2: a step of MobileNetV2 SSD-lite at 224 px takes 16 times as long as in
    fp32. A recipe that suits one machine is not to take days on the next: such a training goes in fp32, and says so.
    """
    return config.precision == "bf16" and not on_gpu and emulates_bf16()


def make_fabric(device: str, config: TrainConfig) -> Any:
    """Fabric for this machine; under torchrun, for all the processes it started.

    Raises:
        UserError: a device or a precision that is not to be had here.
    """
    import logging
    import warnings

    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)  # after its import, which sets it to INFO

    on_gpu = uses_gpu(device)
    wanted = ("bf16" if on_gpu else "fp32") if config.precision == "auto" else config.precision
    if wanted == "fp16" and not on_gpu:
        raise UserError("train.precision: fp16 needs a GPU", fix="use fp32 or bf16 on a CPU")
    if without_bf16(config, on_gpu):
        wanted = "fp32"
    precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[wanted]
    ranks.join(on_gpu)
    world, local = ranks.world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
    devices: Any = [int(device.split(":")[1])] if world == 1 and ":" in device else local
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(
            accelerator="cuda" if on_gpu else "cpu",
            devices=devices,
            num_nodes=max(1, world // local),
            strategy="ddp_find_unused_parameters_true" if world > 1 else "auto",
            precision=precision,  # type: ignore[arg-type]
            # Named, or Fabric would take a Slurm job's number of tasks for ours.
            plugins=[TorchElasticEnvironment() if world > 1 else LightningEnvironment()],
        )
        fabric.launch()
    return fabric


SMALL_BATCH_MACS = 1e9
"""Multiply-accumulates of a batch's forward pass under which a second CPU thread brings a quarter at most."""


def fills_one_thread(detector: Detector, batch_size: int) -> bool:
    """Whether a training is so small that a second CPU thread does more for another one."""
    return count_macs(detector) * batch_size < SMALL_BATCH_MACS


@contextlib.contextmanager
def fitting_threads(detector: Detector, batch_size: int, on_gpu: bool) -> Iterator[None]:
    """One CPU thread in the body for a small network, unless OMP_NUM_THREADS says otherwise; then as it was.

    Decided by arithmetic and not by a trial, so that a run that is cut off goes on with the same rounding. Measured on two
    idle cores: a step of yolo-nano at 160 px with 8 images takes 28 ms with one thread and with two where its width is 0.25,
    and 45 and 36 ms where it is 0.5.
    """
    before = torch.get_num_threads()
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ and fills_one_thread(detector, batch_size):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lr_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate at a step as a share of its peak: linear warm-up, then cosine or constant."""
    warmup = min(1000, math.ceil(0.05 * total_steps)) if config.warmup_steps == "auto" else config.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    share = (step - warmup) / max(1, total_steps - warmup)
    return config.final_lr_factor + (1 - config.final_lr_factor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def initial_detector(config: ModelConfig, spec: DetectorSpec) -> tuple[Detector, bool]:
    """The detector as training begins with it, and whether its backbone knows something that is worth keeping.

    Channels cut out of a wider backbone do not: they are a start, and have to be learned at the full rate.

    Raises:
        WeightsError: the weights cannot be had or do not fit.
    """
    detector = build_detector(spec)
    if config.weights is None:
        return detector, False
    from edgekd.detectors.weights import load_backbone_weights

    return detector, not load_backbone_weights(detector, config.weights).narrowed


PRETRAINED_LR_FACTOR = 0.3
"""Of `backbone_lr_factor: auto` where the backbone comes with weights (measured: benchmarks/)."""


def frozen_layers(detector: Detector, stride: int, *, pretrained: bool) -> list[nn.Module]:
    """The backbone's layers whose maps have at most this stride, which learn nothing from now on; none for 0.

    They still have to be kept in evaluation mode, for the sake of their batch norms' statistics.

    Raises:
        RecipeError: a backbone without weights of its own, with ones cut to its width, or one that is no SSD's.
    """
    if not stride:
        return []
    backbone = getattr(detector, "backbone", None)
    if not isinstance(backbone, Backbone) or not pretrained:
        raise RecipeError(
            f"train.freeze_stride: {stride} keeps the first layers of a pretrained SSD backbone as they are",
            got=f"{detector.spec.model} {'with' if pretrained else 'without'} `weights` of its own width",
            fix="give the model `weights` at the width they were made for, or leave train.freeze_stride out",
        )
    layers = backbone.to_stride(stride)
    for layer in layers:
        layer.requires_grad_(False)
    return layers


def make_optimizer(
    detector: Detector, extra: list[nn.Parameter], config: TrainConfig, *, pretrained: bool, on_cpu: bool
) -> torch.optim.Optimizer:
    """Weight decay on weights alone; the backbone at its own learning rate; the terms' parameters with the head's.

    Args:
        pretrained: whether the backbone has come with weights, made for its width. on_cpu: where the steps will run.
    """
    factor = config.backbone_lr_factor
    if factor == "auto":
        factor = PRETRAINED_LR_FACTOR if pretrained else 1.0
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in detector.named_parameters():
        if not parameter.requires_grad:
            continue
        is_backbone = name.startswith("backbone.")
        if is_backbone and factor == 0:
            parameter.requires_grad_(False)
            continue
        groups.setdefault((is_backbone, parameter.ndim > 1), []).append(parameter)
    for parameter in extra:
        groups.setdefault((False, parameter.ndim > 1), []).append(parameter)
    settings: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr": config.lr * (factor if is_backbone else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (is_backbone, decays), parameters in groups.items()
    ]
    settings.sort(key=lambda group: group["lr"])
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum)
    # One kernel for all tensors instead of ten a tensor: those were a sixth of a small network's step on a CPU.
    return torch.optim.AdamW(settings, lr=config.lr, fused=True if on_cpu else None)


class MovingAverage(AveragedModel):
    """A copy of a detector that follows its weights.

    torch's own update walks through all modules and makes new lists of their tensors at each step, a twentieth of a small
    network's whole step: here they are gathered at the first one, when they lie where they will stay.
    """

    def __init__(self, detector: Detector, decay: float) -> None:
        super().__init__(detector, use_buffers=True)
        self.decay = decay
        self._floats: tuple[list[Tensor], list[Tensor]] = [], []  # own and the model's, pair by pair
        self._counters: tuple[list[Tensor], list[Tensor]] = [], []
        self._count: int | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Follow the weights and buffers of `model`, the same one at each step."""
        if self._count is None:
            self._count = int(self.n_averaged)
            for own, current in zip(_tensors(self.module), _tensors(model), strict=True):
                pairs = self._floats if own.is_floating_point() else self._counters
                pairs[0].append(own.detach())
                pairs[1].append(current.detach())
        # Early on a short memory, so that the average is not held back by the first, random weights.
        now = min(self.decay, (1 + self._count) / (10 + self._count)) if self._count else 0.0
        torch._foreach_lerp_(*self._floats, 1 - now)
        if self._counters[0]:  # BatchNorm's
            torch._foreach_copy_(*self._counters)
        self._count += 1
        self.n_averaged += 1


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def moving_average(detector: Detector, decay: float) -> MovingAverage | None:
    """See `MovingAverage`; None for a decay of 0."""
    return MovingAverage(detector, decay) if decay else None


class StopSignals:
    """Ctrl-C and SIGTERM are noted, for the loop to end the run with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.noted = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch them in the body; elsewhere than in the main thread this is not possible, and nothing is done."""

        def note(number: int, frame: FrameType | None) -> None:
            # torchrun passes on the signal that its processes have had from the terminal already, and of SIGTERM a process
            # may well have two: its group's, and that of the process that started it.
            if self.noted and number == signal.SIGINT and not launched():
                raise KeyboardInterrupt
            self.noted = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
