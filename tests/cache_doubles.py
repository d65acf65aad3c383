"""A teacher that counts what it is asked, its recordings, and a process that makes one, which imports little."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekd.data import view_store
from edgekd.data.view_plan import ViewPlan
from edgekd.detectors.base import Detector
from edgekd.recipe import AugmentConfig
from edgekd.teachers import cache
from edgekd.teachers.base import TeacherOutput
from edgekd.teachers.cache import Recording, Wanted
from tests.toy import ToyTeacher, toy_dataset, toy_detector

SHARD = 8
"""Images a shard, instead of 64: to fill several takes an eighth of the time."""


class Counting(ToyTeacher):
    """Counts the views it was asked about."""

    def __init__(self, detector: Detector, name: str) -> None:
        super().__init__(detector, name)
        self.seen = 0

    def respond(self, images_u8: Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
        self.seen += len(images_u8)
        return super().respond(images_u8, taps, boxes)


def recording(folder: Path, teacher: ToyTeacher | None = None, **changes: Any) -> Recording:
    dataset = toy_dataset(folder / "images", count=changes.pop("count", SHARD + 6))
    teacher = teacher or Counting(toy_detector(seed=9), "a")
    wanted = changes.pop("wanted", Wanted(True, True, (next(iter(teacher.tap_specs)),)))
    settings = {"seed": 3, "epochs": 2, "views": 2, **changes}
    preprocess = settings.pop("preprocess", teacher.preprocess)
    augment = settings.pop("augment", AugmentConfig())
    identity = settings.pop("identity", {"teacher": "hash", "data": "hash"})
    plan = ViewPlan(dataset, augment, preprocess, settings["seed"], settings["epochs"], settings["views"])
    return Recording(teacher, wanted, plan, folder / "views", identity)


class Slow(Counting):
    """Takes its time, so that it can be interrupted."""

    def respond(self, images_u8: Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
        time.sleep(0.3)  # a shard
        return super().respond(images_u8, taps, boxes)


def fill(folder: Path, seen: Any, begin: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    for module in (view_store, cache):  # in a process of its own
        module.SHARD_IMAGES = SHARD  # type: ignore[attr-defined]
    teacher = Slow(toy_detector(seed=9), "a")
    begin.wait(300)
    recording(folder, teacher, count=3 * SHARD).fill()
    seen.put(teacher.seen)
