"""A pretrained backbone of width 1 cut to a narrower one's shapes: a start that a small data set cannot give.

Every narrow layer keeps some of its wide layer's channels (Xu et al., "Initializing Models with Larger Ones", ICLR 2024,
take evenly spaced ones, and find that to beat random values by far where images are few). Here the channels of a depthwise
convolution, which no shortcut reaches, are the ones that say most: by the strength of what leaves them (their batch norm's
mean and scale, as in Liu et al., "Network Slimming", ICCV 2017, times the weights that read them). All others are evenly
spaced, which keeps both ends of a shortcut alike without knowing the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def narrowed(wide: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The wide tensors, each cut to the shape of its name; what has no shape, or is smaller, is left as it is.

    Args:
        wide: a backbone's state in the order of its layers.
        shapes: of the narrow backbone's tensors.
    """
    kept: dict[tuple[str, int], Tensor] = _depthwise_choices(wide, shapes)
    return {name: _cut(name, value, shapes.get(name), kept) for name, value in wide.items()}


def _cut(name: str, value: Tensor, shape: torch.Size | None, kept: Mapping[tuple[str, int], Tensor]) -> Tensor:
    if shape is None or value.ndim != len(shape) or any(a < b for a, b in zip(value.shape, shape, strict=True)):
        return value
    for dim, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        if have != want:
            value = value.index_select(dim, kept.get((name, dim), evenly_spaced(have, want)))
    return value


def evenly_spaced(have: int, want: int) -> Tensor:
    """(want,) int64 out of `have`."""
    return torch.arange(want) * have // want


def _depthwise_choices(wide: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[tuple[str, int], Tensor]:
    """The channels kept around each depthwise convolution, by (name, dimension): one layer writes them, the next reads."""
    layers = [name for name, value in wide.items() if value.ndim == 4]
    norms = {layer: _following_norm(layer, wide) for layer in layers}
    kept: dict[tuple[str, int], Tensor] = {}
    for before, layer, after in zip(layers, layers[1:], layers[2:], strict=False):
        if wide[layer].shape[1] != 1 or layer not in shapes:
            continue
        have, want = len(wide[layer]), shapes[layer][0]
        if want >= have or wide[before].shape[0] != have or wide[after].shape[1] != have:
            continue
        scale, mean = (wide[name].float() for name in norms[layer][:2])
        strength = (scale.square() + mean.clamp(min=0).square()) * wide[after].float().square().sum((0, 2, 3))
        chosen = strength.topk(want).indices.sort().values
        for owner in (before, layer):
            for name in (owner, *norms[owner]):
                kept[name, 0] = chosen
        kept[after, 1] = chosen
    return kept


def _following_norm(layer: str, state: Mapping[str, Tensor]) -> list[str]:
    """The vectors between a convolution and the next one: a batch norm's weight, bias, mean and variance."""
    names = list(state)
    found = []
    for name in names[names.index(layer) + 1 :]:
        if state[name].ndim != 1:
            if state[name].ndim == 0:
                continue
            break
        found.append(name)
    return found
