"""The input tensor against the formula in the documentation of `PreprocessSpec`."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.preprocess import normalisation, normalise, prepare
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
