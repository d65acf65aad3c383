"""A native detector as a black box that gives the same two arrays as its ONNX file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.detectors.base import Detector
from edgekd.errors import MissingDependencyError, RuntimeFailure
from edgekd.types import FloatArray


class TorchRuntime:
    """Runs a `Detector` and gives "boxes" (B, P, 4) xyxy input pixels and "scores" (B, P, K), float32.

    Args:
        detector: moved to `device` and put in eval mode.
        device: where it computes, such as "cpu" or "cuda:0".
        threads: threads of one inference on a CPU; torch's own setting, restored afterwards, if left out.

    Raises:
        MissingDependencyError: the device is not there.
    """

    name = "torch"
    output_names: tuple[str, ...] = ("boxes", "scores")

    def __init__(self, detector: Detector, device: str = "cpu", threads: int | None = None) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise MissingDependencyError(
                "no CUDA device for torch", got=device, fix="use --device cpu, or see `edgekd doctor`"
            )
        self.detector: Detector | None = detector.to(device).eval()
        self.provider = device
        self.threads = threads
        height, width = detector.spec.preprocess.input_hw
        self.input_shape = (1, 3, height, width)
        self.dynamic_batch = True

    def run(self, images: FloatArray) -> Mapping[str, NDArray[np.generic]]:
        """One inference: images (B, 3, H, W) float32, normalised.

        Raises:
            RuntimeFailure: torch failed, or the runtime is closed.
        """
        if self.detector is None:
            raise RuntimeFailure("this runtime is closed")
        with torch.inference_mode(), _torch_threads(self.threads):
            try:
                boxes, scores = self.detector.decode(self.detector(torch.from_numpy(images).to(self.provider)))
            except RuntimeError as error:
                raise RuntimeFailure(
                    "torch failed while running a detector", got=error, expected=f"input like {self.input_shape}"
                ) from error
            return {"boxes": boxes.float().cpu().numpy(), "scores": scores.float().cpu().numpy()}

    def close(self) -> None:
        """Let go of the detector; further calls raise."""
        self.detector = None

    def __enter__(self) -> TorchRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
