"""Annotations of formats that are not read, told by a glance: so that they are named, and nobody takes them for none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgekd.data.layout import is_regular

_GLANCE_BYTES = 16_384
_MOST_GLANCES = 60
"""Files of one suffix that are looked into."""

_NUMBER = r"-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
_WORD = r"[^\s,]*[^\W\d_][^\s,]*"

_DATUMARO = "`datum convert -i DIR -if {} -f coco_instances -o OUT -- --save-media` of `pip install datumaro[cli]`"
_GLOBOX = "`globox convert FILE DIR/instances_all.json --format {} --save_fmt coco -A` of `pip install globox`"


@dataclass(frozen=True)
class Kind:
    """A format of annotations that is not read.

    Attributes:
        name: as its users call it.
        suffixes: of its files, lower case.
        tells: what stands in the beginning of such a file; all of them, in any order.
        not_with: what would make it another kind.
        fix: which tool writes it as COCO, VOC or YOLO; DIR is the folder, FILE the file that was seen.
    """

    name: str
    suffixes: tuple[str, ...]
    tells: tuple[str, ...]
    fix: str
    not_with: str = ""


def _lines(pattern: str) -> tuple[str]:
    """A tell: the first line that holds something is of this pattern."""
    return (rf"\A\s*(?:{pattern})\s*(?:[\r\n]|\Z)",)


KINDS = (
    Kind(
        "CVAT's XML",
        (".xml",),
        (r"<annotations[\s>]", r"<(?:image|track|meta)[\s>]"),
        f"in CVAT, export the task as COCO 1.0; or {_GLOBOX.format('cvat')} (CVAT for images)",
    ),
    Kind(
        "LabelMe's XML",
        (".xml",),
        (r"<annotation[\s>]", r"<polygon>"),
        _DATUMARO.format("label_me"),
        not_with=r"<bndbox",
    ),
    Kind(
        "rotated boxes of roLabelImg",
        (".xml",),
        (r"<annotation[\s>]", r"<robndbox>"),
        "edgekd's boxes are upright: write <bndbox> around each, with a few lines of Python",
        not_with=r"<bndbox",
    ),
    Kind(
        "LabelMe's JSON (X-AnyLabeling's too)",
        (".json",),
        (r'"shapes"\s*:', r'"(?:points|shape_type|imagePath|flags)"\s*:'),
        "`labelme2coco.py` of LabelMe's examples; or supervision's `DetectionDataset.from_labelme(...).as_coco(...)`",
    ),
    Kind(
        "CreateML's JSON",
        (".json",),
        (r'"coordinates"\s*:', r'"image(?:filename)?"\s*:', r'"label"\s*:'),
        "supervision's `DetectionDataset.from_createml(...).as_coco(...)`, or Roboflow",
    ),
    Kind(
        "Label Studio's JSON",
        (".json",),
        (r'"(?:completed_by|from_name|original_width|annotation_id|rectanglelabels)"\s*:',),
        "in Label Studio, export as COCO, Pascal VOC or YOLO (with images)",
    ),
    Kind(
        "the JSON of VGG's Image Annotator (VIA)",
        (".json",),
        (r'"regions"\s*:', r'"(?:shape_attributes|region_attributes)"\s*:'),
        f"in VIA, export annotations as COCO; or {_GLOBOX.format('via-json')}, with --img_folder",
    ),
    Kind(
        "Datumaro's JSON",
        (".json",),
        (r'"categories"\s*:\s*\{', r'"(?:dm_format_version|infos?|items)"\s*:'),
        _DATUMARO.format("datumaro"),
    ),
    Kind(
        "VoTT's JSON",
        (".json", ".vott"),
        (r'"assets?"\s*:', r'"(?:regions|format|path)"\s*:'),
        "in VoTT, export as Pascal VOC",
    ),
    Kind(
        "Supervisely's JSON",
        (".json",),
        (r'"classTitle"\s*:|"geometryType"\s*:',),
        "in Supervisely, run Export to COCO, to Pascal VOC or to YOLO",
    ),
    Kind(
        "BDD100K's JSON (Scalabel)",
        (".json",),
        (r'"box2d"\s*:',),
        "`python -m scalabel.label.to_coco -m det` of `pip install scalabel`",
    ),
    Kind(
        "COCO's captions, panoptic segments or names of images, without boxes",
        (".json",),
        (r'"(?:segments_info|caption)"\s*:|"images"\s*:',),
        "take the data set's instances_*.json",
        not_with=r'"bbox"',
    ),
    Kind("a table of Open Images", (".csv",), (r"ImageID\b.*LabelName", r"XMin"), _DATUMARO.format("open_images")),
    Kind(
        "a table with one box a line",
        (".csv", ".tsv"),
        (r"(?i)\b(?:x_?min|xmin|x1|left|bbox)\b", r"(?i)(?:class|label|name)"),
        "write it as COCO JSON, with a few lines of Python and `json`",
    ),
    Kind(
        "KITTI's txt",
        (".txt",),
        _lines(rf"{_WORD}(?: {_WORD})*(?:[ \t]+{_NUMBER}){{14,15}}"),
        _DATUMARO.format("kitti_detection"),
    ),
    Kind(
        "DOTA's txt",
        (".txt",),
        _lines(rf"imagesource:.*|gsd:.*|{_NUMBER}(?:[ \t]+{_NUMBER}){{7}}[ \t]+{_WORD}[ \t]+[012]"),
        _DATUMARO.format("dota"),
    ),
    Kind(
        "WIDER FACE's txt",
        (".txt",),
        _lines(r"\S.*\.(?:jpe?g|png|bmp)[ \t]*\r?\n[ \t]*\d+"),
        _DATUMARO.format("wider_face"),
    ),
    Kind(
        "a list of images with their boxes, as keras-yolo3 has it",
        (".txt", ".csv"),
        _lines(rf"\S.*\.(?:jpe?g|png|bmp)(?:[ \t]+{_NUMBER}(?:,{_NUMBER}){{4}})+"),
        "write each image's boxes into a .txt of its own as YOLO has them, with a few lines of Python",
    ),
    Kind(
        "MOT's gt.txt",
        (".txt",),
        _lines(rf"\d+,-?\d+(?:,{_NUMBER}){{7,8}}"),
        _DATUMARO.format("mot_seq"),
    ),
    Kind(
        "ICDAR's or VisDrone's txt",
        (".txt",),
        _lines(rf"{_NUMBER}(?:,[ \t]*{_NUMBER}){{7}}(?:,.*)?"),
        "write them as COCO JSON; FiftyOne and Datumaro know many such sets",
    ),
    Kind(
        "TensorFlow's records",
        (".tfrecord", ".tfrecords", ".record"),
        ("",),
        "`fiftyone convert` reads them and writes COCO",
    ),
    Kind("an archive", (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz"), ("",), "unpack it first"),
    Kind(
        "a binary table",
        (".parquet", ".arrow", ".npy", ".npz", ".mat", ".datum", ".pkl", ".h5"),
        ("",),
        "have the library that wrote them write COCO JSON beside the images",
    ),
)


def kind_of(path: Path) -> Kind | None:
    """The format that is not read which the file is in, as far as its beginning tells."""
    suffix = path.suffix.lower()
    kinds = [kind for kind in KINDS if suffix in kind.suffixes]
    if not kinds or not is_regular(path):
        return None
    try:
        with path.open("rb") as file:
            text = file.read(_GLANCE_BYTES).decode("utf-8-sig", "replace")
    except OSError:
        return None
    return _kind(text, kinds)


def kind_of_line(text: str) -> Kind | None:
    """The same of a line of a label file."""
    return _kind(text, [kind for kind in KINDS if ".txt" in kind.suffixes])


def _kind(text: str, kinds: Iterable[Kind]) -> Kind | None:
    for kind in kinds:
        if all(re.search(tell, text) for tell in kind.tells) and not (kind.not_with and re.search(kind.not_with, text)):
            return kind
    return None


def find_foreign(files: Iterable[Path]) -> tuple[Kind, Path] | None:
    """The first file in a format that is not read; those of suffixes that say most come first."""
    order = {suffix: position for position, kind in enumerate(KINDS) for suffix in kind.suffixes}
    counts: Counter[str] = Counter()
    for path in sorted(
        (path for path in files if path.suffix.lower() in order), key=lambda path: order[path.suffix.lower()]
    ):
        suffix = path.suffix.lower()
        counts[suffix] += 1
        if counts[suffix] <= _MOST_GLANCES and (kind := kind_of(path)):
            return kind, path
    return None
