"""Device memory for where a fake TensorRT runs on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgekd.runtimes.buffers import Event, Graph
from edgekd.runtimes.cuda_driver import DeviceFacts
from edgekd.types import Array

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


class HostBuffers:
    """The protocol of buffers on ordinary memory, doing everything at once.

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
