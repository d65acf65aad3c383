"""FGD: focal and global distillation.

Source: Z. Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, eq. 2-11. Focal: foreground and
background cells apart, each weighted by the teacher's spatial and channel attention; cells of a box share its weight
1 / (h w). Global: a GC block (Y. Cao et al., 2019) on each side relates pixels. Public defaults for one-stage detectors:
foreground 1e-3, background 5e-4, attention 1e-3, relation 5e-6, temperature 0.5. As in the public code, a GC block begins as
the identity. Deviations: a cell belongs to the smallest box that covers half of it, and h w counts the cells that a box has so;
and those of `LevelTerm`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from edgekd.losses.base import DistillBatch, Pair
from edgekd.losses.feature import LevelMaps, LevelTerm, Normalise, at
from edgekd.losses.levels import TapChoice
from edgekd.losses.masked import spatial_attention
from edgekd.losses.objects import cell_shares, object_maps, object_shares


class GlobalContext(nn.Module):
    """GC block: attention-pooled context through a bottleneck, added to every position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(4, channels // 2)
        self.attend = nn.Conv2d(channels, 1, 1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.norm = nn.LayerNorm([hidden, 1, 1])
        self.expand = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.expand.weight)
        assert self.expand.bias is not None
        nn.init.zeros_(self.expand.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        weights = self.attend(features).flatten(2).softmax(-1)
        context = (features.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)
        result: Tensor = features + self.expand(self.norm(self.reduce(context)).relu())
        return result


def channel_attention(features: Tensor, temperature: float) -> Tensor:
    """(B, C, H, W) to (B, C): C * softmax over channels of the positional mean of |features| / temperature."""
    energy = features.abs().mean((2, 3))
    return energy.shape[1] * (energy / temperature).softmax(1)


def focal_masks(boxes: list[Tensor], grid_hw: tuple[int, int], input_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(foreground, background), each (B, H, W): 1 / cells of the owning box inside boxes, 1 / background cells outside."""
    owner = object_maps(boxes, grid_hw, input_hw)
    return object_shares(owner), cell_shares(owner < 0)


class FGDTerm(LevelTerm):
    """Focal and global distillation.

    Args:
        pair: student and teachers.
        foreground: weight inside boxes. background: outside. attention: of the L1 between both sides' attention maps.
        relation: of the squared distance after the GC blocks. temperature: of the attentions' softmax.
        student_taps: see `LevelTerm`.
        teacher_taps: see `LevelTerm`.
        normalise: see `LevelTerm`.
    """

    name = "fgd"

    def __init__(
        self,
        pair: Pair,
        *,
        foreground: float = 1e-3,
        background: float = 5e-4,
        attention: float = 1e-3,
        relation: float = 5e-6,
        temperature: float = 0.5,
        student_taps: TapChoice = "auto",
        teacher_taps: TapChoice = "auto",
        normalise: Normalise = "channel",
    ) -> None:
        super().__init__(pair, student_taps=student_taps, teacher_taps=teacher_taps, normalise=normalise)
        self.foreground, self.background, self.attention = foreground, background, attention
        self.relation, self.temperature = relation, temperature
        self.student_context = self.per_level(GlobalContext)
        self.teacher_context = self.per_level(GlobalContext)

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> Tensor:
        """Focal + attention + global, per image."""
        student, teacher = maps.student.float(), maps.teacher.float()
        grid_hw = (student.shape[-2], student.shape[-1])
        inside, outside = focal_masks(list(batch.targets.boxes_xyxy), grid_hw, self.input_hw)
        t_space, t_channel = spatial_attention(teacher, self.temperature), channel_attention(teacher, self.temperature)
        s_space, s_channel = spatial_attention(student, self.temperature), channel_attention(student, self.temperature)
        squared = (student - teacher).pow(2) * t_space[:, None] * t_channel[:, :, None, None]
        focal = (squared * (self.foreground * inside + self.background * outside)[:, None]).sum()
        attention = functional.l1_loss(s_space, t_space, reduction="sum") + functional.l1_loss(
            s_channel, t_channel, reduction="sum"
        )
        s_context = at(self.student_context, maps.teacher_index, maps.level_index)(student)
        t_context = at(self.teacher_context, maps.teacher_index, maps.level_index)(teacher)
        relation = functional.mse_loss(s_context, t_context, reduction="sum")
        total: Tensor = (focal + self.attention * attention + self.relation * relation) / len(student)
        return total
