"""edgekd's evaluation against pycocotools on the same generated detections: identical figures, and how much faster.

    python benchmarks/evaluation_speed.py --images 5000 --detections 100

Both start from arrays in memory and end with COCO's precision table; edgekd's VOC figures and curves are in its time.
Each runs alone, `--repeats` times in turn; the ratio is of the medians. Exits 1 if a figure differs or the bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import source_commit, versions, write_json
from edgekd.bench.accuracy import SIZES, Accuracy, evaluate
from edgekd.bench.device import Contention
from edgekd.device.facts import load
from edgekd.machine import cpu_model
from edgekd.types import Detections, ImageRecord

BAR = 6.0


def make_split(images: int, detections: int, classes: int, seed: int) -> tuple[list[ImageRecord], list[Detections]]:
    """Images with about seven objects each, as in COCO, and answers that partly hit them, with many low scores."""
    rng = np.random.default_rng(seed)
    records, answers = [], []
    for index in range(images):
        objects = int(rng.poisson(7))
        corners = rng.uniform(0, 500, (objects, 2))
        boxes = np.concatenate([corners, corners + np.exp(rng.uniform(1.5, 5.5, (objects, 2)))], 1).astype(np.float32)
        labels = rng.integers(0, classes, objects)
        crowd = rng.random(objects) < 0.01
        none = np.zeros(objects, bool)
        records.append(ImageRecord(f"{index:012d}", Path(f"{index}.jpg"), (640, 640), boxes, labels, none, crowd))
        hits = rng.integers(0, objects, detections) if objects else np.zeros(0, np.int64)
        hits = hits[rng.random(len(hits)) < 0.4]
        near = boxes[hits] + rng.normal(0, 0.08, (len(hits), 4)) * np.tile(boxes[hits, 2:] - boxes[hits, :2], 2)
        far = rng.uniform(0, 500, (detections - len(hits), 2))
        found = np.concatenate([near, np.concatenate([far, far + rng.uniform(4, 150, far.shape)], 1)])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        scores = np.concatenate([rng.beta(2, 2, len(hits)), rng.beta(1, 8, len(far))])
        found_labels = np.concatenate([labels[hits], rng.integers(0, classes, len(far))])
        answers.append(Detections(found, scores, found_labels))
    return records, answers


def pycocotools_precision(records: list[ImageRecord], answers: list[Detections], classes: int) -> np.ndarray:
    """(10, 101, classes, 4), NaN where there are no objects."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(boxes: np.ndarray) -> np.ndarray:
        boxes = boxes.astype(np.float64)
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)

    objects: list[dict[str, Any]] = []
    for image, record in enumerate(records, 1):
        for box, label, crowd in zip(xywh(record.boxes_xyxy).tolist(), record.labels, record.crowd, strict=True):
            objects.append({
                "id": len(objects) + 1, "image_id": image, "category_id": int(label) + 1, "bbox": box,
                "area": box[2] * box[3], "iscrowd": int(crowd),
            })  # fmt: skip
    rows = [  # pycocotools' own quickest way in: (image, x, y, w, h, score, category)
        np.column_stack([np.full(len(found), image), xywh(found.boxes_xyxy), found.scores, found.labels + 1])
        for image, found in enumerate(answers, 1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "height": 640, "width": 640} for i in range(1, len(records) + 1)],
            "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)],
            "annotations": objects,
        }
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(np.concatenate(rows)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    precision = np.asarray(evaluator.eval["precision"], np.float64)[..., -1]
    return np.where(precision < 0, np.nan, precision)


def figures(precision: np.ndarray) -> dict[str, float]:
    """AP50 and AP, over all objects and by size."""
    with np.errstate(invalid="ignore"):
        found = {"ap50": np.nanmean(precision[0, :, :, 0]), "ap": np.nanmean(precision[..., 0])}
        for area, size in enumerate(SIZES, 1):
            found[f"ap50_{size}"], found[f"ap_{size}"] = (
                np.nanmean(precision[0, :, :, area]),
                np.nanmean(precision[..., area]),
            )
    return {key: float(value) for key, value in found.items()}


def ours(accuracy: Accuracy) -> dict[str, float]:
    found = {"ap50": accuracy.ap50, "ap": accuracy.ap}
    for size in SIZES:
        found[f"ap50_{size}"], found[f"ap_{size}"] = accuracy.by_size[size].ap50, accuracy.by_size[size].ap
    return {key: float("nan") if value is None else value for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    records, answers = make_split(given.images, given.detections, given.classes, given.seed)
    names = [str(i) for i in range(given.classes)]
    contention, seconds = Contention(), {"edgekd": list[float](), "pycocotools": list[float]()}
    for _ in range(given.repeats):
        start = time.perf_counter()
        accuracy = evaluate(records, answers, names)
        seconds["edgekd"].append(time.perf_counter() - start)
        start = time.perf_counter()
        precision = pycocotools_precision(records, answers, given.classes)
        seconds["pycocotools"].append(time.perf_counter() - start)
    a, b = ours(accuracy), figures(precision)
    worst = max(abs(a[key] - b[key]) for key in a)
    ratio = float(np.median(seconds["pycocotools"]) / np.median(seconds["edgekd"]))
    result = {
        "images": given.images, "detections": sum(map(len, answers)), "classes": given.classes, "seconds": seconds,
        "ratio": round(ratio, 2), "bar": BAR, "figures": b, "largest_difference": worst, "cpu": cpu_model(),
        "machine": platform.machine(), "load": load(), "contention": contention.facts(), "commit": source_commit(),
        "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if given.out is not None:
        write_json(given.out, result)
    if worst > 1e-9:
        sys.exit(f"figures differ by {worst:g}")
    if ratio < BAR:
        sys.exit(f"{ratio:.1f}x: below the bar of {BAR:g}x (a busy machine makes this uncertain)")


if __name__ == "__main__":
    main()
