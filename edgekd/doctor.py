"""What this machine can do: each thing is really started, in a process of its own, so that a crash is a finding.

Nothing heavy is imported here, so that the doctor can be asked on a machine where the installation is broken.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgekd.device.jetson import jetson_rails
from edgekd.errors import install_extra
from edgekd.machine import CPU_BF16, cpu_flags, cpu_model, memory_bytes, read_int, read_text, usable_threads

Status = Literal["ok", "missing", "failed"]

PROBE_TIMEOUT_S = 90.0
"""A GPU's first start may compile kernels."""

TINY_MODEL = (
    "CAgSADqGAQoSCgF4CgF3EgF5GgFjIgRDb252EgFwKjMIAQgBCAMIAxABQgF3SiQAAIA/AACAPwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPwAAgD9a"
    "GwoBeBIWChQIARIQCgIIAQoCCAEKAggECgIIBGIbCgF5EhYKFAgBEhAKAggBCgIIAQoCCAIKAggCQgQKABAN"
)
"""An ONNX file in base64: one 3x3 convolution of ones, "x" (1, 1, 4, 4) to "y" (1, 1, 2, 2); so 9s come out of 1s."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        group: heading, such as "ONNX Runtime". name: what was tried.
        status: "ok" it works; "missing" it is not there; "failed" it is there and does not work.
        needed: whether edgekd's basic functions need it.
        detail: versions, devices, sizes, or what went wrong. fix: how to get it, if it does not work.
    """

    group: str
    name: str
    status: Status
    detail: str = ""
    fix: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Examination:
    """All findings."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether training, export and the CPU benchmark can work."""
        return all(finding.status == "ok" for finding in self.findings if finding.needed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"schema": "edgekd.doctor/1", "ok": self.ok, "findings": [asdict(f) for f in self.findings]}


def examine(root: Path = Path("/")) -> Examination:
    """Look at everything.

    Args:
        root: where /sys and /proc are; another one in tests.
    """
    tasks: list[Callable[[], Sequence[Finding]]] = [
        _python,
        _packages,
        _torch,
        _onnxruntime,
        _tensorrt,
        _openvino,
        lambda: _sensors(root),
        lambda: _machine(root),
    ]
    with ThreadPoolExecutor(4) as pool:
        groups = list(pool.map(lambda task: task(), tasks))
    return Examination(tuple(finding for group in groups for finding in group))


def show(examination: Examination) -> None:
    """Print the findings for a person, to stdout."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    marks = {"ok": "[green]ok     [/green]", "missing": "[yellow]missing[/yellow]", "failed": "[red]failed [/red]"}
    group = ""
    for finding in examination.findings:
        if finding.group != group:
            group = finding.group
            console.print(f"\n[bold]{escape(group)}[/bold]")
        width = max(len(other.name) for other in examination.findings if other.group == group)
        console.print(
            f"  {marks[finding.status]}  {escape(finding.name.ljust(width))}  {escape(finding.detail)}".rstrip()
        )
        if finding.fix and finding.status != "ok":
            console.print(f"           {escape(finding.fix)}")
    verdict = "training, export and the CPU benchmark work here" if examination.ok else "the base does not work yet"
    console.print(f"\n{verdict}")


def probe(code: str, argument: str = "") -> dict[str, Any]:
    """Run Python code in a process of its own; it prints one JSON object as its last line.

    Returns:
        That object, or {"error": why not}; "absent" is true when a module was not found.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, argument],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {PROBE_TIMEOUT_S:.0f} s"}
    except OSError as error:
        return {"error": str(error)}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            answer = json.loads(lines[-1])
            if isinstance(answer, dict):
                return answer
        except ValueError:
            pass
    words = done.stderr.strip().splitlines()
    last = words[-1] if words else f"ended with code {done.returncode}"
    if done.returncode < 0:
        last = f"crashed with signal {-done.returncode}: {last}"
    return {"error": last[:300], "absent": last.startswith("ModuleNotFoundError")}


def _finding(group: str, name: str, answer: dict[str, Any], detail: str, fix: str, needed: bool = False) -> Finding:
    if "error" in answer:
        status: Status = "missing" if answer.get("absent") else "failed"
        return Finding(group, name, status, "" if status == "missing" else str(answer["error"]), fix, needed)
    return Finding(group, name, "ok", detail, "", needed)


def _python() -> list[Finding]:
    version = platform.python_version()
    good = sys.version_info[:2] >= (3, 10)
    return [
        Finding("Python", "version", "ok" if good else "failed", version, "install Python 3.10 to 3.13", True),
        Finding("Python", "platform", "ok", f"{platform.system()} {platform.machine()}"),
    ]


_PACKAGES = {"numpy": "numpy", "cv2": "opencv-python-headless", "PIL": "pillow", "pydantic": "pydantic", "onnx": "onnx"}


def _packages() -> list[Finding]:
    code = (
        "import importlib, json, sys\n"
        "module = importlib.import_module(sys.argv[1])\n"
        "print(json.dumps({'version': str(getattr(module, '__version__', ''))}))"
    )
    found = []
    for module, package in _PACKAGES.items():
        answer = probe(code, module)
        detail = str(answer.get("version", ""))
        found.append(_finding("Packages", package, answer, detail, f"pip install {package}", True))
    return found


_TORCH = """
import json, torch
devices = []
for index in range(torch.cuda.device_count()):
    facts = torch.cuda.get_device_properties(index)
    try:
        square = torch.ones(64, 64, device=f"cuda:{index}")
        works = float((square @ square)[0, 0]) == 64.0
        error = "" if works else "a matrix product came out wrong"
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    devices.append({"name": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1),
                    "capability": f"{facts.major}.{facts.minor}", "error": error})
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
                  "devices": devices}))
"""


def _torch() -> list[Finding]:
    answer = probe(_TORCH)
    fix = "pip install torch (see pytorch.org for the build that fits your GPU)"
    detail = f"{answer.get('version')}, {answer.get('threads')} threads"
    found = [_finding("PyTorch", "torch", answer, detail, fix, True)]
    if "error" in answer:
        return found
    for index, device in enumerate(answer["devices"]):
        detail = f"{device['name']}, {device['memory_gib']} GiB, compute {device['capability']}"
        status: Status = "failed" if device["error"] else "ok"
        why = f"{detail}: {device['error']}" if device["error"] else detail
        found.append(Finding("PyTorch", f"cuda:{index}", status, why, "the driver is older than this torch, or busy"))
    if not answer["devices"]:
        built = answer["cuda"]
        why = f"torch is built for CUDA {built}, no device is seen" if built else "this torch is built for the CPU"
        fix = "check nvidia-smi and the driver" if built else "install a CUDA build of torch where there is a GPU"
        found.append(Finding("PyTorch", "CUDA", "missing", why, fix))
    return found


_PROVIDER = """
import base64, json, sys
import numpy as np, onnxruntime as ort
name, model = sys.argv[1].split(" ")
options = ort.SessionOptions()
options.log_severity_level = 4
session = ort.InferenceSession(base64.b64decode(model), options, providers=[name])
session.disable_fallback()
if session.get_providers()[0] != name:
    raise RuntimeError("it silently fell back to " + session.get_providers()[0])
result = session.run(None, {"x": np.ones((1, 1, 4, 4), np.float32)})[0]
if not np.allclose(result, 9):
    raise RuntimeError("a convolution came out wrong")
print(json.dumps({}))
"""


def _onnxruntime() -> list[Finding]:
    group = "ONNX Runtime"
    code = (
        "import json, onnxruntime as ort\n"
        "print(json.dumps({'version': ort.__version__, 'all': ort.get_available_providers()}))"
    )
    answer = probe(code)
    fix = f"pip install onnxruntime ({install_extra('gpu')} for CUDA)"
    found = [_finding(group, "onnxruntime", answer, str(answer.get("version")), fix, True)]
    names = answer.get("all", [])
    for name in names:
        if name == "AzureExecutionProvider":  # calls a web service, computes nothing here
            continue
        started = probe(_PROVIDER, f"{name} {TINY_MODEL}")
        fix = "its libraries do not fit: compare the versions that ONNX Runtime's page on this provider asks for"
        found.append(_finding(group, name, started, "starts", fix, name == "CPUExecutionProvider"))
    if names and "CUDAExecutionProvider" not in names:
        fix = f"where there is an NVIDIA GPU: pip uninstall onnxruntime, then {install_extra('gpu')}"
        found.append(Finding(group, "CUDAExecutionProvider", "missing", "not in this build", fix))
    return found


def _tensorrt() -> list[Finding]:
    code = (
        "import json, tensorrt as trt\n"
        "builder = trt.Builder(trt.Logger(trt.Logger.ERROR))\n"
        "print(json.dumps({'version': trt.__version__, 'builder': bool(builder)}))"
    )
    answer = probe(code)
    fix = f"on a machine with an NVIDIA GPU: {install_extra('tensorrt')}; on a Jetson it comes with JetPack"
    return [_finding("TensorRT", "tensorrt", answer, str(answer.get("version")), fix)]


def _openvino() -> list[Finding]:
    code = (
        "import json, openvino as ov\n"
        "print(json.dumps({'version': ov.__version__, 'devices': ov.Core().available_devices}))"
    )
    answer = probe(code)
    detail = f"{answer.get('version')}: {', '.join(answer.get('devices', []))}"
    return [_finding("OpenVINO", "openvino", answer, detail, f"{install_extra('openvino')} (optional, for x86 CPUs)")]


def _sensors(root: Path) -> list[Finding]:
    group = "Power sensors"
    found = [_rapl(root)]
    code = (
        "import json, pynvml as n\n"
        "n.nvmlInit()\n"
        "read = lambda i: n.nvmlDeviceGetPowerUsage(n.nvmlDeviceGetHandleByIndex(i)) / 1000\n"
        "print(json.dumps({'watts': [read(i) for i in range(n.nvmlDeviceGetCount())]}))"
    )
    answer = probe(code)
    if answer.get("error", "").startswith("pynvml.NVMLError"):
        answer["absent"] = True
    detail = ", ".join(f"GPU {index}: {watts:.0f} W" for index, watts in enumerate(answer.get("watts", [])))
    found.append(_finding(group, "NVML", answer, detail, "needs an NVIDIA GPU and pip install nvidia-ml-py"))
    if (board := jetson_rails(root)) is not None:
        found.append(Finding(group, "Jetson rails", "ok", ", ".join(rail.name for rail in board.rails)))
    else:
        found.append(Finding(group, "Jetson rails", "missing", "", "found on NVIDIA Jetson boards only"))
    return found


def _rapl(root: Path) -> Finding:
    group, name = "Power sensors", "RAPL"
    counters = sorted(root.glob("sys/class/powercap/*rapl*/energy_uj"))
    if not counters:
        return Finding(group, name, "missing", "", "found on Intel and AMD machines, seldom inside a virtual one")
    readable = [counter for counter in counters if read_int(counter) is not None]
    if not readable:
        fix = f"sudo chmod a+r {counters[0].parent.parent}/*/energy_uj, until the next start"
        return Finding(group, name, "failed", "energy counters are readable by root only", fix)
    return Finding(group, name, "ok", ", ".join(read_text(counter.parent / "name") or "" for counter in readable))


def _machine(root: Path) -> list[Finding]:
    group = "Machine"
    flags = cpu_flags(root)
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", *CPU_BF16, "asimddp", "i8mm")
    useful = " ".join(flag for flag in wanted if flag in flags)
    model = cpu_model(root) or platform.machine()
    found = [Finding(group, "CPU", "ok", f"{model}, {usable_threads(root)} cores usable, {useful}")]
    total, free = (amount or 0 for amount in memory_bytes(root))
    detail = f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}"
    status: Status = "ok" if free >= 2 * 2**30 else "failed"
    found.append(Finding(group, "memory", status, detail, "training wants 2 GiB or more"))
    usage = shutil.disk_usage(Path.cwd())
    detail = f"{usage.free / 2**30:.0f} GiB free here"
    found.append(Finding(group, "disk", "ok" if usage.free > 2**30 else "failed", detail, "runs want 1 GiB or more"))
    return found
