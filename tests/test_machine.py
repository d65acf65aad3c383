"""What a machine has, and what a container leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.machine import memory_bytes, usable_threads
from tests.sysfs_trees import write_tree

GIB = 2**30
MEMINFO = {"proc/meminfo": "MemTotal:       33554432 kB\nMemAvailable:   16777216 kB\nHugePages_Total:       0"}


def limited(most: object, used: int, inactive_file: int = 0) -> dict[str, object]:
    group = "sys/fs/cgroup"
    stat = f"anon {used - inactive_file}\ninactive_file {inactive_file}\nactive_file 0"
    return {f"{group}/memory.max": most, f"{group}/memory.current": used, f"{group}/memory.stat": stat}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, None)),
        (MEMINFO, (32 * GIB, 16 * GIB)),
        (MEMINFO | limited("max", 3 * GIB), (32 * GIB, 16 * GIB)),
        (MEMINFO | limited(4 * GIB, 3 * GIB), (4 * GIB, GIB)),
        (MEMINFO | limited(4 * GIB, 4 * GIB, inactive_file=2 * GIB), (4 * GIB, 2 * GIB)),
        (MEMINFO | limited(24 * GIB, GIB), (24 * GIB, 16 * GIB)),
        (MEMINFO | limited(64 * GIB, GIB), (32 * GIB, 16 * GIB)),
        (limited(4 * GIB, 5 * GIB), (4 * GIB, 0)),
    ],
)
def test_a_containers_memory_limit_counts(
    tmp_path: Path, files: dict[str, object], expected: tuple[int | None, int | None]
) -> None:
    assert memory_bytes(write_tree(tmp_path, files)) == expected


@pytest.mark.parametrize(("quota", "most"), [("max 100000", 64), ("100000 100000", 1), ("50000 100000", 1)])
def test_a_containers_share_of_the_cores_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, most: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert usable_threads(write_tree(tmp_path, {"sys/fs/cgroup/cpu.max": quota})) == most
