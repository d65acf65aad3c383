"""What a recipe may set of an SSD, with each family's defaults. Imports no torch, so that checking a recipe is quick."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from edgekd.errors import RecipeError
from edgekd.recipe import ModelConfig
from edgekd.types import PreprocessSpec

LEVELS = 6
Shapes = tuple[tuple[tuple[float, float], ...], ...]
"""Of each level's priors: (w, h) as shares of the input's sides."""
MIN_WIDTH, MAX_WIDTH = 0.25, 1.4


@dataclass(frozen=True)
class SsdOptions:
    """The priors of an SSD.

    Attributes:
        min_scale, max_scale: side of the square prior on the finest and the coarsest level, as a share of the input's;
            levels between are spaced evenly. VGG's extra fine level (stride 8) has half of `min_scale`, and the even
            spacing starts behind it, as in the paper.
        aspect_ratios: of the other priors; each is used upright too.
        match_iou: with a box, from which a prior learns it. The papers' 0.5 leaves objects smaller than a cell of the
            finest level with one prior or none; 0.4 gives them more.
        priors: "published": those of the scales and ratios. "fitted": as many, but where the training images' boxes (100
            or more) are not well covered, shapes that cover them (`prior_fit`). Or for each level its (w, h) as shares of
            the input's sides, which is what "fitted" becomes in a trained detector.
        finest_stride: of SSD-lite's first level. 16 is the papers'; 8 adds one level before it and leaves out the coarsest,
            for objects smaller than 32 pixels of the input: at 320 px 8 % more arithmetic and four times as many priors.
    """

    min_scale: float
    max_scale: float
    aspect_ratios: tuple[float, ...] = (2.0, 3.0)
    match_iou: float = 0.5
    priors: Literal["published", "fitted"] | Shapes = "published"
    finest_stride: Literal[8, 16] = 16

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as they stand in `DetectorSpec.options`."""
        priors = self.priors
        plain = priors if isinstance(priors, str) else [[list(shape) for shape in level] for level in priors]
        return {**asdict(self), "aspect_ratios": list(self.aspect_ratios), "priors": plain}


@dataclass(frozen=True)
class Family:
    """What sets one SSD apart from another before torch comes in.

    Attributes:
        lite: SSD-lite (depthwise-separable neck and head, levels from stride 16) or the paper's SSD (from stride 8).
        mean, std: the normalisation that its published backbone weights were trained with.
        least_min_scale, max_scale: defaults; see `default_options`.
    """

    lite: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    least_min_scale: float
    max_scale: float


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE_MEAN, _LITE_STD = 127 / 255, 128 / 255  # EfficientNet-Lite's: (pixel - 127) / 128
_SSD = Family(False, *_IMAGENET, 0.2, 0.88)
_SSD_LITE = Family(True, *_IMAGENET, 0.05, 0.95)
_EFFICIENTNET = Family(True, (_LITE_MEAN,) * 3, (_LITE_STD,) * 3, 0.05, 0.95)

FAMILIES: dict[str, Family] = {
    "vgg16-ssd": _SSD,
    "vgg11-ssd": _SSD,
    "mobilenetv1-ssd-lite": _SSD_LITE,
    "mobilenetv2-ssd-lite": _SSD_LITE,
    "efficientnet-lite0-ssd-lite": _EFFICIENTNET,
    "efficientnet-lite1-ssd-lite": _EFFICIENTNET,
}


def ssd_spec_defaults(config: ModelConfig) -> tuple[PreprocessSpec, dict[str, Any]]:
    """Preprocessing and complete options of the SSD that a recipe asks for.

    Raises:
        RecipeError: an unknown option, a bad value of one, or a width outside 0.25 ... 1.4.
    """
    check_width(config.model, config.width)
    family = FAMILIES[config.model]
    preprocess = PreprocessSpec((config.input_size, config.input_size), "stretch", family.mean, family.std)
    return preprocess, read_options(config.model, config.options, preprocess.input_hw).to_dict()


def default_options(model: str, input_hw: tuple[int, int], finest_stride: Literal[8, 16] = 16) -> SsdOptions:
    """The priors of a model whose recipe says nothing of them.

    The square prior of the grid of stride 16 is 32 pixels wide (of stride 8: 16): two of its cells, so that an object of
    that size overlaps some prior well wherever it lies. Narrower ones leave gaps between cells (at 96 pixels, 0.33 rather than
    0.1 takes a short trial's recall from 0.30 to about 0.8), wider ones miss small objects. At 320 pixels that is 0.1, the best
    of 0.06 to 0.2 by the share of VOC's and BCCD's objects with a prior of IoU 0.5. VGG keeps the paper's 0.2 from 160
    pixels up, since it has a finer grid for small objects.
    """
    family = FAMILIES[model]
    two_cells = round(2 * finest_stride / min(input_hw), 4)
    min_scale = min(0.35, max(family.least_min_scale, two_cells))
    return SsdOptions(min_scale, family.max_scale, finest_stride=finest_stride)


def check_width(model: str, width: float) -> None:
    """Refuse a width multiplier that the SSDs are not made for.

    Raises:
        RecipeError: it is outside 0.25 ... 1.4.
    """
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        raise RecipeError(f"{model}: width out of range", got=width, expected=f"{MIN_WIDTH} to {MAX_WIDTH}")


def read_options(model: str, given: Mapping[str, Any], input_hw: tuple[int, int]) -> SsdOptions:
    """`default_options` with what was given in their place.

    Raises:
        RecipeError: an unknown name or a value that cannot be meant.
    """
    names = [field.name for field in fields(SsdOptions)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            fix = f"did you mean {near[0]!r}?" if near else None
            raise RecipeError(
                f"{model}: unknown option", got=repr(name), expected="one of " + ", ".join(names), fix=fix
            )
    stride = given.get("finest_stride", 16)
    if stride not in (8, 16) or isinstance(stride, bool) or (stride == 8 and not FAMILIES[model].lite):
        possible = "8 or 16" if FAMILIES[model].lite else "16: its first level has stride 8 as it is"
        raise RecipeError(f"{model}: bad finest_stride", got=repr(stride), expected=possible)
    values: dict[str, Any] = {**asdict(default_options(model, input_hw, stride)), **given}
    min_scale, max_scale = (_number(model, name, values[name]) for name in ("min_scale", "max_scale"))
    if min_scale > max_scale:
        raise RecipeError(f"{model}: min_scale is larger than max_scale", got=f"{min_scale} and {max_scale}")
    ratios = values["aspect_ratios"]
    if isinstance(ratios, str) or not hasattr(ratios, "__iter__") or not (ratios := tuple(ratios)):
        raise RecipeError(f"{model}: aspect_ratios must be a list", got=repr(ratios), expected="such as [2, 3]")
    ratios = tuple(_number(model, "aspect_ratios", ratio, low=1.0, high=20.0) for ratio in ratios)
    if len(set(ratios)) != len(ratios) or 1.0 in ratios:
        raise RecipeError(
            f"{model}: aspect_ratios repeat", got=list(ratios), expected="different ratios above 1 (1 is always there)"
        )
    match_iou = _number(model, "match_iou", values["match_iou"], low=0.1, high=0.9)
    return SsdOptions(min_scale, max_scale, ratios, match_iou, _priors(model, values["priors"]), stride)


def _priors(model: str, value: object) -> Literal["published", "fitted"] | Shapes:
    if value == "published" or value == "fitted":
        return value
    try:
        levels = tuple(tuple((float(w), float(h)) for w, h in level) for level in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        levels = ()
    if len(levels) != LEVELS or not all(0 < side <= 4 for level in levels for shape in level for side in shape):
        raise RecipeError(
            f"{model}: bad priors",
            got=repr(value)[:200],
            expected=f"published, fitted, or {LEVELS} levels of [width, height] as shares of the input",
        )
    return levels


def _number(model: str, name: str, value: object, low: float = 0.01, high: float = 1.5) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RecipeError(f"{model}: bad {name}", got=repr(value), expected=f"a number from {low:g} to {high:g}")
    return float(value)
