"""Priors fitted to a data set's boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.checkpoint import load_detector
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.prior_fit import LEAST_BOXES, coverage, fit_shapes, fitted_spec, prior_advice, suited_options
from edgekd.errors import RecipeError
from edgekd.recipe import ModelConfig
from edgekd.types import ImageRecord

FITTED = ModelConfig(model="mobilenetv2-ssd-lite", input_size=96, width=0.25, options={"priors": "fitted"})


def records(sizes_wh: np.ndarray, image_hw: tuple[int, int] = (100, 200)) -> list[ImageRecord]:
    """One box an image, of these shares of it."""
    found, no = [], np.zeros(1, bool)
    for index, size in enumerate(sizes_wh):
        box = np.array([[0, 0, size[0] * image_hw[1], size[1] * image_hw[0]]], np.float32)
        found.append(ImageRecord(str(index), Path("x"), image_hw, box, np.array([index % 2]), no, no))
    return found


def scattered(found: list[ImageRecord]) -> list[ImageRecord]:
    """The same boxes anywhere in their images: in the corner they all lie alike in the cells of every grid."""
    draw = np.random.default_rng(2)
    for record in found:
        box = record.boxes_xyxy
        box += np.tile(draw.uniform(0, record.image_hw[::-1] - box[0, 2:]), 2).astype(np.float32)
    return found


def cells(count: int = 200, seed: int = 0) -> np.ndarray:
    """Upright boxes of about a fifth by a third of the image, and a few small ones."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((count, 1)) < 0.8, [[0.2, 0.33]], [[0.1, 0.1]]) * rng.uniform(0.9, 1.1, (count, 2))


def test_coverage_is_the_mean_over_where_a_box_may_lie() -> None:
    sizes, shapes = np.array([[0.1, 0.2], [0.3, 0.05]]), np.array([[0.1, 0.2], [0.4, 0.4], [0.2, 0.1]])
    found = coverage(sizes, shapes, (5, 10))
    for row, (w, h) in enumerate(sizes):
        for column, (pw, ph) in enumerate(shapes):
            worth = []
            for dx in (0.0125, 0.0375):
                for dy in (0.025, 0.075):
                    across = max(0.0, min(w / 2, dx + pw / 2) - max(-w / 2, dx - pw / 2))
                    down = max(0.0, min(h / 2, dy + ph / 2) - max(-h / 2, dy - ph / 2))
                    iou = across * down / (w * h + pw * ph - across * down)
                    worth.append(min(1.0, max(0.0, (iou - 0.3) / 0.4)))
            assert found[row, column] == pytest.approx(np.mean(worth))


def test_the_fit_covers_what_the_published_priors_do_not() -> None:
    layout = build_detector(spec_for(FITTED, ("a", "b"))).prior_layout
    sizes = cells()
    shapes = fit_shapes(layout, sizes, np.zeros(len(sizes), np.int64))

    def covered(levels: list[np.ndarray]) -> float:
        each = [coverage(sizes, level, grid) for level, grid in zip(levels, layout.grids_hw, strict=True)]
        return float(np.concatenate(each, 1).max(1).mean())

    published = [np.array(layout.cell_shapes_wh(level)) for level in range(len(layout.grids_hw))]
    assert covered(shapes) > covered(published) + 0.08
    kept = [np.isin(new, old).all(1).sum() for new, old in zip(shapes, published, strict=True)]
    assert sum(kept) > 20  # most of the 36 add nothing to so uniform boxes, and stay


def test_a_second_fit_changes_nothing() -> None:
    layout = build_detector(spec_for(FITTED, ("a", "b"))).prior_layout
    first = fit_shapes(layout, cells(), np.zeros(200, np.int64))
    again = fit_shapes(layout, cells(), np.zeros(200, np.int64))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_spec_is_fitted_without_a_draw_from_torchs_generator() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    spec = fitted_spec(spec_for(FITTED, ("a", "b")), records(cells()))
    assert torch.equal(torch.random.get_rng_state(), before)
    detector = build_detector(spec)
    shapes = np.concatenate([detector.prior_layout.cell_shapes_wh(level) for level in range(6)])
    assert np.abs(shapes - [0.2, 0.33]).sum(1).min() < 0.05
    published = build_detector(spec_for(FITTED, ("a", "b")))
    assert detector.prior_boxes().shape == published.prior_boxes().shape  # as many, so as fast
    assert detector.layout() != published.layout()


def test_too_few_boxes_leave_the_published_ones() -> None:
    spec = fitted_spec(spec_for(FITTED, ("a", "b")), records(cells(LEAST_BOXES - 1)))
    assert spec.options["priors"] == "published"


def test_advice_names_the_class_that_the_priors_miss() -> None:
    usual = ModelConfig(model="mobilenetv2-ssd-lite", input_size=320, width=0.25)
    small = np.full((60, 2), 0.055) * np.random.default_rng(0).uniform(0.9, 1.1, (60, 2))
    middle = np.full((60, 2), 0.14) * np.random.default_rng(1).uniform(0.9, 1.1, (60, 2))
    mixed = scattered(records(np.stack([small, middle], 1).reshape(-1, 2)))  # small ones are of class 0
    advice = prior_advice(usual, ("dust", "plate"), mixed)
    assert advice is not None
    assert "class dust (60)" in advice
    options = {"finest_stride": 8, "priors": "fitted"}
    assert str(options).replace("'", "") in advice
    assert prior_advice(usual.model_copy(update={"options": options}), ("dust", "plate"), mixed) is None
    assert prior_advice(usual, ("dust", "plate"), records(np.stack([middle, middle], 1).reshape(-1, 2))) is None
    assert prior_advice(usual, ("dust", "plate"), mixed[:20]) is None  # too few to say
    assert prior_advice(ModelConfig(model="yolo-nano", input_size=320), ("dust", "plate"), mixed) is None


def test_large_objects_that_other_shapes_cover_get_no_finer_level() -> None:
    usual = ModelConfig(model="mobilenetv2-ssd-lite", input_size=320, width=0.25)
    narrow = np.array([[0.9, 0.1]]) * np.random.default_rng(0).uniform(0.9, 1.1, (120, 2))
    advice = prior_advice(usual, ("pen", "pole"), scattered(records(narrow)))
    assert advice is not None
    assert "`options: {priors: fitted}`" in advice
    assert suited_options(usual, ("pen", "pole"), scattered(records(narrow)))[0] == {"priors": "fitted"}


def test_other_detectors_are_left_alone() -> None:
    spec = spec_for(ModelConfig(model="yolo-nano", input_size=96, width=0.25), ("a",))
    assert fitted_spec(spec, records(cells())) is spec


@pytest.mark.parametrize("bad", ["auto", [[0.1, 0.2]], [[[0.1, -0.2]] * 6] * 6, [[[0.1, 0.2]] * 5] * 6, 3])
def test_priors_that_cannot_be_meant(bad: object) -> None:
    config = FITTED.model_copy(update={"options": {"priors": bad}})
    with pytest.raises(RecipeError, match="priors"):
        build_detector(spec_for(config, ("a",)))


def test_a_run_keeps_its_fitted_priors(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from edgekd.cli import app
    from edgekd.data.scenes import make_scenes

    make_scenes(tmp_path / "scenes", counts={"train": 40, "val": 4}, seed=0, image_hw=(96, 96))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: tiny\ndata: {root: scenes, train: train, val: val, workers: 0}\n"
        "student: {model: mobilenetv2-ssd-lite, input_size: 96, width: 0.25, options: {priors: fitted}}\n"
        "train: {epochs: 1, batch_size: 8, precision: fp32}\n"
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["train", str(recipe), "--out", str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    detector = load_detector(out)
    assert isinstance(detector.spec.options["priors"], list)
    shapes = detector.prior_layout.cell_shapes_wh(0)
    np.testing.assert_allclose(shapes, detector.spec.options["priors"][0])
