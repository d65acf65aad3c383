"""The same artefact entered twice, pinned to one core and one thread: the ratio of its medians must be within 1 % of 1.

    python benchmarks/same_artifact_twice.py --samples 1000

What `edgekd bench` says about two artefacts can be no better than what it says about one and itself. The detector is an
untrained student (or --artifact); images are generated scenes (or --data). Exits 1 beyond the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from edgekd.artifact import write_json
from edgekd.bench.affinity import affinity, parse_cpus, pinned
from edgekd.bench.entries import BenchArtifact
from edgekd.bench.runner import bench_artifacts
from edgekd.bench.saved import read_saved
from edgekd.data import read_dataset
from edgekd.data.scenes import SCENE_CLASSES, make_scenes
from edgekd.device.stats import median_ratio
from edgekd.recipe import BenchConfig, ModelConfig
from edgekd.types import Dataset

TOLERANCE = 0.01


def student(folder: Path, family: str, width: float, input_px: int) -> Path:
    """An untrained detector as ONNX: its latency is a trained one's, since nothing in it depends on the weights."""
    from edgekd.detectors import build_detector, spec_for
    from edgekd.export.onnx import export_onnx

    config = ModelConfig(model=family, width=width, input_size=input_px)
    out = folder / "student.onnx"
    export_onnx(build_detector(spec_for(config, SCENE_CLASSES)), out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="an ONNX file over the data's classes")
    parser.add_argument("--family", default="mobilenetv2-ssd-lite")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--input", type=int, default=320, dest="input_px")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--warmup", type=float, default=2.0)
    parser.add_argument("--pin", default=None, help="the CPU; the last allowed one if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    allowed = affinity()
    cpu = given.pin or (None if allowed is None else str(allowed[-1]))
    with tempfile.TemporaryDirectory() as name, pinned(None if cpu is None else parse_cpus(cpu)):
        folder = Path(name)
        artifact = given.artifact or student(folder, given.family, given.width, given.input_px)
        root = given.data or make_scenes(folder / "scenes", counts={"train": 1, "val": 32}, seed=given.seed)
        dataset: Dataset = read_dataset(root, given.split)
        config = BenchConfig(samples=given.samples, warmup_seconds=given.warmup, threads=1)
        result = bench_artifacts(
            [BenchArtifact(artifact, "first"), BenchArtifact(artifact, "second")],
            dataset,
            config=config,
            out=folder / "result.json",
            seed=given.seed,
            memory=False,
            energy_seconds=0.0,
        )
        first, second = (row.stages_ms.sum(-1) for row in read_saved(folder / "detections.npz").rows)
    ratio = median_ratio(first, second, seed=given.seed)
    keys = ("name", "sha256", "runtime", "provider", "input_hw", "latency_ms", "stages_ms", "settled", "drift")
    said = {
        "ratio": round(ratio.value, 5), "low": round(ratio.low, 5), "high": round(ratio.high, 5), "tolerance": TOLERANCE,
        "cpu": cpu, "rows": [{key: row[key] for key in keys} for row in result["rows"]], "device": result["device"],
        "conditions": result["conditions"]["contention"], "settings": result["settings"], "commit": result["commit"],
        "warnings": result["warnings"],
    }  # fmt: skip
    for row in said["rows"]:
        row["latency_ms"].pop("percentiles", None)
    if given.out is not None:
        write_json(given.out, said)
    print(json.dumps({key: said[key] for key in ("ratio", "low", "high", "cpu", "conditions", "warnings")}, indent=2))
    if abs(ratio.value - 1) > TOLERANCE:
        sys.exit(
            f"the same artefact differs from itself by {ratio.value - 1:+.2%} (a busy machine makes this uncertain)"
        )


if __name__ == "__main__":
    main()
