"""Which layers int8 or float16 hurts, measured; and keeping the worst of them in float32 until the export passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import ExportError
from edgekd.export.calibration import Ranges
from edgekd.export.float16 import overflow, to_float16
from edgekd.export.graph import GraphIndex, open_session, raw_tensors, with_outputs
from edgekd.export.placement import Target, int8_nodes, is_weighted
from edgekd.export.qdq import quantise
from edgekd.types import FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto

Evaluate = Callable[[bytes], float]
"""A serialised ONNX model with decoded outputs to its AP50 in [0, 1]."""

MEASURED_IMAGES = 4
LARGEST_SHARE = 0.5
"""At most this share of the convolutions may stay in float: beyond it the file would be int8 in name alone."""


@dataclass(frozen=True)
class LayerDamage:
    """One layer's own damage: relative squared error of the raw outputs when this layer alone runs in int8."""

    node: str
    damage: float


def output_damage(reference: ModelProto, candidate: ModelProto, images: Sequence[FloatArray]) -> float:
    """Relative squared error of the raw outputs, summed over outputs, averaged over images."""
    truth = raw_values(reference, images)
    return _damage(truth, raw_values(candidate, images))


def raw_values(model: ModelProto, images: Sequence[FloatArray]) -> list[list[FloatArray]]:
    """The detector's raw outputs (class logits, boxes, ...) for each image, as float32."""
    names = [name for name in raw_tensors(model) if name in GraphIndex(model).producer]
    session = open_session(with_outputs(model, names))
    return [list(session.run(names, {"images": image})) for image in images]


def largest_magnitudes(model: ModelProto, images: Sequence[FloatArray]) -> dict[str, float]:
    """The largest magnitude of every computed float tensor over some images, each (1, 3, H, W) float32, and of these."""
    names = list(GraphIndex(model).producer)
    session = open_session(with_outputs(model, names))
    peaks: dict[str, float] = {}
    for image in images:
        for name, value in zip(["images", *names], [image, *session.run(names, {"images": image})], strict=True):
            if np.issubdtype(value.dtype, np.floating) and value.size:
                peaks[name] = max(peaks.get(name, 0.0), float(np.abs(value).max()))
    return peaks


def _damage(truth: list[list[FloatArray]], found: list[list[FloatArray]]) -> float:
    errors = [
        sum(float(((b - a) ** 2).sum() / max(float((a**2).sum()), 1e-12)) for a, b in zip(one, other, strict=True))
        for one, other in zip(truth, found, strict=True)
    ]
    return float(np.mean(errors))


def rank_layers(
    model: ModelProto, ranges: Ranges, images: Sequence[FloatArray], target: Target, *, reduce_range: bool = False
) -> list[LayerDamage]:
    """Every convolution's damage, worst first: each in turn is quantised alone and the outputs are compared.

    Args:
        model: fp32. images: a few prepared inputs, each (1, 3, H, W) float32.
    """
    index = GraphIndex(model)
    names = set(int8_nodes(model, target))
    layers = [node.name for node in model.graph.node if node.name in names and is_weighted(node, index)]
    few = images[:MEASURED_IMAGES]
    truth = raw_values(model, few)
    found = [
        LayerDamage(
            layer, _damage(truth, raw_values(quantise(model, ranges, {layer}, target, reduce_range=reduce_range), few))
        )
        for layer in layers
    ]
    return sorted(found, key=lambda entry: (-entry.damage, entry.node))


def keep_worst(
    model: ModelProto,
    ranges: Ranges,
    nodes: Set[str],
    ranking: Sequence[LayerDamage],
    target: Target,
    *,
    reduce_range: bool = False,
) -> Iterator[tuple[tuple[str, ...], ModelProto]]:
    """Int8 models with the worst 1, 2, 4, 8, ... layers left in float, up to `LARGEST_SHARE` of them."""
    for count in _counts(len(ranking)):
        kept = tuple(entry.node for entry in ranking[:count])
        yield kept, quantise(model, ranges, without(model, nodes, kept), target, reduce_range=reduce_range)


def half_with_worst_kept(
    model: ModelProto, images: Sequence[FloatArray]
) -> Iterator[tuple[tuple[str, ...], ModelProto]]:
    """Float16 models in which the worst 1, 2, 4, ... layers stay float32, up to `LARGEST_SHARE` of them.

    A layer is a convolution with all that follows it until the next. Each is measured alone in float16, among all others in
    float32; what overflows there, as a value or as a weight, is the worst.

    Args:
        model: fp32. images: a few prepared inputs, each (1, 3, H, W) float32.
    """
    index = GraphIndex(model)
    body = index.before(raw_tensors(model))
    blocks: list[list[str]] = []
    for node in model.graph.node:
        if node.name in body and is_weighted(node, index):
            blocks.append([])
        if node.name in body and blocks:
            blocks[-1].append(node.name)
    few = images[:MEASURED_IMAGES]
    truth, peaks = raw_values(model, few), largest_magnitudes(model, images)

    def damage(block: list[str]) -> float:
        alone = _half(model, body - set(block))
        return np.inf if alone is None or overflow(alone, peaks) else _damage(truth, raw_values(alone, few))

    ranking = sorted(blocks, key=damage, reverse=True)
    for count in _counts(len(ranking)):
        kept = {name for block in ranking[:count] for name in block}
        half = _half(model, kept)
        if half is not None:
            yield tuple(block[0] for block in ranking[:count]), half


def _half(model: ModelProto, kept: Collection[str]) -> ModelProto | None:
    """A model in float16; None where a weight does not fit in it."""
    try:
        return to_float16(model, kept)
    except ExportError:
        return None


def _counts(layers: int) -> tuple[int, ...]:
    """How many of so many layers to keep, one try after the other."""
    limit = max(1, int(layers * LARGEST_SHARE))
    return (*(2**power for power in range(limit.bit_length()) if 2**power < limit), limit)


def without(model: ModelProto, nodes: Set[str], kept: Collection[str]) -> set[str]:
    """`nodes` less the kept layers, and less weightless nodes that then stand among floats alone."""
    index = GraphIndex(model)
    left = set(nodes) - set(kept)
    for node in model.graph.node:
        if node.name in left and not is_weighted(node, index):
            makers = [index.producer.get(name) for name in index.activations(node)]
            if makers and all(maker is not None and maker.name in kept for maker in makers):
                left.discard(node.name)
    return left
