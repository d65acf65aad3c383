"""The training loader: the same batches whatever the workers, the resume point, the ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd.data.image_cache import ImageCache
from edgekd.data.loader import Batch, TrainLoader
from edgekd.data.views import boxes_in_view, render_view
from edgekd.errors import DataError, RecipeError
from edgekd.recipe import AugmentConfig
from edgekd.types import Dataset, ImageRecord, PreprocessSpec, SoftDetections

SPEC = PreprocessSpec((48, 64))
PLAIN = AugmentConfig(photometric=0, zoom_out=0, iou_crop=0, flip=0)


class Files:
    """Stands in for the image files: counts reads, can be broken or slow."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.broken: set[str] = set()
        self.delay = 0.0

    def load_image(self, path: Path) -> np.ndarray:
        self.reads.append(path.stem)
        time.sleep(self.delay)
        if path.stem in self.broken:
            raise OSError("truncated file")
        k = int(path.stem)
        return np.random.default_rng(k).integers(0, 256, (40 + k, 60, 3), np.uint8)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    files = Files()
    monkeypatch.setattr("edgekd.data.image_cache.load_image", files.load_image)
    return files


def make_dataset(count: int) -> Dataset:
    records = []
    for k in range(count):
        boxes = np.array([[5, 5, 30, 30], [20, 10, 55, 35], [0, 0, 20, 38]], np.float32)
        flags = np.array([[False, False, True], [False, True, False]])
        records.append(
            ImageRecord(f"{k}", Path(f"{k}.png"), (40 + k, 60), boxes, np.array([k % 3, 1, 2]), flags[0], flags[1])
        )
    return Dataset(Path("root"), "voc", "train", ("a", "b", "c"), tuple(records))


def make_answers(dataset: Dataset) -> dict[str, SoftDetections]:
    rng = np.random.default_rng(5)
    answers = {}
    for k, record in enumerate(dataset.records):
        corner = rng.uniform(0, 20, (k % 3, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(10, 20, (k % 3, 2))], axis=1)
        answers[record.image_id] = SoftDetections(boxes, rng.random((k % 3, 3)))
    return answers


@pytest.fixture
def make_loader(files: Files) -> Iterator[Callable[..., TrainLoader]]:
    made: list[TrainLoader] = []

    def make(dataset: Dataset, **settings: Any) -> TrainLoader:
        defaults: dict[str, Any] = {
            "preprocess": SPEC,
            "augment": AugmentConfig(),
            "batch_size": 4,
            "seed": 7,
            "epochs": 10,
            "workers": 0,
            "cache_mib": 64,
        }
        made.append(TrainLoader(dataset, **{**defaults, **settings}))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def assert_same(a: Batch, b: Batch) -> None:
    assert a.image_ids == b.image_ids
    assert a.views == b.views
    assert torch.equal(a.images_u8, b.images_u8)
    assert a.teacher_images_u8.keys() == b.teacher_images_u8.keys()
    for hw, images in a.teacher_images_u8.items():
        assert torch.equal(images, b.teacher_images_u8[hw])
    columns = [(a.targets.boxes_xyxy, b.targets.boxes_xyxy), (a.targets.labels, b.targets.labels)]
    for x, y in zip(a.soft, b.soft, strict=True):
        columns += [(x.boxes_xyxy, y.boxes_xyxy), (x.class_probs, y.class_probs)]
    for left, right in columns:
        assert all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


def test_shapes_types_and_frames(make_loader: Callable[..., TrainLoader]) -> None:
    dataset = make_dataset(9)
    loader = make_loader(dataset, extra_hw=[(96, 96), (48, 64)], answers=[make_answers(dataset)] * 2)
    assert loader.steps_per_epoch == 2
    batches = list(loader.epoch(0))
    assert len(batches) == 2
    for batch in batches:
        assert batch.images_u8.shape == (4, 3, 48, 64)
        assert batch.images_u8.dtype == torch.uint8
        assert batch.images_u8.is_contiguous(memory_format=torch.channels_last)
        assert {hw: tuple(t.shape) for hw, t in batch.teacher_images_u8.items()} == {
            (96, 96): (4, 3, 96, 96),
            (48, 64): (4, 3, 48, 64),
        }
        assert torch.equal(batch.teacher_images_u8[48, 64], batch.images_u8)
        assert len(batch.soft) == 2
        for boxes, labels in zip(batch.targets.boxes_xyxy, batch.targets.labels, strict=True):
            assert boxes.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert boxes.shape == (len(labels), 4)
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes >= 0).all()
            assert (boxes <= torch.tensor([64, 48, 64, 48])).all()
        for boxes, probs in zip(batch.soft[0].boxes_xyxy, batch.soft[0].class_probs, strict=True):
            assert probs.shape == (len(boxes), 3)
            assert probs.dtype == torch.float32


def test_contents_are_the_replayed_views(make_loader: Callable[..., TrainLoader], files: Files) -> None:
    dataset, answers = make_dataset(8), make_answers(make_dataset(8))
    loader = make_loader(dataset, augment=AugmentConfig(mosaic=0.5), answers=[answers], extra_hw=[(80, 72)])
    for batch in loader.epoch(2):
        for i, view in enumerate(batch.views):
            assert dataset.records[view.parts[0].record_index].image_id == batch.image_ids[i]
            for hw, images in ((SPEC.input_hw, batch.images_u8), ((80, 72), batch.teacher_images_u8[80, 72])):
                expected = render_view(view, lambda k: files.load_image(Path(f"{k}.png")), hw)
                np.testing.assert_array_equal(images[i].permute(1, 2, 0).numpy(), expected)
            first = {k: r.boxes_xyxy[:1] for k, r in enumerate(dataset.records)}
            boxes, rows = boxes_in_view(view, first, SPEC.input_hw)
            np.testing.assert_array_equal(batch.targets.boxes_xyxy[i].numpy(), boxes)
            assert batch.targets.labels[i].tolist() == [k % 3 for k, _ in rows]
            soft = {k: answers[r.image_id].boxes_xyxy for k, r in enumerate(dataset.records)}
            boxes, rows = boxes_in_view(view, soft, SPEC.input_hw)
            np.testing.assert_array_equal(batch.soft[0].boxes_xyxy[i].numpy(), boxes)
            probs = np.array([answers[str(k)].class_probs[row] for k, row in rows]).reshape(-1, 3)
            np.testing.assert_array_equal(batch.soft[0].class_probs[i].numpy(), probs)


@pytest.mark.parametrize("workers", [1, 3, 9])
@pytest.mark.parametrize("cache_mib", [0, 64])
def test_workers_and_cache_change_nothing(
    make_loader: Callable[..., TrainLoader], workers: int, cache_mib: int
) -> None:
    dataset = make_dataset(13)
    settings = {"augment": AugmentConfig(mosaic=0.3), "answers": [make_answers(dataset)], "extra_hw": [(32, 32)]}
    reference = make_loader(dataset, **settings)
    loader = make_loader(dataset, workers=workers, cache_mib=cache_mib, **settings)
    for epoch in (0, 1):
        for a, b in zip(reference.epoch(epoch), loader.epoch(epoch), strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_same_batches(make_loader: Callable[..., TrainLoader], workers: int) -> None:
    whole = list(make_loader(make_dataset(14), workers=workers).epoch(3))
    for start in range(len(whole) + 1):
        rest = list(make_loader(make_dataset(14), workers=workers).epoch(3, start))
        assert len(rest) == len(whole) - start
        for a, b in zip(whole[start:], rest, strict=True):
            assert_same(a, b)


def test_epochs_and_seeds_differ(make_loader: Callable[..., TrainLoader]) -> None:
    dataset = make_dataset(12)
    seen = {
        (seed, epoch): tuple(b.image_ids for b in make_loader(dataset, seed=seed).epoch(epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(seen.values())) == 4
    for batches in seen.values():
        assert sorted(i for ids in batches for i in ids) == sorted(r.image_id for r in dataset.records)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("count", [16, 18, 3])
def test_ranks_share_each_global_batch(make_loader: Callable[..., TrainLoader], world_size: int, count: int) -> None:
    dataset = make_dataset(count)
    whole = list(make_loader(dataset, batch_size=8).epoch(0))
    ranks = [
        list(make_loader(dataset, batch_size=8, rank=r, world_size=world_size).epoch(0)) for r in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for step, batch in enumerate(whole):
        parts = [batches[step].image_ids for batches in ranks]
        assert len({len(part) for part in parts}) == 1
        together = [parts[k % world_size][k // world_size] for k in range(sum(map(len, parts)))]
        assert together[: len(batch.image_ids)] == list(batch.image_ids)
        assert set(together) <= set(batch.image_ids)


@pytest.mark.parametrize(("count", "sizes"), [(8, [4, 4]), (10, [4, 4]), (3, [3]), (1, [1]), (4, [4])])
def test_incomplete_batches(make_loader: Callable[..., TrainLoader], count: int, sizes: list[int]) -> None:
    loader = make_loader(make_dataset(count))
    assert loader.steps_per_epoch == len(sizes)
    assert [len(batch.image_ids) for batch in loader.epoch(0)] == sizes


@pytest.mark.parametrize(("difficult", "labels"), [(False, [0]), (True, [0, 2])])
def test_difficult_and_crowd(make_loader: Callable[..., TrainLoader], difficult: bool, labels: list[int]) -> None:
    (batch,) = make_loader(make_dataset(1), augment=PLAIN, difficult=difficult).epoch(0)
    assert batch.targets.labels[0].tolist() == labels


def test_letterboxed_students_keep_shapes(make_loader: Callable[..., TrainLoader]) -> None:
    spec = PreprocessSpec((60, 90), "letterbox", pad_value=7)
    (batch,) = make_loader(make_dataset(1), augment=PLAIN, preprocess=spec).epoch(0)  # the image is 60 x 40
    assert batch.targets.boxes_xyxy[0].tolist() == [[7.5, 7.5, 45.0, 45.0]]
    zoomed = make_loader(make_dataset(1), augment=AugmentConfig(photometric=0, zoom_out=1), preprocess=spec)
    assert any((b.images_u8[0] == 7).all(0).any() for e in range(5) for b in zoomed.epoch(e))


def test_last_epochs_go_without_mosaic(make_loader: Callable[..., TrainLoader]) -> None:
    loader = make_loader(make_dataset(4), augment=AugmentConfig(mosaic=1.0, close_mosaic_epochs=2), epochs=5)
    parts = [{len(view.parts) for batch in loader.epoch(e) for view in batch.views} for e in range(5)]
    assert parts == [{4}, {4}, {4}, {1}, {1}]


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_stays_within_its_budget(
    make_loader: Callable[..., TrainLoader], files: Files, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    loader = make_loader(make_dataset(12), cache_mib=0, workers=workers)
    list(loader.epoch(0))
    list(loader.epoch(1))
    assert len(files.reads) == 24
    files.reads.clear()
    loader = make_loader(make_dataset(12), workers=workers)
    list(loader.epoch(0))
    list(loader.epoch(1))
    assert sorted(files.reads) == sorted(str(k) for k in range(12))
    budget = 5 * 60 * 50 * 3  # about five of the twelve images
    cache = ImageCache(make_dataset(12).records, budget)
    for _ in range(2):
        for k in range(12):
            assert not cache.load(k).flags.writeable
    assert 4 <= len(cache._images) <= 6
    assert sum(image.nbytes for image in cache._images.values()) <= budget


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named(make_loader: Callable[..., TrainLoader], files: Files, workers: int) -> None:
    files.broken.add("5")
    with pytest.raises(DataError, match=r"5\.png.*\n.*truncated file"):
        list(make_loader(make_dataset(8), workers=workers).epoch(0))


def test_changed_image_is_named(make_loader: Callable[..., TrainLoader], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.data.image_cache.load_image", lambda path: np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(DataError, match=r"\.png.*another size"):
        next(make_loader(make_dataset(8)).epoch(0))


def test_mistakes_are_found_before_the_first_batch(make_loader: Callable[..., TrainLoader]) -> None:
    dataset = make_dataset(4)
    with pytest.raises(DataError, match="no images"):
        make_loader(make_dataset(0))
    with pytest.raises(DataError, match="answers lack 1 of 4"):
        make_loader(dataset, answers=[{k: v for k, v in make_answers(dataset).items() if k != "2"}])
    with pytest.raises(RecipeError, match="shared equally"):
        make_loader(dataset, batch_size=3, world_size=2)


def test_stopping_early_does_not_hang(make_loader: Callable[..., TrainLoader], files: Files) -> None:
    files.delay = 0.05
    loader = make_loader(make_dataset(40), workers=2, cache_mib=0)
    batches = loader.epoch(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    done = len(files.reads)
    time.sleep(0.3)
    assert len(files.reads) <= done + 2  # what was queued has been cancelled
    abandoned = loader.epoch(1)
    next(abandoned)
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("edgekd-loader")]
    assert len(next(loader.epoch(2)).image_ids) == 4  # and it can start again


def test_batch_moves_between_devices(make_loader: Callable[..., TrainLoader]) -> None:
    dataset = make_dataset(4)
    batch = next(make_loader(dataset, extra_hw=[(32, 32)], answers=[make_answers(dataset)]).epoch(0))
    moved = batch.to(torch.device("meta"))
    assert moved.images_u8.device.type == "meta"
    assert moved.teacher_images_u8[32, 32].device.type == "meta"
    assert moved.targets.labels[0].device.type == "meta"
    assert moved.soft[0].class_probs[0].device.type == "meta"
