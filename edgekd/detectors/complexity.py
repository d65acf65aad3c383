"""How large and how costly a model is, counted rather than estimated."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from edgekd.detectors.base import Detector


def count_parameters(module: nn.Module) -> int:
    """Trainable values: weights and biases, without batch norm's running statistics and other buffers."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, input_hw: tuple[int, int] | None = None) -> int:
    """Multiply-accumulates of one forward pass over one image: convolutions, linear layers and matrix products, exactly.

    Batch norms (folded at export), activations and additions are not counted, as is usual. Runs on shapes alone: no
    values are computed and the module is left as it was.

    Args:
        module: takes (1, 3, H, W).
        input_hw: (H, W); a detector's own input size if left out.

    Raises:
        ValueError: `input_hw` is missing and `module` is not a detector.
    """
    if input_hw is None:
        if not isinstance(module, Detector):
            raise ValueError(f"{type(module).__name__} has no input size of its own: give input_hw")
        input_hw = module.spec.preprocess.input_hw
    tensors = chain(module.named_parameters(), module.named_buffers())
    state = {name: torch.empty_like(value, device="meta") for name, value in tensors}
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(module, state, (torch.empty(1, 3, *input_hw, device="meta"),))
    finally:
        for part, training in modes:
            part.training = training
    flops: int = counter.get_total_flops()
    return flops // 2  # which counts a multiplication and an addition apart
