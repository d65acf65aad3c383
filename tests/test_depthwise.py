"""Depthwise convolution: outputs and gradients as `nn.Conv2d` has them, in bf16 by a faster way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgekd.detectors.backbones.depthwise import DepthwiseConv2d, _StridedDepthwise
from edgekd.detectors.backbones.mobilenet_v2 import MobileNetV2


def pair(kernel: int, stride: int) -> tuple[DepthwiseConv2d, nn.Conv2d]:
    torch.manual_seed(0)
    own = DepthwiseConv2d(8, kernel, stride)
    plain = nn.Conv2d(8, 8, kernel, stride, kernel // 2, groups=8, bias=False)
    plain.load_state_dict(own.state_dict())
    return own, plain


def gradients(module: nn.Module, hw: tuple[int, int], *, bf16: bool) -> list[torch.Tensor]:
    """Output, and the gradients of input and weight, for the same images each time."""
    module.zero_grad()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 8, *hw, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = module(images)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    weight = next(module.parameters())
    assert images.grad is not None
    assert weight.grad is not None
    return [output.detach(), images.grad, weight.grad]


@pytest.mark.parametrize("hw", [(12, 16), (7, 9), (1, 1)])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_it_computes_what_a_plain_convolution_does(kernel: int, stride: int, hw: tuple[int, int]) -> None:
    own, plain = pair(kernel, stride)
    for mine, theirs in zip(gradients(own, hw, bf16=False), gradients(plain, hw, bf16=False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    if hw == (1, 1):  # where oneDNN leaves part of a strided convolution's bf16 gradient unwritten
        return
    exact = gradients(plain, hw, bf16=False)
    for mine, theirs, wanted in zip(gradients(own, hw, bf16=True), gradients(plain, hw, bf16=True), exact, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)  # bf16 has 8 bits
        torch.testing.assert_close(mine.float(), wanted, rtol=5e-2, atol=5e-2)


def test_the_gradient_of_the_input_is_exact_in_float64() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _StridedDepthwise.apply(x, w, (2, 2), (1, 1)), (images, weight))


def test_strided_depthwise_layers_of_a_backbone_take_the_faster_way_in_bf16_alone() -> None:
    images = torch.randn(2, 3, 64, 64)
    for bf16, wanted in ((True, 4), (False, 0)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            maps = MobileNetV2(0.25)(images)
        seen, steps = set(), [maps.sources[-1].grad_fn]
        while steps:
            step = steps.pop()
            if step is not None and step not in seen:
                seen.add(step)
                steps += [before for before, _ in step.next_functions]
        assert sum(type(step).__name__ == "_StridedDepthwiseBackward" for step in seen) == wanted
