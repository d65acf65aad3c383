"""Peak memory of a deployed detector, measured in a process of its own.

In the benchmark's own process every artefact would count the others. The child is `python -m edgekd.bench.memory`; it
loads the artefacts it is given, answers a few images with all of them, and prints what the kernel says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of resident memory.

    Attributes:
        peak_bytes: the whole process at its largest, interpreter and libraries included.
        model_bytes: how much of that came with loading and running the artefacts.
    """

    peak_bytes: int
    model_bytes: int


def peak_memory(loads: Sequence[Mapping[str, Any]], images: Sequence[Path]) -> PeakMemory | None:
    """Peak memory of a fresh process that holds all artefacts and answers `images`; None if it cannot be measured.

    Args:
        loads: keyword arguments of `load_predictor`, plain JSON types; one artefact, or all members of an ensemble.
        images: a handful suffices.
    """
    request = {"loads": [dict(load) for load in loads], "images": [str(path.resolve()) for path in images]}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgekd.bench.memory"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
            env=environment,
        )
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        return PeakMemory(int(answer["peak_bytes"]), max(0, int(answer["peak_bytes"]) - int(answer["before_bytes"])))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, IndexError):
        return None


def process_peak_bytes() -> int:
    """The largest resident memory of this process so far.

    On Linux from VmHWM: `ru_maxrss` survives an exec, so a child would begin with its parent's.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _child() -> None:
    """Read a request from standard input, answer it, print one line of JSON."""
    request = json.load(sys.stdin)
    from edgekd.data.images import load_image
    from edgekd.predictor import load_predictor
    from edgekd.recipe import OnnxTeacher

    images = [load_image(Path(path)) for path in request["images"]]
    before = process_peak_bytes()
    predictors = []
    for load in request["loads"]:
        options = load.pop("options", None)
        predictors.append(load_predictor(**load, options=None if options is None else OnnxTeacher(**options)))
    for image in images:
        for predictor in predictors:
            predictor.detect(image)
    print(json.dumps({"before_bytes": before, "peak_bytes": process_peak_bytes()}))


if __name__ == "__main__":
    _child()
