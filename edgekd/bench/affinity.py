"""Which CPUs a benchmark runs on, pinned so that the scheduler's moves are not measured; and OpenCV's threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from edgekd.errors import MissingDependencyError, UserError

_TASKS = Path("/proc/self/task")


def affinity() -> list[int] | None:
    """The CPUs that this process may run on; None where the system does not say."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return None


def parse_cpus(text: str) -> tuple[int, ...]:
    """ "0", "0,2" or "0-3,6" as CPU numbers.

    Raises:
        UserError: not a list of CPUs, or one that this process may not use.
        MissingDependencyError: this system does not pin.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError("not a list of CPUs", got=repr(text), expected="such as 0, 0,2 or 0-3")
        found |= set(range(int(first), int(last or first) + 1))
    allowed = affinity()
    if allowed is None:
        raise MissingDependencyError("this system cannot pin a process to CPUs", fix="leave --pin out")
    if not found or not found <= set(allowed):
        raise UserError(
            "CPUs that this process may not use",
            got=text,
            expected="among " + ",".join(map(str, allowed)),
        )
    return tuple(sorted(found))


@contextlib.contextmanager
def pinned(cpus: tuple[int, ...] | None) -> Iterator[None]:
    """Run every thread of this process, and all that it starts, on these CPUs only; None changes nothing."""
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    _pin_all(set(cpus))
    try:
        yield
    finally:
        _pin_all(before)


def _pin_all(cpus: set[int]) -> None:
    """Threads that are there already keep their own affinity, so each is told."""
    for task in [int(path.name) for path in _TASKS.iterdir()] if _TASKS.is_dir() else [0]:
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(task, cpus)


@contextlib.contextmanager
def opencv_threads(threads: int | None) -> Iterator[None]:
    """OpenCV resizes with all cores unless told otherwise; None leaves it all."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(-1 if threads is None else threads)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
