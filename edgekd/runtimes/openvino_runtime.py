"""OpenVINO as a black box: an ONNX file compiled for the CPU here, in the precision that the file says."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ArtifactError, MissingDependencyError, RuntimeFailure, first_line, install_extra
from edgekd.runtimes.onnx_session import Feed, OnnxRuntime, source_name
from edgekd.runtimes.tensor_info import TensorInfo

_TYPES = {
    "f32": "tensor(float)",
    "f16": "tensor(float16)",
    "f64": "tensor(double)",
    "u8": "tensor(uint8)",
    "i64": "tensor(int64)",
    "i32": "tensor(int32)",
    "boolean": "tensor(bool)",
}
"""OpenVINO's words for what `onnx_session` and `side_inputs` feed, in ONNX Runtime's."""


class OpenVinoRuntime(OnnxRuntime):
    """An ONNX detector compiled by OpenVINO.

    Args:
        model: a file, or the bytes of one.
        device: OpenVINO's name or a short one ("cpu").
        threads: threads of one inference; OpenVINO's own choice if left out.
        input_hw: the size to run at where the graph leaves it open.

    Raises:
        ArtifactError: the file is missing, damaged, or does not take one image tensor.
        MissingDependencyError: OpenVINO or the device is not there.
        RuntimeFailure: OpenVINO compiled it for another device.
    """

    name = "openvino"
    engine = "OpenVINO"

    def __init__(
        self,
        model: Path | bytes,
        device: str = "CPU",
        threads: int | None = None,
        *,
        input_hw: tuple[int, int] | None = None,
    ) -> None:
        source = source_name(model)
        metadata = _metadata(model, source)
        compiled = _compile(model, device.upper(), threads, source)
        ran_on = ", ".join(compiled.get_property("EXECUTION_DEVICES"))
        if ran_on != device.upper():
            raise RuntimeFailure(f"{source}: OpenVINO took another device", got=ran_on, expected=device.upper())
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        inputs, outputs = ([_info(port) for port in ports] for ports in (compiled.inputs, compiled.outputs))
        super().__init__(source, ran_on, inputs, outputs, metadata, input_hw)

    @property
    def threads(self) -> int:
        """Threads of one inference, as OpenVINO says."""
        return int(self._compiled.get_property("INFERENCE_NUM_THREADS"))

    def _compute(self, feed: Feed) -> Sequence[NDArray[np.generic]]:
        try:
            results = self._request.infer(dict(feed), share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise RuntimeError(_reason(error)) from error
        return [results[port] for port in self._compiled.outputs]

    def _free(self) -> None:
        del self._request, self._compiled


def _compile(model: Path | bytes, device: str, threads: int | None, source: str) -> Any:
    try:
        import openvino
    except Exception as error:  # a broken installation raises whatever its libraries raise
        raise MissingDependencyError(
            "OpenVINO cannot be imported", got=first_line(error), fix=install_extra("openvino")
        ) from error
    core = openvino.Core()
    if device not in core.available_devices:
        raise MissingDependencyError(
            "OpenVINO has no such device here", got=device, expected="one of " + ", ".join(core.available_devices)
        )
    settings: dict[str, Any] = {
        "NUM_STREAMS": 1,  # one inference at a time
        # By default a CPU that has bf16 computes fp32 files in it, and the comparison with other runtimes is no longer one.
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # whoever measures pins the process; threads stay on the cores that it was given
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        opened = core.read_model(io.BytesIO(model) if isinstance(model, bytes) else str(model))
        return core.compile_model(opened, device, settings)
    except Exception as error:  # OpenVINO raises plain RuntimeErrors
        raise ArtifactError(
            f"{source}: OpenVINO cannot load this file",
            got=_reason(error),
            expected="a complete ONNX model with operators that OpenVINO knows",
        ) from error


def _info(port: Any) -> TensorInfo:
    shape = tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape())
    kind = str(port.get_element_type().get_type_name())
    return TensorInfo(port.get_any_name(), shape, _TYPES.get(kind, kind))


def _reason(error: Exception) -> str:
    """The first line of OpenVINO's message that is not a place in its own sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return said[0][:300] if said else first_line(error)


def _metadata(model: Path | bytes, source: str) -> dict[str, str]:
    """What OpenVINO drops: the file's own metadata. Reading it also refuses what is no ONNX at all."""
    import onnx

    try:
        proto = (
            onnx.load_from_string(model)
            if isinstance(model, bytes)
            else onnx.load(str(model), load_external_data=False)
        )
    except FileNotFoundError as error:
        raise ArtifactError(f"{source}: no such file", expected="an ONNX file") from error
    except Exception as error:  # protobuf's errors depend on its implementation
        raise ArtifactError(f"{source}: not a readable ONNX file", got=first_line(error)) from error
    if not proto.graph.node:
        raise ArtifactError(f"{source}: not a readable ONNX file", got="a file without a graph")
    return {entry.key: entry.value for entry in proto.metadata_props}
