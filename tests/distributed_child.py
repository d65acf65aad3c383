"""`edgekd` as torchrun starts it in the tests. With FAIL_AT=N its second process fails when it comes to step N."""

from __future__ import annotations

import os

from edgekd import train
from edgekd.cli import main
from edgekd.data.loader import Batch
from edgekd.errors import DataError

_step = train._Trainer._step


def failing(self: train._Trainer, batch: Batch, epoch: int, update: bool) -> dict[str, float]:
    if self.progress.step == int(os.environ["FAIL_AT"]):
        raise DataError("the disk of the second process is gone")
    return _step(self, batch, epoch, update)


if os.environ.get("RANK") == "1" and "FAIL_AT" in os.environ:
    train._Trainer._step = failing  # type: ignore[method-assign]
main()
