"""What an ONNX graph declares of one of its inputs or outputs."""

from __future__ import annotations

from dataclasses import dataclass


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
