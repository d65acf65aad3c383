from __future__ import annotations

import platform

import psutil
import pytest

from edgekd.heap import give_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed pages in its heap")
def test_freed_memory_goes_back_although_something_behind_it_lives_on() -> None:
    process, size = psutil.Process(), 100_000  # below what glibc would map apart
    rows = [bytearray(size) for _ in range(2000)]
    kept = rows[::50]
    del rows
    before = process.memory_info().rss
    give_back()
    assert process.memory_info().rss < before - 50 * 2**20
    assert all(len(row) == size for row in kept)
