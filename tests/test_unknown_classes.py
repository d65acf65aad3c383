"""A student class that no teacher knows: their silence must not push its objects to background."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.assignment import silent_rows
from edgekd.detectors.base import Detector, SoftTargets, Targets
from edgekd.losses import DistillBatch, Pair, TeacherView, build_term
from edgekd.losses.gkd import GKDTerm
from edgekd.losses.objects import object_maps
from edgekd.losses.response import ResponseTerm
from edgekd.recipe import ModelConfig, TermConfig
from tests.toy import ToyTeacher, toy_batch, toy_detector

CLASSES = ("red", "green", "blue")
KNOWN = torch.tensor([[4.0, 4.0, 28.0, 28.0]])
UNKNOWN = torch.tensor([[36.0, 36.0, 60.0, 60.0]])
MODELS = ("mobilenetv2-ssd-lite", "yolo-nano", "yolov3-tiny")


def student(model: str) -> Detector:
    torch.manual_seed(0)
    return build_detector(spec_for(ModelConfig(model=model, input_size=64, width=0.35), CLASSES)).train()


def centred_in(detector: Detector, box: torch.Tensor) -> torch.Tensor:
    x, y = detector.prior_boxes()[:, :2].unbind(-1)
    x1, y1, x2, y2 = box[0]
    return (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("unknown", [(), ("blue",), ("red", "blue")])
def test_rows_in_an_object_no_teacher_knows_get_no_class_gradient(model: str, unknown: tuple[str, ...]) -> None:
    detector = student(model)
    teachers = [ToyTeacher(student(model), "a"), ToyTeacher(student(model), "b")]
    teachers[0].unknown_classes = unknown
    teachers[1].unknown_classes = ("blue",) if unknown else ()
    term = ResponseTerm(Pair(detector, teachers))
    images = torch.zeros(2, 3, 64, 64)
    inside = centred_in(detector, UNKNOWN) & ~centred_in(detector, KNOWN)
    output = detector(images)
    sees_blue = 5.0 * inside[None, :, None] * torch.eye(output.cls_logits.shape[-1])[-1]  # so that SSD mines these rows
    output = replace(output, cls_logits=output.cls_logits + sees_blue)
    soft = SoftTargets([KNOWN, KNOWN], [torch.tensor([[0.9, 0.0, 0.0]])] * 2)
    truth = Targets([torch.cat([KNOWN, UNKNOWN]), KNOWN], [torch.tensor([0, 2]), torch.tensor([0])])
    views = [TeacherView(teacher.name, 0.5, soft) for teacher in teachers]
    loss = term(DistillBatch(images, output, truth, views, soft, 0, 1))
    sources = [output.cls_logits, *([] if output.objectness is None else [output.objectness])]
    pressure = sum(g.abs().flatten(2).sum(-1) if g.ndim == 3 else g.abs() for g in torch.autograd.grad(loss, sources))
    assert isinstance(pressure, torch.Tensor)
    assert bool((pressure[0, inside] == 0).all()) == bool(unknown)
    assert (pressure[0] > 0).any()  # everything else still learns
    assert (pressure[1, inside] > 0).any()


def test_a_class_that_any_teacher_knows_is_no_silence() -> None:
    detector = student(MODELS[0])
    teachers = [ToyTeacher(detector, "a"), ToyTeacher(detector, "b")]
    teachers[0].unknown_classes, teachers[1].unknown_classes = ("red",), ("green",)
    assert ResponseTerm(Pair(detector, teachers)).unknown == []


def test_silent_rows_are_those_centred_in_a_silent_box() -> None:
    generator = np.random.default_rng(0)
    rows = torch.from_numpy(generator.uniform(0, 60, (40, 4)).astype(np.float32))
    corners = generator.uniform(0, 40, (5, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + 15], 1).astype(np.float32))
    soft = SoftTargets([KNOWN] * 2, [torch.zeros(1, 3)] * 2, [boxes, torch.zeros(0, 4)])
    expected = [any(b[0] <= r[0] <= b[2] and b[1] <= r[1] <= b[3] for b in boxes) for r in rows]
    assert silent_rows(soft, rows).tolist() == [expected, [False] * 40]
    assert any(expected)
    assert not all(expected)


@pytest.mark.parametrize("loss", ["gkd", "information_map"])
@pytest.mark.parametrize("unknown", [(), ("disc",)])
def test_cells_in_an_object_that_a_teacher_does_not_know_get_no_feature_gradient(
    loss: str, unknown: tuple[str, ...]
) -> None:
    detector, teacher = toy_detector(), ToyTeacher(toy_detector(seed=1, width=0.35))
    teacher.unknown_classes = unknown
    term = build_term(TermConfig(loss=loss), Pair(detector, [teacher]))
    batch = toy_batch(detector, [teacher], term.student_taps)
    taps = {name: tap.detach().requires_grad_() for name, tap in batch.output.taps.items()}
    batch = replace(batch, output=replace(batch.output, taps=taps))
    pressure = torch.autograd.grad(term(batch), list(taps.values()))
    for gradient in pressure:
        owner = object_maps(batch.targets.boxes_xyxy, (gradient.shape[-2], gradient.shape[-1]), (96, 96))
        disc = torch.stack([(o >= 0) & one[o.clamp(min=0)] for o, one in zip(owner[:2], DISCS, strict=True)])
        cells = gradient.abs().sum(1)[:2]
        assert disc.any()
        assert bool((cells[disc] == 0).all()) == bool(unknown)
        assert (cells[~disc] > 0).any()


def test_gkd_keeps_no_instance_of_a_class_that_a_teacher_does_not_know() -> None:
    detector, teacher = toy_detector(), ToyTeacher(toy_detector(seed=1))
    teacher.unknown_classes = ("disc",)
    term = build_term(TermConfig(loss="gkd", params={"min_side": 8.0}), Pair(detector, [teacher]))
    term(toy_batch(detector, [teacher], term.student_taps))
    assert isinstance(term, GKDTerm)
    assert set(term.banks[0].state()) == {"0"}


DISCS = (torch.tensor([False, True]), torch.tensor([True]))
"""Which objects of `toy_batch`'s first two images are discs."""
