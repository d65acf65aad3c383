"""Who is measured against: torchvision's and Ultralytics' detectors exported in their own environments, and files at hand."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from environments import Skipped, Step, make, packages_of, run

EXPORTERS = Path(__file__).resolve().parent / "exporters"
SSDLITE, YOLOS = "torchvision-ssdlite320", ("yolo11n", "yolov8n")


@dataclass(frozen=True)
class Peer:
    """A detector of others as ONNX; `note` says what is special about it."""

    name: str
    file: Path
    note: str = ""


def gather(
    out: Path, given: dict[str, Path], size: int, torch_index: str, install: bool
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be had, and why not the others. A file that is given stands for the export of its name."""
    peers = [Peer(name, file, "given") for name, file in given.items()]
    skipped: dict[str, str] = {}
    for name in (SSDLITE, *YOLOS):
        if name in given:
            continue
        try:
            if not install:
                raise Skipped("--no-install, and no --onnx")
            peers.append(
                _torchvision(out, torch_index) if name == SSDLITE else _ultralytics(name, out, size, torch_index)
            )
        except Skipped as reason:
            skipped[name] = str(reason)
    return peers, skipped


def openvino(out: Path, install: bool) -> str | None:
    """Make `import openvino` work: from this environment, or from one of its own beside it. The reason if it cannot."""
    if importlib.util.find_spec("openvino") is not None:
        return None
    if not install:
        return "--no-install, and not in this environment"
    folder = out / "envs" / "openvino"
    try:
        make(folder, (["openvino"], "import openvino; openvino.Core().available_devices"))
        # The same interpreter, so its packages load here; last on the path, so that numpy stays edgekd's.
        sys.path.append(packages_of(folder))
    except Skipped as reason:
        return str(reason)
    return None


def _with_torch(torch_index: str) -> Step:
    packages = ["--index-url", torch_index, "torch", "torchvision"]
    return packages, "import torchvision; torchvision.ops.nms"  # a build for other libraries fails here


def _torchvision_python(out: Path, torch_index: str) -> Path:
    return make(out / "envs" / "torchvision", _with_torch(torch_index), (["onnx"], "import onnx"))


def _torchvision(out: Path, torch_index: str) -> Peer:
    python = _torchvision_python(out, torch_index)
    script = EXPORTERS / "torchvision_ssdlite.py"
    return _exported(SSDLITE, out / "peers" / f"{SSDLITE}.onnx", [str(python), str(script)])


def _ultralytics(name: str, out: Path, size: int, torch_index: str) -> Peer:
    _torchvision_python(out, torch_index)  # what fails there would fail here, a gigabyte later
    own = (["ultralytics", "onnx"], "import ultralytics")
    python = make(out / "envs" / "ultralytics", _with_torch(torch_index), own)
    command = [str(python), str(EXPORTERS / "ultralytics_yolo.py"), "--model", name, "--size", str(size)]
    return _exported(name, out / "peers" / f"{name}-{size}.onnx", command)


def _exported(name: str, file: Path, command: list[str]) -> Peer:
    said = ""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        said = run([*command, "--out", str(file)], f"exporting {name}", 1800)
    return Peer(name, file, next((line for line in said.splitlines() if line.startswith("untrained")), ""))
