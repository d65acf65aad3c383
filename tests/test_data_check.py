"""Broken data sets: every one gives a problem with a name and a place, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.data import read_dataset
from edgekd.data.check import check_dataset, write_contact_sheet
from edgekd.data.problems import RULES
from edgekd.errors import DataError
from edgekd.workspace import doubts_about
from tests.broken_data import BROKEN, DOG, MAKERS, boxes, coco, edit, of_16_bits, turned, voc, yolo
from tests.data_layouts import make_voc, make_yolo, picture, voc_xml


@pytest.mark.parametrize("form", MAKERS)
def test_sound_data_is_ok(tmp_path: Path, form: str) -> None:
    report = check_dataset(MAKERS[form](tmp_path))
    assert report.problems == ()
    assert report.ok
    train = report.splits[0]
    assert (train.name, train.images, train.objects, dict(train.per_class)) == ("train", 2, 2, {"dog": 2})
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.text().endswith("ok")


@pytest.mark.parametrize("name", BROKEN)
def test_every_break_is_named(tmp_path: Path, name: str) -> None:
    form, spoil, kind, where = BROKEN[name]
    root = MAKERS[form](tmp_path)
    spoil(root)
    report = check_dataset(root)
    found = [problem for problem in report.problems if problem.kind == kind]
    assert found, report.text()
    assert any(where in str(problem) for problem in found), [str(problem) for problem in found]
    assert report.ok == all(RULES[problem.kind].severity == "warning" for problem in report.problems)
    if RULES[kind].severity == "error":
        assert not report.ok
    json.dumps(report.to_dict(), allow_nan=False)
    report.text().encode("utf-8")
    if RULES[kind].stops:
        with pytest.raises(DataError):
            read_dataset(root, "train")
    else:
        dataset = read_dataset(root, "train")
        for record in dataset.records:
            h, w = record.image_hw
            assert np.isfinite(record.boxes_xyxy).all()
            assert (record.boxes_xyxy[:, :2] < record.boxes_xyxy[:, 2:]).all()
            assert (record.boxes_xyxy >= 0).all()
            assert (record.boxes_xyxy <= (w, h, w, h)).all()


@pytest.mark.parametrize("name", [name for name in BROKEN if RULES[BROKEN[name].kind].treatment.endswith("refused")])
def test_refused_boxes_leave_the_others(tmp_path: Path, name: str) -> None:
    form, spoil, *_ = BROKEN[name]
    root = MAKERS[form](tmp_path)
    spoil(root)
    counts = [len(record.labels) for record in read_dataset(root, "train").records]
    assert sum(counts) in (1, 2)  # whatever else stood beside the refused one


def test_reading_says_what_it_leaves_out_and_is_silent_otherwise(tmp_path: Path, caplog) -> None:
    root = voc(tmp_path)
    (root / "Annotations" / "a.xml").write_text(voc_xml([("dog", (5, 5, 5, 5)), *DOG]))
    read_dataset(root, "train")
    assert caplog.text == ""
    (root / "Annotations" / "a.xml").write_text(voc_xml([("dog", (30, 3, 2, 20)), *DOG]))
    read_dataset(root, "train")
    assert "1 inverted-box" in caplog.text


@pytest.mark.parametrize("content", ["", "{", '{"images": [], "annotations": []}'])
def test_a_file_that_cannot_be_read_is_not_told_as_one_without_classes(tmp_path: Path, content: str) -> None:
    root = MAKERS["coco"](tmp_path)
    (root / "annotations" / "instances_train.json").write_text(content)
    kinds = [problem.kind for problem in check_dataset(root).problems]
    assert "bad-annotation" in kinds
    assert "bad-layout" not in kinds


def test_pictures_that_exif_turns_are_sound_where_their_size_is_stated(tmp_path: Path) -> None:
    turned(coco(tmp_path) / "train" / "a.png")
    assert check_dataset(tmp_path).problems == ()


@pytest.mark.parametrize("form", MAKERS)
def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path, form: str) -> None:
    MAKERS[form](tmp_path)
    name = {"voc": "Annotations/a.xml", "coco": "annotations/instances_train.json", "yolo": "labels/train/a.txt"}[form]
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    report = check_dataset(tmp_path)
    assert not report.ok
    assert "a git-lfs pointer, not the file itself" in report.text()


def test_class_names_are_not_read_from_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    MAKERS["yolo"](tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=r"classes.txt is a git-lfs pointer"):
        read_dataset(tmp_path, "train")


def test_categories_that_contradict_are_told_once(tmp_path: Path) -> None:
    root = MAKERS["coco"](tmp_path)
    path = root / "annotations" / "instances_train.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "categories": [{"id": 5, "name": "cat"}]}))
    assert [problem.kind for problem in check_dataset(root).problems].count("bad-layout") == 1


def test_every_rule_has_a_case() -> None:
    covered = {case.kind for case in BROKEN.values()}
    assert covered | {"leak", "absent-class"} == set(RULES)


def test_reading_refuses_what_it_cannot_pass_over_with_all_places(tmp_path: Path) -> None:
    root = make_yolo(tmp_path, {"train": {"a": ["9 0.5 0.5 1 1", "x"], "b": ["1 2"]}}, ["dog"])
    with pytest.raises(DataError, match=r"3 problems(.|\n)*a.txt:2(.|\n)*b.txt:1(.|\n)*a.txt:1"):
        read_dataset(root, "train")


# ------------------------------------------------------------------------------------------------ whole splits


@pytest.mark.parametrize("form", MAKERS)
@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_the_same_picture_in_two_splits_is_a_leak(tmp_path: Path, form: str, suffix: str) -> None:
    root = MAKERS[form](tmp_path)
    train, val = next(root.rglob("a.png")), next(root.rglob("c.png"))
    Image.open(train).save(val.with_suffix(suffix))
    if suffix != ".png":
        val.unlink()
        path = root / "annotations" / "instances_val.json"
        if form == "coco":
            path.write_text(path.read_text().replace("c.png", "c.bmp"))
    report = check_dataset(root)
    assert [problem.kind for problem in report.problems] == ["leak"]
    assert "a.png of split 'train'" in report.problems[0].message
    assert not report.ok


def test_the_same_file_in_two_splits_is_a_leak_but_a_union_is_none(tmp_path: Path) -> None:
    root = voc(tmp_path)
    lists = root / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text("a\nb\nc\n")
    report = check_dataset(root)
    assert report.ok
    assert report.unions == ("trainval",)
    (lists / "everything.txt").write_text("c\nb\na\n")  # the exact union of others, whatever its name
    assert check_dataset(root).ok
    (lists / "val.txt").write_text("c\nb\n")
    leaks = [problem for problem in check_dataset(root).problems if problem.kind == "leak"]
    assert {(problem.split, problem.path.name) for problem in leaks} == {("val", "b.png")}


def test_a_validation_split_inside_the_training_split_is_a_leak(tmp_path: Path) -> None:
    root = voc(tmp_path)
    (root / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    assert [problem.kind for problem in check_dataset(root).problems] == ["leak"]


def test_classes_without_objects_and_asked_classes(tmp_path: Path) -> None:
    report = check_dataset(voc(tmp_path), class_names=("cat", "dog"))
    assert report.ok
    assert [problem.kind for problem in report.problems] == ["absent-class"]
    assert "cat" in report.problems[0].message
    report = check_dataset(tmp_path, class_names=("cat",))
    kinds = {problem.kind for problem in report.problems}
    assert kinds == {"unknown-class", "empty-split", "unmeasurable-split"}


def test_splits_asked_for(tmp_path: Path) -> None:
    root = voc(tmp_path)
    (root / "Annotations" / "c.xml").write_text("broken")
    assert check_dataset(root, splits=["train"]).ok
    assert not check_dataset(root, splits=["val"]).ok
    with pytest.raises(DataError, match="no split 'test'"):
        check_dataset(root, splits=["test"])


def test_a_problem_in_a_union_is_told_once(tmp_path: Path) -> None:
    root = voc(tmp_path)
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("a\nb\nc\n")
    (root / "Annotations" / "a.xml").write_text(voc_xml([("dog", (30, 3, 2, 20)), *DOG]))
    assert [(problem.kind, problem.split) for problem in check_dataset(root).problems] == [("inverted-box", "train")]


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = yolo(tmp_path)
    odd = os.fsdecode(b"caf\xe9.png")
    (root / "images" / "train" / "a.png").rename(root / "images" / "train" / odd)
    (root / "labels" / "train" / "a.txt").rename(root / "labels" / "train" / odd.replace(".png", ".txt"))
    (root / "labels" / "train" / odd.replace(".png", ".txt")).write_text("0 nan 0.5 0.5 0.5")
    report = check_dataset(root)
    assert [problem.kind for problem in report.problems] == ["non-finite-box"]
    report.text().encode("utf-8")
    assert "caf\\xe9.txt:1" in str(report.problems[0])
    assert "caf\\xe9" in {record.image_id for record in read_dataset(root, "train").records}


def test_names_that_are_not_utf8_in_a_voc_list(tmp_path: Path) -> None:
    root = voc(tmp_path)
    stem = os.fsdecode(b"caf\xe9")
    (root / "JPEGImages" / "a.png").rename(root / "JPEGImages" / f"{stem}.png")
    (root / "Annotations" / "a.xml").rename(root / "Annotations" / f"{stem}.xml")
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(b"caf\xe9\nb\n")
    report = check_dataset(root)
    assert report.problems == ()
    assert read_dataset(root, "train").records[0].image_id == "caf\\xe9"


def test_sizes_and_balance(tmp_path: Path) -> None:
    root = make_voc(
        tmp_path, {"train": {"a": [("dog", (1, 1, 31, 40)), ("dog", (1, 1, 60, 40)), ("cat", (1, 1, 15, 10))]}}
    )
    split = check_dataset(root).splits[0]
    assert dict(split.per_class) == {"cat": 1, "dog": 2}
    assert dict(split.sizes) == {"small": 1, "medium": 2, "large": 0}
    assert split.relative_size["100%"] == 1.0
    assert split.relative_size["0%"] == 0.25  # 15 x 10 of 60 x 40
    assert split.image_hw == ((40, 60), (40, 60))


def test_real_data_is_ok(bccd: Path, tiny_coco: Path) -> None:
    report = check_dataset(bccd)
    assert report.ok
    assert sum(split.objects for split in report.splits if split.name in ("trainval", "test")) == 4888
    assert {problem.kind for problem in report.problems} == {"tiny-box"}
    assert check_dataset(tiny_coco).ok


# ------------------------------------------------------------------------------------------------ contact sheet


def test_contact_sheet_shows_boxes_in_place(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "set", {"train": {"a": [("dog", (11, 11, 50, 30))]}})
    Image.new("RGB", (60, 40)).save(root / "JPEGImages" / "a.png")
    path = write_contact_sheet(read_dataset(root, "train"), tmp_path / "sheet.png", tile_px=60)
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    tile = sheet[6 + 10 : 6 + 50, 6:66]  # the margin, then the picture centred in its tile
    assert (tile[20, 10] == tile[28, 49]).all()
    assert tile[20, 10].max() == 255
    assert tile[26, 45].max() == 0


@pytest.mark.parametrize(("count", "columns"), [(1, 6), (5, 2), (100, 3)])
def test_contact_sheet_of_any_number_with_broken_images(tmp_path: Path, count: int, columns: int) -> None:
    root = make_voc(tmp_path / "set", {"train": {f"i{n}": DOG for n in range(7)}})
    dataset = read_dataset(root, "train")
    picture(root / "JPEGImages" / "i3.png").write_bytes(b"broken")
    path = write_contact_sheet(dataset, tmp_path / "deep" / "sheet.jpg", count=count, columns=columns, tile_px=64)
    shown = min(count, 7)
    width = min(columns, shown)
    assert Image.open(path).size == (width * 70 + 6, -(-shown // width) * 86 + 6)


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_a_contact_sheet_is_of_the_kind_that_its_name_says(tmp_path: Path, suffix: str, kind: str) -> None:
    root = make_voc(tmp_path / "set", {"train": {"a": DOG}})
    path = write_contact_sheet(read_dataset(root, "train"), tmp_path / f"sheet.{suffix}", tile_px=60)
    with Image.open(path) as sheet:
        assert sheet.format == kind


def test_contact_sheet_of_a_name_with_a_newline(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "set", {"train": {"a\nb": ["0 0.5 0.5 0.5 0.5"]}}, ["dog"])
    assert write_contact_sheet(read_dataset(root, "train"), tmp_path / "sheet.png").is_file()


def test_contact_sheet_of_nothing(tmp_path: Path) -> None:
    root = voc(tmp_path)
    (root / "ImageSets" / "Main" / "test.txt").write_text("")
    with pytest.raises(DataError, match="no images to draw"):
        write_contact_sheet(read_dataset(root, "test"), tmp_path / "sheet.png")


def test_a_contact_sheet_that_cannot_be_written_is_no_success(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "check", str(voc(tmp_path / "a")), "--sheet", str(tmp_path)])
    assert result.exit_code == 2
    assert "is a folder" in result.stderr


def test_splits_are_found_by_their_other_names_and_a_set_without_any_is_told_how(tmp_path: Path) -> None:
    assert [split.name for split in check_dataset(voc(tmp_path / "a"), splits=["valid"]).splits] == ["val"]
    assert "edgekd data split" not in check_dataset(tmp_path / "a", splits=["train"]).text()
    shutil.rmtree(tmp_path / "a" / "ImageSets")
    assert f"edgekd data split {tmp_path / 'a'} --val 0.2" in check_dataset(tmp_path / "a").text()


def test_boxes_that_are_drawn_a_little_beyond_one_side_are_read(tmp_path: Path) -> None:
    """Things at the lower left before a fixed camera: y before x, none would reach beyond."""
    root = MAKERS["coco"](tmp_path)
    boxes([3, 15, 14, 27])(root)  # two pixels below an image of 60 x 40
    report = check_dataset(root)
    codes = {problem.kind for problem in report.problems}
    assert "boxes-of-other-numbers" not in codes
    assert "clipped-box" in codes


@pytest.mark.parametrize(("high", "told"), [(4000, True), (40000, False)])
def test_training_is_warned_of_greys_that_eight_bits_lose(tmp_path: Path, high: int, told: bool) -> None:
    make_voc(tmp_path, {split: {split: [("cat", (7, 5, 30, 20))]} for split in ("train", "val")})
    of_16_bits(0, high)(tmp_path / "JPEGImages" / "train.png")
    doubts = doubts_about(read_dataset(tmp_path, "train"), read_dataset(tmp_path, "val"))
    assert any("spans at most 16 of 256 greys" in doubt for doubt in doubts) == told


def resized(root: Path, hw: tuple[int, int], stated: tuple[int, int], box: list[float]) -> Path:
    """A COCO set of six boxes whose images of a size are stated to be of another."""
    edit(lambda data: [image.update(height=stated[0], width=stated[1]) for image in data["images"]])(root)
    edit(lambda data: data.update(annotations=[{**data["annotations"][0], "bbox": box}] * 6))(root)
    for path in (root / "train").iterdir():
        Image.new("RGB", hw[::-1]).save(path)
    return root


@pytest.mark.parametrize(
    ("hw", "stated", "box", "stops"),
    [
        pytest.param((80, 120), (40, 60), [2, 3, 50, 30], True, id="enlarged since"),
        pytest.param((20, 30), (40, 60), [2, 3, 50, 30], True, id="made smaller since"),
        pytest.param((40, 60), (60, 40), [2, 3, 30, 50], True, id="turned since, as EXIF does"),
        pytest.param((40, 60), (60, 40), [2, 3, 50, 30], False, id="height and width exchanged"),
        pytest.param((80, 120), (40, 60), [2, 3, 90, 70], False, id="boxes of these images under a size that is wrong"),
        pytest.param((40, 60), (1080, 1920), [2, 3, 50, 30], False, id="the same, of a size that is too large"),
        pytest.param((40, 60), (41, 60), [2, 3, 50, 30], False, id="rounded while images were resized"),
    ],
)
def test_images_that_were_resized_without_their_boxes_stop(
    tmp_path: Path, hw: tuple[int, int], stated: tuple[int, int], box: list[float], stops: bool
) -> None:
    root = resized(MAKERS["coco"](tmp_path), hw, stated, box)
    found = [problem for problem in check_dataset(root, splits=["train"]).problems if problem.kind != "duplicate-box"]
    kinds = {problem.kind for problem in found}
    assert ("boxes-of-other-sizes" in kinds) == stops
    assert "size-mismatch" in kinds
    assert not kinds & {"boxes-of-other-numbers", "boxes-beyond-images"}
    if stops:
        with pytest.raises(DataError, match="2 of 2 images are of another size"):
            read_dataset(root, "train")
    else:
        assert len(read_dataset(root, "train").records[0].labels) == 6
