from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from edgekd.data import detect_format, list_splits, read_dataset
from edgekd.data.layout import each_file, files_under, find_split, usual_split
from edgekd.errors import DataError
from tests.data_layouts import make_coco, make_voc, make_yolo, picture, voc_xml

VOC = {
    "train": {"a": [("dog", (1, 1, 60, 40)), ("cat", (11, 5, 20, 10))], "b": []},
    "val": {"c": [("cat", (2, 3, 4, 5))]},
}
COCO = {
    "train": {"a": [("dog", (0, 0, 60, 40)), ("cat", (10, 4, 10, 6))], "b": []},
    "val": {"c": [("cat", (1, 2, 3, 3))]},
}
YOLO = {
    "train": {"a": ["1 0.5 0.5 1 1", "0 0.25 0.175 0.166666666667 0.15"], "b": []},
    "val": {"c": ["0 0.05 0.1 0.05 0.1"]},
}


def boxes(root: Path, split: str, **options: object) -> list[list[float]]:
    return [
        row for record in read_dataset(root, split, **options).records for row in record.boxes_xyxy.round(4).tolist()
    ]


# ---------------------------------------------------------------------------------------------------- all formats


@pytest.mark.parametrize("form", ["voc", "coco", "yolo"])
def test_the_same_scene_reads_the_same_in_all_formats(tmp_path: Path, form: str) -> None:
    if form == "voc":
        make_voc(tmp_path, VOC)
    elif form == "coco":
        make_coco(tmp_path, COCO, {"cat": 3, "dog": 18})
    else:
        make_yolo(tmp_path, YOLO, ["cat", "dog"])
    assert detect_format(tmp_path) == form
    assert list_splits(tmp_path) == ("train", "val")
    train = read_dataset(tmp_path, "train")
    assert (train.format, train.class_names, train.split) == (form, ("cat", "dog"), "train")
    first, second = train.records
    np.testing.assert_allclose(first.boxes_xyxy, [[0, 0, 60, 40], [10, 4, 20, 10]], atol=1e-4)
    assert first.boxes_xyxy.dtype == np.float32
    assert first.labels.tolist() == [1, 0]
    assert first.image_hw == (40, 60)
    assert second.boxes_xyxy.shape == (0, 4)
    assert second.labels.dtype == np.int64
    assert not first.difficult.any()
    assert not first.crowd.any()
    assert [record.image_id for record in train.records] == (["1", "2"] if form == "coco" else ["a", "b"])

    assert read_dataset(tmp_path, "train", class_names=("bird", "dog", "cat")).records[0].labels.tolist() == [1, 2]
    assert len(read_dataset(tmp_path, "train", limit=1)) == 1
    with pytest.raises(DataError, match=r"no split 'test'(.|\n)*train, val"):
        read_dataset(tmp_path, "test")
    place = {"voc": r"a\.xml:4", "coco": r"instances_train.json: annotations\[0\]", "yolo": r"a\.txt:1"}[form]
    with pytest.raises(DataError, match=place + r".*'dog'"):
        read_dataset(tmp_path, "train", class_names=("cat",))


def test_a_class_order_that_repeats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="repeat"):
        read_dataset(make_voc(tmp_path, VOC), "train", class_names=("cat", "dog", "cat"))


def test_nothing_and_too_much_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        detect_format(tmp_path / "absent")
    with pytest.raises(DataError, match="no data set in a known layout"):
        detect_format(tmp_path)
    make_voc(tmp_path, VOC)
    make_yolo(tmp_path, YOLO, ["cat", "dog"])
    with pytest.raises(DataError, match="voc, yolo"):
        detect_format(tmp_path)
    assert read_dataset(tmp_path, "val", format="yolo").format == "yolo"
    with pytest.raises(DataError, match="unknown data format 'pascal'"):
        list_splits(tmp_path, "pascal")


def test_image_size_is_that_after_exif_orientation(tmp_path: Path) -> None:
    from PIL import Image

    make_voc(tmp_path, {"train": {"a": [("dog", (1, 1, 24, 36))]}}, suffix=".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (36, 24)).save(tmp_path / "JPEGImages" / "a.jpg", exif=exif)
    record = read_dataset(tmp_path, "train").records[0]
    assert record.image_hw == (36, 24)
    assert record.boxes_xyxy.tolist() == [[0, 0, 24, 36]]


# ---------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("name", "split", "images", "objects", "classes"),
    [
        ("bccd", "train", 205, 2805, 3),
        ("bccd", "test", 72, 945, 3),
        ("tiny_coco", "train2017", 50, 470, 80),
        ("tiny_coco", "val2017", 50, 382, 80),
        ("voc2007", "val", 1700, None, 20),
    ],
)
def test_real_data(
    request: pytest.FixtureRequest, name: str, split: str, images: int, objects: int, classes: int
) -> None:
    dataset = read_dataset(request.getfixturevalue(name), split)
    assert (len(dataset), len(dataset.class_names)) == (images, classes)
    if objects is not None:
        assert sum(len(record.labels) for record in dataset.records) == objects
    for record in dataset.records:
        h, w = record.image_hw
        assert (record.boxes_xyxy >= 0).all()
        assert (record.boxes_xyxy <= (w, h, w, h)).all()


def test_official_class_orders(voc2007: Path, tiny_coco: Path) -> None:
    voc = read_dataset(voc2007, "val", limit=1).class_names
    assert (voc[0], voc[14], voc[19]) == ("aeroplane", "person", "tvmonitor")
    coco = read_dataset(tiny_coco, "val2017", limit=1).class_names
    assert (coco[0], coco[11], coco[79]) == ("person", "stop sign", "toothbrush")


def test_tiny_coco_agrees_with_pycocotools(tiny_coco: Path) -> None:
    from pycocotools.coco import COCO

    api = COCO(tiny_coco / "annotations" / "instances_val2017.json")
    dataset = read_dataset(tiny_coco, "val2017")
    for record in dataset.records:
        entries = api.loadAnns(api.getAnnIds(imgIds=[int(record.image_id)]))
        expected = np.array([[x, y, x + w, y + h] for x, y, w, h in (e["bbox"] for e in entries)]).reshape(-1, 4)
        np.testing.assert_allclose(record.boxes_xyxy, expected, atol=0.02)  # COCO's own overhang is 0.01 px
        names = [api.cats[entry["category_id"]]["name"] for entry in entries]
        assert [dataset.class_names[label] for label in record.labels] == names
        assert record.crowd.tolist() == [bool(entry["iscrowd"]) for entry in entries]


# ---------------------------------------------------------------------------------------------------- VOC


def one_voc(root: Path, xml: str, suffix: str = ".png") -> Path:
    make_voc(root, {"train": {"a": []}}, suffix)
    (root / "Annotations" / "a.xml").write_text(xml)
    return root


def test_voc_parts_are_no_objects(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>3.5</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    one_voc(tmp_path, voc_xml([("person", (2, 3, 20.5, 30.25))], extra=part))
    assert boxes(tmp_path, "train") == [[1, 2, 20.5, 30.25]]
    assert read_dataset(tmp_path, "train").class_names == ("person",)


def test_voc_parts_before_the_objects_own_box(tmp_path: Path) -> None:
    inner = "<bndbox><xmin>3</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    outer = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>30</ymax></bndbox>"
    xml = f"<annotation><object><part><name>head</name>{inner}</part><name>person</name>{outer}</object></annotation>"
    assert boxes(one_voc(tmp_path, xml), "train") == [[1, 2, 20, 30]]


@pytest.mark.parametrize(
    ("text", "expected"), [("1", True), ("0", False), ("True", True), ("", False), ("Unspecified", False)]
)
def test_voc_difficult(tmp_path: Path, text: str, expected: bool) -> None:
    one_voc(tmp_path, voc_xml([("dog", (1, 1, 9, 9))], extra=f"<difficult>{text}</difficult>"))
    record = read_dataset(tmp_path, "train").records[0]
    assert record.difficult.tolist() == [expected]
    assert record.trainable.tolist() == [not expected]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".JPG", ".PNG", ".bmp", ".webp"])
def test_voc_image_suffixes(tmp_path: Path, suffix: str) -> None:
    make_voc(tmp_path, VOC, suffix)
    assert read_dataset(tmp_path, "train").records[0].path.name == f"a{suffix}"


@pytest.mark.parametrize("layout", ["VOC2007", "VOCdevkit/VOC2012", "VOCdevkit/VOC2007", "VOCdevkit", "my-set"])
def test_voc_nesting(tmp_path: Path, layout: str) -> None:
    make_voc(tmp_path / layout, VOC)
    assert list_splits(tmp_path) == ("train", "val")
    assert len(read_dataset(tmp_path, "train")) == 2


def test_several_voc_sets_are_listed(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        make_voc(tmp_path / "VOCdevkit" / year, VOC)
    with pytest.raises(DataError, match=r"several VOC data sets(.|\n)*VOC2007.*VOC2012"):
        list_splits(tmp_path)


def test_voc_without_image_sets_is_one_split(tmp_path: Path) -> None:
    make_voc(tmp_path, VOC)
    shutil.rmtree(tmp_path / "ImageSets")
    assert list_splits(tmp_path) == ("all",)
    assert [record.image_id for record in read_dataset(tmp_path, "all").records] == ["a", "b", "c"]


@pytest.mark.parametrize("subfolders", [False, True])
def test_voc_with_a_folder_for_each_split(tmp_path: Path, subfolders: bool) -> None:
    for split, images in VOC.items():
        folder = tmp_path / split
        for stem, objects in images.items():
            picture((folder / "images" if subfolders else folder) / f"{stem}.jpg")
            xml = (folder / "annotations" if subfolders else folder) / f"{stem}.xml"
            xml.parent.mkdir(exist_ok=True, parents=True)
            xml.write_text(voc_xml(objects))
    assert list_splits(tmp_path) == ("train", "val")
    assert len(read_dataset(tmp_path, "train")) == 2


def test_voc_class_lists_of_the_official_sets_are_no_splits(tmp_path: Path) -> None:
    make_voc(tmp_path, VOC)
    (tmp_path / "ImageSets" / "Main" / "dog_train.txt").write_text("a  1\nb -1\n")
    assert list_splits(tmp_path) == ("train", "val")


@pytest.mark.parametrize("text", ["\ufeffa\r\n\r\n  b  \r\n", "a\rb\r", "a\n\n\nb", "a  1\nb -1\n", "a.png\nb.png\n"])
def test_voc_split_files_as_people_write_them(tmp_path: Path, text: str) -> None:
    make_voc(tmp_path, VOC)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(text.encode())
    assert [record.image_id for record in read_dataset(tmp_path, "train").records] == ["a", "b"]


def test_voc_names_with_spaces_dots_and_folders(tmp_path: Path) -> None:
    stems = ["my photo 1", "v1.2", "sub/c", "ü"]
    make_voc(tmp_path, {"train": {stem: [("dog", (1, 1, 9, 9))] for stem in stems if "/" not in stem}})
    picture(tmp_path / "JPEGImages" / "sub" / "c.png")
    (tmp_path / "Annotations" / "sub").mkdir()
    (tmp_path / "Annotations" / "sub" / "c.xml").write_text(voc_xml([("dog", (1, 1, 9, 9))]))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n".join(stems), encoding="utf-8")
    assert [record.image_id for record in read_dataset(tmp_path, "train").records] == stems


def test_voc_bom_and_other_encodings(tmp_path: Path) -> None:
    xml = voc_xml([("chien élevé", (1, 1, 9, 9))])
    latin = b"<?xml version='1.0' encoding='latin-1'?>" + xml.encode("latin-1")
    for data in (b"\xef\xbb\xbf" + xml.encode(), xml.encode("utf-16"), latin):
        one_voc(tmp_path, "")
        (tmp_path / "Annotations" / "a.xml").write_bytes(data)
        assert read_dataset(tmp_path, "train").class_names == ("chien élevé",)


# ---------------------------------------------------------------------------------------------------- COCO


def test_coco_sparse_ids_give_labels_in_id_order_over_all_splits(tmp_path: Path) -> None:
    make_coco(tmp_path, {"train": COCO["train"]}, {"dog": 90, "cat": 7})
    make_coco(tmp_path, {"val": COCO["val"]}, {"cat": 7, "bird": 40})
    for split in ("train", "val"):
        assert read_dataset(tmp_path, split).class_names == ("cat", "bird", "dog")
    assert read_dataset(tmp_path, "train").records[0].labels.tolist() == [2, 0]


def test_coco_splits_that_contradict_each_other(tmp_path: Path) -> None:
    make_coco(tmp_path, {"train": COCO["train"]}, {"dog": 1, "cat": 2})
    make_coco(tmp_path, {"val": COCO["val"]}, {"cat": 1})
    with pytest.raises(DataError, match=r"instances_val.json.*contradicts"):
        read_dataset(tmp_path, "train")


def test_coco_categories_after_annotations_that_mention_the_word(tmp_path: Path) -> None:
    make_coco(tmp_path, COCO, {"cat": 1, "dog": 2})
    path = tmp_path / "annotations" / "instances_train.json"
    data = json.loads(path.read_text())
    data = {"info": {"categories": [1, 2], "description": '"categories": ['}, **data}
    path.write_text(json.dumps(data))
    assert read_dataset(tmp_path, "train").class_names == ("cat", "dog")


@pytest.mark.parametrize("images", ["train", "images/train", "images", "."])
@pytest.mark.parametrize("annotations", ["annotations/instances_train.json", "annotations/train.json", "train.json"])
def test_coco_places(tmp_path: Path, images: str, annotations: str) -> None:
    make_coco(tmp_path, {"train": COCO["train"]}, {"cat": 1, "dog": 2})
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    for stem in "ab":
        (tmp_path / "train" / f"{stem}.png").rename(tmp_path / images / f"{stem}.png")
    (tmp_path / "annotations" / "instances_train.json").rename(tmp_path / annotations)
    assert detect_format(tmp_path) == "coco"
    assert list_splits(tmp_path) == ("train",)
    assert len(read_dataset(tmp_path, "train")) == 2


def test_coco_as_roboflow_exports_it(tmp_path: Path) -> None:
    make_coco(tmp_path, COCO, {"cat": 1, "dog": 2})
    for split in COCO:
        (tmp_path / "annotations" / f"instances_{split}.json").rename(tmp_path / split / "_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    assert list_splits(tmp_path) == ("train", "val")
    assert boxes(tmp_path, "val") == [[1, 2, 4, 5]]


def test_coco_subfolders_other_tasks_and_a_file_as_root(tmp_path: Path) -> None:
    make_coco(tmp_path, COCO, {"cat": 1, "dog": 2})
    path = tmp_path / "annotations" / "instances_val.json"
    (tmp_path / "annotations" / "captions_val.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "package.json").write_text("{}")
    path.write_text(path.read_text().replace('"c.png"', '"deep/c.png"'))
    (tmp_path / "val" / "deep").mkdir()
    (tmp_path / "val" / "c.png").rename(tmp_path / "val" / "deep" / "c.png")
    assert list_splits(tmp_path) == ("train", "val")
    assert read_dataset(tmp_path, "val").records[0].path.parent.name == "deep"
    assert list_splits(path) == ("val",)
    assert boxes(path, "val") == [[1, 2, 4, 5]]


# ---------------------------------------------------------------------------------------------------- YOLO


def with_yaml(root: Path, **changes: object) -> Path:
    data = {**yaml.safe_load((root / "data.yaml").read_text()), **changes}
    (root / "data.yaml").write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    return root


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"names": {1: "dog", 0: "cat"}},
        {"names": {"1": "dog", "0": "cat"}, "nc": None},
        {"train": ["images/train", "images/val"], "val": "images/val"},
        {"path": "/home/someone/else"},
        {"path": "."},
        {"train": "../images/train", "val": "../images/val"},
        {"train": "/home/me/sets/this/images/train", "val": "C:\\sets\\images\\val", "path": None},
        {"train": "images\\train", "val": ".\\images\\val\\", "nc": "2"},
        {"test": None, "download": "https://example.org/x.zip", "roboflow": {"version": 1}},
        {"test": ""},
    ],
    ids=str,
)
def test_yolo_yaml_as_people_write_it(tmp_path: Path, changes: dict[str, object]) -> None:
    with_yaml(make_yolo(tmp_path, YOLO, ["cat", "dog"]), **changes)
    assert list_splits(tmp_path) == ("train", "val")
    dataset = read_dataset(tmp_path, "train")
    assert dataset.class_names == ("cat", "dog")
    assert len(dataset) == (3 if isinstance(changes.get("train"), list) else 2)
    assert len(read_dataset(tmp_path, "val")) == 1


@pytest.mark.parametrize("shape", [[2, 3], [3, 2], [17, 3]])
def test_keypoints_after_a_box_are_no_polygon(tmp_path: Path, shape: list[int]) -> None:
    line = "1 0.5 0.5 0.2 0.4 " + " ".join(["0.9"] * (shape[0] * shape[1]))
    make_yolo(tmp_path, {"train": {"a": [line]}, "val": {"b": [line]}}, ["cat", "dog"])
    with_yaml(tmp_path, kpt_shape=shape)
    (record,) = read_dataset(tmp_path, "train").records
    assert np.allclose(record.boxes_xyxy, [[24, 12, 36, 28]])


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_a_turned_box_of_cvat_becomes_the_one_around_it(tmp_path: Path, form: str) -> None:
    """Turned by a right angle about (20, 15), 20 x 10 becomes 10 x 20; by -30 degrees, its sides mix."""
    extra = "<attributes><attribute><name>rotation</name><value>{}</value></attribute></attributes>"
    w, h = 20 * np.sqrt(3) / 2 + 5, 10 + 5 * np.sqrt(3)
    for degrees, expected in ((90.0, (10, 20)), (-30.0, (w, h)), (0, (20, 10))):
        root = tmp_path / str(degrees)
        if form == "voc":
            make_voc(root, {"train": {"a": []}})
            (root / "Annotations" / "a.xml").write_text(
                voc_xml([("dog", (11, 11, 30, 20))], extra=extra.format(degrees))
            )
        else:
            make_coco(root, {"train": {"a": [("dog", (10, 10, 20, 10))]}}, {"dog": 1})
            path = root / "annotations" / "instances_train.json"
            data = json.loads(path.read_text())
            data["annotations"][0]["attributes"] = {"occluded": False, "rotation": degrees}
            path.write_text(json.dumps(data))
        (box,) = boxes(root, "train")
        half = np.array(expected) / 2
        assert np.allclose(box, [*(np.array([20, 15]) - half), *(np.array([20, 15]) + half)], atol=1e-5)


def test_what_datumaro_says_of_objects_in_attributes(tmp_path: Path) -> None:
    extra = "<attributes><attribute><name>is_crowd</name><value>True</value></attribute></attributes>"
    make_voc(tmp_path / "voc", {"train": {"a": []}})
    (tmp_path / "voc" / "Annotations" / "a.xml").write_text(voc_xml([("dog", (11, 11, 30, 20))], extra=extra))
    (record,) = read_dataset(tmp_path / "voc", "train").records
    assert record.crowd.tolist() == [True]
    make_coco(tmp_path / "coco", {"train": {"a": [("dog", (10, 10, 20, 10))]}}, {"dog": 1})
    path = tmp_path / "coco" / "annotations" / "instances_train.json"
    path.write_text(path.read_text().replace('"iscrowd"', '"attributes": {"difficult": true}, "iscrowd"'))
    (record,) = read_dataset(tmp_path / "coco", "train").records
    assert record.difficult.tolist() == [True]


@pytest.mark.parametrize("form", ["iscrowd null", "iscrowd a text", "images in data"])
def test_coco_as_tools_write_it(tmp_path: Path, form: str) -> None:
    make_coco(tmp_path, {"train": {"a": [("dog", (1, 2, 20, 10))]}}, {"dog": 1})
    path = tmp_path / "annotations" / "instances_train.json"
    if form.startswith("iscrowd"):
        value = {"iscrowd null": "null", "iscrowd a text": '"0"'}[form]
        path.write_text(path.read_text().replace('"iscrowd": 0', f'"iscrowd": {value}'))
    else:
        (tmp_path / "train").rename(tmp_path / "data")
        path.rename(tmp_path / "labels.json")
        path.parent.rmdir()
    (record,) = read_dataset(tmp_path, list_splits(tmp_path)[0]).records
    assert record.boxes_xyxy.tolist() == [[1, 2, 21, 12]]
    assert not record.crowd.any()


def test_yolo_lists_path_key_and_custom_names(tmp_path: Path) -> None:
    make_yolo(tmp_path / "there", YOLO, ["cat", "dog"])
    (tmp_path / "there" / "train.txt").write_text(
        "\ufeff./images/train/a.png\r\n\r\nimages/train/b.png\r\n", encoding="utf-8"
    )
    (tmp_path / "there" / "data.yaml").unlink()
    data = {"path": "there", "train": "train.txt", "val": "images/val", "names": ["cat", "dog"], "night": "images/val"}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(data))
    for root in (tmp_path, tmp_path / "my.yaml"):
        assert list_splits(root) == ("night", "train", "val")
        assert [record.image_id for record in read_dataset(root, "train").records] == ["a", "b"]


def test_yolo_missing_labels_are_background(tmp_path: Path) -> None:
    make_yolo(tmp_path, YOLO, ["cat", "dog"])
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    assert [len(record.labels) for record in read_dataset(tmp_path, "train").records] == [0, 0]


@pytest.mark.parametrize(("bare", "told"), [(2, False), (3, True)])
def test_yolo_images_that_nobody_seems_to_have_labelled_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bare: int, told: bool
) -> None:
    make_yolo(tmp_path, {"train": {f"{number:02}": ["0 0.5 0.5 0.2 0.2"] for number in range(20)}}, ["cat"])
    for number in range(bare):
        (tmp_path / "labels" / "train" / f"{number:02}.txt").unlink()
    assert len(read_dataset(tmp_path, "train")) == 20
    assert ("3 of the 20 images of split 'train' have no label file" in caplog.text) == told


def test_yolo_polygons_become_boxes(tmp_path: Path) -> None:
    make_yolo(tmp_path, {"train": {"a": ["1 0.1 0.2 0.5 0.1 0.4 0.8"]}}, ["cat", "dog"])
    assert boxes(tmp_path, "train") == [[6, 4, 30, 32]]


@pytest.mark.parametrize("side", [0.05, 0.2, 0.4])
def test_yolo_polygons_of_any_size_are_not_taken_for_keypoints(tmp_path: Path, side: float) -> None:
    rng = np.random.default_rng(0)
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    outlines = [side / 2 * np.stack([np.cos(turn + t), np.sin(turn + t)], 1) for t in range(30)]
    placed = [outline + rng.uniform(side / 2, 1 - side / 2, 2) for outline in outlines]
    lines = ["0 " + " ".join(f"{value:.4f}" for value in outline.reshape(-1)) for outline in placed]
    make_yolo(tmp_path, {"train": {"a": lines}}, ["cat"])
    assert len(boxes(tmp_path, "train")) == 30


def test_a_yaml_without_keypoints_says_that_all_are_polygons(tmp_path: Path) -> None:
    line = "0 0.6 0.5 0.4 0.4 0.5 0.4 0.7 0.6 0.75 0.35"
    make_yolo(tmp_path, {"train": {"a": [line] * 8}, "val": {"b": [line]}}, ["cat"])
    with pytest.raises(DataError, match="kpt_shape: null"):
        read_dataset(tmp_path, "train")
    stated = with_yaml(tmp_path) / "data.yaml"
    stated.write_text(stated.read_text() + "kpt_shape: null\n")
    assert len(boxes(tmp_path, "train")) == 8


@pytest.mark.parametrize("layout", ["images/{split}", "{split}/images"])
def test_yolo_plain_folders_with_classes_txt(tmp_path: Path, layout: str) -> None:
    for split, images in YOLO.items():
        folder = layout.format(split=split)
        for stem, lines in images.items():
            picture(tmp_path / folder / f"{stem}.JPG")
            label = tmp_path / folder.replace("images", "labels") / f"{stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("\r\n".join(lines))
    assert detect_format(tmp_path) == "yolo"
    with pytest.raises(DataError, match="does not name its classes"):
        read_dataset(tmp_path, "train")
    assert read_dataset(tmp_path, "train", class_names=("x", "y")).records[0].labels.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("cat\r\ndog\r\n")
    assert list_splits(tmp_path) == ("train", "val")
    assert read_dataset(tmp_path, "train").class_names == ("cat", "dog")


def test_yolo_same_stems_in_two_folders_keep_different_ids(tmp_path: Path) -> None:
    make_yolo(tmp_path, {"one": {"a": []}, "two": {"a": ["0 0.5 0.5 1 1"]}}, ["cat"])
    with_yaml(tmp_path, train=["images/one", "images/two"], one=None, two=None)
    ids = [record.image_id for record in read_dataset(tmp_path, "train").records]
    assert ids == ["images/one/a.png", "images/two/a.png"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    make_yolo(tmp_path / "real", {"train": {"a": []}}, ["cat"])
    make_yolo(tmp_path / "set", {"train": {"b": []}}, ["cat"])
    (tmp_path / "set" / "images" / "train" / "loop").symlink_to(tmp_path / "set" / "images" / "train")
    (tmp_path / "set" / "images" / "train" / "more").symlink_to(tmp_path / "real" / "images" / "train")
    assert [record.image_id for record in read_dataset(tmp_path / "set", "train").records] == ["b", "more/a"]


# -- names of splits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "there", "found"),
    [
        ("val", ("train", "val", "valid"), "val"),
        ("val", ("train", "valid"), "valid"),
        ("valid", ("train", "val"), "val"),
        ("val", ("train2017", "val2017"), "val2017"),
        ("train", ("train2017", "val2017"), "train2017"),
        ("train", ("train2014", "train2017"), None),  # either might be meant
        ("val", ("train", "test"), None),
        ("train", (), None),
    ],
)
def test_a_split_is_found_by_the_name_it_usually_has(asked: str, there: tuple[str, ...], found: str | None) -> None:
    if found is not None:
        assert find_split(asked, there, Path("d")) == found
        return
    with pytest.raises(DataError, match=f"has no split '{asked}'"):
        find_split(asked, there, Path("d"))


@pytest.mark.parametrize(
    ("there", "found"),
    [(("Train", "Validation"), "Validation"), (("test", "valid"), "valid"), (("Test",), "Test"), (("train",), None)],
)
def test_the_usual_split_to_measure_on_is_found_however_it_is_written(
    there: tuple[str, ...], found: str | None
) -> None:
    assert usual_split(("val", "test"), there, Path("d")) == found


def test_official_coco_names_are_found(tiny_coco: Path) -> None:
    assert read_dataset(tiny_coco, "val", limit=1).split == "val2017"


def test_a_data_set_without_splits_says_how_to_make_them() -> None:
    with pytest.raises(DataError, match=r"edgekd data split d --val 0\.2"):
        find_split("train", ("all",), Path("d"))


def test_each_file_comes_once_however_folders_are_linked(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"{index}.txt").touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "back").symlink_to(tmp_path)
    (tmp_path / "deep" / "x.xml").touch()
    assert sorted(each_file(tmp_path)) == sorted(path for path in tmp_path.rglob("*.*") if path.is_file())


@pytest.mark.parametrize("place", ["", "images/train"])
def test_a_disks_lost_and_found_is_passed_over(tmp_path: Path, place: str) -> None:
    root = make_yolo(tmp_path, {"train": {"a": ["0 0.5 0.5 0.2 0.4"]}}, ["cat"])
    folder = root / place / "lost+found"  # only root may look into it
    picture(folder / "b.png")
    (folder / "b.xml").write_text(voc_xml([("cat", (1, 1, 9, 9))]))
    assert len(read_dataset(root, "train")) == 1
    (root / "data.yaml").rename(root / "classes.yaml")
    assert detect_format(root) == "yolo"
    assert folder / "b.png" not in list(files_under(root))


def test_a_folder_that_may_not_be_looked_into_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_yolo(tmp_path, {"train": {"a": []}, "train/more": {"b": []}}, ["cat"])
    closed, scandir = root / "images/train/more", os.scandir

    def refusing(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    assert len(read_dataset(root, "train")) == 2
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="more"):
        read_dataset(root, "train")
    assert list(files_under(root / "nowhere")) == []
