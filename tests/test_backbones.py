"""Backbones: published sizes and costs, map shapes, and torchvision's and EfficientNet-Lite's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgekd.detectors.backbones.efficientnet_lite import EfficientNetLite
from edgekd.detectors.backbones.layers import Backbone, scaled_channels
from edgekd.detectors.backbones.mobilenet_v1 import MobileNetV1
from edgekd.detectors.backbones.mobilenet_v2 import MobileNetV2
from edgekd.detectors.backbones.vgg import VGG
from edgekd.detectors.complexity import count_macs, count_parameters

BACKBONES: dict[str, Callable[[float], Backbone]] = {
    "vgg16": lambda width: VGG(16, width),
    "vgg11": lambda width: VGG(11, width),
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "efficientnet_lite0": lambda width: EfficientNetLite(0, width),
    "efficientnet_lite1": lambda width: EfficientNetLite(1, width),
}


@pytest.mark.parametrize(
    ("name", "last_channels", "published_millions"),
    [
        # The published classifiers have one linear layer of 1000 classes more.
        ("mobilenet_v1", 1024, 4.232),
        ("mobilenet_v2", 1280, 3.505),
        ("efficientnet_lite0", 1280, 4.652),
        ("efficientnet_lite1", 1280, 5.417),
    ],
)
def test_with_its_classifier_it_has_the_published_parameters(
    name: str, last_channels: int, published_millions: float
) -> None:
    classifier = 1000 * last_channels + 1000
    total = count_parameters(BACKBONES[name](1.0)) + classifier
    assert round(total / 1e6, 3) == published_millions


@pytest.mark.parametrize(
    ("name", "side", "published_millions"),
    [
        # MACs as the papers give them, with the classifier's 1.3 M, which is within the tolerance.
        ("mobilenet_v1", 224, 569),
        ("mobilenet_v2", 224, 300),
        ("efficientnet_lite0", 224, 385),
        ("efficientnet_lite1", 240, 600),
    ],
)
def test_macs_are_the_published_ones(name: str, side: int, published_millions: int) -> None:
    macs = count_macs(BACKBONES[name](1.0), (side, side))
    assert macs / 1e6 == pytest.approx(published_millions, rel=0.02)


@pytest.mark.parametrize("width", [0.25, 1.0])
@pytest.mark.parametrize("name", BACKBONES)
def test_maps_have_the_stated_channels_and_strides(name: str, width: float) -> None:
    torch.manual_seed(0)
    backbone = BACKBONES[name](width)
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 70, 96))
    for specs in (backbone.sources, backbone.stages):
        assert [m.name for m in specs] == ["s8", "s16", "s32"][: len(specs)]
    specs, found_maps = (*backbone.sources, *backbone.stages), (*maps.sources, *maps.stages)
    for spec, found in zip(specs, found_maps, strict=True):
        stride = int(spec.name[1:])
        assert found.shape == (2, spec.channels, -(-70 // stride), -(-96 // stride))
        assert found.std() > 0.01  # the signal neither dies out nor explodes at the start
        assert found.abs().max() < 1e3


@pytest.mark.parametrize(
    ("channels", "width", "floor", "wanted"),
    [(32, 1.0, 8, 32), (32, 0.25, 8, 8), (16, 0.25, 8, 8), (24, 0.75, 8, 24), (1280, 1.4, 8, 1792), (512, 0.1, 64, 64)],
)
def test_channels_are_rounded_as_published(channels: int, width: float, floor: int, wanted: int) -> None:
    assert scaled_channels(channels, width, floor) == wanted


def test_torchvision_weights_load_strictly(mobilenet_v2_weights: Path) -> None:
    state = torch.load(mobilenet_v2_weights, weights_only=True)
    backbone = MobileNetV2()
    features = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    assert set(backbone.state_dict()) == set(features)
    backbone.load_state_dict(features, strict=True)
    with torch.no_grad():
        noise = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        last = backbone.eval()(noise).sources[-1]
    assert last.std() > 0.05
    assert last.max() <= 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg16", {"features.0.weight": (64, 3, 3, 3), "features.28.bias": (512,), "fc6.weight": (1024, 512, 3, 3)}),
        ("vgg11", {"features.18.weight": (512, 512, 3, 3), "fc7.weight": (1024, 1024, 1, 1)}),
        ("mobilenet_v1", {"model.0.0.weight": (32, 3, 3, 3), "model.13.3.weight": (1024, 1024, 1, 1)}),
        (
            "efficientnet_lite0",
            {
                "_conv_stem.weight": (32, 3, 3, 3),
                "_blocks.3._depthwise_conv.weight": (144, 1, 5, 5),
                "_blocks.15._project_conv.weight": (320, 1152, 1, 1),
                "_bn1.running_var": (1280,),
            },
        ),
        (
            "efficientnet_lite1",
            {"_blocks.4._depthwise_conv.weight": (144, 1, 5, 5), "_blocks.20._bn2.weight": (320,)},
        ),
    ],
)
def test_names_and_shapes_are_the_published_ones(name: str, expected: dict[str, tuple[int, ...]]) -> None:
    state = BACKBONES[name](1.0).state_dict()
    for key, shape in expected.items():
        assert state[key].shape == shape


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_layers_to_a_stride_are_those_and_no_more(name: str, stride: int) -> None:
    backbone = BACKBONES[name](0.25).eval()
    layers = backbone.to_stride(stride)
    rest = [layer for layer in backbone.to_stride(64) if layer not in layers]
    x = torch.randn(1, 3, 64, 64)
    for layer in layers:
        x = layer(x)
    assert x.shape[-1] == 64 // stride
    assert rest[0](x).shape[-1] == 32 // stride
    # Together they are the whole backbone, each parameter once.
    owned = [parameter for layer in [*layers, *rest] for parameter in layer.parameters()]
    assert len(owned) == len(list(backbone.parameters()))
