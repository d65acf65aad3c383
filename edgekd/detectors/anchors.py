"""SSD's priors and its box coding (Liu et al., 2016, arXiv 1512.02325, sections 2.2 and 2.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CENTRE_VARIANCE, SIZE_VARIANCE = 0.1, 0.2
"""Offsets are divided by these, which brings them to about unit variance; they are in SSD's code, not in its paper."""

_MAX_LOG_SIZE = math.log(1000 / 16)
"""Largest log-ratio of a decoded box to its prior, so that an untrained head cannot overflow exp."""


@dataclass(frozen=True)
class PriorLayout:
    """Which priors a level has in each of its cells. Rows run over levels (fine to coarse), then y, x, and a cell's priors.

    Attributes:
        grids_hw: cells of each level.
        scales: side of the square prior of each level, as a share of the input's, and one more behind the last.
        aspect_ratios: for each level, those besides 1; each is used upright too.
        shapes_wh: for each level its shapes themselves, as shares of the input's sides, in the place of those that scales
            and aspect ratios make; as many.
    """

    grids_hw: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    aspect_ratios: tuple[tuple[float, ...], ...]
    shapes_wh: tuple[tuple[tuple[float, float], ...], ...] | None = None

    @property
    def priors_a_cell(self) -> tuple[int, ...]:
        """For each level: the square, the larger square, and two for each aspect ratio."""
        return tuple(2 + 2 * len(ratios) for ratios in self.aspect_ratios)

    def cell_shapes_wh(self, level: int) -> list[tuple[float, float]]:
        """(w, h) of a cell's priors as shares of the input's sides.

        The second square has the geometric mean of this level's scale and the next one's.
        """
        if self.shapes_wh is not None:
            return list(self.shapes_wh[level])
        scale, following = self.scales[level], self.scales[level + 1]
        between = math.sqrt(scale * following)
        shapes = [(scale, scale), (between, between)]
        for ratio in self.aspect_ratios[level]:
            root = math.sqrt(ratio)
            shapes += [(scale * root, scale / root), (scale / root, scale * root)]
        return shapes

    def priors(self, input_hw: tuple[int, int]) -> Tensor:
        """(P, 4) float32 cxcywh in input pixels; centres at (i + 0.5) / grid, sizes not clipped to the image."""
        levels = []
        for level, (rows, columns) in enumerate(self.grids_hw):
            cy = (torch.arange(rows, dtype=torch.float64, device="cpu") + 0.5) / rows
            cx = (torch.arange(columns, dtype=torch.float64, device="cpu") + 0.5) / columns
            shapes = torch.tensor(self.cell_shapes_wh(level), dtype=torch.float64, device="cpu")
            y, x = torch.meshgrid(cy, cx, indexing="ij")
            centres = torch.stack([x, y], dim=-1).reshape(-1, 1, 2).expand(-1, len(shapes), 2)
            sizes = shapes.expand(rows * columns, -1, 2)
            levels.append(torch.cat([centres, sizes], dim=-1).reshape(-1, 4))
        height, width = input_hw
        sides = torch.tensor([width, height, width, height], dtype=torch.float64, device="cpu")
        return (torch.cat(levels) * sides).float()


def even_scales(min_scale: float, max_scale: float, levels: int, half_level_first: bool) -> tuple[float, ...]:
    """`levels` + 1 prior scales for `PriorLayout.scales`.

    SSD-lite: evenly from `min_scale` to `max_scale`, then 1. SSD (`half_level_first`): half of `min_scale`, evenly from
    `min_scale` to `max_scale`, and one step more; with 0.2 and 0.88 these are 0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05:
    the paper's 30, 60, 111, ... 315 pixels at 300.
    """
    spaced = levels - 1 if half_level_first else levels
    step = (max_scale - min_scale) / (spaced - 1)
    even = [min_scale + step * index for index in range(spaced)]
    if half_level_first:
        return (min_scale / 2, *even, max_scale + step)
    return (*even, max(1.0, max_scale))


def xyxy_from_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) centres and sizes to corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def encode_boxes(boxes_xyxy: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """SSD's offsets of boxes from their priors: (..., P, 4) and (P, 4), both in pixels, to (..., P, 4)."""
    # A box without extent (padding) must not become minus infinity, which no mask of zeros removes.
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=1e-3)
    centre = (boxes_xyxy[..., 2:] + boxes_xyxy[..., :2]) / 2
    prior_centre, prior_size = priors_cxcywh[..., :2], priors_cxcywh[..., 2:]
    return torch.cat(
        [(centre - prior_centre) / (prior_size * CENTRE_VARIANCE), (size / prior_size).log() / SIZE_VARIANCE], dim=-1
    )


def decode_boxes(offsets: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """Inverse of `encode_boxes`: (..., P, 4) offsets to (..., P, 4) xyxy pixels, not clipped to the image."""
    prior_centre, prior_size = priors_cxcywh[..., :2], priors_cxcywh[..., 2:]
    centre = prior_centre + offsets[..., :2] * (prior_size * CENTRE_VARIANCE)
    half = (offsets[..., 2:] * SIZE_VARIANCE).clamp(max=_MAX_LOG_SIZE).exp() * (prior_size / 2)
    return torch.cat([centre - half, centre + half], dim=-1)
