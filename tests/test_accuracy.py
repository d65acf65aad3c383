"""Accuracy against pycocotools and against slow, plain readings of the protocols."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest

from edgekd.bench.accuracy import evaluate
from edgekd.bench.matching import IOU_THRESHOLD, Matches, iou_with_crowds, match_coco, match_voc
from edgekd.bench.precision_recall import (
    average_precisions_voc,
    map_difference,
    mean_ap50,
    percentile_interval,
    resampled_ap50,
    share_interval,
)
from edgekd.types import Detections, ImageRecord

NAMES = ("cat", "dog", "bird", "never there")


def make_split(
    seed: int, images: int = 30, classes: int = 3, difficult: float = 0.0, crowd: float = 0.0, boxes_an_image: int = 12
) -> tuple[list[ImageRecord], list[Detections]]:
    """Random objects of all sizes, with detections that partly hit them, tie in score, and pile up."""
    rng = np.random.default_rng(seed)
    records, answers = [], []
    for index in range(images):
        n = int(rng.integers(0, boxes_an_image))
        corner = rng.uniform(0, 300, (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(4, 200, (n, 2))], 1).astype(np.float32)
        labels = rng.integers(0, classes, n)
        flags = rng.random((2, n))
        hard, many = flags[0] < difficult, flags[1] < crowd
        records.append(ImageRecord(f"im{index}", Path(f"{index}.png"), (500, 500), boxes, labels, hard, many))
        copies = np.repeat(np.arange(n), rng.integers(0, 4, n))
        found = boxes[copies] + rng.normal(0, 8, (len(copies), 4))
        extra = rng.uniform(0, 300, (int(rng.integers(0, 8)), 2))
        found = np.concatenate([found, np.concatenate([extra, extra + 40], 1)])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        found_labels = np.concatenate([labels[copies], rng.integers(0, classes, len(extra))])
        scores = rng.integers(1, 20, len(found)) / 20.0
        answers.append(Detections(found, scores, found_labels))
    return records, answers


def pycocotools_precision(
    records: list[ImageRecord], answers: list[Detections], names: tuple[str, ...], ignore_flag: bool = False
) -> np.ndarray:
    """(10, 101, classes, 4) from pycocotools; `ignore_flag` marks difficult objects in its own evaluation loop."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects, found = [], []
    for index, (record, answer) in enumerate(zip(records, answers, strict=True), 1):
        for box, label, hard, crowd in zip(
            record.boxes_xyxy.astype(float), record.labels, record.difficult, record.crowd, strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": index,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(crowd),
                    "difficult": bool(hard),
                }
            )
        for box, label, score in zip(
            answer.boxes_xyxy.astype(float), answer.labels, answer.scores.astype(float), strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            found.append(
                {"image_id": index, "category_id": int(label) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            )

    class Evaluation(COCOeval):  # type: ignore[misc]
        def _prepare(self) -> None:
            super()._prepare()
            if ignore_flag:  # what "ignored but no crowd" means, said in pycocotools' own terms
                for group in self._gts.values():
                    for thing in group:
                        thing["ignore"] = thing["ignore"] or thing["difficult"]

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "height": 500, "width": 500} for i in range(1, len(records) + 1)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
            "annotations": objects,
        }
        truth.createIndex()
        evaluation = Evaluation(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]
    return np.where(precision < 0, np.nan, precision)


@pytest.mark.parametrize(
    ("difficult", "crowd"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.25, 0.15)], ids=["plain", "hard", "crowd", "both"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_coco_figures_equal_pycocotools(seed: int, difficult: float, crowd: float) -> None:
    records, answers = make_split(seed, difficult=difficult, crowd=crowd)
    accuracy = evaluate(records, answers, NAMES)
    reference = pycocotools_precision(records, answers, NAMES, ignore_flag=True)
    # With areas outside every range, unmatched detections are judged by size as before, so every cell agrees.
    assert accuracy.ap50 == pytest.approx(np.nanmean(reference[0, :, :, 0]), abs=1e-12)
    assert accuracy.ap == pytest.approx(np.nanmean(reference[:, :, :, 0]), abs=1e-12)
    for area, size in enumerate(("small", "medium", "large"), 1):
        assert accuracy.by_size[size].ap == pytest.approx(np.nanmean(reference[:, :, :, area]), abs=1e-12)
        assert accuracy.by_size[size].ap50 == pytest.approx(np.nanmean(reference[0, :, :, area]), abs=1e-12)
    for label, name in enumerate(NAMES[:3]):
        assert accuracy.per_class[name].ap50 == pytest.approx(reference[0, :, label, 0].mean(), abs=1e-12)
        assert accuracy.curves[name] == pytest.approx(reference[0, :, label, 0].tolist(), abs=1e-12)
    assert accuracy.curves[""] == pytest.approx(np.nanmean(reference[0, :, :, 0], axis=1).tolist(), abs=1e-12)
    assert accuracy.per_class["never there"].ap50 is None
    assert "never there" not in accuracy.curves


def test_difficult_is_not_crowd() -> None:
    """Two boxes on one difficult object: one is ignored, the second is wrong; a crowd would swallow both."""
    box = np.array([[0, 0, 100, 100]], np.float32)
    other = np.array([[200, 200, 300, 300]], np.float32)
    answer = Detections(np.concatenate([box, box, other]), np.array([0.9, 0.8, 0.7]), np.zeros(3, np.int64))
    no, yes = np.array([False, False]), np.array([True, False])
    boxes, labels = np.concatenate([box, other]), np.zeros(2, np.int64)
    hard = ImageRecord("a", Path("a"), (400, 400), boxes, labels, yes, no)
    crowd = ImageRecord("a", Path("a"), (400, 400), boxes, labels, no, yes)
    assert evaluate([hard], [answer], ("x",)).ap50 == pytest.approx(0.5)
    assert evaluate([crowd], [answer], ("x",)).ap50 == pytest.approx(1.0)
    # VOC ignores a difficult object any number of times.
    assert evaluate([hard], [answer], ("x",)).voc_all_point == pytest.approx(1.0)


def slow_voc(records: list[ImageRecord], answers: list[Detections], label: int) -> tuple[float, float]:
    """VOCevaldet, step by step, for one class."""
    rows = [
        (-float(answer.scores[j]), i, j)
        for i, answer in enumerate(answers)
        for j in range(len(answer))
        if answer.labels[j] == label
    ]
    rows.sort(key=lambda row: row[0])
    taken: set[tuple[int, int]] = set()
    objects = sum(int(((r.labels == label) & ~r.difficult & ~r.crowd).sum()) for r in records)
    correct: list[int] = []
    for _, i, j in rows:
        best, best_iou = -1, -1.0
        for k in range(len(records[i].labels)):
            if records[i].labels[k] != label:
                continue
            one = answers[i].boxes_xyxy[j : j + 1].astype(float), records[i].boxes_xyxy[k : k + 1].astype(float)
            iou = float(iou_with_crowds(*one, np.zeros(1, bool))[0, 0])
            if iou > best_iou:
                best, best_iou = k, iou
        if best_iou >= IOU_THRESHOLD:
            if records[i].difficult[best] or records[i].crowd[best]:
                continue
            correct.append(0 if (i, best) in taken else 1)
            taken.add((i, best))
        else:
            correct.append(0)
    points = [(sum(correct[: n + 1]) / objects, sum(correct[: n + 1]) / (n + 1)) for n in range(len(correct))]
    eleven = sum(max([p for r, p in points if r >= t / 10], default=0.0) for t in range(11)) / 11
    area, last = 0.0, 0.0
    for n, (recall, _) in enumerate(points):
        area += (recall - last) * max(p for _, p in points[n:])
        last = recall
    return eleven, area


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_voc_figures_equal_a_plain_reading(seed: int) -> None:
    records, answers = make_split(seed, images=15, difficult=0.25, crowd=0.1)
    eleven, area = average_precisions_voc(match_voc(records, answers, 3))
    for label in range(3):
        assert (eleven[label], area[label]) == pytest.approx(slow_voc(records, answers, label), abs=1e-12)
    accuracy = evaluate(records, answers, NAMES)
    assert accuracy.voc07 == pytest.approx(eleven.mean())
    assert accuracy.voc_all_point == pytest.approx(area.mean())


def test_each_detection_belongs_to_its_best_object_in_voc() -> None:
    """The second box overlaps a free object at 0.5 too, but its best object is taken: VOC calls it wrong."""
    objects = np.array([[0, 0, 100, 100], [0, 40, 100, 140]], np.float32)
    found = Detections(
        np.array([[0, 0, 100, 100], [0, 18, 100, 118]], np.float32), np.array([0.9, 0.8]), np.zeros(2, np.int64)
    )
    none = np.zeros(2, bool)
    record = ImageRecord("a", Path("a"), (200, 200), objects, np.zeros(2, np.int64), none, none)
    assert match_voc([record], [found], 1).correct.tolist() == [True, False]
    assert match_coco([record], [found], 1).correct.tolist() == [True, True]


def empty_record(name: str) -> ImageRecord:
    nothing = np.zeros(0, bool)
    return ImageRecord(
        name, Path(name), (10, 10), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), nothing, nothing
    )


def test_no_detections_no_objects_no_images(capfd: pytest.CaptureFixture[str]) -> None:
    records, answers = make_split(0, images=1)
    records, answers = make_split(7, images=4)
    silent = [Detections.empty()] * 4
    nothing_found = evaluate(records, silent, NAMES)
    assert (nothing_found.ap50, nothing_found.ap, nothing_found.voc07) == (0.0, 0.0, 0.0)
    nothing_there = evaluate([empty_record(str(i)) for i in range(4)], answers, NAMES)
    assert (nothing_there.ap50, nothing_there.voc_all_point, nothing_there.curves) == (None, None, {})
    assert nothing_there.by_size["small"].ap is None
    assert evaluate([empty_record("0")], silent[:1], NAMES).objects == 0
    assert evaluate([], [], NAMES).ap is None
    one = evaluate(records[:1], answers[:1], NAMES)
    assert one.images == 1
    for figure in (one.ap50, one.ap, one.voc07, one.voc_all_point):
        assert figure is None or 0.0 <= figure <= 1.0
    assert capfd.readouterr() == ("", "")
    assert map_difference([empty_record("0")], silent[:1], silent[:1], 3) is None


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "1 images but 0 answers"),
        ([Detections(np.array([[0, 0, 1, 1]]), np.array([0.5]), np.array([9]))], "labels outside"),
    ],
)
def test_answers_of_other_images_are_refused(answers: list[Detections], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate([empty_record("0")], answers, NAMES)


def test_only_the_best_100_an_image_and_class_count() -> None:
    rng = np.random.default_rng(0)
    records, _ = make_split(11, images=3, boxes_an_image=30)
    answers = []
    for record in records:
        found = np.repeat(record.boxes_xyxy, 30, axis=0)
        answers.append(Detections(found, rng.random(len(found)), np.repeat(record.labels, 30)))
    reference = pycocotools_precision(records, answers, NAMES)
    ones = np.ones((1, 3), np.int64)
    assert mean_ap50(match_coco(records, answers, 3), ones)[0] == pytest.approx(np.nanmean(reference[0, :, :, 0]))


@pytest.mark.parametrize(("wrong", "found"), [(99, 1), (100, 0)])
def test_the_hundredth_detection_counts_and_the_next_does_not(wrong: int, found: int) -> None:
    right, off = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    no = np.zeros(1, bool)
    record = ImageRecord("0", Path("0.png"), (80, 80), np.array([right], np.float32), np.zeros(1, np.int64), no, no)
    answer = Detections(
        np.array([off] * wrong + [right]), np.linspace(0.9, 0.1, wrong + 1), np.zeros(wrong + 1, np.int64)
    )
    assert int(match_coco([record], [answer], 1).correct.sum()) == found


@pytest.mark.parametrize(("width", "found"), [(5, 1), (4, 0)])
def test_half_of_an_object_is_enough_in_both_protocols(width: int, found: int) -> None:
    no = np.zeros(1, bool)
    boxes = np.array([[0.0, 0, 10, 10]], np.float32)
    record = ImageRecord("0", Path("0.png"), (80, 80), boxes, np.zeros(1, np.int64), no, no)
    answer = Detections(np.array([[0.0, 0, width, 10]]), np.array([0.9]), np.zeros(1, np.int64))
    for match in (match_coco, match_voc):
        assert int(match([record], [answer], 1).correct.sum()) == found


def test_overlaps_against_plain_arithmetic() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [20, 20, 30, 40]])
    objects = np.array([[5.0, 0, 15, 10], [9, 9, 21, 21], [0, 0, 100, 100], [0, 12, 10, 20]])
    crowd = np.array([False, False, True, False])
    # half of a box; one corner pixel of each; a crowd that holds both; beside one, apart from the other
    expected = [[50 / 150, 1 / 243, 1.0, 0.0], [0.0, 1 / 343, 1.0, 0.0]]
    np.testing.assert_allclose(iou_with_crowds(boxes, objects, crowd), expected)


@pytest.mark.parametrize("seed", range(6))
def test_weighted_ap50_equals_the_library_on_repeated_images(seed: int) -> None:
    records, answers = make_split(seed, difficult=0.2, crowd=0.1)
    matches = match_coco(records, answers, 3)
    rng = np.random.default_rng(seed)
    draw = rng.multinomial(len(records), np.full(len(records), 1 / len(records)))
    weighted = mean_ap50(matches, np.stack([np.ones_like(draw), draw]))
    assert weighted[0] == pytest.approx(evaluate(records, answers, NAMES[:3]).ap50, abs=1e-12)
    again = [i for i, times in enumerate(draw) for _ in range(times)]
    repeated = evaluate([records[i] for i in again], [answers[i] for i in again], NAMES[:3])
    # Equal scores within a copied image interleave differently; anything beyond that would be an error.
    assert weighted[1] == pytest.approx(repeated.ap50, abs=0.02)


def test_weighted_ap50_is_exact_without_ties() -> None:
    records, answers = make_split(21)
    rng = np.random.default_rng(5)
    answers = [
        Detections(a.boxes_xyxy, rng.permutation(len(a)) / 997.0 + i / 1e5, a.labels) for i, a in enumerate(answers)
    ]
    draw = rng.multinomial(len(records), np.full(len(records), 1 / len(records)))
    kept = [i for i, times in enumerate(draw) if times]
    once = np.minimum(draw, 1)[None]
    subset = evaluate([records[i] for i in kept], [answers[i] for i in kept], NAMES[:3])
    assert mean_ap50(match_coco(records, answers, 3), once)[0] == pytest.approx(subset.ap50, abs=1e-12)


def test_a_class_that_a_resample_lacks_is_left_out_of_its_mean() -> None:
    """Class 0 lies on the first image and is found behind a false box, class 1 on the second and is missed."""
    box, away, no = [[0.0, 0, 10, 10]], [[50.0, 50, 60, 60]], np.zeros(1, bool)
    records = [
        ImageRecord(str(i), Path("x"), (80, 80), np.array(box, np.float32), np.array([i]), no, no) for i in range(2)
    ]
    answers = [
        Detections(np.array(away + box), np.array([0.9, 0.8]), np.array([0, 0])),
        Detections(np.array(away), np.array([0.7]), np.array([1])),
    ]
    weights = np.array([[1, 1], [2, 0], [0, 2], [0, 0]])
    found = mean_ap50(match_coco(records, answers, 2), weights)
    assert found[:3].tolist() == [0.25, 0.5, 0.0]
    assert np.isnan(found[3])


def test_differences_need_an_answer_an_image() -> None:
    records, answers = make_split(1, images=3)
    for pair in ((answers[1:], answers), (answers, answers[1:])):
        with pytest.raises(ValueError, match="3 images but 2 answers"):
            map_difference(records, *pair, 3)


def test_difference_interval() -> None:
    records, good = make_split(2, images=80)
    bad = [a.take(a.scores < 0.5) for a in good]
    difference, low, high = map_difference(records, good, bad, 3, resamples=300) or pytest.fail("no interval")
    expected = (evaluate(records, good, NAMES).ap50 or 0) - (evaluate(records, bad, NAMES).ap50 or 0)
    assert difference == pytest.approx(expected, abs=1e-12)
    assert 0 < low < difference < high
    assert map_difference(records, good, good, 3, resamples=50) == (0.0, 0.0, 0.0)
    swapped = map_difference(records, bad, good, 3, resamples=300)
    assert swapped == pytest.approx((-difference, -high, -low), abs=1e-9)


def test_an_interval_holds_its_share_of_the_draws() -> None:
    draws = np.arange(101) / 100
    assert percentile_interval(np.r_[0.3, draws]) == pytest.approx((0.3, 0.025, 0.975))
    assert percentile_interval(np.r_[0.3, draws, np.nan]) == pytest.approx((0.3, 0.025, 0.975))
    assert percentile_interval(np.r_[np.nan, draws]) is None
    assert percentile_interval(np.array([0.3])) == (0.3, 0.3, 0.3)


def test_an_interval_of_ap_is_mirrored_and_stays_a_share() -> None:
    draws = np.linspace(0.55, 0.85, 101)  # resampled AP is too high
    value, low, high = share_interval(np.r_[0.6, draws]) or pytest.fail("no interval")
    ends = np.percentile(draws, [2.5, 97.5])
    odds = [x / (1 - x) for x in (value, low, high, *ends)]
    assert value == 0.6
    assert odds[0] ** 2 == pytest.approx(odds[1] * odds[4])
    assert odds[0] ** 2 == pytest.approx(odds[2] * odds[3])
    assert 0.2 < low < 0.3 < 0.6 < high < 0.65
    assert share_interval(np.r_[0.5, np.zeros(50), np.ones(50)]) == (0.5, 0.0, 1.0)
    assert share_interval(np.r_[0.5, np.full(50, 0.6)]) == (0.5, pytest.approx(0.4), 0.5)  # the figure itself is held
    assert share_interval(np.r_[1.0, np.ones(50)]) == (1.0, 1.0, 1.0)
    assert share_interval(np.zeros(50)) == (0.0, 0.0, 0.0)
    assert share_interval(np.r_[np.nan, draws]) is None


def test_an_interval_of_ap_covers_what_many_images_would_have_given() -> None:
    """20 classes with some twenty objects each on 200 images: AP there is too high, that of resamples even more."""
    rng, images, classes = np.random.default_rng(0), 8000, 20
    positives = rng.poisson(0.12, (images, classes))
    sides = []
    for label in range(classes):
        owner = np.repeat(np.arange(images), positives[:, label])
        skill = rng.normal(0.3, 1.0, len(owner))
        wrong = np.repeat(np.arange(images), rng.poisson(1.0, images))
        scores = np.r_[skill[skill > 0] + rng.normal(0, 0.7, int((skill > 0).sum())), rng.normal(0, 0.9, len(wrong))]
        correct = np.arange(len(scores)) < int((skill > 0).sum())
        sides.append((np.full(len(scores), label), scores, np.r_[owner[skill > 0], wrong], correct))
    labels, scores, owners, correct = (np.concatenate(column) for column in zip(*sides, strict=True))
    order = np.lexsort((-scores, labels))
    labels, scores, owners, correct = labels[order], scores[order], owners[order], correct[order]
    everywhere = Matches(labels, scores, owners, correct, positives.astype(np.int64))
    truth = float(mean_ap50(everywhere, np.ones((1, images), np.int64))[0])
    held = {"mirrored": 0, "percentiles": 0}
    for first in range(0, images, 200):
        rows = (owners >= first) & (owners < first + 200)
        few = positives[first : first + 200].astype(np.int64)
        split = Matches(labels[rows], scores[rows], owners[rows] - first, correct[rows], few)
        drawn = resampled_ap50([split], resamples=200, seed=first)[0]
        for name, interval in (("mirrored", share_interval(drawn)), ("percentiles", percentile_interval(drawn))):
            held[name] += interval is not None and interval[1] <= truth <= interval[2]
    assert held["mirrored"] >= 30 > 15 > held["percentiles"]  # of 40


@pytest.mark.slow
def test_equal_figures_on_a_large_split() -> None:
    rng = np.random.default_rng(0)
    records, answers = [], []
    for index in range(400):
        n = int(rng.integers(1, 6))
        corner = rng.uniform(0, 300, (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(20, 200, (n, 2))], 1).astype(np.float32)
        labels = rng.integers(0, 20, n)
        none = np.zeros(n, bool)
        records.append(ImageRecord(str(index), Path("x"), (500, 500), boxes, labels, none, none))
        noise = np.repeat(rng.uniform(0, 300, (100 - n, 2)), 2, axis=1)[:, [0, 2, 1, 3]] + [0, 0, 50, 50]
        found = np.concatenate([boxes + rng.normal(0, 6, boxes.shape), noise])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        scores = np.concatenate([rng.uniform(0.2, 1, n), rng.uniform(0, 0.5, 100 - n)])
        answers.append(Detections(found, scores, np.concatenate([labels, rng.integers(0, 20, 100 - n)])))
    names = tuple(f"c{i}" for i in range(20))
    accuracy = evaluate(records, answers, names)
    reference = pycocotools_precision(records, answers, names)
    assert accuracy.ap == pytest.approx(np.nanmean(reference[:, :, :, 0]), abs=1e-12)
    other = [a.take(a.scores > 0.3) for a in answers]
    assert map_difference(records, answers, other, 20) is not None
