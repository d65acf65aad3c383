"""Depthwise convolution that also trains fast in bf16 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with a group for each channel and half the kernel as padding, computing the same.

    oneDNN has no fast bf16 kernel for the gradient with respect to the input of a strided depthwise convolution: its
    reference takes 3 to 45 times what float32 takes, and was a third of a MobileNetV2 SSD-lite's whole training step (torch
    2.13, AVX-512 BF16; benchmarks/). There the gradient is taken as that of the unstrided convolution, which is fast.
    """

    def __init__(self, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        slow = self.stride != (1, 1) and x.device.type == "cpu" and torch.is_grad_enabled()
        if slow and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            narrow = x.bfloat16(), self.weight.bfloat16()
            out: Tensor = _StridedDepthwise.apply(*narrow, self.stride, self.padding)  # type: ignore[no-untyped-call]
            return out
        return super().forward(x)


class _StridedDepthwise(torch.autograd.Function):
    """The gradient with respect to the input, taken from the output's gradient with zeros where the stride skips cells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        to_x, to_weight, *_ = ctx.needs_input_grad
        x_gradient = weight_gradient = None
        if to_x:
            spread = torch.zeros_like(x)
            spread[:, :, :: ctx.stride[0], :: ctx.stride[1]] = gradient
            x_gradient = _backward(spread, x, weight, (1, 1), ctx.padding, (True, False))[0]
        if to_weight:
            weight_gradient = _backward(gradient, x, weight, ctx.stride, ctx.padding, (False, True))[1]
        return x_gradient, weight_gradient, None, None


def _backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, (1, 1), False, (0, 0), x.shape[1], [*wanted, False]
    )
    return found[0], found[1]
