"""The registry: names, specs with their defaults written out, and errors that list the choices."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgekd.detectors import DETECTORS, build_detector, spec_for
from edgekd.errors import RecipeError
from edgekd.recipe import ModelConfig
from edgekd.types import DetectorSpec

CLASSES = ("cat", "dog")
SSDS = [name for name in DETECTORS if name.endswith(("-ssd", "-ssd-lite"))]


@pytest.mark.parametrize("model", DETECTORS)
def test_spec_round_trips_through_plain_types_and_builds(model: str) -> None:
    spec = spec_for(ModelConfig(model=model, input_size=96, width=0.25), CLASSES)
    assert DetectorSpec.from_dict(spec.to_dict()) == spec
    detector = build_detector(spec)
    assert detector.spec == spec
    assert detector.prior_boxes().shape[1] == 4


@pytest.mark.parametrize("model", SSDS)
def test_spec_has_every_option_written_out(model: str) -> None:
    spec = spec_for(ModelConfig(model=model, options={"min_scale": 0.08}), CLASSES)
    assert set(spec.options) == {"min_scale", "max_scale", "aspect_ratios", "match_iou", "priors", "finest_stride"}
    assert spec.options["min_scale"] == 0.08
    assert spec.preprocess.resize == "stretch"
    assert spec.preprocess.input_hw == (320, 320)


@pytest.mark.parametrize(
    ("model", "size", "min_scale"),
    [
        ("mobilenetv2-ssd-lite", 96, 0.3333),
        ("mobilenetv2-ssd-lite", 64, 0.35),
        ("mobilenetv2-ssd-lite", 320, 0.1),
        ("mobilenetv2-ssd-lite", 1280, 0.05),
        ("vgg16-ssd", 96, 0.3333),
        ("vgg16-ssd", 300, 0.2),
    ],
)
def test_the_finest_priors_span_two_cells(model: str, size: int, min_scale: float) -> None:
    assert spec_for(ModelConfig(model=model, input_size=size), CLASSES).options["min_scale"] == min_scale


def test_efficientnet_lite_takes_its_own_normalisation() -> None:
    spec = spec_for(ModelConfig(model="efficientnet-lite0-ssd-lite"), CLASSES)
    assert spec.preprocess.mean == pytest.approx((127 / 255,) * 3)
    assert spec.preprocess.std == pytest.approx((128 / 255,) * 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "mobilenetv2-ssdlite"}, "did you mean 'mobilenetv2-ssd-lite'"),
        ({"model": "mobilenetv2-ssd-lite", "options": {"min_scal": 0.1}}, "did you mean 'min_scale'"),
        ({"model": "mobilenetv2-ssd-lite", "options": {"min_scale": "small"}}, "'small'"),
        ({"model": "mobilenetv2-ssd-lite", "options": {"min_scale": float("nan")}}, "nan"),
        ({"model": "mobilenetv2-ssd-lite", "options": {"min_scale": True}}, "True"),
        ({"model": "mobilenetv2-ssd-lite", "options": {"min_scale": 0.9, "max_scale": 0.5}}, "larger than max_scale"),
        ({"model": "mobilenetv2-ssd-lite", "options": {"aspect_ratios": 2}}, "must be a list"),
        ({"model": "mobilenetv2-ssd-lite", "options": {"aspect_ratios": []}}, "must be a list"),
        ({"model": "mobilenetv2-ssd-lite", "options": {"aspect_ratios": [1, 2]}}, "above 1"),
        ({"model": "mobilenetv2-ssd-lite", "options": {"aspect_ratios": [2, 2]}}, "repeat"),
        ({"model": "vgg16-ssd", "width": 0.1}, "0.25 to 1.4"),
        ({"model": "mobilenetv2-ssd-lite", "width": 1.5}, "0.25 to 1.4"),
    ],
)
def test_bad_model_settings_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        spec_for(ModelConfig(**config), CLASSES)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_no_classes_is_an_error() -> None:
    with pytest.raises(RecipeError, match="at least one class"):
        spec_for(ModelConfig(model="mobilenetv2-ssd-lite"), ())


def test_naming_detectors_needs_no_torch() -> None:
    code = (
        "import sys; from edgekd.detectors import spec_for; from edgekd.recipe import ModelConfig;"
        "spec_for(ModelConfig(model='mobilenetv2-ssd-lite'), ('a',)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
