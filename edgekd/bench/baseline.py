"""An earlier result to hold a new one against: what may be compared with it, and which of its files are still there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from edgekd.artifact import is_onnx, sha256_file
from edgekd.bench.affinity import affinity
from edgekd.bench.complexity import deployed_file
from edgekd.bench.device import device_facts
from edgekd.bench.entries import BenchArtifact
from edgekd.bench.result import read_result
from edgekd.bench.runner import fingerprint
from edgekd.bench.saved import Saved, read_saved
from edgekd.errors import ArtifactError, UserError
from edgekd.machine import usable_threads
from edgekd.predictor import NATURAL, RuntimeChoice
from edgekd.recipe import BenchConfig
from edgekd.runtimes.model_files import sha256_model
from edgekd.types import Dataset

_MACHINE = ("cpu", "machine", "cores", "governor", "board", "gpu")
_BESIDE = {"detections": "detections.npz", "examples": "examples/examples.json"}
_THRESHOLDS = ("score_threshold", "nms_iou", "max_detections", "box_voting")
_IDENTITY = ("name", "role", "artifact", "sha256", "runtime")
_ROW = ("runtime", "provider", "cuda_graph", "threads")


@dataclass(frozen=True)
class Baseline:
    """An earlier benchmark.

    Attributes:
        result: its result.json. saved: its detections and samples. missing: why there are none, else None.
    """

    path: Path
    result: dict[str, Any]
    saved: Saved | None
    missing: str | None

    @property
    def file_names(self) -> tuple[str, str]:
        """(detections, examples' folder) that lie beside the result."""
        files = self.result.get("files") or {}
        detections, examples = (Path(str(files.get(key, usual))) for key, usual in _BESIDE.items())
        return detections.name, examples.parent.name


@dataclass(frozen=True)
class Pair:
    """An artefact and what it is held against.

    Attributes:
        name: the artefact's now. old: the baseline's row.
        again: the name under which the old file is measured once more, beside the new one; None where it is not.
        same_file: nothing changed but what runs it.
    """

    name: str
    old: Mapping[str, Any]
    again: str | None
    same_file: bool


def read_baseline(path: Path) -> Baseline:
    """An earlier result with what lies beside it.

    Raises:
        ArtifactError: it is missing, cannot be read, or lacks what is compared.
    """
    result = read_result(path)
    if lacks := _lacks(result):
        more = f"; and {len(lacks) - 4} more" if len(lacks) > 4 else ""
        raise ArtifactError(
            f"{path}: nothing can be held against it",
            got="; ".join(lacks[:4]) + more,
            expected="a result.json as `edgekd bench` writes it",
            fix="make the baseline again: edgekd bench ... --out FILE",
        )
    files = result.get("files") or {}
    saved = path.parent / Path(str(files.get("detections", _BESIDE["detections"]))).name
    if not saved.is_file():
        return Baseline(path, result, None, f"{saved.name} does not lie beside {path.name}")
    digest = files.get("detections_sha256")
    if digest is not None and sha256_file(saved) != digest:
        return Baseline(path, result, None, f"{saved.name} is not the file that {path.name} was written with")
    found = read_saved(saved)
    medians = {row.name: float(np.median(row.stages_ms.sum(-1))) for row in found.rows if row.stages_ms.size}
    for row in result["rows"]:
        said = row["latency_ms"]["median"]
        if not abs(medians.get(row["name"], math.inf) - said) <= 1e-3 + 1e-3 * said:
            return Baseline(path, result, None, f"{saved.name} does not hold the samples that {path.name} speaks of")
    return Baseline(path, result, found, None)


def _lacks(result: Mapping[str, Any]) -> list[str]:
    """What a result must have to be compared with, and has not, in words."""
    found = [f"no {name}" for name in ("device", "settings", "data") if not isinstance(result.get(name), dict)]
    if not isinstance(result.get("files") or {}, dict):
        found.append("files is no mapping")
    if not found and not isinstance(result["device"].get("versions", {}), dict):
        found.append("device.versions is no mapping")
    if not found and not isinstance(result["settings"].get("affinity") or [], list):
        found.append("settings.affinity is no list")
    if not result["rows"]:
        found.append("no rows")
    for number, row in enumerate(result["rows"], 1):
        if isinstance(row, dict):
            found += [f"row {number}: {problem}" for problem in _row_lacks(row)]
        else:
            found.append(f"row {number} is no mapping")
    return found


def _row_lacks(row: Mapping[str, Any]) -> list[str]:
    found = [f"no {key}" for key in _IDENTITY if not isinstance(row.get(key), str)]
    latency, accuracy = row.get("latency_ms"), row.get("map")
    if not isinstance(latency, dict) or not _within(latency.get("median"), 1e-6, 1e9):
        found.append("latency_ms.median is no time")
    elif not _is_interval(latency.get("median_interval"), 1e-6, 1e9):
        found.append("latency_ms.median_interval is no interval")
    ap50 = accuracy.get("ap50", math.nan) if isinstance(accuracy, dict) else math.nan
    if ap50 is not None and not _within(ap50, 0, 1):
        found.append("map.ap50 is no accuracy")
    elif isinstance(accuracy, dict) and not _is_interval(accuracy.get("ap50_interval"), 0, 1):
        found.append("map.ap50_interval is no interval")
    return found


def _within(value: Any, low: float, high: float) -> bool:
    """A number in [low, high], which NaN is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_interval(value: Any, low: float, high: float) -> bool:
    """None, or two numbers in [low, high]."""
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(_within(end, low, high) for end in value)
    )


def pair_up(
    baseline: Baseline, artifacts: Sequence[BenchArtifact], folders: Sequence[Path]
) -> tuple[list[Pair], list[BenchArtifact]]:
    """Each artefact with the baseline's row of its name, and the old files that are measured once more.

    A single artefact is held against a single row whatever their names are. Old files are known by their hash, and
    looked for where the baseline has them, beside it, and in `folders`.

    Raises:
        UserError: nothing has a counterpart.
    """
    rows = [row for row in baseline.result["rows"] if row["role"] not in ("ensemble", "baseline")]
    alone = rows[0] if len(rows) == len(artifacts) == 1 else None
    pairs, again = [], []
    for artifact in artifacts:
        old = next((row for row in rows if row["name"] == artifact.name), alone)
        if old is None:
            continue
        file = _find(old, baseline.path.parent, folders)
        same = sha256_model(deployed_file(artifact.path)) == old["sha256"] and _runtime_now(artifact) == old["runtime"]
        name = f"{artifact.name} (baseline)"
        if file is not None and not same:
            again.append(_earlier(artifact, name, file, old))
        pairs.append(Pair(artifact.name, old, name if file is not None and not same else None, same))
    if not pairs:
        raise UserError(
            f"{baseline.path}: no row to compare with",
            got=", ".join(artifact.name for artifact in artifacts),
            expected="names among " + ", ".join(str(row["name"]) for row in rows) if rows else "a row of one detector",
            fix="name what you measure as the baseline does: NAME=PATH" if rows else None,
        )
    return pairs, again


def _earlier(artifact: BenchArtifact, name: str, file: Path, old: Mapping[str, Any]) -> BenchArtifact:
    options = artifact.options
    return replace(
        artifact,
        path=file,
        name=name,
        role="baseline",
        options=None if options is None or not is_onnx(file) else options.model_copy(update={"onnx": str(file)}),
        runtime=_runtime_of(old),
        cuda_graph=bool(old.get("cuda_graph")),
    )


def _runtime_of(old: Mapping[str, Any]) -> RuntimeChoice:
    return next((choice for choice in get_args(RuntimeChoice) if choice == old["runtime"]), "auto")


def _runtime_now(artifact: BenchArtifact) -> str:
    return NATURAL.get(artifact.path.suffix.lower(), "torch") if artifact.runtime == "auto" else artifact.runtime


def _find(old: Mapping[str, Any], beside: Path, folders: Sequence[Path]) -> Path | None:
    """The file or run folder with the row's hash."""
    shown = Path(str(old["artifact"]))
    candidates = [shown, beside / shown, beside / shown.name]
    candidates += [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix.lower() in NATURAL]
    for candidate in candidates:
        try:
            if sha256_model(deployed_file(candidate)) == old["sha256"]:
                return candidate
        except (ArtifactError, OSError):
            continue
    return None


def differences(baseline: Baseline, dataset: Dataset, config: BenchConfig, latency_images: int) -> list[str]:
    """What differs between the baseline's measurement and one here and now, such that latencies do not compare."""
    found = _changes(_MACHINE, baseline.result["device"], device_facts())
    now = {"threads": config.threads or usable_threads(), "latency_images": latency_images}
    found += _changes(tuple(now), baseline.result["settings"], now)
    cpus = baseline.result["settings"].get("affinity"), affinity()
    if cpus[0] is not None and cpus[1] is not None and len(cpus[0]) != len(cpus[1]):
        found.append(f"CPUs it may use: {len(cpus[0])}, now {len(cpus[1])}")
    return found + accuracy_differences(baseline, dataset, config)


def accuracy_differences(baseline: Baseline, dataset: Dataset, config: BenchConfig) -> list[str]:
    """What differs between the baseline's images and thresholds and these, such that accuracy does not compare."""
    old = baseline.result["data"]
    now = {"split": dataset.split, "images": len(dataset), "class_names": list(dataset.class_names)}
    found = _changes(tuple(now), old, now)
    ids = tuple(record.image_id for record in dataset.records)
    other = baseline.saved is not None and baseline.saved.image_ids != ids
    if not found and (other or old.get("fingerprint") not in (None, fingerprint(dataset))):
        found = [f"images or ground truth of split {dataset.split}"]
    before, asked = {"box_voting": None, **baseline.result["settings"]}, config.model_dump()
    for settings in (before, asked):
        settings["box_voting"] = settings["box_voting"] or "none"  # which is no lack of knowledge
    return found + _changes(_THRESHOLDS, before, asked)


def row_differences(old: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """What differs in how one artefact was run."""
    return _changes(_ROW, old, row)


def _changes(keys: Sequence[str], old: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "key: old, now new" for what the baseline says and is otherwise now; a GPU goes by its name."""

    def plain(value: Any) -> Any:
        return value.get("name") if isinstance(value, Mapping) else value

    pairs = [(key, plain(old[key]), plain(now[key])) for key in keys if key in old]
    return [f"{key}: {_said(before)}, now {_said(after)}" for key, before, after in pairs if before != after]


def software_differences(baseline: Baseline, device: Mapping[str, Any]) -> list[str]:
    """Versions that changed: worth saying, but a reason to compare and not one against it."""
    old, now = baseline.result["device"].get("versions", {}), device["versions"]
    return [f"{name} {old.get(name, 'absent')}, now {now.get(name, 'absent')}" for name in sorted({*old, *now})
            if old.get(name) != now.get(name)]  # fmt: skip


def _said(value: object) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
