"""Teachers annotating a folder of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from edgekd.cli import app
from edgekd.data import list_splits, read_dataset
from edgekd.data.check import check_dataset
from edgekd.errors import RuntimeFailure
from edgekd.workspace import doubts_about
from tests.data_layouts import picture
from tests.onnx_zoo import EXPORTS, write
from tests.toy_onnx import write_constant_detector


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "my photos ü"
    for index in range(6):
        picture(root / ("deep" if index % 2 else "") / f"{index}.png", seed=index)
    return root


def label(tmp_path: Path, photos: Path, checkpoint: Path, *words: object, classes: str = "[dog, cat]") -> Result:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f'name: r\ndata: {{root: "{photos}", classes: {classes}}}\nstudent: {{model: yolo-nano}}\n'
        f"teachers: [{{name: a, checkpoint: {checkpoint}}}, {{name: b, checkpoint: {checkpoint}}}]\n",
        encoding="utf-8",
    )
    return CliRunner().invoke(app, ["data", "label", str(recipe), "--quiet", *map(str, words)])


def test_images_become_a_data_set(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    from edgekd.data.images import load_image
    from edgekd.predictor import load_predictor

    result = label(tmp_path, photos, checkpoint, "--score", 0.1)
    assert (result.exit_code, result.output) == (0, "")
    dataset = read_dataset(photos, "all", class_names=("dog", "cat"))
    assert len(dataset) == 6
    assert check_dataset(photos).ok
    with load_predictor(checkpoint, score_threshold=0.1) as predictor:
        for record in dataset.records:
            found = predictor.detect(load_image(record.path))
            names = {predictor.class_names[label] for label in found.labels}
            assert {dataset.class_names[label] for label in record.labels} <= names
            assert len(record.labels) > 0
    written = json.loads((photos / "instances_all.json").read_text())
    assert min(entry["score"] for entry in written["annotations"]) >= 0.1
    assert set(written["info"]["teachers"]) == {"a", "b"}
    split = CliRunner().invoke(app, ["data", "split", str(photos), "--val", "0.3", "--quiet"])
    assert (split.exit_code, split.output) == (0, "")
    assert set(list_splits(photos)) == {"all", "train", "val"}
    train, val = (read_dataset(photos, name) for name in ("train", "val"))
    assert any("how far a detector agrees with them" in doubt for doubt in doubts_about(train, val))


def test_a_folder_and_its_teachers_need_no_recipe(
    tmp_path: Path, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Result:
        return CliRunner().invoke(app, list(map(str, words)))

    told = run("init", photos.name, "--teacher", checkpoint)
    assert told.exit_code == 2
    assert f"edgekd data label '{photos.name}' --teacher FILE --classes NAMES" in told.stderr
    assert "no teacher is given" in run("data", "label", photos.name, "--classes", "dog").stderr
    assert "the classes are missing" in run("data", "label", photos.name, "--teacher", checkpoint).stderr
    done = run("data", "label", photos.name, "-t", checkpoint, "--classes", "dog, eel", "--score", 0.1)
    assert done.exit_code == 0
    assert "no teacher knows eel" in done.stderr
    assert f"next: edgekd data split '{photos.name}' --val 0.2" in done.stdout
    assert run("data", "split", photos.name, "--val", 0.3).exit_code == 0
    dataset = read_dataset(photos, "val")
    assert dataset.class_names == ("dog", "eel")
    assert dataset.by_teachers


def test_what_a_file_leaves_open_stands_in_a_recipe(tmp_path: Path, photos: Path) -> None:
    """--classes says here what to find, so it cannot be the names that an ONNX file lacks."""
    file = write(EXPORTS["YOLOX"], tmp_path / "m.onnx")
    told = CliRunner().invoke(app, ["data", "label", str(photos), "--teacher", str(file), "--classes", "cat,dog,cow"])
    assert told.exit_code == 2
    assert "no class names in the file" in told.stderr
    assert "from a recipe in place of the folder" in told.stderr
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f'name: label\ndata: {{root: "{photos}", classes: [cat]}}\nstudent: {{model: mobilenetv2-ssd-lite}}\n'
        f"teachers: [{{name: one, onnx: {file}, class_names: [cat, dog, cow]}}]\n",
        encoding="utf-8",
    )
    assert CliRunner().invoke(app, ["data", "label", str(recipe)]).exit_code == 0


def test_the_score_is_a_bound(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    assert label(tmp_path, photos, checkpoint, "--score", 0.1, "--json").exit_code == 0
    entries = json.loads((photos / "instances_all.json").read_text())["annotations"]
    bound = float(np.median([entry["score"] for entry in entries]))
    (photos / "instances_all.json").unlink()
    assert label(tmp_path, photos, checkpoint, "--score", bound).exit_code == 0
    fewer = json.loads((photos / "instances_all.json").read_text())["annotations"]
    assert 0 < len(fewer) < len(entries)


def test_what_nobody_knows_and_what_was_taken_for_granted_are_said(tmp_path: Path, photos: Path) -> None:
    boxes = np.array([[[4, 4, 40, 40], [50, 20, 60, 30]]], np.float32)
    arrays = {"boxes": boxes, "scores": np.array([[0.9, 0.6]], np.float32), "labels": np.array([[0, 1]])}
    foreign = write_constant_detector(tmp_path / "t.onnx", arrays, metadata={"names": "['cat', 'dog']"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f'name: r\ndata: {{root: "{photos}", classes: [dog, cow]}}\nstudent: {{model: yolo-nano}}\n'
        f"teachers: [{{name: t, onnx: {foreign}}}, {{name: u, onnx: {foreign}}}]\nensemble: {{weights: learned}}\n",
        encoding="utf-8",
    )
    result = CliRunner().invoke(app, ["data", "label", str(recipe), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["objects"] == {"dog": 6, "cow": 0}
    assert report["unknown"] == ["cow"]
    assert any(note.startswith("teacher t: pixels scaled to") for note in report["notes"])
    assert "no teacher knows cow" in result.stderr
    assert "learned needs labels" in result.stderr
    assert "teacher t: labels counted from 0" in result.stderr


def test_a_recipe_lets_teachers_find_more_than_a_hundred_objects(tmp_path: Path, photos: Path) -> None:
    boxes = np.array(
        [[[8 * (i % 12), 5 * (i // 12), 8 * (i % 12) + 6, 5 * (i // 12) + 4] for i in range(120)]], np.float32
    )
    arrays = {"boxes": boxes, "scores": np.full((1, 120), 0.9, np.float32), "labels": np.zeros((1, 120), np.int64)}
    foreign = write_constant_detector(tmp_path / "t.onnx", arrays, metadata={"names": "['cat']"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f'name: r\ndata: {{root: "{photos}", classes: [cat]}}\nstudent: {{model: yolo-nano}}\n'
        f"teachers: [{{name: t, onnx: {foreign}}}]\nbench: {{max_detections: 110}}\n",
        encoding="utf-8",
    )
    result = CliRunner().invoke(app, ["data", "label", str(recipe), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["objects"] == {"cat": 6 * 110}


def test_annotations_that_are_there_stay(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    assert label(tmp_path, photos, checkpoint, "--score", 0.1).exit_code == 0
    before = (photos / "instances_all.json").read_bytes()
    again = label(tmp_path, photos, checkpoint, "--score", 0.2)
    assert again.exit_code == 2
    assert "has annotations already" in again.stderr
    assert (photos / "instances_all.json").read_bytes() == before


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    (photos / "0.png").write_bytes(b"")
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    cut = photos / "2.png"
    cut.write_bytes(cut.read_bytes()[:900])
    result = label(tmp_path, photos, checkpoint, "--score", 0.1, "--json")
    body = json.loads(result.stdout)
    assert body["images"] == 4
    assert {Path(path).name for path in body["failures"]} == {"0.png", "2.png", "phone.heic"}
    assert "0.png" in result.stderr
    assert len(read_dataset(photos, "all")) == 4


@pytest.mark.parametrize(
    ("words", "classes", "message"),
    [
        ((), "null", "the classes are missing"),
        (("--classes", "dog"), "[dog, cat]", "--classes does nothing here"),
        (("--score", 1), "[dog, cat]", "no teacher finds anything"),
        ((), "[eel]", "eel"),
        ((), "[dog, dog]", "class names repeat"),
        ((), "[dog, ' ']", "class names that are no text"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_written(
    tmp_path: Path, photos: Path, checkpoint: Path, words: tuple[object, ...], classes: str, message: str
) -> None:
    result = label(tmp_path, photos, checkpoint, *words, classes=classes)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (photos / "instances_all.json").exists()


def test_a_folder_without_images(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = label(tmp_path, tmp_path / "empty", checkpoint)
    assert result.exit_code == 2
    assert "expected: a folder with images in it" in result.stderr


def test_a_folder_that_is_read_only_is_told_before_any_image_is_looked_at(
    tmp_path: Path, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(*_: object) -> None:
        raise AssertionError("a teacher has been asked")

    monkeypatch.setattr("edgekd.teachers.ensemble.Ensemble.detect", looked)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != photos)
    result = label(tmp_path, photos, checkpoint)
    assert result.exit_code == 2
    assert f"{photos / 'instances_all.json'} cannot be written" in result.stderr


def test_a_teacher_that_breaks_is_told_with_the_image(
    tmp_path: Path, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeFailure("a detector gave boxes or scores that are not finite", got="2 box values")

    monkeypatch.setattr("edgekd.teachers.ensemble.Ensemble.detect", broken)
    result = label(tmp_path, photos, checkpoint)
    assert result.exit_code == 2
    assert "cannot label 0.png: a detector gave boxes" in result.stderr
    assert not (photos / "instances_all.json").exists()
