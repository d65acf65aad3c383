"""The input tensor against the formula in the documentation of `PreprocessSpec`."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.device import golden
from edgekd.preprocess import normalisation, normalise, prepare, resize
from edgekd.types import PreprocessSpec

SIZES = [(1, 1), (1, 7), (5, 1), (33, 47), (320, 320)]


def picture(hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


@pytest.mark.parametrize("hw", SIZES)
@pytest.mark.parametrize("view", ["whole", "mirrored", "every other column", "a window"])
def test_normalise_is_one_multiply_add_to_the_bit(hw: tuple[int, int], view: str) -> None:
    height, width = hw
    image = {
        "whole": picture(hw),
        "mirrored": picture(hw)[:, ::-1],
        "every other column": picture((height, 2 * width))[:, ::2],
        "a window": picture((height + 4, width + 4))[2:-2, 2:-2],
    }[view]
    spec = PreprocessSpec(hw)
    scale, bias = normalisation(spec)
    wanted = image.transpose(2, 0, 1).astype(np.float32) * scale + bias
    found = normalise(image, spec)
    assert found.shape == (1, 3, *hw)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.array_equal(found[0], wanted)


def test_normalise_is_what_the_spec_says() -> None:
    spec, image = PreprocessSpec((9, 11)), picture((9, 11))
    wanted = ((image / 255.0 - np.array(spec.mean)) / np.array(spec.std)).transpose(2, 0, 1)
    assert np.allclose(normalise(image, spec)[0], wanted, atol=1e-6)


def test_tensors_do_not_share_memory() -> None:
    spec = PreprocessSpec((32, 32))
    first, _ = prepare(picture((40, 50)), spec)
    before = first.copy()
    prepare(picture((40, 50), seed=1), spec)
    assert np.array_equal(first, before)


def test_bgr_is_fed_in_that_order_with_mean_and_std_in_it_too() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    spec, image = PreprocessSpec((9, 11), mean=mean, std=std, channels="bgr"), picture((9, 11))
    wanted = ((image[..., ::-1] / 255.0 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    assert np.allclose(normalise(image, spec)[0], wanted, atol=1e-6)
    assert np.allclose(golden.normalise(image, spec.to_dict())[0], wanted, atol=1e-6)  # as a bundle does it
    assert PreprocessSpec.from_dict(spec.to_dict()) == spec
    before = {key: value for key, value in PreprocessSpec((9, 11)).to_dict().items() if key != "channels"}
    assert PreprocessSpec.from_dict(before) == PreprocessSpec((9, 11))


@pytest.mark.parametrize("hw", [(20, 40), (40, 20), (33, 47)])
def test_a_letterbox_in_the_corner(hw: tuple[int, int]) -> None:
    image = picture(hw)
    centred, place = resize(image, PreprocessSpec((64, 64), "letterbox"))
    cornered, geometry = resize(image, PreprocessSpec((64, 64), "letterbox-corner"))
    assert (geometry.shift_x, geometry.shift_y) == (0, 0)
    assert (geometry.scale_x, geometry.scale_y) == (place.scale_x, place.scale_y)
    top, left = int(place.shift_y), int(place.shift_x)
    assert np.array_equal(np.roll(cornered, (top, left), (0, 1)), centred)
    boxes = np.array([[1, 2, 15, 18]], np.float32)
    assert np.allclose(geometry.to_source(geometry.to_input(boxes)), boxes, atol=1e-4)
