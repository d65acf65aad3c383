"""One run's results as GitHub-flavoured Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """The page that is printed and written beside the JSON."""
    student, settings = result["student"], result["settings"]
    trained = (
        "trained" if student["trained"] else "**untrained** (its latency is that of a trained one; it has no accuracy)"
    )
    lines = [
        "# Peers side by side",
        "",
        f"{result['device']['cpu']}, core {result['core']}, one thread; {result['data']}, {result['images']} images; "
        f"{settings['clock']}, {settings['samples']} runs of each in {settings['rounds']} interleaved rounds; others kept "
        f"{result['cores_used_by_others']} cores busy. Student: {student['model']}, width {student['width']}, "
        f"{student['classes']} classes, {trained}. Score over {settings['score_threshold']:.4g}, NMS at "
        f"{settings['nms_iou']}, at most {settings['max_detections']} boxes. Ratios of medians "
        "with 95 % intervals (block bootstrap).",
        "",
        *_table(("bar", "wanted", "measured", "met"), (_bar(entry) for entry in result["bars"])),
        "",
        *_table(
            ("system", "input", "classes", "median ms", "pre", "inference", "post", "faster than usual", "AP50", "AP"),
            (_row(row) for row in result["rows"]),
        ),
    ]
    tools = [entry for entry in result["tensorrt"] if "skipped" not in entry]
    if tools:
        lines += ["", *_table(("file", "tool", "ms"), ((e["name"], e["tool"], _times(e)) for e in tools))]
    reasons = {
        **result["skipped"],
        **{entry["tool"]: entry["skipped"] for entry in result["tensorrt"] if "skipped" in entry},
    }
    if reasons:
        lines += ["", "Not measured:", "", *(f"- {name}: {reason}" for name, reason in reasons.items())]
    return "\n".join(lines) + "\n"


def _bar(entry: dict[str, Any]) -> Sequence[str]:
    if "not_measured" in entry:
        return entry["what"], "", "not measured", ""
    return (
        entry["what"],
        f"{'<=' if entry['at_most'] else '>='} {entry['wanted']}",
        _ratio(entry["ratio"]),
        entry["met"],
    )


def _row(row: dict[str, Any]) -> Sequence[str]:
    stages, accuracy = row["stages_ms"], row["accuracy"] or {}
    return (
        row["name"] + (f" ({row['note']})" if row["note"] else ""),
        "x".join(str(side) for side in row["input_hw"]),
        str(row["classes"]),
        f"{row['latency_ms']['median']:.2f}",
        *(f"{stages[stage]:.2f}" for stage in ("pre", "infer", "post")),
        _ratio(row["times_faster_than_usual"]),
        *("" if accuracy.get(key) is None else f"{100 * accuracy[key]:.1f}" for key in ("ap50", "ap")),
    )


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _times(entry: dict[str, Any]) -> str:
    if "average_ms" in entry:
        return ", ".join(f"{runner} {ms:.3f}" for runner, ms in entry["average_ms"].items())
    return f"{entry['compute_ms']:.3f} compute, {entry['latency_ms']} with copies"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
