"""`edgekd.postprocess.select` against plain numpy, the same detections from the same candidates, one pinned thread.

    python benchmarks/nms_speed.py --cells BCCD --onnx yolo11n.onnx --photos VOC2007 --out result.json
    git show COMMIT:edgekd/postprocess.py > /tmp/before.py; python benchmarks/nms_speed.py --before /tmp/before.py ...

Plain numpy is that of `peers/usual.py`, class by class and with classes moved apart (the matrix of all overlaps is never the
faster). All take turns in blocks over the same inputs, and a case is timed only once all gave the same detections to the
bit. Exits 1 where a case misses the bar. Cases:

- **heaps**: raw outputs like those of an SSD-lite at 320 px with priors of stride 8, on blood cells. The priors are the real
  detector's and the objects those of the test split; scores and offsets are drawn, so that about as many pairs pass 0.001
  and 0.01, and about as many boxes are left, as of a trained one (18,500, 766 and 35).
- **photographs**: what a YOLO says of real ones (with --onnx and --photos).
- and random boxes: all pairs of a head of 80 classes pass, few boxes, many classes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import usual
from session import assert_same, interval
from systems import Timing, open_detector

from edgekd import postprocess
from edgekd.artifact import source_commit, versions, write_json
from edgekd.bench.affinity import affinity, pinned
from edgekd.bench.device import Contention
from edgekd.bench.latency import MeasurementPlan, measure
from edgekd.boxes import iou_matrix
from edgekd.data import read_dataset
from edgekd.data.images import load_image
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.anchors import decode_boxes, encode_boxes, xyxy_from_cxcywh
from edgekd.detectors.prior_fit import fitted_spec
from edgekd.device.facts import load
from edgekd.machine import cpu_model
from edgekd.recipe import ModelConfig

IOU, LIMIT, BAR, INPUT = 0.45, 200, 3.0, 320
FORMS = {name: form for name, form in usual.PLAIN_NMS.items() if "matrix" not in name}
Candidates = tuple[np.ndarray, np.ndarray]
"""Boxes (P, 4) and scores (P, K) of one image."""


def heaps(root: Path, images: int) -> list[Candidates]:
    """Drawn raw outputs of the real detector's priors around the real objects of `root`'s test split."""
    train, test = read_dataset(root, "trainval"), read_dataset(root, "test")
    options = {"priors": "fitted", "finest_stride": 8}
    config = ModelConfig(model="mobilenetv2-ssd-lite", input_size=INPUT, options=options)
    priors = build_detector(fitted_spec(spec_for(config, train.class_names), train.records)).prior_boxes()
    rng = np.random.default_rng(0)
    return [
        _heap(r.boxes_xyxy * (INPUT / np.tile(r.image_hw[::-1], 2)), r.labels, priors, len(test.class_names), rng)
        for r in test.records[:images]
    ]


def _heap(objects: Any, labels: Any, priors: torch.Tensor, classes: int, rng: np.random.Generator) -> Candidates:
    """Log-odds are noise, higher the more a prior overlaps an object; boxes that overlap enough have moved to theirs."""
    objects = objects.astype(np.float32)
    overlaps = iou_matrix(xyxy_from_cxcywh(priors).numpy(), objects)
    nearest, overlap = overlaps.argmax(1), overlaps.max(1)
    count = len(priors)
    odds = rng.normal(-7.0, 0.6, (count, classes))
    near = np.flatnonzero(overlap > 0.15)
    at = near, labels[nearest[near]]
    seen = np.minimum(14 * (overlap - 0.66) + rng.normal(0, 1, count), 6)
    odds[at] = np.maximum(odds[at] - 0.6 + 1.5 * overlap[near], seen[near])
    powers = np.exp(np.concatenate([np.zeros((count, 1)), odds], 1))  # background first
    scores = (powers / powers.sum(1, keepdims=True))[:, 1:].astype(np.float32)
    pull = np.clip((overlap - 0.1) / 0.2, 0, 1)[:, None]
    offsets = encode_boxes(torch.from_numpy(objects[nearest]), priors).numpy() * pull
    offsets += rng.normal(0, 1, (count, 4)) * np.where(pull > 0.9, 0.22, 0.6)
    boxes = decode_boxes(torch.from_numpy(offsets.astype(np.float32)), priors).numpy()
    return boxes, np.ascontiguousarray(scores)


def photographs(onnx: Path, root: Path, split: str, images: int) -> list[Candidates]:
    """What a black box says of real images."""
    found = []
    with open_detector(onnx, 0.001, IOU, LIMIT) as predictor:
        for record in read_dataset(root, split).records[:images]:
            tensor, _ = predictor.prepare(load_image(record.path))
            boxes, scores = predictor.candidates(predictor.infer(tensor))
            found.append((boxes.copy(order="K"), scores.copy(order="K")))  # a runtime may reuse its outputs
    return found


def strewn(boxes: int, classes: int, power: int, images: int) -> list[Candidates]:
    """Random boxes; the larger `power`, the more scores are low."""
    made = []
    for seed in range(images):
        rng = np.random.default_rng(seed)
        corners = rng.uniform(0, 600, (boxes, 2))
        sides = np.concatenate([corners, corners + rng.uniform(4, 60, (boxes, 2))], 1).astype(np.float32)
        made.append((sides, (rng.random((boxes, classes)) ** power).astype(np.float32)))
    return made


def cases(given: argparse.Namespace) -> dict[str, tuple[list[Candidates], float]]:
    """Inputs and score threshold by name."""
    made: dict[str, tuple[list[Candidates], float]] = {}
    if given.cells:
        found = heaps(given.cells, given.images)
        made |= {f"heaps, over {score}": (found, score) for score in (0.01, 0.001)}
    if given.onnx and given.photos:
        found = photographs(given.onnx, given.photos, given.split, given.images)
        made |= {f"{given.onnx.stem} on photographs, over {score}": (found, score) for score in (0.01, 0.001)}
    return made | {
        "random, 8,400 x 80, over 0.001": (strewn(8400, 80, 4, 4), 0.001),
        "random, 25,200 x 80, over 0.001": (strewn(25200, 80, 4, 2), 0.001),
        "random, 2,000 x 1,203, over 0.5": (strewn(2000, 1203, 1500, 4), 0.5),
        "few boxes, 30 x 3, over 0.01": (strewn(30, 3, 2, 16), 0.01),
    }


def compare(inputs: list[Candidates], score: float, before: Any, plan: MeasurementPlan, clock: Any) -> dict[str, Any]:
    """One case: medians by system, and ratios to edgekd's."""

    def ours(module: Any) -> Callable[[Candidates], Any]:
        return lambda value: module.select(*value, score_threshold=score, nms_iou=IOU, max_detections=LIMIT)

    def plain(form: Callable[..., usual.Found]) -> Callable[[Candidates], usual.Found]:
        return lambda value: form(*value, score, IOU, LIMIT)

    systems: dict[str, Callable[[Candidates], Any]] = {"edgekd": ours(postprocess)}
    systems |= {name: plain(form) for name, form in FORMS.items()}
    detections = []
    for value in inputs:
        found = systems["edgekd"](value)
        others = {name: systems[name](value) for name in FORMS}
        if before is not None:
            old = ours(before)(value)
            others["before"] = (old.boxes_xyxy, old.scores, old.labels)
        assert_same(found, others)
        detections.append(len(found))
    if before is not None:
        systems["before"] = ours(before)
    measured = measure([Timing(system) for system in systems.values()], inputs, plan, clock=clock)
    times = {name: result.total_ms for name, result in zip(systems, measured, strict=True)}
    medians = {name: float(np.median(values)) for name, values in times.items()}
    best = min(FORMS, key=medians.__getitem__)
    said = {
        "images": len(inputs),
        "pairs": int(np.median([np.count_nonzero(scores > score) for _, scores in inputs])),
        "detections": int(np.median(detections)),
        "median_ms": {name: round(value, 4) for name, value in medians.items()},
        "best_plain": best,
        "over_best_plain": interval(times[best], times["edgekd"]),
    }
    if before is not None:
        said["over_before"] = interval(times["before"], times["edgekd"])
        said["before_over_best_plain"] = interval(times[best], times["before"])
    return said


def load_module(file: Path) -> Any:
    """An earlier `postprocess.py`, beside the present one."""
    spec = importlib.util.spec_from_file_location("before", file)
    if spec is None or spec.loader is None:
        sys.exit(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, help="BCCD, VOC layout")
    parser.add_argument("--onnx", type=Path, help="a detector as ONNX")
    parser.add_argument("--photos", type=Path, help="images for it")
    parser.add_argument("--split", default="val", help="of --photos")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--before", type=Path, help="an earlier postprocess.py, timed as well")
    parser.add_argument("--core", type=int, help="the last allowed one if not given")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU time, for a busy machine")
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time_ns if given.cpu_time else time.perf_counter_ns
    before = None if given.before is None else load_module(given.before)
    allowed = affinity()
    core = given.core if given.core is not None or allowed is None else allowed[-1]
    plan = MeasurementPlan(given.samples, warmup_seconds=0.3, warmup_limit_seconds=1.5)
    said: dict[str, Any] = {
        "settings": {"nms_iou": IOU, "max_detections": LIMIT, "samples": given.samples, "core": core,
                     "clock": "CPU time" if given.cpu_time else "wall time"},
        "cpu": cpu_model(), "load_before": load(), "cases": {},
    }  # fmt: skip
    with pinned(None if core is None else (core,)):
        contention = Contention()
        for name, (inputs, score) in cases(given).items():
            row = said["cases"][name] = compare(inputs, score, before, plan, clock)
            ratio = row["over_best_plain"]
            print(f"{name}: {row['median_ms']} {ratio['value']:.2f}x", file=sys.stderr, flush=True)
        said["contention"] = contention.facts()
    said |= {"load": load(), "versions": versions(), "commit": source_commit()}
    if given.out is not None:
        write_json(given.out, said)
    print(json.dumps(said, indent=2))
    missed = [name for name, row in said["cases"].items() if row["over_best_plain"]["value"] < BAR]
    if missed:
        sys.exit(f"below {BAR:g}x: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
