from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.errors import DistillationSetupError, UserError
from edgekd.preprocess import normalise
from edgekd.recipe import EnsembleConfig, OnnxTeacher
from edgekd.teachers import build_teacher
from edgekd.teachers.ensemble import Ensemble, learn_weights
from edgekd.teachers.native import NativeTeacher
from edgekd.teachers.predicted import PredictorTeacher
from edgekd.types import Detections, ImageRecord, SoftDetections
from tests.toy import CLASSES, toy_detector
from tests.toy_onnx import write_constant_detector

NAMES = ("cat", "dog")
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
FUSIONS = ("wbf", "nms", "soft-nms")


def black_box(folder: Path, name: str, rows: list[tuple[list[float], list[float]]], names=NAMES) -> PredictorTeacher:  # type: ignore[no-untyped-def]
    boxes = np.array([[row[0] for row in rows]], np.float32)
    scores = np.array([[row[1] for row in rows]], np.float32)
    path = write_constant_detector(folder / f"{name}.onnx", {"boxes": boxes, "scores": scores})
    config = OnnxTeacher(name=name, onnx=str(path), class_names=names, box_format="xyxy", resize="stretch")
    return build_teacher(config, NAMES)


@pytest.fixture
def trio(tmp_path: Path) -> list[PredictorTeacher]:
    return [
        black_box(tmp_path, "a", [([10, 10, 40, 40], [0.8, 0.1]), ([60, 30, 90, 60], [0.1, 0.6])]),
        black_box(tmp_path, "b", [([12, 10, 40, 42], [0.6, 0.2]), ([5, 50, 20, 62], [0.3, 0.0])]),
        black_box(tmp_path, "c", [([10, 12, 42, 40], [0.7, 0.0])]),
    ]


def test_wbf_of_black_boxes_by_hand(trio: list[PredictorTeacher]) -> None:
    fused = Ensemble(trio, EnsembleConfig()).answer(IMAGE)
    np.testing.assert_allclose(fused.class_probs, [[0.7, 0.1], [0.1 / 3, 0.2], [0.1, 0]], rtol=1e-5)
    mean = (
        0.8 * np.array([10, 10, 40, 40]) + 0.6 * np.array([12, 10, 40, 42]) + 0.7 * np.array([10, 12, 42, 40])
    ) / 2.1
    np.testing.assert_allclose(fused.boxes_xyxy[0], mean, rtol=1e-5)


def test_crowded_pictures_may_have_more_boxes_than_usual(tmp_path: Path) -> None:
    rows = [([8 * (i % 12), 5 * (i // 12), 8 * (i % 12) + 6, 5 * (i // 12) + 4], [0.9, 0.1]) for i in range(120)]
    teacher = black_box(tmp_path, "a", rows)
    assert len(teacher.answer(IMAGE)) == len(teacher.detect(IMAGE)) == 100
    teacher.answer_at_most(110)
    assert len(teacher.answer(IMAGE)) == len(teacher.detect(IMAGE)) == 110
    assert len(Ensemble([teacher, teacher], EnsembleConfig()).answer(IMAGE)) == 110


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_order_of_teachers_changes_nothing(trio: list[PredictorTeacher], fusion: str) -> None:
    config = EnsembleConfig(fusion=fusion)  # type: ignore[arg-type]
    weights = [1.0, 3.0, 2.0]
    reference = Ensemble(trio, config, weights)
    for order in permutations(range(3)):
        other = Ensemble([trio[i] for i in order], config, [weights[i] for i in order])
        np.testing.assert_array_equal(other.answer(IMAGE).boxes_xyxy, reference.answer(IMAGE).boxes_xyxy)
        np.testing.assert_array_equal(other.answer(IMAGE).class_probs, reference.answer(IMAGE).class_probs)
        np.testing.assert_array_equal(other.detect(IMAGE).scores, reference.detect(IMAGE).scores)


@pytest.mark.parametrize(("fusion", "kept"), [("nms", [0.8, 0.6, 0.3]), ("soft-nms", [0.8, 0.6, 0.3])])
def test_nms_keeps_the_best_and_soft_nms_the_rest_too(
    trio: list[PredictorTeacher], fusion: str, kept: list[float]
) -> None:
    fused = Ensemble(trio, EnsembleConfig(fusion=fusion)).answer(IMAGE)  # type: ignore[arg-type]
    scores = fused.class_probs.max(1)
    if fusion == "nms":
        np.testing.assert_allclose(scores, kept)
    else:
        assert len(scores) == 5
        for value in kept:
            assert np.isclose(scores, value).any()


def test_weights_scale_what_a_teacher_says(trio: list[PredictorTeacher]) -> None:
    fused = Ensemble(trio[:2], EnsembleConfig(), weights=[3.0, 1.0]).answer(IMAGE)
    np.testing.assert_allclose(fused.class_probs[0], [(3 * 0.8 + 0.6) / 4, (3 * 0.1 + 0.2) / 4], rtol=1e-5)
    assert Ensemble(trio, EnsembleConfig(), [2, 1, 1]).weights == (0.5, 0.25, 0.25)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0]])
def test_weights_must_be_positive_and_one_a_teacher(trio: list[PredictorTeacher], weights: list[float]) -> None:
    with pytest.raises(UserError, match="weight"):
        Ensemble(trio, EnsembleConfig(), weights)


def test_a_class_that_a_teacher_cannot_know_is_not_voted_down(tmp_path: Path) -> None:
    both = black_box(tmp_path, "a", [([60, 30, 90, 60], [0.1, 0.6])])
    cats_only = black_box(tmp_path, "b", [([10, 10, 40, 40], [0.9])], ("cat",))
    fused = Ensemble([both, cats_only], EnsembleConfig()).answer(IMAGE)
    np.testing.assert_allclose(fused.class_probs, [[0.05, 0.6], [0.45, 0.0]], rtol=1e-5)


def test_the_stages_apart_are_the_whole(trio: list[PredictorTeacher]) -> None:
    ensemble = Ensemble(trio, EnsembleConfig())
    tensors, geometries = ensemble.prepare(IMAGE)
    assert len(tensors) == 3
    assert tensors[0] is tensors[1]  # prepared alike, so prepared once
    found = ensemble.finish(ensemble.infer(tensors), geometries)
    np.testing.assert_array_equal(found.boxes_xyxy, ensemble.detect(IMAGE).boxes_xyxy)
    assert (np.diff(found.scores) <= 0).all()
    assert [member["name"] for member in ensemble.describe()["members"]] == ["a", "b", "c"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_deployed_ensemble_says_second_guesses_as_its_members_do(tmp_path: Path, fusion: str) -> None:
    """An ensemble of one detector must not be worth less than the detector: mAP counts every class of a box."""
    rows = [([10, 10, 40, 40], [0.8, 0.3]), ([60, 30, 90, 60], [0.1, 0.6]), ([12, 40, 30, 60], [0.005, 0.002])]
    alone = black_box(tmp_path, "a", rows)
    found = Ensemble([alone], EnsembleConfig(fusion=fusion)).detect(IMAGE)  # type: ignore[arg-type]
    truth = alone.detect(IMAGE)
    np.testing.assert_allclose(found.scores, truth.scores, rtol=1e-5)
    np.testing.assert_array_equal(found.labels, truth.labels)
    np.testing.assert_allclose(found.boxes_xyxy, truth.boxes_xyxy, atol=1e-3)


def test_one_object_under_two_best_classes_is_said_once_a_class(tmp_path: Path) -> None:
    teachers = [
        black_box(tmp_path, "a", [([10, 10, 40, 40], [0.8, 0.3])]),
        black_box(tmp_path, "b", [([10, 10, 40, 40], [0.2, 0.5])]),
    ]
    found = Ensemble(teachers, EnsembleConfig()).detect(IMAGE)
    assert sorted(found.labels.tolist()) == [0, 1]


def native(seed: int, name: str, **kwargs: object) -> NativeTeacher:
    return NativeTeacher(name, toy_detector(seed=seed, **kwargs), CLASSES)  # type: ignore[arg-type]


def test_mean_outputs_is_the_mean_of_logits_and_codings() -> None:
    teachers = [native(0, "a"), native(1, "b")]
    ensemble = Ensemble(teachers, EnsembleConfig(fusion="mean-outputs"), [3.0, 1.0])
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    tensor = torch.from_numpy(normalise(image, teachers[0].preprocess))
    with torch.no_grad():
        a, b = (teacher.detector(tensor) for teacher in teachers)
        mean = type(a)(0.75 * a.cls_logits + 0.25 * b.cls_logits, 0.75 * a.bbox_regression + 0.25 * b.bbox_regression)
        _, scores = teachers[0].detector.decode(mean)
    found = ensemble.detect(image)
    assert found.scores[0] == pytest.approx(float(scores.max()), rel=1e-4)
    assert len(ensemble.answer(image)) > 0
    swapped = Ensemble(teachers[::-1], EnsembleConfig(fusion="mean-outputs"), [1.0, 3.0]).detect(image)
    np.testing.assert_allclose(swapped.scores, found.scores, rtol=1e-4)
    with pytest.raises(DistillationSetupError, match="raw outputs"):
        ensemble.fuse([SoftDetections.empty(2)] * 2)


def test_mean_outputs_of_heads_that_differ_says_in_what(tmp_path: Path) -> None:
    config = EnsembleConfig(fusion="mean-outputs")
    with pytest.raises(DistillationSetupError, match="layout"):
        Ensemble([native(0, "a"), native(1, "b", input_size=128)], config)
    with pytest.raises(DistillationSetupError, match="layout"):
        Ensemble([native(0, "a"), native(1, "b", model="yolo-nano")], config)
    swapping = NativeTeacher("s", toy_detector(seed=1), CLASSES, {CLASSES[0]: CLASSES[1], CLASSES[1]: CLASSES[0]})
    with pytest.raises(DistillationSetupError, match="class map"):
        Ensemble([native(0, "a"), swapping], config)
    with pytest.raises(DistillationSetupError, match="black boxes: c"):
        Ensemble([native(0, "a"), _as_toy(black_box(tmp_path, "c", [([1, 1, 9, 9], [0.5, 0.1])]))], config)


def _as_toy(teacher: PredictorTeacher) -> PredictorTeacher:
    teacher.student_class_names = CLASSES
    return teacher


def test_teachers_over_different_classes_are_refused(trio: list[PredictorTeacher]) -> None:
    with pytest.raises(DistillationSetupError, match="same classes"):
        Ensemble([trio[0], native(0, "n")], EnsembleConfig())
    with pytest.raises(DistillationSetupError, match="at least one"):
        Ensemble([], EnsembleConfig())


def _record(index: int) -> ImageRecord:
    no = np.zeros(1, bool)
    return ImageRecord(
        str(index), Path("x"), (64, 96), np.array([[10, 10, 40, 40]], np.float32), np.zeros(1, np.int64), no, no
    )


def _accuracy(records, detections: list[Detections]) -> float:  # type: ignore[no-untyped-def]
    """Mean overlap of each image's best box with its object."""
    from edgekd.boxes import iou_matrix

    values = [float(iou_matrix(r.boxes_xyxy, d.boxes_xyxy[:1])[0, 0]) for r, d in zip(records, detections, strict=True)]
    return float(np.mean(values))


def test_learned_weights_favour_the_better_teacher() -> None:
    records = [_record(index) for index in range(5)]
    good = [SoftDetections(np.array([[10, 10, 40, 40]], np.float32), np.array([[0.5]], np.float32))] * 5
    poor = [SoftDetections(np.array([[16, 10, 46, 40]], np.float32), np.array([[0.6]], np.float32))] * 5
    weights = learn_weights([good, poor], records, EnsembleConfig(), _accuracy)
    assert sum(weights) == pytest.approx(1.0)
    assert weights[0] > 0.75
    assert learn_weights([poor, good], records, EnsembleConfig(), _accuracy) == pytest.approx(weights[::-1])
    assert learn_weights([good, good], records, EnsembleConfig(), _accuracy) == (0.5, 0.5)
    assert learn_weights([good], records, EnsembleConfig(), _accuracy) == (1.0,)
