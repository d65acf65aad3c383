"""Priors against the SSD paper's figures and a plain loop; box coding against its inverse."""

from __future__ import annotations

import math

import pytest
import torch

from edgekd.detectors.anchors import (
    PriorLayout,
    decode_boxes,
    encode_boxes,
    even_scales,
    xyxy_from_cxcywh,
)

SSD300 = PriorLayout(
    tuple((g, g) for g in (38, 19, 10, 5, 3, 1)),
    even_scales(0.2, 0.88, 6, half_level_first=True),
    ((2.0,), (2.0, 3.0), (2.0, 3.0), (2.0, 3.0), (2.0,), (2.0,)),
)
LITE300 = PriorLayout(
    tuple((g, g) for g in (19, 10, 5, 3, 2, 1)), even_scales(0.2, 0.95, 6, half_level_first=False), ((2.0, 3.0),) * 6
)


def test_scales_are_the_papers() -> None:
    # The min_size and max_size of the published SSD300 for VOC.
    pixels = [30, 60, 111, 162, 213, 264, 315]
    assert [scale * 300 for scale in SSD300.scales] == pytest.approx(pixels)
    assert LITE300.scales == pytest.approx((0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0))


def test_counts_are_the_published_ones() -> None:
    assert len(SSD300.priors((300, 300))) == 8732
    assert len(LITE300.priors((300, 300))) == 3000
    assert SSD300.priors_a_cell == (4, 6, 6, 6, 4, 4)


def test_priors_equal_a_plain_loop_on_a_rectangular_input() -> None:
    layout = PriorLayout(((3, 4), (2, 2)), (0.2, 0.5, 1.0), ((2.0, 3.0), (2.0,)))
    height, width = 120, 200
    wanted = []
    for level, (rows, columns) in enumerate(layout.grids_hw):
        s, following = layout.scales[level], layout.scales[level + 1]
        for y in range(rows):
            for x in range(columns):
                shapes = [(s, s), (math.sqrt(s * following),) * 2]
                for ratio in layout.aspect_ratios[level]:
                    shapes += [(s * ratio**0.5, s / ratio**0.5), (s / ratio**0.5, s * ratio**0.5)]
                for w, h in shapes:
                    wanted.append([(x + 0.5) / columns * width, (y + 0.5) / rows * height, w * width, h * height])
    priors = layout.priors((height, width))
    assert priors.dtype == torch.float32
    assert torch.allclose(priors, torch.tensor(wanted), atol=1e-4)


def test_decoding_inverts_encoding() -> None:
    generator = torch.Generator().manual_seed(0)
    priors = LITE300.priors((300, 300))
    corner = torch.rand(2, len(priors), 2, generator=generator) * 250
    boxes = torch.cat([corner, corner + 1 + torch.rand(2, len(priors), 2, generator=generator) * 200], dim=-1)
    assert torch.allclose(decode_boxes(encode_boxes(boxes, priors), priors), boxes, atol=2e-2)


def test_coding_equals_the_papers_formula() -> None:
    prior = torch.tensor([[100.0, 80.0, 40.0, 20.0]])
    box = torch.tensor([[90.0, 70.0, 130.0, 110.0]])  # centre 110, 90; 40 x 40
    wanted = [(110 - 100) / 40 / 0.1, (90 - 80) / 20 / 0.1, math.log(40 / 40) / 0.2, math.log(40 / 20) / 0.2]
    assert encode_boxes(box, prior)[0].tolist() == pytest.approx(wanted)


def test_a_prior_itself_has_zero_offsets() -> None:
    priors = LITE300.priors((300, 300))
    assert encode_boxes(xyxy_from_cxcywh(priors), priors).abs().max() < 1e-3


def test_coding_stays_finite_at_its_ends() -> None:
    priors = torch.tensor([[50.0, 50.0, 10.0, 10.0]])
    assert encode_boxes(torch.zeros(1, 4), priors).isfinite().all()
    assert decode_boxes(torch.full((1, 4), 1e4), priors).isfinite().all()
