"""What runs a bundled model on the device: TensorRT, or ONNX Runtime on CUDA or the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import MissingDependencyError, RuntimeFailure, first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CHOICES = ("auto", "tensorrt", *PROVIDERS)
_TOO_NEW = re.compile(r"[Oo]pset|IR version")


class OrtSession:
    """An ONNX Runtime session that really runs on the provider asked for.

    Raises:
        MissingDependencyError: no ONNX Runtime, or not this provider.
        RuntimeFailure: it fell back to another provider, or cannot load the model.
    """

    runtime = "onnxruntime"
    uses_gpu: bool

    def __init__(self, file: Path, model: Mapping[str, Any], provider: str, threads: int | None) -> None:
        try:
            import onnxruntime
        except Exception as error:  # a broken installation raises whatever its libraries raise
            raise MissingDependencyError(
                "ONNX Runtime cannot be imported here", got=first_line(error), fix="pip install onnxruntime"
            ) from error
        name = PROVIDERS[provider]
        if name not in onnxruntime.get_available_providers():
            raise MissingDependencyError(
                "this ONNX Runtime has no such provider",
                got=name,
                expected="one of " + ", ".join(onnxruntime.get_available_providers()),
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        # As in `runtimes.ort`: threads spin within a run, not on into whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=[name])
        except Exception as error:  # its errors share no base class of their own
            newer = "a newer ONNX Runtime: pip install -U onnxruntime" if _TOO_NEW.search(str(error)) else None
            raise RuntimeFailure(
                f"{file.name}: ONNX Runtime {onnxruntime.__version__} cannot load this model",
                got=first_line(error),
                fix=newer,
            ) from error
        self._session.disable_fallback()
        if self._session.get_providers()[0] != name:
            raise RuntimeFailure(
                f"{file.name}: ONNX Runtime fell back to another provider",
                got=self._session.get_providers()[0],
                expected=name,
            )
        self.provider, self.uses_gpu = name, provider == "cuda"
        self.facts: dict[str, Any] = {"version": onnxruntime.__version__}
        self._file, self._input = file.name, model["input"]["name"]
        self._half = model["input"]["dtype"] == "tensor(float16)"
        self._names = [output["name"] for output in model["outputs"]]

    def run(self, images: Any) -> dict[str, Any]:
        """(1, 3, h, w) float32 to outputs by name."""
        given = images.astype("float16") if self._half else images
        try:
            found = self._session.run(self._names, {self._input: given})
        except Exception as error:  # as above; out of memory, or an operator that this version lacks
            raise RuntimeFailure(f"{self._file}: ONNX Runtime failed while running", got=first_line(error)) from error
        return dict(zip(self._names, found))

    def close(self) -> None:
        """Free it."""
        self._session = None


class TensorRTSession:
    """An engine built here from the model, or taken from the cache if it was built here before."""

    runtime = "tensorrt"
    uses_gpu = True

    def __init__(self, file: Path, model: Mapping[str, Any], cache: Path) -> None:
        from edgekd.device.engines import engine_for
        from edgekd.runtimes.tensorrt_runtime import TensorRTRuntime

        sizes = [extent for output in model["outputs"] for extent in output["shape"]]
        if model["output_format"]["kind"] == "detections" and not all(isinstance(extent, int) for extent in sizes):
            raise RuntimeFailure(
                f"{file.name}: NMS is inside this model, so its outputs grow with the picture; an engine's must not",
                fix="--provider cuda or cpu, or bundle the form with decoded boxes and scores",
            )
        engine, facts = engine_for(file, model, cache)
        self._runtime = TensorRTRuntime(engine)
        self.provider = self._runtime.provider
        self.facts = facts

    def run(self, images: Any) -> dict[str, Any]:
        """(1, 3, h, w) float32 to outputs by name, valid until the next call."""
        return dict(self._runtime.run(images))

    def close(self) -> None:
        """Free it."""
        self._runtime.close()


def choose_provider(
    file: Path, model: Mapping[str, Any], asked: str, threads: int | None, cache: Path, say: Callable[[str], None]
) -> str:
    """What runs all models: as asked, or for "auto" the first of TensorRT, CUDA and the CPU that is there.

    Only what is missing is passed over, and said; a model that TensorRT refuses is an error, not a reason to measure
    something else.
    """
    if asked != "auto":
        return asked
    for choice in ("tensorrt", "cuda"):
        try:
            open_session(file, model, choice, threads, cache).close()
        except (MissingDependencyError, RuntimeFailure) as error:
            say(f"{choice} is not used: {error.what}" + (f" ({error.got})" if error.got else ""))
        else:
            return choice
    return "cpu"


def open_session(file: Path, model: Mapping[str, Any], provider: str, threads: int | None, cache: Path) -> Any:
    """A session on `provider`: "tensorrt", "cuda" or "cpu".

    Raises:
        EdgeKDError: it does not work here.
    """
    if provider == "tensorrt":
        return TensorRTSession(file, model, cache)
    return OrtSession(file, model, provider, threads)
