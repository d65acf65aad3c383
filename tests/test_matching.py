"""Prior matching and hard-negative mining against slow plain references."""

from __future__ import annotations

import pytest
import torch

from edgekd.detectors import matching
from edgekd.detectors.anchors import PriorLayout, even_scales, xyxy_from_cxcywh
from edgekd.detectors.assignment import PaddedTargets
from edgekd.detectors.matching import hard_negatives, match_priors

LAYOUT = PriorLayout(((6, 6), (3, 3), (1, 1)), even_scales(0.15, 0.9, 3, half_level_first=False), ((2.0, 3.0),) * 3)
PRIORS = xyxy_from_cxcywh(LAYOUT.priors((96, 96)))


def iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0.0) * max(h, 0.0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter + 1e-7)


def reference_match(
    priors: list[list[float]], boxes: list[list[float]], confidence: list[float], min_iou: float
) -> list[int | None]:
    """For each prior the box it learns."""
    alive = [index for index, value in enumerate(confidence) if value > 0]
    overlaps = {index: [iou(boxes[index], prior) for prior in priors] for index in alive}
    best = {}
    for index in alive:
        x1, y1, x2, y2 = boxes[index]
        ranked = [
            overlaps[index][p] - 1e-5 * (abs(x1 + x2 - prior[0] - prior[2]) + abs(y1 + y2 - prior[1] - prior[3])) / 2
            for p, prior in enumerate(priors)
        ]
        best[index] = ranked.index(max(ranked))
    out: list[int | None] = []
    for prior in range(len(priors)):
        claims = []
        for index in alive:
            overlap = overlaps[index][prior]
            if best[index] == prior and overlap > 0:
                claims.append(((overlap + 2) * confidence[index], index))
            elif overlap >= min_iou:
                claims.append((overlap * confidence[index], index))
        out.append(max(claims)[1] if claims else None)
    return out


def random_targets(seed: int, images: int, boxes: int, *, soft: bool) -> PaddedTargets:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, boxes, 2, generator=generator) * 70
    size = 4 + torch.rand(images, boxes, 2, generator=generator) * 60
    confidence = torch.rand(images, boxes, generator=generator) if soft else torch.ones(images, boxes)
    confidence[0] = 0  # an image without objects
    confidence[-1, boxes // 2 :] = 0  # padding
    return PaddedTargets(torch.cat([corner, corner + size], -1), torch.zeros(images, boxes, 3), confidence)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_matching_equals_the_reference(seed: int, soft: bool) -> None:
    # Doubles, as in the reference, so that rounding decides nothing.
    drawn = random_targets(seed, 4, 7, soft=soft)
    targets = PaddedTargets(drawn.boxes_xyxy.double(), drawn.class_probs, drawn.confidence.double())
    match = match_priors(PRIORS.double(), targets)
    assert match.positive.shape == match.box.shape == (4, len(PRIORS))
    for image in range(4):
        wanted = reference_match(
            PRIORS.tolist(), targets.boxes_xyxy[image].tolist(), targets.confidence[image].tolist(), 0.5
        )
        found = [int(b) if p else None for p, b in zip(match.positive[image], match.box[image], strict=True)]
        assert found == wanted
    assert not match.positive[0].any()


def test_a_prior_of_exactly_the_least_iou_learns_the_box() -> None:
    priors = torch.tensor([[0.0, 0, 16, 16], [0, 0, 16, 8], [0, 0, 16, 7]])
    match = match_priors(
        priors, PaddedTargets(torch.tensor([[[0.0, 0, 16, 16]]]), torch.ones(1, 1, 1), torch.ones(1, 1))
    )
    assert match.positive.tolist() == [[True, True, False]]


def test_every_box_has_a_prior_however_small() -> None:
    boxes = torch.tensor([[[10.0, 10.0, 11.0, 11.0], [0.0, 0.0, 96.0, 2.0], [40.0, 40.0, 60.0, 60.0]]])
    match = match_priors(PRIORS, PaddedTargets(boxes, torch.ones(1, 3, 1), torch.ones(1, 3)))
    assert set(match.box[match.positive].tolist()) == {0, 1, 2}


def test_a_small_box_takes_the_nearest_of_the_priors_that_contain_it() -> None:
    # Four of the coarse level's squares contain each of these; IoU alone cannot tell them apart.
    layout = PriorLayout(((6, 6),), (0.6, 0.6), ((),))
    priors = layout.priors((96, 96))
    for x, y in ((37.0, 43.0), (43.0, 37.0), (58.0, 54.0), (54.0, 58.0)):
        box = torch.tensor([[[x - 2, y - 2, x + 2, y + 2]]])
        match = match_priors(xyxy_from_cxcywh(priors), PaddedTargets(box, torch.ones(1, 1, 1), torch.ones(1, 1)))
        nearest = (priors[:, :2] - torch.tensor([x, y])).abs().sum(1).min()
        taken = priors[match.positive[0], :2]
        assert len(taken) == 1
        assert (taken[0] - torch.tensor([x, y])).abs().sum() == pytest.approx(float(nearest))


def test_a_box_outside_of_every_prior_takes_none() -> None:
    far = torch.tensor([[[5000.0, 5000.0, 5010.0, 5010.0]]])
    assert not match_priors(PRIORS, PaddedTargets(far, torch.ones(1, 1, 1), torch.ones(1, 1))).positive.any()


def test_an_unsure_box_does_not_steal_a_sure_ones_prior() -> None:
    sure, unsure = PRIORS[40], PRIORS[40] + torch.tensor([0.0, 0.0, 1.0, 1.0])
    boxes = torch.stack([sure + torch.tensor([0.0, 0.0, 2.0, 2.0]), unsure]).unsqueeze(0)
    match = match_priors(PRIORS, PaddedTargets(boxes, torch.ones(1, 2, 1), torch.tensor([[0.9, 0.06]])))
    assert match.box[0, 40] == 0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = random_targets(9, 5, 6, soft=True)
    whole = match_priors(PRIORS, targets)
    monkeypatch.setattr(matching, "_MAX_OVERLAPS", 2 * 6 * len(PRIORS))
    parts = match_priors(PRIORS, targets)
    assert torch.equal(whole.positive, parts.positive)
    assert torch.equal(whole.box, parts.box)


@pytest.mark.parametrize("seed", range(3))
def test_mining_equals_the_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(3, 50, generator=generator)
    positive = torch.rand(3, 50, generator=generator) < 0.2
    count = torch.tensor([0, 7, 500])
    mined = hard_negatives(loss, positive, count)
    for image in range(3):
        background = [p for p in range(50) if not positive[image, p]]
        hardest = sorted(background, key=lambda p: -float(loss[image, p]))[: int(count[image])]
        assert mined[image].nonzero().flatten().tolist() == sorted(hardest)


def test_mining_takes_no_more_than_asked_among_equals() -> None:
    mined = hard_negatives(torch.ones(2, 30), torch.zeros(2, 30, dtype=torch.bool), torch.tensor([4, 9]))
    assert mined.sum(1).tolist() == [4, 9]
