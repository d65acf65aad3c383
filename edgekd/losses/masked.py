"""Masked feature generation: MGD (random mask) and AMD (mask by the teacher's attention, with a channel gate).

Sources: Z. Yang et al., "Masked Generative Distillation", ECCV 2022 (MGD): alpha |G(mask * align(S)) - T|^2 / B with
G = conv3x3, ReLU, conv3x3; public code masks a share of 0.65 for one-stage detectors, alpha 2e-5. "AMD: Adaptive Masked
Distillation for Object Detection", arXiv 2301.13538 (AMD): the mask follows the teacher's spatial attention, and a small
gate makes the student's channels adaptive.
Reading (ours): the mask drops the quarter of cells of highest attention mean_c |T|, a share, so that one setting carries over
between models (the temperature of the paper's softmax over positions changes no order, so there is none here); the gate is
squeeze-and-excitation, reduction 4. Deviation of both: see `LevelTerm`; where that standardises T, attention is that of the
standardised map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.errors import DistillationSetupError
from edgekd.losses.base import DistillBatch, Pair
from edgekd.losses.feature import LevelMaps, LevelTerm, Normalise, at
from edgekd.losses.levels import TapChoice
from edgekd.ranks import rank, world_size


class GenerationBlock(nn.Module):
    """conv3x3, ReLU, conv3x3: rebuilds a teacher's map from a masked student's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        result: Tensor = self.second(self.first(features).relu())
        return result


class ChannelGate(nn.Module):
    """Squeeze-and-excitation (J. Hu et al., CVPR 2018): a weight in (0, 1) for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(4, channels // 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) scaled channel by channel."""
        weights = torch.sigmoid(self.excite(self.squeeze(features.mean((2, 3))).relu()))
        return features * weights[:, :, None, None]


def spatial_attention(features: Tensor, temperature: float) -> Tensor:
    """(B, C, H, W) to (B, H, W): HW * softmax over positions of the channel mean of |features| / temperature."""
    energy = features.abs().mean(1).flatten(1)
    return (energy.shape[1] * (energy / temperature).softmax(1)).view(-1, *features.shape[-2:])


def attention_mask(features: Tensor, share: float) -> Tensor:
    """(B, 1, H, W) of 0 and 1: 0 on the round(share * HW) cells of highest attention of each image."""
    attention = features.abs().mean(1).flatten(1)
    count = round(share * attention.shape[1])
    mask = torch.ones_like(attention)
    mask.scatter_(1, attention.topk(count, dim=1).indices, 0.0)
    return mask.view(-1, 1, *features.shape[-2:])


def random_mask(features: Tensor, share: float) -> Tensor:
    """(B, 1, H, W) of 0 and 1: each cell is 0 with probability `share`."""
    b, _, h, w = features.shape
    # Drawn for the whole batch on every rank, which keeps its own images' rows: the masks of one process.
    kept = torch.rand(b * world_size(), 1, h, w, device=features.device)[rank() :: world_size()] >= share
    return kept.to(features.dtype)


class MGDTerm(LevelTerm):
    """Masked generative distillation: rebuild the teacher's map from a randomly masked student's.

    Args:
        pair: student and teachers.
        masked_share: share of cells that are dropped.
        student_taps: see `LevelTerm`.
        teacher_taps: see `LevelTerm`.
        normalise: see `LevelTerm`.
    """

    name = "mgd"

    def __init__(
        self,
        pair: Pair,
        *,
        masked_share: float = 0.65,
        student_taps: TapChoice = "auto",
        teacher_taps: TapChoice = "auto",
        normalise: Normalise = "channel",
    ) -> None:
        super().__init__(pair, student_taps=student_taps, teacher_taps=teacher_taps, normalise=normalise)
        if not 0 < masked_share < 1:
            raise DistillationSetupError(f"{self.name}: masked_share", got=masked_share, expected="between 0 and 1")
        self.masked_share = masked_share
        self.generators = self.per_level(GenerationBlock)

    def mask(self, maps: LevelMaps) -> Tensor:
        """Which cells stay, (B, 1, H, W)."""
        return random_mask(maps.student, self.masked_share)

    def gated(self, maps: LevelMaps) -> Tensor:
        """The student's map as the generation block gets it, before the mask."""
        return maps.student

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> Tensor:
        """Squared distance of the rebuilt map, summed over cells and channels, per image."""
        generator = at(self.generators, maps.teacher_index, maps.level_index)
        rebuilt: Tensor = generator(self.gated(maps) * self.mask(maps))
        return (rebuilt - maps.teacher).float().pow(2).sum() / len(rebuilt)


class AMDTerm(MGDTerm):
    """Adaptive masked distillation: the mask hides what the teacher attends to most, and a gate adapts the channels.

    Args:
        pair: student and teachers.
        masked_share: share of cells, those of highest teacher attention, that are dropped. Not MGD's 0.65: those would be
            all the objects' cells, and what is left tells the generation block nothing of them (measured: benchmarks/).
        student_taps: see `LevelTerm`.
        teacher_taps: see `LevelTerm`.
        normalise: see `LevelTerm`.
    """

    name = "amd"

    def __init__(
        self,
        pair: Pair,
        *,
        masked_share: float = 0.25,
        student_taps: TapChoice = "auto",
        teacher_taps: TapChoice = "auto",
        normalise: Normalise = "channel",
    ) -> None:
        super().__init__(
            pair,
            masked_share=masked_share,
            student_taps=student_taps,
            teacher_taps=teacher_taps,
            normalise=normalise,
        )
        self.gates = self.per_level(ChannelGate)

    def mask(self, maps: LevelMaps) -> Tensor:
        """0 on the cells of highest teacher attention."""
        return attention_mask(maps.teacher, self.masked_share)

    def gated(self, maps: LevelMaps) -> Tensor:
        """The student's map with its channels weighted."""
        result: Tensor = at(self.gates, maps.teacher_index, maps.level_index)(maps.student)
        return result
