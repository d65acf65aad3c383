"""A recipe with its data read, the folder it works in held against other processes, and the data's identity."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgekd import ranks, torchrun
from edgekd.artifact import read_manifest, sha256_file
from edgekd.console import Terminal
from edgekd.data import read_dataset
from edgekd.data.images import evenly_spread, grey_spans, lost_greys
from edgekd.errors import ArtifactError, DataError, UserError
from edgekd.labels import some_of
from edgekd.recipe import Recipe
from edgekd.training.setup import uses_gpu
from edgekd.types import LABELLED_BY_TEACHERS, Dataset

LOCK_FILE = ".edgekd.lock"

_LOOKED_AT = 8
"""Training images that are looked at for greys that 8 bits lose."""


@dataclass(frozen=True)
class Workspace:
    """A recipe with its data read, and where it is worked on.

    Attributes:
        recipe: validated. train, val: its two splits.
        device: "auto", "cpu", "cuda", "cuda:1". terminal: where progress is shown.
        replaced: where a run made from other inputs is moved to; None refuses to go on instead.
    """

    recipe: Recipe
    train: Dataset
    val: Dataset
    device: str
    terminal: Terminal
    replaced: Path | None = None

    @cached_property
    def data_identity(self) -> dict[str, Any]:
        """What the data is, by content: any changed image or box changes it."""
        return {
            "classes": list(self.train.class_names),
            "train": content_hash(self.train),
            "val": content_hash(self.val),
        }


@contextlib.contextmanager
def open_workspace(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    quiet: bool = False,
    wait: bool = False,
    terminal: Terminal | None = None,
) -> Iterator[Workspace]:
    """Read the recipe's data and hold `out` for this process; with `wait`, after whoever holds it now.

    Args:
        quiet: show warnings only, where no `terminal` is given.

    Raises:
        DataError: the data set cannot be read, or has nothing to train on. UserError: another process works in `out`.
    """
    with locked(out, wait=wait), ranks.joined(on_gpu=torchrun.launched() and uses_gpu(device)):
        section = recipe.data
        train, val = (
            read_dataset(section.root, split, format=section.format, class_names=section.classes, limit=limit)
            for split, limit in ((section.train, section.limit_train), (section.val, section.limit_val))
        )
        require_objects(train, recipe.train.difficult)
        terminal = Terminal(quiet) if terminal is None else terminal
        terminal.console.quiet = ranks.rank() > 0  # one process speaks for all
        for doubt in doubts_about(train, val):
            terminal.warn(doubt)
        yield Workspace(recipe, train, val, device, terminal)


def require_objects(train: Dataset, difficult: bool) -> None:
    """Refuse a split without anything to learn.

    Raises:
        DataError: no box but, perhaps, crowds and (unless these are trained on) difficult objects.
    """
    for record in train.records:
        if len(record.boxes_xyxy) and not (record.crowd | (record.difficult & (not difficult))).all():
            return
    raise DataError(
        f"{train.root}, split {train.split!r}: no object to train on",
        got=f"{len(train)} images",
        expected="at least one box of " + ", ".join(train.class_names),
        fix="`edgekd data check` looks at the whole data set",
    )


def has_objects(val: Dataset) -> bool:
    """Whether there is anything to be found, neither difficult nor crowd: without it no figure exists."""
    return any(record.trainable.any() for record in val.records)


def doubts_about(train: Dataset, val: Dataset) -> list[str]:
    """What makes figures on `val` say little; nobody is kept from training by it."""
    doubts = []
    both = _images_in(train, val)
    if both:
        doubts.append(
            f"{both} of the {len(val)} images of split {val.split!r} are trained on as well: figures on them say nothing "
            "of new images (`data.val`; `edgekd data split` draws splits)"
        )
    if lost := lost_greys(grey_spans(evenly_spread(train.records, _LOOKED_AT))):
        doubts.append(f"split {train.split!r}: {lost}; stretch them, or save 8 bits (`edgekd data check`)")
    if val.by_teachers:
        doubts.append(f"split {val.split!r} {LABELLED_BY_TEACHERS}")
    if not has_objects(val):
        doubts.append(f"split {val.split!r} has no object: nothing can be measured on it (`edgekd data check`)")
        return doubts
    trained, measured = (
        {label for record in split.records for label in record.labels[record.trainable].tolist()}
        for split in (train, val)
    )
    absent = [train.class_names[label] for label in sorted(trained - measured)]
    if absent:
        doubts.append(
            f"split {val.split!r} has no object of {some_of(absent)}, unlike {train.split!r}: figures on it say nothing of "
            f"{'them' if len(absent) > 1 else 'it'}"
        )
    return doubts


def _images_in(train: Dataset, val: Dataset) -> int:
    """How many images of `val` are files of `train`, or copies of such; only files of equal size are read."""
    by_size: dict[int, list[Path]] = {}
    for path in {record.path for record in train.records}:
        by_size.setdefault(path.stat().st_size, []).append(path)
    sizes = {path: path.stat().st_size for path in {record.path for record in val.records}}
    content = {sha256_file(path) for size in set(sizes.values()) for path in by_size.get(size, ())}
    return sum(size in by_size and sha256_file(path) in content for path, size in sizes.items())


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder against other edgekd processes; the system frees it when this one ends, however it ends.

    Raises:
        UserError: another process holds it, or it cannot be written to or held.
    """
    import fcntl

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", expected="a folder, which is made if it is not there")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} cannot be written to", got=error.strerror) from error
    with stream:
        if torchrun.place()[0] > 0:  # it belongs to the first
            yield
            return
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{folder} cannot be held against other processes",
                    got=error.strerror,
                    expected="a file system with file locks (Lustre has them when mounted with `flock`)",
                    fix="choose an --out elsewhere",
                ) from error
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            message = f"another edgekd process works in {folder}"
            raise UserError(message, got=f"process {holder}", fix="wait for it, or choose another --out") from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def content_hash(dataset: Dataset) -> str:
    """A hash of a split's content: image files, boxes, labels, flags."""
    digest = hashlib.sha256()
    for record in dataset.records:
        head = [record.image_id, sha256_file(record.path), record.image_hw]
        digest.update(json.dumps(head).encode())
        for column in (record.boxes_xyxy, record.labels, record.difficult, record.crowd):
            digest.update(column.tobytes())
    return digest.hexdigest()


def is_synthetic(root: Path) -> bool:
    """Whether a data set was generated by `edgekd data make`."""
    try:
        manifest = read_manifest(root)
    except ArtifactError:  # another tool's manifest.json
        return False
    return manifest is not None and bool(manifest.facts.get("synthetic"))


def resolved_device(device: str) -> str:
    """A torch device for "auto": the first GPU if there is one."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
