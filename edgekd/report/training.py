"""How the runs of a chain learnt: their logs, thinned to what a plot can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.report import svg
from edgekd.report.marks import shortened
from edgekd.report.shape import AMOUNT, NUMBER, SHARE, Each, fit, text
from edgekd.report.words import MINUS
from edgekd.training.runlog import read_log

Curve = list[tuple[float, float]]

_BINS = 120
_RECORD = {
    "event": text,
    **dict.fromkeys(("step", "steps", "epoch", "epochs"), AMOUNT),
    "losses": Each(NUMBER),
    "map": {"ap50": SHARE},
}


@dataclass(frozen=True)
class TrainingRun:
    """One run's curves over epochs.

    Attributes:
        name: the run folder's.
        role: as in a result's rows.
        losses: by term, averaged over stretches of steps; "loss" is their sum.
        accuracy: AP50 in points on the validation images, while training.
    """

    name: str
    role: str
    losses: Mapping[str, Curve]
    accuracy: Curve


def training_runs(folder: Path) -> list[TrainingRun]:
    """The runs of a chain that left a log: student, distilled, teachers."""
    teachers = folder / "teachers"
    places = [("student", "student"), ("distilled", "student_distilled")]
    found = [(folder / name, role) for name, role in places]
    found += [(path, "teacher") for path in (sorted(teachers.iterdir()) if teachers.is_dir() else ()) if path.is_dir()]
    if (folder / "metrics.jsonl").is_file():  # a single run's own folder
        found.append((folder, "student"))
    runs = [_read(path, role) for path, role in found]
    return [run for run in runs if run.losses or run.accuracy]


def _read(folder: Path, role: str) -> TrainingRun:
    records = [fit(record, _RECORD) for record in read_log(folder)]
    records = [record for record in records if record["step"] is not None]
    steps = [record for record in records if record["event"] == "step"]
    an_epoch = 1.0
    if steps:
        last = steps[-1]
        total, epochs = last["steps"] or last["step"] + 1, last["epochs"] or (last["epoch"] or 0) + 1
        an_epoch = max(1.0, total / epochs)
    terms: dict[str, Curve] = {}
    for record in steps:
        for term, value in record["losses"].items():
            if value is not None:
                terms.setdefault(term, []).append((record["step"] / an_epoch, float(value)))
    accuracy = [
        (record["step"] / an_epoch, 100 * float(record["map"]["ap50"]))
        for record in records
        if record["event"] == "eval" and record["map"]["ap50"] is not None
    ]
    return TrainingRun(folder.name, role, {term: _thinned(curve) for term, curve in terms.items()}, accuracy)


def _thinned(curve: Curve) -> Curve:
    """Means over equal stretches."""
    if len(curve) <= _BINS:
        return curve
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in np.array_split(np.array(curve), _BINS)]


def accuracy_plot(runs: Sequence[TrainingRun], width: float) -> str:
    """AP50 on the validation images over epochs, all runs."""
    shown = [run for run in runs if run.accuracy]
    height = 300.0
    left, right, top, bottom = 40.0, width - 12, 34.0, height - 44
    x = svg.Scale(0, max(e for run in shown for e, _ in run.accuracy) or 1.0, left, right)
    low, high = svg.padded([v for run in shown for _, v in run.accuracy], 0.08, 1.0)
    y = svg.Scale(max(0.0, low), min(100.0, high), bottom, top)
    body = [svg.bottom_axis(x, bottom, top, "epochs"), svg.left_axis(y, left, right, "AP50, points")]
    teachers = [run.name for run in shown if run.role == "teacher"]
    for run in shown:
        dash = teachers.index(run.name) % 4 if run.role == "teacher" else 0
        places = [(x(epoch), y(value)) for epoch, value in run.accuracy]
        body.append(svg.polyline(places, f"curve r-{run.role} dash-{dash}"))
        for (epoch, value), place in zip(run.accuracy, places, strict=True):
            body.append(
                svg.marker(*place, run.role, f"mark r-{run.role}", f"{run.name}, epoch {epoch:.0f}: {value:.1f}", 3)
            )
    said = "; ".join(f"{run.name} ends at {run.accuracy[-1][1]:.1f} AP50" for run in shown)
    return svg.svg(width, height, f"Validation accuracy while training. {said}.", body)


def loss_plot(run: TrainingRun, width: float) -> str:
    """A run's loss terms over epochs, on a logarithmic scale."""
    height = 240.0
    curves = {term: [(e, v) for e, v in curve if v > 0] for term, curve in run.losses.items()}
    curves = {term: curve for term, curve in curves.items() if curve}
    if not curves:
        return ""
    left, right, top, bottom = 44.0, width - 84, 30.0, height - 44
    values = [v for curve in curves.values() for _, v in curve]
    x = svg.Scale(0, max(e for curve in curves.values() for e, _ in curve) or 1.0, left, right)
    y = svg.Scale(min(values) * 0.9, max(values) * 1.1, bottom, top, log=True)
    body = [svg.bottom_axis(x, bottom, top, "epochs", 4), svg.left_axis(y, left, right, "loss (log scale)", 4)]
    ends = []
    for order, (term, curve) in enumerate(sorted(curves.items(), key=lambda item: item[0] != "loss")):
        style = "curve total" if term == "loss" else f"curve term dash-{order % 4}"
        body.append(svg.polyline([(x(e), y(v)) for e, v in curve], style))
        ends.append((y(curve[-1][1]), "total" if term == "loss" else term))
    for place, name in _spread(ends, 13.0, bottom):
        body.append(svg.text(right + 6, place + 4, shortened(name, 13), "label small"))
    said = "; ".join(f"{term} from {curve[0][1]:.2f} to {curve[-1][1]:.2f}" for term, curve in curves.items())
    return svg.svg(width, height, f"Losses of {run.name}. {said.replace('-', MINUS)}.", body)


def _spread(ends: Sequence[tuple[float, str]], apart: float, bottom: float) -> list[tuple[float, str]]:
    """Labels moved down so that none covers another, then up where the last left the plot."""
    placed: list[tuple[float, str]] = []
    for place, name in sorted(ends):
        placed.append((max(place, placed[-1][0] + apart) if placed else place, name))
    excess = max(0.0, placed[-1][0] - bottom) if placed else 0.0
    return [(place - excess, name) for place, name in placed]


def run_facts(runs: Sequence[TrainingRun]) -> list[dict[str, Any]]:
    """For the legend."""
    return [{"name": run.name, "role": run.role} for run in runs if run.accuracy]
