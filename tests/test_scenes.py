"""Generated scenes: the same everywhere, true to their boxes, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from edgekd.data import read_dataset, scenes
from edgekd.data._paint import Draws, binomial_blur, smooth_field
from edgekd.data._scene import render_scene
from edgekd.data._shapes import COS, FULL, SIN, SUB, TURN, UNIT, bounds, coverage, outline, place
from edgekd.data.scenes import DATABASE, SCENE_CLASSES, make_scenes
from edgekd.errors import DataError

COUNTS = {"train": 3, "val": 2}


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
    return [render_scene(0, "train", index, (240, 320)) for index in range(60)]


@pytest.mark.parametrize(
    ("seed", "split", "index", "image_hw", "digest"),
    [
        (0, "train", 0, (240, 320), "b062746ac71c9223987c088aa4f739b1"),
        (0, "val", 7, (240, 320), "d18ee900e95389f63c5033afc6a73970"),
        (12345, "test", 3, (200, 150), "8f1d21bd124182ea2443a2569b52f1e5"),
    ],
)
def test_pixels_and_boxes_are_pinned(seed: int, split: str, index: int, image_hw: tuple[int, int], digest: str) -> None:
    """If this fails on some machine, the data set is not the one that published figures speak of."""
    scene = render_scene(seed, split, index, image_hw)
    text = ";".join(f"{o.label},{o.box_xyxy},{o.visible},{o.truncated}" for o in scene.objects)
    assert hashlib.sha256(scene.image.tobytes() + text.encode()).hexdigest()[:32] == digest


def test_scenes_vary_by_each_argument() -> None:
    arguments = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1)]
    images = [render_scene(*entry, (96, 128)).image.tobytes() for entry in arguments]
    assert len(set(images)) == 4


def test_boxes_are_tight_around_what_is_visible(many: list[scenes.Scene]) -> None:
    for scene in many:
        assert scene.image.shape == (240, 320, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= len(scene.objects) <= 10
        for number, item in enumerate(scene.objects):
            ys, xs = np.nonzero(scene.owners == number)
            assert item.box_xyxy == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert 30 <= item.visible <= 100
            if item.visible == 100:
                assert not item.truncated


def test_the_problem_has_what_it_promises(many: list[scenes.Scene]) -> None:
    objects = [item for scene in many for item in scene.objects]
    sides = np.array([max(o.box_xyxy[2] - o.box_xyxy[0], o.box_xyxy[3] - o.box_xyxy[1]) for o in objects]) / 240
    assert {o.label for o in objects} == set(range(len(SCENE_CLASSES)))
    assert sides.min() < 0.08
    assert 0.4 < sides.max() <= 0.62
    assert 0.2 < np.mean(sides < 0.15) < 0.7
    assert any(o.truncated for o in objects)
    assert any(o.visible < 90 and not o.truncated for o in objects)  # occlusion
    assert len({len(scene.objects) for scene in many}) >= 6
    assert np.mean([scene.image.std() for scene in many]) > 25


def test_colour_does_not_tell_the_class(many: list[scenes.Scene]) -> None:
    means: dict[int, list[np.ndarray]] = {}
    for scene in many:
        for number, item in enumerate(scene.objects):
            means.setdefault(item.label, []).append(scene.image[scene.owners == number].mean(0))
    spread = np.mean([np.std(values, axis=0).mean() for values in means.values()])
    between = np.std([np.mean(values, axis=0) for values in means.values()], axis=0).mean()
    assert between < spread / 2


def test_table_of_cosines() -> None:
    angle = 2 * np.pi * np.arange(TURN) / TURN
    np.testing.assert_array_equal(COS, np.rint(UNIT * np.cos(angle)))
    np.testing.assert_array_equal(SIN, np.rint(UNIT * np.sin(angle)))


@pytest.mark.parametrize("name", SCENE_CLASSES)
@pytest.mark.parametrize("detail", [0, 255])
def test_coverage_against_sampling(name: str, detail: int) -> None:
    """Against OpenCV's point-in-polygon on an 8 x 8 grid a pixel; our sub-rows are four, hence the slack."""
    contours = place(
        outline(name, detail), centre=(33 * SUB + 11, 29 * SUB + 50), radius=21 * SUB, stretch_256=200, lean=31, turn=17
    )
    window = bounds(contours)
    got = coverage(contours, window) / FULL
    grid = np.zeros((*got.shape, 64))
    for k in range(64):
        ox, oy = (k % 8 + 0.5) / 8, (k // 8 + 0.5) / 8
        for y in range(got.shape[0]):
            for x in range(got.shape[1]):
                point = (window[0] + x + ox, window[1] + y + oy)
                hits = [cv2.pointPolygonTest((c / SUB).astype(np.float32), point, False) >= 0 for c in contours]
                grid[y, x, k] = sum(hits) % 2
    assert np.abs(got - grid.mean(-1)).max() < 0.2
    assert np.abs(got - grid.mean(-1)).mean() < 0.01


def test_coverage_of_a_rectangle_is_exact() -> None:
    x1, y1, x2, y2 = 2 * SUB + 16, 3 * SUB, 7 * SUB + 48, 6 * SUB + 32
    corners = [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.int64)]
    got = coverage(corners, (0, 0, 9, 8)) / FULL
    expected = np.outer([0, 0, 0, 1, 1, 1, 0.5, 0], [0, 0, 0.75, 1, 1, 1, 1, 0.75, 0])
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
        coverage(corners, (4, 4, 12, 9)) / FULL, np.pad(expected, ((0, 1), (0, 3)))[4:9, 4:12]
    )


def test_fields_and_blur() -> None:
    grid = Draws(1).levels(-90, 200, 3, 4, 3)
    field = smooth_field(grid, (60, 90))
    assert field.shape == (60, 90, 3)
    np.testing.assert_array_equal(field[0, 0], grid[0, 0])
    np.testing.assert_array_equal(field[30, 60], grid[1, 2])
    assert field.min() >= grid.min()
    assert field.max() <= grid.max()
    image = Draws(2).levels(0, 255, 20, 30, 3)
    blurred = binomial_blur(image, 1)
    kernel = np.array([1, 2, 1]) / 4
    expected = cv2.sepFilter2D(image.astype(np.float64), -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    assert np.abs(blurred - expected).max() <= 1
    np.testing.assert_array_equal(image, Draws(2).levels(0, 255, 20, 30, 3))


def test_draws_stay_in_range() -> None:
    draws = Draws(3, 4)
    values = [draws.integer(-2, 3) for _ in range(300)]
    assert set(values) == set(range(-2, 4))
    assert set(np.unique(draws.levels(-3, 2, 1000))) == set(range(-3, 3))
    assert draws.bytes(3, 5).shape == (3, 5)
    assert not draws.percent(0)
    assert draws.percent(100)


def test_written_set_reads_back(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = make_scenes(tmp_path / "set", counts=COUNTS, seed=4, image_hw=(96, 128), progress=lambda *a: seen.append(a))
    assert out == tmp_path / "set"
    assert seen == [(k + 1, 5) for k in range(5)]
    for split, count in COUNTS.items():
        dataset = read_dataset(out, split)
        assert dataset.format == "voc"
        assert dataset.class_names == SCENE_CLASSES
        assert len(dataset) == count
        for index, record in enumerate(dataset.records):
            scene = render_scene(4, split, index, (96, 128))
            assert record.image_hw == (96, 128)
            np.testing.assert_array_equal(record.boxes_xyxy, [o.box_xyxy for o in scene.objects])
            assert record.labels.tolist() == [o.label for o in scene.objects]
            assert record.difficult.tolist() == [o.difficult for o in scene.objects]
            picture = cv2.cvtColor(cv2.imread(str(record.path)), cv2.COLOR_BGR2RGB)
            np.testing.assert_array_equal(picture, scene.image)
    for path in (out / "Annotations").iterdir():
        assert ElementTree.parse(path).findtext("source/database") == DATABASE
    assert "synthetic" in (out / "README.txt").read_text()
    assert (out.stat().st_mode & 0o777) == (out / "Annotations").stat().st_mode & 0o777
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_making_again_does_nothing_and_never_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_scenes(tmp_path / "set", counts=COUNTS, image_hw=(64, 64))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "render_scene", lambda *_: pytest.fail("rendered again"))
        make_scenes(out, counts=dict(reversed(COUNTS.items())), image_hw=(64, 64))
        for change in ({"seed": 1}, {"counts": {"train": 3, "val": 3}}, {"image_hw": (64, 65)}):
            with pytest.raises(DataError, match="other generated scenes"):
                make_scenes(out, **{"counts": COUNTS, "image_hw": (64, 64), **change})  # type: ignore[arg-type]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "JPEGImages/train_00001.png").unlink()
    with pytest.raises(DataError, match="missing or have been changed"):
        make_scenes(out, counts=COUNTS, image_hw=(64, 64))


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("mine", "file"):
        with pytest.raises(DataError, match="something else"):
            make_scenes(tmp_path / name, counts=COUNTS)
    (tmp_path / "empty").mkdir()
    assert (make_scenes(tmp_path / "empty", counts={"a": 1}, image_hw=(64, 64)) / "manifest.json").is_file()
    assert (tmp_path / "mine/photo.jpg").read_text() == "precious"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "set", counts=COUNTS, image_hw=(64, 64), progress=stop)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"counts": {}},
        {"counts": {"train": 0}},
        {"counts": {"../up": 1}},
        {"seed": -1},
        {"image_hw": (10, 320)},
        {"image_hw": (240, 99999)},
    ],
)
def test_bad_arguments(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(DataError):
        make_scenes(tmp_path / "set", **{"counts": COUNTS, **settings})  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("given", [None, "3"])
def test_processes_that_draw_have_one_blas_thread_each(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, seen = "OPENBLAS_NUM_THREADS", []

    class Pool(contextlib.nullcontext[None]):
        def __init__(self, *_: object) -> None:
            super().__init__()

        def __enter__(self) -> Pool:  # type: ignore[override]
            return self

        def map(self, call: Callable[..., None], jobs: list[object], chunksize: int) -> Iterator[None]:
            seen.append(os.environ.get(name))  # processes start here
            return map(call, jobs)

    monkeypatch.setattr(scenes, "ProcessPoolExecutor", Pool)
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    make_scenes(tmp_path / "set", counts=COUNTS, processes=2)
    assert seen == [given or "1"]
    assert os.environ.get(name) == given
