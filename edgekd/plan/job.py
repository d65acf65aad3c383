"""One plan: candidates measured until those near the budget are known or time is up, a results file, recipes."""

from __future__ import annotations

import datetime
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgekd.artifact import sha256_file, source_commit, versions, write_json
from edgekd.bench.device import Contention, device_facts
from edgekd.bench.roof import cpu_roof
from edgekd.data.images import evenly_spread, load_image
from edgekd.device.target import Target
from edgekd.errors import UserError
from edgekd.plan.candidates import Candidate
from edgekd.plan.measure import Exporter, Here, Layout, Row, There
from edgekd.plan.recipes import HEURISTIC, fits, ranked, write_recipes
from edgekd.plan.search import Search
from edgekd.recipe import DataConfig, Recipe
from edgekd.types import Dataset

SCHEMA = "edgekd.plan/1"
RESULT = "plan.json"
_KEYS = ("name", "model", "width", "input_size", "precision", "macs", "latency_ms", "stages_ms")
"""What each row of it must have to be ranked and written as a recipe."""
_IMAGES = 16
_CONTENTION_WORTH_SAYING = 0.2
_SHARE_OF_PEAK = 0.4
_GUESSED_RATE = 1e7
"""MACs a millisecond, for a device of which nothing is known yet."""

Tell = Callable[[str], None]


class Meter(Protocol):
    """What measures candidates: `Here` or `There`."""

    def measure(self, candidates: Sequence[Candidate]) -> Any:
        """(candidate, row) one by one, as they are known."""
        ...


@dataclass(frozen=True)
class Asked:
    """What a plan is for.

    Attributes:
        budget_ms: the most that an image may take, median.
        threads: of one inference; None: as the device has them. time_limit_s: after which nothing more is begun.
        top: recipes to write. host_ms: with a target, left for preparing images and NMS.
        layout: of int8.
    """

    budget_ms: float
    threads: int | None
    time_limit_s: float = 300.0
    top: int = 6
    target: Target | None = None
    host_ms: float = 0.0
    layout: Layout = "x86"
    arguments: tuple[str, ...] = ()


@dataclass
class _Record:
    """What is known so far, kept in `plan.json` after each measurement, so that a plan can go on.

    Attributes:
        written: the recipes that plans have written here, with their SHA-256.
    """

    file: Path
    identity: Mapping[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    def load(self) -> bool:
        """Take over what an earlier plan measured under the same circumstances; whether there was anything."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise TypeError("not an object")
            self.written = dict(found.get("written", {}))
            if found["schema"] == SCHEMA and found["identity"] == self.identity:
                rows = [row for row in found["rows"] if "failed" not in row]
                for row in rows:
                    if absent := [key for key in _KEYS if key not in row]:
                        raise KeyError(*absent)
                    if not math.isfinite(row["latency_ms"]["median"]):
                        raise ValueError(f"{row['name']} takes {row['latency_ms']['median']} ms")
                self.rows = {row["name"]: row for row in rows}
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file}: not a plan that can be read", got=error, fix="move it away") from error
        return bool(self.rows)

    def of(self, candidates: Sequence[Candidate]) -> list[Row]:
        """What is known of these; an earlier plan may have measured others as well."""
        return [self.rows[candidate.name] for candidate in candidates if candidate.name in self.rows]

    def times(self, candidates: Sequence[Candidate]) -> dict[Candidate, float | None]:
        """Milliseconds of what is measured; None of what could not be."""
        known = {c: self.rows[c.name] for c in candidates if c.name in self.rows}
        return {c: None if "failed" in row else float(row["latency_ms"]["median"]) for c, row in known.items()}

    def save(self, **more: Any) -> dict[str, Any]:
        """Write the file."""
        body = {"schema": SCHEMA, "identity": dict(self.identity), **more, "written": self.written}
        body["rows"] = list(self.rows.values())
        write_json(self.file, body)
        return body


def make_plan(
    candidates: Sequence[Candidate],
    asked: Asked,
    out: Path,
    *,
    class_names: Sequence[str],
    images: Dataset | None,
    base: Recipe | None = None,
    data: DataConfig | None = None,
    say: Tell = lambda text: None,
) -> dict[str, Any]:
    """Measure, keep what is within the budget, write `plan.json` and recipes into `out`; returns what plan.json holds.

    Args:
        images: to time on and to calibrate int8 on; generated scenes if None.
        base, data: what the recipes are filled in with.

    Raises:
        UserError: `out` holds something unreadable. EdgeKDError: the device cannot be used.
    """
    record = _Record(out / RESULT, _identity(asked, class_names, images))
    if record.load():
        say(f"{len(record.rows)} candidates are in {record.file} already")
    started, contention = time.monotonic(), Contention()
    with tempfile.TemporaryDirectory(prefix="edgekd-plan-") as work:
        meter = _meter(asked, class_names, _image_files(images, Path(work)), Path(work), say)
        search = Search(candidates, asked.budget_ms, _rate(asked))
        new = _measure(search, meter, candidates, record, started + asked.time_limit_s, say)
    others = contention.facts()["cores_used_by_others"] if new and asked.target is None else None
    left = search.left(record.times(candidates))
    rows = record.of(candidates)
    best = ranked(rows, asked.budget_ms)
    for name, digest in record.written.items():  # by an earlier plan; one that was edited since is the user's own
        if (out / name).is_file() and sha256_file(out / name) == digest:
            (out / name).unlink()
    own = set(out.glob("*.yaml"))
    files, notes = write_recipes(best[: asked.top], base, data, out, asked.threads, asked.budget_ms)
    record.written = {file.name: sha256_file(file) for file in files if file not in own}
    record.save()  # at once: cut off here, the next plan would take them for the user's own
    return record.save(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=source_commit(),
        budget_ms=asked.budget_ms,
        candidates=len(candidates),
        seconds=round(time.monotonic() - started, 1),
        left=left,
        device=device_facts() if asked.target is None else {"target": asked.target.name},
        roof=cpu_roof(asked.threads) if asked.target is None else None,
        heuristic=HEURISTIC,
        measured=[row["name"] for row in rows if "failed" not in row],
        failed=[row["name"] for row in rows if "failed" in row],
        within=[row["name"] for row in rows if fits(row, asked.budget_ms)],
        best=[row["name"] for row in best],
        recipes=[file.name for file in files],
        notes=[*notes, *_notes(asked, images, rows, left, others)],
    )


def _measure(
    search: Search, meter: Meter, candidates: Sequence[Candidate], record: _Record, deadline: float, say: Tell
) -> bool:
    """Round after round, until nothing near the budget is unknown or time is up; whether anything was measured."""
    new = False
    while time.monotonic() < deadline:
        chosen = search.next_round(record.times(candidates))
        if not chosen:
            break
        for candidate, row in meter.measure(chosen):
            record.rows[candidate.name] = row
            record.save()
            new = True
            times = record.times(candidates)
            done = sum(ms is not None for ms in times.values())
            say(_progress(row, search.budget_ms, done, search.left(times)))
            if time.monotonic() >= deadline:
                break
    return new


def _progress(row: Row, budget_ms: float, done: int, left: int) -> str:
    if "failed" in row:
        return f"{row['name']}: failed, {row['failed'].splitlines()[0]}"
    ms = row["latency_ms"]["median"]
    verdict = "within" if ms <= budget_ms else "over"
    return f"{done} measured, about {left} to go: {row['name']} {row['macs'] / 1e9:.2f} GMACs {ms:.2f} ms, {verdict}"


def _identity(asked: Asked, class_names: Sequence[str], images: Dataset | None) -> dict[str, Any]:
    """What measured latencies depend on: rows of another identity are not taken over."""
    device = asked.target.name if asked.target is not None else device_facts()["cpu"]
    kept = ("edgekd", "torch", "onnx", "onnxruntime")
    return {
        "device": device,
        "threads": asked.threads,
        "classes": len(class_names),
        "images": "generated scenes" if images is None else f"{images.root.resolve().name}/{images.split}",
        "layout": asked.layout,
        "host_ms": asked.host_ms,
        "arguments": list(asked.arguments),
        "versions": {name: version for name, version in versions().items() if name in kept},
    }


def _meter(asked: Asked, class_names: Sequence[str], files: Sequence[Path], work: Path, say: Tell) -> Meter:
    exporter = Exporter(tuple(class_names), files, asked.layout, work)
    if asked.target is None:
        return Here(exporter, [load_image(file) for file in files], asked.threads)
    return There(exporter, asked.target, asked.host_ms, asked.arguments, asked.time_limit_s, say)


def _image_files(images: Dataset | None, work: Path) -> list[Path]:
    from edgekd.export.images import generated_scenes

    if images is not None:
        return evenly_spread(images.records, _IMAGES)
    return generated_scenes(work / "scenes", _IMAGES)


def _rate(asked: Asked) -> float:
    """MACs a millisecond to begin with."""
    if asked.target is not None:
        return _GUESSED_RATE
    peak = cpu_roof(asked.threads)["gmacs_per_s"]["fp32"]
    return _SHARE_OF_PEAK * peak * 1e6 if peak else _GUESSED_RATE


def _notes(asked: Asked, images: Dataset | None, rows: Sequence[Row], left: int, others: float | None) -> list[str]:
    said = [HEURISTIC]
    if others is not None and others > _CONTENTION_WORTH_SAYING:
        said.append(
            f"other processes used {others:.1f} cores meanwhile: latencies may be too high; use another --out later"
        )
    if images is None:
        said.append("timed on generated scenes of 320 x 240: give your own images with --data")
    if asked.target is not None:
        said.append(
            f"on the device inference alone was timed; {asked.host_ms:g} ms were added for the rest (--host-ms)"
        )
    if any(row.get("precision") == "int8" for row in rows):
        said.append(
            "int8 of an untrained network is as fast as a trained one's; what int8 loses in accuracy is unknown"
        )
    if left:
        said.append(f"about {left} candidates near the budget were not measured: run again to go on")
    return said
