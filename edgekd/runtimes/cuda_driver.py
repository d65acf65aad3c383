"""The CUDA driver by ctypes: what every backend shares, and all that is needed where no CUDA package is installed.

libcuda comes with the GPU's driver, on a Jetson as on a desktop. Facts about the device, the primary context and graph
capture go through here whichever package holds the buffers, so that there is one code path for them.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import MissingDependencyError, RuntimeFailure

LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, _INTEGRATED
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: never waits for the default stream


@dataclass(frozen=True)
class DeviceFacts:
    """The device that an engine belongs to.

    Attributes:
        name: the GPU's, such as "Orin". compute_capability: such as "8.7".
        memory_bytes: of the device.
        cuda: the driver's CUDA version, such as "12.6".
        l4t: a Jetson's release, such as "36.4.3"; None elsewhere, and in containers that hide it.
        integrated: its memory is the CPU's too, as on a Jetson.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    cuda: str
    l4t: str | None
    integrated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def key(self) -> dict[str, Any]:
        """What an engine and its timings hold for; the exact memory and the driver differ from one boot to the next."""
        gigabytes = round(self.memory_bytes / 2**30)  # an Orin Nano and an AGX Orin share name and capability
        return {"name": self.name, "capability": self.compute_capability, "gigabytes": gigabytes, "l4t": self.l4t}


def l4t_release(root: Path = Path("/")) -> str | None:
    """A Jetson's L4T release, such as "36.4.3", or None elsewhere."""
    try:
        line = (root / "etc/nv_tegra_release").read_text(encoding="utf-8").splitlines()[0]
        # "# R36 (release), REVISION: 4.3, GCID: ..., BOARD: generic, ..."
        return f"{line.split('R', 1)[1].split()[0]}.{line.split('REVISION:', 1)[1].split(',')[0].strip()}"
    except (OSError, IndexError):
        return None


class CudaDriver:
    """One device's primary context, shared with torch and whatever else runs in this process.

    Args:
        index: which device.
        library: name or path of libcuda.

    Raises:
        MissingDependencyError: no driver, or no such device.
    """

    def __init__(self, index: int = 0, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise MissingDependencyError(
                "there is no CUDA driver here", got=error, fix="engines need an NVIDIA GPU; see `edgekd doctor`"
            ) from error
        try:
            self.call("cuInit", 0)
            device = ctypes.c_int()
            self.call("cuDeviceGet", ctypes.byref(device), index)
        except RuntimeFailure as error:
            raise MissingDependencyError(
                f"CUDA has no device {index}", got=error.got, fix="see `edgekd doctor`"
            ) from error
        self.device = device.value
        self._context = ctypes.c_void_p()

    def call(self, name: str, *arguments: object) -> None:
        """Call a driver function by name.

        Raises:
            RuntimeFailure: it did not succeed; says which error.
        """
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeFailure(f"CUDA failed in {name}", got=(text.value or b"").decode() or f"error {code}")

    def facts(self) -> DeviceFacts:
        """What this device is."""
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, len(name), self.device)
        numbers = []
        for attribute in (_MAJOR, _MINOR, _INTEGRATED):
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self.device)
            numbers.append(value.value)
        memory, version = ctypes.c_size_t(), ctypes.c_int()
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), self.device)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
        capability, shared = f"{numbers[0]}.{numbers[1]}", bool(numbers[2])
        return DeviceFacts(name.value.decode(), capability, memory.value, cuda, l4t_release(), shared)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The primary context, current within the block and popped after it whatever happens."""
        if not self._context:
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self.device)
        self.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            popped = ctypes.c_void_p()
            self.call("cuCtxPopCurrent_v2", ctypes.byref(popped))

    def release(self) -> None:
        """Let go of the primary context; it lives on while others hold it."""
        if self._context:
            self._context = ctypes.c_void_p()
            self.call("cuDevicePrimaryCtxRelease_v2", self.device)

    def create(self, function: str, *arguments: object) -> int:
        """Call a function whose first argument takes the handle or address that it makes; returns that."""
        handle = ctypes.c_void_p()
        self.call(function, ctypes.byref(handle), *arguments)
        return int(handle.value or 0)

    def stream(self) -> int:
        """A new stream that does not wait for the default one; the caller destroys it."""
        return self.create("cuStreamCreate", _NON_BLOCKING)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> DriverGraph:
        """What `enqueue` puts on `stream`, as a graph; nothing of it runs now.

        Raises:
            RuntimeFailure: something in it cannot be captured.
        """
        self.call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(RuntimeFailure):  # a stream must not be left capturing
                half_done = self._end_capture(stream)
                if half_done:
                    self.call("cuGraphDestroy", ctypes.c_void_p(half_done))
            raise
        graph = self._end_capture(stream)
        try:
            executable = self.create("cuGraphInstantiateWithFlags", ctypes.c_void_p(graph), ctypes.c_ulonglong(0))
        finally:
            self.call("cuGraphDestroy", ctypes.c_void_p(graph))
        return DriverGraph(self, executable)

    def _end_capture(self, stream: int) -> int:
        graph = ctypes.c_void_p()
        self.call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        return int(graph.value or 0)


class DriverGraph:
    """A captured graph, ready to be launched as often as wanted."""

    def __init__(self, driver: CudaDriver, executable: int) -> None:
        self._driver, self._executable = driver, executable

    def launch(self, stream: int) -> None:
        """Put the whole graph on a stream."""
        self._driver.call("cuGraphLaunch", ctypes.c_void_p(self._executable), ctypes.c_void_p(stream))

    def close(self) -> None:
        """Free it; a second call does nothing."""
        if self._executable:
            handle, self._executable = self._executable, 0
            self._driver.call("cuGraphExecDestroy", ctypes.c_void_p(handle))


class OnDriver:
    """What all backends have in common: the device, its primary context, and graphs."""

    name: str

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self.device = driver.facts()

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The primary context, pushed and popped."""
        return self._driver.context()

    def capture(self, stream: int, enqueue: Callable[[], None]) -> DriverGraph:
        """By the driver, from the stream's handle."""
        return self._driver.capture(stream, enqueue)
