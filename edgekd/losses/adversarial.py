"""Adversarial multi-teacher distillation of one-stage detectors.

Source: Dong et al., 2021, doi 10.1007/s10489-021-02634-6. Published: a discriminator tells teacher features from student
features while the student learns to recover the teachers'; several trained one-stage networks go into one student.
Reading (ours): L_D = mean_l BCE(D_l(T_l), 1) + BCE(D_l(phi S_l), 0);
L_S = mean_l lambda * -log D_l(phi S_l) + beta * |phi S_l - T_l|^2, each a mean over cells, and |.|^2 over channels too. Many
teachers: a discriminator per teacher (averaged), or one on the mean of their maps. D looks at each cell's feature vector and
its 3x3 surroundings.
The game is alternating (the published reading) or gradient reversal (Y. Ganin et al., 2016), where the student gets the
reversed gradient of L_D instead of -log D.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekd.errors import DistillationSetupError
from edgekd.losses.base import DistillBatch, Pair
from edgekd.losses.feature import LevelMaps, LevelTerm, Normalise, at
from edgekd.losses.levels import TapChoice
from edgekd.ranks import gather

COLLAPSE_ACCURACY = 0.98
"""Above this the discriminator has won: its gradient no longer tells the student where to go."""


class Discriminator(nn.Module):
    """Teacher or student? One logit a cell."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = min(128, max(16, channels))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, 1, H, W), positive for the teacher."""
        logits: Tensor = self.layers(features)
        return logits


class AdversarialTerm(LevelTerm):
    """Features that a discriminator cannot tell from the teachers'.

    Args:
        pair: student and teachers.
        adversarial_weight: lambda. imitation_weight: beta.
        combine: "each" gives every teacher its own adapters and discriminators, averaged by the teachers' weights;
            "mean" makes one target of their standardised maps, which then need equal channels at each level.
        game: "alternating" or "reversal".
        student_taps: see `LevelTerm`.
        teacher_taps: see `LevelTerm`.
        normalise: see `LevelTerm`.

    Raises:
        DistillationSetupError: levels do not match, or "mean" with teachers of different channels or grids.
    """

    name = "adversarial"

    def __init__(
        self,
        pair: Pair,
        *,
        adversarial_weight: float = 0.1,
        imitation_weight: float = 1.0,
        combine: Literal["each", "mean"] = "each",
        game: Literal["alternating", "reversal"] = "alternating",
        student_taps: TapChoice = "auto",
        teacher_taps: TapChoice = "auto",
        normalise: Normalise = "channel",
    ) -> None:
        super().__init__(pair, student_taps=student_taps, teacher_taps=teacher_taps, normalise=normalise)
        self.adversarial_weight, self.imitation_weight = adversarial_weight, imitation_weight
        self.combine, self.game = combine, game
        if combine == "mean":
            self._require_equal_channels(pair)
            self.adapters = self.adapters[:1]
        self.discriminators = self.per_level(Discriminator)[: len(self.adapters)]
        self._right, self._asked, self._wins = 0, 0, 0
        self._maps: list[LevelMaps] = []

    def level_maps(self, batch: DistillBatch) -> Iterator[LevelMaps]:
        """See `LevelTerm.level_maps`; of one teacher, the mean of all, with `combine` "mean". Kept for `adversary_loss`."""
        self._maps = list(self._mean_maps(batch) if self.combine == "mean" else super().level_maps(batch))
        return iter(self._maps)

    def level_loss(self, maps: LevelMaps, batch: DistillBatch) -> Tensor:
        """The student's side of the game on one level: lambda * adversarial + beta * imitation."""
        discriminator = at(self.discriminators, maps.teacher_index, maps.level_index)
        # Through detached parameters: the student's gradient passes the discriminator but must not train it.
        frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
        logits = torch.func.functional_call(discriminator, frozen, (maps.student,))
        fooling = (
            functional.softplus(-logits).mean() if self.game == "alternating" else -functional.softplus(logits).mean()
        )
        imitation = functional.mse_loss(maps.student, maps.teacher)
        return self.adversarial_weight * fooling + self.imitation_weight * imitation

    def adversary_loss(self, batch: DistillBatch) -> Tensor | None:
        """L_D on the maps that `forward` saw, detached from the student."""
        losses = []
        for maps in self._maps:
            discriminator = at(self.discriminators, maps.teacher_index, maps.level_index)
            real, fake = discriminator(maps.teacher), discriminator(maps.student.detach())
            losses.append(maps.share * (functional.softplus(-real).mean() + functional.softplus(fake).mean()))
            self._right += int((real > 0).sum()) + int((fake < 0).sum())
            self._asked += real.numel() + fake.numel()
        self._maps = []
        return torch.stack(losses).sum() if losses else None

    def adversary_parameters(self) -> Iterable[nn.Parameter]:
        """The discriminators'."""
        return self.discriminators.parameters()

    def statistics(self) -> dict[str, float]:
        """The discriminators' accuracy since the last call; 0.5 is a draw."""
        right, asked = (sum(column) for column in zip(*gather((self._right, self._asked)), strict=True))
        self._right = self._asked = 0
        if not asked:
            return {}
        accuracy = right / asked
        self._wins = self._wins + 1 if accuracy > COLLAPSE_ACCURACY else 0
        return {"discriminator_accuracy": accuracy}

    def warning(self) -> str | None:
        """Said once, when the discriminators have won for three reports in a row."""
        if self._wins != 3:
            return None
        return (
            f"the discriminators tell teacher from student in over {COLLAPSE_ACCURACY:.0%} of cells: their gradient no longer "
            "guides the student; lower adversarial_weight, or raise imitation_weight"
        )

    def _mean_maps(self, batch: DistillBatch) -> Iterator[LevelMaps]:
        for i, level in enumerate(self.levels[0]):
            raw = batch.output.taps[level.student.name]
            student = at(self.adapters, 0, i)(raw)
            mean = torch.zeros_like(student)
            for view, levels in zip(batch.teachers, self.levels, strict=True):
                # Standardised before the mean: else the teacher with the largest activations would be the mean.
                mean = mean + view.weight * self.teacher_map(view, levels[i], student)
            yield LevelMaps(batch.teachers[0], 0, i, 1.0 / len(self.levels[0]), student, raw, mean)

    def _require_equal_channels(self, pair: Pair) -> None:
        shapes = [[(level.student.name, level.teacher.channels) for level in levels] for levels in self.levels]
        if any(shape != shapes[0] for shape in shapes[1:]):
            lines = "; ".join(f"{t.name}: {s}" for t, s in zip(pair.teachers, shapes, strict=True))
            raise DistillationSetupError(
                "adversarial with combine: mean needs teachers with equal channels at each matched level",
                got=lines,
                fix="use combine: each, which gives every teacher its own discriminators",
            )
