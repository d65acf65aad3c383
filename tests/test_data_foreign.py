"""Annotations of formats that are not read: named, with the tool that converts them; never background, never another set."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.data import detect_format
from edgekd.data.check import check_dataset
from edgekd.errors import DataError
from tests.data_layouts import picture, voc_xml

CVAT = '<?xml version="1.0"?><annotations><version>1.1</version><image name="a.png"><box label="cat"/></image></annotations>'
LABELME = "<annotation><filename>a.png</filename><object><name>cat</name><polygon><pt/></polygon></object></annotation>"
KITTI = "Car 0.00 0 -1.58 1.00 2.00 30.00 20.00 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59\n"
DOTA = "imagesource:GoogleEarth\ngsd:0.14\n1 1 9 1 9 9 1 9 ship 0\n"
OPEN_IMAGES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\na,x,/m/1,1,0.1,0.2,0.1,0.2\n"
DATUMARO = "datum convert -i {root} -if"

FOREIGN: dict[str, tuple[str, str, str, str]] = {
    "CVAT": ("annotations.xml", CVAT, "CVAT's XML", "in CVAT, export the task as COCO"),
    "CVAT, in annotations": ("annotations/a.xml", CVAT, "CVAT's XML", "globox convert {root}/annotations/a.xml"),
    "LabelMe, XML": ("Annotations/a.xml", LABELME, "LabelMe's XML", f"{DATUMARO} label_me"),
    "roLabelImg": (
        "Annotations/a.xml",
        LABELME.replace("polygon>", "robndbox>"),
        "rotated boxes of roLabelImg",
        "upright",
    ),
    "LabelMe": ("images/a.json", '{"version": "5.5.0", "flags": {}, "shapes": []}', "LabelMe's JSON", "labelme2coco"),
    "CreateML": (
        "train/_annotations.createml.json",
        '[{"image": "a.png", "annotations": [{"label": "cat", "coordinates": {"x": 1}}]}]',
        "CreateML's JSON",
        "from_createml",
    ),
    "Label Studio": ("tasks.json", '[{"id": 1, "annotations": [{"completed_by": 1}]}]', "Label Studio's", "export as"),
    "VIA": ("via.json", '{"a.png1": {"regions": [{"shape_attributes": {}}]}}', "(VIA)", "--format via-json"),
    "Datumaro": ("annotations/train.json", '{"infos": {}, "categories": {}, "items": []}', "Datumaro's", DATUMARO),
    "captions": (
        "annotations/captions_val2017.json",
        '{"images": [], "annotations": [{"caption": "a"}]}',
        "COCO's captions",
        "instances_*.json",
    ),
    "Open Images": ("train-annotations-bbox.csv", OPEN_IMAGES, "a table of Open Images", f"{DATUMARO} open_images"),
    "a table": ("labels.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\n", "one box a line", "COCO JSON"),
    "KITTI": ("label_2/a.txt", KITTI, "KITTI's txt", f"{DATUMARO} kitti_detection"),
    "KITTI in labels": ("labels/a.txt", KITTI, "KITTI's txt", f"{DATUMARO} kitti_detection"),
    "KITTI beside": ("images/a.txt", KITTI, "KITTI's txt", f"{DATUMARO} kitti_detection"),
    "DOTA": ("labelTxt/a.txt", DOTA, "DOTA's txt", f"{DATUMARO} dota"),
    "WIDER FACE": ("wider_face_train_bbx_gt.txt", "0--Parade/a.png\n1\n1 1 9 9 0 0 0 0 0 0\n", "WIDER FACE", DATUMARO),
    "keras-yolo3": ("train.txt", "images/a.png 1,2,30,20,0 4,5,9,9,1\n", "a list of images with their boxes", ".txt"),
    "MOT": ("gt/gt.txt", "1,-1,68.0,31.0,21.0,16.0,1,3,1.0\n", "MOT's gt.txt", f"{DATUMARO} mot_seq"),
    "VisDrone": ("annotations/a.txt", "684,8,273,116,0,0,0,0\n", "VisDrone's txt", "FiftyOne"),
    "a record": ("train.tfrecord", "\0", "TensorFlow's records", "fiftyone convert"),
    "an archive": ("labels.zip", "PK", "an archive", "unpack it"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_it_is_named_with_the_tool_that_converts_it(tmp_path: Path, name: str) -> None:
    place, content, kind, tool = FOREIGN[name]
    picture(tmp_path / "images" / "a.png")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(content)
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 2
    with pytest.raises(DataError) as refused:
        detect_format(tmp_path)
    assert kind in str(refused.value.got)
    assert place in str(refused.value.got)
    assert tool.format(root=tmp_path) in str(refused.value.fix)


def test_what_lies_beside_a_data_set_does_not_make_it_foreign(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages" / "a.png")
    for name, content in (("0.xml", CVAT), ("a.xml", voc_xml([("cat", (1, 1, 9, 9))]))):
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / "Annotations" / name).write_text(content)
    (tmp_path / "more.zip").write_text("PK")
    assert detect_format(tmp_path) == "voc"
    assert "0.xml:1: the root element is <annotations>" in check_dataset(tmp_path).text()


def test_a_line_of_another_format_is_named_in_a_yolo_set(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "train" / "a.png")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "a.txt").write_text(KITTI)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [Car]\n")
    assert "a.txt:1: not all numbers; it looks like KITTI's txt" in check_dataset(tmp_path).text()
