"""A TensorRT engine as a black box: tensors by name, a stream of its own, page-locked host arrays, CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgekd.errors import ArtifactError, RuntimeFailure
from edgekd.runtimes.buffers import Buffers, Event, Graph, open_buffers
from edgekd.runtimes.engine_file import EngineManifest, check_fits, read_engine_manifest
from edgekd.runtimes.trt_api import logger_of, numpy_type, open_engine, profiler_of, said, tensorrt
from edgekd.types import Array, FloatArray


@dataclass
class _Tensor:
    """One input or output with its memory on both sides, as large as the profile allows."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    host: Array
    address: int


@dataclass(frozen=True)
class GpuTimes:
    """GPU time of one inference by events on the stream, milliseconds."""

    to_device: float
    compute: float
    to_host: float


class TensorRTRuntime:
    """Runs an engine; its manifest must lie beside it and fit this machine.

    Args:
        path: the engine.
        cuda_graph: capture the work of one inference and launch it as a whole; captured again when the batch changes.
        buffers: device memory, which stays the caller's; the first backend that works if left out.

    Attributes:
        provider: the GPU's name. manifest: what stands beside the engine.
        largest_batch: images that one inference takes at most.
        device_times: events around each step are recorded; read them with `gpu_times`. Off at first.

    Raises:
        ArtifactError: missing, damaged, stale or foreign; says how to build it again.
        MissingDependencyError: no TensorRT, no GPU, or no way to its memory.
    """

    name = "tensorrt"

    def __init__(self, path: Path, *, cuda_graph: bool = False, buffers: Buffers | None = None) -> None:
        self._path, self.cuda_graph = Path(path), cuda_graph
        self.manifest: EngineManifest = read_engine_manifest(self._path)
        self._trt: Any = tensorrt()
        self._owned = buffers is None
        self._buffers: Buffers = buffers or open_buffers()
        self._graph: Graph | None = None
        self._profiler: Any = None
        self._closed = False
        self._batch = 0
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._tensors: dict[str, _Tensor] = {}
        self._events: list[Event] = []
        try:
            check_fits(self._path, self.manifest, self._trt.__version__, self._buffers.device)
            with self._buffers.active():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Everything that must be let go of goes into `self` at once: a traceback would keep a local variable alive."""
        manifest = self.manifest
        plan = self._path.read_bytes()
        self._runtime, self._engine = open_engine(self._trt, plan, host_code=manifest.version_compatible)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise RuntimeFailure(
                f"{self._path}: TensorRT gave no execution context",
                got=said(logger_of(self._trt)),
                expected=f"{manifest.memory_bytes / 2**20:.0f} MiB of free device memory",
            )
        self._stream = self._buffers.stream()
        self._events = [self._buffers.event() for _ in range(4)]
        self.provider = self._buffers.device.name
        self.backend = self._buffers.name
        self._least, self._most = manifest.profile[0], manifest.profile[2]
        self.largest_batch = self._most
        self.dynamic_batch = self._least != self._most
        self._open_batch = any(given["shape"][0] < 0 for given in manifest.inputs.values())
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            self._tensors[name] = self._allocate(name)
        self.output_names = tuple(name for name, tensor in self._tensors.items() if not tensor.is_input)
        inputs = [tensor for tensor in self._tensors.values() if tensor.is_input]
        if len(inputs) != 1:
            raise ArtifactError(
                f"{self._path}: not a detector that edgekd can feed", got=f"{len(inputs)} inputs", expected="one image"
            )
        self._input_name = inputs[0].name
        _, channels, height, width = self._input.host.shape
        self.input_shape = (self._least if not self.dynamic_batch else 1, channels, height, width)
        self.device_times = False
        for tensor in self._tensors.values():
            taken = self._context.set_tensor_address(tensor.name, tensor.address)
            self._check(taken, f"set_tensor_address({tensor.name})")

    def _allocate(self, name: str) -> _Tensor:
        shape = tuple(int(extent) for extent in self._engine.get_tensor_shape(name))
        if self._open_batch and shape[:1] == (-1,):
            shape = (self._most, *shape[1:])
        if any(extent < 0 for extent in shape):
            raise self._unbounded(name, shape)
        dtype = numpy_type(self._engine.get_tensor_dtype(name))
        host = self._buffers.pinned(shape, dtype)
        is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
        return _Tensor(name, is_input, dtype, host, self._buffers.alloc(host.nbytes))

    @property
    def _input(self) -> _Tensor:
        return self._tensors[self._input_name]

    def _unbounded(self, name: str, shape: tuple[int, ...]) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: an output's size depends on the picture",
            got=f"{name}: {shape}",
            expected="fixed sizes",
            fix="build it from the form with decoded boxes and scores; NMS inside is for ONNX Runtime",
        )

    def run(self, images: FloatArray) -> Mapping[str, Array]:
        """One inference: images (B, 3, H, W) float32, normalised; every output by name, valid until the next call.

        Fewer images than the engine's least batch are filled up; the outputs of the rest are to be ignored.

        Raises:
            RuntimeFailure: TensorRT refused something, or the runtime is closed.
        """
        if self._closed:
            raise RuntimeFailure(f"{self._path}: this engine is closed")
        given = len(images)
        wanted = (self._most, *self._input.host.shape[1:])
        if images.shape[1:] != wanted[1:] or not 1 <= given <= self._most:
            raise RuntimeFailure(
                f"{self._path}: an input of another shape", got=tuple(images.shape), expected=f"up to {wanted}"
            )
        batch = max(given, self._least)
        if self._input.dtype.kind == "u":  # bytes: assigned as they are, 127.99 becomes 127, and 256 a 0
            images = np.clip(np.rint(images), 0, 255)
        self._input.host[:given] = images
        self._input.host[given:batch] = images[-1]
        with self._buffers.active():
            if batch != self._batch:
                self._set_batch(batch)
            self._enqueue_all()
            self._buffers.synchronise(self._stream)
        return {name: self._part(self._tensors[name]) for name in self.output_names}

    def _part(self, tensor: _Tensor) -> Array:
        """The host array as far as this batch fills it."""
        return tensor.host[: self._batch] if tensor.host.shape[:1] == (self._most,) else tensor.host

    def _set_batch(self, batch: int) -> None:
        """Tell TensorRT the shape, check that nothing is left open, and capture the graph anew."""
        context = self._context
        shape = (batch, *self._input.host.shape[1:])
        self._batch = 0  # so that a failure below does not pass for a batch that was set
        self._drop_graph()
        self._check(context.set_input_shape(self._input.name, shape), f"set_input_shape({shape})")
        try:
            open_shapes = context.infer_shapes()
        except RuntimeError as error:
            raise RuntimeFailure(f"{self._path}: TensorRT cannot tell its shapes", got=error) from error
        if open_shapes:
            raise RuntimeFailure(f"{self._path}: shapes are left open", got=", ".join(map(str, open_shapes)))
        self._batch = batch
        for name in self.output_names:  # more than there is memory for would be written all the same
            found = tuple(int(extent) for extent in context.get_tensor_shape(name))
            if found != self._part(self._tensors[name]).shape:
                self._batch = 0
                raise self._unbounded(name, found)
        if self.cuda_graph:
            # One plain run first: TensorRT puts off work to the first enqueue that a capture may not hold.
            self._execute()
            self._buffers.synchronise(self._stream)
            self._graph = self._buffers.capture(self._stream, self._execute)

    def _enqueue_all(self) -> None:
        self._mark(0)
        self._buffers.copy_to_device(self._input.address, self._part(self._input), self._stream)
        self._mark(1)
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._execute()
        self._mark(2)
        for name in self.output_names:
            tensor = self._tensors[name]
            self._buffers.copy_to_host(self._part(tensor), tensor.address, self._stream)
        self._mark(3)

    def _execute(self) -> None:
        self._check(self._context.execute_async_v3(self._stream), "execute_async_v3")

    def _mark(self, index: int) -> None:
        if self.device_times:
            self._events[index].record(self._stream)

    def gpu_times(self) -> GpuTimes:
        """GPU time of the latest inference, which ran with `device_times` on."""
        with self._buffers.active():
            start, copied, computed, done = self._events
            return GpuTimes(copied.elapsed_ms(start), computed.elapsed_ms(copied), done.elapsed_ms(computed))

    def layer_times(self, images: FloatArray) -> dict[str, float]:
        """Milliseconds of each layer in one inference, by TensorRT's own profiler, as the builder named and fused them.

        The profiler stays on from then on and slows every run: use a runtime of its own, without a CUDA graph.
        """
        if self._profiler is None:
            self._profiler = self._context.profiler = profiler_of(self._trt)
        self._profiler.times.clear()
        self.run(images)
        return dict(self._profiler.times)

    def _check(self, succeeded: bool, step: str) -> None:
        if not succeeded:
            raise RuntimeFailure(f"{self._path}: TensorRT failed in {step}", got=said(logger_of(self._trt)))

    def _drop_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            graph.close()

    def close(self) -> None:
        """Free the engine and its memory; further calls raise."""
        if self._closed:
            return
        self._closed = True
        with self._buffers.active():
            self._drop_graph()
            self._context = None  # in this order, while CUDA is still there
            self._engine = None
            self._runtime = None
            for tensor in self._tensors.values():
                self._buffers.free(tensor.address)
            self._tensors.clear()  # PyCUDA frees host arrays and events with their last reference
            self._events.clear()
        if self._owned:
            self._buffers.close()

    def __enter__(self) -> TensorRTRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
