"""Buffers by the CUDA driver's own functions, with handles as integers: through cuda-python, or through ctypes alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgekd.errors import RuntimeFailure
from edgekd.runtimes.buffers import Event
from edgekd.runtimes.cuda_driver import CudaDriver, OnDriver
from edgekd.types import Array

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


def cuda_python_buffers(driver: CudaDriver) -> HandleBuffers:
    """Through NVIDIA's cuda-python.

    Raises:
        ImportError: it is not installed.
    """
    return HandleBuffers("cuda-python", _CudaPython(), driver)


def driver_buffers(driver: CudaDriver) -> HandleBuffers:
    """Through ctypes, which needs no package."""
    return HandleBuffers("driver", _Ctypes(driver), driver)


class _Calls(Protocol):
    """The driver's functions by their plain names, with handles and addresses as integers."""

    def make(self, function: str, *arguments: int) -> int:
        """What the function makes."""
        ...

    def do(self, function: str, *arguments: int) -> None:
        """Call it."""
        ...

    def elapsed_ms(self, start: int, end: int) -> float:
        """Time between two events that have happened."""
        ...


class _Ctypes:
    """Straight into libcuda."""

    _VERSIONS = (
        "cuMemAlloc",
        "cuMemFree",
        "cuMemcpyHtoDAsync",
        "cuMemcpyDtoHAsync",
        "cuMemAllocHost",
        "cuStreamDestroy",
        "cuEventDestroy",
    )

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver

    def _name(self, function: str) -> str:
        return f"{function}_v2" if function in self._VERSIONS else function

    def make(self, function: str, *arguments: int) -> int:
        return self._driver.create(self._name(function), *map(ctypes.c_size_t, arguments))

    def do(self, function: str, *arguments: int) -> None:
        self._driver.call(self._name(function), *map(ctypes.c_size_t, arguments))

    def elapsed_ms(self, start: int, end: int) -> float:
        value = ctypes.c_float()
        self._driver.call("cuEventElapsedTime", ctypes.byref(value), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return float(value.value)


class _CudaPython:
    """Through NVIDIA's package, whose functions return (error, result...)."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError:
            from cuda import cuda as driver
        self._cuda: Any = driver

    def _call(self, function: str, *arguments: int) -> Any:
        error, *results = getattr(self._cuda, function)(*arguments)
        if int(error) != 0:
            raise RuntimeFailure(f"CUDA failed in {function}", got=getattr(error, "name", error))
        return results[0] if results else None

    def make(self, function: str, *arguments: int) -> int:
        return int(self._call(function, *arguments))

    def do(self, function: str, *arguments: int) -> None:
        self._call(function, *arguments)

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._call("cuEventElapsedTime", start, end))


class HandleBuffers(OnDriver):
    """By the driver's own functions, through cuda-python or ctypes."""

    def __init__(self, name: str, calls: _Calls, driver: CudaDriver) -> None:
        super().__init__(driver)
        self.name, self._calls = name, calls
        self._memory: set[int] = set()
        self._pinned: list[int] = []
        self._streams: list[int] = []
        self._events: list[int] = []

    def stream(self) -> int:
        """A new stream, which does not wait for the default one."""
        self._streams.append(self._calls.make("cuStreamCreate", 1))
        return self._streams[-1]

    def synchronise(self, stream: int) -> None:
        """Wait for a stream."""
        self._calls.do("cuStreamSynchronize", stream)

    def alloc(self, size: int) -> int:
        """Device memory."""
        address = self._calls.make("cuMemAlloc", max(size, 1))
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        """Give it back."""
        self._memory.remove(address)
        self._calls.do("cuMemFree", address)

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """A page-locked array; it must not be used after `close`."""
        kind = np.dtype(dtype)
        size = max(1, prod(shape) * kind.itemsize)
        address = self._calls.make("cuMemAllocHost", size)
        self._pinned.append(address)
        memory: Array = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))
        array: Array = memory[: prod(shape) * kind.itemsize].view(kind).reshape(tuple(shape))
        return array

    def copy_to_device(self, address: int, host: Array, stream: int) -> None:
        """Asynchronous."""
        self._calls.do("cuMemcpyHtoDAsync", address, host.ctypes.data, host.nbytes, stream)

    def copy_to_host(self, host: Array, address: int, stream: int) -> None:
        """Asynchronous."""
        self._calls.do("cuMemcpyDtoHAsync", host.ctypes.data, address, host.nbytes, stream)

    def event(self) -> Event:
        """A CUDA event."""
        self._events.append(self._calls.make("cuEventCreate", 0))
        return _HandleEvent(self._calls, self._events[-1])

    def close(self) -> None:
        """Free everything, then let go of the context."""
        if self._memory or self._pinned or self._streams or self._events:
            self._free_all()
        self._driver.release()

    def _free_all(self) -> None:
        with self.active():
            for function, handles in (
                ("cuMemFree", list(self._memory)),
                ("cuMemFreeHost", self._pinned),
                ("cuEventDestroy", self._events),
                ("cuStreamDestroy", self._streams),
            ):
                for handle in handles:
                    self._calls.do(function, handle)
        self._memory, self._pinned, self._streams, self._events = set(), [], [], []


class _HandleEvent:
    def __init__(self, calls: _Calls, handle: int) -> None:
        self._calls, self._handle = calls, handle

    def record(self, stream: int) -> None:
        self._calls.do("cuEventRecord", self._handle, stream)

    def elapsed_ms(self, since: Any) -> float:
        self._calls.do("cuEventSynchronize", self._handle)
        return self._calls.elapsed_ms(since._handle, self._handle)
