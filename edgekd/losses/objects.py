"""Arithmetic on objects that several methods share: which cells lie in a box, a box's pooled features, how well a detector
sees an object. Plain tensors, any architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgekd.detectors.box_losses import pairwise_iou


def cell_overlaps(boxes_xyxy: Tensor, grid_hw: tuple[int, int], input_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How much of each grid row and column a box covers, in cells: (N, H) and (N, W), each in [0, 1]."""

    def along(low: Tensor, high: Tensor, cells: int, size: int) -> Tensor:
        edges = torch.arange(cells + 1, device=low.device, dtype=low.dtype) * (size / cells)
        covered = torch.minimum(high[:, None], edges[None, 1:]) - torch.maximum(low[:, None], edges[None, :-1])
        return covered.clamp(min=0) * (cells / size)

    return (
        along(boxes_xyxy[:, 1], boxes_xyxy[:, 3], grid_hw[0], input_hw[0]),
        along(boxes_xyxy[:, 0], boxes_xyxy[:, 2], grid_hw[1], input_hw[1]),
    )


def pool_boxes(features: Tensor, boxes_xyxy: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """Mean of a (C, H, W) map over each of (N, 4) boxes, cells weighted by how much of them is covered: (N, C)."""
    rows, columns = cell_overlaps(boxes_xyxy.to(features.dtype), (features.shape[1], features.shape[2]), input_hw)
    area = rows.sum(1) * columns.sum(1)
    pooled = torch.einsum("nh,chw,nw->nc", rows, features, columns)
    return pooled / area.clamp(min=1e-6)[:, None]


def cells_of(points: Tensor, grid_hw: tuple[int, int], input_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(row (N,), column (N,)) int64 of the cells that hold (N, 2) xy pixels, or are nearest to them."""
    x = (points[:, 0] * grid_hw[1] / input_hw[1]).long().clamp(0, grid_hw[1] - 1)
    y = (points[:, 1] * grid_hw[0] / input_hw[0]).long().clamp(0, grid_hw[0] - 1)
    return y, x


def object_maps(boxes: Sequence[Tensor], grid_hw: tuple[int, int], input_hw: tuple[int, int]) -> Tensor:
    """(B, H, W) int64: for each cell the index of its image's smallest box that covers at least half a cell of it, -1 for none.

    A box too small to cover half of any cell takes the cell of its centre, so that no object is lost on a coarse grid. All
    images together, since one by one most of the time is torch's own.
    """
    flat = torch.cat(list(boxes))
    rows, columns = cell_overlaps(flat, grid_hw, input_hw)
    covered = rows[:, :, None] * columns[:, None, :] >= 0.5
    y, x = cells_of((flat[:, :2] + flat[:, 2:]) / 2, grid_hw, input_hw)
    covered[torch.arange(len(flat), device=flat.device), y, x] = True
    areas = (flat[:, 2:] - flat[:, :2]).prod(-1)
    owners = torch.full((len(boxes), *grid_hw), -1, dtype=torch.int64, device=flat.device)
    counts = [len(b) for b in boxes]
    for owner, own, area in zip(owners, torch.split(covered, counts), torch.split(areas, counts), strict=True):
        if len(area):
            by_size = area.argsort(descending=True)
            smallest = torch.arange(len(area), device=flat.device)[:, None, None].where(own[by_size], -1).amax(0)
            owner.copy_(by_size[smallest].masked_fill(smallest < 0, -1))
    return owners


def object_shares(owner: Tensor) -> Tensor:
    """(B, H, W) of `object_maps` to (B, H, W) float32: one over the number of its object's cells, 0 in the background."""
    shares = torch.zeros(owner.shape, device=owner.device)
    for image, owners in zip(shares, owner, strict=True):
        inside = owners >= 0
        cells = torch.bincount(owners[inside])
        image[inside] = 1.0 / cells[owners[inside]]
    return shares


def cell_shares(cells: Tensor) -> Tensor:
    """(B, H, W) bool to (B, H, W) float32: one over the number of cells of its image that are true, 0 in the others."""
    return cells / cells.sum((1, 2), keepdim=True).clamp(min=1)


def object_quality(boxes: Tensor, scores: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> tuple[Tensor, Tensor]:
    """How well a detector sees each object: max over its rows of score[label] * IoU, and the row that gives it.

    Args:
        boxes: (P, 4) xyxy. scores: (P, K) in [0, 1]. gt_boxes: (N, 4). gt_labels: (N,).

    Returns:
        quality (N,) in [0, 1] and row (N,) int64; 0 and -1 where no row overlaps the object.
    """
    count = len(gt_boxes)
    if not len(boxes) or not count:
        return gt_boxes.new_zeros(count), gt_labels.new_full((count,), -1)
    value = pairwise_iou(boxes, gt_boxes) * scores[:, gt_labels]
    quality, row = value.max(0)
    return quality, row.masked_fill(quality <= 0, -1)
