"""Device memory, page-locked host memory, streams, events and graphs, behind one small protocol.

Four packages can stand behind it; `open_buffers` takes the first that works. All of them use the device's primary
context, pushed for the length of a call, so that torch can live beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

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
