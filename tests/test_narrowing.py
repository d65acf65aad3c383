"""A backbone of width 1 cut to a narrower one's shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.base import Detector
from edgekd.detectors.narrowing import evenly_spaced, narrowed
from edgekd.detectors.weights import load_backbone_weights
from edgekd.errors import RecipeError, WeightsError
from edgekd.recipe import ModelConfig
from edgekd.training.setup import frozen_layers, initial_detector

LITE = "mobilenetv2-ssd-lite"
MODELS = (LITE, "mobilenetv1-ssd-lite", "efficientnet-lite0-ssd-lite", "yolov3", "yolo-nano")


def build(model: str = LITE, width: float = 1.0, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return build_detector(spec_for(ModelConfig(model=model, input_size=96, width=width), ("a", "b")))


def backbone(detector: Detector) -> nn.Module:
    found = detector.backbone
    assert isinstance(found, nn.Module)
    return found


def saved(detector: Detector, path: Path) -> str:
    torch.save(backbone(detector).state_dict(), path)
    return str(path)


def test_channels_are_evenly_spaced() -> None:
    assert evenly_spaced(8, 4).tolist() == [0, 2, 4, 6]
    assert evenly_spaced(32, 12).tolist() == [0, 2, 5, 8, 10, 13, 16, 18, 21, 24, 26, 29]
    assert evenly_spaced(5, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("width", [0.35, 0.75])
def test_every_tensor_takes_the_narrow_shape_and_comes_from_the_wide_one(
    model: str, width: float, tmp_path: Path
) -> None:
    wide, narrow = build(model, seed=1), build(model, width)
    loaded = load_backbone_weights(narrow, saved(wide, tmp_path / "wide.pth"))
    assert loaded.narrowed
    assert loaded.left_initialised == ()
    given = backbone(wide).state_dict()
    for name, value in backbone(narrow).state_dict().items():
        assert torch.isin(value, given[name]).all(), name


def test_layers_that_meet_keep_the_same_channels() -> None:
    """Where the channels to go are silent, the narrow network gives the wide one's maps: across a depthwise convolution, its
    batch norm, and a shortcut."""
    torch.manual_seed(0)
    wide, narrow = _Block(8).eval(), _Block(4).eval()
    with torch.no_grad():
        for convolution in (wide.expand, wide.project):  # of eight channels the even ones stay
            convolution.weight[:, 1::2] = 0
    narrow.load_state_dict(narrowed(wide.state_dict(), {k: v.shape for k, v in narrow.state_dict().items()}))
    images = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(narrow(images[:, ::2]), wide(images)[:, ::2])


class _Block(nn.Module):
    """An inverted residual without expansion."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, channels, 1, bias=False)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = x + self.project(self.norm(self.depthwise(self.expand(x))).relu())
        return maps


def test_a_cut_backbone_learns_at_the_full_rate_and_is_not_frozen(tmp_path: Path) -> None:
    wide, narrow = (build(width=width).spec for width in (1.0, 0.5))
    config = ModelConfig(model=LITE, input_size=96, weights=saved(build(seed=1), tmp_path / "w.pth"))
    assert initial_detector(config, wide)[1]
    detector, pretrained = initial_detector(config.model_copy(update={"width": 0.5}), narrow)
    assert not pretrained
    with pytest.raises(RecipeError, match="at the width they were made for"):
        frozen_layers(detector, 4, pretrained=pretrained)


def test_weights_of_the_same_width_are_left_as_they_are(tmp_path: Path) -> None:
    wide, same = build(seed=1), build()
    assert not load_backbone_weights(same, saved(wide, tmp_path / "w.pth")).narrowed
    for name, value in backbone(wide).state_dict().items():
        assert torch.equal(backbone(same).state_dict()[name], value), name


def test_a_wider_backbone_cannot_be_cut_from_a_narrow_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="do not fit"):
        load_backbone_weights(build(width=0.75), saved(build(width=0.5), tmp_path / "w.pth"))


def test_width_1_takes_nothing_larger(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="do not fit"):
        load_backbone_weights(build(width=1.0), saved(build(width=1.4), tmp_path / "w.pth"))


def test_vgg_without_batch_norm_is_not_cut(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"width 1\.0 only"):
        load_backbone_weights(build("vgg11-ssd", 0.25), saved(build("vgg11-ssd", 0.5), tmp_path / "w.pth"))
    with pytest.raises(WeightsError, match=r"width 1\.0 only"):
        load_backbone_weights(build("vgg11-ssd", 0.25), "imagenet")


def test_the_official_mobilenet_v2_is_cut_by_name(mobilenet_v2_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_WEIGHTS", str(mobilenet_v2_weights.parent))
    detector = build(width=0.5)
    assert load_backbone_weights(detector, "imagenet").narrowed
    with torch.no_grad():
        assert all(m.isfinite().all() for m in backbone(detector)(torch.rand(2, 3, 96, 96)).sources)
    with pytest.raises(WeightsError, match=r"width 1\.0, and can be cut to less"):
        load_backbone_weights(build(width=1.4), "imagenet")
