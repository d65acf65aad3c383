"""Data sets as tools and services leave them: each is read as its own tools read it."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from edgekd.data import detect_format, list_splits, read_dataset
from edgekd.data.check import check_dataset
from edgekd.data.images import load_image
from edgekd.data.split import split_dataset
from edgekd.errors import DataError
from tests.data_layouts import picture, voc_xml

BOX = [6.0, 4.0, 30.0, 20.0]
XML = voc_xml([("cat", (7, 5, 30, 20))])
LINE = "0 0.3 0.3 0.4 0.4\n"
YAML = "train: images/train\nval: images/val\nnames: "

Make = Callable[[Path], object]


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def voc(root: Path, xml: str | bytes = XML, image: str = "a.png", listing: str | bytes = "a\n") -> None:
    picture(root / "JPEGImages" / image)
    put(root / "Annotations" / "a.xml", xml)
    put(root / "ImageSets" / "Main" / "train.txt", listing)


def declared(encoding: str, codec: str) -> bytes:
    return f'<?xml version="1.0" encoding="{encoding}"?>{XML}'.replace("cat", "猫" if codec == "gbk" else "cat").encode(
        codec
    )


def class_lists(root: Path) -> None:
    voc(root)
    put(root / "ImageSets" / "Main" / "cat_trainval.txt", "a  1\n")


def coco(
    root: Path,
    place: str = "annotations/instances_train.json",
    images: str = "train",
    name: str = "a.png",
    identity: object = 1,
    owner: object = 1,
    category: object = 3,
    categories: object = ((3, "cat"),),
    codec: str = "utf-8",
    **annotation: object,
) -> None:
    picture(root / images / "a.png")
    data = {
        "images": [{"id": identity, "file_name": name, "width": 60, "height": 40}],
        "annotations": [{"id": 1, "image_id": owner, "category_id": category, "bbox": [6, 4, 24, 16], **annotation}],
        "categories": [{"id": number, "name": text} for number, text in categories],  # type: ignore[attr-defined]
    }
    put(root / place, json.dumps(data).encode(codec))


def yolo(root: Path, yaml: str | None = YAML + "[cat]", name: str = "a", line: str | bytes = LINE) -> None:
    for split in ("train", "val"):
        picture(root / "images" / split / f"{name}.png", seed=len(split))
        put(root / "labels" / split / f"{name}.txt", line)
    if yaml is not None:
        put(root / "data.yaml", yaml)


def yolo_lists(root: Path, start: str) -> None:
    yolo(root, "train: train.txt\nval: val.txt\nnames: [cat]")
    for split in ("train", "val"):
        put(root / f"{split}.txt", f"{start}images/{split}/a.png\r\n")


def cvat_darknet(root: Path) -> None:
    picture(root / "obj_train_data" / "a.png")
    put(root / "obj_train_data" / "a.txt", LINE)
    put(root / "obj.names", "cat\n")
    put(root / "train.txt", "data/obj_train_data/a.png\n")


def roboflow_darknet(root: Path) -> None:
    picture(root / "train" / "a.png")
    put(root / "train" / "a.txt", LINE)
    put(root / "train" / "_darknet.labels", "cat\n")


def cvat_with_capitals(root: Path, form: str) -> None:
    for split in ("Train", "Validation"):
        if form == "coco":
            coco(root, f"annotations/instances_{split}.json", f"images/{split}")
        elif form == "voc":
            voc(root)
            put(root / f"ImageSets/Main/cat_{split}.txt", "a 1\n")
        else:
            picture(root / "images" / split / "a.png", seed=len(split))
            put(root / "labels" / split / "a.txt", LINE)
            put(root / f"{split}.txt", f"data/images/{split}/a.png\n")
    if form == "voc":
        (root / "ImageSets/Main/train.txt").rename(root / "ImageSets/Main/Train.txt")
        (root / "ImageSets/Main/cat_Validation.txt").unlink()
    elif form == "yaml":
        put(root / "data.yaml", "Train: Train.txt\nValidation: Validation.txt\nnames: {0: cat}\npath: .\n")
    elif form == "names":
        put(root / "obj.names", "cat\n")


def fiftyone_voc(root: Path, images: str = "data") -> None:
    picture(root / "train" / images / "a.png")
    put(root / "train" / "labels" / "a.xml", XML)


def paddle(root: Path, listing: str) -> None:
    voc(root)
    (root / "ImageSets/Main/train.txt").unlink()
    for name in ("b", "c"):
        picture(root / "JPEGImages" / f"{name}.png")
        put(root / f"Annotations/{name}.xml", XML)
    put(root / "train.txt", listing)
    put(root / "val.txt", listing.replace("a", "b", 1) if len(listing) < 4 else "JPEGImages/b.png Annotations/b.xml\n")


def labelimg(root: Path, place: str) -> None:
    for split, names in (("train", "cat\ndog\n"), ("val", "cat\n")):
        picture(root / place.replace("labels", "images") / split / "a.png", seed=len(split))
        put(root / place / split / "a.txt", LINE)
        put(root / place / split / "classes.txt", names)


def yaml_without_names(root: Path) -> None:
    yolo(root, "train: images/train\nval: images/val\n")
    put(root / "classes.txt", "cat\n\n")


def of_two_machines(root: Path, form: str) -> None:
    """The picture's name as a Mac writes it, with the accent apart; the annotation's in one character."""
    apart, whole = (unicodedata.normalize(way, "Kätzchen") for way in ("NFD", "NFC"))
    if form == "voc":
        put(root / "Annotations" / f"{whole}.xml", XML)
        put(root / "ImageSets/Main/train.txt", f"{apart}\n")
    elif form == "coco":
        coco(root, name=f"{whole}.png")
        (root / "train" / "a.png").unlink()
    else:
        put(root / ("labels/train" if form == "yolo" else "train") / f"{whole}.txt", LINE)
        put(root / "classes.txt", "cat")
    picture(root / {"voc": "JPEGImages", "yolo": "images/train"}.get(form, "train") / f"{apart}.png")


POLYGON = [[6, 4, 30, 4, 30, 20], [8, 8, 9, 8, 9, 9]]
WILD: dict[str, Make] = {
    "voc, image in other letters": lambda root: voc(root, image="A.PNG"),
    "voc, GBK": lambda root: voc(root, declared("gbk", "gbk")),
    "voc, UTF-8 that .NET calls UTF-16": lambda root: voc(root, declared("utf-16", "utf-8")),
    "voc, UTF-16": lambda root: voc(root, declared("utf-16", "utf-16")),
    "voc, list in UTF-16": lambda root: voc(root, listing="a\r\n".encode("utf-16")),
    "voc, list with suffixes": lambda root: voc(root, image="a.bmp", listing="a.bmp \r\n"),
    "voc, list with folders": lambda root: voc(root, listing="JPEGImages/a.png\n"),
    "voc, list from another disk": lambda root: voc(root, listing="/home/me/VOC/JPEGImages/a.png\n"),
    "voc, a list for each class and of all": class_lists,
    "coco, ids as pandas writes them": lambda root: coco(root, owner=1.0, category=3.0),
    "coco, ids as text": lambda root: coco(root, identity="1", category="3", categories=[("3", "cat")]),
    "coco, Roboflow's category 0": lambda root: coco(root, categories=[(0, "cat"), (3, "cat")]),
    "coco, polygons without boxes": lambda root: coco(root, bbox=[], segmentation=POLYGON),
    "coco, UTF-16": lambda root: coco(root, codec="utf-16"),
    "coco, UTF-16 under a name of its own": lambda root: coco(root, "train.json", "images", codec="utf-16"),
    "coco, absolute names": lambda root: coco(root, name="/home/me/pictures/a.png"),
    "coco, Windows names": lambda root: coco(root, name="C:\\pictures\\a.png"),
    "coco, Label Studio": lambda root: coco(root, "annotations/train.json", "images", "../../media/upload/1/a.png"),
    "coco, FiftyOne": lambda root: coco(root, "train/labels.json", "train/data"),
    "coco, Supervisely": lambda root: coco(root, "train/annotations/instances.json", "train/images"),
    "coco, images in a folder with the year": lambda root: coco(root, "annotations/train.json", "train2017"),
    "coco, images in a folder of capitals": lambda root: coco(root, "annotations/train.json", "images/Train"),
    "coco, keypoints alone": lambda root: coco(root, "annotations/person_keypoints_train.json"),
    "yolo, lists from where training started": lambda root: yolo_lists(root, "data/mine/"),
    "yolo, lists from another disk": lambda root: yolo_lists(root, "D:\\data\\mine\\"),
    "yolo, CVAT for Darknet": cvat_darknet,
    "yolo, Roboflow for Darknet": roboflow_darknet,
    "yolo, labels in UTF-16": lambda root: yolo(root, line=LINE.encode("utf-16")),
    "yolo, data.yaml in UTF-16": lambda root: (yolo(root), put(root / "data.yaml", f"{YAML}[cat]".encode("utf-16"))),
    "voc, PaddleDetection": lambda root: paddle(root, "JPEGImages/a.png Annotations/a.xml\n"),
    "voc, lists beside": lambda root: paddle(root, "a\n"),
    "yolo, LabelImg": partial(labelimg, place="."),
    "yolo, LabelImg, labels apart": partial(labelimg, place="labels"),
    "voc, FiftyOne": fiftyone_voc,
    "voc, xml in labels": lambda root: fiftyone_voc(root, "images"),
    "yolo, data.yaml beside classes.txt": yaml_without_names,
    "yolo, in a folder": lambda root: yolo(root / "set"),
    "yolo, in a folder, without yaml": lambda root: (yolo(root / "set", None), put(root / "set/classes.txt", "cat")),
    "voc, in a folder in a folder": lambda root: voc(root / "archive" / "archive" / "set"),
    "yolo, in a folder in a folder": lambda root: yolo(root / "archive" / "set"),
    "voc, on a disk that a Mac wrote to": lambda root: (
        voc(root),
        *(put(root / f"._a{suffix}", "\0\5\x16") for suffix in (".xml", ".jpg", ".txt")),
    ),
    "coco, in a folder": lambda root: (coco(root / "coco"), put(root / "__MACOSX/coco/._a.png", "")),
    **{f"{form}, CVAT's capitals": partial(cvat_with_capitals, form=form) for form in ("coco", "voc", "yaml", "names")},
    **{
        f"{form}, a Mac's names": partial(of_two_machines, form=form)
        for form in ("voc", "coco", "yolo", "yolo, beside")
    },
    "yolo, name with spaces": lambda root: yolo(root, name="my picture (1)"),
}


@pytest.mark.parametrize("name", WILD)
def test_it_is_read(tmp_path: Path, name: str) -> None:
    WILD[name](tmp_path)
    assert "train" in map(str.lower, list_splits(tmp_path))
    assert not {"cat_trainval", "trainval"} & set(list_splits(tmp_path))
    (record,) = read_dataset(tmp_path, "train").records
    assert record.boxes_xyxy.round(4).tolist() == [BOX]
    assert check_dataset(tmp_path).ok


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("[yes, no, null]", ("yes", "no", "null")),
        ("{0: 010, 1: 1.50, 2: 12:30}", ("010", "1.50", "12:30")),
        ("['yes', 2020-01-01, ~]", ("yes", "2020-01-01", "~")),
    ],
)
def test_names_in_yaml_are_what_stands_there(tmp_path: Path, names: str, found: tuple[str, ...]) -> None:
    yolo(tmp_path, YAML + names)
    assert read_dataset(tmp_path, "train").class_names == found


def test_one_name_of_two_ids_is_one_class_over_all_files(tmp_path: Path) -> None:
    coco(tmp_path, categories=[(0, "cat"), (3, "cat"), (4, "dog")])
    coco(tmp_path, "annotations/instances_val.json", "val", category=5, categories=[(4, "dog"), (5, "cat")])
    for split in ("train", "val"):
        dataset = read_dataset(tmp_path, split)
        assert dataset.class_names == ("cat", "dog")
        assert dataset.records[0].labels.tolist() == [0]


def test_an_archive_unpacked_into_a_folder_keeps_its_splits(tmp_path: Path) -> None:
    yolo(tmp_path / "set", "train: images/train\nval: images/val\nnames: [dog]")
    assert list_splits(tmp_path) == list_splits(tmp_path, "yolo") == ("train", "val")
    with pytest.raises(DataError, match="use them as they are"):
        split_dataset(tmp_path, val=0.2)
    (tmp_path / "set/data.yaml").write_text("train: images/train\nnames: [dog]")
    with pytest.raises(DataError, match=f"data split {tmp_path} --from train --val 0.2 --out {tmp_path}-split"):
        read_dataset(tmp_path, "val")
    coco(tmp_path / "other")
    with pytest.raises(DataError, match="holds several data sets"):
        detect_format(tmp_path)
    assert list_splits(tmp_path, "coco") == ("train",)


def test_a_plain_set_in_a_folder_is_found_by_its_class_list(tmp_path: Path) -> None:
    picture(tmp_path / "mine" / "images" / "a.png")
    put(tmp_path / "mine" / "labels" / "a.txt", LINE)
    put(tmp_path / "mine" / "classes.txt", "cat\n")
    assert list_splits(tmp_path) == ("all",)
    assert read_dataset(tmp_path, "all").class_names == ("cat",)


def test_a_split_without_any_label_stays_a_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        picture(tmp_path / split / "images" / "a.png", seed=len(split))
        (tmp_path / split / "labels").mkdir()
    put(tmp_path / "train" / "labels" / "a.txt", LINE)
    put(tmp_path / "classes.txt", "cat\n")
    assert list_splits(tmp_path) == ("test", "train")


def test_the_lists_of_darknets_data_file_are_the_splits_under_any_name(tmp_path: Path) -> None:
    """As Datumaro and CVAT write subsets of other names: a folder for each, which is no split by itself."""
    data = "classes = 1\nnames = data/obj.names\nbackup = backup/\n"
    for split in ("train2017", "night"):
        picture(tmp_path / f"obj_{split}_data" / "a.png", seed=len(split))
        put(tmp_path / f"obj_{split}_data" / "a.txt", LINE)
        put(tmp_path / f"{split}.txt", f"data/obj_{split}_data/a.png\n")
        data += f"{split} = data/{split}.txt\n"
    put(tmp_path / "obj.data", data)
    put(tmp_path / "obj.names", "cat\n")
    assert list_splits(tmp_path) == ("train2017", "night")
    assert len(read_dataset(tmp_path, "train")) == 1


def test_labels_among_many_other_files_are_found(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    put(tmp_path / "labels" / "a.txt", LINE)
    for number in range(1100):
        (tmp_path / "labels" / f"{number}.json").touch()
    put(tmp_path / "classes.txt", "cat\n")
    assert detect_format(tmp_path) == "yolo"
    (tmp_path / "labels" / "a.txt").unlink()
    with pytest.raises(DataError):
        detect_format(tmp_path)


def test_a_folder_for_each_split_may_have_a_yaml_of_its_own(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / split / "images" / "a.png", seed=len(split))
        put(tmp_path / split / "labels" / "a.txt", LINE)
        put(tmp_path / split / "data.yaml", YAML + "[cat]")
    assert list_splits(tmp_path) == ("train", "val")


@pytest.mark.parametrize(("name", "content"), [("a.json", '{"shapes": []}'), ("_annotations.csv", "filename,width")])
def test_annotations_of_another_kind_are_no_missing_ones(tmp_path: Path, name: str, content: str) -> None:
    picture(tmp_path / "a.png")
    put(tmp_path / name, content)
    kind = rf"1 {Path(name).suffix} file, of a kind that is not read"
    says = rf"holds 1 image but no annotations[\s\S]*{kind}[\s\S]*as COCO, VOC or YOLO"
    with pytest.raises(DataError, match=says):
        detect_format(tmp_path)


@pytest.mark.parametrize("suffix", [".avif", ".jp2", ".mpo", ".tga", ".dib", ".pbm"])
def test_rarer_kinds_of_images_are_read(tmp_path: Path, suffix: str) -> None:
    yolo(tmp_path)
    try:
        Image.open(tmp_path / "images/train/a.png").save(tmp_path / f"images/train/a{suffix}")
    except (KeyError, OSError):
        pytest.skip("this Pillow cannot write it")
    (tmp_path / "images/train/a.png").unlink()
    (record,) = read_dataset(tmp_path, "train").records
    assert load_image(record.path).shape == (40, 60, 3)


@pytest.mark.parametrize(("text", "line"), [("cat\n\ndog\n", 2), ("\ncat\ndog\n", 1), ("cat\n\n\ndog", 2)])
def test_an_empty_line_among_class_names_does_not_shift_them(tmp_path: Path, text: str, line: int) -> None:
    yolo(tmp_path, None)
    put(tmp_path / "classes.txt", text)
    with pytest.raises(DataError, match=rf"classes.txt: line {line} is empty, and class ids count lines"):
        read_dataset(tmp_path, "train")
    put(tmp_path / "classes.txt", "cat\r\ndog\r\n\r\n")
    assert read_dataset(tmp_path, "train").class_names == ("cat", "dog")


@pytest.mark.parametrize(("images", "labels"), [("images", "annotations"), ("Images", "Labels")])
def test_labels_in_a_folder_that_is_not_looked_at_are_told(tmp_path: Path, images: str, labels: str) -> None:
    picture(tmp_path / images / "a.png")
    put(tmp_path / labels / "a.txt", LINE)
    with pytest.raises(DataError, match=r"1 \.txt file of the images' names[\s\S]*labels/ beside images/") as caught:
        detect_format(tmp_path)
    assert "data label" not in str(caught.value)


def test_an_annotation_that_is_not_found_is_no_missing_class(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "Annotations/a.xml").rename(tmp_path / "Annotations/a.png.xml")
    with pytest.raises(DataError, match=r"no class is annotated[\s\S]*train\.txt:1: 'a' has no annotation") as caught:
        read_dataset(tmp_path, "train")
    assert "annotate some" not in str(caught.value)
    assert {problem.kind for problem in check_dataset(tmp_path).problems} == {"missing-annotation", "empty-split"}


def test_a_missing_split_to_train_on_is_not_made_of_the_one_to_measure_on(tmp_path: Path) -> None:
    yolo(tmp_path, "train: images/train/*.png\nval: images/val\nnames: [cat]")
    with pytest.raises(DataError, match=r"which is not there \["):
        read_dataset(tmp_path, "train")


def test_classes_that_labelimg_numbers_differently_are_told(tmp_path: Path) -> None:
    labelimg(tmp_path, "labels")
    put(tmp_path / "labels/val/classes.txt", "dog\n")
    with pytest.raises(DataError, match=r"val/classes\.txt and \S*train/classes\.txt number the classes differently"):
        read_dataset(tmp_path, "train")
    put(tmp_path / "data.yaml", YAML + "[Cat, dog]")
    (problem,) = (problem for problem in check_dataset(tmp_path).errors if problem.kind != "leak")
    assert (problem.kind, problem.split) == ("other-names", "val")


def test_no_class_where_no_annotation_can_be_read_names_the_reason(tmp_path: Path) -> None:
    voc(tmp_path, XML.replace("<xmin>7", "<xmin>7,5"))
    with pytest.raises(DataError, match=r"no class is annotated[\s\S]*a\.xml:5: <xmin> is no number: '7,5'") as caught:
        read_dataset(tmp_path, "train")
    assert "recipe" not in str(caught.value)
    assert {problem.kind for problem in check_dataset(tmp_path).problems} == {"bad-annotation", "empty-split"}
    voc(tmp_path, voc_xml([]))
    with pytest.raises(DataError, match="annotate some images"):
        read_dataset(tmp_path, "train")


def test_classes_asked_for_that_leave_annotated_ones_out(tmp_path: Path) -> None:
    voc(tmp_path)
    with pytest.raises(DataError, match=r"data\.classes must name every class that is annotated"):
        read_dataset(tmp_path, "train", class_names=["dog"])


def test_images_beside_their_json_are_not_taken_from_a_folder_of_other_ones(tmp_path: Path) -> None:
    """As `data label` writes it, for photographs in a folder and in one below, which is called images."""
    places = [tmp_path / name for name in ("1.png", "2.png", "images/1.png")]
    images = []
    for number, path in enumerate(places, 1):
        picture(path, hw=(40 + number, 60))
        name = path.relative_to(tmp_path).as_posix()
        images.append({"id": number, "file_name": name, "width": 60, "height": 40 + number})
    note = {"image_id": 1, "category_id": 1, "bbox": BOX}
    data = {"images": images, "annotations": [note], "categories": [{"id": 1, "name": "cat"}]}
    put(tmp_path / "instances_all.json", json.dumps(data))
    assert [record.path for record in read_dataset(tmp_path, "all").records] == places
    assert check_dataset(tmp_path).ok


def test_annotations_in_a_folder_for_each_split_are_these_splits(tmp_path: Path) -> None:
    for split, names in (("train", ("a", "b")), ("Test", ("a",))):
        for name in names:
            picture(tmp_path / "images" / split / f"{name}.png")
            put(tmp_path / "annotations" / split / f"{name}.xml", XML)
    picture(tmp_path / "images/train/c.png")
    assert list_splits(tmp_path) == ("Test", "train")
    assert [record.path.name for record in read_dataset(tmp_path, "train").records] == ["a.png", "b.png"]
    assert len(read_dataset(tmp_path, "test")) == 1
    (problem,) = check_dataset(tmp_path).problems
    assert (problem.kind, problem.split, problem.path.name) == ("unannotated-image", "train", "c.png")
    put(tmp_path / "annotations/more/d.xml", XML)
    picture(tmp_path / "images/more/d.png")
    assert list_splits(tmp_path) == ("all",)


def test_two_json_files_of_one_split_are_not_chosen_from(tmp_path: Path) -> None:
    coco(tmp_path)
    coco(tmp_path, "train.json")
    assert list_splits(tmp_path) == ("train",)
    coco(tmp_path, "train.json", bbox=[1, 2, 3, 4])
    with pytest.raises(
        DataError, match=r"describe split 'train', and differ\n  got: +\S+instances_train\.json, \S+/train\.json"
    ):
        read_dataset(tmp_path, "train")


def test_yaml_files_that_contradict_each_other_are_not_chosen_from(tmp_path: Path) -> None:
    yolo(tmp_path, yaml=None)
    put(tmp_path / "a.yaml", YAML + "[cat]")
    put(tmp_path / "b.yml", YAML + "[cat]\n# the same")
    assert list_splits(tmp_path) == ("train", "val")
    put(tmp_path / "b.yml", YAML + "[dog]")
    with pytest.raises(DataError, match=r"several YAML files\n  got: +a\.yaml, b\.yml"):
        read_dataset(tmp_path, "train")
    assert read_dataset(tmp_path / "b.yml", "train").class_names == ("dog",)
    put(tmp_path / "data.yaml", YAML + "[eel]")
    assert read_dataset(tmp_path, "train").class_names == ("eel",)


def test_paths_in_the_yaml_that_lead_to_no_images_are_no_splits(tmp_path: Path) -> None:
    yolo(
        tmp_path, YAML + "[cat]\nlabel_dir: labels\nweights: best.pt\nlist: names.txt\nmini: mini.txt\nmore: images/val"
    )
    put(tmp_path / "best.pt", b"\x80")
    put(tmp_path / "names.txt", "cat\n")
    put(tmp_path / "mini.txt", "images/val/a.png\n")
    assert list_splits(tmp_path) == ("train", "val", "mini", "more")


@pytest.mark.parametrize("start", ["my-set", "../datasets/my-set", "./datasets/my-set"])
def test_paths_in_the_yaml_may_begin_above_its_folder(tmp_path: Path, start: str) -> None:
    here = tmp_path / "my-set"
    yolo(here, f"train: {start}/images/train\nval: {start}/images/val\nnames: [cat]")
    assert [len(read_dataset(here, split)) for split in ("train", "val")] == [1, 1]


def test_a_class_id_that_the_yaml_does_not_name_is_none_of_those_asked_for(tmp_path: Path) -> None:
    yolo(tmp_path, line="1 0.3 0.3 0.4 0.4\n")
    with pytest.raises(DataError, match=r"a\.txt:1: class 'id 1 \(the data set names 0 to 0\)' is none of: dog, cat"):
        read_dataset(tmp_path, "train", class_names=["dog", "cat"])


def test_a_label_without_its_image_counts_as_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    yolo(tmp_path)
    put(tmp_path / "labels/train/b.txt", LINE)
    read_dataset(tmp_path, "train")
    assert "1 orphan-label" in caplog.text


def test_a_lone_split_under_any_name_is_told_how_to_be_divided(tmp_path: Path) -> None:
    coco(tmp_path, "result.json", "images")
    with pytest.raises(DataError, match="edgekd data split"):
        read_dataset(tmp_path, "train")


def test_a_misnamed_label_stops_a_part_of_the_split_too(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").rename(tmp_path / "labels/train/a.TXT")
    with pytest.raises(DataError, match="misnamed-label"):
        read_dataset(tmp_path, "train", limit=1)


def test_a_label_that_an_image_of_another_split_has_is_not_misnamed(tmp_path: Path) -> None:
    for name in ("a.png", "a.png.png", "b.png"):
        picture(tmp_path / "images" / name)
    for name in ("a.png.txt", "b.txt"):
        put(tmp_path / "labels" / name, LINE)
    put(tmp_path / "train.txt", "images/a.png\nimages/b.png\n")
    put(tmp_path / "val.txt", "images/a.png.png\n")
    put(tmp_path / "classes.txt", "cat\n")
    assert [len(record.labels) for record in read_dataset(tmp_path, "train").records] == [0, 1]


@pytest.mark.parametrize("place", ["annotations/{}.json", "{}.json", "{}/labels.json", "list"])
@pytest.mark.parametrize("content", ["", '{"images": [', "images/val/gone.png\n"])
def test_a_split_whose_description_is_damaged_stays_a_split(tmp_path: Path, place: str, content: str) -> None:
    """Else `data check` finds nothing wrong, and training says that the set has no split to measure on."""
    if place == "list":
        yolo(tmp_path, None)
        put(tmp_path / "classes.txt", "cat\n")
        put(tmp_path / "train.txt", "images/train/a.png\n")
    else:
        coco(tmp_path, place.format("train"))
    put(tmp_path / (place.format("val") if place != "list" else "val.txt"), content)
    assert set(list_splits(tmp_path)) == {"train", "val"}
    assert len(read_dataset(tmp_path, "train")) == 1
    assert any(problem.split == "val" for problem in check_dataset(tmp_path).errors)


@pytest.mark.parametrize("holder", ["info", "images"])
def test_class_names_are_those_of_the_outermost_object(tmp_path: Path, holder: str) -> None:
    coco(tmp_path)
    path = tmp_path / "annotations/instances_train.json"
    data = {"info": {}, **json.loads(path.read_text())}
    (data["info"] if holder == "info" else data["images"][0])["categories"] = [{"id": 3, "name": "zebra"}]
    path.write_text(json.dumps(data))
    assert read_dataset(tmp_path, "train").class_names == ("cat",)


def test_a_box_that_is_turned_by_no_number_is_refused_alone(tmp_path: Path) -> None:
    coco(tmp_path, attributes={"rotation": float("inf")})
    assert [problem.kind for problem in check_dataset(tmp_path).errors] == ["non-finite-box", "empty-split"]


@pytest.mark.parametrize(("make", "place"), [(voc, "Annotations/a.xml"), (yolo, "labels/train/a.txt")])
def test_a_pipe_is_no_annotation_and_nobody_waits_for_it(tmp_path: Path, make: Make, place: str) -> None:
    make(tmp_path)
    (tmp_path / place).unlink()
    os.mkfifo(tmp_path / place)
    assert any("not a file" in str(problem) for problem in check_dataset(tmp_path).errors)


@pytest.mark.parametrize("labels", ["obj_train_data", "labels"])
def test_an_export_without_its_images_says_that_they_lack(tmp_path: Path, labels: str) -> None:
    for name, content in {
        f"{labels}/a.txt": LINE,
        f"{labels}/b.txt": LINE,
        "obj.names": "cat",
        "notes.json": "{}",
    }.items():
        put(tmp_path / name, content)
    with pytest.raises(DataError, match=r"2 \.txt files and no image"):
        detect_format(tmp_path)
