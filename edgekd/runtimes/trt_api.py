"""The door to TensorRT: the only module that imports it, and the rules of its versions.

8.5, 8.6, 10.x and 11.x go one way. What only some versions have is reached through `optional`, which names the version that
has it; everything else that is used here, in `tensorrt_runtime` and in `export.engine` exists in all of them, which
`tests/test_tensorrt_contract.py` checks against NVIDIA's own bindings. For its sake TensorRT's objects go by fixed
names in these modules: `trt`, `builder`, `network`, `layer`, `edge` (a tensor), `parser`, `config`, `profile`,
`timing_cache`, `runtime`, `engine`, `context`, `inspector`, `problem` (a parser error).
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

from edgekd.errors import ArtifactError, ExportError, MissingDependencyError, install_extra

OLDEST = (8, 5)
STRONGLY_TYPED_SINCE = (10, 12)
_KEPT_MESSAGES = 20


def tensorrt() -> Any:
    """The installed TensorRT module.

    Raises:
        MissingDependencyError: there is none, it does not load, or it is too old.
    """
    try:
        import tensorrt as trt
    except Exception as error:  # a broken installation raises whatever its libraries raise
        raise MissingDependencyError(
            "TensorRT cannot be imported",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=f"on a machine with an NVIDIA GPU: {install_extra('tensorrt')}; on a Jetson: sudo apt-get install "
            "python3-libnvinfer (JetPack's), and a virtual environment only with --system-site-packages",
        ) from error
    if version_of(trt) < OLDEST:
        raise MissingDependencyError(
            "this TensorRT is too old", got=trt.__version__, expected="8.5 or later", fix="JetPack 5.1 or later has it"
        )
    return trt


def version_of(trt: Any) -> tuple[int, ...]:
    """(major, minor) of a TensorRT module."""
    return version_numbers(trt.__version__)[:2]


def version_numbers(text: str) -> tuple[int, ...]:
    """ "10.13.3.9" -> (10, 13, 3, 9)."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def optional(owner: Any, name: str, since: str) -> Any:
    """A member that only some versions have.

    Args:
        since: which ones, for the message, such as "TensorRT 10.13".

    Raises:
        MissingDependencyError: not this one. A capability is never replaced by a lesser one in silence.
    """
    if not hasattr(owner, name):
        version = tensorrt().__version__
        raise MissingDependencyError(f"this TensorRT cannot do {name}", got=f"TensorRT {version}", expected=since)
    return getattr(owner, name)


@functools.lru_cache(maxsize=8)
def logger_of(trt: Any) -> Any:
    """TensorRT's logger for this process (it keeps the first it is given), which remembers errors for messages.

    Its `messages` are the latest errors, `warnings` the latest warnings; `clear` before an operation whose errors matter.
    """

    class _Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages = [*self.messages, message.strip()][-_KEPT_MESSAGES:]
            elif severity == trt.ILogger.WARNING:
                self.warnings = [*self.warnings, message.strip()][-_KEPT_MESSAGES:]

        def clear(self) -> None:
            self.messages, self.warnings = [], []

    return _Logger()


def profiler_of(trt: Any) -> Any:
    """TensorRT's profiler, which adds up milliseconds by layer in its `times`."""

    class _Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    return _Profiler()


def said(logger: Any, otherwise: str = "TensorRT did not say why") -> str:
    """TensorRT's latest errors as one line; its last warning where it failed without an error, as without a GPU."""
    return "; ".join(dict.fromkeys(logger.messages or logger.warnings[-1:])) or otherwise


def create_builder(trt: Any, logger: Any) -> Any:
    """A builder.

    Raises:
        MissingDependencyError: TensorRT finds no usable GPU.
    """
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # pybind11's words for a null pointer
        raise MissingDependencyError(
            "TensorRT cannot start here",
            got=said(logger, str(error)),
            fix="it needs an NVIDIA GPU; see `edgekd doctor`",
        ) from error
    return builder


def is_strongly_typed(trt: Any, *, dla: bool = False) -> bool:
    """Whether precision comes from the graph's own types alone: always in 11, before that from 10.12 and not on a DLA."""
    version = version_of(trt)
    return version >= (11,) or (version >= STRONGLY_TYPED_SINCE and not dla)


def create_network(trt: Any, builder: Any, *, strongly_typed: bool) -> Any:
    """An empty network of this version's kind."""
    flags = 0
    if version_of(trt) < (10,):
        flags = 1 << int(optional(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", "TensorRT 8 and 10"))
    elif strongly_typed and version_of(trt) < (11,):
        flags = 1 << int(optional(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", "TensorRT 10.12"))
    network = builder.create_network(flags)
    if network is None:
        raise ExportError("TensorRT gave no network", got=said(logger_of(trt)))
    return network


def parse_onnx(trt: Any, network: Any, model: bytes) -> None:
    """Read an ONNX model into a network.

    Raises:
        ExportError: TensorRT cannot; lists every error of its parser.
    """
    logger = logger_of(trt)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        problems = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ExportError(
            f"TensorRT {trt.__version__} cannot read this ONNX model",
            got="; ".join(problems) or said(logger),
            expected="operators and types that this version knows",
        )


def _describe(problem: Any) -> str:
    where = f"node {problem.node()}"
    if hasattr(problem, "node_name") and hasattr(problem, "node_operator"):  # since TensorRT 10
        where += f" {problem.node_name()} ({problem.node_operator()})"
    return f"{where}: {problem.desc()}"


def open_engine(trt: Any, plan: bytes, *, host_code: bool = False) -> tuple[Any, Any]:
    """(runtime, engine) from a plan; the runtime must live as long as the engine.

    Args:
        host_code: the plan is version-compatible: it carries its own runtime, which is code.

    Raises:
        ArtifactError: TensorRT refuses the plan.
    """
    logger = logger_of(trt)
    logger.clear()
    try:
        runtime = trt.Runtime(logger)
    except (TypeError, RuntimeError) as error:
        raise MissingDependencyError(
            "TensorRT cannot start here",
            got=said(logger, str(error)),
            fix="it needs an NVIDIA GPU; see `edgekd doctor`",
        ) from error
    if host_code:
        optional(runtime, "engine_host_code_allowed", "TensorRT 8.6")
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ArtifactError(f"TensorRT {trt.__version__} refuses this engine", got=said(logger))
    return runtime, engine


_NUMPY = {"FLOAT": "f4", "HALF": "f2", "INT8": "i1", "UINT8": "u1", "INT32": "i4", "INT64": "i8", "BOOL": "?"}


def numpy_type(kind: Any) -> np.dtype[Any]:
    """NumPy's type for a `DataType`; TensorRT's own `nptype` breaks on some pairs of old TensorRT and newer NumPy.

    Raises:
        ArtifactError: NumPy has none, as for fp8.
    """
    if kind.name not in _NUMPY:
        raise ArtifactError("an engine with inputs or outputs of a type that NumPy lacks", got=kind.name)
    return np.dtype(_NUMPY[kind.name])


def memory_of(engine: Any) -> int:
    """Bytes of device memory that one context needs for activations; called another name since TensorRT 10."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(optional(engine, "device_memory_size", "TensorRT 8 and 10"))


def tensors_of(trt: Any, engine: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(inputs, outputs) of an engine by name: {"shape", "dtype"}."""
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        shape = [int(extent) for extent in engine.get_tensor_shape(name)]
        side[name] = {"shape": shape, "dtype": engine.get_tensor_dtype(name).name}
    return inputs, outputs


def layers_of(trt: Any, engine: Any) -> list[dict[str, Any]]:
    """What the inspector says of each layer: {"name", "type", "precision"}; precision None where it does not say."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        found = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    return [_layer(entry) for entry in found]


def _layer(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):  # an engine that was built without details gives names alone
        return {"name": str(entry), "type": None, "precision": None}
    weights = entry.get("Weights")
    kinds = [str(weights.get("Type", ""))] if isinstance(weights, dict) else []
    for tensor in (*entry.get("Inputs", ()), *entry.get("Outputs", ())):
        if isinstance(tensor, dict):
            kinds.append(str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))))
    precision = next((kind for kind in map(precision_in, kinds) if kind), None)
    return {"name": str(entry.get("Name", "")), "type": entry.get("LayerType"), "precision": precision}


_WORDS = {"uint8": "uint8", "int8": "int8", "bf16": "bf16", "fp16": "fp16", "half": "fp16", "fp8": "fp8"}
_MORE_WORDS = {"fp32": "fp32", "float": "fp32", "int64": "int64", "int32": "int32", "bool": "bool"}


def precision_in(text: str) -> str | None:
    """The number format that the inspector's words mean, such as "Channel major FP16 format where C % 4 == 0"."""
    lower = text.lower()
    return next((kind for word, kind in {**_WORDS, **_MORE_WORDS}.items() if word in lower), None)
