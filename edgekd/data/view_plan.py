"""Which view of each image every epoch shows: a new one each time, or a few that come round again.

Views that come round are what makes a cache of teachers' features possible: the teacher looks at each once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from edgekd.data.views import View, sample_view, view_rng
from edgekd.recipe import AugmentConfig
from edgekd.types import Dataset, PreprocessSpec

SCHEMA = "edgekd.views/1"
"""To be raised when the same numbers begin to draw other views."""


@dataclass(frozen=True)
class ViewPlan:
    """Every view of a training run, as a pure function of (seed, epoch, image).

    Attributes:
        dataset: the images.
        augment: what views are drawn from; its last `close_mosaic_epochs` epochs go without mosaic.
        preprocess: the student's; its `resize` decides whether windows keep their aspect, its `pad_value` the fill.
        seed: of the views. epochs: how many there will be.
        views: how many looks at each image there are, shown in turn; None draws a new one each epoch.
    """

    dataset: Dataset
    augment: AugmentConfig
    preprocess: PreprocessSpec
    seed: int
    epochs: int
    views: int | None = None

    def slot(self, epoch: int) -> int:
        """The number of the set of views that an epoch (from 0) shows: equal slots are equal views."""
        late = self.augment.mosaic > 0 and epoch >= self.epochs - self.augment.close_mosaic_epochs
        turn = epoch if self.views is None else epoch % self.views
        return 2 * turn + late

    @property
    def slots(self) -> list[int]:
        """Every slot of the run, each once."""
        return sorted({self.slot(epoch) for epoch in range(self.epochs)})

    def view(self, slot: int, index: int) -> View:
        """The view of a record in a slot."""
        turn, late = divmod(slot, 2)
        h, w = self.preprocess.input_hw
        return sample_view(
            index,
            self.dataset,
            self.augment.model_copy(update={"mosaic": 0.0}) if late else self.augment,
            view_rng(self.seed, turn, self.dataset.records[index].image_id),
            aspect=None if self.preprocess.resize == "stretch" else w / h,
            fill=self.preprocess.pad_value,
        )

    def identity(self) -> dict[str, Any]:
        """What decides the views besides the data: not how many there are, so that more can be added later."""
        h, w = self.preprocess.input_hw
        return {
            "schema": SCHEMA,
            "seed": self.seed,
            "augment": self.augment.model_dump(mode="json", exclude={"close_mosaic_epochs"}),
            "aspect": None if self.preprocess.resize == "stretch" else w / h,
            "fill": self.preprocess.pad_value,
        }


def view_digest(view: View) -> int:
    """64 bits of a view's hash: what was cached for a view is used for no other."""
    text = json.dumps(view.to_dict(), sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
