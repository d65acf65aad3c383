"""Small data sets in the three layouts, for the tests of `edgekd.data`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

Box = tuple[float, float, float, float]
Objects = Sequence[tuple[str, Box]]


def picture(path: Path, hw: tuple[int, int] = (40, 60), seed: int | None = None) -> Path:
    """A random RGB picture, different for every path unless the seed says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(
        seed if seed is not None else list(path.name.encode()) + list(path.parent.name.encode())
    )
    Image.fromarray(rng.integers(0, 256, (*hw, 3), np.uint8)).save(path)
    return path


def voc_xml(objects: Objects, hw: tuple[int, int] = (40, 60), extra: str = "") -> str:
    """VOC's own numbers: counted from 1, both ends included."""
    lines = ["<annotation>", f"<size><width>{hw[1]}</width><height>{hw[0]}</height><depth>3</depth></size>"]
    for name, (xmin, ymin, xmax, ymax) in objects:
        box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
        lines += ["<object>", f"<name>{name}</name>", f"<bndbox>{box}</bndbox>", extra, "</object>"]
    return "\n".join([*lines, "</annotation>"])


def make_voc(root: Path, splits: Mapping[str, Mapping[str, Objects]], suffix: str = ".png") -> Path:
    for split, images in splits.items():
        lists = root / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
        for stem, objects in images.items():
            picture(root / "JPEGImages" / f"{stem}{suffix}")
            (root / "Annotations").mkdir(exist_ok=True)
            (root / "Annotations" / f"{stem}.xml").write_text(voc_xml(objects))
    return root


def make_coco(root: Path, splits: Mapping[str, Mapping[str, Objects]], categories: Mapping[str, int]) -> Path:
    """Boxes are [x, y, w, h]."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        data: dict[str, list[dict[str, object]]] = {"images": [], "annotations": [], "categories": []}
        data["categories"] = [{"id": identity, "name": name} for name, identity in categories.items()]
        for number, (stem, objects) in enumerate(images.items(), 1):
            picture(root / split / f"{stem}.png")
            data["images"].append({"id": number, "file_name": f"{stem}.png", "height": 40, "width": 60})
            for name, box in objects:
                entry = {"id": len(data["annotations"]) + 1, "image_id": number, "category_id": categories[name]}
                data["annotations"].append({**entry, "bbox": list(box), "iscrowd": 0, "area": 1})
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root


def make_yolo(root: Path, splits: Mapping[str, Mapping[str, Sequence[str]]], names: Sequence[str]) -> Path:
    """Objects are whole lines."""
    for split, images in splits.items():
        for stem, lines in images.items():
            picture(root / "images" / split / f"{stem}.png")
            label = root / "labels" / split / f"{stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("".join(f"{line}\n" for line in lines))
    data = {**{split: f"images/{split}" for split in splits}, "nc": len(names), "names": list(names)}
    (root / "data.yaml").write_text(yaml.safe_dump(data))
    return root
