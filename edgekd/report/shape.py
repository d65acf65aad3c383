"""What the page reads out of result files, whatever their age or origin: `fit` makes any JSON value hold it.

A shape is a dict of names to shapes, a list of one shape, `Each` (a mapping with free names), or a function of a value.
What is missing, of another kind or out of bounds becomes None (or empty), so that plots and templates never have to ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Shape = Any  # a dict, a list, an Each or a callable; a recursive alias would say no more

_MOST_TEXT = 2_000


@dataclass(frozen=True)
class Each:
    """A mapping whose names are free."""

    shape: Shape


def fit(value: Any, shape: Shape) -> Any:
    """`value` in the form of `shape`; names that the shape does not know are dropped."""
    if isinstance(shape, dict):
        found = value if isinstance(value, dict) else {}
        return {name: fit(found.get(name), inner) for name, inner in shape.items()}
    if isinstance(shape, list):
        return [fit(item, shape[0]) for item in value] if isinstance(value, list) else []
    if isinstance(shape, Each):
        found = value if isinstance(value, dict) else {}
        return {str(name)[:_MOST_TEXT]: fit(item, shape.shape) for name, item in found.items()}
    return shape(value)


def within(low: float, high: float) -> Callable[[Any], float | int | None]:
    """A finite number in [low, high]."""

    def number(value: Any) -> float | int | None:
        kind = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if kind and low <= value <= high else None

    return number


def text(value: Any) -> str | None:
    """A string, or a number as one."""
    if isinstance(value, (str, int, float)):
        return str(value)[:_MOST_TEXT]
    return None


def flag(value: Any) -> bool | None:
    """True or False."""
    return value if isinstance(value, bool) else None


def whole(value: Any) -> int | None:
    """A whole number that is not negative."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None


def plain(value: Any) -> str | None:
    """Anything simple, as people read it."""
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)[:_MOST_TEXT]
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())[:_MOST_TEXT]
    return {True: "yes", False: "no"}.get(value, text(value)) if isinstance(value, bool) else text(value)


def pair(of: Callable[[Any], float | int | None]) -> Callable[[Any], list[float] | None]:
    """[low, high], both there and in order."""

    def interval(value: Any) -> list[float] | None:
        if not isinstance(value, list) or len(value) != 2:
            return None
        low, high = of(value[0]), of(value[1])
        return None if low is None or high is None or low > high else [low, high]

    return interval


def curve(value: Any) -> list[float] | None:
    """Two numbers or more, all finite."""
    numbers = fit(value, [NUMBER])
    return numbers if len(numbers) > 1 and None not in numbers else None


NUMBER = within(-1e18, 1e18)
AMOUNT = within(0.0, 1e18)
SHARE = within(0.0, 1.0)
DIFFERENCE = within(-1.0, 1.0)
MILLISECONDS = within(1e-6, 1e9)
FACTOR = within(1e-9, 1e9)

LATENCY = {
    "median": MILLISECONDS,
    "p90": MILLISECONDS,
    "p99": MILLISECONDS,
    "max": MILLISECONDS,
    "samples": AMOUNT,
    "median_interval": pair(MILLISECONDS),
    "percentiles": curve,
}
ENERGY = dict.fromkeys(("gross_mj", "mean_w", "idle_w", "inferences", "seconds"), AMOUNT) | {
    "above_idle_mj": NUMBER,
    "rail": text,
    "source": text,
    "rails_mean_w": Each(AMOUNT),
}
ROW = {
    "name": text,
    "role": text,
    "artifact": text,
    "model": text,
    "runtime": text,
    "provider": text,
    "threads": AMOUNT,
    "input_hw": [[AMOUNT]],
    "sha256": text,
    "precision": text,
    "latency_ms": LATENCY,
    "stages_ms": Each(AMOUNT),
    "map": {
        "ap50": SHARE,
        "ap": SHARE,
        "voc07": SHARE,
        "ap50_interval": pair(SHARE),
        "per_class": Each({"objects": AMOUNT, "ap50": SHARE}),
        "by_size": Each({"ap50": SHARE}),
    },
    "precision_at_recall": curve,
    "parameters": AMOUNT,
    "macs": AMOUNT,
    "counted_from": text,
    "thresholds": {
        "nms": text,
        **dict.fromkeys(("score_threshold", "nms_iou", "box_voting"), SHARE),
        "max_detections": AMOUNT,
    },
    "size_bytes": AMOUNT,
    "peak_memory_bytes": AMOUNT,
    "model_memory_bytes": AMOUNT,
    "energy": ENERGY,
    "profile": {
        "tool": text,
        "total_ms": AMOUNT,
        "layers": [{"name": text, "op": text, "ms": AMOUNT, "share": SHARE, "macs": AMOUNT, "gflops": AMOUNT}],
    },
    "execution": text,
    "unknown_classes": [text],
    "roof": dict.fromkeys(("share", "limit_ms", "gmacs_per_s", "peak_gmacs_per_s"), AMOUNT) | {"bound": text},
    "throughput": {
        **dict.fromkeys(("images_per_s", "streams", "threads_a_stream", "batch"), AMOUNT),
        "interval": pair(AMOUNT),
    },
    "mlperf": {"scenario": text, "metric": text, "latency_ms": MILLISECONDS, "queries": AMOUNT, "note": text}
    | {"deviations": [text]},
    "device_ms": dict.fromkeys(("copy_in", "compute", "copy_out"), AMOUNT),
    "golden": {"images": AMOUNT, "confident": AMOUNT, "matched": AMOUNT},
    "speedup_vs_ensemble": FACTOR,
    "speedup_interval": pair(FACTOR),
}
LOOK = {
    "temperatures_c": Each(NUMBER),
    "clocks": Each({"now_mhz": AMOUNT, "max_mhz": AMOUNT, "governor": text, "pinned": flag}),
    "gpus": [{"temperature_c": NUMBER, "clock_mhz": AMOUNT}],
}
MACHINE = {
    **dict.fromkeys(("cpu", "machine", "governor", "os", "board", "python"), text),
    **dict.fromkeys(("cores", "threads", "usable_threads", "memory_bytes"), AMOUNT),
    "load": [AMOUNT],
    "gpu": {"name": text},
    "nvml": [{"name": text, "driver": text}],
    "jetson": {"model": text, "l4t": text, "jetpack": text, "power_mode": {"name": text}},
    "power_sensors": [text],
    "versions": Each(text),
}
MEASURED = {
    "schema": text,
    "created": text,
    "commit": text,
    "device": MACHINE,
    "conditions": {
        "before": LOOK,
        "during": {"max_temperatures_c": Each(NUMBER), "min_clocks_mhz": Each(AMOUNT)},
        "after": LOOK,
        "throttled": lambda value: fit(value, [text]) if isinstance(value, list) else None,
    },
    "settings": Each(plain),
    "rows": [ROW],
    "reference": text,
    "warnings": [text],
    "unfit_to_publish": [text],
}
ROOF = {"gmacs_per_s": Each(AMOUNT), "copy_gb_per_s": AMOUNT}
RESULT = {
    **MEASURED,
    "data": {
        **dict.fromkeys(("name", "format", "split"), text),
        **dict.fromkeys(("images", "objects"), AMOUNT),
        "class_names": [text],
        "synthetic": flag,
    },
    "ensemble": {"fusion": text, "iou": text, "execution": plain, "members": [text], "weights": [NUMBER]},
    "roof": {"cpu": ROOF, "gpu": ROOF},
    "comparisons": [
        {
            **dict.fromkeys(("a", "b", "a_role", "b_role"), text),
            **dict.fromkeys(("difference", "low", "high"), DIFFERENCE),
            "difference_shown": flag,
        }
    ],
    "files": dict.fromkeys(("detections", "detections_sha256", "examples"), text),
}
DEVICE_RESULT = {**MEASURED, "bundle": text}
AGREEMENT = dict.fromkeys(("both", "reference", "student", "neither"), AMOUNT)
EXAMPLES = {
    "shown_score": SHARE,
    "agreement": {
        "objects": AGREEMENT,
        "per_class": Each(AGREEMENT),
        "images": dict.fromkeys(("reference_ahead", "level", "student_ahead"), AMOUNT),
    },
    "images": [
        {
            "image_id": text,
            "index": whole,
            "why": text,
            "file": text,
            "image_hw": [whole],
            "objects": {"boxes_xyxy": [[NUMBER]], "labels": [whole], "ignored": [flag]},
        }
    ],
}
VIDEO = {
    "schema": text,
    "source": {"name": text, "live": flag, **dict.fromkeys(("fps", "width", "height"), AMOUNT)},
    "realtime": flag,
    "device": MACHINE,
    "threads": AMOUNT,
    "rows": [
        {
            **dict.fromkeys(("name", "role", "precision", "runtime", "sha256"), text),
            **dict.fromkeys(("frames", "offered", "dropped", "seconds", "fps", "source_fps_reached"), AMOUNT),
            "latency_ms": LATENCY,
            "stages_ms": Each(AMOUNT),
        }
    ],
    "notes": [text],
}
SPREAD = {"mean": SHARE, "sd": SHARE, "values": [SHARE]}
GAIN = {
    "ap50": DIFFERENCE,
    "values": [DIFFERENCE],
    "interval_seeds": pair(within(-100, 100)),
    "interval_images": pair(within(-100, 100)),
    "verdict": text,
    "seeds_to_show": AMOUNT,
    "per_class": Each(DIFFERENCE),
    "by_size": Each(DIFFERENCE),
}
COMPARISON = {
    "schema": text,
    "data": {
        **dict.fromkeys(("name", "train", "val"), text),
        **dict.fromkeys(("images", "train_images"), AMOUNT),
        "synthetic": flag,
    },
    "student": {"model": text, "width": NUMBER, "input_size": AMOUNT},
    "pretrained_backbone": flag,
    "train": {"epochs": AMOUNT, "select": text},
    "methods": Each(
        {"teachers": [text], "distill": {"terms": [{"loss": text, "weight": NUMBER}], "cache": {"views": AMOUNT}}}
    ),
    "rows": [
        {
            "method": text,
            "seeds": [AMOUNT],
            **dict.fromkeys(("ap50", "ap", "voc07"), SPREAD),
            "gain": GAIN,
        }
    ],
    "best": {"method": text, "seeds": [AMOUNT], "ahead_of": Each(GAIN)},
    "provenance": {"commit": text, "versions": Each(text), "device": plain},
}


def measured(data: Any, shape: Shape) -> dict[str, Any]:
    """A result fitted to `shape`, its rows with a name and a role each, whatever it was."""
    found: dict[str, Any] = fit(data, shape)
    for number, row in enumerate(found["rows"], 1):
        row["name"] = row["name"] or f"row {number}"
        row["role"] = row["role"] or "detector"
        row["precision"] = row["precision"] or ""
    found["comparisons"] = [
        c for c in found.get("comparisons", ()) if None not in (c["a"], c["b"], c["difference"], c["low"], c["high"])
    ]
    return found
