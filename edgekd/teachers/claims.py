"""Many processes filling one folder: each file is made by one of them, and all go on when everything is there."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Sequence
from pathlib import Path

from edgekd.artifact import leftovers_of
from edgekd.torchrun import place

CLAIMS_FILE = ".claims"


def fill_together(
    folder: Path,
    names: Sequence[str],
    ready: Callable[[str, bool], bool],
    make: Callable[[str], None],
    done: Callable[[int, int], None] | None = None,
) -> int:
    """Make every file of `names` in `folder` that is not ready; returns how many this process made.

    Under torchrun rank r begins with every r-th file of `world`, then helps the others; processes that know nothing of
    each other share the work likewise. A claim is a lock on one byte of `.claims`, which the system frees when its process
    ends, however it ends; a file claimed by another is waited for, and made if that one died.

    Args:
        folder: made if it is not there.
        names: the files, in an order that is the same in every process.
        ready: whether a file is there and undamaged; its second argument says whether to read it whole, which one of
            several ranks does for each file.
        make: writes a file, atomically.
        done: called with (files ready, files in all).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = place()
    numbers = sorted(range(len(names)), key=lambda number: ((number - rank) % world, number))
    made = finished = 0
    claimed_elsewhere: list[int] = []
    with open(folder / CLAIMS_FILE, "ab") as claims:

        def settle(number: int) -> None:
            nonlocal made, finished
            name = names[number]
            if not ready(name, number % world == rank):
                # Of a process that was killed: nobody else writes what is claimed.
                for left in leftovers_of(folder / name):
                    left.unlink(missing_ok=True)
                make(name)
                made += 1
            fcntl.lockf(claims, fcntl.LOCK_UN, 1, number)
            finished += 1
            if done is not None:
                done(finished, len(names))

        for number in numbers:
            try:
                fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError:
                claimed_elsewhere.append(number)
                continue
            settle(number)
        for number in claimed_elsewhere:
            fcntl.lockf(claims, fcntl.LOCK_EX, 1, number)
            settle(number)
    return made
