"""Overlaps and losses against plain Python."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from edgekd.detectors.box_losses import (
    boxes_from_distances,
    distances_from_boxes,
    distribution_focal_loss,
    expected_distances,
    paired_iou,
    pairwise_iou,
    softened_bce,
)

Box = list[float]


def slow_overlap(a: Box, b: Box, kind: str) -> float:
    """One pair, as the papers write it."""
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    union = area_a + area_b - inter
    iou = inter / union
    hull_w, hull_h = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    if kind == "iou":
        return iou
    if kind == "giou":
        return iou - (hull_w * hull_h - union) / (hull_w * hull_h)
    rho2 = ((a[0] + a[2]) / 2 - (b[0] + b[2]) / 2) ** 2 + ((a[1] + a[3]) / 2 - (b[1] + b[3]) / 2) ** 2
    angle = math.atan((a[2] - a[0]) / (a[3] - a[1])) - math.atan((b[2] - b[0]) / (b[3] - b[1]))
    v = 4 / math.pi**2 * angle**2
    alpha = v / (1 - iou + v) if v else 0.0
    return iou - rho2 / (hull_w**2 + hull_h**2) - alpha * v


def random_boxes(count: int, seed: int) -> list[Box]:
    draw = random.Random(seed)
    corners = [(draw.uniform(0, 80), draw.uniform(0, 80)) for _ in range(count)]
    return [[x, y, x + draw.uniform(1, 60), y + draw.uniform(1, 60)] for x, y in corners]


@pytest.mark.parametrize("kind", ["iou", "giou", "ciou"])
def test_paired_iou_equals_the_formula(kind: str) -> None:
    first, second = random_boxes(40, 0), random_boxes(40, 1)
    second[0], second[1] = first[0], [200.0, 200.0, 210.0, 230.0]  # the same box; boxes far apart
    expected = torch.tensor([slow_overlap(a, b, kind) for a, b in zip(first, second, strict=True)])
    found = paired_iou(torch.tensor(first), torch.tensor(second), kind)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pairwise_iou_is_paired_iou_of_every_pair() -> None:
    first, second = torch.tensor(random_boxes(5, 2)).view(1, 5, 4), torch.tensor(random_boxes(7, 3)).view(1, 7, 4)
    matrix = pairwise_iou(first, second)
    assert matrix.shape == (1, 5, 7)
    torch.testing.assert_close(matrix, paired_iou(first.unsqueeze(2), second.unsqueeze(1)))


@pytest.mark.parametrize("kind", ["iou", "giou", "ciou"])
@pytest.mark.parametrize(
    ("box", "truth"),
    [
        ([10.0, 10.0, 10.0, 10.0], [10.0, 10.0, 20.0, 20.0]),  # a predicted point
        ([0.0, 0.0, 1e4, 1e-3], [5.0, 5.0, 6.0, 90.0]),  # extreme aspects
        ([10.0, 10.0, 20.0, 20.0], [10.0, 10.0, 20.0, 20.0]),  # perfect
    ],
)
def test_overlap_gradient_is_finite_for_awkward_boxes(kind: str, box: Box, truth: Box) -> None:
    predicted = torch.tensor(box, requires_grad=True)
    paired_iou(predicted, torch.tensor(truth), kind).backward()  # type: ignore[arg-type]
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()


def test_distances_and_boxes_are_inverse() -> None:
    boxes = torch.tensor(random_boxes(9, 4))
    centres = torch.rand(9, 2) * 50
    torch.testing.assert_close(boxes_from_distances(distances_from_boxes(boxes, centres), centres), boxes)


def slow_dfl(logits: list[list[float]], distances: list[float]) -> float:
    """One row: cross-entropy with the two neighbouring bins, mean over sides."""
    total = 0.0
    for side, distance in zip(logits, distances, strict=True):
        norm = math.log(sum(math.exp(v) for v in side))
        distance = min(max(distance, 0.0), len(side) - 1.0)
        low = min(int(distance), len(side) - 2)
        total -= (low + 1 - distance) * (side[low] - norm) + (distance - low) * (side[low + 1] - norm)
    return total / 4


def test_distribution_focal_loss_equals_the_formula() -> None:
    bins = 6
    logits = torch.randn(5, 4 * bins, generator=torch.Generator().manual_seed(0))
    distances = torch.tensor(
        [[0.0, 1.0, 2.5, 5.0], [4.999, 0.3, 3.0, 2.0], [-2.0, 9.0, 1.1, 4.0], [1, 1, 1, 1], [0.5, 1.5, 2.5, 3.5]]
    )
    expected = [slow_dfl(row.view(4, bins).tolist(), d.tolist()) for row, d in zip(logits, distances, strict=True)]
    torch.testing.assert_close(distribution_focal_loss(logits, distances, bins), torch.tensor(expected))


def test_the_distribution_that_minimises_the_loss_has_the_distance_as_its_mean() -> None:
    target = torch.tensor([[0.25, 1.5, 3.0, 4.75]])
    logits = torch.zeros(1, 24, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=60)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = distribution_focal_loss(logits, target, 6).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(expected_distances(logits.detach(), 6), target, atol=0.03, rtol=0)


def test_softened_bce_at_temperature_one_is_bce() -> None:
    logits, probs = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([0.0, 0.3, 1.0])
    expected = -(probs * logits.sigmoid().log() + (1 - probs) * (-logits).sigmoid().log())
    torch.testing.assert_close(softened_bce(logits, probs), expected)


@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_softened_bce_against_plain_arithmetic(temperature: float) -> None:
    for logit, prob in ((-2.0, 0.3), (0.5, 0.9), (3.0, 0.01)):
        soft = 1 / (1 + ((1 - prob) / prob) ** (1 / temperature))
        own = 1 / (1 + math.exp(-logit / temperature))
        expected = -temperature * temperature * (soft * math.log(own) + (1 - soft) * math.log(1 - own))
        got = softened_bce(torch.tensor(logit), torch.tensor(prob), temperature)
        assert float(got) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_softened_bce_is_least_where_the_probabilities_agree(temperature: float) -> None:
    probs = torch.tensor([0.05, 0.4, 0.9])
    logits = torch.logit(probs).requires_grad_()
    softened_bce(logits, probs, temperature).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros(3), atol=1e-5, rtol=0)
