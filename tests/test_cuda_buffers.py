"""Buffers on the CUDA driver, over a stub libcuda in ordinary memory; and on torch or PyCUDA where there is a GPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import MissingDependencyError, RuntimeFailure
from edgekd.runtimes import cuda_driver
from edgekd.runtimes.buffers import BACKENDS, Buffers, open_buffers
from edgekd.runtimes.cuda_buffers import open_cuda_buffers
from edgekd.runtimes.cuda_driver import CudaDriver
from tests.host_buffers import HostBuffers

CALLS = ("cuMemAlloc", "cuMemFree", "cuMemAllocHost", "cuStreamDestroy", "cuEventDestroy")
CALLS += ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    source = Path(__file__).with_name("stub_cuda.c")
    try:
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-w", "-o", path, source], check=True, capture_output=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no C compiler for the stub: {error}")
    return path


@pytest.fixture
def stub(library: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stub in libcuda's place; nothing may be left of it afterwards."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(library))
    monkeypatch.setattr(CudaDriver.__init__, "__defaults__", (0, str(library)))
    loaded = ctypes.CDLL(str(library))
    yield loaded
    assert (loaded.stub_live(), loaded.stub_depth(), loaded.stub_retained()) == (0, 0, 0)


class FakeCudaPython(types.ModuleType):
    """cuda-python's calling convention over the stub: (error, result)."""

    def __init__(self, library: Any) -> None:
        super().__init__("cuda.bindings.driver")
        self._library = library

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(self._library, f"{name}_v2" if name in CALLS else name)

        def call(*arguments: int) -> tuple[Any, ...]:
            words = [ctypes.c_size_t(argument) for argument in arguments]
            if name == "cuEventElapsedTime":
                value = ctypes.c_float()
                return function(ctypes.byref(value), *words), value.value
            if name in ("cuMemAlloc", "cuMemAllocHost", "cuStreamCreate", "cuEventCreate"):
                handle = ctypes.c_void_p()
                return function(ctypes.byref(handle), *words), handle.value or 0
            return (function(*words),)

        return call


@pytest.fixture(params=["driver", "cuda-python"])
def buffers(request: pytest.FixtureRequest, stub: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = FakeCudaPython(stub)  # type: ignore[attr-defined]
    for name, module in {"cuda": types.ModuleType("cuda"), "cuda.bindings": bindings}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", bindings.driver)  # type: ignore[attr-defined]
    opened = open_cuda_buffers(request.param)
    yield opened
    opened.close()
    opened.close()  # a second one does nothing


def exercise(buffers: Buffers) -> None:
    """A round trip to the device and back, with every part of the protocol."""
    with buffers.active():
        stream = buffers.stream()
        address = buffers.alloc(4 * 1000)
        there, back = buffers.pinned((10, 100), np.float32), buffers.pinned((10, 100), np.float32)
        there[...] = np.arange(1000, dtype=np.float32).reshape(10, 100)
        start, end = buffers.event(), buffers.event()
        start.record(stream)
        buffers.copy_to_device(address, there, stream)
        buffers.copy_to_host(back[:5], address, stream)
        end.record(stream)
        buffers.synchronise(stream)
        np.testing.assert_array_equal(back[:5], there[:5])
        assert not back[5:].any() or buffers.name != "host"
        assert end.elapsed_ms(start) >= 0
        graph = buffers.capture(stream, lambda: buffers.copy_to_host(back, address, stream))
        graph.launch(stream)
        graph.launch(stream)
        buffers.synchronise(stream)
        graph.close()
        if buffers.name in ("host", *BACKENDS) and buffers.device.name != "Stub":
            np.testing.assert_array_equal(back, there)
        buffers.free(address)


def test_the_whole_protocol(buffers: Buffers, stub: Any) -> None:
    assert buffers.device.to_dict() == {
        "name": "Stub",
        "compute_capability": "8.7",
        "memory_bytes": 8 * 2**30,
        "cuda": "12.6",
        "l4t": cuda_driver.l4t_release(),
        "integrated": True,
    }
    before = stub.stub_launches()
    exercise(buffers)
    assert stub.stub_launches() == before + 2
    assert stub.stub_depth() == 0


def test_host_buffers_keep_the_protocol() -> None:
    exercise(HostBuffers())


def test_the_context_is_popped_and_capture_ended_when_something_fails(buffers: Buffers, stub: Any) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    def try_it() -> None:
        with buffers.active():
            buffers.capture(buffers.stream(), fails)

    with pytest.raises(ZeroDivisionError):
        try_it()
    assert stub.stub_depth() == 0
    assert stub.stub_capturing() == 0


def test_errors_have_names(buffers: Buffers, stub: Any) -> None:
    stub.stub_fail_alloc(1)
    try:
        with pytest.raises(RuntimeFailure, match="cuMemAlloc"), buffers.active():
            buffers.alloc(1)
    finally:
        stub.stub_fail_alloc(0)
    with pytest.raises(RuntimeFailure):
        buffers.alloc(1)  # outside `active`, where no context is current


def test_no_such_device(stub: Any) -> None:
    with pytest.raises(MissingDependencyError, match="no device 3"):
        CudaDriver(3)


def test_the_first_backend_that_works_is_taken(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycuda", "pycuda.driver", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    opened = open_buffers()
    assert opened.name == "driver"
    opened.close()


def test_no_driver() -> None:
    with pytest.raises(MissingDependencyError, match="no CUDA driver"):
        CudaDriver(0, "libno-such-cuda.so.1")


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(backend: str) -> None:
    try:
        opened = open_cuda_buffers(backend)
    except (ImportError, MissingDependencyError) as reason:
        pytest.skip(f"no {backend} on a GPU here: {str(reason).splitlines()[0]}")
    try:
        exercise(opened)
    finally:
        opened.close()
