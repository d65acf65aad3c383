"""ONNX Runtime as a black box: a session that really runs on the provider that was asked for, or an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.artifact import stand_in
from edgekd.errors import ArtifactError, MissingDependencyError, RuntimeFailure, UserError, first_line
from edgekd.runtimes.onnx_session import Feed, OnnxRuntime, source_name
from edgekd.runtimes.tensor_info import TensorInfo

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
"""Short names that are accepted beside ONNX Runtime's own."""


_WEIGHTS_APART = "put the file of weights (often NAME.onnx.data) into the same folder, under the name it was saved with"
_LOADING: Mapping[str, str] = {
    "be read in full": "copy or download the file of weights beside it again: it is cut off",
    "IR version": "pip install -U onnxruntime, or save the file with a lower `ir_version`",
    "opset": "pip install -U onnxruntime, or export it with a lower opset",
    "xternal data": _WEIGHTS_APART,
    "should be stored in": _WEIGHTS_APART,  # onnx's own words for it
    "_TRT": "export it without TensorRT's NMS plugin, which only TensorRT has: with decoded boxes and scores, or ONNX's NMS",
    "Protobuf parsing failed": "copy or download it again: it is cut off, damaged, or another kind of file",
    "not a registered function/op": "export it with standard operators, without plugins of another runtime",
}
"""What mends a file that does not load, by a word of ONNX Runtime's message."""


class OrtRuntime(OnnxRuntime):
    """An ONNX detector in an ONNX Runtime session.

    Args:
        model: a file, or the bytes of one.
        provider: ONNX Runtime's name or a short one ("cpu", "cuda").
        threads: threads of one inference; ONNX Runtime's own choice (all cores) if left out.
        input_hw: the size to run at where the graph leaves it open.
        profile: time every node, and write a trace to a file whose name begins so; see `end_profile`.

    Raises:
        ArtifactError: the file is missing, damaged, or does not take one image tensor.
        MissingDependencyError: ONNX Runtime or the provider is not there.
        RuntimeFailure: ONNX Runtime fell back to another provider.
    """

    name = "onnxruntime"
    engine = "ONNX Runtime"

    def __init__(
        self,
        model: Path | bytes,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
        *,
        input_hw: tuple[int, int] | None = None,
        profile: Path | None = None,
    ) -> None:
        source = source_name(model)
        session = _open_session(model, PROVIDERS.get(provider.lower(), provider), threads, source, profile)
        self._session: Any = session
        self._options = _run_options()
        try:
            inputs, outputs = (
                [_info(node) for node in nodes] for nodes in (session.get_inputs(), session.get_outputs())
            )
            metadata = session.get_modelmeta().custom_metadata_map
        except UnicodeDecodeError as error:
            raise ArtifactError(
                f"{source}: names or metadata in this file are not UTF-8, as ONNX wants them",
                got=repr(error.object[:80]),
                fix="write its metadata (class names, say) anew in UTF-8; or copy the file again: it may be damaged",
            ) from error
        super().__init__(source, str(session.get_providers()[0]), inputs, outputs, metadata, input_hw)

    def _compute(self, feed: Feed) -> Sequence[NDArray[np.generic]]:
        values: Sequence[NDArray[np.generic]] = self._session.run(None, feed, self._options)
        return values

    def end_profile(self) -> Path:
        """End profiling; the trace, a JSON list of events."""
        return Path(self._session.end_profiling())

    def _free(self) -> None:
        self._session = None


def _open_session(
    model: Path | bytes, provider: str, threads: int | None, source: str, profile: Path | None = None
) -> Any:
    try:
        import onnxruntime
    except Exception as error:  # a broken installation raises whatever its libraries raise
        raise MissingDependencyError(
            "ONNX Runtime cannot be imported", got=first_line(error), fix="pip install onnxruntime"
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
    # second member, say, which then looks slower than it is. Within a run they should: without, every layer wakes them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=[provider]
        )
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        known = next((fix for word, fix in _LOADING.items() if word in str(error)), None)
        got, fix = (stand_in(model) if isinstance(model, Path) else None) or (first_line(error), known)
        raise ArtifactError(
            f"{source}: ONNX Runtime cannot load this file",
            got=got,
            expected="a complete ONNX model with operators that ONNX Runtime knows",
            fix=fix,
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


def _run_options() -> Any:
    """Options of a run that prints nothing: what fails is raised."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


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


def read_graph(model: Path) -> Any:
    """An ONNX file as onnx's own object.

    Raises:
        ArtifactError: the file cannot be read. MissingDependencyError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("taps of an ONNX teacher need onnx", fix="pip install onnx") from error
    try:
        return onnx.load(str(model))
    except FileNotFoundError as error:
        raise ArtifactError(f"{model}: no such file", expected="an ONNX file") from error
    except Exception as error:  # protobuf's errors depend on its implementation
        fix = next((fix for word, fix in _LOADING.items() if word in str(error)), None)
        raise ArtifactError(f"{model}: not a readable ONNX file", got=first_line(error), fix=fix) from error


def with_extra_outputs(model: Path, tensors: Sequence[str]) -> bytes:
    """The bytes of an ONNX file in which the named inner tensors are outputs too; the file itself stays as it is.

    Raises:
        ArtifactError: the file cannot be read. UserError: a name is not in the graph; lists near ones.
        MissingDependencyError: onnx is not installed.
    """
    graph_model = read_graph(model)
    import onnx

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
