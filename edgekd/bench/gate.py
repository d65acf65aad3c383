"""A gate for CI: new artefacts against an earlier result, failed only by a regression beyond its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.bench.baseline import (
    Baseline,
    Pair,
    accuracy_differences,
    differences,
    pair_up,
    read_baseline,
    row_differences,
    software_differences,
)
from edgekd.bench.entries import BenchArtifact
from edgekd.bench.measuring import LATENCY_IMAGES
from edgekd.bench.precision_recall import map_difference
from edgekd.bench.saved import Saved, SavedRow
from edgekd.device.stats import Interval, median_ratio, median_ratio_between_runs
from edgekd.errors import UserError
from edgekd.recipe import BenchConfig
from edgekd.types import Dataset

EXIT_REGRESSED = 3

_ROUNDING = 1e-4


@dataclass(frozen=True)
class Limits:
    """How much worse is still allowed; None: not asked.

    Attributes:
        slowdown: of median latency, as a share: 0.05 is 5 %. map_drop: of AP50, in [0, 1]: 0.005 is half a point.
    """

    slowdown: float | None
    map_drop: float | None


@dataclass(frozen=True)
class Gate:
    """What is to be compared, decided before anything is measured.

    Attributes:
        again: old files to measure beside the new ones. differing: what forbids comparing stored latencies, and
            `other_data` stored accuracies. across: compare the former all the same.
    """

    baseline: Baseline
    limits: Limits
    pairs: tuple[Pair, ...]
    again: tuple[BenchArtifact, ...]
    differing: tuple[str, ...]
    other_data: tuple[str, ...]
    across: bool
    notes: tuple[str, ...]


def open_gate(
    path: Path,
    limits: Limits,
    artifacts: Sequence[BenchArtifact],
    dataset: Dataset,
    config: BenchConfig,
    *,
    folders: Sequence[Path] = (),
    across: bool = False,
) -> Gate:
    """Read the baseline and decide how each artefact is compared with it.

    Old files that are still there are measured once more, interleaved with the new ones: the comparison that neither
    another machine nor another day can bend. Otherwise stored figures count, if they were measured alike.

    Args:
        folders: where old files may lie, known by their hash.
        across: compare stored latencies although something differs.

    Raises:
        ArtifactError: the baseline cannot be read. UserError: no limit, no such folder, no counterpart, or no fair
            comparison.
    """
    if limits.slowdown is None and limits.map_drop is None:
        raise UserError("--baseline without a limit", fix="give --max-slowdown 5%, --max-map-drop 0.5, or both")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder", expected="one that holds the baseline's files")
    baseline = read_baseline(path)
    pairs, again = pair_up(baseline, artifacts, folders)
    differing = differences(baseline, dataset, config, min(LATENCY_IMAGES, len(dataset)))
    other_data = accuracy_differences(baseline, dataset, config)
    # An unchanged file may pass without a comparison, but not where nothing at all would be compared.
    stored = [p.name for p in pairs if p.again is None and not (p.same_file and again)]
    if stored and limits.map_drop is not None and other_data:
        raise UserError(
            f"{path}: its accuracy was not measured alike",
            got="; ".join(other_data),
            expected="the same images and thresholds",
            fix=f"keep the old file of {', '.join(stored)} where it can be found (--baseline-files DIR), or measure alike",
        )
    if stored and limits.slowdown is not None and differing and not across:
        raise _unlike(path, stored, differing)
    known = {pair.name for pair in pairs}
    notes = [f"{a.name} is not in the baseline: not compared" for a in artifacts if a.name not in known]
    used = {str(pair.old["name"]) for pair in pairs}
    notes += [
        f"{row['name']} of the baseline was not measured now"
        for row in baseline.result["rows"]
        if row["name"] not in used and row["role"] not in ("ensemble", "baseline")
    ]
    return Gate(baseline, limits, tuple(pairs), tuple(again), tuple(differing), tuple(other_data), across, tuple(notes))


def _unlike(path: Path, names: Sequence[str], differing: Sequence[str]) -> UserError:
    return UserError(
        f"{path}: its latencies do not compare with ones measured here",
        got="; ".join(differing),
        expected="the same machine, threads, runtime, settings and images",
        fix=f"keep the old file of {', '.join(names)} where it can be found (--baseline-files DIR): it is then measured "
        "beside the new one; or make a new baseline here; or say --across-conditions",
    )


def judge(gate: Gate, result: Mapping[str, Any], saved: Saved, dataset: Dataset, *, seed: int = 0) -> dict[str, Any]:
    """Hold the new result against the baseline: {"passed", "limits", "pairs", "conditions", "notes"}, plain JSON.

    Raises:
        UserError: a file was run by another runtime than in the baseline, and stored latencies cannot stand for it.
    """
    now = {row.name: row for row in saved.rows}
    rows = {row["name"]: row for row in result["rows"]}
    before = {} if gate.baseline.saved is None else {row.name: row for row in gate.baseline.saved.rows}
    pairs = []
    for pair in gate.pairs:
        row = rows[pair.name]
        otherwise = [] if pair.again is not None else row_differences(pair.old, row)
        if otherwise and gate.limits.slowdown is not None and not gate.across:
            raise _unlike(gate.baseline.path, [pair.name], otherwise)
        old = now[pair.again] if pair.again is not None else before.get(str(pair.old["name"]))
        side_by_side = pair.again is not None
        pairs.append(
            {
                "name": pair.name,
                "baseline": pair.old["name"],
                "how": "side by side" if side_by_side else "same file" if pair.same_file else "stored",
                "conditions": otherwise,
                "latency": _latency(gate, pair, row, now[pair.name], old, seed),
                "map": _accuracy(gate, pair, row, rows, now[pair.name], old, dataset, seed),
            }
        )
    notes = list(gate.notes)
    if gate.baseline.missing is not None and any(pair.again is None for pair in gate.pairs):
        notes.append(f"{gate.baseline.missing}: intervals come from stored figures, or are missing")
    return {
        "baseline": gate.baseline.path.name,
        "baseline_created": gate.baseline.result.get("created"),
        "limits": {"slowdown": gate.limits.slowdown, "map_drop": gate.limits.map_drop},
        "passed": not any(part["regressed"] for pair in pairs for part in (pair["latency"], pair["map"])),
        "pairs": pairs,
        "conditions": [*gate.differing],
        "versions": software_differences(gate.baseline, result["device"]),
        "notes": notes,
    }


def _latency(
    gate: Gate, pair: Pair, row: Mapping[str, Any], now: SavedRow, old: SavedRow | None, seed: int
) -> dict[str, Any]:
    """New over old median: {"ratio", "low", "high", "basis", "regressed", ...}."""
    limit, new_ms = gate.limits.slowdown, row["latency_ms"]["median"]
    new = now.stages_ms.sum(-1)
    if pair.again is not None and old is not None:
        before = old.stages_ms.sum(-1)
        found = median_ratio(new, before, seed=seed)
        basis, old_ms = "measured side by side, interleaved", float(round(_median(old), 3))
    else:
        old_ms = pair.old["latency_ms"]["median"]
        if pair.same_file and gate.differing and not gate.across:
            reason = "the same file, measured under other conditions: nothing to compare"
            return _part(old_ms, new_ms, None, reason, limit, False)
        if old is not None:
            found = median_ratio_between_runs(new, old.stages_ms.sum(-1), seed=seed)
            basis = "two runs: the interval does not hold what changed in between"
        else:
            ends, old_ends = _interval(row["latency_ms"], "median"), _interval(pair.old["latency_ms"], "median")
            found = Interval(new_ms / old_ms, ends[0] / old_ends[1], ends[1] / old_ends[0])
            basis = "two runs, from stored medians"
        if gate.differing:
            basis += ", under other conditions"
    return _part(old_ms, new_ms, found, basis, limit, limit is not None and found[1] > 1.0 + limit)


def _accuracy(
    gate: Gate,
    pair: Pair,
    row: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
    now: SavedRow,
    old: SavedRow | None,
    dataset: Dataset,
    seed: int,
) -> dict[str, Any]:
    """New minus old AP50, in [-1, 1]."""
    limit, new_ap = gate.limits.map_drop, row["map"]["ap50"]
    old_row = rows[pair.again] if pair.again is not None else pair.old
    old_ap = old_row["map"]["ap50"]
    if new_ap is None or old_ap is None or (pair.again is None and gate.other_data):
        why = "no objects to compare on" if new_ap is None or old_ap is None else "; ".join(gate.other_data)
        return _part(old_ap, new_ap, None, why, limit, False)
    found = None
    if old is not None:
        found = map_difference(
            dataset.records, now.detections, old.detections, len(dataset.class_names), resamples=1000, seed=seed
        )
        basis = "paired bootstrap over images"
        if found is not None and abs(found[0] - (new_ap - old_ap)) > _ROUNDING:
            found = None  # the answers are not those that the baseline's figure came from
    if found is None:
        # Two intervals as of independent figures: wider than the paired one, so it fails less.
        ends, old_ends = _interval(row["map"], "ap50"), _interval(old_row["map"], "ap50")
        difference = new_ap - old_ap
        below = math.hypot(new_ap - ends[0], old_ends[1] - old_ap)
        above = math.hypot(ends[1] - new_ap, old_ap - old_ends[0])
        found, basis = (
            (difference, difference - below, difference + above),
            "unpaired: the baseline's answers are missing",
        )
    return _part(old_ap, new_ap, found, basis, limit, limit is not None and found[2] < -limit)


def _interval(figures: Mapping[str, Any], key: str) -> tuple[float, float]:
    """The figure's stored interval; the figure alone where there is none, or none that holds it."""
    value = float(figures[key])
    low, high = figures.get(f"{key}_interval") or (value, value)
    return (low, high) if low <= value <= high else (value, value)


def _part(
    old: float | None,
    new: float | None,
    found: tuple[float, float, float] | None,
    basis: str,
    limit: float | None,
    regressed: bool,
) -> dict[str, Any]:
    change = {} if found is None else dict(zip(("change", "low", "high"), (round(v, 6) for v in found), strict=True))
    return {"old": old, "new": new, "basis": basis, "limit": limit, "regressed": regressed, **change}


def _median(row: SavedRow) -> float:
    return float(np.median(row.stages_ms.sum(-1)))
