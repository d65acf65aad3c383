"""Device memory, page-locked host memory, streams, events and graphs, behind one small protocol.

Four packages can stand behind it; `open_buffers` takes the first that works. All of them use the device's primary
context, pushed for the length of a call, so that torch can live beside them.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgekd.errors import MissingDependencyError, UserError
from edgekd.runtimes.cuda_driver import DeviceFacts
from edgekd.types import Array

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

BACKENDS = ("pycuda", "cuda-python", "torch", "driver")
"""In the order in which they are tried; "driver" is ctypes on libcuda, which needs no package."""


class Graph(Protocol):
    """Captured work."""

    def launch(self, stream: int) -> None:
        """Put all of it on a stream."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


class Event(Protocol):
    """A point on a stream that can be timed."""

    def record(self, stream: int) -> None:
        """Mark where the stream is now."""
        ...

    def elapsed_ms(self, since: Event) -> float:
        """Milliseconds of GPU time since an earlier event, once both have happened (waits for this one)."""
        ...


class Buffers(Protocol):
    """Memory and order on one device. Streams and device memory are spoken of by integer handle and address.

    Every method but `active` is called inside `with active():`.

    Attributes:
        name: the package behind it. device: what it runs on.
    """

    name: str
    device: DeviceFacts

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The device's primary context, current within the block."""
        ...

    def stream(self) -> int:
        """A new stream, freed by `close`."""
        ...

    def synchronise(self, stream: int) -> None:
        """Wait until all that was put on a stream is done."""
        ...

    def alloc(self, size: int) -> int:
        """Address of `size` bytes of device memory, freed by `free` or `close`."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back."""
        ...

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """A page-locked array on the host, which lives as long as `self` at least."""
        ...

    def copy_to_device(self, address: int, host: Array, stream: int) -> None:
        """Copy a pinned, contiguous array to the device, in the stream's order."""
        ...

    def copy_to_host(self, host: Array, address: int, stream: int) -> None:
        """Fill a pinned, contiguous array from the device, in the stream's order."""
        ...

    def event(self) -> Event:
        """A new event."""
        ...

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` puts on the stream, as a graph; it does not run."""
        ...

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        ...


def open_buffers(backend: str | None = None, index: int = 0) -> Buffers:
    """Buffers on a device, by the first backend that works, or by the named one.

    Raises:
        MissingDependencyError: none works here; says why each did not.
        UserError: an unknown backend.
    """
    from edgekd.runtimes.cuda_buffers import open_cuda_buffers

    if backend is not None and backend not in BACKENDS:
        raise UserError("unknown buffer backend", got=backend, expected=", ".join(BACKENDS))
    reasons = []
    for name in BACKENDS if backend is None else (backend,):
        try:
            return open_cuda_buffers(name, index)
        except Exception as error:  # a package that does not fit this machine's CUDA or NumPy raises whatever it likes
            reasons.append(f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}")
    raise MissingDependencyError(
        "no way to reach the GPU's memory",
        got="; ".join(reasons),
        expected="one of " + ", ".join(BACKENDS),
        fix="pip install pycuda (or cuda-python) on a machine with an NVIDIA GPU; see `edgekd doctor`",
    )


class HostBuffers:
    """The protocol on ordinary memory, doing everything at once: for tests, where a fake TensorRT runs on the CPU.

    Attributes:
        log: what was asked for, in order, such as ("launch", 1).
    """

    name = "host"

    def __init__(self, device: DeviceFacts | None = None) -> None:
        self.device = device or DeviceFacts("host", "0.0", 0, "0.0", None)
        self.log: list[tuple[str, int]] = []
        self._memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._streams = 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Nothing to do."""
        yield

    def stream(self) -> int:
        """A number."""
        self._streams += 1
        return self._streams

    def synchronise(self, stream: int) -> None:
        """Nothing is ever pending."""
        self.log.append(("synchronise", stream))

    def alloc(self, size: int) -> int:
        """Address of `size` bytes, filled with what is no sensible number."""
        memory = ctypes.create_string_buffer(b"\xff" * max(size, 1), max(size, 1))
        address = ctypes.addressof(memory)
        self._memory[address] = memory
        return address

    def free(self, address: int) -> None:
        """Let go of it."""
        del self._memory[address]

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """An ordinary array."""
        return np.zeros(tuple(shape), dtype)

    def copy_to_device(self, address: int, host: Array, stream: int) -> None:
        """Copy at once."""
        self._check(address, host)
        self.log.append(("to device", stream))
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def copy_to_host(self, host: Array, address: int, stream: int) -> None:
        """Copy at once."""
        self._check(address, host)
        self.log.append(("to host", stream))
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def _check(self, address: int, host: Array) -> None:
        memory = self._memory.get(address)
        if memory is None or host.nbytes > len(memory) or not host.flags.c_contiguous:
            raise ValueError(f"a copy of {host.nbytes} bytes does not fit memory at {address:#x}")

    def event(self) -> Event:
        """The clock's time when it is recorded."""
        return _HostEvent()

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Graph:
        """Keep the call, to be made at each launch."""
        self.log.append(("capture", stream))
        return _HostGraph(enqueue, self.log)

    def close(self) -> None:
        """Let go of all memory."""
        self._memory.clear()


class _HostEvent:
    def __init__(self) -> None:
        self.at = 0

    def record(self, stream: int) -> None:
        self.at = time.perf_counter_ns()

    def elapsed_ms(self, since: Event) -> float:
        return (self.at - since.at) / 1e6 if isinstance(since, _HostEvent) else 0.0


class _HostGraph:
    def __init__(self, enqueue: Callable[[], None], log: list[tuple[str, int]]) -> None:
        self._enqueue, self._log = enqueue, log

    def launch(self, stream: int) -> None:
        self._log.append(("launch", stream))
        self._enqueue()

    def close(self) -> None:
        self._log.append(("graph closed", 0))
