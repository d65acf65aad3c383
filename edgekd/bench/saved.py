"""`detections.npz` beside `result.json`: every answer, precision-recall curve and latency sample of a benchmark.

Plain numeric arrays, one group a row, readable with `np.load(allow_pickle=False)`: the report draws from it, and anyone
can compute other figures without running anything again.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.artifact import atomic_path
from edgekd.bench.matching import Float64Array
from edgekd.errors import ArtifactError
from edgekd.types import Detections

SCHEMA = "edgekd.detections/1"
CURVE_POINTS = 101


@dataclass(frozen=True)
class SavedRow:
    """What one row of `result.json` rests on.

    Attributes:
        name: the row's.
        detections: one an image, in the order of `Saved.image_ids`.
        stages_ms: (rounds, block, 3) milliseconds of pre, infer, post.
        curves: class name to (101,) precision at recalls 0, 0.01, ... 1, IoU 0.5; "" is the mean.
    """

    name: str
    detections: Sequence[Detections]
    stages_ms: Float64Array
    curves: dict[str, list[float]]


@dataclass(frozen=True)
class Saved:
    """All rows of a benchmark over one split."""

    image_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    rows: tuple[SavedRow, ...]


def save(path: Path, saved: Saved) -> None:
    """Write it atomically."""
    arrays: dict[str, np.ndarray] = {
        "schema": np.array(SCHEMA),
        "image_ids": np.array(saved.image_ids, np.str_),
        "class_names": np.array(saved.class_names, np.str_),
        "rows": np.array([row.name for row in saved.rows], np.str_),
    }
    for index, row in enumerate(saved.rows):
        empty = Detections.empty()
        found = list(row.detections)
        arrays[f"{index}/counts"] = np.array([len(d) for d in found], np.int32)
        arrays[f"{index}/boxes_xyxy"] = np.concatenate([d.boxes_xyxy for d in found] or [empty.boxes_xyxy])
        arrays[f"{index}/scores"] = np.concatenate([d.scores for d in found] or [empty.scores])
        arrays[f"{index}/labels"] = np.concatenate([d.labels for d in found] or [empty.labels]).astype(np.int32)
        arrays[f"{index}/stages_ms"] = row.stages_ms.astype(np.float32)
        arrays[f"{index}/curve_names"] = np.array(list(row.curves), np.str_)
        arrays[f"{index}/curves"] = np.array(list(row.curves.values()), np.float32).reshape(
            len(row.curves), CURVE_POINTS
        )
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def read_saved(path: Path) -> Saved:
    """Inverse of `save`.

    Raises:
        ArtifactError: missing, damaged, or another schema.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["schema"]) != SCHEMA:
                raise ArtifactError(f"{path}: unknown schema", got=str(arrays["schema"]), expected=SCHEMA)
            names = [str(name) for name in arrays["rows"]]
            rows = tuple(_read_row(arrays, index, name) for index, name in enumerate(names))
            return Saved(tuple(map(str, arrays["image_ids"])), tuple(map(str, arrays["class_names"])), rows)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file", expected="the detections that `edgekd bench` saves") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path}: damaged", got=error, fix="run the benchmark again") from error


def _read_row(arrays: np.lib.npyio.NpzFile, index: int, name: str) -> SavedRow:
    ends = np.cumsum(arrays[f"{index}/counts"])[:-1]
    columns = (np.split(arrays[f"{index}/{key}"], ends) for key in ("boxes_xyxy", "scores", "labels"))
    curves = zip(arrays[f"{index}/curve_names"], arrays[f"{index}/curves"], strict=True)
    return SavedRow(
        name,
        [Detections(boxes, scores, labels) for boxes, scores, labels in zip(*columns, strict=True)],
        arrays[f"{index}/stages_ms"].astype(np.float64),
        {str(key): [float(v) for v in curve] for key, curve in curves},
    )
