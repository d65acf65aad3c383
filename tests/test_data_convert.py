from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekd.data import detect_format, list_splits, read_dataset
from edgekd.data.check import check_dataset
from edgekd.data.convert import convert_dataset
from edgekd.data.split import split_dataset
from edgekd.errors import DataError
from tests.data_layouts import make_coco, make_voc, make_yolo, picture, voc_xml

FORMATS = ("voc", "coco", "yolo")
PAIRS = list(itertools.permutations(FORMATS, 2))


def assert_same(a: Path, b: Path, names: bool = True) -> None:
    """Every image, box, label, flag, id, class, split and byte of `a` is in `b`, in the same order."""
    assert set(list_splits(a)) == set(list_splits(b))
    for split in list_splits(a):
        first, second = read_dataset(a, split), read_dataset(b, split)
        assert first.class_names == second.class_names
        assert [record.image_id for record in first.records] == [record.image_id for record in second.records]
        for x, y in zip(first.records, second.records, strict=True):
            for column in ("boxes_xyxy", "labels", "difficult", "crowd"):
                np.testing.assert_array_equal(getattr(x, column), getattr(y, column), f"{x.image_id} {column}")
            assert x.image_hw == y.image_hw
            assert x.path.read_bytes() == y.path.read_bytes()
            assert not names or x.path.name == y.path.name


def flagged_voc(root: Path) -> Path:
    """Overlapping splits, an empty one, difficult and crowd objects, fractional boxes, odd names, background."""
    flags = ["", "<difficult>1</difficult>", "<crowd>1</crowd>", "<difficult>1</difficult><crowd>1</crowd>"]
    for number, flag in enumerate(flags):
        stem = ["0001", "x.y", "my photo 1", "ü"][number]
        picture(root / "JPEGImages" / f"{stem}.{('jpg', 'png', 'JPG', 'bmp')[number]}")
        (root / "Annotations").mkdir(exist_ok=True)
        text = voc_xml([("zebra & co", (1.5, 2.123456789, 30.3, 20)), ("<ant>", (7, 8, 59, 39.99))], extra=flag)
        text = text.replace("zebra & co", "zebra &amp; co").replace("<ant>", "&lt;ant&gt;")
        (root / "Annotations" / f"{stem}.xml").write_text(text, encoding="utf-8")
    picture(root / "JPEGImages" / "nothing.png")
    (root / "Annotations" / "nothing.xml").write_text(voc_xml([]))
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("ü\n0001\nx.y\n", encoding="utf-8")
    (lists / "val.txt").write_text("my photo 1\nnothing\n")
    (lists / "trainval.txt").write_text("0001\nx.y\nmy photo 1\nnothing\nü\n", encoding="utf-8")
    (lists / "test.txt").write_text("")
    return root


@pytest.mark.parametrize(("there", "back"), PAIRS)
def test_round_trips_keep_everything(tmp_path: Path, there: str, back: str) -> None:
    source = flagged_voc(tmp_path / "source")
    report = convert_dataset(source, tmp_path / "1", there)
    assert (report.format, report.images["train"], report.objects["train"]) == (there, 3, 6)
    assert detect_format(tmp_path / "1") == there
    assert_same(source, tmp_path / "1")
    convert_dataset(tmp_path / "1", tmp_path / "2", back)
    assert_same(source, tmp_path / "2")
    convert_dataset(tmp_path / "2", tmp_path / "3", there)
    assert_same(source, tmp_path / "3")
    report = check_dataset(tmp_path / "3")
    assert report.unions == ("trainval",)
    assert [problem.kind for problem in report.errors] == ["empty-split"]


@pytest.mark.parametrize(("there", "back"), PAIRS)
@pytest.mark.parametrize("name", ["tiny_coco", "bccd"])
def test_round_trips_of_real_data(request, tmp_path: Path, caplog, name: str, there: str, back: str) -> None:
    caplog.set_level(logging.ERROR, "edgekd.data")
    source = request.getfixturevalue(name)
    split = {"tiny_coco": "val2017", "bccd": "test"}[name]
    convert_dataset(source, tmp_path / "1", there, splits=[split], link=True)
    convert_dataset(tmp_path / "1", tmp_path / "2", back)
    classes = read_dataset(source, split).class_names
    for folder in (tmp_path / "1", tmp_path / "2"):
        assert list_splits(folder) == (split,)
        assert read_dataset(folder, split).class_names == classes
    reference = convert_dataset(source, tmp_path / "0", {"tiny_coco": "coco", "bccd": "voc"}[name], splits=[split])
    assert reference.images == {split: {"tiny_coco": 50, "bccd": 72}[name]}
    assert_same(tmp_path / "0", tmp_path / "2")
    original = read_dataset(source, split)
    for x, y in zip(original.records, read_dataset(tmp_path / "2", split).records, strict=True):
        np.testing.assert_array_equal(x.boxes_xyxy, y.boxes_xyxy)
        assert x.image_id == y.image_id


def test_coco_numbers_come_back_as_they_were(tiny_coco: Path, tmp_path: Path) -> None:
    """Category ids, image ids, file names, and boxes to the last digit, through both other layouts."""
    for name, source, to in (("1", tiny_coco, "voc"), ("2", tmp_path / "1", "yolo"), ("3", tmp_path / "2", "coco")):
        convert_dataset(source, tmp_path / name, to)
    paths = [root / "annotations" / "instances_val2017.json" for root in (tiny_coco, tmp_path / "3")]
    before, after = (json.loads(path.read_text()) for path in paths)
    for key in ("id", "name"):
        assert [entry[key] for entry in before["categories"]] == [entry[key] for entry in after["categories"]]
    for key in ("id", "file_name", "height", "width"):
        assert [entry[key] for entry in before["images"]] == [entry[key] for entry in after["images"]]
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in before["images"]}
    objects: list[list[tuple[object, ...]]] = []
    for data in (before, after):
        rows = []
        for entry in data["annotations"]:
            (x, y, w, h), (iw, ih) = entry["bbox"], sizes[entry["image_id"]]
            w, h = min(w, round(iw - x, 9)), min(h, round(ih - y, 9))  # COCO's own boxes overhang by 0.01 px
            rows.append((entry["image_id"], entry["category_id"], entry["iscrowd"], x, y, w, h))
        objects.append(sorted(rows))
    assert objects[0] == objects[1]


side = st.floats(0, 1000, allow_nan=False)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(side, side, side, side, st.integers(0, 2), st.booleans(), st.booleans()), min_size=1, max_size=6
    ),
    pair=st.sampled_from(PAIRS),
)
def test_any_boxes_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, rows, pair: tuple[str, str]) -> None:
    root = tmp_path_factory.mktemp("any")
    Image.new("RGB", (997, 613)).save(picture(root / "0" / "train" / "a.png"))
    annotations = [
        {
            "id": n,
            "image_id": 7,
            "category_id": c + 1,
            "bbox": [x, y, w, h],
            "iscrowd": int(crowd),
            "difficult": int(hard),
        }
        for n, (x, y, w, h, c, crowd, hard) in enumerate(rows)
    ]
    data = {
        "images": [{"id": 7, "file_name": "a.png", "width": 997, "height": 613}],
        "annotations": annotations,
        "categories": [{"id": n + 1, "name": name} for n, name in enumerate("abc")],
    }
    (root / "0" / "annotations").mkdir()
    (root / "0" / "annotations" / "instances_train.json").write_text(json.dumps(data))
    convert_dataset(root / "0", root / "1", pair[0])
    convert_dataset(root / "1", root / "2", pair[1])
    assert_same(root / "0", root / "1")
    assert_same(root / "0", root / "2")


# ---------------------------------------------------------------------------------------------- names that collide


def test_the_same_stems_in_two_splits_stay_two_images(tmp_path: Path) -> None:
    source = make_yolo(tmp_path / "0", {"train": {"1": ["0 0.5 0.5 1 1"]}, "val": {"1": []}}, ["dog"])
    for step, to in enumerate(("voc", "coco", "yolo"), 1):
        convert_dataset(tmp_path / str(step - 1), tmp_path / str(step), to)
        assert_same(source, tmp_path / str(step), names=False)


@pytest.mark.parametrize("to", ["voc", "coco"])
def test_a_folder_of_the_name_images_within_a_split_loses_no_label(tmp_path: Path, to: str) -> None:
    source = make_yolo(tmp_path / "source", {"train": {"images/a": ["0 0.5 0.5 0.5 0.5"]}}, ["dog"])
    (source / "labels/train/images").rename(source / "images/train/labels")  # where its readers look for it
    assert read_dataset(source, "train").records[0].labels.tolist() == [0]
    convert_dataset(source, tmp_path / "1", to)
    convert_dataset(tmp_path / "1", tmp_path / "2", "yolo")
    assert_same(source, tmp_path / "2")


def test_the_same_stems_in_one_split_stay_two_images(tmp_path: Path) -> None:
    source = make_coco(tmp_path / "0", {"train": {"a/1": [], "b/1": [("dog", (1, 1, 9, 9))]}}, {"dog": 1})
    picture(source / "train" / "a" / "1.png"), picture(source / "train" / "b" / "1.png", seed=5)
    Image.open(source / "train" / "b" / "1.png").save(source / "train" / "a" / "1.jpg")
    path = source / "annotations" / "instances_train.json"
    data = json.loads(path.read_text())
    data["images"].append({"id": 3, "file_name": "a/1.jpg", "width": 60, "height": 40})
    path.write_text(json.dumps(data))
    for step, to in enumerate(("yolo", "voc", "coco", "yolo"), 1):
        convert_dataset(tmp_path / str(step - 1), tmp_path / str(step), to)
        assert_same(source, tmp_path / str(step), names=False)


def test_coco_keeps_names_that_differ_in_their_suffix_alone(tmp_path: Path) -> None:
    names = [f"a.{suffix}" for suffix in ("jpg", "png", "bmp", "webp")]
    source = make_coco(tmp_path / "0", {"train": {name: [("dog", (1, 1, 9, 9))] for name in names}}, {"dog": 1})
    path = source / "annotations" / "instances_train.json"
    for name in names:
        Image.open(source / "train" / f"{name}.png").save(source / "train" / name)
        path.write_text(path.read_text().replace(f"{name}.png", name))
    for to, kept in (("coco", names), ("yolo", ["a.jpg", "a_train.png", "a_train_2.bmp", "a_train_3.webp"])):
        convert_dataset(source, tmp_path / to, to)
        assert [record.path.name for record in read_dataset(tmp_path / to, "train").records] == kept


@pytest.mark.parametrize("ids", [(0, 1, 2), (0, 7, 90), (-1, 3, 4)])
def test_category_ids_stay_wherever_they_begin(tmp_path: Path, ids: tuple[int, ...]) -> None:
    categories = dict(zip(("dog", "bird", "cat"), ids, strict=True))
    make_coco(tmp_path / "0", {"train": {"a": [("bird", (1, 1, 9, 9))]}}, categories)
    for step, to in enumerate(("coco", "voc", "coco"), 1):
        convert_dataset(tmp_path / str(step - 1), tmp_path / str(step), to)
        if to == "coco":
            data = json.loads((tmp_path / str(step) / "annotations" / "instances_train.json").read_text())
            assert {entry["name"]: entry["id"] for entry in data["categories"]} == categories
            assert data["annotations"][0]["category_id"] == categories["bird"]


def test_hostile_names_stay_inside(tmp_path: Path) -> None:
    source = make_coco(tmp_path / "in" / "0", {"train": {"a": [], "b": [], "c": [], "d": []}}, {"dog": 1})
    names = ["../../../up.png", ".hidden.png", "back\\slash.png", " no suffix "]
    path = source / "annotations" / "instances_train.json"
    data = json.loads(path.read_text())
    for entry, name in zip(data["images"], names, strict=True):
        (source / "train" / entry["file_name"]).unlink()
        entry["file_name"] = name
        image = picture(tmp_path / "pictures" / f"{entry['id']}.png")
        target = source / "train" / name.replace("\\", "/")
        target.parent.mkdir(exist_ok=True)
        image.rename(target)
    path.write_text(json.dumps(data))
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    for to in FORMATS:
        out = tmp_path / "out" / to
        convert_dataset(source, out, to)
        assert_same(source, out, names=False)
    new = {file for file in tmp_path.rglob("*") if file.is_file()} - before
    assert all(file.is_relative_to(tmp_path / "out") for file in new)


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
@pytest.mark.parametrize("to", FORMATS)
def test_names_that_are_not_utf8(tmp_path: Path, to: str) -> None:
    source = make_yolo(tmp_path / "0", {"train": {"a": ["0 0.5 0.5 1 1"]}}, ["dog"])
    for path in (source / "images/train/a.png", source / "labels/train/a.txt"):
        path.rename(path.with_name(os.fsdecode(b"caf\xe9") + path.suffix))
    convert_dataset(source, tmp_path / "1", to)
    assert_same(source, tmp_path / "1", names=False)


# ---------------------------------------------------------------------------------------------- what others read


def test_yolo_out_is_what_other_tools_expect(tmp_path: Path) -> None:
    convert_dataset(make_voc(tmp_path / "0", {"train": {"a": [("dog", (1, 1, 30, 40))]}}), tmp_path / "1", "yolo")
    data = yaml.safe_load((tmp_path / "1" / "data.yaml").read_text())
    assert data == {"train": "images/train", "nc": 1, "names": {0: "dog"}}
    assert (tmp_path / "1" / "labels" / "train" / "a.txt").read_text() == "0 0.25 0.5 0.5 1.0\n"
    assert (tmp_path / "1" / "images" / "train" / "a.png").is_file()


def test_voc_out_is_what_other_tools_expect(tmp_path: Path) -> None:
    source = make_coco(tmp_path / "0", {"train": {"a": [("dog", (0, 10, 30, 20.5))]}}, {"dog": 1})
    convert_dataset(source, tmp_path / "1", "voc")
    text = (tmp_path / "1" / "Annotations" / "a.xml").read_text()
    assert "<xmin>1</xmin><ymin>11</ymin><xmax>30</xmax><ymax>30.5</ymax>" in text
    assert (tmp_path / "1" / "ImageSets" / "Main" / "train.txt").read_text() == "a\n"


def test_pycocotools_reads_coco_out(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    convert_dataset(flagged_voc(tmp_path / "0"), tmp_path / "1", "coco")
    api = COCO(tmp_path / "1" / "annotations" / "instances_trainval.json")
    assert len(api.getImgIds()) == 5
    assert len(api.getAnnIds(iscrowd=True)) == 4
    assert {entry["name"] for entry in api.loadCats(api.getCatIds())} == {"zebra & co", "<ant>"}


# ---------------------------------------------------------------------------------------------- all or nothing


def test_an_image_of_several_splits_is_stored_once(tmp_path: Path) -> None:
    source = flagged_voc(tmp_path / "0")
    convert_dataset(source, tmp_path / "voc", "voc")
    assert len(list((tmp_path / "voc" / "JPEGImages").iterdir())) == 5
    convert_dataset(source, tmp_path / "yolo", "yolo")
    twins = [tmp_path / "yolo" / "images" / split / "0001.jpg" for split in ("train", "trainval")]
    assert twins[0].samefile(twins[1])
    assert not twins[0].samefile(source / "JPEGImages" / "0001.jpg")
    convert_dataset(source, tmp_path / "linked", "yolo", link=True)
    assert (tmp_path / "linked" / "images" / "train" / "0001.jpg").samefile(source / "JPEGImages" / "0001.jpg")


def test_a_folder_within_the_source_is_refused(tmp_path: Path) -> None:
    source = make_voc(tmp_path / "source", {"train": {"a": [("dog", (1, 1, 9, 9))]}})
    with pytest.raises(DataError, match="lies within the data set"):
        convert_dataset(source, source / "JPEGImages" / "coco", "coco")
    assert not (source / "JPEGImages" / "coco").exists()


def test_what_is_there_stays_untouched(tmp_path: Path) -> None:
    source = make_voc(tmp_path / "0", {"train": {"a": []}, "val": {"b": [("dog", (1, 1, 9, 9))]}})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    for out in (tmp_path / "full", tmp_path / "full" / "mine.txt", source):
        with pytest.raises(DataError, match="not empty"):
            convert_dataset(source, out, "coco")
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    convert_dataset(source, tmp_path / "empty", "coco")
    assert detect_format(tmp_path / "empty") == "coco"


@pytest.mark.parametrize("break_it", ["annotation", "image", "format", "split"])
def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path, break_it: str) -> None:
    source = make_voc(tmp_path / "0", {"train": {"a": [("dog", (1, 1, 9, 9))]}})
    if break_it == "annotation":
        (source / "Annotations" / "a.xml").write_text("<annotation>")
    if break_it == "image":
        (source / "JPEGImages" / "a.png").write_text("")
    to, splits = ("kitti" if break_it == "format" else "coco"), (["test"] if break_it == "split" else None)
    with pytest.raises(DataError):
        convert_dataset(source, tmp_path / "1", to, splits=splits)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.data import convert
    from edgekd.errors import EdgeKDError

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(convert._WRITERS, "coco", full)
    source = make_voc(tmp_path / "0", {"train": {"a": [("dog", (1, 1, 9, 9))]}})
    with pytest.raises(EdgeKDError, match="No space left"):
        convert_dataset(source, tmp_path / "1", "coco")
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


@pytest.mark.parametrize("there", FORMATS)
def test_that_teachers_have_annotated_a_split_is_not_forgotten(tmp_path: Path, there: str) -> None:
    """Figures on it measure agreement with them, in whatever layout, also after it has been divided."""
    root = make_coco(tmp_path / "a", {"all": {str(i): [("cat", (1, 2, 9, 9))] for i in range(4)}}, {"cat": 1})
    make_coco(root, {"by-hand": {"x": [("cat", (1, 2, 9, 9))]}}, {"cat": 1})
    path = root / "annotations/instances_all.json"
    path.write_text(json.dumps({"info": {"teachers": {"yolo": "9f"}}, **json.loads(path.read_text())}))
    convert_dataset(root, tmp_path / "b", there)
    convert_dataset(tmp_path / "b", tmp_path / "c", "coco")
    for copy in (root, tmp_path / "b", tmp_path / "c"):
        assert read_dataset(copy, "all").by_teachers
        assert not read_dataset(copy, "by-hand").by_teachers
    convert_dataset(root, tmp_path / "d", there, splits=["all"])
    out = None if there != "coco" else tmp_path / "e"
    split_dataset(tmp_path / "d", val=0.5, out=out)
    assert all(read_dataset(out or tmp_path / "d", split).by_teachers for split in ("train", "val"))


def test_refused_boxes_are_reported(tmp_path: Path) -> None:
    source = make_voc(tmp_path / "0", {"train": {"a": [("dog", (30, 1, 9, 9)), ("dog", (1, 1, 9, 9))]}})
    report = convert_dataset(source, tmp_path / "1", "yolo")
    assert [problem.kind for problem in report.problems] == ["inverted-box"]
    assert report.objects == {"train": 1}


def test_asked_classes_fix_the_order(tmp_path: Path) -> None:
    source = make_coco(
        tmp_path / "0", {"train": {"a": [("dog", (1, 1, 9, 9)), ("cat", (2, 2, 9, 9))]}}, {"cat": 3, "dog": 9}
    )
    for to in FORMATS:
        convert_dataset(source, tmp_path / to, to, class_names=("dog", "bird", "cat"))
        dataset = read_dataset(tmp_path / to, "train")
        assert dataset.class_names == ("dog", "bird", "cat")
        assert dataset.records[0].labels.tolist() == [0, 2]


def test_a_class_that_is_new_to_a_converted_set_is_told_where_to_be_named(tmp_path: Path) -> None:
    convert_dataset(make_yolo(tmp_path / "a", {"train": {"x": ["0 0.5 0.5 0.2 0.2"]}}, ["cat"]), tmp_path / "b", "voc")
    xml = tmp_path / "b" / "Annotations" / "x.xml"
    xml.write_text(xml.read_text().replace("cat", "dog"))
    with pytest.raises(DataError, match=r"edgekd\.json keeps the classes"):
        read_dataset(tmp_path / "b", "train")
