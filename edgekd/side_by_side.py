"""Trainings that need nothing of each other, in processes of their own, side by side.

On a CPU a small network gains next to nothing from a second thread, so two trainings of one thread each do nearly twice the
work of one training of two. Each process has its share of the cores; a GPU is left to one training at a time.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from edgekd.artifact import MANIFEST_NAME
from edgekd.console import Terminal
from edgekd.errors import RuntimeFailure
from edgekd.recipe import TeacherConfig, TrainedTeacher
from edgekd.stages import ready_teachers, train_student, train_teacher
from edgekd.train import RunResult
from edgekd.workspace import Workspace, resolved_device

MEMORY_A_TRAINING = 2 << 30
"""Free memory, bytes, that a further training at once asks for, beside its image cache."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Training:
    """One training: of a teacher, or of the student alone where `teacher` is None."""

    work: Workspace
    teacher: TrainedTeacher | None
    out: Path


def train_independent(
    work: Workspace, teachers: Path, student: Path, jobs: int | None = None
) -> tuple[list[TeacherConfig], RunResult]:
    """The recipe's teachers, in `teachers`/NAME, and the student alone, which needs nothing of them.

    Args:
        jobs: trainings at once; None for as many as cores and memory allow, and one on a GPU.

    Raises:
        EdgeKDError: a training failed; the others end after the step under way and go on from there the next time.
    """
    trained = [config for config in work.recipe.teachers if isinstance(config, TrainedTeacher)]
    trainings = [_Training(work, config, teachers / config.name) for config in trained]
    trainings.append(_Training(work, None, student))
    pending = [one for one in trainings if not (one.out / MANIFEST_NAME).is_file()]
    at_once = min(len(pending), _trainings_at_once(work) if jobs is None else jobs)
    if at_once > 1:
        _run_all(pending, at_once)
        # All is there now: what follows only reads it, and need not say so.
        work = replace(work, terminal=Terminal(quiet=True))
    return ready_teachers(work, teachers), train_student(work, student)


def _trainings_at_once(work: Workspace) -> int:
    if resolved_device(work.device) != "cpu" or "RANK" in os.environ:
        return 1
    free = _free_memory()
    room = 1 if free is None else free // (MEMORY_A_TRAINING + work.recipe.data.cache_mib * 2**20)
    return max(1, min(_cores(), int(room)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_memory() -> int | None:
    """Bytes that programs may still take, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _run_all(trainings: Sequence[_Training], at_once: int) -> None:
    threads = max(1, _cores() // at_once)
    _ = trainings[0].work.data_identity  # found once, and sent along
    # spawned, not forked: a fork of a process that has used torch's threads may hang
    pool = ProcessPoolExecutor(
        at_once, multiprocessing.get_context("spawn"), initializer=_begin_process, initargs=(threads, os.getpid())
    )
    try:
        futures = [pool.submit(_train, one) for one in trainings]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BrokenProcessPool as error:
        raise RuntimeFailure(
            "a training's process was ended from outside",
            got=f"{at_once} trainings at once",
            fix="often it is memory: try `--jobs 1`; what is trained so far goes on with the same command",
        ) from error
    finally:
        for process in (pool._processes or {}).values():  # no public way to stop what is under way
            if process.is_alive() and sys.exc_info()[0] is not None:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_process(threads: int, parent: int) -> None:
    import torch

    torch.set_num_threads(threads)
    os.setpgrp()  # Ctrl-C reaches the first process alone, which then ends the others, each after its step
    if sys.platform == "linux":  # so that nothing goes on in a folder that the next run will want
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _train(training: _Training) -> None:
    try:
        if training.teacher is None:
            train_student(training.work, training.out)
        else:
            train_teacher(training.work, training.teacher, training.out)
    except KeyboardInterrupt:  # the checkpoint is written; a pool's process would wait for the next training
        os._exit(1)
