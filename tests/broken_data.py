"""Every way to break a data set that the tests know: what is spoilt, and how `data check` must name it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.data_layouts import make_coco, make_voc, make_yolo, picture, voc_xml

Spoil = Callable[[Path], object]
DOG = [("dog", (2, 3, 30, 20))]


class Case(NamedTuple):
    form: str
    spoil: Spoil
    kind: str
    where: str


def voc(root: Path) -> Path:
    return make_voc(root, {"train": {"a": DOG, "b": DOG}, "val": {"c": DOG}})


def coco(root: Path) -> Path:
    return make_coco(root, {"train": {"a": DOG, "b": DOG}, "val": {"c": DOG}}, {"dog": 5})


def yolo(root: Path) -> Path:
    line = "0 0.5 0.5 0.5 0.5"
    return make_yolo(root, {"train": {"a": [line], "b": [line]}, "val": {"c": [line]}}, ["dog"])


MAKERS = {"voc": voc, "coco": coco, "yolo": yolo}


def write(name: str, content: str | bytes) -> Spoil:
    return lambda root: (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


def both(*spoils: Spoil) -> Spoil:
    return lambda root: [spoil(root) for spoil in spoils]


def folder_instead(name: str) -> Spoil:
    return lambda root: ((root / name).unlink(), (root / name).mkdir())


def folders_for_splits(root: Path) -> None:
    """A VOC set as a folder a split, without lists."""
    shutil.rmtree(root / "ImageSets")
    (root / "train").mkdir()
    for name in ("JPEGImages", "Annotations"):
        (root / name).rename(root / "train" / name)


def xml(content: str | bytes) -> Spoil:
    return write("Annotations/a.xml", content)


def box(xmin: object, ymin: object, xmax: object, ymax: object) -> Spoil:
    return xml(voc_xml([("dog", (xmin, ymin, xmax, ymax)), *DOG]))  # type: ignore[list-item]


def listing(content: bytes) -> Spoil:
    return write("ImageSets/Main/train.txt", content)


def instances(content: str | bytes) -> Spoil:
    return write("annotations/instances_train.json", content)


def edit(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def apply(root: Path) -> None:
        path = root / "annotations" / "instances_train.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


def image_entry(position: int, **changes: object) -> Spoil:
    return edit(lambda data: data["images"][position].update(changes))


def second(**changes: object) -> Spoil:
    """Change the second annotation."""
    return edit(lambda data: data["annotations"][1].update(changes))


def boxes(numbers: list[float]) -> Spoil:
    """Nothing but six boxes of these numbers in a COCO file."""
    return edit(lambda data: data.update(annotations=[{**data["annotations"][0], "bbox": numbers}] * 6))


def labels(content: str | bytes) -> Spoil:
    return write("labels/train/a.txt", content)


def rename_label(name: str) -> Spoil:
    return lambda root: (root / "labels/train/a.txt").rename(root / "labels/train" / name)


def data_yaml(content: str) -> Spoil:
    return write("data.yaml", content)


def list_file(content: str | bytes) -> Spoil:
    return both(write("t.txt", content), data_yaml("train: t.txt\nnames: [dog]"))


def image(form: str, change: Spoil) -> Spoil:
    folder = {"voc": "JPEGImages", "coco": "train", "yolo": "images/train"}[form]
    return lambda root: change(root / folder / "a.png")


def obj(*lines: str) -> str:
    return "\n".join(["<annotation>", "<object>", *lines, "</object></annotation>"])


NESTED = "<annotation><objects>\n<object><name>dog</name></object></objects></annotation>"
LAUGHS = (
    '<!DOCTYPE a [<!ENTITY l "ha"><!ENTITY m "&l;&l;&l;">]><annotation><object><name>&m;</name></object></annotation>'
)
OUTSIDE = '<!DOCTYPE a [<!ENTITY l SYSTEM "file:///etc/passwd">]><annotation>&l;</annotation>'
KLINGON = "<?xml version='1.0' encoding='klingon'?><annotation/>"
DEEP = "<annotation>" + "<a>" * 5000 + "</a>" * 5000 + "</annotation>"
ALL_BYTES = bytes(range(256))
NAN, INF = float("nan"), float("inf")
STALE = {
    "schema": "edgekd.dataset/1",
    "class_names": [],
    "category_ids": None,
    "images": {"train": {"a": {"objects": 3, "difficult": [0], "crowd": []}}},
}

INFINITE = json.dumps({**STALE, "category_ids": {"dog": float("inf")}})

VOC_CASES = {
    "cut": Case("voc", xml("<annotation><object><name>dog"), "bad-annotation", "a.xml:1"),
    "blank": Case("voc", xml(" "), "bad-annotation", "a.xml"),
    "of zero bytes": Case("voc", xml(b""), "bad-annotation", "a.xml"),
    "binary": Case("voc", xml(ALL_BYTES), "bad-annotation", "a.xml:1"),
    "not utf-8": Case("voc", xml(b"<annotation>\n\xff</annotation>"), "bad-annotation", "a.xml:2"),
    "no encoding declared": Case(
        "voc", xml("<annotation>é</annotation>".encode("latin-1")), "bad-annotation", "12 is no UTF-8"
    ),
    "declared encoding broken": Case(
        "voc", xml(b"<?xml version='1.0' encoding='gbk'?><a>\xff\xff</a>"), "bad-annotation", "gbk"
    ),
    "unknown encoding": Case("voc", xml(KLINGON), "bad-annotation", "a.xml:1"),
    "other root": Case("voc", xml("<html></html>"), "bad-annotation", "a.xml:1"),
    "entities": Case("voc", xml(LAUGHS), "bad-annotation", "a.xml:1"),
    "external entity": Case("voc", xml(OUTSIDE), "bad-annotation", "a.xml:1"),
    "undeclared entity": Case("voc", xml("<annotation>&nope;</annotation>"), "bad-annotation", "a.xml:1"),
    "nested deeply": Case("voc", xml(DEEP), "bad-annotation", "a.xml:1"),
    "no box": Case("voc", xml(obj("<name>dog</name>")), "bad-annotation", "a.xml:2"),
    "objects within others": Case("voc", xml(NESTED), "bad-annotation", "a.xml:2: <object> within <objects>"),
    "objects in other letters": Case(
        "voc", xml(obj().replace("object", "Object")), "bad-annotation", "a.xml:2: <Object> within <annotation>"
    ),
    "two boxes": Case(
        "voc", xml(voc_xml(DOG).replace("</bndbox>", "</bndbox><bndbox/>")), "bad-annotation", "more than one <bndbox>"
    ),
    "no name": Case("voc", xml(obj("<bndbox/>")), "bad-annotation", "a.xml:2"),
    "empty name": Case("voc", xml(obj("<name> </name>")), "bad-annotation", "a.xml:3"),
    "no corner": Case("voc", xml(obj("<name>dog</name>", "<bndbox/>")), "bad-annotation", "a.xml:4"),
    "words": Case("voc", box("one", 2, 3, 4), "bad-annotation", "a.xml:5"),
    "text for a box": Case("voc", xml(obj("<name>dog</name>", "<bndbox>x</bndbox>")), "bad-annotation", "a.xml:4"),
    "difficult of words": Case(
        "voc", xml(voc_xml(DOG, extra="<difficult>so</difficult>")), "bad-annotation", "a.xml:6"
    ),
    "nan": Case("voc", box("nan", 2, 30, 20), "non-finite-box", "a.xml:5"),
    "infinite": Case("voc", box(1, 2, "1e999", 20), "non-finite-box", "a.xml:5"),
    "inverted": Case("voc", box(30, 3, 2, 20), "inverted-box", "a.xml:5"),
    "outside": Case("voc", box(100, 3, 200, 20), "outside-box", "a.xml:5"),
    "overhang": Case("voc", box(-9, 3, 20, 20), "clipped-box", "a.xml:5"),
    "empty": Case("voc", box(5, 5, 4, 20), "empty-box", "a.xml:5"),
    "one pixel": Case("voc", box(5, 5, 5, 5), "tiny-box", "a.xml:5"),
    "twice": Case("voc", box(*DOG[0][1]), "duplicate-box", "a.xml:10"),
    "other size": Case("voc", xml(voc_xml(DOG, hw=(400, 600))), "size-mismatch", "a.xml"),
    "turned size": Case("voc", xml(voc_xml(DOG, hw=(60, 40))), "size-mismatch", "a.xml"),
    "zero size": Case("voc", xml(voc_xml(DOG, hw=(0, 0))), "no-size", "a.xml"),
    "no xml": Case("voc", lambda root: (root / "Annotations" / "a.xml").unlink(), "missing-annotation", "train.txt:1"),
    "a folder": Case("voc", folder_instead("Annotations/a.xml"), "missing-annotation", "train.txt:1"),
    "absent in list": Case("voc", listing(b"a\r\n\r\nb\r\nzzz\r\n"), "missing-annotation", "train.txt:4"),
    "long in list": Case("voc", listing(b"a\nb\n" + b"x" * 5000), "missing-annotation", "train.txt:3"),
    "bytes in list": Case("voc", listing(b"a\nb\n\xff\xfe\x00x\n"), "missing-annotation", "train.txt:3"),
    "binary list": Case("voc", listing(ALL_BYTES), "missing-annotation", "train.txt"),
    "empty list": Case("voc", listing(b""), "empty-split", ""),
    "twice in list": Case("voc", listing(b"a\nb\na\n"), "repeated-image", "train.txt:3"),
    "no image": Case("voc", image("voc", Path.unlink), "missing-image", "train.txt:1"),
    "two images": Case(
        "voc", image("voc", lambda path: shutil.copy(path, path.with_suffix(".jpg"))), "ambiguous-image", "a.xml"
    ),
    "image of another annotation": Case(
        "voc",
        xml(voc_xml(DOG).replace("<size>", "<filename>b.png</filename><size>")),
        "ambiguous-image",
        "another image",
    ),
    "image of two annotations": Case(
        "voc",
        both(image("voc", Path.unlink), xml(voc_xml(DOG).replace("<size>", "<filename>b.png</filename><size>"))),
        "shared-image",
        "b.xml: b.png is the image of a.xml as well",
    ),
    "image of no annotation": Case(
        "voc",
        both(folders_for_splits, lambda root: picture(root / "train" / "JPEGImages" / "new.png")),
        "unannotated-image",
        "new.png",
    ),
    "shares": Case(
        "voc",
        both(*(write(f"Annotations/{name}.xml", voc_xml([("dog", (0.1, 0.1, 0.5, 0.9))])) for name in "ab")),  # type: ignore[list-item]
        "boxes-as-shares",
        "all 2 boxes",
    ),
    "names alike to the eye": Case(
        "voc",
        xml(voc_xml([("K\u00e4fer", (2, 3, 30, 20)), ("Ka\u0308fer", (3, 3, 9, 9))])),
        "alike-classes",
        "are two classes",
    ),
    "names alike": Case("voc", xml(voc_xml([*DOG, ("Dog ", (3, 3, 9, 9))])), "alike-classes", "'Dog' and 'dog'"),
    "sidecar": Case("voc", write("edgekd.json", "[]"), "bad-layout", "edgekd.json"),
}

JSON = "instances_train.json"
COCO_CASES = {
    "cut": Case("coco", instances('{"images": [\n{"id": 1'), "bad-annotation", f"{JSON}:2"),
    "of zero bytes": Case("coco", instances(b""), "bad-annotation", JSON),
    "binary": Case("coco", instances(ALL_BYTES), "bad-annotation", JSON),
    "a list": Case("coco", instances("[]"), "bad-annotation", JSON),
    "nested deeply": Case("coco", instances("[" * 100_000), "bad-annotation", JSON),
    "no images": Case("coco", edit(lambda data: data.pop("images")), "bad-annotation", JSON),
    "null annotations": Case("coco", edit(lambda data: data.update(annotations=None)), "bad-annotation", JSON),
    "categories of words": Case("coco", edit(lambda data: data.update(categories=["dog"])), "bad-layout", JSON),
    "category id twice": Case(
        "coco", edit(lambda data: data["categories"].append({"id": 5, "name": "cat"})), "bad-layout", JSON
    ),
    "category name twice": Case(
        "coco",
        edit(lambda data: data["categories"].insert(0, {"id": 0, "name": "dog"})),
        "repeated-category",
        "0 and 5",
    ),
    "corners for sizes": Case(
        "coco",
        edit(
            lambda data: data["annotations"].extend(
                {**data["annotations"][0], "bbox": [30, 9, 50, 30]} for _ in "12345"
            )
        ),
        "boxes-of-other-numbers",
        "5 of 7 boxes reach beyond their image, and none does if the numbers are left, top, right, bottom; this",
    ),
    "centre for corner": Case(
        "coco", boxes([50, 30, 18, 18]), "boxes-of-other-numbers", "if the numbers are centre, width, height"
    ),
    "y before x": Case("coco", boxes([3, 50, 9, 5]), "boxes-of-other-numbers", "if the numbers are y before x"),
    "image id twice": Case("coco", image_entry(1, id=1), "duplicate-id", "images[1] (id 1)"),
    "image id twice, as text": Case("coco", image_entry(1, id="1"), "duplicate-id", "images[1] (id 1)"),
    "own id twice": Case("coco", image_entry(1, edgekd_id="1"), "duplicate-id", "images[1] (id 2)"),
    "image id null": Case("coco", image_entry(1, id=None), "bad-annotation", "images[1]"),
    "image name null": Case("coco", image_entry(1, file_name=None), "bad-annotation", "images[1]"),
    "image a number": Case("coco", edit(lambda data: data["images"].append(7)), "bad-annotation", "images[2]"),
    "image name with NUL": Case("coco", image_entry(1, file_name="a\0b"), "missing-image", "images[1]"),
    "image name too long": Case("coco", image_entry(1, file_name="a" * 5000), "missing-image", "images[1]"),
    "image name surrogate": Case("coco", image_entry(1, file_name="\ud800.png"), "missing-image", "images[1]"),
    "annotation id twice": Case("coco", second(id=1), "repeated-annotation-id", "annotations[1] (id 1)"),
    "annotation of no image": Case("coco", second(image_id=99), "orphan-annotation", "annotations[1] (id 2)"),
    "annotation a number": Case("coco", edit(lambda data: data["annotations"].append(7)), "bad-annotation", "ions[2]"),
    "unknown category": Case("coco", second(category_id=99), "unknown-class", "annotations[1] (id 2)"),
    "category of words": Case("coco", second(category_id="dog"), "bad-annotation", "annotations[1]"),
    "no bbox": Case("coco", second(bbox=None), "bad-annotation", "annotations[1]"),
    "mask without a box": Case(
        "coco", second(bbox=None, segmentation={"counts": "a", "size": [40, 60]}), "bad-annotation", "mask.toBbox"
    ),
    "bbox of three": Case("coco", second(bbox=[1, 2, 3]), "bad-annotation", "annotations[1]"),
    "bbox of words": Case("coco", second(bbox=["1", 2, 3, 4]), "bad-annotation", "annotations[1]"),
    "bbox of a huge integer": Case("coco", second(bbox=[1, 2, 3, 10**400]), "bad-annotation", "annotations[1]"),
    "nan": Case("coco", second(bbox=[NAN, 2, 3, 4]), "non-finite-box", "annotations[1]"),
    "infinite": Case("coco", second(bbox=[1, 2, INF, 4]), "non-finite-box", "annotations[1]"),
    "negative": Case("coco", second(bbox=[10, 2, -3, 4]), "inverted-box", "annotations[1]"),
    "no area": Case("coco", second(bbox=[10, 2, 0, 4]), "empty-box", "annotations[1]"),
    "outside": Case("coco", second(bbox=[-10, 2, 4, 4]), "outside-box", "annotations[1]"),
    "iscrowd of words": Case("coco", second(iscrowd="yes"), "bad-annotation", "annotations[1]"),
    "iscrowd a list": Case("coco", second(iscrowd=[]), "bad-annotation", "annotations[1]"),
    "resized without its boxes": Case(
        "coco",
        both(boxes([2, 3, 26, 15]), *(image_entry(position, width=30, height=20) for position in (0, 1))),
        "boxes-of-other-sizes",
        "2 of 2 images are of another size than their annotations say, such as a.png (30 x 20 stated, 60 x 40 here)",
    ),
    "other size": Case("coco", image_entry(0, width=61), "size-mismatch", "images[0] (id 1)"),
    "no size": Case("coco", image_entry(0, width=None), "no-size", "images[0] (id 1)"),
    "infinite size": Case("coco", image_entry(0, width=INF), "no-size", "images[0] (id 1)"),
    "image gone": Case("coco", image("coco", Path.unlink), "missing-image", "images[0] (id 1)"),
    "file twice": Case(
        "coco",
        edit(lambda data: data["images"][1].update(file_name=data["images"][0]["file_name"])),
        "shared-image",
        "images[1] (id 2)",
    ),
    "nothing": Case("coco", edit(lambda data: data.update(images=[], annotations=[])), "empty-split", ""),
    "labelled by teachers": Case(
        "coco", edit(lambda data: data.update(info={"teachers": {"y": "1"}})), "labels-of-teachers", "annotated by y"
    ),
    "no objects": Case("coco", edit(lambda data: data.update(annotations=[])), "empty-split", ""),
}

YOLO_CASES = {
    "class too large": Case("yolo", labels("0 0.5 0.5 0.5 0.5\n\n7 0.5 0.5 0.5 0.5\n"), "unknown-class", "a.txt:3"),
    "class negative": Case("yolo", labels("-1 0.5 0.5 0.5 0.5\n"), "unknown-class", "a.txt:1"),
    "class fractional": Case("yolo", labels("0.5 0.5 0.5 0.5 0.5\n"), "bad-annotation", "a.txt:1"),
    "class nan": Case("yolo", labels("nan 0.5 0.5 0.5 0.5\n"), "bad-annotation", "a.txt:1"),
    "class infinite": Case("yolo", labels("1e999 0.5 0.5 0.5 0.5\n"), "bad-annotation", "a.txt:1"),
    "class a name": Case("yolo", labels("dog 0.5 0.5 0.5 0.5\n"), "bad-annotation", "a.txt:1"),
    "four numbers": Case("yolo", labels("0 0.5 0.5 0.5\n"), "bad-annotation", "a.txt:1"),
    "six numbers": Case("yolo", labels("0 0.5 0.5 0.5 0.5 0.9\n"), "bad-annotation", "a.txt:1"),
    "commas": Case("yolo", labels("0,0.5,0.5,0.5,0.5\n"), "bad-annotation", "a.txt:1"),
    "binary": Case("yolo", labels(ALL_BYTES), "bad-annotation", "a.txt"),
    "corners for sizes": Case("yolo", labels("0 0.3 0.2 0.8 0.7\n" * 5), "boxes-beyond-images", "5 of 6 boxes"),
    "corner for centre": Case(
        "yolo",
        labels("0 0.1 0.3 0.4 0.2\n" * 5 + "0 0.5 0.5 0.1 0.1\n" * 9),
        "boxes-of-other-numbers",
        "5 of 15 boxes reach beyond their image, and none does if the numbers are left, top, width, height",
    ),
    "a folder": Case("yolo", folder_instead("labels/train/a.txt"), "bad-annotation", "a.txt"),
    "nan": Case("yolo", labels("0 nan 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5\n"), "non-finite-box", "a.txt:1"),
    "nan polygon": Case("yolo", labels("0 0.1 0.1 nan 0.1 0.5 0.5\n"), "non-finite-box", "a.txt:1"),
    "pixels": Case("yolo", labels("0 30 20 10 10\n"), "unnormalised-box", "a.txt:1"),
    "negative": Case("yolo", labels("0 0.5 0.5 -0.5 0.5\n"), "inverted-box", "a.txt:1"),
    "outside": Case("yolo", labels("0 1.5 0.5 0.5 0.5\n"), "outside-box", "a.txt:1"),
    "overhang": Case("yolo", labels("0 0.1 0.5 0.5 0.5\n"), "clipped-box", "a.txt:1"),
    "no area": Case("yolo", labels("0 0.5 0.5 0 0.5\n"), "empty-box", "a.txt:1"),
    "twice": Case("yolo", labels("0 0.5 0.5 0.5 0.5\r\n0 0.5 0.5 0.5 0.5\r\n"), "duplicate-box", "a.txt:2"),
    "label without image": Case("yolo", image("yolo", Path.unlink), "orphan-label", "a.txt"),
    "label in upper case": Case(
        "yolo", rename_label("a.TXT"), "misnamed-label", "a.TXT: the image of this label wants"
    ),
    "labels in capitals": Case(
        "yolo",
        lambda root: (root / "labels").rename(root / "Labels"),
        "unlabelled-split",
        "labels/train/a.txt: no image of",
    ),
    "images without labels": Case(
        "yolo",
        lambda root: picture(root / "images" / "train" / "c.png"),
        "sparse-labels",
        "c.txt: 1 of the 3 images of split 'train' have no label file",
    ),
    "names of another order": Case(
        "yolo",
        write("labels/train/classes.txt", "cat\ndog\n"),
        "other-names",
        "class 0 is 'cat' here, 'dog' in the data set",
    ),
    "label of another case": Case("yolo", rename_label("A.txt"), "misnamed-label", "to be called a.txt"),
    "label with the image's suffix": Case("yolo", rename_label("a.png.txt"), "misnamed-label", "a.png.txt"),
    "label of two images": Case(
        "yolo", image("yolo", lambda path: shutil.copy(path, path.with_suffix(".bmp"))), "ambiguous-image", "a.txt"
    ),
    "nothing to measure": Case(
        "yolo",
        lambda root: shutil.rmtree(root / "labels" / "val"),
        "unmeasurable-split",
        "split 'val'",
    ),
    "yaml cut": Case("yolo", data_yaml("train: images/train\nnames: [a\n"), "bad-layout", "data.yaml:3"),
    "yaml empty": Case("yolo", data_yaml(""), "bad-layout", "data.yaml"),
    "yaml a list": Case("yolo", data_yaml("- a"), "bad-layout", "data.yaml"),
    "yaml tag": Case("yolo", data_yaml("train: !!python/object/apply:os.system ['true']"), "bad-layout", "data.yaml:1"),
    "no splits": Case(
        "yolo",
        both(data_yaml("names: [dog]"), lambda root: (root / "labels").rename(root / "other")),
        "bad-layout",
        "data.yaml",
    ),
    "split a number": Case("yolo", data_yaml("train: 3\nnames: [dog]"), "bad-layout", "data.yaml"),
    "split elsewhere": Case("yolo", data_yaml("train: nowhere\nnames: [dog]"), "bad-layout", "data.yaml"),
    "split above": Case("yolo", data_yaml("train: ../..\nnames: [dog]"), "bad-layout", "data.yaml"),
    "split is the disk": Case("yolo", data_yaml("train: /\nnames: [dog]"), "bad-layout", "data.yaml"),
    "split long": Case("yolo", data_yaml("train: " + "x" * 5000 + "\nnames: [dog]"), "bad-layout", "data.yaml"),
    "split with NUL": Case("yolo", data_yaml('train: "a\\0b"\nnames: [dog]'), "bad-layout", "data.yaml"),
    "names and nc": Case("yolo", data_yaml("train: images/train\nnc: 2\nnames: [dog]"), "bad-layout", "data.yaml"),
    "names repeat": Case(
        "yolo",
        data_yaml("train: images/train\nnames: [dog, dog]"),
        "bad-layout",
        "give each class id a name of its own",
    ),
    "name no text": Case("yolo", data_yaml('train: images/train\nnames: ["\\ud800"]'), "bad-layout", "no text"),
    "name blank": Case("yolo", data_yaml('train: images/train\nnames: [" "]'), "bad-layout", "no text"),
    "split no text": Case("yolo", data_yaml('train: "\\ud800"\nnames: [dog]'), "bad-layout", "data.yaml"),
    "names gap": Case("yolo", data_yaml("train: images/train\nnames: {0: dog, 2: cat}"), "bad-layout", "data.yaml"),
    "names a word": Case("yolo", data_yaml("train: images/train\nnames: dog"), "bad-layout", "write `names: [dog]`"),
    "yaml in an old encoding": Case(
        "yolo", write("data.yaml", "train: images/train\nnames: [Käfer]".encode("cp1252")), "bad-layout", "as UTF-8"
    ),
    "no names": Case("yolo", data_yaml("train: images/train"), "bad-layout", "does not name its classes"),
    "list": Case("yolo", list_file(b"\xef\xbb\xbfimages/train/a.png\r\n\r\nnope.png"), "missing-image", "t.txt:3"),
    "long in list": Case("yolo", list_file("images/train/a.png\n" + "x" * 5000), "missing-image", "t.txt:2"),
    "binary list": Case("yolo", list_file(ALL_BYTES), "missing-image", "t.txt"),
    "twice in list": Case("yolo", list_file("images/train/a.png\n./images/train/a.png"), "repeated-image", "t.txt:2"),
    "keypoints that no yaml tells of": Case(
        "yolo",
        labels("0 0.6 0.5 0.4 0.4 0.5 0.4 0.7 0.6 0.75 0.35 0 0\n" * 8),
        "keypoints-as-polygons",
        "8 of 8 polygons of split 'train' are a box and points within it, as keypoints are: data.yaml must say so, with "
        "`kpt_shape: [4, 2]`",
    ),
    "keypoints that are seen or not": Case(
        "yolo", labels("0 0.6 0.5 0.4 0.4 0.5 0.4 1 0.7 0.6 0\n" * 8), "keypoints-as-polygons", "`kpt_shape: [2, 3]`"
    ),
    "turned by EXIF": Case("yolo", lambda root: turned(root / "images/train/a.png"), "turned-images", "turns 1 images"),
    "sidecar": Case("yolo", write("edgekd.json", "{"), "bad-layout", "edgekd.json"),
    "sidecar, infinite": Case("yolo", write("edgekd.json", INFINITE), "bad-layout", "edgekd.json"),
    "stale sidecar": Case("yolo", write("edgekd.json", json.dumps(STALE)), "stale-sidecar", "a.txt"),
}


def jpeg_with(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """The picture as a JPEG, whose bytes are changed."""

    def spoil(path: Path) -> None:
        stream = io.BytesIO()
        with Image.open(path) as whole:
            whole.convert("RGB").save(stream, "JPEG")
        path.write_bytes(change(stream.getvalue()))

    return spoil


def of_16_bits(low: int, high: int) -> Callable[[Path], object]:
    """A picture between two values, as a sensor gives it, with a dead and a hot pixel."""

    def spoil(path: Path) -> None:
        pixels = np.linspace(low, high, 40 * 60).astype(np.uint16).reshape(40, 60)
        pixels[0, 0], pixels[1, 1] = 0, 65535
        Image.fromarray(pixels).save(path)

    return spoil


def turned(path: Path) -> None:
    """Stored on its side, to be shown upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as whole:
        whole.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def heic(form: str) -> Spoil:
    return image(form, lambda path: path.rename(path.with_suffix(".HEIC")))


IMAGE_CASES: dict[str, tuple[Spoil, str, str]] = {
    "image of zero bytes": (lambda path: path.write_bytes(b""), "bad-image", "a.png"),
    "image of text": (lambda path: path.write_text("hi"), "bad-image", "a.png"),
    "image cut": (lambda path: path.write_bytes(path.read_bytes()[:900]), "broken-pixels", "a.png"),
    "half a JPEG, ended": (jpeg_with(lambda data: data[:-40] + b"\xff\xd9"), "broken-pixels", "a.png"),
    "JPEG with more in it": (
        jpeg_with(lambda data: data[:-2] + b"\x12\x34" * 20 + b"\xff\xd9"),
        "damaged-pixels",
        "extraneous",
    ),
    "JPEG with padding": (jpeg_with(lambda data: data[:-2] + bytes(40) + b"\xff\xd9"), "odd-pixels", "extraneous"),
    "image of 12 bits": (of_16_bits(0, 4000), "few-greys", "at most 16 of 256 greys in the 1"),
    "image of a thermal camera": (of_16_bits(7000, 9000), "few-greys", "at most 9 of 256 greys in the 1"),
    "image of Git LFS": (lambda path: path.write_text("version https://git-lfs"), "bad-image", "git-lfs"),
    "image again": (lambda path: shutil.copy(path, path.with_name("b.png")), "duplicate-image", "b.png"),
}

HEIC = {f"{form} photograph": Case(form, heic(form), "unread-image", "a.HEIC is of a kind") for form in ("voc", "yolo")}
BROKEN: dict[str, Case] = (
    HEIC
    | {f"{case.form} {name}": case for cases in (VOC_CASES, COCO_CASES, YOLO_CASES) for name, case in cases.items()}
    | {
        f"{form} {name}": Case(form, image(form, change), kind, where)
        for form in MAKERS
        for name, (change, kind, where) in IMAGE_CASES.items()
    }
)
