"""The processes that torchrun started for one run: which one this is, and what they tell each other.

Each process ("rank") has its share of every batch. A loss that is a sum over objects divided by their number must be divided
by the number in the whole batch, or ranks with few objects would count for more than one process would let them: see
`normaliser`. Without torchrun everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from edgekd.errors import PeerError, UserError
from edgekd.torchrun import launched

PATIENCE = timedelta(hours=12)
"""How long ranks wait for one that is busy alone, such as with teachers' answers. One that has died is noticed at once."""


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if _joined() else 0


def world_size() -> int:
    """How many processes share each batch."""
    return distributed.get_world_size() if _joined() else 1


def join(on_gpu: bool) -> None:
    """Meet the other processes, if torchrun started any.

    Raises:
        UserError: something else has set WORLD_SIZE.
    """
    if not launched() or _joined():
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            "the environment speaks of several processes, but not as torchrun does",
            got=f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}",
            fix="start them with torchrun (docs/cluster.md), or `unset WORLD_SIZE` for one process",
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE, device_id=device)


def barrier() -> None:
    """Wait until every process is here."""
    if _joined():
        distributed.barrier()


@contextlib.contextmanager
def joined(on_gpu: bool) -> Iterator[None]:
    """The body together with the other processes that torchrun started, if any.

    Raises:
        PeerError: another process has died while this one waited for it.
    """
    join(on_gpu)
    try:
        yield
        if _joined():
            distributed.destroy_process_group()
    except RuntimeError as error:
        text = str(error)
        if world_size() == 1 or not (isinstance(error, distributed.DistError) or "gloo" in text.lower()):
            raise
        raise PeerError(
            f"process {rank()} of {world_size()} has lost another one of this run",
            got=text.splitlines()[0][:200],
            fix="what stopped that one is told above or in its log; the same command goes on from the last checkpoint",
        ) from error


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process does the body alone; then the others do it, and find on disk what the first one made."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def gather(value: Any) -> list[Any]:
    """Every process's (picklable) value, in the order of their numbers; tensors must be on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of each process's tensor, of equal shapes; differentiable."""
    if world_size() == 1:
        return value
    mean: Tensor = _Mean.apply(value)  # type: ignore[no-untyped-call]
    return mean


def normaliser(count: Tensor, least: float = 0.0) -> Tensor:
    """What a rank divides a sum by, so that the mean of the ranks' losses is the loss of the whole batch.

    Args:
        count: this rank's; what the sum over the whole batch is to be divided by is the sum of the ranks' counts.
        least: that the whole batch counts for at least.
    """
    return mean_over_ranks(count.detach().float()).clamp(min=least / world_size())


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


class _Mean(torch.autograd.Function):
    """A mean over ranks whose gradient is one too: a value on one rank moves the losses of all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _mean(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _mean(gradients[0])


def _mean(value: Tensor) -> Tensor:
    total = value.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total / world_size()
