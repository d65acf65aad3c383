"""SSD's hard and soft losses against plain loops over images and priors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edgekd.detectors import spec_for
from edgekd.detectors.anchors import PriorLayout, encode_boxes, even_scales, xyxy_from_cxcywh
from edgekd.detectors.assignment import PaddedTargets, pad_soft_targets, pad_targets
from edgekd.detectors.base import SoftTargets, Targets
from edgekd.detectors.matching import match_priors
from edgekd.detectors.ssd import SSD
from edgekd.detectors.ssd_losses import (
    MIN_CONFIDENCE,
    background_and_classes,
    confident,
    multibox_losses,
    soft_multibox_losses,
)
from edgekd.recipe import ModelConfig

CLASSES = 3
PRIORS = PriorLayout(((5, 5), (2, 2)), even_scales(0.2, 0.8, 2, half_level_first=False), ((2.0,),) * 2).priors((80, 80))
CPU = torch.device("cpu")


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(sum(math.exp(v - top) for v in row)) + top
    return [v - total for v in row]


def smooth_l1(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def outputs(seed: int, images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, len(PRIORS), CLASSES + 1, generator=generator) * 2
    return logits.requires_grad_(), torch.randn(images, len(PRIORS), 4, generator=generator).requires_grad_()


def boxes(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 50
    return torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 30], -1)


def box_sum(offsets: Tensor, box: Tensor, prior: int) -> float:
    wanted = encode_boxes(box.unsqueeze(0), PRIORS[prior : prior + 1])[0]
    return sum(smooth_l1(float(a - b)) for a, b in zip(offsets, wanted, strict=True))


def reference_losses(logits: Tensor, offsets: Tensor, targets: Targets, min_iou: float = 0.5) -> tuple[float, float]:
    padded = pad_targets(targets, CLASSES, CPU)
    match = match_priors(xyxy_from_cxcywh(PRIORS), padded, min_iou)
    cls_sum = box_total = 0.0
    count = 0
    for image in range(len(logits)):
        rows = [log_softmax(row) for row in logits[image].tolist()]
        positives = match.positive[image].nonzero().flatten().tolist()
        for prior in positives:
            which = int(match.box[image, prior])
            cls_sum -= rows[prior][int(targets.labels[image][which]) + 1]
            box_total += box_sum(offsets[image, prior], targets.boxes_xyxy[image][which], prior)
        background = sorted((-rows[p][0] for p in range(len(rows)) if p not in positives), reverse=True)
        counted = max(1, len(positives))
        cls_sum += sum(background[: 3 * counted])
        count += counted
    return cls_sum / count, box_total / count


@pytest.mark.parametrize("counts", [(2, 0, 5), (0, 0), (3,)])
def test_losses_equal_the_reference(counts: tuple[int, ...]) -> None:
    logits, offsets = outputs(1, len(counts))
    targets = Targets([boxes(i, n) for i, n in enumerate(counts)], [torch.arange(n) % CLASSES for n in counts])
    losses = multibox_losses(logits, offsets, PRIORS, pad_targets(targets, CLASSES, CPU))
    wanted = reference_losses(logits.detach(), offsets.detach(), targets)
    assert (losses["cls"].item(), losses["box"].item()) == pytest.approx(wanted, rel=1e-4)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert offsets.grad is not None
    assert offsets.grad.isfinite().all()


def test_a_lower_match_iou_reaches_the_losses() -> None:
    logits, offsets = outputs(1, 2)
    targets = Targets([boxes(i, 3) for i in range(2)], [torch.arange(3) % CLASSES] * 2)
    losses = multibox_losses(logits, offsets, PRIORS, pad_targets(targets, CLASSES, CPU), 0.3)
    wanted = reference_losses(logits.detach(), offsets.detach(), targets, 0.3)
    assert (losses["cls"].item(), losses["box"].item()) == pytest.approx(wanted, rel=1e-4)
    assert wanted != pytest.approx(reference_losses(logits.detach(), offsets.detach(), targets), rel=1e-3)


@pytest.mark.parametrize("match_iou", [0.3, 0.7])
def test_the_recipe_sets_the_match_iou(match_iou: float) -> None:
    config = ModelConfig(model="mobilenetv2-ssd-lite", input_size=96, width=0.25, options={"match_iou": match_iou})
    detector = SSD(spec_for(config, "abc")).eval()
    output = detector(torch.zeros(1, 3, 96, 96))
    targets = Targets([torch.tensor([[10.0, 10.0, 50.0, 40.0]])], [torch.tensor([1])])
    padded = pad_targets(targets, 3, CPU)
    wanted = multibox_losses(output.cls_logits, output.bbox_regression, detector.prior_boxes(), padded, match_iou)
    other = multibox_losses(output.cls_logits, output.bbox_regression, detector.prior_boxes(), padded, 1 - match_iou)
    losses = detector.detection_losses(output, targets)
    assert losses["box"] == wanted["box"]
    assert losses["box"] != other["box"]


def soft_target(counts: tuple[int, ...]) -> SoftTargets:
    generator = torch.Generator().manual_seed(5)
    probs = [torch.rand(n, CLASSES, generator=generator) ** 2 for n in counts]
    for value in probs:
        if len(value) > 1:
            value[0] = torch.tensor([1.0, 0.0, 0.0])  # wholly sure
            value[1] *= 0.04  # under the threshold
    return SoftTargets([boxes(20 + i, n) for i, n in enumerate(counts)], probs)


def reference_soft(logits: Tensor, offsets: Tensor, soft: PaddedTargets, temperature: float) -> tuple[float, float]:
    match = match_priors(xyxy_from_cxcywh(PRIORS), soft)
    cls_sum = box_total = evidence_total = 0.0
    for image in range(len(logits)):
        evidence, negatives = 0.0, []
        for prior, row in enumerate(logits[image].tolist()):
            if not match.positive[image, prior]:
                negatives.append(-log_softmax(row)[0])
                continue
            which = int(match.box[image, prior])
            probs = soft.class_probs[image, which].tolist()
            top, total = max(probs), sum(probs)
            target = [1 - top] + [p * top / total for p in probs]
            target = [t ** (1 / temperature) for t in target]
            target = [t / sum(target) for t in target]
            student = log_softmax([v / temperature for v in row])
            pairs = zip(target, student, strict=True)
            cls_sum += temperature**2 * sum(t * (math.log(t) - s) for t, s in pairs if t > 0)
            box_total += top * box_sum(offsets[image, prior], soft.boxes_xyxy[image, which], prior)
            evidence += top
        evidence = max(1.0, evidence)
        cls_sum += sum(sorted(negatives, reverse=True)[: math.ceil(3 * evidence - 1e-6)])
        evidence_total += evidence
    return cls_sum / evidence_total, box_total / evidence_total


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("counts", [(4, 0, 6), (0, 0)])
def test_soft_losses_equal_the_reference(counts: tuple[int, ...], temperature: float) -> None:
    logits, offsets = outputs(2, len(counts))
    padded = pad_soft_targets(confident(soft_target(counts)), CLASSES, CPU)
    losses = soft_multibox_losses(logits, offsets, PRIORS, padded, temperature)
    wanted = reference_soft(logits.detach(), offsets.detach(), padded, temperature)
    assert (losses["cls"].item(), losses["box"].item()) == pytest.approx(wanted, rel=1e-4)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for leaf in (logits, offsets):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_unsure_boxes_teach_nothing() -> None:
    soft = confident(soft_target((4, 0, 1)))
    assert [len(b) for b in soft.boxes_xyxy] == [3, 0, 1]
    assert all((p.amax(-1) >= MIN_CONFIDENCE).all() for p in soft.class_probs)


def test_sure_soft_targets_equal_ground_truth() -> None:
    logits, offsets = outputs(3, 2)
    where, labels = [boxes(0, 3), boxes(1, 2)], [torch.tensor([0, 1, 2]), torch.tensor([2, 0])]
    hard = multibox_losses(logits, offsets, PRIORS, pad_targets(Targets(where, labels), CLASSES, CPU))
    probs = [torch.eye(CLASSES)[v] for v in labels]
    soft = soft_multibox_losses(logits, offsets, PRIORS, pad_soft_targets(SoftTargets(where, probs), CLASSES, CPU), 1.0)
    for name in ("cls", "box"):
        assert soft[name].item() == pytest.approx(hard[name].item(), rel=1e-5)


def test_a_student_that_agrees_with_its_teacher_has_only_background_to_learn() -> None:
    soft = SoftTargets([xyxy_from_cxcywh(PRIORS[50:51])], [torch.tensor([[0.6, 0.3, 0.0]])])
    padded = pad_soft_targets(soft, CLASSES, CPU)
    match = match_priors(xyxy_from_cxcywh(PRIORS), padded)
    distribution = background_and_classes(padded.class_probs)[0, 0]
    logits = torch.full((1, len(PRIORS), CLASSES + 1), -40.0)
    logits[..., 0] = 40.0
    logits[match.positive] = distribution.clamp(min=1e-12).log()
    offsets = encode_boxes(soft.boxes_xyxy[0].expand(len(PRIORS), 4), PRIORS).unsqueeze(0)
    losses = soft_multibox_losses(logits, offsets, PRIORS, padded, 1.0)
    assert losses["cls"].item() == pytest.approx(0.0, abs=1e-5)
    assert losses["box"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("probs", "wanted"),
    [
        ([0.8, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0]),
        ([0.6, 0.6, 0.0], [0.4, 0.3, 0.3, 0.0]),
        ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([1.0, 1.0, 0.0], [0.0, 0.5, 0.5, 0.0]),
    ],
)
def test_background_and_classes(probs: list[float], wanted: list[float]) -> None:
    assert background_and_classes(torch.tensor(probs)).tolist() == pytest.approx(wanted)


def test_half_precision_logits_are_lossless_enough() -> None:
    logits, offsets = outputs(4, 1)
    padded = pad_targets(Targets([boxes(0, 3)], [torch.tensor([0, 1, 2])]), CLASSES, CPU)
    losses = multibox_losses(logits.bfloat16(), offsets.bfloat16(), PRIORS, padded)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
