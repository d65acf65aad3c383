"""Views: what is rendered and where boxes are said to be must be the same thing."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgekd.data._photometric import Photometric, distort, sample_photometric
from edgekd.data.views import View, ViewPart, boxes_in_view, render_view, sample_view, view_rng
from edgekd.errors import ArtifactError, DataError
from edgekd.preprocess import geometry_for, resize
from edgekd.recipe import AugmentConfig
from edgekd.types import Dataset, ImageRecord, PreprocessSpec

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


def make_dataset(sizes: list[tuple[int, int]], boxes: list[list[list[float]]], difficult: bool = False) -> Dataset:
    records = []
    for i, (hw, image_boxes) in enumerate(zip(sizes, boxes, strict=True)):
        n = len(image_boxes)
        flags = np.full(n, difficult)
        array = np.array(image_boxes, np.float32).reshape(-1, 4)
        records.append(
            ImageRecord(f"im{i}", Path(f"im{i}.png"), hw, array, np.zeros(n, np.int64), flags, np.zeros(n, bool))
        )
    return Dataset(Path("."), "voc", "train", ("thing",), tuple(records))


def rectangle_image(hw: tuple[int, int], box: list[int], colour: tuple[int, int, int]) -> np.ndarray:
    image = np.zeros((*hw, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = colour
    return image


def measured_box(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Edges of a coloured rectangle to a fraction of a pixel, from the summed intensity along a row and a column."""
    weight = np.ones(picture.shape[:2])
    for channel, value in enumerate(colour):
        plane = picture[..., channel] / 255.0
        weight = np.minimum(weight, plane if value else 1 - plane)
    rows, columns = weight.max(1), weight.max(0)
    result = []
    for profile in (columns, rows):
        solid = np.flatnonzero(profile > 0.5)
        start = solid[0] + (1 - profile[solid[0]]) - (profile[solid[0] - 1] if solid[0] else 0)
        end = solid[-1] + profile[solid[-1]] + (profile[solid[-1] + 1] if solid[-1] + 1 < len(profile) else 0)
        result += [start, end]
    return np.array([result[0], result[2], result[1], result[3]])


# Windows of a 120 x 160 image holding a rectangle at (50, 30, 110, 90); every window shows the whole rectangle.
WINDOWS = {
    "whole": (0, 0, 160, 120),
    "crop": (20, 10, 140, 110),
    "small crop, enlarged": (45, 25, 115, 95),
    "fractional crop": (20.4, 10.7, 139.3, 108.2),
    "zoom out": (-80, -150, 240, 170),
    "zoom out, odd": (-33, -7, 301, 200),
    "fractional zoom out": (-33.3, -70.6, 301.8, 200.1),
    "out on the left alone": (-41.7, 12.3, 120.2, 119),
    "crop of a zoom out": (30, -90, 200, 140),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("flip", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("out_hw", [(300, 300), (96, 201), (64, 64)])
def test_boxes_land_on_their_pixels(name: str, flip: tuple[bool, bool], out_hw: tuple[int, int]) -> None:
    box = [50, 30, 110, 90]
    view = View((ViewPart(0, (120, 160), WINDOWS[name], flip=flip[0], flip_vertical=flip[1]),))
    picture = render_view(view, lambda _: rectangle_image((120, 160), box, (255, 0, 0)), out_hw)
    (mapped,), rows = boxes_in_view(view, {0: np.array([box], np.float32)}, out_hw)
    assert rows.tolist() == [[0, 0]]
    # The slack is the filter's: bilinear shrinking samples points, so an edge between samples shows up to 0.5 px off.
    assert np.abs(measured_box(picture, (255, 0, 0)) - mapped).max() < 0.75


@pytest.mark.parametrize("name", WINDOWS)
def test_geometry_is_within_a_pixel_of_the_ideal_affine_map(name: str) -> None:
    x1, y1, x2, y2 = WINDOWS[name]
    view = View((ViewPart(0, (120, 160), WINDOWS[name]),))
    (mapped,), _ = boxes_in_view(view, {0: np.array([[50, 30, 110, 90]], np.float32)}, (120, 160))
    ideal = (np.array([50, 30, 110, 90]) - [x1, y1, x1, y1]) / np.array([x2 - x1, y2 - y1] * 2) * [160, 120, 160, 120]
    assert np.abs(mapped - ideal).max() < 1.0


@pytest.mark.parametrize("seed", range(12))
def test_mosaic_boxes_land_on_their_pixels(seed: int) -> None:
    sizes = [(120, 160), (90, 90), (200, 150), (64, 256)]
    boxes = [[40, 30, 120, 90], [20, 20, 70, 70], [30, 60, 120, 140], [90, 16, 170, 48]]
    images = [rectangle_image(*entry) for entry in zip(sizes, boxes, COLOURS, strict=False)]
    dataset = make_dataset(sizes, [[box] for box in boxes])
    config = AugmentConfig(photometric=0, mosaic=1.0)
    view = sample_view(seed % 4, dataset, config, view_rng(0, 0, str(seed)), aspect=None if seed % 2 else 1.0)
    assert len(view.parts) == 4
    picture = render_view(view, images.__getitem__, (240, 240))
    for part in view.parts:
        # A record may appear twice: look inside one cell at a time.
        cell = [round(v * 240) for v in part.target_xyxy]
        only = View((part,), fill=(0, 0, 0))
        got, rows = boxes_in_view(
            only, {part.record_index: np.array([boxes[part.record_index]], np.float32)}, (240, 240)
        )
        seen = picture[cell[1] : cell[3], cell[0] : cell[2]]
        if len(rows):
            measured = measured_box(seen, COLOURS[part.record_index]) + [cell[0], cell[1]] * 2
            assert np.abs(measured - got[0]).max() < 1.0


def plain_view(hw: tuple[int, int], aspect: float | None = None) -> View:
    config = AugmentConfig(photometric=0, zoom_out=0, iou_crop=0, flip=0)
    return sample_view(0, make_dataset([hw], [[]]), config, view_rng(0, 0, "x"), aspect=aspect)


@pytest.mark.parametrize("hw", [(375, 500), (500, 333), (120, 160), (301, 77), (320, 320), (1, 9)])
@pytest.mark.parametrize("input_hw", [(300, 300), (320, 192), (65, 300)])
@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_without_augmentation_a_view_is_what_deployment_sees(
    hw: tuple[int, int], input_hw: tuple[int, int], mode: str
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*hw, 3), np.uint8)
    box = np.array([[0, 0, hw[1], hw[0]], [0, 0, hw[1] * 0.6, hw[0] * 0.5]], np.float32)
    spec = PreprocessSpec(input_hw, mode)  # type: ignore[arg-type]
    view = plain_view(hw, None if mode == "stretch" else input_hw[1] / input_hw[0])
    expected, geometry = resize(image, spec)
    np.testing.assert_array_equal(render_view(view, lambda _: image, input_hw), expected)
    got, rows = boxes_in_view(view, {0: box}, input_hw, min_size_px=0)
    np.testing.assert_allclose(got, geometry_for(hw, spec).to_input(box)[rows[:, 1]], atol=1e-3)
    assert geometry == geometry_for(hw, spec)


def test_rendering_leaves_the_source_alone_and_owns_its_memory() -> None:
    image = np.full((50, 50, 3), 100, np.uint8)
    view = View((ViewPart(0, (50, 50), (0, 0, 50, 50)),), Photometric(brightness=20))
    picture = render_view(view, lambda _: image, (50, 50))
    plain = render_view(plain_view((50, 50)), lambda _: image, (50, 50))
    plain[:] = 0
    assert (image == 100).all()
    assert (picture == 120).all()


def test_fill_is_not_distorted() -> None:
    image = np.full((10, 10, 3), 50, np.uint8)
    view = View((ViewPart(0, (10, 10), (-10, -10, 20, 20)),), Photometric(brightness=30), fill=(1, 2, 3))
    picture = render_view(view, lambda _: image, (30, 30))
    assert picture[0, 0].tolist() == [1, 2, 3]
    assert picture[15, 15].tolist() == [80, 80, 80]


def test_wrong_image_size_is_a_data_error() -> None:
    view = plain_view((10, 20))
    with pytest.raises(DataError, match="another size"):
        render_view(view, lambda _: np.zeros((20, 10, 3), np.uint8), (30, 30))


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, [0, 1]),  # centre inside and at least 2 px
        ({"min_size_px": 0.5}, [0, 1, 4]),
    ],
)
def test_rules_for_keeping_boxes(rules: dict[str, float], kept: list[int]) -> None:
    boxes = np.array(
        [
            [20, 20, 60, 60],  # wholly shown
            [70, 20, 110, 60],  # three quarters shown
            [80, 20, 180, 60],  # a fifth shown, centre outside
            [150, 20, 160, 60],  # not shown
            [30, 30, 31, 50],  # 1 px wide
        ],
        np.float32,
    )
    view = View((ViewPart(5, (200, 200), (0, 0, 100, 100)),))
    got, rows = boxes_in_view(view, {5: boxes, 6: boxes}, (100, 100), **rules)
    assert rows.tolist() == [[5, k] for k in kept]
    np.testing.assert_allclose(got, np.clip(boxes[kept], 0, 100))


def test_view_that_shows_nothing_of_its_image() -> None:
    view = View((ViewPart(0, (10, 10), (50, 50, 80, 80)),), fill=(9, 9, 9))
    assert (render_view(view, lambda _: np.zeros((10, 10, 3), np.uint8), (8, 8)) == 9).all()
    boxes, rows = boxes_in_view(view, {0: np.array([[1, 1, 5, 5]], np.float32)}, (8, 8))
    assert boxes.shape == (0, 4)
    assert rows.shape == (0, 2)


@pytest.mark.parametrize("aspect", [None, 1.0, 0.6])
@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_sampled_views_replay_and_survive_json(aspect: float | None, mosaic: float) -> None:
    dataset = make_dataset([(120, 160), (90, 30)], [[[10, 10, 60, 60], [80, 5, 155, 110]], []])
    for k in range(60):
        config = AugmentConfig(mosaic=mosaic)
        view = sample_view(k % 2, dataset, config, view_rng(3, k, "a"), aspect=aspect)
        assert view == sample_view(k % 2, dataset, config, view_rng(3, k, "a"), aspect=aspect)
        assert View.from_dict(json.loads(json.dumps(view.to_dict()))) == view
        for part in view.parts:
            x1, y1, x2, y2 = part.window_xyxy
            assert x2 > x1
            assert y2 > y1
            if aspect is not None and not mosaic:
                assert (x2 - x1) / (y2 - y1) == pytest.approx(aspect)


def test_damaged_view_is_an_artifact_error() -> None:
    good = plain_view((9, 9)).to_dict()
    for bad in ({}, {**good, "parts": [{}]}, {**good, "photometric": {"glow": 1}}):
        with pytest.raises(ArtifactError):
            View.from_dict(bad)


def test_rng_depends_on_each_argument_alone() -> None:
    first = view_rng(1, 2, "x").random(4)
    np.testing.assert_array_equal(first, view_rng(1, 2, "x").random(4))
    for other in (view_rng(2, 2, "x"), view_rng(1, 3, "x"), view_rng(1, 2, "y")):
        assert not np.array_equal(first, other.random(4))


def test_crops_keep_the_promises_of_the_ssd_sampler() -> None:
    box = [60, 40, 100, 90]
    dataset = make_dataset([(120, 160)], [[box]])
    config = AugmentConfig(photometric=0, zoom_out=0, iou_crop=1.0, min_crop=0.3, flip=0)
    cropped, ious = 0, []
    for k in range(300):
        (part,) = sample_view(0, dataset, config, view_rng(0, k, "a"), aspect=None).parts
        x1, y1, x2, y2 = part.window_xyxy
        assert 0 <= x1 < 80 < x2 <= 160  # inside the image, with the centre
        assert 0 <= y1 < 65 < y2 <= 120
        assert x2 - x1 >= 0.3 * 160 - 1
        assert y2 - y1 >= 0.3 * 120 - 1
        inter = (min(x2, 100) - max(x1, 60)) * (min(y2, 90) - max(y1, 40))
        ious.append(inter / ((x2 - x1) * (y2 - y1) + 40 * 50 - inter))
        cropped += part.window_xyxy != (0, 0, 160, 120)
    assert cropped > 240
    assert max(ious) > 0.55  # high minima are honoured where they can be
    difficult = make_dataset([(120, 160)], [[box]], difficult=True)
    windows = [
        sample_view(0, difficult, config, view_rng(0, k, "a"), aspect=None).parts[0].window_xyxy for k in range(50)
    ]
    assert any(not (w[0] < 80 < w[2] and w[1] < 65 < w[3]) for w in windows)  # difficult objects do not steer crops


@pytest.mark.parametrize(
    ("config", "check"),
    [
        (
            AugmentConfig(photometric=0, zoom_out=0, iou_crop=0, flip=0),
            lambda v: v.parts[0].window_xyxy == (0, 0, 160, 120),
        ),
        (AugmentConfig(photometric=0, zoom_out=0, iou_crop=0, flip=1), lambda v: v.parts[0].flip),
        (AugmentConfig(photometric=0, zoom_out=0, iou_crop=0, flip_vertical=1), lambda v: v.parts[0].flip_vertical),
        (AugmentConfig(photometric=0, zoom_out=0, iou_crop=0, flip=0), lambda v: v.photometric is None),
        (AugmentConfig(photometric=1), lambda v: v.photometric is not None and v.photometric.brightness != 0),
        (
            AugmentConfig(zoom_out=1, zoom_out_max=2, iou_crop=0, flip=0),
            lambda v: v.parts[0].window_xyxy[0] <= 0 and 160 <= v.parts[0].window_xyxy[2] <= 320,
        ),
    ],
)
def test_chances_of_zero_and_one_are_exact(config: AugmentConfig, check) -> None:  # type: ignore[no-untyped-def]
    dataset = make_dataset([(120, 160)], [[[10, 10, 60, 60]]])
    assert all(check(sample_view(0, dataset, config, view_rng(0, k, "a"), aspect=None)) for k in range(40))


@pytest.mark.parametrize(
    ("drawn", "pixel", "expected"),
    [
        (Photometric(brightness=20), (10, 240, 100), (30, 255, 120)),
        (Photometric(contrast=0.5), (10, 240, 101), (5, 120, 50)),
        (Photometric(brightness=10, contrast=2.0), (10, 20, 30), (40, 60, 80)),
        (Photometric(hue_degrees=120), (200, 0, 0), (0, 200, 0)),
        (Photometric(hue_degrees=-120), (200, 0, 0), (0, 0, 200)),
        (Photometric(saturation=0.5), (200, 0, 0), (200, 100, 100)),
        (Photometric(saturation=0.5, contrast=0.5, contrast_last=True), (200, 0, 0), (100, 50, 50)),
    ],
)
def test_photometric_arithmetic(
    drawn: Photometric, pixel: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    image = np.full((3, 4, 3), pixel, np.uint8)
    assert np.abs(distort(image, drawn)[1, 2].astype(int) - expected).max() <= 2
    assert image[0, 0].tolist() == list(pixel)


def test_photometric_chance() -> None:
    rng = np.random.default_rng(0)
    assert all(sample_photometric(rng, 0.0) is None for _ in range(20))
    drawn = [sample_photometric(rng, 0.5) for _ in range(400)]
    share = np.mean([d is not None and d.hue_degrees != 0 for d in drawn])
    assert 0.4 < share < 0.6


def test_teacher_and_student_sizes_show_the_same_window() -> None:
    rng = np.random.default_rng(1)
    image = cv2.GaussianBlur(rng.integers(0, 256, (120, 160, 3), np.uint8), (0, 0), 6)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    dataset = make_dataset([(120, 160)], [[[10, 10, 60, 60]]])
    for k in range(10):
        view = sample_view(0, dataset, AugmentConfig(), view_rng(0, k, "a"), aspect=1.0)
        small, large = (render_view(view, lambda _: image, (s, s)) for s in (96, 192))
        shrunk = cv2.resize(large, (96, 96), interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk.astype(int) - small).mean() < 6
