"""What could be a student: every native family at several widths, input sizes and precisions, with its MACs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from edgekd.errors import UserError
from edgekd.recipe import MODELS, ModelConfig
from edgekd.recipe_problems import option_problem

if TYPE_CHECKING:
    from edgekd.detectors.base import Detector
    from edgekd.export.onnx import Precision

WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.4)
INPUT_SIZES = tuple(range(160, 417, 32))
_COUNTED_AT = 320
_SUITS_ALL = 32
"""Every family takes multiples of it."""


@dataclass(frozen=True)
class Shape:
    """A student before it has a precision."""

    model: str
    width: float
    input_size: int

    @property
    def name(self) -> str:
        """Safe in file names and recipes."""
        return f"{self.model}-w{self.width:g}-{self.input_size}"

    @property
    def config(self) -> ModelConfig:
        """As a recipe says it.

        Raises:
            RecipeError: a width or size that no model can have.
        """
        try:
            return ModelConfig(model=self.model, width=self.width, input_size=self.input_size)
        except ValidationError as error:
            raise option_problem(error, width="widths", input_size="input-sizes") from error


@dataclass(frozen=True)
class Candidate:
    """A student that can be measured.

    Attributes:
        macs: multiply-accumulates of one image; scaled from another input size until it is measured.
    """

    shape: Shape
    precision: Precision
    macs: float

    @property
    def name(self) -> str:
        """Unique in a plan."""
        return f"{self.shape.name}-{self.precision}"

    @property
    def line(self) -> tuple[str, str]:
        """Candidates whose latencies follow from each other's: of one family in one precision."""
        return self.shape.model, self.precision

    def within(self, other: Candidate) -> bool:
        """Whether `other` is at least as wide and as large, and not the same."""
        a, b = self.shape, other.shape
        return self.line == other.line and a != b and a.width <= b.width and a.input_size <= b.input_size


def grid(
    models: Sequence[str],
    widths: Sequence[float],
    input_sizes: Sequence[int],
    precisions: Sequence[Precision],
    class_names: Sequence[str],
    *,
    most_macs: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Candidate]:
    """All of these, the ones that need more than `most_macs` left out.

    MACs are counted at one input size and scaled with its area, which is right to a few percent.

    Raises:
        UserError: an unknown model, or none. RecipeError: a width or size that a model cannot have.
    """
    unknown = [model for model in models if model not in MODELS]
    if unknown or not (models and widths and input_sizes and precisions):
        raise UserError("not what a plan can be made of", got=", ".join(unknown), expected=", ".join(MODELS))
    found = []
    for done, model in enumerate(models, 1):
        for size in input_sizes:
            shape = Shape(model, min(widths), size)
            if shape.config.input_size % _SUITS_ALL:
                _build(shape, class_names)
        for width in sorted(widths):
            counted = _count(Shape(model, width, _COUNTED_AT), class_names)
            of_size = {size: counted * (size / _COUNTED_AT) ** 2 for size in sorted(input_sizes)}
            if most_macs is not None and min(of_size.values()) > most_macs:
                break  # wider ones need more still
            found += [
                Candidate(Shape(model, width, size), precision, macs)
                for size, macs in of_size.items()
                if most_macs is None or macs <= most_macs
                for precision in precisions
            ]
        progress(done, len(models))
    return found


def _count(shape: Shape, class_names: Sequence[str]) -> int:
    import torch

    from edgekd.detectors.complexity import count_macs

    with torch.device("meta"):
        return count_macs(_build(shape, class_names))


def _build(shape: Shape, class_names: Sequence[str]) -> Detector:
    """Without weights: shapes are enough."""
    import torch

    from edgekd.detectors import build_detector, spec_for

    with torch.device("meta"):
        return build_detector(spec_for(shape.config, class_names))
