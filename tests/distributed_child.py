"""`edgekd` as the distributed tests start it: in double precision, and failing where FAIL_AT=N says.

An untrained network with BatchNorm on cells of four values multiplies rounding: in single precision a change of 1e-7 in the
images moves its gradients by 3 %, so that nothing tight could be said of two processes. In double precision it can.
FAIL_AT makes the second process fail when it comes to step N.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from edgekd.cli import main
from edgekd.data.loader import Batch
from edgekd.errors import DataError
from edgekd.training import train

_from_numpy = torch.from_numpy
_step = train._Trainer._step


def failing(self: train._Trainer, batch: Batch, epoch: int, update: bool) -> dict[str, float]:
    if self.progress.step == int(os.environ["FAIL_AT"]):
        raise DataError("the disk of the second process is gone")
    return _step(self, batch, epoch, update)


def from_numpy(array: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
    tensor = _from_numpy(array)
    return tensor.double() if tensor.is_floating_point() else tensor


torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
torch.from_numpy, torch.float32 = from_numpy, torch.float64
if os.environ.get("RANK") == "1" and "FAIL_AT" in os.environ:
    train._Trainer._step = failing  # type: ignore[method-assign]
main()
