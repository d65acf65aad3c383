"""The pictures that everything is timed on, as JPEG bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgekd.data import read_dataset
from edgekd.data.images import load_image
from edgekd.data.scenes import make_scenes

LATENCY_IMAGES = 32


@dataclass(frozen=True)
class Pictures:
    """JPEG bytes to time on, and the data set behind them, if there is one."""

    jpegs: list[bytes]
    source: str
    dataset: Any = None


def gather_pictures(out: Path, data: Path | None, split: str) -> Pictures:
    """A split's pictures, or generated ones, evenly chosen."""
    if data is not None:
        dataset = read_dataset(data, split)
        paths = [record.path for record in dataset.records]
        source = f"{data.resolve().name} {split}"
    else:
        root = make_scenes(out / "scenes", counts={"val": LATENCY_IMAGES}, image_hw=(375, 500))
        dataset, paths, source = None, sorted(root.rglob("*.png")), "generated scenes, 500 x 375"
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(LATENCY_IMAGES, len(paths))).round().astype(int))
    return Pictures([as_jpeg(paths[i]) for i in chosen], source, dataset)


def as_jpeg(path: Path) -> bytes:
    """The file's own bytes if it is a JPEG, otherwise one made of it (quality 90)."""
    data = path.read_bytes()
    if data.startswith(b"\xff\xd8"):
        return data
    image = cv2.cvtColor(load_image(path), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
