"""A few pictures for the report: where two models disagree most, and some drawn at random, so that nothing is staged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgekd.artifact import atomic_path, write_json
from edgekd.bench.matching import assign
from edgekd.data.images import load_image
from edgekd.errors import ArtifactError
from edgekd.types import Dataset, Detections, ImageRecord

SCHEMA = "edgekd.examples/1"
SHOWN_SCORE = 0.3
"""Detections from this score on are drawn, and count for the choice."""

_COUNT = 18
_SIDE_PX = 480
_JPEG_QUALITY = 82


def choose_examples(
    records: Sequence[ImageRecord],
    reference: Sequence[Detections],
    student: Sequence[Detections],
    *,
    seed: int = 0,
) -> list[tuple[int, str]]:
    """(image index, why) of images worth showing.

    A third are those where the reference has most over the student, a third the other way round, the rest random among
    images with objects.
    """
    rng = np.random.default_rng(seed)
    lead = np.array(
        [
            _mistakes(record, ours) - _mistakes(record, theirs)
            for record, theirs, ours in zip(records, reference, student, strict=True)
        ]
    )
    chosen: dict[int, str] = {}
    ranked = np.argsort(-lead, kind="stable").tolist()
    for order, sign, why in ((ranked, 1, "reference ahead"), (ranked[::-1], -1, "student ahead")):
        for index in order[: _COUNT // 3]:
            if lead[index] * sign > 0:
                chosen[index] = why
    with_objects = [i for i, record in enumerate(records) if len(record.labels)] or list(range(len(records)))
    for index in rng.permutation(with_objects).tolist():
        if len(chosen) >= _COUNT:
            break
        chosen.setdefault(index, "random")
    return list(chosen.items())


def _mistakes(record: ImageRecord, found: Detections) -> int:
    """Objects missed and detections wrong in one image, among those that would be shown."""
    verdict, _ = assign(record, shown(found))
    to_find = int((~(record.difficult | record.crowd)).sum())
    return to_find - int((verdict == 1).sum()) + int((verdict == 0).sum())


def agreement(
    records: Sequence[ImageRecord],
    reference: Sequence[Detections],
    student: Sequence[Detections],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Which objects both models find (at `SHOWN_SCORE`, IoU 0.5), only one, or neither: in all and by class."""
    kinds = ("neither", "reference", "student", "both")
    counts = np.zeros((len(class_names), 4), np.int64)
    leads = []
    for record, theirs, ours in zip(records, reference, student, strict=True):
        found = _found(record, theirs) + 2 * _found(record, ours)
        real = ~(record.difficult | record.crowd)
        np.add.at(counts, (record.labels[real], found[real]), 1)
        leads.append(_mistakes(record, ours) - _mistakes(record, theirs))
    sign = np.sign(leads)
    return {
        "objects": dict(zip(kinds, counts.sum(0).tolist(), strict=True)),
        "per_class": {
            name: dict(zip(kinds, row, strict=True)) for name, row in zip(class_names, counts.tolist(), strict=True)
        },
        "images": {
            "reference_ahead": int((sign > 0).sum()),
            "level": int((sign == 0).sum()),
            "student_ahead": int((sign < 0).sum()),
        },
    }


def _found(record: ImageRecord, found: Detections) -> NDArray[np.int64]:
    """(N,) 1 for each object that a shown detection is assigned to."""
    _, owners = assign(record, shown(found))
    out = np.zeros(len(record.labels), np.int64)
    out[owners[owners >= 0]] = 1
    return out


def shown(found: Detections) -> Detections:
    """The detections that a picture shows, best first."""
    kept = found.take(found.scores >= SHOWN_SCORE)
    return kept.take(np.argsort(-kept.scores, kind="stable"))


def write_examples(
    folder: Path, dataset: Dataset, chosen: Sequence[tuple[int, str]], agreed: Mapping[str, Any] | None = None
) -> Path:
    """Write small JPEGs and `examples.json` with their ground truth, and `agreement`; returns the JSON file.

    The pictures are copies, so that a report can be made where the data set is not.
    """
    items = []
    for position, (index, why) in enumerate(chosen):
        record = dataset.records[index]
        file = f"{position:02d}.jpg"
        _write_small_jpeg(folder / file, record.path)
        items.append(
            {
                "image_id": record.image_id,
                "index": index,
                "why": why,
                "file": file,
                "image_hw": list(record.image_hw),
                "objects": {
                    "boxes_xyxy": np.round(record.boxes_xyxy.astype(np.float64), 1).tolist(),
                    "labels": record.labels.tolist(),
                    "ignored": (record.difficult | record.crowd).tolist(),
                },
            }
        )
    path = folder / "examples.json"
    write_json(path, {"schema": SCHEMA, "shown_score": SHOWN_SCORE, "agreement": agreed, "images": items})
    return path


def read_examples(path: Path) -> dict[str, Any]:
    """What an `examples.json` holds: "images", and "agreement" where it is not older than that.

    Raises:
        ArtifactError: it cannot be read.
    """
    import json

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ArtifactError(f"{path}: unknown schema", got=data["schema"], expected=SCHEMA)
        return {**data, "images": list(data["images"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read", got=error, fix="run the benchmark again") from error


def _write_small_jpeg(path: Path, source: Path) -> None:
    image = load_image(source)
    scale = min(1.0, _SIDE_PX / max(image.shape[:2]))
    if scale < 1.0:
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    _, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())
