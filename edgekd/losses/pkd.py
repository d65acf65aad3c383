"""PKD: Pearson correlation between feature maps.

Source: W. Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
NeurIPS 2022, eq. 3-5: both maps standardised per channel over batch and positions, then half the mean squared error, which
is 1 - r of each channel.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from edgekd.losses.base import DistillBatch
from edgekd.losses.feature import LevelMaps, LevelTerm, standardise


class PKDTerm(LevelTerm):
    """One minus the Pearson correlation of each channel, averaged."""

    name = "pkd"

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> Tensor:
        """Half the squared distance of the standardised maps."""
        return 0.5 * functional.mse_loss(standardise(maps.student), standardise(maps.teacher))
