"""NVIDIA's own Python bindings of each supported TensorRT, importable without the library: fetched into a cache
outside the repository (they are proprietary), over stub libraries that define the few symbols they need.

Run as a program (in a process of its own, since only one version can be imported), it prints what the bindings have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

WHOLE = "8.5.3.1"
"""JetPack 5's branch: only in a wheel of 549 MB, of all of TensorRT, for Python 3.6 to 3.10. Its names were read from that
wheel, over a stub of its plugin library, on Python 3.8."""
PACKAGES = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3.9": "tensorrt-cu12-bindings==10.13.3.9",
    "10.16.1.11": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu12-bindings==11.4.0.106",
}


class Unavailable(Exception):
    """The wheel cannot be had here, or there is no compiler for the stubs."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgekd" / "tensorrt-bindings"


def surface(version: str, wanted: list[str]) -> dict[str, Any]:
    """{"version", "classes": {class: {member: docstring}}, "functions"} of the real bindings.

    Args:
        wanted: the classes to list.

    Raises:
        Unavailable: they cannot be had.
    """
    if version == WHOLE:
        raise Unavailable("its wheel has 549 MB")
    folder = _unpacked(version)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder / "stubs"), "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, __file__, *wanted], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    if done.returncode != 0:
        raise AssertionError(f"the bindings of {version} do not import over the stubs: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _unpacked(version: str) -> Path:
    folder = cache_folder() / version
    if not (folder / "stubs" / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _download(PACKAGES[version], folder)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        _write_stubs(next(folder.rglob("tensorrt.so")), folder / "stubs")
    return folder


def _download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    try:
        done = subprocess.run([*command, requirement], capture_output=True, text=True, timeout=90, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{requirement}: {error}") from error
    if done.returncode != 0:
        raise Unavailable(f"{requirement}: {done.stderr.strip().splitlines()[-1:]}")


def _write_stubs(library: Path, folder: Path) -> None:
    """A shared library under each NVIDIA soname, with a function for every symbol that nothing else defines."""
    folder.mkdir(exist_ok=True)
    needed = [line.split("[")[1].rstrip("]") for line in _lines("readelf", "-d", library) if "(NEEDED)" in line]
    undefined = [line.split()[-1] for line in _lines("nm", "-D", "--undefined-only", library) if " U " in line]
    ours = [name for name in undefined if "@" not in name and not name.startswith(("Py", "_Py", "dl"))]
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ours), encoding="utf-8")
    for soname in needed:
        if soname.startswith("libnv"):
            _lines("gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", folder / soname, source)
    (folder / "done").touch()


def _lines(*command: str | Path) -> list[str]:
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    return done.stdout.splitlines()


def _print_surface(wanted: list[str]) -> None:
    import tensorrt_bindings as trt  # type: ignore[import-not-found]

    classes = {}
    for name in wanted:
        owner = getattr(trt, name, None)
        if owner is not None:
            classes[name] = {member: getattr(owner, member).__doc__ or "" for member in dir(owner)}
    builder = "built"
    try:
        trt.Builder(trt.Logger())
    except TypeError:
        builder = "TypeError"
    print(json.dumps({"version": trt.__version__, "classes": classes, "module": dir(trt), "builder": builder}))


if __name__ == "__main__":
    _print_surface(sys.argv[1:])
