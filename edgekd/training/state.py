"""The whole state of a run, in one file: a run that was cut off goes on from it, step for step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from edgekd import ranks
from edgekd.artifact import MANIFEST_NAME, atomic_path, leftovers_of, read_manifest, sha256_json
from edgekd.checkpoint import BEST_FILE, DETECTOR_SCHEMA, LAST_FILE, MODEL_FILE, STATE_SCHEMA, read_payload
from edgekd.errors import ArtifactError
from edgekd.training.learning import LearningStep, PullGuard


@dataclass
class Progress:
    """How far a run is: epochs finished, batches of the present one, optimiser steps, and what was measured of the weights
    that would ship now.

    `bf16_until` is the step whose gradient was not finite in bf16: from there on the run goes in single precision.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -1.0
    metrics: dict[str, Any] = field(default_factory=dict)
    bf16_until: int | None = None


@dataclass
class RunState:
    """Everything that changes while a run goes on.

    Attributes:
        learner: detector, terms and what they have gathered. ema: the moving average. optimizer, adversary: the
            student's and the discriminators'. precision: Fabric's, whose scale of gradients fp16 adapts. guard: what it
            remembers of each term's pull.
    """

    learner: LearningStep
    ema: AveragedModel | None
    optimizer: Any
    adversary: torch.optim.Optimizer | None
    precision: Any
    guard: PullGuard = field(default_factory=PullGuard)
    progress: Progress = field(default_factory=Progress)

    def save(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        """Write the state; called by all ranks, since terms put together what each of them has gathered."""
        payload = {
            "schema": STATE_SCHEMA,
            "inputs": sha256_json(inputs),
            "learner": self.learner.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "adversary": None if self.adversary is None else self.adversary.state_dict(),
            "scaler": self.precision.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_gpu": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "weak": self.guard.history,
            "progress": asdict(self.progress),
        }
        if ranks.rank() == 0:
            with atomic_path(folder / LAST_FILE) as temporary:
                torch.save(payload, temporary)

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, if it is there.

        Raises:
            ArtifactError: it is damaged, or something else.
        """
        path = folder / LAST_FILE
        if not path.is_file():
            return
        payload = read_state(path)
        try:
            self.learner.load_state_dict(payload["learner"])
            if self.ema is not None:
                self.ema.load_state_dict(payload["ema"])
            self.optimizer.load_state_dict(payload["optimizer"])
            if self.adversary is not None:
                self.adversary.load_state_dict(payload["adversary"])
            if payload.get("scaler"):  # of fp16 alone
                self.precision.load_state_dict(payload["scaler"])
            torch.set_rng_state(payload["rng"])
            if torch.cuda.is_available() and payload.get("rng_gpu") is not None:
                torch.cuda.set_rng_state(payload["rng_gpu"])
            self.guard.history = payload["weak"]
            self.progress = Progress(**payload["progress"])
        except torch.cuda.OutOfMemoryError:  # nothing is wrong with the file
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _no_way_on(path, f"{type(error).__name__}: {str(error).splitlines()[-1][:200]}") from error


def read_state(path: Path) -> dict[str, Any]:
    """What `RunState.save` wrote.

    Raises:
        ArtifactError: it is damaged, or something else.
    """
    try:
        return read_payload(path, STATE_SCHEMA)
    except ArtifactError as error:
        raise _no_way_on(path, error.got) from error


def _no_way_on(path: Path, got: object) -> ArtifactError:
    return ArtifactError(f"{path}: the run cannot go on from it", got=got, fix="move it away, and training begins anew")


def require_best(folder: Path) -> None:
    """Check the best detector so far, before a run that is to ship it goes on.

    Raises:
        ArtifactError: it is damaged or gone, and the state has only the present weights.
    """
    path = folder / BEST_FILE
    try:
        read_payload(path, DETECTOR_SCHEMA)
    except ArtifactError as error:
        raise ArtifactError(
            f"{path}: the run is to ship it (train.select: best), and it cannot be read",
            got=error.got or "no such file",
            fix=f"move {folder} away, and training begins anew",
        ) from error


def _foreign(path: Path) -> list[str]:
    """The file's name, if it is there and no detector of edgekd's."""
    if not path.is_file():
        return []
    try:
        read_payload(path, DETECTOR_SCHEMA)
    except ArtifactError:
        return [path.name]
    return []


def clear_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it wrote a checkpoint has left; nobody else may work in the folder."""
    for name in (LAST_FILE, BEST_FILE, MODEL_FILE):
        for left in leftovers_of(folder / name):
            left.unlink(missing_ok=True)


def holds_another(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a folder holds a run, finished or not, that was made from other inputs."""
    manifest, state = read_manifest(folder), folder / LAST_FILE
    if manifest is not None:
        return sha256_json(manifest.inputs) != sha256_json(inputs)
    return state.is_file() and read_state(state).get("inputs") != sha256_json(inputs)


def refuse_foreign(folder: Path, inputs: Mapping[str, Any]) -> None:
    """A folder with another run's state is never overwritten.

    Raises:
        ArtifactError: it holds one, finished or not.
    """
    if not any((folder / name).is_file() for name in (MANIFEST_NAME, LAST_FILE)):
        # A run writes its model last of all, and its best detector before it can be taken up.
        theirs = [MODEL_FILE] if (folder / MODEL_FILE).is_file() else _foreign(folder / BEST_FILE)
        if theirs:
            raise ArtifactError(
                f"{folder} holds a {theirs[0]} that no run there wrote",
                fix="choose another --out, or move that file away",
            )
    if holds_another(folder, inputs):
        raise ArtifactError(
            f"{folder} holds a run that was made with another recipe, data or seed",
            fix="choose another --out, or move that folder away",
        )
