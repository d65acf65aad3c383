"""Tasks in processes of their own, side by side, each begun as soon as what it needs is there.

On a CPU a small network gains next to nothing from a second thread, so two trainings of one thread each do nearly twice the
work of one training of two. Each process has its share of the cores; a GPU is left to one task at a time.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from edgekd.errors import RuntimeFailure
from edgekd.machine import memory_bytes, usable_threads
from edgekd.torchrun import launched
from edgekd.workspace import Workspace, resolved_device

MEMORY_A_TASK = 2 << 30
"""Free memory, bytes, that a further task at once asks for, beside its image cache."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes:
        name: unique. call: given the workspace, in another process; it and what it returns can be pickled.
        needs: names of tasks that have to be done before; names that are not among the tasks count as done.
    """

    name: str
    call: Callable[[Workspace], Any]
    needs: tuple[str, ...] = ()


def tasks_at_once(work: Workspace) -> int:
    """How many tasks cores and memory allow; one on a GPU, or where torchrun has started several processes."""
    if resolved_device(work.device) != "cpu" or launched():
        return 1
    _, free = memory_bytes()
    room = 1 if free is None else free // (MEMORY_A_TASK + work.recipe.data.cache_mib * 2**20)
    return max(1, min(usable_threads(), int(room)))


def run_side_by_side(
    work: Workspace, tasks: Sequence[Task], at_once: int, done: Callable[[str, Any], None] | None = None
) -> None:
    """Do the tasks, the earlier ones first where there is a choice.

    Args:
        at_once: tasks at once. done: told the name and the result of each that has ended, in this process.

    Raises:
        EdgeKDError: a task failed; the others end (a training with a checkpoint, after the step under way).
    """
    _ = work.data_identity  # found once, and sent along
    # spawned, not forked: a fork of a process that has used torch's threads may hang
    pool = ProcessPoolExecutor(
        at_once, multiprocessing.get_context("spawn"), initializer=_begin_process, initargs=(work, os.getpid())
    )
    waiting = list(tasks)
    running: dict[Future[Any], Task] = {}
    try:
        while waiting or running:
            unfinished = {task.name for task in [*waiting, *running.values()]}
            ready = [task for task in waiting if unfinished.isdisjoint(task.needs)]
            threads = max(1, usable_threads() // min(at_once, len(running) + len(ready)))
            for task in ready[: at_once - len(running)]:
                waiting.remove(task)
                running[pool.submit(_do, task, threads)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, result = running.pop(future), future.result()
                if done is not None:
                    done(task.name, result)
    except BrokenProcessPool as error:
        raise RuntimeFailure(
            "a process was ended from outside",
            got=f"{at_once} at once",
            fix="often it is memory: try `--jobs 1`; what is trained so far goes on with the same command",
        ) from error
    finally:
        for process in (pool._processes or {}).values():  # no public way to stop what is under way
            if process.is_alive() and sys.exc_info()[0] is not None:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


_work: Workspace
"""In a process of the pool: the workspace, sent once and not with every task."""


def _begin_process(work: Workspace, parent: int) -> None:
    global _work
    _work = work
    os.setpgrp()  # Ctrl-C reaches the first process alone, which then ends the others, each after its step
    if sys.platform == "linux":  # so that nothing goes on in a folder that the next run will want
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _do(task: Task, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    try:
        return task.call(_work)
    except KeyboardInterrupt:  # the checkpoint is written; a pool's process would wait for the next task
        os._exit(1)
