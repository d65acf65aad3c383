"""What teachers say about a few augmented views of each image, asked once and kept on disk.

Features and raw outputs cannot follow an image through augmentation as boxes can, so the views themselves are fixed in
number: epoch e shows view e modulo `views`, replayed exactly. Each teacher has a store of its own, so that recipes
with other teachers, other terms or another student share what is equal.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekd.artifact import is_current, read_manifest, sha256_json, write_manifest
from edgekd.data.image_cache import ImageCache
from edgekd.data.view_plan import ViewPlan, view_digest
from edgekd.data.view_store import (
    BOXES,
    ENDS,
    PROBS,
    SHARD_IMAGES,
    VIEWS,
    Arrays,
    ViewStore,
    hold,
    shard_is_intact,
    shard_name,
    write_shard,
)
from edgekd.data.views import render_view
from edgekd.errors import ArtifactError, DistillationSetupError, TeacherError
from edgekd.teachers.base import Teacher, TeacherOutput
from edgekd.teachers.claims import fill_together
from edgekd.types import SoftDetections

CHUNK = 8
"""Views that a teacher answers at once."""

KIND = "views"
GIB = 2**30
DENSE = ("cls_logits", "bbox_regression", "objectness")

Progress = Callable[[int, int], None]
Fuse = Callable[[Sequence[SoftDetections]], SoftDetections]


@dataclass(frozen=True)
class Wanted:
    """What a recipe's terms need of a teacher besides what they are told anyway.

    Attributes:
        soft: boxes and class probabilities on the view itself. dense: raw outputs. taps: feature maps.
    """

    soft: bool
    dense: bool
    taps: tuple[str, ...]


@dataclass(frozen=True)
class Recording:
    """One teacher's answers to every view of a plan: the store that holds them, and how to fill it.

    Attributes:
        teacher: asked where the store has gaps. wanted: what is kept. plan: the views.
        root: the cache; the store is a folder in it, named by everything that decides its content.
        identity: the teacher's content and the data's.
    """

    teacher: Teacher
    wanted: Wanted
    plan: ViewPlan
    root: Path
    identity: Mapping[str, Any]

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything that decides what is kept."""
        return {
            **self.identity,
            "views": self.plan.identity(),
            "preprocess": self.teacher.preprocess.to_dict(),
            "classes": list(self.teacher.student_class_names),
            "kept": {"soft": self.wanted.soft, "dense": self.wanted.dense, "taps": list(self.wanted.taps)},
            "shard": SHARD_IMAGES,
        }

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self.root / sha256_json(self.inputs)[:16]

    @property
    def names(self) -> list[str]:
        """The shards, block by block of images, so that an image is decoded once for all its views."""
        blocks = range(-(-len(self.plan.dataset) // SHARD_IMAGES))
        return [shard_name(slot, block) for block in blocks for slot in self.plan.slots]

    def bytes_there(self) -> int:
        """What the store holds of this plan."""
        return sum(path.stat().st_size for name in self.names if (path := self.folder / name).is_file())

    def is_filled(self) -> bool:
        """Whether every shard is there; their checksums are compared by `fill`."""
        return all((self.folder / name).is_file() for name in self.names)

    def fill(self, progress: Progress | None = None) -> ViewStore:
        """Check every shard, make those that are missing or damaged, and open the store.

        Raises:
            TeacherError: the teacher fails, or its values do not fit half precision.
        """
        store = ViewStore(self.folder)
        cache = ImageCache(self.plan.dataset.records, 2 * SHARD_IMAGES * 2**20)
        fill_together(
            self.folder,
            self.names,
            lambda name, whole: shard_is_intact(self.folder / name, whole=whole),
            lambda name: write_shard(self.folder / name, self._answers(name, cache)),
            progress,
        )
        if not is_current(self.folder, KIND, self.inputs):
            write_manifest(self.folder, KIND, self.inputs, [], {"teacher": self.teacher.name})
        return store

    def measure(self, images: int = CHUNK) -> tuple[float, float]:
        """(bytes, seconds) a view, from asking the teacher about a few."""
        rows = np.linspace(0, len(self.plan.dataset) - 1, min(images, len(self.plan.dataset))).astype(int).tolist()
        cache = ImageCache(self.plan.dataset.records, 0)
        self._ask(self.plan.slots[0], rows[:1], cache)  # first calls are slow
        start = time.perf_counter()
        arrays = self._ask(self.plan.slots[0], rows, cache)
        return sum(a.nbytes for a in arrays.values()) / len(rows), (time.perf_counter() - start) / len(rows)

    def _answers(self, name: str, cache: ImageCache) -> Arrays:
        slot, block = (int(part) for part in name.split(".")[0].split("-"))
        last = min(len(self.plan.dataset), (block + 1) * SHARD_IMAGES)
        return self._ask(slot, range(block * SHARD_IMAGES, last), cache)

    def _ask(self, slot: int, indices: Sequence[int], cache: ImageCache) -> Arrays:
        views = [self.plan.view(slot, index) for index in indices]
        hw = self.teacher.preprocess.input_hw
        parts: list[Arrays] = []
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(views), CHUNK):
                pictures = pool.map(lambda view: render_view(view, cache.load, hw), views[start : start + CHUNK])
                images = torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2)
                with torch.no_grad():
                    answer = self.teacher.respond(images, self.wanted.taps, boxes=self.wanted.soft)
                parts.append(self._kept(answer))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if ENDS in arrays:
            arrays[ENDS] = np.cumsum(arrays[ENDS])
        return {**arrays, VIEWS: np.array([view_digest(view) for view in views], np.uint64)}

    def _kept(self, answer: TeacherOutput) -> Arrays:
        """What is kept of an answer; "soft.ends" still as counts."""
        kept: Arrays = {f"tap.{tap}": self._half(tap, answer.taps[tap]) for tap in self.wanted.taps}
        if self.wanted.dense and answer.dense is not None:
            tensors = ((name, getattr(answer.dense, name)) for name in DENSE)
            kept |= {f"dense.{name}": self._half(name, tensor) for name, tensor in tensors if tensor is not None}
        if self.wanted.soft:
            boxes = [box.cpu().numpy() for box in answer.soft.boxes_xyxy]
            probs = [prob.cpu().numpy() for prob in answer.soft.class_probs]
            kept |= soft_arrays([SoftDetections(b, p) for b, p in zip(boxes, probs, strict=True)])
        return kept

    def _half(self, what: str, values: Tensor) -> Any:
        half = values.detach().half()
        if not torch.isfinite(half).all():
            raise TeacherError(
                f"teacher {self.teacher.name}: {what} does not fit half precision",
                got=f"values up to {float(values.abs().max()):.3g}",
                expected="finite numbers below 65,504",
                fix="leave out `distill.cache`, so that the teacher runs on every view",
            )
        return half.cpu().numpy()


def soft_arrays(answers: Sequence[SoftDetections]) -> Arrays:
    """Answers as a shard keeps them; "soft.ends" as counts.

    Boxes stay in single precision: a half cannot tell neighbouring quarters of a pixel apart beyond 256.
    """
    return {
        ENDS: np.array([len(answer) for answer in answers], np.int64),
        BOXES: np.concatenate([np.asarray(answer.boxes_xyxy, np.float32).reshape(-1, 4) for answer in answers]),
        PROBS: np.concatenate([answer.class_probs for answer in answers]).astype(np.float16),
    }


def fill_fused(
    recordings: Sequence[Recording],
    stores: Sequence[ViewStore],
    fuse: Fuse,
    input_hw: tuple[int, int],
    identity: Mapping[str, Any],
) -> ViewStore:
    """The ensemble's answer to every view, from what each teacher said: no teacher is asked.

    Args:
        recordings: one a teacher, with soft answers. stores: theirs, filled.
        fuse: the ensemble's fusion. input_hw: the frame in which the fused boxes are kept.
        identity: what decides the fusion: its settings and the teachers' weights.
    """
    first = recordings[0]
    members = [sha256_json(recording.inputs) for recording in recordings]
    inputs = {"fused": members, "input_hw": list(input_hw), **identity}
    folder = first.root / sha256_json(inputs)[:16]
    store = ViewStore(folder)
    scales = [
        np.array([input_hw[1] / w, input_hw[0] / h] * 2, np.float32)
        for h, w in (recording.teacher.preprocess.input_hw for recording in recordings)
    ]

    def make(name: str) -> None:
        slot, block = (int(part) for part in name.split(".")[0].split("-"))
        indices = range(block * SHARD_IMAGES, min(len(first.plan.dataset), (block + 1) * SHARD_IMAGES))
        rows = [member.rows(slot, indices) for member in stores]
        answers = []
        for image in range(len(indices)):
            said = [
                SoftDetections(found.soft[0][image] * scale, found.soft[1][image])
                for found, scale in zip(rows, scales, strict=True)
                if found.soft is not None
            ]
            answers.append(fuse(said))
        arrays = soft_arrays(answers)
        arrays[ENDS] = np.cumsum(arrays[ENDS])
        write_shard(folder / name, {**arrays, VIEWS: np.array(rows[0].digests, np.uint64)})

    fill_together(folder, first.names, lambda name, whole: shard_is_intact(folder / name, whole=whole), make)
    if not is_current(folder, KIND, inputs):
        write_manifest(folder, KIND, inputs, [], {"teacher": "ensemble"})
    return store


@dataclass(frozen=True)
class Estimate:
    """What a cache will take.

    Attributes:
        total: bytes when full. to_write: bytes of that still to be written. seconds: to write them, by one process.
    """

    total: int
    to_write: int
    seconds: float

    def __str__(self) -> str:
        minutes = self.seconds / 60
        time_left = f"{self.seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
        return f"{self.total / GIB:.2f} GiB, {self.to_write / GIB:.2f} GiB of it to be written in about {time_left}"


def estimate(recordings: Sequence[Recording]) -> Estimate:
    """What the recordings will take, from asking each unfinished one's teacher about a few views; writes nothing."""
    total = to_write = 0
    seconds = 0.0
    for recording in recordings:
        there = recording.bytes_there()
        if recording.is_filled():
            total += there
            continue
        size, duration = recording.measure()
        views = len(recording.plan.slots) * len(recording.plan.dataset)
        whole = max(int(size * views), there)
        total, to_write = total + whole, to_write + whole - there
        seconds += duration * views * (whole - there) / whole
    return Estimate(total, to_write, seconds)


def make_room(root: Path, ours: Sequence[Path], needed: Estimate, budget: int) -> None:
    """Keep `root` within its budget: stores that no process uses are deleted, those longest unused first.

    Raises:
        DistillationSetupError: the recordings alone are beyond the budget, or the disk has no room for them.
    """
    there = {path.parent for path in root.glob("*/manifest.json")} - set(ours)
    others = {folder: _size(folder) for folder in there if _is_store(folder)}
    for folder in sorted(others, key=_last_used):
        if needed.total + sum(others.values()) <= budget or needed.total > budget:
            break
        if (held := hold(folder, alone=True)) is not None:
            with held:
                shutil.rmtree(folder)
            del others[folder]
    rest = sum(others.values())
    if needed.total + rest > budget:
        raise DistillationSetupError(
            "the teacher cache is beyond its disk budget",
            got=f"{needed}" + (f", beside {rest / GIB:.2f} GiB that other runs use" if rest else ""),
            expected=f"at most {budget / GIB:.2f} GiB (distill.cache.disk_budget_gib)",
            fix="fewer `distill.cache.views`, fewer taps in the terms, a larger budget, or `distill.cache.fallback: online`",
        )
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if needed.to_write > free:
        raise DistillationSetupError(
            "the disk has no room for the teacher cache",
            got=f"{free / GIB:.2f} GiB free in {root}",
            expected=f"{needed.to_write / GIB:.2f} GiB",
            fix="name another `distill.cache.folder`, or take fewer `distill.cache.views`",
        )


def _is_store(folder: Path) -> bool:
    """Whether a folder is ours to delete: the cache may share its own with runs, or with another tool's files."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError:
        return False
    return manifest is not None and manifest.kind == KIND


def _last_used(folder: Path) -> float:
    try:
        return (folder / ".in-use").stat().st_mtime
    except OSError:  # a copy, or being deleted by another process
        return 0.0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
