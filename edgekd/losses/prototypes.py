"""Prototype generation (PGM) of GKD: a few instances of each class that describe both detectors' feature spaces.

Source: S. Tang et al., "Distilling Object Detectors With Global Knowledge", ECCV 2022, arXiv 2210.09022 (section 3.2; public
code DAVAR-Lab-ML). Published: up to 800 boxes a class above 30x30 px, pooled over the box, L2-normalised, again each epoch;
keep those above the 40th percentile of density in both spaces; joint matching pursuit picks 10 prototypes a class, the same
instances in both spaces. Reading (ours): density of an instance is its mean cosine to the others of its class; joint matching
pursuit picks, each time, the instance whose direction explains the most residual energy, the two spaces' shares added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edgekd.ranks import gather, rank, world_size


@dataclass(frozen=True)
class Prototypes:
    """Of one class: the same instances in both spaces, rows L2-normalised.

    Attributes:
        student: (n, C_s). teacher: (n, C_t). index: (n,) which instances of the bank they are.
    """

    student: Tensor
    teacher: Tensor
    index: Tensor


def density(features: Tensor) -> Tensor:
    """(N, C) L2-normalised rows to (N,): mean cosine to the other rows."""
    count = len(features)
    if count < 2:
        return features.new_ones(count)
    return ((features @ features.sum(0)) - 1.0) / (count - 1)


def dense_in_both(student: Tensor, teacher: Tensor, percentile: float) -> Tensor:
    """(N,) bool: instances whose density reaches the percentile (in [0, 100]) in both spaces."""
    keep = torch.ones(len(student), dtype=torch.bool, device=student.device)
    for features in (student, teacher):
        value = density(features)
        keep &= value >= torch.quantile(value, percentile / 100)
    return keep


def joint_matching_pursuit(student: Tensor, teacher: Tensor, count: int) -> Tensor:
    """Indices (<= count,) of instances that together describe both spaces best, greedily.

    Each step takes the instance j that maximises sum_i <R_i, x_j>^2 / sum_i |R_i|^2, summed over the two spaces, where R
    are the residuals of all instances after projecting out those taken before; never the same instance twice.
    """
    residuals = [student.clone(), teacher.clone()]
    atoms = [student, teacher]
    taken: list[int] = []
    for _ in range(min(count, len(student))):
        gain = student.new_zeros(len(student))
        for residual, atom in zip(residuals, atoms, strict=True):
            # sum_i <R_i, x_j>^2 = x_j^T (R^T R) x_j: C x C instead of N x N.
            gram = residual.T @ residual
            gain += ((atom @ gram) * atom).sum(1) / residual.pow(2).sum().clamp(min=1e-12)
        gain[taken] = -1.0
        best = int(gain.argmax())
        taken.append(best)
        for residual, atom in zip(residuals, atoms, strict=True):
            direction = residual[best] if residual[best].norm() > 1e-6 else atom[best]
            direction = functional.normalize(direction, dim=0)
            residual -= (residual @ direction)[:, None] * direction[None]
    return torch.tensor(taken, dtype=torch.int64, device=student.device)


def search_prototypes(student: Tensor, teacher: Tensor, *, count: int = 10, percentile: float = 40.0) -> Prototypes:
    """Prototypes of one class from (N, C_s) and (N, C_t) L2-normalised features of the same N instances."""
    kept = dense_in_both(student, teacher, percentile).nonzero()[:, 0]
    if not len(kept):  # the two filters may exclude each other on a handful of instances
        kept = torch.arange(len(student), device=student.device)
    chosen = kept[joint_matching_pursuit(student[kept], teacher[kept], count)]
    return Prototypes(student[chosen], teacher[chosen], chosen)


class InstanceBank:
    """Up to `capacity` instances a class of features pooled in both spaces, gathered during an epoch's steps.

    The first `capacity` instances that come along are kept: the data order is shuffled by the seed, so they are a random
    sample. Memory is bounded by classes x capacity x (C_s + C_t) floats. Each of several ranks keeps those of its own images,
    with the image's place in the epoch, so that together they have what one process would have kept (`state`).
    """

    def __init__(self, num_classes: int, capacity: int) -> None:
        self.capacity = capacity
        self._rows: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(num_classes)]

    def add(self, label: int, student: Tensor, teacher: Tensor, place: int) -> None:
        """Keep one instance, (C_s,) and (C_t,) L2-normalised, unless the class is full; `place` never falls."""
        rows = self._rows[label]
        if len(rows) < self.capacity:
            rows.append((place, student.detach(), teacher.detach()))

    def clear(self) -> None:
        """Forget everything: a new epoch begins."""
        for rows in self._rows:
            rows.clear()

    def state(self) -> dict[str, list[Tensor]]:
        """All ranks' instances, class -> [places (N,), (N, C_s), (N, C_t)] on the CPU; called by all ranks."""
        own = {str(label): _stacked(rows) for label, rows in enumerate(self._rows) if rows}
        shares = gather(own)
        together = {}
        for label in map(str, range(len(self._rows))):
            parts = [share[label] for share in shares if label in share]
            if parts:
                columns = [torch.cat(column) for column in zip(*parts, strict=True)]
                order = columns[0].argsort(stable=True)[: self.capacity]
                together[label] = [column[order] for column in columns]
        return together

    def load(self, state: dict[str, list[Tensor]], device: torch.device) -> None:
        """Inverse of `state`: each rank takes its own images' instances."""
        self.clear()
        for label, (places, student, teacher) in state.items():
            rows = zip(places.tolist(), student.to(device), teacher.to(device), strict=True)
            self._rows[int(label)] = [row for row in rows if row[0] % world_size() == rank()]


def _stacked(rows: list[tuple[int, Tensor, Tensor]]) -> list[Tensor]:
    places, students, teachers = zip(*rows, strict=True)
    return [torch.tensor(places), torch.stack(students).cpu(), torch.stack(teachers).cpu()]
