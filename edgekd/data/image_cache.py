"""Images of a data set, decoded or resized, as many as a memory budget holds."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from edgekd.data.images import load_image
from edgekd.errors import DataError, EdgeKDError
from edgekd.preprocess import Geometry, geometry_for, resize
from edgekd.types import ImageArray, ImageRecord, PreprocessSpec


class ImageCache:
    """Decoded images, kept from first use until the budget is full, and never evicted.

    An epoch visits every image once, so evicting the least recently used would drop each image just before its next
    use; keeping whichever came first makes (budget / data set) of all reads free. Pixels are kept as decoded, never
    downscaled: a crop must see what the file holds.
    """

    def __init__(self, records: Sequence[ImageRecord], budget_bytes: int) -> None:
        self._records = records
        self._free_bytes = budget_bytes
        self._images: dict[int, ImageArray] = {}
        self._lock = threading.Lock()

    def load(self, index: int) -> ImageArray:
        """The image of a record, (H, W, 3) uint8 RGB, read-only.

        Raises:
            DataError: it cannot be read, or has another size than its record says.
        """
        cached = self._images.get(index)
        if cached is not None:
            return cached
        image = _read(self._records[index])
        with self._lock:
            if index not in self._images and image.nbytes <= self._free_bytes:
                self._free_bytes -= image.nbytes
                self._images[index] = image
        return image


class ResizedImages:
    """Images at a detector's input size, kept in memory up to a budget (an epoch asks again)."""

    def __init__(self, records: Sequence[ImageRecord], spec: PreprocessSpec, cache_mib: int) -> None:
        self.records, self.spec = records, spec
        h, w = spec.input_hw
        self.capacity = cache_mib * 2**20 // (h * w * 3)
        self._kept: dict[int, ImageArray] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[ImageArray, Geometry]:
        record = self.records[index]
        if index in self._kept:
            return self._kept[index], geometry_for(record.image_hw, self.spec)
        image, geometry = resize(load_image(record.path), self.spec)
        if len(self._kept) < self.capacity:
            self._kept[index] = image
        return image, geometry


def _read(record: ImageRecord) -> ImageArray:
    try:
        image = np.ascontiguousarray(load_image(record.path))
    except EdgeKDError:
        raise
    except Exception as error:
        raise DataError(f"{record.path}: the image cannot be read", got=f"{type(error).__name__}: {error}") from error
    if image.shape[:2] != record.image_hw:
        raise DataError(
            f"{record.path}: the image has another size than when the data set was read",
            got=f"{image.shape[1]} x {image.shape[0]} pixels",
            expected=f"{record.image_hw[1]} x {record.image_hw[0]}",
            fix="check the data set with `edgekd data check`",
        )
    image.setflags(write=False)
    return image
