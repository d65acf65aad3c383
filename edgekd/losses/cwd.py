"""CWD: channel-wise knowledge distillation.

Source: C. Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, eq. 2-4: every channel's map
becomes a distribution over positions by a softmax at temperature T; KL(teacher || student), times T^2, mean over channels.
Deviation: the teacher's maps are always standardised first (see `LevelTerm`), so that one temperature carries over.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from edgekd.losses.base import DistillBatch, Pair
from edgekd.losses.feature import LevelMaps, LevelTerm
from edgekd.losses.levels import TapChoice


class CWDTerm(LevelTerm):
    """Channel-wise softmax KL over positions.

    Args:
        pair: student and teachers.
        temperature: T in the softmax over positions.
        student_taps: see `LevelTerm`.
        teacher_taps: see `LevelTerm`.
    """

    name = "cwd"

    def __init__(
        self,
        pair: Pair,
        *,
        temperature: float = 1.0,
        student_taps: TapChoice = "auto",
        teacher_taps: TapChoice = "auto",
    ) -> None:
        super().__init__(pair, student_taps=student_taps, teacher_taps=teacher_taps)
        self.temperature = temperature

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> Tensor:
        """KL over positions, mean over images and channels."""
        student, teacher = (m.flatten(2).float() / self.temperature for m in (maps.student, maps.teacher))
        kl = functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
        return kl.sum(-1).mean() * self.temperature**2
