"""The Distiller in the loop: terms reach the student, weight 0 is exactly nothing, ratios are met, answers are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.checkpoint import load_detector
from edgekd.console import Terminal
from edgekd.detectors.base import Detector
from edgekd.errors import DistillationSetupError, TeacherError
from edgekd.recipe import DistillConfig, Recipe, TermConfig
from edgekd.teachers.answers import collect_answers
from edgekd.teachers.base import TeacherOutput
from edgekd.teaching import hear_teachers
from edgekd.training.distill import Distiller, TeacherSet, fuse_answers
from edgekd.training.learning import Adversary, Pull, PullGuard
from edgekd.training.runlog import read_log
from edgekd.training.setup import frozen_layers
from edgekd.training.train import TrainJob, is_measured, train_detector
from edgekd.types import Dataset, SoftDetections
from edgekd.workspace import Workspace
from tests.test_train import make_job, step_losses
from tests.toy import CLASSES, ToyTeacher, toy_batch, toy_detector


def oracle(dataset: Dataset, noise: float = 0.0) -> dict[str, SoftDetections]:
    """A teacher that knows the truth, almost."""
    rng = np.random.default_rng(0)
    answers = {}
    for record in dataset.records:
        probs = np.full((len(record.labels), len(CLASSES)), 0.05, np.float32)
        probs[np.arange(len(record.labels)), record.labels] = 0.9
        boxes = record.boxes_xyxy + rng.normal(0, noise, record.boxes_xyxy.shape).astype(np.float32)
        answers[record.image_id] = SoftDetections(boxes, probs)
    return answers


def distilling(job: TrainJob, config: DistillConfig, teachers: int = 1) -> TrainJob:
    natives = tuple(ToyTeacher(toy_detector(seed=9 + i), f"t{i}") for i in range(teachers))
    answers = tuple(oracle(job.dataset, noise=float(i)) for i in range(teachers))

    def make(student: Detector) -> Distiller:
        weights = tuple(1 / teachers for _ in range(teachers))
        fused = fuse_answers(answers[:1], lambda found: found[0])
        return Distiller(student, TeacherSet(natives, weights, lambda found: found[0], answers, fused), config)

    return replace(job, make_distiller=make, inputs={**job.inputs, "distill": repr(config)})


def test_every_part_is_logged_with_its_pull(tmp_path: Path) -> None:
    config = DistillConfig(terms=(TermConfig(loss="response"), TermConfig(loss="feature")))
    job = distilling(make_job(tmp_path, epochs=1), config)
    train_detector(job)
    first = next(r for r in read_log(job.out) if r["event"] == "step")
    assert {"det", "det_cls", "det_box", "response", "feature", "loss"} <= set(first["losses"])
    assert set(first["pull"]) == {"det", "response", "feature"}
    assert all(value > 0 for value in first["pull"].values())
    assert first["gradient_ratio"] == pytest.approx(
        (first["pull"]["response"] + first["pull"]["feature"]) / first["pull"]["det"]
    )
    losses = first["losses"]
    assert losses["loss"] == pytest.approx(losses["det"] + losses["response"] + losses["feature"], rel=1e-5)


def test_a_term_of_weight_zero_changes_nothing_bit_for_bit(tmp_path: Path) -> None:
    plain = make_job(tmp_path, "plain", epochs=2)
    config = DistillConfig(terms=(TermConfig(loss="feature", weight=0.0), TermConfig(loss="response", weight=0.0)))
    weightless = distilling(make_job(tmp_path, "weightless", epochs=2), config)
    train_detector(plain)
    train_detector(weightless)
    ours, theirs = (load_detector(job.out).state_dict() for job in (weightless, plain))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert step_losses(plain.out) == step_losses(weightless.out)


def test_a_gradient_ratio_is_met_whatever_the_scale(tmp_path: Path) -> None:
    config = DistillConfig(terms=(TermConfig(loss="amd", gradient_ratio=0.25),))
    job = distilling(make_job(tmp_path, epochs=1), config)
    train_detector(job)
    first = next(r for r in read_log(job.out) if r["event"] == "step")
    assert first["pull"]["amd"] == pytest.approx(0.25 * first["pull"]["det"], rel=1e-3)


def test_gradients_are_measured_often_while_they_change_by_the_step(tmp_path: Path) -> None:
    config = DistillConfig(terms=(TermConfig(loss="amd", gradient_ratio=0.25),))
    job = distilling(make_job(tmp_path, epochs=4), config)
    train_detector(job)
    steps = [record for record in read_log(job.out) if record["event"] == "step"]
    assert 9 <= len(steps) <= 16
    assert [record["step"] for record in steps if "pull" in record] == [0, 1, 2, 4, 8]
    assert [step for step in range(160) if is_measured(step)] == [0, 1, 2, 4, 8, 16, 24, 32, 40, 48, 50, 100, 150]


def test_a_gradient_ratio_holds_from_the_first_batch_of_an_accumulated_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[float] = []
    weight_of = Distiller.weight_of

    def noted(self: Distiller, index: int) -> float:
        weights.append(weight_of(self, index))
        return weights[-1]

    monkeypatch.setattr(Distiller, "weight_of", noted)
    monkeypatch.setattr("edgekd.training.train.is_measured", lambda step: step == 0)
    config = DistillConfig(terms=(TermConfig(loss="amd", gradient_ratio=0.25),))
    train_detector(distilling(make_job(tmp_path, epochs=1, accumulate=2), config))
    assert len(weights) > 2
    assert len(set(weights)) == 1


def test_a_ratio_that_cannot_be_measured_leaves_the_terms_own_weight() -> None:
    teachers = (ToyTeacher(toy_detector(seed=9)),)
    config = DistillConfig(terms=(TermConfig(loss="amd", gradient_ratio=0.25),))
    distiller = Distiller(toy_detector(), TeacherSet(teachers, (1.0,), lambda found: found[0], ({},), {}), config)
    distiller.update_ratio_weights(2.0, [0.0])
    assert distiller.weight_of(0) == 2e-5
    distiller.update_ratio_weights(2.0, [4.0])
    assert distiller.weight_of(0) == 0.125
    distiller.update_ratio_weights(2.0, [16.0])
    assert distiller.weight_of(0) == 0.0625, "half-way between 1/8 and 1/32"
    distiller.update_ratio_weights(2.0, [512.0])
    assert distiller.weight_of(0) == 2 / 1024, "never more than twice what was measured to be too much"
    distiller.update_ratio_weights(2.0, [2.0**-4])
    assert distiller.weight_of(0) == 0.125, "up half-way, however far it is"
    for detection, norm in ((2.0, math.nan), (2.0, math.inf), (math.nan, 4.0), (math.inf, 4.0)):
        distiller.update_ratio_weights(detection, [norm])
        assert distiller.weight_of(0) == 0.125


def test_a_term_that_fades_weighs_what_is_left_of_training(tmp_path: Path) -> None:
    config = DistillConfig(terms=(TermConfig(loss="feature", fade=True), TermConfig(loss="response")))
    job = distilling(make_job(tmp_path, epochs=4), config)
    train_detector(job)
    steps = [record for record in read_log(job.out) if record["event"] == "step"]
    assert {record["epoch"] for record in steps} == {0, 1, 2, 3}
    for record in steps:
        losses = record["losses"]
        expected = losses["det"] + (1 - record["epoch"] / 4) * losses["feature"] + losses["response"]
        assert losses["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_gradient_ratio_fades_unless_the_recipe_says_otherwise() -> None:
    teachers = (ToyTeacher(toy_detector(seed=9)),)
    student = toy_detector()
    given = TeacherSet(teachers, (1.0,), lambda found: found[0], ({},), {})
    terms = (
        TermConfig(loss="gkd", gradient_ratio=0.25),
        TermConfig(loss="gkd", gradient_ratio=0.25, fade=False),
        TermConfig(loss="response", gradient_ratio=0.25),
    )
    distiller = Distiller(student, given, DistillConfig(terms=terms))
    norm, pulls = 5.0, []
    for epoch in (0, 1, 2, 3):
        distiller(toy_batch(student, teachers, distiller.student_taps, epoch))
        distiller.update_ratio_weights(2.0, [norm] * 3)
        pulls.append([distiller.weight_of(index) * norm for index in range(3)])
    assert np.array(pulls) == pytest.approx(np.array([[0.5, 0.375, 0.25, 0.125], [0.5] * 4, [0.5] * 4]).T)


def test_which_maps_teach_which_is_told(tmp_path: Path) -> None:
    config = DistillConfig(terms=(TermConfig(loss="pkd"), TermConfig(loss="response"), TermConfig(loss="cwd")))
    job = distilling(make_job(tmp_path, epochs=1), config)
    train_detector(job)
    told = [r["message"] for r in read_log(job.out) if r["event"] == "note"]
    assert told == ["pkd, cwd: from t0, neck.l0 6x6 <- neck.l0 6x6, neck.l1 3x3 <- neck.l1 3x3"]


def test_a_term_on_frozen_maps_is_refused_or_told() -> None:
    student, teacher = toy_detector(), ToyTeacher(toy_detector(seed=9))
    frozen_layers(student, 8, pretrained=True)
    for taps in (("backbone.s8",), ("backbone.s8", "backbone.s16")):
        config = DistillConfig(terms=(TermConfig(loss="feature", student_taps=taps, teacher_taps=taps),))
        distiller = Distiller(student, TeacherSet((teacher,), (1.0,), lambda found: found[0], ({},), {}), config)
        batch = toy_batch(student, [teacher], distiller.student_taps)
        if len(taps) == 1:
            with pytest.raises(DistillationSetupError, match="frozen"):
                distiller(batch)
        else:
            distiller(batch)
            (told,) = distiller.warnings()
            assert "backbone.s8 are frozen" in told
            distiller(batch)
            assert not distiller.warnings()


def test_an_unmoving_term_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.training.train.MEASURE_EVERY", 1)
    config = DistillConfig(terms=(TermConfig(loss="feature", weight=1e-9),))
    job = distilling(make_job(tmp_path, epochs=2), config)
    train_detector(job)
    told = [r["message"] for r in read_log(job.out) if r["event"] == "warning"]
    assert len(told) == 1
    assert "next to nothing" in told[0]


@pytest.mark.parametrize(
    ("ratios", "told"),
    [
        ([30, 25, 21, 40], [2]),
        ([1, 30, 30, 30, 30, 1, 50, 50, 50], [3]),  # at any time, but once
        ([30, 30, 1, 30, 30], []),
        ([1, 0.001, 0.001, 0.001], []),  # faded
        ([0.001, 0.001, 0.001, 0.001], [2]),
    ],
)
def test_a_term_that_drowns_detection_is_told_once_whenever_it_does(ratios: list[float], told: list[int]) -> None:
    guard = PullGuard()
    assert [at for at, ratio in enumerate(ratios) if guard.check(Pull(2.0, {"a": 2.0 * ratio, "b": 2.0}))] == told


def test_export_drops_what_the_terms_added(tmp_path: Path) -> None:
    config = DistillConfig(terms=(TermConfig(loss="feature"),))
    job = distilling(make_job(tmp_path, epochs=1), config)
    train_detector(job)
    plain = set(toy_detector().state_dict())
    assert set(load_detector(job.out).state_dict()) == plain


@pytest.mark.parametrize(
    ("terms", "words"), [((), "terms"), ((TermConfig(loss="feature", student_taps=("nothing",)),), "nothing")]
)
def test_a_pair_that_cannot_work_fails_before_step_0(tmp_path: Path, terms: tuple[TermConfig, ...], words: str) -> None:
    job = distilling(make_job(tmp_path), DistillConfig(terms=terms))
    with pytest.raises(DistillationSetupError, match=words):
        train_detector(job)
    assert not step_losses(job.out)


def test_the_adversary_takes_one_step_on_the_mean_of_its_batches() -> None:
    layers = [torch.nn.Linear(3, 1) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    whole, halves = (Adversary(list(layer.parameters())) for layer in layers)
    inputs = torch.randn(4, 3)
    whole.gather(layers[0](inputs).square().mean())
    for half in inputs.split(2):
        halves.gather(layers[1](half).square().mean() / 2)
    for adversary in (whole, halves):
        adversary.step()
        adversary.step()  # of nothing
    ours, theirs = (adversary.optimizer.state[adversary.parameters[0]] for adversary in (whole, halves))
    assert ours["step"] == theirs["step"] == 1
    assert torch.allclose(ours["exp_avg"], theirs["exp_avg"])


def test_the_adversary_is_trained_by_its_own_optimiser(tmp_path: Path) -> None:
    config = DistillConfig(terms=(TermConfig(loss="adversarial"),))
    job = distilling(make_job(tmp_path, epochs=2), config, teachers=2)
    train_detector(job)
    steps = [r for r in read_log(job.out) if r["event"] == "step"]
    assert steps[-1]["losses"]["adversary"] < steps[0]["losses"]["adversary"]
    assert 0 <= steps[0]["statistics"]["adversarial.discriminator_accuracy"] <= 1


def test_one_of_two_games_can_be_left_out(tmp_path: Path) -> None:
    terms = (TermConfig(loss="adversarial"), TermConfig(loss="adversarial", weight=0.0, student_taps=("neck.l0",)))
    job = distilling(make_job(tmp_path, epochs=1), DistillConfig(terms=terms))
    train_detector(job)
    (first, *_) = [r for r in read_log(job.out) if r["event"] == "step"]
    assert "adversarial" in first["losses"]
    assert "adversarial-2" not in first["losses"]


@pytest.mark.parametrize("loss", ["gkd", "adversarial"])
def test_a_distillation_resumes_step_for_step(tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DistillConfig(terms=(TermConfig(loss=loss, params={"min_side": 8.0} if loss == "gkd" else {}),))

    def job(out: str) -> TrainJob:
        return distilling(make_job(tmp_path, out, epochs=2, checkpoint_every=1), config)

    train_detector(job("whole"))
    _stop_after(4, monkeypatch)
    with pytest.raises(RuntimeError, match="cut off"):
        train_detector(job("cut"))
    monkeypatch.undo()
    train_detector(job("cut"))
    assert step_losses(tmp_path / "cut") == step_losses(tmp_path / "whole")


def _stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.training import train

    original: Callable[..., dict[str, float]] = train._Trainer._step

    def step(self: train._Trainer, *arguments: object) -> dict[str, float]:
        if self.progress.step == steps:
            raise RuntimeError("cut off")
        return original(self, *arguments)

    monkeypatch.setattr(train._Trainer, "_step", step)


# -- answers ---------------------------------------------------------------------------------------------------------


class Counting(ToyTeacher):
    """Counts how often it is asked."""

    asked = 0

    def answer(self, image: np.ndarray) -> SoftDetections:
        type(self).asked += 1
        return super().answer(image)


def test_answers_are_asked_once_and_again_when_anything_changes(tmp_path: Path) -> None:
    dataset = make_job(tmp_path).dataset
    teacher, folder = Counting(toy_detector(seed=9)), tmp_path / "answers"
    Counting.asked = 0
    first = collect_answers(teacher, dataset, folder, {"sha256": "a"})
    assert Counting.asked == len(dataset)
    again = collect_answers(teacher, dataset, folder, {"sha256": "a"})
    assert Counting.asked == len(dataset)
    for image_id, answer in first.items():  # to the bit, or a resumed run would not repeat one never killed
        assert np.array_equal(answer.boxes_xyxy, again[image_id].boxes_xyxy)
        assert np.array_equal(answer.class_probs, again[image_id].class_probs)
    for identity in "baba":  # as a comparison's recipes do by turns
        collect_answers(teacher, dataset, folder, {"sha256": identity})
    assert Counting.asked == 2 * len(dataset)
    path = dataset.records[0].path
    path.write_bytes(dataset.records[1].path.read_bytes())
    collect_answers(teacher, dataset, folder, {"sha256": "b"})
    assert Counting.asked == 3 * len(dataset)


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    dataset = make_job(tmp_path).dataset
    teacher, folder = ToyTeacher(toy_detector(seed=9)), tmp_path / "answers"
    first = collect_answers(teacher, dataset, folder, {})
    shard = next(folder.glob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:100])
    assert collect_answers(teacher, dataset, folder, {}).keys() == first.keys()


def test_a_black_box_that_finds_nothing_is_an_error(tmp_path: Path) -> None:
    class Blind(ToyTeacher):
        def answer(self, image: np.ndarray) -> SoftDetections:
            return SoftDetections.empty(len(CLASSES))

    dataset, native = make_job(tmp_path).dataset, Blind(toy_detector())
    assert len(collect_answers(native, dataset, tmp_path / "native", {})) == len(dataset)  # young, not misread
    native.detector = None  # type: ignore[assignment]  # a black box
    with pytest.raises(DistillationSetupError, match="finds nothing"):
        collect_answers(native, dataset, tmp_path / "answers", {})


def test_a_teacher_that_fails_is_named_with_the_image(tmp_path: Path) -> None:
    class Broken(ToyTeacher):
        def answer(self, image: np.ndarray) -> SoftDetections:
            return SoftDetections(np.full((1, 4), np.nan, np.float32), np.ones((1, 2), np.float32))

    dataset = make_job(tmp_path).dataset
    with pytest.raises(TeacherError) as caught:
        collect_answers(Broken(toy_detector(), "broken"), dataset, tmp_path / "answers", {})
    assert "broken" in str(caught.value)
    assert dataset.records[0].path.name in str(caught.value)


@pytest.mark.parametrize(("terms", "boxes"), [(("pkd",), False), (("pkd", "response"), True)])
def test_teachers_run_online_are_asked_for_boxes_where_a_term_reads_them(
    terms: tuple[str, ...], boxes: bool, tmp_path: Path
) -> None:
    asked: list[bool] = []

    class Noting(ToyTeacher):
        def respond(self, images_u8: torch.Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
            asked.append(boxes)
            return super().respond(images_u8, taps, boxes)

    config = DistillConfig(terms=tuple(TermConfig(loss=name) for name in terms), answers="online")
    teachers = (Noting(toy_detector(seed=9)),)

    def make(student: Detector) -> Distiller:
        return Distiller(student, TeacherSet(teachers, (1.0,), lambda found: found[0]), config)

    train_detector(replace(make_job(tmp_path, epochs=1), make_distiller=make))
    assert set(asked) == {boxes}


def test_whole_images_are_put_to_teachers_only_where_a_term_reads_boxes(tmp_path: Path) -> None:
    class Blind(ToyTeacher):
        def answer(self, image: np.ndarray) -> SoftDetections:
            return SoftDetections.empty(len(CLASSES))

    job = make_job(tmp_path)
    assert job.val is not None
    for index, (loss, kept) in enumerate((("response", True), ("pkd", False))):
        config = DistillConfig(terms=(TermConfig(loss=loss),))
        recipe = Recipe(name="r", data=job.data, student=job.model, train=job.train, distill=config)
        work = Workspace(recipe, job.dataset, job.val, "cpu", Terminal(quiet=True))
        answers = tmp_path / f"answers-{index}"
        for kind, sees in ((ToyTeacher, True), (Blind, False)):
            teacher = kind(toy_detector(seed=9), kind.__name__)
            distiller = Distiller(toy_detector(), TeacherSet((teacher,), (1.0,), lambda found: found[0]), config)
            if sees:
                hear_teachers(work, distiller, [{}], answers)
                assert (answers / "ToyTeacher" / "manifest.json").is_file() is kept
                assert len(distiller.loader_answers) == (1 if kept else 0)  # which are the fused ones too
            else:
                with pytest.raises(DistillationSetupError, match="no teacher finds anything"):
                    hear_teachers(work, distiller, [{}], answers)
