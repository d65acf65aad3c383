"""Counting parameters and multiply-accumulates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.complexity import count_macs, count_parameters
from edgekd.recipe import ModelConfig


def test_counts_equal_hand_counts() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),  # 8 x 8 outputs
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 5),
    )
    assert count_macs(module, (16, 16)) == 8 * 8 * 8 * 27 + 8 * 8 * 8 * 9 + 512 * 5
    assert count_parameters(module) == 216 + 16 + 72 + 8 + 512 * 5 + 5


def test_counting_leaves_the_module_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval()).train()
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    count_macs(module, (8, 8))
    assert module.training
    assert not module[1].training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.device.type == "cpu" for value in module.state_dict().values())


def test_a_detector_knows_its_input_size() -> None:
    small, large = (
        count_macs(
            build_detector(spec_for(ModelConfig(model="mobilenetv2-ssd-lite", input_size=side, width=0.25), "ab"))
        )
        for side in (96, 192)
    )
    assert large / small == pytest.approx(4, rel=0.1)


def test_a_plain_module_needs_a_size() -> None:
    with pytest.raises(ValueError, match="input_hw"):
        count_macs(nn.Conv2d(3, 4, 1))
