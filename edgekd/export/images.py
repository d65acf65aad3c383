"""Images as an exporter needs them: prepared one at a time, so that any number fits in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from edgekd.data.images import load_image
from edgekd.preprocess import prepare
from edgekd.types import Dataset, FloatArray, PreprocessSpec

GENERATED_IMAGES = 8
COMPARED_IMAGES = 300
"""Training images, at most, that parity and mAP are compared on."""


@dataclass(frozen=True)
class ExportData:
    """Real images for an export.

    Attributes:
        train: int8 is calibrated on some of it, and parity and mAP are compared on its last images. Calibration methods and
            layers are chosen by that mAP, so the images of reported figures must not take part in it.
        val: compared on where there is no `train`.
    """

    train: Dataset | None = None
    val: Dataset | None = None

    @property
    def for_parity(self) -> Dataset | None:
        """The images to compare on."""
        if self.train is None or not len(self.train):
            return self.val
        return replace(self.train, records=self.train.records[-COMPARED_IMAGES:])


class PreparedImages(Sequence[FloatArray]):
    """Image files as a detector's input tensors, each (1, 3, h, w) float32, read when asked for.

    Attributes:
        paths: the files. names: what messages call them.
    """

    def __init__(self, paths: Sequence[Path], spec: PreprocessSpec) -> None:
        self.paths, self.spec = tuple(paths), spec
        self.names = tuple(path.name for path in self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> FloatArray: ...

    @overload
    def __getitem__(self, index: slice) -> PreparedImages: ...

    def __getitem__(self, index: int | slice) -> FloatArray | PreparedImages:
        if isinstance(index, slice):
            return PreparedImages(self.paths[index], self.spec)
        return prepare(load_image(self.paths[index]), self.spec)[0]


def generated_scenes(folder: Path, count: int = GENERATED_IMAGES) -> list[Path]:
    """The image files of so many scenes, always the same, drawn into `folder`: for where there is no data."""
    from edgekd.data.scenes import make_scenes

    root = make_scenes(folder, counts={"val": count}, seed=0)
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in (".png", ".jpg"))


def generated_images(spec: PreprocessSpec) -> tuple[list[FloatArray], list[str]]:
    """A few generated scenes, prepared, with names: for a parity check where there is no data."""
    with tempfile.TemporaryDirectory(prefix="edgekd-scenes-") as folder:
        prepared = PreparedImages(generated_scenes(Path(folder)), spec)
        return list(prepared), [f"generated scene {name}" for name in prepared.names]
