"""Arrays kept for every view of every image: shards on disk, checksummed, read through the page cache.

A shard holds one slot of `SHARD_IMAGES` consecutive images in the safetensors layout: 8 bytes with the header's length,
a JSON header, then each array as it lies in memory, so that a row is read without reading the shard. Its checksum covers
header and arrays. Arrays of one row a view may have any shape; "soft.boxes" and "soft.probs" have as many rows as
"soft.ends" says.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgekd.artifact import atomic_path
from edgekd.errors import ArtifactError, UserError

SHARD_IMAGES = 64
"""Images a shard: what is lost at most when a machine is cut off, and what a process holds in memory while filling."""

OPEN_SHARDS = 64
"""Of one store at once: each mapped file takes a descriptor, of which a process usually has 1,024, and COCO's images fill
thousands of shards a teacher."""

VIEWS, ENDS, BOXES, PROBS = "views", "soft.ends", "soft.boxes", "soft.probs"

Arrays = dict[str, NDArray[Any]]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_shard(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a shard atomically."""
    header: dict[str, Any] = {}
    # Wide types first: every array then starts at a multiple of its item size.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    parts = [(name, np.ascontiguousarray(array)) for name, array in ordered]
    end = 0
    for name, array in parts:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    digest = _digest_of_header(header)
    for _, array in parts:
        digest.update(array.reshape(-1).view(np.uint8))
    text = json.dumps({**header, "__metadata__": {"sha256": digest.hexdigest()}}).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, array in parts:
            stream.write(array.reshape(-1).view(np.uint8).data)


@dataclass(frozen=True)
class _Shard:
    arrays: Arrays
    offsets: Mapping[str, int]
    memory: mmap.mmap
    header: dict[str, Any]
    checksum: str
    data_start: int


def _open_shard(path: Path) -> _Shard:
    """Map a shard; its arrays are views of the file.

    Raises:
        ArtifactError: it is damaged, as far as can be seen without reading all of it.
    """
    try:
        with open(path, "rb") as stream:
            memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(memory[:8], "little")
        header = json.loads(memory[8:start])
        checksum = header.pop("__metadata__")["sha256"]
        arrays, offsets, end = {}, {}, 0
        for name, entry in header.items():
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if entry["data_offsets"] != [end, end + size]:
                raise ValueError(f"{name} lies where it should not")
            offsets[name], end = start + end, end + size
            flat = np.frombuffer(memory, dtype, size // dtype.itemsize, offsets[name])
            arrays[name] = flat.reshape(shape)
        if start + end != len(memory):
            raise ValueError("it is cut off")
    except OSError as error:  # of a sound file too: no permission, too many files open
        raise ArtifactError(f"{path} cannot be read", got=error.strerror) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged", got=error, fix="delete it: it is then made again") from error
    return _Shard(arrays, offsets, memory, header, checksum, start)


def shard_is_intact(path: Path, *, whole: bool = True) -> bool:
    """Whether a shard is there and undamaged; `whole` also reads all of it and compares its checksum."""
    if not path.is_file():
        return False
    try:
        shard = _open_shard(path)
    except ArtifactError:
        return False
    if not whole:
        return True
    digest = _digest_of_header(shard.header)
    digest.update(memoryview(shard.memory)[shard.data_start :])
    return bool(digest.hexdigest() == shard.checksum)


def _digest_of_header(header: Mapping[str, Any]) -> Any:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode())


@dataclass(frozen=True)
class StoredRows:
    """What a store holds of some views.

    Attributes:
        digests: which views these are (`view_plan.view_digest`).
        arrays: name to (B, ...), all but the answers.
        soft: boxes_xyxy, B arrays (M, 4) float32, and class_probs, B arrays (M, classes) float32; None where not kept.
    """

    digests: list[int]
    arrays: Arrays
    soft: tuple[list[NDArray[Any]], list[NDArray[Any]]] | None


class ViewStore:
    """The shards of one folder, for reading from any number of threads.

    Args:
        folder: where they are; held against being evicted for as long as the store lives.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[tuple[int, int], _Shard] = {}  # the one used last comes last
        self._lock = threading.Lock()
        self._in_use = hold(folder)

    def rows(self, slot: int, indices: Sequence[int]) -> StoredRows:
        """Copies of what is kept for some images' views.

        Raises:
            ArtifactError: a shard is missing or damaged.
        """
        places = [(self._shard(slot, index // SHARD_IMAGES), index % SHARD_IMAGES) for index in indices]
        arrays: Arrays = {}
        for name, sample in places[0][0].arrays.items():
            if name == VIEWS or name.startswith("soft."):
                continue
            out = arrays[name] = np.empty((len(places), *sample.shape[1:]), sample.dtype)
            for target, (shard, row) in zip(out, places, strict=True):
                target[...] = shard.arrays[name][row]
        soft = None
        if ENDS in places[0][0].arrays:
            boxes, probs = zip(*(_soft(shard, row) for shard, row in places), strict=True)
            soft = list(boxes), list(probs)
        return StoredRows([int(shard.arrays[VIEWS][row]) for shard, row in places], arrays, soft)

    def prefetch(self, slot: int, indices: Sequence[int]) -> None:
        """Ask the system to read rows that will soon be wanted; returns at once."""
        for index in indices:
            shard, row = self._shard(slot, index // SHARD_IMAGES), index % SHARD_IMAGES
            for name, array in shard.arrays.items():
                size = array.nbytes // max(1, len(array))
                if name == VIEWS or name.startswith("soft.") or size < mmap.PAGESIZE:
                    continue
                start = shard.offsets[name] + row * size
                page = start - start % mmap.PAGESIZE
                shard.memory.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def _shard(self, slot: int, block: int) -> _Shard:
        with self._lock:
            shard = self._shards.pop((slot, block), None)
            if shard is None:
                shard = _open_shard(self.folder / shard_name(slot, block))
            self._shards[slot, block] = shard
            if len(self._shards) > OPEN_SHARDS:
                del self._shards[next(iter(self._shards))]  # closed when nobody reads it any more
        return shard


def shard_name(slot: int, block: int) -> str:
    """The file name of a slot and block of images."""
    return f"{slot:04d}-{block:05d}.safetensors"


def hold(folder: Path, *, alone: bool = False) -> IO[bytes] | None:
    """Hold a store's folder until the returned file is closed or the process ends: shared, or `alone`.

    None if it was to be held alone and another process uses it.

    Raises:
        UserError: the file system has no locks.
    """
    path = folder / ".in-use"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(stream, (fcntl.LOCK_EX | fcntl.LOCK_NB) if alone else fcntl.LOCK_SH)
        except (BlockingIOError, PermissionError):  # the latter over NFS
            stream.close()
            return None
        except OSError as error:
            stream.close()
            raise UserError(
                f"{folder} cannot be held against other processes",
                got=error.strerror,
                expected="a file system with file locks (Lustre has them when mounted with `flock`)",
                fix="name another `distill.cache.folder`",
            ) from error
        if path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
            os.utime(path)  # what was used last is evicted last
            return stream
        stream.close()  # evicted while we waited: what we hold is no longer there


def _soft(shard: _Shard, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
    ends = shard.arrays[ENDS]
    chosen = slice(int(ends[row - 1]) if row else 0, int(ends[row]))
    return shard.arrays[BOXES][chosen].copy(), shard.arrays[PROBS][chosen].astype(np.float32)
