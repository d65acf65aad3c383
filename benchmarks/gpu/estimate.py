"""What the VOC recipes cost in GPU-hours, reckoned from their arithmetic: for planning, where no GPU is at hand to time them.

    python benchmarks/gpu/estimate.py [RECIPE...] [--images 2501] [--tflops 5]

A training step is counted as three forward passes (one forward, two for the gradients), a teacher of which features are asked
as one forward pass a step, black boxes not at all: they answer once an image. What a term adds of its own is left out.
`run.py --stages training` measures the same on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.complexity import count_macs
from edgekd.recipe import ModelConfig, Recipe, TrainedTeacher
from edgekd.recipe_file import load_recipe

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
CLASSES = [f"class {i}" for i in range(20)]
TERMS_OF_ANSWERS = {"response"}
"""Terms that are told a teacher's boxes, for which it looks at each image once; others see its features at every step."""


def operations(recipe: Recipe, images: int) -> dict[str, float]:
    """Floating-point operations of each training of a recipe's chain, by its name."""

    def training(model: ModelConfig, epochs: int) -> float:
        return 3 * _forward(model) * images * epochs

    found = {"student alone": training(recipe.student, recipe.train.epochs)}
    watching = 0.0
    for one in recipe.teachers:
        if isinstance(one, TrainedTeacher):
            found[f"teacher {one.name}"] = training(one.train, (one.settings or recipe.train).epochs)
            watching += _forward(one.train)
    looks_each_step = {term.loss for term in recipe.distill.terms} - TERMS_OF_ANSWERS
    asked = images * (recipe.train.epochs if looks_each_step else 1)
    found["distilled"] = training(recipe.student, recipe.train.epochs) + watching * asked
    return found


def _forward(model: ModelConfig) -> float:
    return 2.0 * count_macs(build_detector(spec_for(model, CLASSES)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [RECIPES / "voc_ensemble.yaml", *sorted((RECIPES / "methods").glob("*.yaml"))]
    parser.add_argument("recipes", nargs="*", type=Path, default=default)
    parser.add_argument("--images", type=int, default=2501, help="training images; VOC07 train has 2,501")
    parser.add_argument("--tflops", type=float, default=5.0, help="operations a second that the GPU keeps up, in 1e12")
    options = parser.parse_args(arguments)
    print("| recipe | student alone | teachers | distilled | hours |\n|---|---|---|---|---|")
    for path in options.recipes:
        recipe = load_recipe(path)
        found = {name: amount / 1e15 for name, amount in operations(recipe, options.images).items()}
        total = sum(found.values())
        teachers = total - found["student alone"] - found["distilled"]
        hours = total * 1e3 / options.tflops / 3600
        row = f"{found['student alone']:.1f} | {teachers:.1f} | {found['distilled']:.1f} | {hours:.1f}"
        print(f"| {recipe.name} | {row} |")


if __name__ == "__main__":
    main()
