"""Batches for training: every image of an epoch once, in a drawn order, through a drawn view.

Order and views are a pure function of (seed, epoch, image), so a run that was cut off goes on with exactly the batches
it would have had, whatever the number of workers or of ranks.

Workers are threads, not processes: decoding, resizing and colour tables are OpenCV's and release the interpreter
lock, and threads share one cache of decoded images where processes would each fill their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.data.image_cache import ImageCache
from edgekd.data.view_plan import ViewPlan, view_digest
from edgekd.data.view_store import StoredRows, ViewStore
from edgekd.data.views import View, boxes_in_view, render_view
from edgekd.detectors.base import SoftTargets, Targets
from edgekd.errors import ArtifactError, DataError, RecipeError
from edgekd.machine import usable_threads
from edgekd.recipe import AugmentConfig
from edgekd.types import Dataset, FloatArray, ImageArray, IntArray, PreprocessSpec, SoftDetections

_MAX_AUTO_WORKERS = 8
_PREFETCH_BATCHES = 2


@dataclass(frozen=True)
class Stored:
    """What is kept of one teacher's look at a batch's views.

    Attributes:
        arrays: name to (B, ...) tensor, half precision.
        soft: its boxes, in the frame they were kept in; None where none are kept.
    """

    arrays: Mapping[str, Tensor]
    soft: SoftTargets | None

    def to(self, device: torch.device) -> Stored:
        """The same on another device."""
        arrays = {name: array.to(device, non_blocking=True) for name, array in self.arrays.items()}
        return Stored(arrays, None if self.soft is None else self.soft.to(device))


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        images_u8: (B, 3, H, W) uint8 RGB in channels-last memory, what `normalise` of the student's spec expects.
        teacher_images_u8: the same views at other sizes, (h, w) to (B, 3, h, w) uint8.
        targets: ground truth in input pixels.
        soft: for each mapping of answers, the teacher's boxes in input pixels.
        image_ids: the images, in order; of a mosaic, its first.
        views: what was drawn, to replay or to map more boxes.
        stored: what each view store holds of these views.
    """

    images_u8: Tensor
    teacher_images_u8: Mapping[tuple[int, int], Tensor]
    targets: Targets
    soft: tuple[SoftTargets, ...]
    image_ids: tuple[str, ...]
    views: tuple[View, ...]
    stored: tuple[Stored, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on another device."""
        return Batch(
            self.images_u8.to(device, non_blocking=True),
            {hw: images.to(device, non_blocking=True) for hw, images in self.teacher_images_u8.items()},
            self.targets.to(device),
            tuple(soft.to(device) for soft in self.soft),
            self.image_ids,
            self.views,
            tuple(stored.to(device) for stored in self.stored),
        )


@dataclass(frozen=True)
class _Sample:
    pictures: Mapping[tuple[int, int], ImageArray]
    boxes: FloatArray
    labels: IntArray
    soft: tuple[tuple[FloatArray, FloatArray], ...]
    image_id: str
    view: View


class TrainLoader:
    """Batches of augmented images with their targets; see the module's docstring.

    Args:
        dataset: the training split, in memory as annotations.
        preprocess: the student's; its `resize` decides whether windows keep their aspect, its `pad_value` the fill.
        augment: what to draw views from.
        batch_size: images a step, over all ranks together.
        seed: of order and views.
        epochs: how many there will be; the last `augment.close_mosaic_epochs` go without mosaic.
        workers: threads; 0 renders in the caller's thread, "auto" fits the machine.
        cache_mib: memory for decoded images, at most.
        difficult: also learn from objects marked difficult (never from crowds).
        extra_hw: further (height, width) at which each view is rendered, for teachers that run online.
        answers: for each teacher, image id to its answer in original pixels, mapped through each view.
        plan: which view an epoch shows; drawn from `augment`, `seed` and `epochs` if left out.
        stores: what teachers said about the plan's views.
        rank: this process's place among `world_size`; each gets every `world_size`-th image of each batch.
        world_size: how many processes share the batches.

    Raises:
        DataError: the data set is empty, or an image has no answer.
        RecipeError: the batch size is not divisible by `world_size`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        preprocess: PreprocessSpec,
        augment: AugmentConfig,
        batch_size: int,
        seed: int,
        epochs: int,
        workers: int | Literal["auto"] = "auto",
        cache_mib: int = 1024,
        difficult: bool = False,
        extra_hw: Sequence[tuple[int, int]] = (),
        answers: Sequence[Mapping[str, SoftDetections]] = (),
        plan: ViewPlan | None = None,
        stores: Sequence[ViewStore] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check(dataset, answers, batch_size, world_size)
        self._dataset = dataset
        self._preprocess = preprocess
        self._plan = plan if plan is not None else ViewPlan(dataset, augment, preprocess, seed, epochs)
        self._stores = tuple(stores)
        self._batch_size = batch_size
        self._seed = seed
        self._workers = _auto_workers() if workers == "auto" else workers
        self._cache_bytes = cache_mib * 2**20
        self._cache = ImageCache(dataset.records, self._cache_bytes)
        self._sizes = tuple(dict.fromkeys([preprocess.input_hw, *extra_hw]))
        self._extra_hw = tuple(dict.fromkeys(extra_hw))
        self._answers = tuple(answers)
        self._rank, self._world_size = rank, world_size
        self._pool: ThreadPoolExecutor | None = None
        used = [~record.crowd if difficult else record.trainable for record in dataset.records]
        self._boxes = [record.boxes_xyxy[use] for record, use in zip(dataset.records, used, strict=True)]
        self._labels = [record.labels[use] for record, use in zip(dataset.records, used, strict=True)]

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch, the same on every rank; an incomplete one is left out, unless it is the only one."""
        return max(1, len(self._dataset) // self._batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch (from 0), from `start_batch` on.

        Raises:
            DataError: an image cannot be read; names it. Raised when its batch is due.
        """
        batches = self._batches(epoch)[start_batch:]
        slot = self._plan.slot(epoch)
        if self._workers == 0:
            for number, indices in enumerate(batches):
                for coming in batches[number + 1 : number + 2]:  # the system reads ahead while this batch is learned
                    for store in self._stores:
                        store.prefetch(slot, coming)
                yield self._collate([self._sample(slot, index) for index in indices], self._rows(slot, indices))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="edgekd-loader")
        ahead = _PREFETCH_BATCHES + self._workers // self._batch_size
        due: deque[tuple[list[Future[_Sample]], Future[list[StoredRows]]]] = deque()
        try:
            for indices in batches:
                rows = self._pool.submit(self._rows, slot, indices)
                due.append(([self._pool.submit(self._sample, slot, index) for index in indices], rows))
                if len(due) > ahead:
                    yield self._finished(*due.popleft())
            while due:
                yield self._finished(*due.popleft())
        finally:  # also when the caller stops early: nothing may go on rendering for nobody
            for futures, _ in due:
                for future in futures:
                    future.cancel()

    def _finished(self, samples: Sequence[Future[_Sample]], rows: Future[list[StoredRows]]) -> Batch:
        return self._collate([future.result() for future in samples], rows.result())

    def _rows(self, slot: int, indices: Sequence[int]) -> list[StoredRows]:
        return [store.rows(slot, indices) for store in self._stores]

    def close(self) -> None:
        """Stop the workers and free the cache; another `epoch` would start both again."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._cache = ImageCache(self._dataset.records, self._cache_bytes)

    def _batches(self, epoch: int) -> list[list[int]]:
        """This rank's record indices, one list a batch."""
        order = np.random.default_rng(np.random.SeedSequence([self._seed, epoch])).permutation(len(self._dataset))
        batches = []
        for step in range(self.steps_per_epoch):
            batch = order[step * self._batch_size : (step + 1) * self._batch_size]
            # Ranks must stay in step, so an incomplete batch is filled up with its own images, at most world_size - 1.
            batch = np.resize(batch, -(-len(batch) // self._world_size) * self._world_size)
            batches.append(batch[self._rank :: self._world_size].tolist())
        return batches

    def _sample(self, slot: int, index: int) -> _Sample:
        record, spec = self._dataset.records[index], self._preprocess
        view = self._plan.view(slot, index)
        shown = {part.record_index for part in view.parts}
        boxes, rows = boxes_in_view(view, {i: self._boxes[i] for i in shown}, spec.input_hw)
        labels = _of_rows({i: self._labels[i] for i in shown}, rows)
        pictures = {hw: render_view(view, self._cache.load, hw) for hw in self._sizes}
        soft = tuple(self._soft(view, shown, answers) for answers in self._answers)
        return _Sample(pictures, boxes, labels, soft, record.image_id, view)

    def _soft(
        self, view: View, shown: set[int], answers: Mapping[str, SoftDetections]
    ) -> tuple[FloatArray, FloatArray]:
        found = {i: answers[self._dataset.records[i].image_id] for i in shown}
        boxes, rows = boxes_in_view(view, {i: a.boxes_xyxy for i, a in found.items()}, self._preprocess.input_hw)
        return boxes, _of_rows({i: a.class_probs for i, a in found.items()}, rows)

    def _collate(self, samples: Sequence[_Sample], rows: Sequence[StoredRows]) -> Batch:
        def stack(hw: tuple[int, int]) -> Tensor:
            return torch.from_numpy(np.stack([sample.pictures[hw] for sample in samples])).permute(0, 3, 1, 2)

        soft = tuple(
            SoftTargets(
                [torch.from_numpy(sample.soft[k][0]) for sample in samples],
                [torch.from_numpy(sample.soft[k][1]) for sample in samples],
            )
            for k in range(len(self._answers))
        )
        images = {hw: stack(hw) for hw in self._sizes}
        return Batch(
            images[self._preprocess.input_hw],
            {hw: images[hw] for hw in self._extra_hw},
            Targets([torch.from_numpy(s.boxes) for s in samples], [torch.from_numpy(s.labels) for s in samples]),
            soft,
            tuple(sample.image_id for sample in samples),
            tuple(sample.view for sample in samples),
            _checked(rows, samples),
        )


def _of_rows(columns: Mapping[int, NDArray[Any]], rows: IntArray) -> NDArray[Any]:
    """Of each record's array, (N, ...), the (K, 2) rows (record index, row in its array): (K, ...)."""
    records = sorted(columns)
    starts = np.cumsum([0, *(len(columns[record]) for record in records[:-1])])
    place = starts[np.searchsorted(records, rows[:, 0])] + rows[:, 1]
    return np.concatenate([columns[record] for record in records])[place]


def _checked(stored: Sequence[StoredRows], samples: Sequence[_Sample]) -> tuple[Stored, ...]:
    """What stores hold, as tensors, once it is sure that it was said about these very views."""
    digests = [view_digest(sample.view) for sample in samples] if stored else []
    if any(rows.digests != digests for rows in stored):
        raise ArtifactError(
            "the teacher cache was made from other views than this run draws",
            fix="delete its folder (`distill.cache.folder`, or DIR/views): it is then made again",
        )
    return tuple(
        Stored(
            {name: torch.from_numpy(array) for name, array in rows.arrays.items()},
            SoftTargets(*([torch.from_numpy(array) for array in column] for column in rows.soft))
            if rows.soft
            else None,
        )
        for rows in stored
    )


def _check(dataset: Dataset, answers: Sequence[Mapping[str, SoftDetections]], batch_size: int, world_size: int) -> None:
    if not len(dataset):
        raise DataError(f"{dataset.root}: split {dataset.split!r} has no images to train on")
    for mapping in answers:
        missing = [record.image_id for record in dataset.records if record.image_id not in mapping]
        if missing:
            raise DataError(
                f"a teacher's answers lack {len(missing)} of {len(dataset)} images",
                got=f"none for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
                fix="let the teacher answer this data set again",
            )
    if batch_size % world_size:
        raise RecipeError(
            "the batch cannot be shared equally",
            got=f"batch_size {batch_size} for {world_size} processes",
            expected=f"a multiple of {world_size}",
        )


def _auto_workers() -> int:
    """Threads that help: on one or two cores the training step wants them all, and rendering in between is faster."""
    cores = usable_threads()
    return 0 if cores <= 2 else min(_MAX_AUTO_WORKERS, cores // 2)
