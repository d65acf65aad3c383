"""ONNX Runtime as a black box: a session that really runs on the provider that was asked for, or an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ArtifactError, MissingDependencyError, RuntimeFailure, UserError
from edgekd.types import FloatArray

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
"""Short names that are accepted beside ONNX Runtime's own."""

_INPUT_TYPES: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class TensorInfo:
    """What a graph declares of one input or output.

    Attributes:
        name: the tensor's name.
        shape: one entry a dimension; None where it is dynamic.
        type: ONNX Runtime's word, such as "tensor(float)".
    """

    name: str
    shape: tuple[int | None, ...]
    type: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type} {tuple('?' if d is None else d for d in self.shape)}"


class OrtRuntime:
    """An ONNX detector in an ONNX Runtime session.

    Args:
        model: a file, or the bytes of one.
        provider: ONNX Runtime's name or a short one ("cpu", "cuda").
        threads: threads of one inference; ONNX Runtime's own choice (all cores) if left out.
        input_hw: the size to run at where the graph leaves it open.

    Raises:
        ArtifactError: the file is missing, damaged, or does not take one image tensor.
        MissingDependencyError: ONNX Runtime or the provider is not there.
        RuntimeFailure: ONNX Runtime fell back to another provider.
    """

    name = "onnxruntime"

    def __init__(
        self,
        model: Path | bytes,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
        *,
        input_hw: tuple[int, int] | None = None,
    ) -> None:
        self._source = "the model" if isinstance(model, bytes) else str(model)
        session = _open_session(model, PROVIDERS.get(provider.lower(), provider), threads, self._source)
        self._session: Any = session
        self.provider = str(session.get_providers()[0])
        self.inputs = tuple(_info(node) for node in session.get_inputs())
        self.outputs = tuple(_info(node) for node in session.get_outputs())
        self.output_names = tuple(info.name for info in self.outputs)
        self.metadata: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        self._image = _image_input(self.inputs, self._source)
        self._extra = tuple(info for info in self.inputs if info is not self._image)
        batch, height, width = _image_extent(self._image.shape)
        self.dynamic_batch = batch is None
        self.dynamic_hw = height is None or width is None
        fallback = input_hw or (0, 0)
        self.input_shape = (batch or 1, 3, height or fallback[0], width or fallback[1])
        self._dtype = _INPUT_TYPES[self._image.type]

    def run(self, images: FloatArray) -> Mapping[str, NDArray[np.generic]]:
        """One inference: images (B, 3, H, W) float32, normalised; every output by name.

        A graph with a fixed batch takes fewer images too: the rest is filled up, and its outputs are to be ignored.

        Raises:
            RuntimeFailure: ONNX Runtime failed, or the session is closed.
        """
        if self._session is None:
            raise RuntimeFailure(f"{self._source}: this session is closed")
        missing = 0 if self.dynamic_batch else self.input_shape[0] - len(images)
        if missing > 0:
            images = np.concatenate([images, np.repeat(images[-1:], missing, 0)])
        feed: dict[str, NDArray[np.generic]] = {self._image.name: self._as_declared(images)}
        for info in self._extra:  # original sizes, so that boxes come back in input pixels
            feed[info.name] = np.array([[images.shape[-1], images.shape[-2]]] * len(images), np.int64)
        try:
            values = self._session.run(None, feed)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise RuntimeFailure(
                f"{self._source}: ONNX Runtime failed while running",
                got=_first_line(error),
                expected=f"input {self._image}, was given {tuple(images.shape)}",
            ) from error
        return dict(zip(self.output_names, values, strict=True))

    def _as_declared(self, images: FloatArray) -> NDArray[np.generic]:
        images = images if len(self._image.shape) == 4 else images[0]
        return images if images.dtype == self._dtype else images.astype(self._dtype)

    def close(self) -> None:
        """Free the session; further calls raise."""
        self._session = None

    def __enter__(self) -> OrtRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_session(model: Path | bytes, provider: str, threads: int | None, source: str) -> Any:
    try:
        import onnxruntime
    except Exception as error:  # a broken installation raises whatever its libraries raise
        raise MissingDependencyError(
            "ONNX Runtime cannot be imported", got=_first_line(error), fix="pip install onnxruntime"
        ) from error
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise MissingDependencyError(
            "this ONNX Runtime has no such provider",
            got=provider,
            expected="one of " + ", ".join(available),
            fix="pip install onnxruntime-gpu" if "CUDA" in provider or "Tensorrt" in provider else None,
        )
    if isinstance(model, Path) and not model.is_file():
        raise ArtifactError(f"{model}: no such file", expected="an ONNX file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimiser; failures are raised
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    # By default a session's threads go on spinning after its run, and take cores from whatever runs next: an ensemble's
    # second member, say, which then looks slower than it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=[provider]
        )
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        raise ArtifactError(
            f"{source}: ONNX Runtime cannot load this file",
            got=_first_line(error),
            expected="a complete ONNX model with operators that ONNX Runtime knows",
        ) from error
    session.disable_fallback()
    if provider not in session.get_providers()[:1]:
        raise RuntimeFailure(
            f"{source}: ONNX Runtime fell back to another provider",
            got=", ".join(session.get_providers()),
            expected=provider,
            fix="see `edgekd doctor` for providers that really start here",
        )
    return session


def has_provider(provider: str) -> bool:
    """Whether this installation of ONNX Runtime was built with a provider; says nothing about its device."""
    try:
        import onnxruntime
    except Exception:  # a broken installation raises whatever its libraries raise
        return False
    return PROVIDERS.get(provider.lower(), provider) in onnxruntime.get_available_providers()


def _info(node: Any) -> TensorInfo:
    shape = tuple(d if isinstance(d, int) and d > 0 else None for d in node.shape or ())
    return TensorInfo(node.name, shape, node.type)


def _image_input(inputs: Sequence[TensorInfo], source: str) -> TensorInfo:
    """The one input that is an image; others may only ask for the original size, as RT-DETR's do."""
    listed = "; ".join(str(info) for info in inputs)
    images = [info for info in inputs if len(info.shape) in (3, 4) and info.shape[-3] in (3, None)]
    others = [info for info in inputs if info not in images]
    sizes = all(info.type == "tensor(int64)" and info.shape[-1:] == (2,) for info in others)
    if len(images) != 1 or not sizes or images[0].type not in _INPUT_TYPES:
        raise ArtifactError(
            f"{source}: this is not a detector that edgekd can feed",
            got=f"inputs {listed}",
            expected="one float32 or float16 image input (B, 3, H, W)",
            fix="export it with channels first and float input",
        )
    return images[0]


def _image_extent(shape: tuple[int | None, ...]) -> tuple[int | None, int | None, int | None]:
    return (shape[0] if len(shape) == 4 else 1, shape[-2], shape[-1])


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def with_extra_outputs(model: Path, tensors: Sequence[str]) -> bytes:
    """The bytes of an ONNX file in which the named inner tensors are outputs too; the file itself stays as it is.

    Raises:
        ArtifactError: the file cannot be read. UserError: a name is not in the graph; lists near ones.
        MissingDependencyError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("taps of an ONNX teacher need onnx", fix="pip install onnx") from error
    try:
        graph_model = onnx.load(str(model))
    except FileNotFoundError as error:
        raise ArtifactError(f"{model}: no such file", expected="an ONNX file") from error
    except Exception as error:  # protobuf's errors depend on its implementation
        raise ArtifactError(f"{model}: not a readable ONNX file", got=_first_line(error)) from error
    inner = [name for node in graph_model.graph.node for name in node.output if name]
    present = {output.name for output in graph_model.graph.output}
    for tensor in tensors:
        if tensor not in inner:
            near = difflib.get_close_matches(tensor, inner, n=5, cutoff=0.4)
            raise UserError(
                f"{model}: the graph has no such tensor to tap",
                got=repr(tensor),
                expected=f"one of its {len(inner)} inner tensors"
                + (f", such as {', '.join(near)}" if near else f", such as {', '.join(inner[:5])}"),
            )
        if tensor not in present:
            graph_model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    return bytes(graph_model.SerializeToString())
