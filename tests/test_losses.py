"""Every distillation term against what makes it itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from edgekd.detectors.base import DetectorOutput, TapKind
from edgekd.detectors.box_losses import pairwise_iou
from edgekd.errors import DistillationSetupError
from edgekd.losses import TERMS, Pair, TeacherView, Term, build_term
from edgekd.losses.adversarial import AdversarialTerm
from edgekd.losses.base import DistillBatch
from edgekd.losses.cwd import CWDTerm
from edgekd.losses.decoupled import DecoupledTerm, background_kl, background_rows, choose_teachers
from edgekd.losses.feature import standardise
from edgekd.losses.fgd import GlobalContext, focal_masks
from edgekd.losses.gkd import GKDTerm, robust_weights
from edgekd.losses.information_map import backbone_information, confidence_on_grid
from edgekd.losses.levels import match_levels
from edgekd.losses.masked import AMDTerm, attention_mask, random_mask, spatial_attention
from edgekd.losses.objects import object_maps, object_quality, object_shares, pool_boxes
from edgekd.losses.pkd import PKDTerm
from edgekd.losses.prototypes import Prototypes, density, joint_matching_pursuit, search_prototypes
from edgekd.losses.response import dense_response_losses
from edgekd.recipe import TermConfig
from edgekd.teachers.native import NativeTeacher
from edgekd.training.distill import NO_ANSWERS
from tests.toy import BlackBox, ToyTeacher, toy_batch, toy_detector

PAIRS = {
    "equal": ("mobilenetv2-ssd-lite", 96, "mobilenetv2-ssd-lite", 96),
    "another size": ("mobilenetv2-ssd-lite", 96, "mobilenetv2-ssd-lite", 160),
    "SSD teacher, YOLO student": ("yolo-nano", 96, "mobilenetv2-ssd-lite", 96),
    "YOLO teacher, SSD student": ("mobilenetv2-ssd-lite", 96, "yolo-nano", 96),
    "VGG teacher, MobileNet student": ("mobilenetv2-ssd-lite", 160, "vgg11-ssd", 160),
}
FEATURE_TERMS = sorted(set(TERMS) - {"response"})


def make_pair(kind: str, teachers: int = 1) -> Pair:
    student_model, student_size, teacher_model, teacher_size = PAIRS[kind]
    student = toy_detector(student_model, student_size, seed=1)
    return Pair(
        student, [ToyTeacher(toy_detector(teacher_model, teacher_size, seed=2 + i), f"t{i}") for i in range(teachers)]
    )


def run_term(term: Term, pair: Pair, epoch: int = 0) -> tuple[Tensor, DistillBatch]:
    batch = toy_batch(pair.student, pair.teachers, term.student_taps, epoch)  # type: ignore[arg-type]
    return term(batch), batch


CASES = [
    *[(name, "equal") for name in sorted(TERMS)],
    *[(name, kind) for name in ("decoupled", "response") for kind in list(PAIRS)[1:4]],
    *[(name, "YOLO teacher, SSD student") for name in ("adversarial", "amd", "gkd", "information_map")],
    ("feature", "VGG teacher, MobileNet student"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_term_moves_the_student_and_never_the_teacher(name: str, kind: str) -> None:
    pair = make_pair(kind)
    term = build_term(TermConfig(loss=name), pair)
    loss, _ = run_term(term, pair)
    assert loss.ndim == 0
    assert bool(torch.isfinite(loss))
    loss.backward()
    moved = [p for p in pair.student.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert moved, "the loss changes no gradient"
    for teacher in pair.teachers:
        assert teacher.detector is not None
        assert all(p.grad is None for p in teacher.detector.parameters())


@pytest.mark.parametrize("name", sorted(TERMS))
def test_swapping_the_teachers_changes_nothing(name: str) -> None:
    pair = make_pair("equal", teachers=2)
    swapped = Pair(pair.student, list(reversed(pair.teachers)))
    losses = []
    for each in (pair, swapped):
        torch.manual_seed(0)
        term = build_term(TermConfig(loss=name), each)
        _same_parameters(term)
        torch.manual_seed(5)
        batch = toy_batch(each.student, each.teachers, term.student_taps)  # type: ignore[arg-type]
        losses.append(float(term(batch).detach()) if name not in ("mgd", "response") else _stable(name, term, batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def _stable(name: str, term: Term, batch: DistillBatch) -> float:
    if name == "response":  # the fused answer stands for the ensemble; its own invariance is tested with the fusion
        return 0.0
    term.mask = lambda maps: torch.ones_like(maps.student[:, :1])  # type: ignore[attr-defined]
    return float(term(batch).detach())


def _same_parameters(term: Term) -> None:
    """Give every parameter a value that depends on its shape alone, so that order cannot hide behind initialisation."""
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))


@pytest.mark.parametrize("name", FEATURE_TERMS)
def test_a_black_box_without_taps_is_refused_with_both_sides_listed(name: str) -> None:
    student = toy_detector(seed=1)
    with pytest.raises(DistillationSetupError) as caught:
        build_term(TermConfig(loss=name), Pair(student, [BlackBox(toy_detector(seed=2))]))
    assert "black box" in str(caught.value)


def test_levels_that_do_not_match_are_refused_with_both_sides_grids() -> None:
    pair = make_pair("equal")
    with pytest.raises(DistillationSetupError) as caught:
        build_term(TermConfig(loss="feature", student_taps=("nonsense",)), pair)
    assert "nonsense" in str(caught.value)
    assert "6x6" in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "kinds", "expected"),
    [  # the coarsest grids of these are equal by rounding, which is no reason to leave out those that are not
        ((224, 256), ("neck", "backbone"), {"neck.l0": "neck.l0", "neck.l1": "neck.l1", "neck.l2": "neck.l2"}),
        ((320, 384), ("neck", "backbone"), {f"neck.l{level}": f"neck.l{level}" for level in range(4)}),
        ((224, 256), ("backbone", "neck"), {f"backbone.s{stride}": f"backbone.s{stride}" for stride in (8, 16, 32)}),
        (
            (320, 224),
            ("neck", "backbone"),
            {"neck.l0": "neck.l0", "neck.l1": "neck.l0"} | dict.fromkeys(("neck.l2", "neck.l3"), "neck.l2"),
        ),
    ],
)
def test_levels_of_unlike_input_sizes_are_all_matched(
    sizes: tuple[int, int], kinds: tuple[TapKind, ...], expected: dict[str, str]
) -> None:
    student, teacher = (toy_detector(input_size=size).tap_specs for size in sizes)
    found = match_levels(student, teacher, kinds=kinds)
    assert {pair.student.name: pair.teacher.name for pair in found} == expected


def test_a_level_twice_as_large_teaches_none_where_others_are_equal() -> None:
    student, teacher = toy_detector(input_size=320).tap_specs, toy_detector("yolo-nano", 320).tap_specs
    found = match_levels(student, teacher)
    assert {pair.student.name: pair.teacher.name for pair in found} == {"neck.l0": "neck.p4", "neck.l1": "neck.p5"}


@pytest.mark.parametrize("side", ["student_taps", "teacher_taps"])
@pytest.mark.parametrize("name", ["backbone.s16", "neck.l0"])  # of one grid
@pytest.mark.parametrize("kinds", [("neck", "backbone"), ("backbone", "neck")])
def test_a_named_map_s_partner_is_of_its_own_kind(name: str, side: str, kinds: tuple[TapKind, ...]) -> None:
    taps = toy_detector(input_size=96).tap_specs
    (pair,) = match_levels(taps, taps, **{side: (name,)}, kinds=kinds)  # type: ignore[arg-type]
    assert (pair.student.name, pair.teacher.name) == (name, name)


STAGES, LAST = ("backbone.s8", "backbone.s16", "backbone.s32"), "neck.l5"


@pytest.mark.parametrize(
    ("named", "alone"),
    [
        ({"student_taps": (*STAGES, LAST)}, LAST),  # 1x1 here, 3x3 at the coarsest there
        ({"teacher_taps": (*STAGES, "neck.p3")}, "neck.p3"),  # the student's only 12x12 map has the other one
        ({"student_taps": ()}, "student_taps names none"),
        ({"student_taps": (), "teacher_taps": ()}, "student_taps names none"),
    ],
)
def test_a_named_map_without_partner_is_told_not_left_out(named: dict[str, tuple[str, ...]], alone: str) -> None:
    pair = make_pair("YOLO teacher, SSD student")
    with pytest.raises(DistillationSetupError, match=alone) as caught:
        build_term(TermConfig.model_validate({"loss": "feature", **named}), pair)
    assert "3x3" in str(caught.value)


def test_named_maps_of_one_side_find_theirs_on_the_other() -> None:
    pair = make_pair("YOLO teacher, SSD student")
    necks = ("neck.p3", "neck.p4", "neck.p5")
    for named, theirs in (({"student_taps": STAGES}, STAGES), ({"teacher_taps": necks}, necks)):
        term = build_term(TermConfig.model_validate({"loss": "feature", **named}), pair)
        pairs = zip(STAGES, theirs, ("12x12", "6x6", "3x3"), strict=True)
        assert term.matched() == "from t0, " + ", ".join(f"{s} {grid} <- {t} {grid}" for s, t, grid in pairs)
    small = build_term(TermConfig(loss="feature", student_taps=("neck.l1", "neck.l2")), pair)
    assert small.matched() == "from t0, neck.l1 3x3 <- neck.p5 3x3, neck.l2 2x2 <- neck.p5 3x3"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TermConfig(loss="feature", params={"nonsense": 1}), "nonsense"),
        (TermConfig(loss="feature", params={"normalise": "nonsense"}), "nonsense"),
        (TermConfig(loss="nonsense"), "nonsense"),
        (TermConfig(loss="amd", params={"masked_share": 2.0}), "masked_share"),
        (TermConfig(loss="gkd", params={"prototypes": 0}), "prototypes"),
        (TermConfig(loss="gkd", params={"instances": 0}), "instances"),
        (TermConfig(loss="gkd", params={"percentile": 140}), "percentile"),
        (TermConfig(loss="gkd", params={"inside": 0, "outside": 0}), "inside"),
    ],
)
def test_a_wrong_parameter_is_named(config: TermConfig, words: str) -> None:
    with pytest.raises(DistillationSetupError, match=words):
        build_term(config, make_pair("equal"))


def test_response_on_priors_needs_equal_layouts() -> None:
    with pytest.raises(DistillationSetupError, match="layout"):
        build_term(TermConfig(loss="response", params={"mode": "priors"}), make_pair("YOLO teacher, SSD student"))


def test_response_on_priors_refuses_a_class_map() -> None:
    """Raw outputs go past it: class 0 of a teacher would teach class 0, whatever its name."""
    detector = toy_detector(seed=2)
    names = detector.spec.class_names
    teacher = NativeTeacher("t", detector, names, {names[0]: names[1], names[1]: names[0]})
    config = TermConfig(loss="response", params={"mode": "priors"})
    with pytest.raises(DistillationSetupError, match=f"{names[0]} -> {names[1]}, {names[1]} -> {names[0]}"):
        build_term(config, Pair(toy_detector(seed=1), [teacher]))
    build_term(config, Pair(toy_detector(seed=1), [NativeTeacher("t", detector, names)]))


def test_objectness_is_not_softened_on_priors() -> None:
    torch.manual_seed(0)
    teacher = DetectorOutput(torch.randn(1, 5, 2), torch.zeros(1, 5, 4), torch.randn(1, 5))
    gradients = []
    for temperature in (1.0, 4.0):
        objectness = torch.zeros(1, 5, requires_grad=True)
        student = DetectorOutput(teacher.cls_logits.clone(), teacher.bbox_regression, objectness)
        dense_response_losses(student, teacher, "sigmoid", temperature, 0.02)[0].backward()
        gradients.append(objectness.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_objectness_is_compared_by_a_loss_that_autocast_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # as a GPU's autocast does, which training in bf16 is
        raise RuntimeError("binary_cross_entropy and BCELoss are unsafe to autocast")

    monkeypatch.setattr(functional, "binary_cross_entropy", refuse)
    t = DetectorOutput(torch.zeros(1, 1, 2), torch.zeros(1, 1, 4), torch.tensor([[1.5]]))
    s = replace(t, objectness=torch.tensor([[-0.5]]))
    p, q = 1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(0.5))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    weight = 0.5 * p + 0.02  # confidence and the background's share; the loss is divided by 1 at least
    assert float(dense_response_losses(s, t, "sigmoid", 1.0, 0.02)[0]) == pytest.approx(weight * kl, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "params"),
    [
        ("response", {"temperature": 0}),
        ("response", {"temperature": "hot"}),
        ("response", {"cls_weight": -1.0}),
        ("cwd", {"temperature": float("nan")}),
        ("response", {"mode": "rows"}),
        ("feature", {"normalise": "batch"}),
        ("adversarial", {"game": "chess"}),
        ("adversarial", {"combine": "some"}),
        ("decoupled", {"foreground_mean": "pixels"}),
        ("gkd", {"prototypes": 2.5}),
    ],
)
def test_a_parameter_of_the_wrong_kind_is_named(loss: str, params: dict[str, object]) -> None:
    with pytest.raises(DistillationSetupError, match=f"{loss}: {next(iter(params))} cannot be this"):
        build_term(TermConfig(loss=loss, params=params), make_pair("equal"))


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    term = build_term(TermConfig(loss="response", params={"cls_weight": "1e-3"}), make_pair("equal"))
    assert term.cls_weight == 1e-3


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_dense_response_against_a_plain_loop(activation: str) -> None:
    torch.manual_seed(0)
    s, t = (DetectorOutput(torch.randn(2, 5, 3), torch.randn(2, 5, 4)) for _ in range(2))
    temperature, background = 2.0, 0.1
    cls, box = dense_response_losses(s, t, activation, temperature, background)  # type: ignore[arg-type]
    num = den = box_num = box_den = 0.0
    for b in range(2):
        for p in range(5):
            sl, tl = s.cls_logits[b, p], t.cls_logits[b, p]
            if activation == "softmax":
                tp, sp = (tl / temperature).softmax(0), (sl / temperature).softmax(0)
                kl = sum(float(x * (x / y).log()) for x, y in zip(tp, sp, strict=True))
                confidence = 1 - float(tl.softmax(0)[0])
            else:
                tp, sp = (tl / temperature).sigmoid(), (sl / temperature).sigmoid()
                kl = sum(
                    float(x * (x / y).log() + (1 - x) * ((1 - x) / (1 - y)).log()) for x, y in zip(tp, sp, strict=True)
                )
                confidence = float(tl.sigmoid().max())
            num, den = num + (confidence + background) * kl, den + confidence + background
            d = (s.bbox_regression[b, p] - t.bbox_regression[b, p]).abs()
            box_num += confidence * float(torch.where(d < 1, 0.5 * d * d, d - 0.5).mean())
            box_den += confidence
    assert float(cls) == pytest.approx(num / max(1, den) * temperature**2, rel=1e-4)
    assert float(box) == pytest.approx(box_num / max(1, box_den), rel=1e-4)


def test_distributions_over_distances_are_distilled_as_distributions() -> None:
    torch.manual_seed(0)
    s, t = (DetectorOutput(torch.randn(2, 5, 3), torch.randn(2, 5, 4 * 8)) for _ in range(2))
    _, box = dense_response_losses(s, t, "sigmoid", 1.0, 0.1, box_temperature=3.0)
    num = den = 0.0
    for b in range(2):
        for p in range(5):
            confidence = t.cls_logits[b, p].sigmoid().max().item()
            for side in range(4):
                at = slice(8 * side, 8 * side + 8)
                tp, sp = (x.bbox_regression[b, p, at].div(3).softmax(0).tolist() for x in (t, s))
                num += confidence * sum(x * math.log(x / y) for x, y in zip(tp, sp, strict=True)) / 4
            den += confidence
    assert box.item() == pytest.approx(9 * num / max(1, den), rel=1e-4)
    shifted = DetectorOutput(t.cls_logits, t.bbox_regression + 2.5)  # the same distributions
    assert dense_response_losses(shifted, t, "sigmoid", 1.0, 0.1)[1].item() == pytest.approx(0, abs=1e-5)


def test_equal_outputs_cost_nothing() -> None:
    torch.manual_seed(0)
    s = DetectorOutput(torch.randn(2, 5, 3), torch.randn(2, 5, 4))
    for activation in ("softmax", "sigmoid"):
        cls, box = dense_response_losses(s, s, activation, 1.0, 0.1)  # type: ignore[arg-type]
        assert float(cls) == pytest.approx(0, abs=1e-6)
        assert float(box) == 0


# -- masked (MGD, AMD) -----------------------------------------------------------------------------------------------


def test_amd_masks_the_cells_of_highest_attention() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 4, 5, 6)
    attention, mask = spatial_attention(features, 0.5), attention_mask(features, 0.4)
    for image in range(3):
        hidden = mask[image, 0] == 0
        assert int(hidden.sum()) == round(0.4 * 30)
        assert attention[image][hidden].min() >= attention[image][~hidden].max()
        assert float(attention[image].sum()) == pytest.approx(30, rel=1e-4)


def test_mgd_masks_at_random_and_amd_does_not() -> None:
    features = torch.randn(2, 4, 30, 30)
    assert float((random_mask(features, 0.65) == 0).float().mean()) == pytest.approx(0.65, abs=0.05)
    assert not torch.equal(random_mask(features, 0.65), random_mask(features, 0.65))
    assert torch.equal(attention_mask(features, 0.65), attention_mask(features, 0.65))


def test_amd_is_mgd_with_a_gate_and_another_mask() -> None:
    pair = make_pair("equal")
    amd, mgd = build_term(TermConfig(loss="amd"), pair), build_term(TermConfig(loss="mgd"), pair)
    assert isinstance(amd, AMDTerm)
    extra = {n for n, _ in amd.named_parameters()} - {n for n, _ in mgd.named_parameters()}
    assert extra
    assert all(name.startswith("gates.") for name in extra)


def test_what_amd_hides_does_not_reach_the_generator() -> None:
    pair = make_pair("equal")
    term = build_term(TermConfig(loss="amd"), pair)
    batch = toy_batch(pair.student, pair.teachers, term.student_taps)  # type: ignore[arg-type]
    assert isinstance(term, AMDTerm)
    maps = next(iter(term.level_maps(batch)))
    maps.raw_student.retain_grad()
    (term.gated(maps) * term.mask(maps)).sum().backward()
    hidden = term.mask(maps).expand_as(maps.student) == 0
    assert hidden.any()
    assert not (term.gated(maps) * term.mask(maps))[hidden].any()


# -- baselines -------------------------------------------------------------------------------------------------------


def test_cwd_and_pkd_against_plain_loops() -> None:
    pair = make_pair("equal")
    for name in ("cwd", "pkd"):
        term = build_term(TermConfig(loss=name), pair)
        assert isinstance(term, CWDTerm | PKDTerm)
        batch = toy_batch(pair.student, pair.teachers, term.student_taps)  # type: ignore[arg-type]
        maps = next(iter(term.level_maps(batch)))
        torch.manual_seed(0)  # maps without dead channels, whose correlation is undefined
        maps = replace(maps, student=torch.randn(2, 3, 4, 5), teacher=torch.randn(2, 3, 4, 5))
        got = float(term.level_loss(maps, batch).detach())
        values = []
        for c in range(maps.teacher.shape[1]):
            if name == "cwd":
                for b in range(len(maps.teacher)):
                    t, s = maps.teacher[b, c].flatten().softmax(0), maps.student[b, c].flatten().softmax(0)
                    values.append(float((t * (t / s).log()).sum()))
            else:
                t, s = maps.teacher[:, c].flatten(), maps.student[:, c].flatten()
                values.append(1 - float(torch.corrcoef(torch.stack([t, s]))[0, 1]))
        assert got == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_fgd_masks_share_a_boxs_weight_over_its_cells() -> None:
    inside, outside = focal_masks([torch.tensor([[0.0, 0, 40, 20]]), torch.zeros(0, 4)], (8, 8), (80, 80))
    assert float(inside[0].sum()) == pytest.approx(1.0)
    assert int((inside[0] > 0).sum()) == 8
    assert float(outside[0].sum()) == pytest.approx(1.0)
    assert not inside[1].any()
    assert not (inside[0] * outside[0]).any()


# -- information map -------------------------------------------------------------------------------------------------


def test_fgd_s_context_begins_as_the_identity() -> None:
    features = torch.randn(2, 8, 5, 5)
    assert torch.equal(GlobalContext(8)(features), features)


def test_information_is_highest_where_the_teacher_is_strongest() -> None:
    features = torch.zeros(1, 3, 4, 4)
    features[0, :, 2, 1] = -5.0
    information = backbone_information(features)
    assert int(information.flatten().argmax()) == 2 * 4 + 1
    assert float(information.mean()) == pytest.approx(1.0)


def test_confidence_lands_in_the_cell_of_its_row() -> None:
    confidence = torch.tensor([[0.2, 0.9, 0.4]])
    centres = torch.tensor([[5.0, 5.0], [6.0, 4.0], [35.0, 15.0]])
    grid = confidence_on_grid(confidence, centres, (4, 4), (40, 40))
    expected = torch.zeros(4, 4)
    expected[0, 0], expected[1, 3] = 0.9, 0.4
    assert torch.equal(grid[0], expected)


def test_information_map_needs_backbone_and_neck() -> None:
    pair = make_pair("equal")
    bare = ToyTeacher(toy_detector(seed=4))
    bare.tap_specs = {k: v for k, v in bare.tap_specs.items() if v.kind == "backbone"}
    with pytest.raises(DistillationSetupError, match="neck"):
        build_term(TermConfig(loss="information_map"), Pair(pair.student, [bare]))


# -- adversarial -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("game", ["alternating", "reversal"])
@pytest.mark.parametrize("combine", ["each", "mean"])
def test_the_game_trains_each_side_alone(game: str, combine: str) -> None:
    pair = make_pair("equal", teachers=2)
    config = TermConfig(loss="adversarial", params={"game": game, "combine": combine, "imitation_weight": 0.0})
    term = build_term(config, pair)
    loss, batch = run_term(term, pair)
    loss.backward()
    adversary = list(term.adversary_parameters())
    assert adversary
    assert all(p.grad is None for p in adversary), "the student's loss trains the discriminator"
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in pair.student.parameters())
    pair.student.zero_grad(set_to_none=True)
    opposed = term.adversary_loss(batch)
    assert opposed is not None
    opposed.backward()
    assert all(p.grad is not None for p in adversary)
    assert all(p.grad is None for p in pair.student.parameters()), "the discriminator's loss trains the student"


def test_the_discriminator_learns_and_its_accuracy_is_told() -> None:
    pair = make_pair("equal")
    term = build_term(TermConfig(loss="adversarial"), pair)
    assert isinstance(term, AdversarialTerm)
    optimizer = torch.optim.Adam(term.adversary_parameters(), lr=1e-2)
    accuracies = []
    for _ in range(30):
        _, batch = run_term(term, pair)
        loss = term.adversary_loss(batch)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracies.append(term.statistics()["discriminator_accuracy"])
    assert accuracies[-1] > max(0.9, accuracies[0])


def test_collapse_is_told_once() -> None:
    pair = make_pair("equal")
    term = build_term(TermConfig(loss="adversarial"), pair)
    assert isinstance(term, AdversarialTerm)
    told = []
    for _ in range(5):
        term._right, term._asked = 999, 1000
        term.statistics()
        told.append(term.warning())
    assert [message is not None for message in told] == [False, False, True, False, False]


def test_mean_maps_need_equal_channels() -> None:
    student = toy_detector(seed=1)
    teachers = [ToyTeacher(toy_detector(seed=2), "a"), ToyTeacher(toy_detector(width=0.5, seed=3), "b")]
    with pytest.raises(DistillationSetupError, match="equal channels"):
        build_term(TermConfig(loss="adversarial", params={"combine": "mean"}), Pair(student, teachers))


# -- decoupled -------------------------------------------------------------------------------------------------------


def test_the_gate_is_shut_where_the_student_is_better_and_picks_the_best_teacher() -> None:
    student = torch.tensor([0.1, 0.9, 0.5, 0.5])
    teachers = torch.tensor([[0.2, 0.3, 0.4, 0.5], [0.3, 0.1, 0.6, 0.7]])
    #         student better -> -1; second teacher; first teacher; a draw teaches nothing
    assert choose_teachers(student, teachers).tolist() == [-1, 1, 0, -1]


def test_rows_inside_objects_are_no_background() -> None:
    priors = torch.tensor([[10.0, 10, 4, 4], [30, 30, 4, 4], [50, 50, 20, 20], [80, 80, 4, 4]])
    boxes = torch.tensor([[0.0, 0, 3, 3], [20, 20, 40, 40], [0, 0, 1, 1], [9, 9, 31, 31]])
    objects = torch.tensor([[5.0, 5, 25, 25], [41, 41, 61, 61]])
    # inside an object with a poor box; free; a prior on an object; outside, but its box found an object
    assert background_rows(priors, boxes, objects).tolist() == [False, True, False, True]
    assert background_rows(priors, boxes, torch.tensor([[8.0, 8, 30, 30]])).tolist() == [False, True, True, False]
    assert background_rows(priors, boxes, torch.zeros(0, 4)).all()


def test_background_kl_against_a_plain_loop() -> None:
    s, t = torch.tensor([[0.2, 0.7]]), torch.tensor([[0.1, 0.4]])
    expected = sum(
        float(b * (b / a).log() + (1 - b) * ((1 - b) / (1 - a)).log()) for a, b in zip(s[0], t[0], strict=True)
    )
    assert float(background_kl(s, t)) == pytest.approx(expected, rel=1e-5)


def test_a_perfect_student_learns_nothing_on_the_foreground() -> None:
    pair = make_pair("equal")
    term = build_term(TermConfig(loss="decoupled", params={"background_weight": 0.0}), pair)
    assert isinstance(term, DecoupledTerm)
    batch = toy_batch(pair.student, pair.teachers, term.student_taps)  # type: ignore[arg-type]
    blind = TeacherView(
        "blind",
        1.0,
        type(batch.fused)([torch.zeros(0, 4)] * 3, [torch.zeros(0, 2)] * 3),
        taps=batch.teachers[0].taps,
    )
    loss = term(DistillBatch(batch.images, batch.output, batch.targets, [blind], batch.fused, 0, 4))
    assert float(loss.detach()) == 0.0
    assert term.statistics() == {"gate_open": 0.0}


def test_each_object_counts_once_whatever_its_size() -> None:
    owner = torch.tensor([[[0, 0, -1], [0, 0, 1]], [[-1, -1, -1], [-1, -1, -1]], [[2, 2, 2], [-1, -1, -1]]])
    shares = object_shares(owner)
    third = 1 / 3
    expected = [[[0.25, 0.25, 0], [0.25, 0.25, 1]], [[0.0] * 3] * 2, [[third] * 3, [0.0] * 3]]
    torch.testing.assert_close(shares, torch.tensor(expected))


@pytest.mark.parametrize("mean", ["objects", "cells"])
def test_the_foreground_against_a_plain_loop(mean: str) -> None:
    pair = make_pair("equal")
    term = build_term(TermConfig(loss="decoupled", params={"background_weight": 0.0, "foreground_mean": mean}), pair)
    assert isinstance(term, DecoupledTerm)
    batch = toy_batch(pair.student, pair.teachers, term.student_taps)  # type: ignore[arg-type]
    boxes, scores = pair.student.decode(batch.output)
    choices = term._choices(batch, boxes.detach(), scores.detach())
    assert any((c >= 0).any() for c in choices)  # else there is nothing to compare
    expected = 0.0
    for maps in term.level_maps(batch):
        grid = tuple(maps.student.shape[-2:])
        total, weight = 0.0, 0.0
        for image, gt in enumerate(batch.targets.boxes_xyxy):
            owner = object_maps([gt], grid, term.input_hw)[0]
            for index in owner.unique().tolist():
                if index < 0:
                    continue
                cells = (owner == index).nonzero().tolist()
                share = 1 / len(cells) if mean == "objects" else 1.0
                for y, x in cells:
                    weight += share
                    if choices[image][index] == maps.teacher_index:
                        s, t = maps.student[image, :, y, x], maps.teacher[image, :, y, x]
                        total += share * float(1 - functional.cosine_similarity(s.detach(), t, dim=0))
        expected += total / max(weight, 1.0) / len(term.levels[maps.teacher_index])
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-4)


# -- GKD -------------------------------------------------------------------------------------------------------------


def plain_pursuit(student: Tensor, teacher: Tensor, count: int) -> list[int]:
    """Matching pursuit as slow as it can be written."""
    spaces = [student.clone(), teacher.clone()]
    atoms = [student, teacher]
    taken: list[int] = []
    for _ in range(count):
        gains = []
        for j in range(len(student)):
            gain = 0.0
            for residual, atom in zip(spaces, atoms, strict=True):
                explained = sum(float(residual[i] @ atom[j]) ** 2 for i in range(len(residual)))
                gain += explained / sum(float(r @ r) for r in residual)
            gains.append(-1.0 if j in taken else gain)
        best = max(range(len(gains)), key=gains.__getitem__)
        taken.append(best)
        for k, residual in enumerate(spaces):
            direction = residual[best] / residual[best].norm()
            spaces[k] = torch.stack([r - (r @ direction) * direction for r in residual])
    return taken


def test_prototype_search_against_a_plain_reference() -> None:
    torch.manual_seed(0)
    student = functional.normalize(torch.randn(25, 6, dtype=torch.float64), dim=1)
    teacher = functional.normalize(torch.randn(25, 9, dtype=torch.float64), dim=1)
    assert joint_matching_pursuit(student, teacher, 5).tolist() == plain_pursuit(student, teacher, 5)


def test_density_against_a_plain_loop() -> None:
    torch.manual_seed(0)
    rows = functional.normalize(torch.randn(8, 5), dim=1)
    for i in range(8):
        mean = sum(float(rows[i] @ rows[j]) for j in range(8) if j != i) / 7
        assert float(density(rows)[i]) == pytest.approx(mean, abs=1e-5)


def test_the_same_instances_index_both_prototype_sets() -> None:
    torch.manual_seed(0)
    student = functional.normalize(torch.randn(60, 6), dim=1)
    teacher = functional.normalize(torch.randn(60, 9), dim=1)
    found = search_prototypes(student, teacher, count=10)
    assert len(found.index) == 10
    assert len(set(found.index.tolist())) == 10
    assert torch.equal(found.student, student[found.index])
    assert torch.equal(found.teacher, teacher[found.index])
    for features in (student, teacher):
        limit = torch.quantile(density(features), 0.4)
        assert bool((density(features)[found.index] >= limit).all())


def test_robust_weight_is_one_where_both_spaces_agree() -> None:
    basis = torch.eye(3)
    prototypes = Prototypes(basis[:1], basis[:1], torch.tensor([0]))
    both, odd = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 1, 0]])
    assert float(robust_weights(both, both, prototypes)) == 1.0
    assert float(robust_weights(both, odd, prototypes)) == 0.0
    assert float(robust_weights(both, -both, prototypes)) == 0.0, "below 0 it would push the student away"


def test_gkd_finds_prototypes_after_the_first_epoch() -> None:
    pair = make_pair("equal")
    term = build_term(TermConfig(loss="gkd", params={"min_side": 10.0}), pair)
    assert isinstance(term, GKDTerm)
    term.begin_epoch(0, 4)
    first, _ = run_term(term, pair, epoch=0)
    assert not term.prototypes[0]
    term.begin_epoch(1, 4)
    assert set(term.prototypes[0]) == {0, 1}
    copy = build_term(TermConfig(loss="gkd", params={"min_side": 10.0}), pair)
    copy.load_state_dict(term.state_dict())
    assert isinstance(copy, GKDTerm)
    now, _ = run_term(term, pair, epoch=1)
    again, _ = run_term(copy, pair, epoch=1)
    assert now.item() == pytest.approx(again.item())
    assert first.item() != pytest.approx(now.item(), rel=1e-4), "prototypes change nothing"


def test_gkd_s_bank_holds_each_large_object_under_its_own_features() -> None:
    pair = make_pair("equal")
    term = build_term(TermConfig(loss="gkd", params={"min_side": 20.0}), pair)
    assert isinstance(term, GKDTerm)
    _, batch = run_term(term, pair)
    level = term.levels[0][0]
    student, teacher = batch.output.taps[level.student.name], batch.teachers[0].taps[level.teacher.name]
    expected: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for i, (boxes, labels) in enumerate(zip(batch.targets.boxes_xyxy, batch.targets.labels, strict=True)):
        for box, label in zip(boxes, labels.tolist(), strict=True):
            if min(box[2] - box[0], box[3] - box[1]) >= 20:
                pooled = (pool_boxes(m, box[None], (96, 96)) for m in (student[i], standardise(teacher)[i]))
                expected.setdefault(str(label), []).append((i, *(functional.normalize(p, dim=1)[0] for p in pooled)))
    assert sum(map(len, expected.values())) >= 3, "of several images"
    found = term.banks[0].state()
    assert found.keys() == expected.keys()
    for label, rows in expected.items():
        assert found[label][0].tolist() == [row[0] for row in rows]
        for column in (1, 2):
            assert torch.allclose(found[label][column], torch.stack([row[column] for row in rows]), atol=1e-5)


def test_gkd_pools_objects_on_the_finest_level_however_taps_are_named() -> None:
    pair = make_pair("equal")
    widths = []
    for names in (("backbone.s8", "backbone.s16"), ("backbone.s16", "backbone.s8")):
        torch.manual_seed(0)
        term = build_term(TermConfig(loss="gkd", student_taps=names, params={"min_side": 10.0}), pair)
        assert isinstance(term, GKDTerm)
        run_term(term, pair)
        widths.append([features.shape[1] for _, *spaces in term.banks[0].state().values() for features in spaces])
    assert widths[0] == widths[1]


def test_gkd_without_prototypes_says_so_once() -> None:
    pair = make_pair("equal")
    for min_side, silent in ((96.0, False), (10.0, True)):  # of the input; of the toy batch's objects
        term = build_term(TermConfig(loss="gkd", params={"min_side": min_side}), pair)
        told = []
        for epoch in range(3):
            term.begin_epoch(epoch, 3)
            run_term(term, pair, epoch)
            told.append(term.warning() is None)
        assert told == [True, silent, True]


def test_gkd_that_was_given_no_batch_blames_no_object_for_it() -> None:
    """As with `weight: 0`, for which no term is computed."""
    term = build_term(TermConfig(loss="gkd"), make_pair("equal"))
    for epoch in range(2):
        term.begin_epoch(epoch, 3)
    assert term.warning() is None


def test_gkd_goes_on_in_bf16_once_it_has_prototypes() -> None:
    pair = make_pair("equal")
    term = build_term(TermConfig(loss="gkd", params={"min_side": 10.0}), pair)
    assert isinstance(term, GKDTerm)
    for epoch in range(2):
        term.begin_epoch(epoch, 4)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = run_term(term, pair, epoch)
    loss.backward()
    assert term.prototypes[0][0].student.dtype == torch.float32
    assert math.isfinite(loss.item())


def test_the_global_term_is_on_and_can_be_turned_off() -> None:
    pair = make_pair("equal")
    values = []
    for weight in (5.0, 0.0):
        torch.manual_seed(0)
        term = build_term(TermConfig(loss="gkd", params={"min_side": 10.0, "global_weight": weight}), pair)
        run_term(term, pair)
        term.begin_epoch(1, 4)
        values.append(run_term(term, pair, epoch=1)[0].item())
    assert values[0] > values[1]


# -- objects ---------------------------------------------------------------------------------------------------------


def test_pooling_over_a_box_against_a_fine_average() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 4, 5)
    box = torch.tensor([[12.0, 7.0, 41.0, 33.0]])
    fine = features.repeat_interleave(10, 1).repeat_interleave(10, 2)  # input of 40 x 50: ten pixels a cell
    expected = fine[:, 7:33, 12:41].mean((1, 2))
    assert torch.allclose(pool_boxes(features, box, (40, 50))[0], expected, atol=1e-5)


def test_cells_belong_to_the_smallest_box_and_no_object_is_lost() -> None:
    boxes = torch.tensor([[0.0, 0, 40, 40], [10, 10, 20, 20], [33, 33, 35, 35]])
    owner = object_maps([boxes], (4, 4), (40, 40))[0]
    expected = torch.zeros(4, 4, dtype=torch.int64)
    expected[1, 1], expected[3, 3] = 1, 2
    assert torch.equal(owner, expected)


def test_quality_is_score_times_overlap() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    scores = torch.tensor([[0.5, 0.9], [0.8, 0.1]])
    quality, row = object_quality(boxes, scores, torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]))
    assert float(quality) == pytest.approx(0.5)
    assert int(row) == 0
    assert float(pairwise_iou(boxes[1:], boxes[:1])) == pytest.approx(0.5)
    quality, row = object_quality(boxes, scores, torch.tensor([[50.0, 50, 60, 60]]), torch.tensor([0]))
    assert (float(quality), int(row)) == (0, -1), "no row overlaps it, so none of them is its own"


def test_standardised_maps_have_no_scale() -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 3, 5, 5)
    assert torch.allclose(standardise(a), standardise(a * 7 + 3), atol=1e-3)


def test_large_maps_in_fp16_keep_their_signal() -> None:
    """Their squares pass fp16's largest number: the variance would be infinite, and every cell 0."""
    torch.manual_seed(0)
    a = 400 * torch.randn(2, 3, 5, 5)
    assert torch.allclose(standardise(a.half()), standardise(a), atol=1e-2)


@pytest.mark.parametrize("name", sorted(TERMS))
def test_a_term_that_says_it_reads_no_boxes_does_without(name: str) -> None:
    pair = make_pair("equal")
    for params in ({}, {"mode": "priors"}) if name == "response" else ({},):
        term = build_term(TermConfig(loss=name, params=params), pair)
        term.train()
        torch.manual_seed(0)
        loss, batch = run_term(term, pair)
        bare = replace(batch, teachers=[replace(v, soft=NO_ANSWERS) for v in batch.teachers], fused=NO_ANSWERS)
        torch.manual_seed(0)
        if term.needs_answers:
            with pytest.raises(Exception, match=r".*"):  # whatever comes of it, it is not taken for silence
                term(bare)
        else:
            assert torch.equal(term(bare), loss)
