"""What every engine for ONNX files has in common: which input is the image, what it is fed, how outputs are named."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from edgekd.errors import ArtifactError, RuntimeFailure, first_line
from edgekd.runtimes.side_inputs import can_feed, value_for
from edgekd.runtimes.tensor_info import TensorInfo
from edgekd.types import FloatArray

_INPUT_TYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}

Feed = Mapping[str, NDArray[np.generic]]


class OnnxRuntime(ABC):
    """An ONNX detector in an open session, as a `runtimes.base.Runtime`; subclasses open it and compute.

    Args:
        source: what messages call the model.
        provider: what really computes.
        inputs, outputs: what the graph declares.
        metadata: the file's own.
        input_hw: the size to run at where the graph leaves it open.

    Attributes:
        input_shape: (B, 3, H, W), as `run` takes images, however the graph itself wants them.
        channels_last: the graph takes (B, H, W, 3), as TensorFlow's do.
        takes_bytes: the graph takes pixels from 0 to 255 as bytes.

    Raises:
        ArtifactError: the graph does not take one image tensor.
    """

    name: str
    engine: str
    """What messages call it."""

    def __init__(
        self,
        source: str,
        provider: str,
        inputs: Sequence[TensorInfo],
        outputs: Sequence[TensorInfo],
        metadata: Mapping[str, str],
        input_hw: tuple[int, int] | None,
    ) -> None:
        self._source, self.provider = source, provider
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.output_names = tuple(info.name for info in outputs)
        self.metadata = dict(metadata)
        self._image = _image_input(self.inputs, source)
        self._extra = tuple(info for info in self.inputs if info is not self._image)
        shape = self._image.shape
        self.channels_last = _is_channels_last(shape)
        self.takes_bytes = self._image.type == "tensor(uint8)"
        height, width = shape[-3:-1] if self.channels_last else shape[-2:]
        batch = shape[0] if len(shape) == 4 else 1
        self.dynamic_batch = batch is None
        self.dynamic_hw = height is None or width is None
        fallback = input_hw or (0, 0)
        self.input_shape = (batch or 1, 3, height or fallback[0], width or fallback[1])
        self._dtype = _INPUT_TYPES[self._image.type]
        self._closed = self._tried = False

    @property
    def image_name(self) -> str:
        """What the graph calls its image input."""
        return self._image.name

    def one_at_a_time(self) -> None:
        """Take no batches, though the graph would: its outputs do not say which rows are of which image."""
        self.dynamic_batch = False

    def try_batch(self, images: FloatArray) -> None:
        """Take no batches from now on, if this one (two images or more) shows that the graph takes them in name only.

        An NMS or a reshape for one image inside does that. Asked when a batch is first wanted: it costs two inferences, and
        memory that whoever takes one image at a time never needs.
        """
        if not self.dynamic_batch or self._tried:
            return
        self._tried = True
        alone = {name: array.shape for name, array in self.run(images[:1]).items()}
        try:
            both = self.run(images[:2])
        except RuntimeFailure:
            self.dynamic_batch = False
            return
        # One that answers for one image only, of whatever it is given, must not be asked about two.
        batched = [name for name, shape in alone.items() if len(shape) > 1 and shape[0] == 1]
        self.dynamic_batch = all(len(both[name]) == 2 for name in batched)

    @abstractmethod
    def _compute(self, feed: Feed) -> Sequence[NDArray[np.generic]]:
        """Every output, in the model's order; may raise anything."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of the session."""

    def run(self, images: FloatArray) -> Mapping[str, NDArray[np.generic]]:
        """One inference: images (B, 3, H, W) float32, normalised; every output by name.

        A graph with a fixed batch takes fewer images too: the rest is filled up, and its outputs are to be ignored.

        Raises:
            RuntimeFailure: the engine failed, or the session is closed.
        """
        if self._closed:
            raise RuntimeFailure(f"{self._source}: this session is closed")
        missing = 0 if self.dynamic_batch else self.input_shape[0] - len(images)
        if missing > 0:
            images = np.concatenate([images, np.repeat(images[-1:], missing, 0)])
        feed: dict[str, NDArray[np.generic]] = {self._image.name: self._as_declared(images)}
        for info in self._extra:
            value = value_for(info, len(images), (images.shape[-2], images.shape[-1]))
            if value is not None:
                feed[info.name] = value
        try:
            values = self._compute(feed)
        except Exception as error:  # the engines' errors share no base class
            raise RuntimeFailure(
                f"{self._source}: {self.engine} failed while running",
                got=first_line(error),
                expected=f"input {self._image}, was given {tuple(images.shape)}",
            ) from error
        return dict(zip(self.output_names, values, strict=True))

    def _as_declared(self, images: FloatArray) -> NDArray[np.generic]:
        if self.channels_last:
            images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        if self.takes_bytes:  # a plain cast would cut 127.99 to 127, and turn 256 into 0
            images = np.clip(np.rint(images), 0, 255)
        images = images if len(self._image.shape) == 4 else images[0]
        return images if images.dtype == self._dtype else images.astype(self._dtype)

    def close(self) -> None:
        """Free the session; further calls raise."""
        if not self._closed:
            self._closed = True
            self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _image_input(inputs: Sequence[TensorInfo], source: str) -> TensorInfo:
    """The one input that is an image; others may only be what `side_inputs` knows, as RT-DETR's original size."""
    images = [
        info
        for info in inputs
        if info.type in _INPUT_TYPES
        and len(info.shape) in (3, 4)
        and (info.shape[-3] in (3, None) or _is_channels_last(info.shape))
    ]
    if len(images) > 1:  # a mask of padding may look like a picture without batch axis
        images = [info for info in images if len(info.shape) == 4]
    unknown = [info for info in inputs if info not in images and not can_feed(info)]
    if len(images) != 1 or unknown:
        raise ArtifactError(
            f"{source}: this is not a detector that edgekd can feed",
            got="inputs " + "; ".join(str(info) for info in inputs),
            expected="one image input (B, 3, H, W) or (B, H, W, 3) of float32, float16 or bytes",
            fix="export it with such an input"
            if len(inputs) == 1
            else "export it with the image as its only input: fold the others into the graph as constants",
        )
    return images[0]


def _is_channels_last(shape: Sequence[int | None]) -> bool:
    """Whether an image input's last axis holds the channels: 3 where the usual place says something else."""
    return len(shape) in (3, 4) and shape[-1] == 3 and shape[-3] != 3


def source_name(model: object) -> str:
    """What messages call a model given as a file or as bytes."""
    return "the model" if isinstance(model, bytes) else str(model)
