"""The four ways to the GPU's memory: PyCUDA, cuda-python, torch, and ctypes on the driver alone."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgekd.errors import MissingDependencyError, RuntimeFailure
from edgekd.runtimes.buffers import Array, Buffers, Event, Graph
from edgekd.runtimes.cuda_driver import CudaDriver


def open_cuda_buffers(backend: str, index: int = 0) -> Buffers:
    """Buffers of one backend in `buffers.BACKENDS`.

    Raises:
        ImportError, MissingDependencyError: the package, the driver or the device is not there.
    """
    driver = CudaDriver(index)
    if backend == "pycuda":
        return PyCudaBuffers(driver, index)
    if backend == "torch":
        return TorchBuffers(driver, index)
    return HandleBuffers(backend, _CudaPython() if backend == "cuda-python" else _Ctypes(driver), driver)


class _Shared:
    """What the backends have in common: the primary context and graphs, by the driver."""

    name: str

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self.device = driver.facts()

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The primary context, pushed and popped."""
        return self._driver.context()

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Graph:
        """By the driver, from the stream's handle."""
        return self._driver.capture(stream, enqueue)


class PyCudaBuffers(_Shared):
    """By PyCUDA, without its `autoinit`, which makes a context of its own and breaks beside torch."""

    name = "pycuda"

    def __init__(self, driver: CudaDriver, index: int) -> None:
        import pycuda.driver as cuda

        super().__init__(driver)
        self._cuda: Any = cuda
        cuda.init()
        self._context: Any = cuda.Device(index).retain_primary_context()
        self._streams: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}

    @contextlib.contextmanager
    def _pushed(self) -> Any:
        """PyCUDA keeps a stack of contexts of its own, so that it must do the pushing."""
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The primary context, pushed and popped by PyCUDA."""
        found: contextlib.AbstractContextManager[None] = self._pushed()
        return found

    def stream(self) -> int:
        """A new stream."""
        stream = self._cuda.Stream()
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def synchronise(self, stream: int) -> None:
        """Wait for a stream."""
        self._streams[stream].synchronize()

    def alloc(self, size: int) -> int:
        """Device memory."""
        memory = self._cuda.mem_alloc(max(size, 1))
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        """Give it back."""
        self._memory.pop(address).free()

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """A page-locked array; PyCUDA frees it with its last reference."""
        array: Array = self._cuda.pagelocked_empty(tuple(shape), np.dtype(dtype))
        return array

    def copy_to_device(self, address: int, host: Array, stream: int) -> None:
        """Asynchronous."""
        self._cuda.memcpy_htod_async(self._memory[address], host, self._streams[stream])

    def copy_to_host(self, host: Array, address: int, stream: int) -> None:
        """Asynchronous."""
        self._cuda.memcpy_dtoh_async(host, self._memory[address], self._streams[stream])

    def event(self) -> Event:
        """A CUDA event."""
        return _PyCudaEvent(self._cuda.Event(), self._streams)

    def close(self) -> None:
        """Free memory and streams, then let go of the context."""
        if self._context is None:
            return
        with self.active():
            for memory in self._memory.values():
                memory.free()
            self._memory.clear()
            self._streams.clear()
        self._context.detach()
        self._context = None


class _PyCudaEvent:
    def __init__(self, event: Any, streams: dict[int, Any]) -> None:
        self._event, self._streams = event, streams

    def record(self, stream: int) -> None:
        self._event.record(self._streams[stream])

    def elapsed_ms(self, since: Any) -> float:
        self._event.synchronize()
        return float(self._event.time_since(since._event))


class TorchBuffers(_Shared):
    """By torch, for machines that have nothing else."""

    name = "torch"

    def __init__(self, driver: CudaDriver, index: int) -> None:
        import torch

        super().__init__(driver)
        if not torch.cuda.is_available():
            raise MissingDependencyError("this torch sees no CUDA device", got=f"torch {torch.__version__}")
        self._torch: Any = torch
        self._place = torch.device("cuda", index)
        self._streams: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}

    def stream(self) -> int:
        """A new stream."""
        stream = self._torch.cuda.Stream(self._place)
        self._streams[int(stream.cuda_stream)] = stream
        return int(stream.cuda_stream)

    def synchronise(self, stream: int) -> None:
        """Wait for a stream."""
        self._streams[stream].synchronize()

    def alloc(self, size: int) -> int:
        """Device memory from torch's allocator."""
        memory = self._torch.empty(max(size, 1), dtype=self._torch.uint8, device=self._place)
        self._memory[int(memory.data_ptr())] = memory
        return int(memory.data_ptr())

    def free(self, address: int) -> None:
        """Give it back."""
        del self._memory[address]

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """A page-locked array; it keeps torch's tensor alive."""
        size = max(1, prod(shape)) * np.dtype(dtype).itemsize
        raw = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True).numpy()
        array: Array = raw.view(dtype)[: prod(shape)].reshape(tuple(shape))
        return array

    def copy_to_device(self, address: int, host: Array, stream: int) -> None:
        """Asynchronous."""
        with self._torch.cuda.stream(self._streams[stream]):
            self._memory[address][: host.nbytes].copy_(self._bytes(host), non_blocking=True)

    def copy_to_host(self, host: Array, address: int, stream: int) -> None:
        """Asynchronous."""
        with self._torch.cuda.stream(self._streams[stream]):
            self._bytes(host).copy_(self._memory[address][: host.nbytes], non_blocking=True)

    def _bytes(self, host: Array) -> Any:
        return self._torch.from_numpy(host.reshape(-1).view(np.uint8))

    def event(self) -> Event:
        """A CUDA event."""
        return _TorchEvent(self._torch.cuda.Event(enable_timing=True), self._streams)

    def close(self) -> None:
        """Free memory and streams."""
        self._memory.clear()
        self._streams.clear()
        self._driver.release()


class _TorchEvent:
    def __init__(self, event: Any, streams: dict[int, Any]) -> None:
        self._event, self._streams = event, streams

    def record(self, stream: int) -> None:
        self._event.record(self._streams[stream])

    def elapsed_ms(self, since: Any) -> float:
        self._event.synchronize()
        return float(since._event.elapsed_time(self._event))


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


class HandleBuffers(_Shared):
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
        memory: NDArray[Any] = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))
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
