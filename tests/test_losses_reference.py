"""Whole terms against their formulas, written again in plain numpy: what each of them adds up, over which cells and with
which weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.detectors.base import SoftTargets
from edgekd.losses import DistillBatch, Pair, Term, build_term
from edgekd.losses.decoupled import DecoupledTerm
from edgekd.losses.feature import LevelTerm
from edgekd.losses.fgd import GlobalContext
from edgekd.losses.gkd import GKDTerm
from edgekd.recipe import TermConfig
from tests.toy import ToyTeacher, toy_batch, toy_detector

Array = NDArray[np.float64]
SIDE = 96
WEIGHTS = (0.7, 0.3)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """One student and two teachers of unlike width, on equal grids."""
    teachers = [ToyTeacher(toy_detector(seed=2), "t0"), ToyTeacher(toy_detector(width=0.35, seed=3), "t1")]
    return Pair(toy_detector(seed=1), teachers)  # type: ignore[arg-type]


def built(pair: Pair, loss: str, **params: Any) -> tuple[Term, DistillBatch]:
    """The term, and a batch of two images with objects and one without; the teachers count unequally."""
    torch.manual_seed(0)
    term = build_term(TermConfig(loss=loss, params=params), pair)
    batch = toy_batch(pair.student, pair.teachers, term.student_taps)  # type: ignore[arg-type]
    views = [replace(view, weight=weight) for view, weight in zip(batch.teachers, WEIGHTS, strict=True)]
    return term, replace(batch, teachers=views)


def plain(tensor: Tensor) -> Array:
    """As double precision numpy."""
    return tensor.detach().double().numpy()


def standard(x: Array) -> Array:
    """Per channel over images and positions."""
    return (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def linear(x: Array, layer: nn.Module) -> Array:
    """A 1x1 convolution over (B, C, H, W), or a linear layer over (B, C)."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert layer.bias is not None
    weight = plain(layer.weight).reshape(len(layer.weight), -1)
    return np.einsum("oc,bc...->bo...", weight, x) + plain(layer.bias).reshape(1, -1, *[1] * (x.ndim - 2))


def conv3(x: Array, layer: nn.Module) -> Array:
    """A 3x3 convolution with padding, cell by cell."""
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    padded, weight = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), plain(layer.weight)
    out = np.zeros((len(x), len(weight), *x.shape[2:]))
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            out[:, :, i, j] = np.einsum("bcyx,ocyx->bo", padded[:, :, i : i + 3, j : j + 3], weight)
    return out + plain(layer.bias).reshape(1, -1, 1, 1)


def levels_of(term: Any, batch: DistillBatch, normalised: bool = True) -> list[tuple[int, int, float, Array, Array]]:
    """(teacher, level, share, student (B, C, H, W) through its adapter, teacher (B, C, H, W)) of every pair of maps."""
    assert isinstance(term, LevelTerm)
    found = []
    for t, (view, levels) in enumerate(zip(batch.teachers, term.levels, strict=True)):
        assert len(levels) > 1  # else a sum over levels could not be told from a mean
        for i, level in enumerate(levels):
            theirs = plain(view.taps[level.teacher.name])
            own = linear(plain(batch.output.taps[level.student.name]), term.adapters[t][i])  # type: ignore[index]
            found.append((t, i, WEIGHTS[t] / len(levels), own, standard(theirs) if normalised else theirs))
    return found


def owners(boxes: Array, grid: tuple[int, int]) -> NDArray[np.int64]:
    """The smallest box that covers half of each cell, or whose centre lies in it; -1 for none."""
    out = np.full(grid, -1)
    size = SIDE / grid[0]
    best = np.full(grid, np.inf)
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        for i in range(grid[0]):
            for j in range(grid[1]):
                w = min(x2, (j + 1) * size) - max(x1, j * size)
                h = min(y2, (i + 1) * size) - max(y1, i * size)
                centre = int((x1 + x2) / 2 / size) == j and int((y1 + y2) / 2 / size) == i
                if (centre or max(w, 0) * max(h, 0) / size**2 >= 0.5) and (x2 - x1) * (y2 - y1) < best[i, j]:
                    best[i, j], out[i, j] = (x2 - x1) * (y2 - y1), index
    return out


def iou(a: Array, b: Array) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return float(shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared))


def best_row(boxes: Array, scores: Array, box: Array, label: int) -> tuple[float, int]:
    """(quality, row) of the row that sees an object best."""
    values = [scores[row, label] * iou(boxes[row], box) for row in range(len(boxes))]
    return max(values), int(np.argmax(values))


# -- feature maps ----------------------------------------------------------------------------------------------------


def test_feature(pair: Pair) -> None:
    term, batch = built(pair, "feature")
    expected = sum(share * ((s - t) ** 2).mean() for *_, share, s, t in levels_of(term, batch))
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-4)


def test_cwd_at_a_temperature(pair: Pair) -> None:
    term, batch = built(pair, "cwd", temperature=2.0)
    expected = 0.0
    for *_, share, student, teacher in levels_of(term, batch):
        s, t = (softmax(m.reshape(*m.shape[:2], -1) / 2, 2) for m in (student, teacher))
        expected += share * 4 * (t * np.log(t / s)).sum(2).mean()
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-4)


def test_mgd(pair: Pair) -> None:
    term, batch = built(pair, "mgd")
    torch.manual_seed(5)
    got = float(term(batch).detach())
    torch.manual_seed(5)
    expected = 0.0
    for t, i, share, student, teacher in levels_of(term, batch):
        kept = plain(torch.rand(len(student), 1, *student.shape[2:])) >= 0.65
        block = term.generators[t][i]  # type: ignore[index]
        rebuilt = conv3(np.maximum(conv3(student * kept, block.first), 0), block.second)
        expected += share * ((rebuilt - teacher) ** 2).sum() / 3
    assert got == pytest.approx(expected, rel=1e-4)


def test_amd(pair: Pair) -> None:
    term, batch = built(pair, "amd")
    expected = 0.0
    for t, i, share, student, teacher in levels_of(term, batch):
        gate, block = term.gates[t][i], term.generators[t][i]  # type: ignore[index]
        hidden = np.maximum(linear(student.mean((2, 3)), gate.squeeze), 0)
        student = student / (1 + np.exp(-linear(hidden, gate.excite)))[:, :, None, None]
        kept = np.ones((3, 1, *student.shape[2:]))
        for image in range(3):
            order = np.argsort(-np.abs(teacher[image]).mean(0).ravel())
            kept[image].reshape(-1)[order[: round(0.25 * len(order))]] = 0
        rebuilt = conv3(np.maximum(conv3(student * kept, block.first), 0), block.second)
        expected += share * ((rebuilt - teacher) ** 2).sum() / 3
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-4)


def test_fgd(pair: Pair) -> None:
    """With factors that let every part count."""
    factors = {"foreground": 0.5, "background": 0.25, "attention": 2.0, "relation": 0.125}
    term, batch = built(pair, "fgd", **factors)
    for block in (m for m in term.modules() if isinstance(m, GlobalContext)):
        nn.init.normal_(block.expand.weight)  # else they are still the identity
    expected = 0.0
    for t, i, share, student, teacher in levels_of(term, batch):
        grid = (student.shape[2], student.shape[3])
        total = 0.0
        spaces, channels, contexts = [], [], []
        for side, block in ((student, term.student_context[t][i]), (teacher, term.teacher_context[t][i])):  # type: ignore[index]
            cells, count = grid[0] * grid[1], side.shape[1]
            spaces.append(cells * softmax(np.abs(side).mean(1).reshape(3, -1) / 0.5, 1).reshape(3, *grid))
            channels.append(count * softmax(np.abs(side).mean((2, 3)) / 0.5, 1))
            pull = softmax(linear(side, block.attend).reshape(3, 1, -1), 2)
            context = (side.reshape(3, count, -1) * pull).sum(2)
            hidden = linear(context, block.reduce)
            hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
            contexts.append(side + linear(np.maximum(hidden, 0), block.expand)[:, :, None, None])
        for image in range(3):
            owner = owners(plain(batch.targets.boxes_xyxy[image]), grid)
            for y in range(grid[0]):
                for x in range(grid[1]):
                    squared = (student[image, :, y, x] - teacher[image, :, y, x]) ** 2
                    focal = float((squared * channels[1][image]).sum() * spaces[1][image, y, x])
                    inside = owner[y, x] >= 0
                    factor = factors["foreground" if inside else "background"]
                    total += focal * factor / (owner == owner[y, x]).sum()
        total += factors["attention"] * (np.abs(spaces[0] - spaces[1]).sum() + np.abs(channels[0] - channels[1]).sum())
        total += factors["relation"] * ((contexts[0] - contexts[1]) ** 2).sum()
        expected += share * total / 3
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("game", ["alternating", "reversal"])
def test_adversarial(pair: Pair, game: str) -> None:
    term, batch = built(pair, "adversarial", adversarial_weight=0.5, imitation_weight=2.0, game=game)
    expected = learned = 0.0
    for t, i, share, student, teacher in levels_of(term, batch):
        judge = term.discriminators[t][i]  # type: ignore[index]
        fake, real = (plain(judge(torch.from_numpy(m).float())) for m in (student, teacher))
        fooling = np.log1p(np.exp(-fake)).mean() if game == "alternating" else -np.log1p(np.exp(fake)).mean()
        expected += share * (0.5 * fooling + 2.0 * ((student - teacher) ** 2).mean())
        learned += share * (np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean())
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-4)
    loss = term.adversary_loss(batch)
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(learned, rel=1e-4)


def test_adversarial_on_the_mean_of_the_teachers() -> None:
    teachers = [ToyTeacher(toy_detector(seed=seed), f"t{seed}") for seed in (2, 3)]
    term, batch = built(Pair(toy_detector(seed=1), teachers), "adversarial", combine="mean")  # type: ignore[arg-type]
    expected = 0.0
    for i, level in enumerate(term.levels[0]):  # type: ignore[index, arg-type]
        student = linear(plain(batch.output.taps[level.student.name]), term.adapters[0][i])  # type: ignore[index, union-attr]
        maps = [standard(plain(view.taps[level.teacher.name])) for view in batch.teachers]
        teacher = WEIGHTS[0] * maps[0] + WEIGHTS[1] * maps[1]
        fake = plain(term.discriminators[0][i](torch.from_numpy(student).float()))  # type: ignore[index]
        expected += (0.1 * np.log1p(np.exp(-fake)).mean() + ((student - teacher) ** 2).mean()) / len(term.levels[0])  # type: ignore[index, arg-type]
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("black_box", [False, True])
def test_information_map(pair: Pair, black_box: bool) -> None:
    term, batch = built(pair, "information_map", backbone_weight=0.5, neck_weight=2.0)
    if black_box:  # boxes are all there is to weigh the neck by
        batch = replace(batch, teachers=[replace(view, dense=None) for view in batch.teachers])
    expected = 0.0
    for kind, part, factor in (("backbone", term.backbone, 0.5), ("neck", term.neck, 2.0)):
        for t, i, share, student, teacher in levels_of(part, batch):
            grid = (student.shape[2], student.shape[3])
            distance = ((student - teacher) ** 2).mean(1)
            if kind == "backbone":
                raw = np.abs(plain(batch.teachers[t].taps[part.levels[t][i].teacher.name])).mean(1)  # type: ignore[index, union-attr]
                information = raw / raw.mean((1, 2), keepdims=True)
            elif black_box:
                information = _boxes_on(grid, batch.teachers[t].soft)
            else:
                information = _rows_on(grid, pair, batch, t)
            expected += factor * share * (information * distance).sum() / information.sum()
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-4)


def _boxes_on(grid: tuple[int, int], soft: SoftTargets) -> Array:
    out, size = np.zeros((3, *grid)), SIDE / grid[0]
    for image in range(3):
        for (x1, y1, x2, y2), probs in zip(plain(soft.boxes_xyxy[image]), plain(soft.class_probs[image]), strict=True):
            for i in range(grid[0]):
                for j in range(grid[1]):
                    w = max(0, min(x2, (j + 1) * size) - max(x1, j * size))
                    h = max(0, min(y2, (i + 1) * size) - max(y1, i * size))
                    out[image, i, j] = max(out[image, i, j], probs.max() * w * h / size**2)
    return out


def _rows_on(grid: tuple[int, int], pair: Pair, batch: DistillBatch, t: int) -> Array:
    detector, dense = pair.teachers[t].detector, batch.teachers[t].dense
    assert detector is not None
    assert dense is not None
    scores, centres = plain(detector.decode(dense)[1]), plain(detector.prior_boxes())
    out, size = np.zeros((3, *grid)), SIDE / grid[0]
    for row, (x, y, *_) in enumerate(centres):
        i, j = int(y / size), int(x / size)
        out[:, i, j] = np.maximum(out[:, i, j], scores[:, row].max(1))
    return out


# -- predictions -----------------------------------------------------------------------------------------------------


def with_answers(batch: DistillBatch, answers: list[list[tuple[list[list[float]], list[list[float]]]]]) -> DistillBatch:
    """The batch with what each teacher says (boxes, class probabilities) about each image."""
    views = []
    for view, own in zip(batch.teachers, answers, strict=True):
        boxes = [torch.tensor(b).reshape(-1, 4) for b, _ in own]
        views.append(replace(view, soft=SoftTargets(boxes, [torch.tensor(p).reshape(-1, 2) for _, p in own])))
    return replace(batch, teachers=views)


@pytest.mark.parametrize("mean", ["objects", "cells"])
def test_decoupled_foreground(pair: Pair, mean: str) -> None:
    """Each object is taught by the teacher that sees it best, if that one sees it better than the student does."""
    term, batch = built(pair, "decoupled", background_weight=0.0, foreground_mean=mean)
    gt, labels = [plain(b) for b in batch.targets.boxes_xyxy], [v.tolist() for v in batch.targets.labels]
    (a, b), (c,) = gt[0].tolist(), gt[1].tolist()
    # Of the first image's objects the first teacher sees one better and the second the other; the last is seen by none.
    first: list[Any] = [([a, b], [[0.9, 0.0], [0.0, 0.6]]), ([c], [[0.9, 0.0]]), ([], [])]
    second: list[Any] = [([a, b], [[0.8, 0.1], [0.1, 0.7]]), ([], []), ([], [])]
    batch = with_answers(batch, [first, second])
    boxes, scores = (plain(v) for v in pair.student.decode(batch.output))
    choices: list[list[int]] = []
    for image in range(3):
        choices.append([])
        for box, label in zip(gt[image], labels[image], strict=True):
            sees = [best_row(boxes[image], scores[image], box, label)[0]]
            for view in batch.teachers:
                theirs, probs = plain(view.soft.boxes_xyxy[image]), plain(view.soft.class_probs[image])
                sees.append(best_row(theirs, probs, box, label)[0] if len(theirs) else 0.0)
            choices[-1].append(int(np.argmax(sees)) - 1)
    assert choices == [[0, 1], [-1], []]
    expected = 0.0
    for t, _, _, student, teacher in levels_of(term, batch, normalised=False):
        total = weight = 0.0
        for image in range(3):
            owner = owners(gt[image], (student.shape[2], student.shape[3]))
            for y, x in np.argwhere(owner >= 0):
                share = 1 / (owner == owner[y, x]).sum() if mean == "objects" else 1.0
                weight += share
                if choices[image][owner[y, x]] == t:
                    s, v = student[image, :, y, x], teacher[image, :, y, x]
                    total += share * (1 - s @ v / np.sqrt((s @ s) * (v @ v)))
        expected += total / weight / len(term.levels[t])  # type: ignore[index, arg-type]
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-4)
    assert term.statistics() == {"gate_open": pytest.approx(2 / 3)}


def test_decoupled_background(pair: Pair) -> None:
    """Free rows of highest score; the teacher that is least wrong there; silence reaches to 0.05."""
    term, batch = built(pair, "decoupled", background_weight=1.0)
    assert isinstance(term, DecoupledTerm)
    boxes, scores = (plain(v) for v in pair.student.decode(batch.output))
    gt = [plain(b) for b in batch.targets.boxes_xyxy]
    worst = [_worst_free_rows(plain(pair.student.prior_boxes()), boxes[i], scores[i], gt[i]) for i in range(3)]
    # Boxes that fit some of these rows, so that the teachers say something there; one says nothing of the last image.
    fitting = [(boxes[i][worst[i][::12]] + 0.5).tolist() for i in range(3)]
    probs = [[[0.02, 0.3], [0.01, 0.02], [0.4, 0.1]], [[0.2, 0.01], [0.3, 0.02], [0.03, 0.02]]]
    first = [(b, probs[0]) for b in fitting]
    second: list[Any] = [*((b, probs[1]) for b in fitting[:2]), ([], [])]
    batch = with_answers(batch, [first, second])
    total, learned, heard = 0.0, 0, 0
    for image in range(3):
        for row in worst[image]:
            own = scores[image][row]
            answers = []
            for view in batch.teachers:
                theirs, said = plain(view.soft.boxes_xyxy[image]), plain(view.soft.class_probs[image])
                overlaps = [iou(boxes[image][row], b) for b in theirs]
                near = bool(overlaps) and max(overlaps) >= 0.5
                answers.append(said[int(np.argmax(overlaps))] if near else np.minimum(own, 0.05))
                heard += near
            best = min(answers, key=lambda a: float(a.max()))
            if best.max() < own.max():
                kl = best * np.log(best / own) + (1 - best) * np.log((1 - best) / (1 - own))
                total += float(kl.sum()) / len(worst[image])
                learned += 1
    assert 0 < learned < sum(map(len, worst))  # else the gate could be anything
    assert heard
    both, alone = term(batch), built(pair, "decoupled", background_weight=0.0)[0](batch)
    assert float((both - alone).detach()) == pytest.approx(total / 3, rel=1e-3)


def _worst_free_rows(priors: Array, boxes: Array, scores: Array, gt: Array) -> list[int]:
    free = []
    for row, (cx, cy, *_) in enumerate(priors):
        inside = any(b[0] <= cx < b[2] and b[1] <= cy < b[3] for b in gt)
        if not inside and not any(iou(boxes[row], b) >= 0.5 for b in gt):
            free.append(row)
    return sorted(free, key=lambda row: -float(scores[row].max()))[: max(32, 3 * len(gt))]


def test_gkd(pair: Pair) -> None:
    """All three parts, once there are prototypes."""
    factors = {"inside": 2.0, "outside": 3.0, "response_weight": 0.5, "global_weight": 1.5, "temperature": 3.0}
    term, batch = built(pair, "gkd", min_side=10.0, prototypes=2, **factors)
    assert isinstance(term, GKDTerm)
    # Small objects, which share their cells with none, and more than one of a class to choose prototypes from.
    term(batch)
    term.begin_epoch(1, 4)
    gt = [plain(b) for b in batch.targets.boxes_xyxy]
    labels = [v.tolist() for v in batch.targets.labels]
    sees = [[(gt[0] + 3).tolist(), [[0.7, 0.2], [0.1, 0.6]]], [(gt[1] - 2).tolist(), [[0.3, 0.4]]], [[], []]]
    blind: list[Any] = [[[[0.0, 0, 4, 4]], [[0.5, 0.5]]], [[], []], [[], []]]
    batch = with_answers(replace(batch, epoch=1), [sees, blind])
    boxes, scores = (plain(v) for v in pair.student.decode(batch.output))

    expected = 0.0
    weights: list[list[float]] = []
    for t, i, share, student, teacher in levels_of(term, batch):
        grid = (student.shape[2], student.shape[3])
        if i == 0:
            level = term.levels[t][i]
            raw = plain(batch.output.taps[level.student.name])
            weights, relation, response, seen = [], [], [], 0
            for image in range(3):
                own_weights = []
                for box, label in zip(gt[image], labels[image], strict=True):
                    known = term.prototypes[t][label]
                    s, v = (_pooled(m[image], box) for m in (raw, teacher))
                    to_s, to_t = (plain(p) @ x for p, x in ((known.student, s), (known.teacher, v)))
                    r = 1 - abs(to_s.max() - to_t.max())
                    own_weights.append(r)
                    d = np.abs(r * to_s - r * to_t)
                    relation.append(np.where(d < 1, d**2 / 2, d - 0.5).mean())
                    view = batch.teachers[t].soft
                    theirs, probs = plain(view.boxes_xyxy[image]), plain(view.class_probs[image])
                    quality, row = best_row(theirs, probs, box, label) if len(theirs) else (0.0, -1)
                    if quality > 0:
                        own = boxes[image], scores[image]
                        p, q = (_softened(x) for x in (probs[row], own[1][best_row(*own, box, label)[1]]))
                        response.append(r * 9 * float((p * np.log(p / q)).sum()))
                        seen += 1
                weights.append(own_weights)
            expected += WEIGHTS[t] * 1.5 * float(np.mean(relation))
            expected += WEIGHTS[t] * 0.5 * sum(response) / max(1, seen)
        total = 0.0
        distance = ((student - teacher) ** 2).mean(1)
        for image in range(3):
            owner = owners(gt[image], grid)
            for y in range(grid[0]):
                for x in range(grid[1]):
                    if owner[y, x] >= 0:
                        factor = 2.0 * weights[image][owner[y, x]] / (owner >= 0).sum()
                    else:
                        factor = 3.0 / (owner < 0).sum()
                    total += factor * distance[image, y, x]
        expected += share * total / 3 / 5.0
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-3)


def _pooled(features: Array, box: Array) -> Array:
    """Mean over a box, pixel by pixel, to unit length."""
    size = SIDE // features.shape[1]
    fine = features.repeat(size, 1).repeat(size, 2)
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    mean = fine[:, y1:y2, x1:x2].mean((1, 2))
    return np.asarray(mean / np.sqrt((mean**2).sum()))


def _softened(scores: Array) -> Array:
    p = np.append(scores, 1 - scores.max()) ** (1 / 3)
    return np.asarray(p / p.sum())
