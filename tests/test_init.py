"""`edgekd init`: the recipe that it writes is right for the data set, the teachers and the machine."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from edgekd import first_recipe
from edgekd.cli import app
from edgekd.first_recipe import epochs_for, teacher_entries
from edgekd.machine import cpu_flags, emulates_bf16
from edgekd.recipe import CheckpointTeacher, OnnxTeacher
from edgekd.recipe_draft import RecipeDraft
from edgekd.recipe_file import load_recipe
from tests.data_layouts import make_coco, make_voc, make_yolo, picture
from tests.toy_onnx import write_constant_detector

BOX = (5, 5, 25, 25)


def init(*words: object) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, words)])


def written(path: Path) -> dict[str, Any]:
    """The recipe's text as YAML, after `edgekd run`'s own check of it."""
    load_recipe(path, needs=("data", "student", "teacher-files"))
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def voc(root: Path, objects: Sequence[tuple[str, tuple[float, float, float, float]]] = (("cat", BOX),)) -> Path:
    images = {f"{split}-{i}": objects for split in ("train", "val") for i in range(9 if split == "train" else 2)}
    parts = {split: {stem: o for stem, o in images.items() if stem.startswith(split)} for split in ("train", "val")}
    return make_voc(root, parts)


def coco(root: Path) -> Path:
    both = {"train2017": {"a": [("cat", BOX)], "b": [("dog", BOX)]}, "val2017": {"c": [("cat", BOX)]}}
    return make_coco(root, both, {"cat": 1, "dog": 7})


def yolo(root: Path) -> Path:
    return make_yolo(root, {"train": {"a": ["0 0.5 0.5 0.4 0.4"]}, "valid": {"b": ["0 0.5 0.5 0.4 0.4"]}}, ["cat"])


def detector(path: Path, names: str = "{0: 'cat', 1: 'bird'}") -> Path:
    """Finds nothing, in the form of Ultralytics' exports with NMS inside."""
    answers = {"output0": np.zeros((1, 300, 6), np.float32)}
    return write_constant_detector(path, answers, (1, 3, 64, 64), {"names": names, "task": "detect"})


@pytest.mark.parametrize("make", [voc, coco, yolo], ids=["voc", "coco", "yolo"])
@pytest.mark.parametrize("teachers", [False, True], ids=["alone", "taught"])
def test_what_it_writes_is_a_recipe(tmp_path: Path, checkpoint: Path, make: Any, teachers: bool) -> None:
    root, out = make(tmp_path / "data" / "my set"), tmp_path / "recipes" / "mine.yaml"
    given = ["--teacher", checkpoint, "-t", detector(tmp_path / "big one.onnx")] if teachers else []
    result = init(root, "--out", out, "--device", "cpu", *given)
    assert result.exit_code == 0, result.output
    values = written(out)
    assert values["name"] == "my-set"
    assert values["data"]["root"] == "../data/my set"
    assert set(values["data"]) == {"root"}  # train2017 and valid are found without being named
    assert values["export"] == {"precisions": ["fp32", "int8"]}
    assert values["train"]["batch_size"] == 2
    assert f"edgekd run {out} --out runs/my-set --device cpu" in result.output
    if teachers:
        assert [entry["name"] for entry in values["teachers"]] == [checkpoint.parent.name, "big-one"]
        assert values["teachers"][1]["onnx"] == "../big one.onnx"
    else:
        assert [list(entry) for entry in values["teachers"]] == [["name", "train"]] * 2


def test_the_whole_setup_of_a_run_takes_it(tmp_path: Path) -> None:
    from edgekd.teaching import check_terms
    from edgekd.workspace import open_workspace

    out = tmp_path / "mine.yaml"
    assert init(voc(tmp_path / "set"), "--out", out, "--device", "cpu", "--input-size", 96).exit_code == 0
    assert written(out)["teachers"][0]["train"]["input_size"] == 96
    with open_workspace(load_recipe(out), tmp_path / "run", device="cpu", quiet=True) as work:
        check_terms(work)  # all but the weights, which would have to be downloaded


@pytest.mark.parametrize(
    ("boxes", "options"),
    [
        pytest.param([(x, y, x + 2, y + 2) for x in (3, 20, 40) for y in (3, 13, 21, 30)],
                     {"finest_stride": 8, "priors": "fitted"}, id="small"),
        pytest.param([(5, 5, 45, 35)] * 12, None, id="large"),
        pytest.param([(2, 17, 58, 20)] * 12, {"priors": "fitted"}, id="large and narrow"),
    ],
)  # fmt: skip
def test_small_objects_get_the_finer_level_and_large_ones_do_not(
    tmp_path: Path, boxes: list[tuple[float, float, float, float]], options: dict[str, Any] | None
) -> None:
    root, out = voc(tmp_path / "set", [("cat", box) for box in boxes]), tmp_path / "mine.yaml"
    assert init(root, "--out", out).exit_code == 0
    assert written(out)["student"].get("options") == options
    if options:
        assert "overlap no" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("images", "batch_size", "on_gpu", "epochs"),
    [
        (2000, 16, True, 64),
        (200, 16, True, 120),
        (118_000, 16, True, 20),
        (1000, 16, False, 24),
        (20, 5, False, 120),
        (50_000, 16, False, 4),
    ],
)
def test_epochs(images: int, batch_size: int, on_gpu: bool, epochs: int) -> None:
    assert epochs_for(images, batch_size, on_gpu) == epochs


@pytest.mark.parametrize("flags", [frozenset({"avx2"}), frozenset({"avx2", "amx_bf16"})], ids=["old", "amx"])
def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: frozenset[str]) -> None:
    monkeypatch.setattr(first_recipe, "cpu_flags", lambda: flags)
    out = tmp_path / "mine.yaml"
    assert init(voc(tmp_path / "set"), "--out", out, "--device", "cpu").exit_code == 0
    assert written(out)["train"].get("precision") == ("bf16" if "amx_bf16" in flags else None)
    assert written(out)["train"]["freeze_stride"] == 4


@pytest.mark.parametrize(
    ("text", "flags", "emulated"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\nflags\t\t: other\n", {"fpu", "avx2", "avx512_bf16"}, False),
        ("flags\t\t: fpu avx2\n", {"fpu", "avx2"}, True),
        ("Features\t: fp asimd i8mm\n", {"fp", "asimd", "i8mm"}, True),
        ("Features\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}, False),
        ("", set(), False),
    ],
)
def test_flags_of_the_processor(tmp_path: Path, text: str, flags: set[str], emulated: bool) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text, encoding="utf-8")
    assert cpu_flags(tmp_path) == flags
    assert emulates_bf16(tmp_path) == emulated


def test_on_a_gpu_nothing_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.training.setup.uses_gpu", lambda device: True)
    out = tmp_path / "mine.yaml"
    assert init(voc(tmp_path / "set"), "--out", out).exit_code == 0
    assert written(out)["train"] == {"epochs": 120, "batch_size": 2}


def test_a_student_without_published_weights_is_neither_filled_nor_frozen(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    assert init(voc(tmp_path / "set"), "--out", out, "--student", "yolo-nano", "--input-size", 224).exit_code == 0
    assert written(out)["student"] == {"model": "yolo-nano", "input_size": 224}
    assert "freeze_stride" not in written(out)["train"]


def test_a_teacher_says_what_was_guessed_and_what_it_knows(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    result = init(coco(tmp_path / "set"), "--out", out, "-t", detector(tmp_path / "big.onnx"), "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert any("letterbox" in note for note in told["notes"])
    assert any("agrees with hardly any label" in warning for warning in told["warnings"])
    assert any("no teacher knows dog" in warning for warning in told["warnings"])
    assert told["values"] == written(out)
    assert "knows 1 of the 2 classes; AP50 0.0 on 1 training images" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: detector(folder / "t.onnx", "{0: 'ship', 1: 'plane'}"), "none of the teacher's classes"),
        (lambda folder: write_constant_detector(folder / "t.onnx", {"x": np.zeros((1, 10), np.float32)}), "t.onnx"),
        (lambda folder: folder / "absent.onnx", "no such file or folder"),
        (lambda folder: folder, "no detector in this folder"),
        (lambda folder: folder / "set" / "Annotations" / "train-0.xml", "is no teacher"),
    ],
)
def test_a_teacher_that_cannot_teach_is_told_now(tmp_path: Path, make: Any, message: str) -> None:
    root, out = voc(tmp_path / "set"), tmp_path / "mine.yaml"
    result = init(root, "--out", out, "-t", make(tmp_path))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not out.exists()


def test_what_a_file_does_not_say_can_be_declared(tmp_path: Path) -> None:
    root, out = voc(tmp_path / "set"), tmp_path / "mine.yaml"
    arrays = {
        "boxes": np.array([[8, 8, 40, 40]], np.float32),
        "scores": np.ones(1, np.float32),
        "labels": np.ones(1, np.int64),
    }
    file = write_constant_detector(tmp_path / "t.onnx", arrays, (1, 3, 64, 64))
    refused = init(root, "--out", out, "-t", file)
    assert refused.exit_code == 2
    assert "declare `class_names`" in refused.stderr
    declared = ("--classes", "dog,cat", "--declare", "background=none", "--declare", "mean=[0.5,0.5,0.5]")
    result = init(root, "--out", out, "-t", file, *declared)
    assert result.exit_code == 0, result.output
    (entry,) = written(out)["teachers"]
    assert entry["class_names"] == ["dog", "cat"]
    assert (entry["background"], entry["mean"]) == ("none", [0.5, 0.5, 0.5])
    assert init(root, "--out", out, "--force", *declared).exit_code == 2


def test_names_of_teachers(tmp_path: Path) -> None:
    run = tmp_path / "Ours"
    run.mkdir()
    for file in (run / "model.pt", tmp_path / "ours.onnx", tmp_path / "student.onnx", tmp_path / "-Größe.pt"):
        file.touch()
    found = teacher_entries(
        [run / "model.pt", tmp_path / "ours.onnx", tmp_path / "student.onnx", tmp_path / "-Größe.pt"]
    )
    assert [entry.name for entry in found] == ["Ours", "ours-2", "student-2", "Gr-e"]
    assert [type(entry) for entry in found] == [CheckpointTeacher, OnnxTeacher, OnnxTeacher, CheckpointTeacher]
    (tmp_path / "link.onnx").symlink_to(tmp_path / "ours.onnx")
    assert init(voc(tmp_path / "set"), "-t", tmp_path / "ours.onnx", "-t", tmp_path / "link.onnx").exit_code == 2


def test_a_set_without_splits_is_told_how_to_get_them(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "set", {"all": {"a": [("cat", BOX)]}}, {"cat": 1})
    result = init(root, "--out", tmp_path / "mine.yaml")
    assert result.exit_code == 2
    assert f"`edgekd data split {root} --val 0.2` draws them" in result.stderr
    lone = make_yolo(tmp_path / "lone", {"train": {"a": ["0 0.5 0.5 0.4 0.4"]}}, ["cat"])
    result = init(lone, "--out", tmp_path / "mine.yaml")
    assert result.exit_code == 2
    advice = re.search("`edgekd (data split .*)`", result.stderr)
    assert advice is not None
    for stem in "bc":
        picture(lone / "images" / "train" / f"{stem}.png")
        (lone / "labels" / "train" / f"{stem}.txt").write_text("0 0.5 0.5 0.4 0.4")
    assert CliRunner().invoke(app, shlex.split(advice[1])).exit_code == 0
    assert init(tmp_path / "lone-split", "--out", tmp_path / "mine.yaml").exit_code == 0


def test_splits_of_other_names(tmp_path: Path) -> None:
    one = {"trainval": {"a": [("cat", BOX)], "b": [("cat", BOX)]}, "test": {"c": [("cat", BOX)]}}
    out = tmp_path / "mine.yaml"
    assert init(make_voc(tmp_path / "set", one), "--out", out).exit_code == 0
    assert written(out)["data"] == {"root": "set", "train": "trainval", "val": "test"}
    other = make_voc(tmp_path / "other", {"day": one["trainval"], "night": one["test"]})
    refused = init(other, "--out", out, "--force")
    assert refused.exit_code == 2
    assert "--train NAME --val NAME" in refused.stderr
    assert init(other, "--out", out, "--force", "--train", "day", "--val", "night").exit_code == 0
    assert written(out)["data"] == {"root": "other", "train": "day", "val": "night"}
    assert init(other, "--out", out, "--force", "--train", "dusk", "--val", "night").exit_code == 2


def test_what_would_train_wrongly_is_refused(tmp_path: Path) -> None:
    root = voc(tmp_path / "set")
    (root / "JPEGImages" / "train-0.png").unlink()
    result = init(root, "--out", tmp_path / "mine.yaml")
    assert result.exit_code == 2
    assert "train-0" in result.stderr
    empty = make_voc(tmp_path / "empty", {"train": {"a": []}, "val": {"b": [("cat", BOX)]}})
    assert "no object to train on" in init(empty, "--out", tmp_path / "mine.yaml").stderr
    assert not (tmp_path / "mine.yaml").exists()


def test_a_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    root, out = voc(tmp_path / "set"), tmp_path / "mine.yaml"
    out.write_text("mine", encoding="utf-8")
    result = init(root, "--out", out)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert out.read_text(encoding="utf-8") == "mine"
    assert init(root, "--out", out, "--force").exit_code == 0
    assert written(out)["name"] == "set"


@pytest.mark.parametrize("name", ["imagenet", "~here", "a: b # c", "08", "1e3"])
def test_folders_of_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = voc(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert init(name, "--out", "mine.yaml").exit_code == 0
    assert load_recipe(Path("mine.yaml"), needs=("data",)).data.root == str(root)


def test_a_reason_stays_on_its_line() -> None:
    draft = RecipeDraft({"name": "a"})
    draft.put("data", "root", "x # y", "two\nlines")
    assert draft.text == "name: a\ndata:\n  root: 'x # y' # two lines\n"
