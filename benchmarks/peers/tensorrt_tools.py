"""NVIDIA's own tools on the same ONNX files, where TensorRT exists: trtexec for latency, Polygraphy for agreement."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from environments import Skipped, run

_MEDIAN = re.compile(r"(?P<what>Latency|GPU Compute Time): .*?median = (?P<ms>[0-9.]+) ms")
_POLYGRAPHY = re.compile(r"(?P<runner>\S+)\s.*?Average inference time: (?P<ms>[0-9.]+) ms")


def measure(files: dict[str, Path]) -> list[dict[str, Any]]:
    """One entry a file and tool: median milliseconds, or why there are none."""
    entries = []
    for name, file in files.items():
        for tool, ask in (("trtexec", trtexec), ("polygraphy", polygraphy)):
            try:
                entries.append({"name": name, "tool": tool, **ask(file)})
            except Skipped as reason:
                entries.append({"name": name, "tool": tool, "skipped": str(reason)})
    return entries


def trtexec(file: Path) -> dict[str, Any]:
    """Median milliseconds of `trtexec --fp16`: "latency" with copies, "compute" without."""
    program = _program("trtexec", "/usr/src/tensorrt/bin/trtexec")
    flags = [f"--onnx={file}", "--fp16", "--warmUp=1000", "--duration=5", "--useSpinWait"]
    text = run([program, *flags], "trtexec", 1800)
    return read_trtexec(text)


def read_trtexec(text: str) -> dict[str, Any]:
    """The medians in trtexec's report.

    Raises:
        Skipped: there are none.
    """
    found = {match["what"]: float(match["ms"]) for match in _MEDIAN.finditer(text)}
    if "GPU Compute Time" not in found:
        raise Skipped("trtexec printed no medians")
    return {"latency_ms": found.get("Latency"), "compute_ms": found["GPU Compute Time"]}


def polygraphy(file: Path) -> dict[str, Any]:
    """Average milliseconds of each of Polygraphy's runners; it fails where TensorRT and ONNX Runtime disagree."""
    text = run([_program("polygraphy"), "run", str(file), "--trt", "--onnxrt"], "polygraphy", 1800)
    return {"average_ms": {match["runner"]: float(match["ms"]) for match in _POLYGRAPHY.finditer(text)}}


def _program(name: str, *places: str) -> str:
    found = shutil.which(name) or next((place for place in places if Path(place).is_file()), None)
    if found is None:
        raise Skipped(f"{name} is not installed here")
    return found
