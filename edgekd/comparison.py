"""What a comparison over seeds says: each method's figures, its gain over the student alone, and whether to believe it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

import numpy as np

from edgekd.artifact import source_commit, versions
from edgekd.bench.device import gpu_facts
from edgekd.bench.matching import Float64Array, Matches
from edgekd.bench.precision_recall import resampled_ap50
from edgekd.machine import cpu_model
from edgekd.recipe import Recipe
from edgekd.report.table import in_markdown
from edgekd.report.words import caveats, more_seeds
from edgekd.workspace import Workspace, is_synthetic, resolved_device

ALONE = "alone"
SCHEMA = "edgekd.comparison/1"
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, 97.5 %, for 1, 2, ... 15 degrees of freedom; beyond, 2.1 is a little wide, which is the safe side."""


@dataclass(frozen=True)
class Evaluated:
    """One trained student on the validation split.

    Attributes:
        method: "alone" or a recipe's name. figures: what `Accuracy.to_dict` gives. matches: for the bootstrap.
    """

    method: str
    seed: int
    figures: Mapping[str, Any]
    matches: Matches

    @cached_property
    def resampled(self) -> Float64Array:
        """(1000,) AP50 on resampled images, the same ones for every run; kept, since each run is compared with many."""
        return resampled_ap50([self.matches])[0, 1:]


def summary(base: Workspace, recipes: Sequence[Recipe], runs: Sequence[Evaluated]) -> dict[str, Any]:
    """What `comparison.json` holds; every run's seed must have been run alone too."""
    alone = {run.seed: run for run in runs if run.method == ALONE}
    methods = [ALONE, *dict.fromkeys(run.method for run in runs if run.method != ALONE)]
    rows = []
    for method in methods:
        own = [run for run in runs if run.method == method]
        row: dict[str, Any] = {
            "method": method,
            "seeds": [run.seed for run in own],
            **{key: spread([run.figures[key] for run in own]) for key in ("ap50", "ap", "voc07")},
        }
        if method != ALONE:
            row["gain"] = gain(own, [alone[run.seed] for run in own])
        rows.append(row)
    return {
        "schema": SCHEMA,
        "best": _best([[run for run in runs if run.method == method] for method in methods if method != ALONE]),
        "data": {
            "name": base.val.root.name,
            "train": base.train.split,
            "train_images": len(base.train),
            "val": base.val.split,
            "images": len(base.val),
            "synthetic": is_synthetic(base.val.root),
        },
        "student": recipes[0].student.model_dump(mode="json", exclude={"weights"}),
        "pretrained_backbone": recipes[0].student.weights is not None,
        "train": recipes[0].train.model_dump(mode="json"),
        "methods": {
            recipe.name: {
                "distill": recipe.distill.model_dump(mode="json"),
                "teachers": [teacher.name for teacher in recipe.teachers],
            }
            for recipe in recipes
        },
        "rows": rows,
        "provenance": {"commit": source_commit(), "versions": versions(), "device": _machine(base.device)},
    }


def _machine(device: str) -> str:
    """What trains here, such as "cpu: AMD EPYC"."""
    resolved = resolved_device(device)
    name = cpu_model() if resolved == "cpu" else (gpu_facts() or {}).get("name")
    return f"{resolved}: {name}" if name else resolved


def _best(methods: Sequence[Sequence[Evaluated]]) -> dict[str, Any] | None:
    """The method with the highest mean AP50 over the seeds that all have, and its lead over each other; None of one method."""
    shared = set.intersection(*({run.seed for run in own} for own in methods)) if len(methods) > 1 else set()
    if not shared:
        return None
    paired = [sorted((run for run in own if run.seed in shared), key=lambda run: run.seed) for own in methods]
    best = max(paired, key=lambda own: fmean(run.figures["ap50"] for run in own))
    leads = {own[0].method: gain(best, own) for own in paired if own is not best}
    return {"method": best[0].method, "seeds": sorted(shared), "ahead_of": leads}


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (None where a figure does not exist), and each value."""
    there = [value for value in values if value is not None]
    if not there:
        return {"mean": None, "sd": None, "values": list(values)}
    return {"mean": fmean(there), "sd": stdev(there) if len(there) > 1 else None, "values": list(values)}


def gain(method: Sequence[Evaluated], alone: Sequence[Evaluated]) -> dict[str, Any]:
    """The paired difference in AP50, method minus alone, or another method, with two 95 % intervals that answer two questions.

    "seeds" (Student's t over the paired differences): would other seeds show it? "images" (bootstrap over images of the mean
    over seeds): would other images show it? A gain is shown when both exclude zero.
    """
    differences = [m.figures["ap50"] - a.figures["ap50"] for m, a in zip(method, alone, strict=True)]
    mean, count = fmean(differences), len(differences)
    by_seed: list[float] | None = None
    if count > 1:
        half = _half_width(stdev(differences), count)
        by_seed = [mean - half, mean + half]
    drawn = np.mean([m.resampled - a.resampled for m, a in zip(method, alone, strict=True)], axis=0)
    by_image = [float(v) for v in np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5])]
    intervals = [interval for interval in (by_seed, by_image) if interval is not None]
    shown = by_seed is not None and (all(i[0] > 0 for i in intervals) or all(i[1] < 0 for i in intervals))
    return {
        "ap50": mean,
        "values": differences,
        "interval_seeds": by_seed,
        "interval_images": by_image,
        "verdict": ("gain" if mean > 0 else "loss") if shown else "no difference shown",
        # Where other images could undo it, seeds alone decide nothing.
        "seeds_to_show": _seeds_to_show(differences) if by_image[0] > 0 or by_image[1] < 0 else None,
        "per_class": _paired(method, alone, "per_class"),
        "by_size": _paired(method, alone, "by_size"),
    }


def _half_width(sd: float, count: int) -> float:
    """Half of Student's 95 % interval of a mean of `count` differences that spread by `sd`."""
    return T_975[min(count - 1, len(T_975)) - 1] * sd / math.sqrt(count)


def _seeds_to_show(differences: Sequence[float]) -> int | None:
    """How many leave zero out of their interval if mean and spread stay; None where these do, are two, or 1,000 would not."""
    if len(differences) < 3:  # two say next to nothing about the spread
        return None
    mean, sd, own = abs(fmean(differences)), stdev(differences), len(differences)
    needed = next((count for count in range(own, 1001) if _half_width(sd, count) < mean), own)
    return needed if needed > own else None


def _paired(method: Sequence[Evaluated], alone: Sequence[Evaluated], group: str) -> dict[str, float | None]:
    """Mean AP50 difference of each class or size."""
    out: dict[str, float | None] = {}
    for key in method[0].figures[group]:
        pairs = [
            (m.figures[group][key]["ap50"], a.figures[group][key]["ap50"]) for m, a in zip(method, alone, strict=True)
        ]
        values = [x - y for x, y in pairs if x is not None and y is not None]
        out[key] = fmean(values) if values else None
    return out


def table_markdown(data: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table; figures in points of 100."""
    facts = data["data"]
    kind = "synthetic " if facts["synthetic"] else ""
    seeds = max(len(row["seeds"]) for row in data["rows"])
    lines = [
        f"{data['student']['model']} (width {data['student']['width']:g}, {data['student']['input_size']} px), "
        f"{kind}{facts['name']} {facts['train']} ({facts['train_images']} images) -> {facts['val']} "
        f"({facts['images']} images), {data['train']['epochs']} epochs, {seeds} seed{'s' if seeds != 1 else ''}",
        "",
        "| | AP50 | AP | VOC07 | gain in AP50 | 95 % over seeds | 95 % over images | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        own = len(row["seeds"])
        name = row["method"] if own == seeds else f"{row['method']} ({own} seed{'s' if own != 1 else ''})"
        cells = [name, *(_mean_sd(row[key]) for key in ("ap50", "ap", "voc07"))]
        if "gain" in row:
            g = row["gain"]
            cells += [f"{100 * g['ap50']:+.1f}", _interval(g["interval_seeds"]), _interval(g["interval_images"])]
            cells.append(g["verdict"])
        else:
            cells += ["", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    if best := data.get("best"):
        lines += [
            "",
            f"{best['method']} has the highest mean of the methods ({_seeds(best['seeds'])}). Its lead:",
            "",
            "| over | in AP50 | 95 % over seeds | 95 % over images | |",
            "|---|---|---|---|---|",
        ]
        for method, lead in best["ahead_of"].items():
            intervals = _interval(lead["interval_seeds"]), _interval(lead["interval_images"])
            shown = "ahead" if lead["verdict"] == "gain" else lead["verdict"]
            lines.append(f"| {method} | {100 * lead['ap50']:+.1f} | {' | '.join(intervals)} | {shown} |")
    sizes = [row for row in data["rows"] if "gain" in row]
    if sizes:
        lines += ["", "Gain in AP50 by object size and by class:", ""]
        names = [*sizes[0]["gain"]["by_size"], *sizes[0]["gain"]["per_class"]]
        lines += ["| | " + " | ".join(map(in_markdown, names)) + " |", "|---" * (len(names) + 1) + "|"]
        for row in sizes:
            # Apart, since a class may be called "small" too.
            values = [row["gain"][group][n] for group in ("by_size", "per_class") for n in sizes[0]["gain"][group]]
            cells = ["-" if value is None else f"{100 * value:+.1f}" for value in values]
            lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    if said := [*more_seeds(data), *caveats(data)]:
        lines += ["", " ".join(said)]
    return "\n".join(lines) + "\n"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _mean_sd(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{100 * value['mean']:.1f}" + ("" if value["sd"] is None else f" ± {100 * value['sd']:.1f}")


def _interval(values: Sequence[float] | None) -> str:
    return "one seed" if values is None else f"{100 * values[0]:+.1f} to {100 * values[1]:+.1f}"
