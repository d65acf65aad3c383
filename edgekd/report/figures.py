"""Every plot of a page, by name, for a wide and a narrow screen; a plot without data is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from edgekd.report import bars, dots, gains, spread, tradeoff, training, words
from edgekd.report.marks import Row, Rows
from edgekd.report.sources import Sources

WIDE, NARROW = 880.0, 326.0
HALF = 430.0

Draw = Callable[[float], str]


def compared(rows: Rows) -> Rows:
    """The rows that detailed plots have room for: the ensemble and the students, or all where there are none."""
    return [row for row in rows if row["role"] != "teacher"] or rows


def profiled(rows: Rows) -> Row | None:
    """The row whose layers are drawn: the student that the answer is about, or the first that has a profile."""
    there = [row for row in rows if bars.slowest_layers(row)]
    student = words.headline_student(rows)
    return next((row for row in there if row is student), there[0] if there else None)


def draw_all(sources: Sources) -> dict[str, tuple[str, str]]:
    """Name to (wide, narrow) picture."""
    found: dict[str, tuple[Draw, float]] = {}
    if sources.result is not None:
        found |= {name: (draw, WIDE) for name, draw in _of_result(sources.result["rows"]).items()}
    for index, (_, comparison) in enumerate(sources.comparisons):
        if rows := gains.gain_rows(comparison):
            found[f"gains{index}"] = (partial(gains.gain_plot, rows), WIDE)
    for index, (_, device) in enumerate(sources.devices):
        found |= {f"{name}{index}": (draw, WIDE) for name, draw in _of_device(device["rows"]).items()}
    if any(run.accuracy for run in sources.runs):
        found["accuracy"] = (partial(training.accuracy_plot, sources.runs), WIDE)
    for index, run in enumerate(sources.runs):
        if any(value > 0 for curve in run.losses.values() for _, value in curve):
            found[f"loss{index}"] = (partial(training.loss_plot, run), HALF)
    return {name: (draw(width), draw(NARROW)) for name, (draw, width) in found.items()}


def _of_result(rows: Rows) -> dict[str, Draw]:
    some = compared(rows)
    found: dict[str, Draw] = {}
    if tradeoff.placed(rows):
        found["tradeoff"] = partial(tradeoff.tradeoff_plot, rows)
    if stages := bars.stage_bars(rows):
        found["stages"] = lambda width: bars.bar_plot(stages, width, "Stage times", "ms an image, medians")
    if spread.spread_rows(rows):
        found["spread"] = partial(spread.spread_plot, rows)
    if memory := bars.memory_bars(rows):
        found["memory"] = lambda width: bars.bar_plot(memory, width, "Peak memory", "MB of a fresh process")
    if energy := bars.energy_bars(rows):
        found["energy"] = lambda width: bars.bar_plot(energy, width, "Energy", "mJ an image")
    if roof := bars.roof_bars(rows):
        most = max(100.0, *(sum(value for _, value, _ in bar.parts) for bar in roof))
        found["roof"] = lambda width: bars.bar_plot(roof, width, "Share of the roof", "% of the roof", most=most)
    if (row := profiled(rows)) is not None:
        layers = bars.layer_bars(row)
        found["layers"] = lambda width: bars.bar_plot(layers, width, "Slowest layers", "ms")
    if any(row["precision_at_recall"] for row in rows):
        found["recall"] = partial(dots.recall_plot, rows)
    for name, kind in (("classes", "per_class"), ("sizes", "by_size")):
        if dots.groups_of(some, kind):
            found[name] = partial(dots.group_plot, some, kind)
    return found


def _of_device(rows: Rows) -> dict[str, Draw]:
    found: dict[str, Draw] = {}
    if latency := bars.latency_bars(rows):
        found["device-latency"] = lambda width: bars.bar_plot(
            latency, width, "Latency on the device", "ms an inference"
        )
    if energy := bars.energy_bars(rows):
        found["device-energy"] = lambda width: bars.bar_plot(energy, width, "Energy on the device", "mJ an inference")
    return found


_ABSENT = {
    "tradeoff": ("Accuracy against latency", "no row has both an AP50 and a latency"),
    "stages": ("Stage times", "not in the file"),
    "spread": (
        "Latency distributions",
        "no percentiles in the file: measured by an older edgekd, or by something else",
    ),
    "roof": ("Distance to the limit", "this machine's peak was not measured, or the files' work could not be counted"),
    "layers": ("Slowest layers", "measure with edgekd bench --profile"),
    "memory": ("Memory", "not measured"),
    "energy": ("Energy", "no sensor that a user may read gives this machine's power, or energy was switched off"),
    "sizes": ("Accuracy by size of object", "not in the file"),
    "classes": ("Accuracy by class", "not in the file"),
    "recall": ("Precision and recall", "not in the file"),
}


def absent(sources: Sources, figures: Mapping[str, object]) -> list[tuple[str, str]]:
    """(what this page does not show, why or how to get it)."""
    if sources.result is None:
        said = [("Accuracy and latency side by side", "no result of edgekd bench among these files")]
    else:
        said = [reason for name, reason in _ABSENT.items() if name not in figures and sources.result["rows"]]
        if sources.saved is None or sources.examples is None:
            said.append(("Pictures of agreement and disagreement", "no detections and examples beside the result"))
    if not sources.comparisons:
        said.append(("Method gains over seeds", "name a folder of edgekd compare too"))
    if not sources.devices:
        said.append(("Another device", "name a result of edgekd bench --target too"))
    return said
