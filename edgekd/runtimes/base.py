"""What runs an exported detector: a black box from one input tensor to named output arrays.

Runtimes never time themselves; `edgekd.bench` owns all timing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgekd.types import FloatArray


class Runtime(Protocol):
    """A loaded model, usable as a context manager.

    Attributes:
        name: "torch", "onnxruntime", "openvino", "tensorrt".
        provider: what really computes, such as "CPUExecutionProvider" or "cuda:0".
        input_shape: (B, 3, H, W); B is 1 unless the model was exported for another or a dynamic batch.
        output_names: in the model's order.
    """

    name: str
    provider: str
    input_shape: tuple[int, int, int, int]
    output_names: tuple[str, ...]

    def run(self, images: FloatArray) -> Mapping[str, NDArray[np.generic]]:
        """One inference: images (B, 3, H, W) float32, normalised; returns every output by name.

        The arrays may be reused by the next call: copy what must outlive it.
        """
        ...

    def close(self) -> None:
        """Free the model; further calls raise."""
        ...

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
