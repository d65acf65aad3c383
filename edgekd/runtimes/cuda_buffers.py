"""The four ways to the GPU's memory: PyCUDA and torch here, cuda-python and plain ctypes in `handle_buffers`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import MissingDependencyError
from edgekd.runtimes.buffers import Buffers, Event
from edgekd.runtimes.cuda_driver import CudaDriver, OnDriver
from edgekd.runtimes.handle_buffers import cuda_python_buffers, driver_buffers
from edgekd.types import Array

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, for which PyCUDA has no name


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
    return cuda_python_buffers(driver) if backend == "cuda-python" else driver_buffers(driver)


class PyCudaBuffers(OnDriver):
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
        """A new stream, which does not wait for the default one."""
        stream = self._cuda.Stream(_NON_BLOCKING)
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
        before = self._driver.create("cuCtxGetCurrent")
        self._context.detach()
        self._context = None
        if self._driver.create("cuCtxGetCurrent") != before:  # PyCUDA pushes a primary context to detach it, for good
            self._driver.create("cuCtxPopCurrent_v2")


class _PyCudaEvent:
    def __init__(self, event: Any, streams: dict[int, Any]) -> None:
        self._event, self._streams = event, streams

    def record(self, stream: int) -> None:
        self._event.record(self._streams[stream])

    def elapsed_ms(self, since: Any) -> float:
        self._event.synchronize()
        return float(self._event.time_since(since._event))


class TorchBuffers(OnDriver):
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
