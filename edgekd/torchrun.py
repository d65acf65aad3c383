"""What torchrun has put into the environment: which of several processes this one is. Asked without loading torch."""

from __future__ import annotations

import os


def place() -> tuple[int, int]:
    """(This process's number, how many torchrun started); (0, 1) without it.

    A RANK alone is somebody else's: scripts of job arrays set it too.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), count) if count > 1 else (0, 1)


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return place()[1] > 1
