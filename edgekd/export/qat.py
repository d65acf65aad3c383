"""Quantisation-aware fine-tuning: a trained detector learns weights, and activation scales, that survive int8.

Every convolution that the exporter will compute in int8 rounds its input and its weights in the forward pass as the
exported file will: the same tensors, scales, zero points and steps as `qdq.quantise` writes. Rounding passes gradients
straight through (Bengio et al., 2013), and the input scales are learned by LSQ (Esser et al., ICLR 2020, eq. 1-3), here as
logarithms. Weight scales are not learned: they follow max |w| a channel, as in the exporter. BatchNorm stays as it is: a
scale a channel does not change which step a weight rounds to. What is not simulated: the outputs of residual Adds and of
the last convolutions, which the exporter calibrates afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.data.loader import TrainLoader
from edgekd.detectors.base import Detector, DetectorOutput
from edgekd.errors import ExportError, NonFiniteLossError
from edgekd.export.calibration import Ranges, collect
from edgekd.export.graph import GraphIndex
from edgekd.export.onnx import trace
from edgekd.export.placement import MOVERS, Target, int8_nodes, is_weighted
from edgekd.export.precision import weight_limit
from edgekd.export.qdq import Parameters, activation_parameters
from edgekd.preprocess import normalisation
from edgekd.recipe import QatConfig
from edgekd.types import FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto

FACTS_KEY = "int8"
"""In a checkpoint's facts: {"target", "ranges": {convolution: [low, high]}, ...}."""
_PREFIX, _SUFFIX = "detector.", ".weight"
_SCALE_LR = 1e-3
_BACKGROUND = 0.01


def conv_inputs(model: ModelProto, nodes: Set[str], target: Target) -> dict[str, str]:
    """Each int8 convolution's path in the detector to the tensor whose pair quantises its input.

    On x86 a pooling or reshaping in between takes its input's scale, so the tensor before it counts.
    """
    index = GraphIndex(model)
    found = {}
    for node in model.graph.node:
        weights = node.input[1] if len(node.input) > 1 else ""
        if node.name not in nodes or not is_weighted(node, index) or not weights.startswith(_PREFIX):
            continue
        tensor = node.input[0]
        while target == "x86" and (maker := index.producer.get(tensor)) is not None:
            if maker.name not in nodes or maker.op_type not in MOVERS:
                break
            tensor = maker.input[0]
        found[weights.removeprefix(_PREFIX).removesuffix(_SUFFIX)] = tensor
    return found


def learned_ranges(model: ModelProto, facts: Mapping[str, Any], target: Target) -> Ranges:
    """Ranges that fine-tuning left in a checkpoint's facts, by tensor of the traced model; none for another target."""
    learned = facts.get(FACTS_KEY)
    if not learned or learned["target"] != target:
        return {}
    inputs = conv_inputs(model, set(int8_nodes(model, target)), target)
    return {inputs[conv]: (low, high) for conv, (low, high) in learned["ranges"].items() if conv in inputs}


class ActivationGrid(nn.Module):
    """Rounds an activation to the steps of a scale that is learned; the zero point stays."""

    def __init__(self, start: Parameters, target: Target) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(float(start.scale)).log())
        self.zero_point = int(start.zero_point)
        self.least, self.most = (0, 255) if target == "x86" else (-128, 127)

    def forward(self, values: Tensor) -> Tensor:
        """Values (B, ...) as int8 would hold them; the scale's gradient is damped as in LSQ."""
        damping = (values[0].numel() * (self.most - self.least)) ** -0.5
        scale = self.log_scale.exp()
        scale = scale * damping + (scale * (1 - damping)).detach()
        steps = _rounded(values / scale) + self.zero_point
        rounded: Tensor = (steps.clamp(self.least, self.most) - self.zero_point) * scale
        return rounded

    @property
    def range(self) -> tuple[float, float]:
        """(lowest, highest) value, from which `activation_parameters` makes this scale and zero point again."""
        scale = float(self.log_scale.detach().exp())
        lowest = 0 if self.least == 0 else -127
        return (lowest - self.zero_point) * scale, (self.most - self.zero_point) * scale


class QuantisedConv(nn.Module):
    """A convolution whose input and weights are rounded; it trains the weights of the one that it stands for."""

    def __init__(self, conv: nn.Conv2d, grid: ActivationGrid, limit: int) -> None:
        super().__init__()
        self.conv, self.grid, self.limit = conv, grid, limit

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to the convolution's output."""
        conv, weight = self.conv, self.conv.weight
        scale = weight.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-9) / self.limit
        weight = _rounded(weight / scale) * scale
        return F.conv2d(self.grid(images), weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _rounded(values: Tensor) -> Tensor:
    return values + (values.round() - values).detach()


class QuantisedDetector:
    """A copy of a detector that computes as its int8 export will, calibrated and ready to be fine-tuned.

    Args:
        images: prepared training images to start the scales from, each (1, 3, H, W) float32.

    Raises:
        ExportError: none of its convolutions can be found in the exported graph.

    Attributes:
        module: the copy, in eval mode, so that BatchNorm stays as it is. target: what int8 is laid out for.
    """

    def __init__(self, detector: Detector, images: Sequence[FloatArray], target: Target) -> None:
        self.module = copy.deepcopy(detector).float().cpu().eval()
        self.target, limit = target, weight_limit(target)
        model = trace(self.module)
        inputs = conv_inputs(model, set(int8_nodes(model, target)), target)
        if not inputs:
            raise ExportError(f"no convolution of {detector.spec.model} was found in its exported graph")
        seen = collect(model, sorted(set(inputs.values())), images)
        grids = {
            name: ActivationGrid(activation_parameters(found.lowest, found.highest, target), target)
            for name, found in seen.items()
        }
        self._convs: dict[str, QuantisedConv] = {}
        for path, tensor in inputs.items():
            conv = self.module.get_submodule(path)
            assert isinstance(conv, nn.Conv2d)
            self._convs[path] = QuantisedConv(conv, grids[tensor], limit)
            _put(self.module, path, self._convs[path])

    def ranges(self) -> dict[str, list[float]]:
        """The learned (low, high) of each convolution's input."""
        return {path: list(conv.grid.range) for path, conv in self._convs.items()}

    def scales(self) -> list[nn.Parameter]:
        """The logarithms of the activation scales, each once."""
        return list({id(conv.grid): conv.grid.log_scale for conv in self._convs.values()}.values())

    def plain(self) -> Detector:
        """The detector with the fine-tuned weights, as it was built: what a checkpoint holds."""
        detector = copy.deepcopy(self.module)
        for path in self._convs:
            wrapped = detector.get_submodule(path)
            assert isinstance(wrapped, QuantisedConv)
            _put(detector, path, wrapped.conv)
        return detector.cpu()


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


@dataclass(frozen=True)
class QatResult:
    """A fine-tuned detector, the facts that its export reads, and the loss of each epoch."""

    detector: Detector
    facts: dict[str, Any]
    losses: tuple[float, ...]


def fine_tune(
    detector: Detector,
    calibration: Sequence[FloatArray],
    loader: TrainLoader,
    *,
    config: QatConfig,
    target: Target,
    device: str = "cpu",
    tell: Callable[[int, int, float], None] | None = None,
) -> QatResult:
    """Fine-tune a trained detector for int8, taught by its fp32 self as well where `config.distill` says so.

    Args:
        calibration: prepared training images, each (1, 3, H, W) float32.
        loader: of `config.epochs` epochs.
        tell: told (step, steps, loss).

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
    """
    quantised = QuantisedDetector(detector, calibration, target)
    teacher, student = copy.deepcopy(detector).float().eval().to(device), quantised.module.to(device)
    scales = quantised.scales()
    known = {id(scale) for scale in scales}
    weights = [p for p in student.parameters() if id(p) not in known and p.requires_grad]
    optimizer = torch.optim.Adam([{"params": weights, "lr": config.lr}, {"params": scales, "lr": _SCALE_LR}])
    total = max(1, config.epochs * loader.steps_per_epoch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    factor, shift = (torch.from_numpy(part).to(device) for part in normalisation(detector.spec.preprocess))
    losses, step = [], 0
    for epoch in range(config.epochs):
        seen: list[float] = []
        for batch in loader.epoch(epoch):
            images = batch.images_u8.to(device).float() * factor + shift
            output = student(images)
            loss = torch.stack(
                list(student.detection_losses(output, batch.targets.to(torch.device(device))).values())
            ).sum()
            if config.distill:
                with torch.no_grad():
                    truth = teacher(images)
                loss = loss + config.distill * self_distillation(output, truth, detector.score_activation)
            if not torch.isfinite(loss):
                raise NonFiniteLossError("the loss is not finite", got=float(loss), fix="lower export.qat.lr")
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(weights, 10.0)
            optimizer.step()
            schedule.step()
            step += 1
            seen.append(float(loss.detach()))
            if tell is not None:
                tell(step, total, seen[-1])
        losses.append(sum(seen) / max(1, len(seen)))
    facts = {FACTS_KEY: {"target": target, "ranges": quantised.ranges(), "qat": config.model_dump(mode="json")}}
    return QatResult(quantised.plain(), facts, tuple(losses))


def self_distillation(output: DetectorOutput, truth: DetectorOutput, activation: str) -> Tensor:
    """KL(fp32 || int8) of the classes plus smooth L1 of the box coding, weighted to where fp32 sees an object."""
    if activation == "softmax":
        target = truth.cls_logits.softmax(-1)
        divergence = F.kl_div(output.cls_logits.log_softmax(-1), target, reduction="none").sum(-1)
        weight = 1 - target[..., 0]
    else:
        target = truth.cls_logits.sigmoid()
        cross = F.binary_cross_entropy_with_logits(output.cls_logits, target, reduction="none")
        divergence = (cross - F.binary_cross_entropy_with_logits(truth.cls_logits, target, reduction="none")).sum(-1)
        weight = target.amax(-1)
    if output.objectness is not None and truth.objectness is not None:
        weight = truth.objectness.sigmoid()
        divergence = divergence + (output.objectness - truth.objectness).square()
    boxes = F.smooth_l1_loss(output.bbox_regression, truth.bbox_regression, reduction="none").mean(-1)
    return ((weight + _BACKGROUND) * divergence + weight * boxes).sum() / weight.sum().clamp_min(1.0)
