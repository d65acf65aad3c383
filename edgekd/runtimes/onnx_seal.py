"""A checksum inside the ONNX files that edgekd writes, since the format has none and a changed weight runs like any other.

It is the SHA-256 of the file with the digest's own place filled with zeros, so nothing but the file is needed to check it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import ArtifactError

SEAL_KEY = "edgekd.seal"
"""Metadata: the file's size in bytes, 12 digits, and its digest."""
CHANGED = (
    "this file is not as edgekd wrote it: changed by another tool, or damaged; if no tool was meant to, export it again"
)
"""What is said of a file whose length has changed too."""
_SIZE_DIGITS, _DIGEST_DIGITS = 12, 64
_BLANK = "0" * _DIGEST_DIGITS


def sealed(model: Any) -> bytes:
    """An ONNX `ModelProto`, serialised with its seal; the model's own metadata are given a blank one."""
    for entry in [entry for entry in model.metadata_props if entry.key == SEAL_KEY]:
        model.metadata_props.remove(entry)
    model.metadata_props.add(key=SEAL_KEY, value=_value(0, _BLANK))
    size = len(model.SerializeToString(deterministic=True))  # the same whatever digits stand in the seal
    blank = _value(size, _BLANK)
    model.metadata_props[-1].value = blank
    data: bytes = model.SerializeToString(deterministic=True)
    return data.replace(_entry(blank), _entry(_value(size, hashlib.sha256(data).hexdigest())))


def seal_note(path: Path, metadata: Mapping[str, str]) -> str | None:
    """Check a file against its seal, if it has one: `CHANGED` where it is longer or shorter than when edgekd wrote it.

    Args:
        metadata: the file's own, as whoever opened it read them.

    Raises:
        ArtifactError: it is as long as edgekd wrote it, and something in it has changed.
    """
    value = metadata.get(SEAL_KEY)
    if value is None:  # written by an earlier edgekd
        return None
    data = path.read_bytes()
    size, _, digest = value.partition("-")
    blank = data.replace(_entry(value), _entry(f"{size}-{_BLANK}"))
    if hashlib.sha256(blank).hexdigest() == digest:
        return None
    if size.isdecimal() and int(size) != len(data):
        return CHANGED
    raise ArtifactError(
        f"{path}: damaged",
        got="the length that edgekd wrote it with, and another checksum",
        fix="copy it again, or export it again",
    )


def _value(size: int, digest: str) -> str:
    return f"{size:0{_SIZE_DIGITS}d}-{digest}"


def _entry(value: str) -> bytes:
    """The seal as it lies in the file, a `StringStringEntryProto`: its key, then field 2, its value with the length."""
    text = value.encode()
    return SEAL_KEY.encode() + b"\x12" + bytes([min(len(text), 0x7F)]) + text
