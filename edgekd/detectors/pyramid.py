"""What the detectors on a feature pyramid share: grid cells, the names of their taps, checks of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from edgekd.detectors.base import TapSpec
from edgekd.errors import RecipeError
from edgekd.types import DetectorSpec

COARSEST_STRIDE = 32


class Options(BaseModel):
    """Base of a family's settings: unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


AnyOptions = TypeVar("AnyOptions", bound=Options)


def parse_options(kind: type[AnyOptions], model: str, options: Mapping[str, object]) -> AnyOptions:
    """The settings of a model, validated.

    Raises:
        RecipeError: an unknown name or a bad value; lists every one.
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        found = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise RecipeError(
            f"options of model {model!r} are wrong", got="; ".join(found), expected=", ".join(kind.model_fields)
        ) from error


def check_input_hw(model: str, input_hw: tuple[int, int]) -> None:
    """Refuse an input size that the coarsest grid does not divide.

    Raises:
        RecipeError: a side is below 64 pixels or no multiple of 32.
    """
    if all(side >= 2 * COARSEST_STRIDE and side % COARSEST_STRIDE == 0 for side in input_hw):
        return
    near = [max(2, round(side / COARSEST_STRIDE)) * COARSEST_STRIDE for side in input_hw]
    raise RecipeError(
        f"model {model!r} cannot take this input size",
        got=f"{input_hw[0]}x{input_hw[1]}",
        expected=f"multiples of {COARSEST_STRIDE}, 64 or more",
        fix=f"use {near[0]}" if near[0] == near[1] else f"use {near[0]}x{near[1]}",
    )


def grids_of(spec: DetectorSpec, strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(height, width) in cells of each level."""
    h, w = spec.preprocess.input_hw
    return tuple((h // stride, w // stride) for stride in strides)


def grid_cells(spec: DetectorSpec, strides: Sequence[int]) -> Tensor:
    """(P, 4) float32 cxcywh in input pixels of every cell: levels in the order of `strides`, then y, then x."""
    levels = []
    for (rows, columns), stride in zip(grids_of(spec, strides), strides, strict=True):
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        centres = torch.stack([x, y], dim=-1).reshape(-1, 2) * stride
        levels.append(torch.cat([centres, torch.full_like(centres, float(stride))], dim=1))
    return torch.cat(levels)


def doubled(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, 2 H, 2 W), each cell repeated."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def pyramid_taps(
    spec: DetectorSpec, strides: Sequence[int], backbone_channels: Sequence[int], neck_channels: Sequence[int]
) -> dict[str, TapSpec]:
    """The taps "backbone.s8" ... "neck.p5", fine to coarse; "p" counts halvings of the input, so p3 has stride 8."""
    grids = grids_of(spec, strides)
    backbone = [
        TapSpec(f"backbone.s{stride}", "backbone", channels, grid)
        for stride, channels, grid in zip(strides, backbone_channels, grids, strict=True)
    ]
    neck = [
        TapSpec(f"neck.p{stride.bit_length() - 1}", "neck", channels, grid)
        for stride, channels, grid in zip(strides, neck_channels, grids, strict=True)
    ]
    return {tap.name: tap for tap in [*backbone, *neck]}


def select_taps(specs: Mapping[str, TapSpec], maps: Sequence[Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """The maps that `wanted` names; `maps` has the order of `specs`.

    Raises:
        KeyError: an unknown tap.
    """
    available = dict(zip(specs, maps, strict=True))
    for name in wanted:
        if name not in available:
            raise KeyError(f"unknown tap {name!r}; there are {', '.join(available)}")
    return {name: available[name] for name in wanted}
