"""A pretrained backbone of width 1 cut to a narrower one's shapes: a start that a small data set cannot give.

Source: Z. Xu et al., "Initializing Models with Larger Ones", ICLR 2024: every narrow layer keeps evenly spaced channels of its
wide layer. Equal widths are cut alike, which keeps both ends of a shortcut together without knowing the graph. Keeping the
channels of depthwise convolutions that say most instead was no better (measured: benchmarks/).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def narrowed(wide: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The wide tensors, each cut to the shape of its name; what has no shape, or is smaller, is left as it is.

    Args:
        wide: a backbone's state.
        shapes: of the narrow backbone's tensors.
    """
    return {name: _cut(value, shapes[name]) if name in shapes else value for name, value in wide.items()}


def _cut(value: Tensor, shape: torch.Size) -> Tensor:
    if value.ndim != len(shape) or any(a < b for a, b in zip(value.shape, shape, strict=True)):
        return value
    for dim, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        if have != want:
            value = value.index_select(dim, evenly_spaced(have, want))
    return value


def evenly_spaced(have: int, want: int) -> Tensor:
    """(want,) int64 out of `have`."""
    return torch.arange(want) * have // want
