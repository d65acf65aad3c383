"""Virtual environments for what is measured against, made under the output folder: nothing is installed into edgekd's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

CPU_TORCH = "https://download.pytorch.org/whl/cpu"
_PIP = (
    "-m",
    "pip",
    "install",
    "--quiet",
    "--no-compile",
    "--disable-pip-version-check",
    "--retries",
    "1",
    "--timeout",
    "15",
)

Step = tuple[Sequence[str], str]
"""Arguments of `pip install`, and code that must run once it is done."""


class Skipped(Exception):
    """Something cannot be measured here; the text is the reason that is shown."""


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def make(folder: Path, *steps: Step) -> Path:
    """An environment's interpreter: made and filled step by step, each tried before the next.

    What came of it is remembered: an environment that works is used as it is, and one that does not is not tried again until
    its `skipped.txt` is deleted.

    Raises:
        Skipped: something cannot be installed, or does not work once it is.
    """
    python, done, failed = python_of(folder), folder / "ready", folder / "skipped.txt"
    if done.is_file():
        return python
    if failed.is_file():
        raise Skipped(f"{failed.read_text(encoding='utf-8').strip()} (an earlier run; delete {failed} to try again)")
    print(f"  making {folder}", file=sys.stderr, flush=True)
    try:
        venv.create(folder, with_pip=True, clear=True)
        for arguments, check in steps:
            run([str(python), *_PIP, *arguments], f"pip install {' '.join(arguments)}", 1800)
            run([str(python), "-c", check], f"{' '.join(arguments)} installs, but does not work", 300)
    except (OSError, subprocess.CalledProcessError, Skipped) as error:
        shutil.rmtree(folder, ignore_errors=True)  # a gigabyte that nobody can use
        folder.mkdir(parents=True)
        failed.write_text(f"{error}\n", encoding="utf-8")
        raise error if isinstance(error, Skipped) else Skipped(f"no virtual environment: {error}") from error
    done.touch()
    return python


def packages_of(folder: Path) -> str:
    """Where an environment keeps its packages."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return run([str(python_of(folder)), "-c", ask], "python", 60).strip()


def run(command: Sequence[str], what: str, timeout: float) -> str:
    """A command's output.

    Raises:
        Skipped: it failed or took too long; with the last line that it wrote of an error.
    """
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Skipped(f"{what}: {type(error).__name__}") from error
    if found.returncode:
        lines = [line.strip() for line in (found.stderr or found.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        raise Skipped(f"{what}: {(errors or lines or [f'exit {found.returncode}'])[-1][:300]}")
    return found.stdout
