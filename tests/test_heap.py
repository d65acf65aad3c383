"""What glibc does with freed memory depends on all that a process did before, so that each test has a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

only_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")


def run_alone(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@only_glibc
def test_large_tensors_take_the_same_pages_again_while_freed_memory_is_kept() -> None:
    run_alone("""
import resource
import psutil, torch
from edgekd.training.heap import kept

size = 64 * 2**20
pages = size // resource.getpagesize()

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults_of_ten():
    before = page_faults()
    for _ in range(10):
        torch.ones(size // 4)
    return page_faults() - before

process = psutil.Process()
assert faults_of_ten() > 5 * pages
with kept():
    # Not at once: glibc's holes have to become as large as what is asked for with its alignment.
    assert any(faults_of_ten() < pages for _ in range(20))
    inside = process.memory_info().rss
assert process.memory_info().rss < inside - size // 2, "what was kept goes back at the end"
""")


@only_glibc
def test_freed_memory_goes_back_although_something_behind_it_lives_on() -> None:
    run_alone("""
import psutil
from edgekd.training.heap import give_back

process, size = psutil.Process(), 100_000  # below what glibc would map apart
rows = [bytearray(size) for _ in range(2000)]
kept = rows[::50]
del rows
before = process.memory_info().rss
give_back()
assert process.memory_info().rss < before - 50 * 2**20
assert all(len(row) == size for row in kept)
""")
