"""A benchmark's result as text: a table for a terminal, and a gate's verdict in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.report.table import aligned, conditions, in_markdown, write_table
from edgekd.report.words import (
    NOTHING,
    ROLE_NAMES,
    answer,
    gain,
    interval,
    milliseconds,
    number,
    points,
    signed,
    times,
)

HEADINGS = (
    "name",
    "role",
    "AP50",
    "AP50:95",
    "VOC07",
    "ms median",
    "p90",
    "pre/infer/post",
    "speed-up",
    "M params",
    "GMACs",
    "MB",
)


def summary_text(result: Mapping[str, Any]) -> str:
    """The comparison table, what can be said from it, and what to know before believing it."""
    lines = aligned([HEADINGS, *(_cells(row) for row in result["rows"])], words=(0, 1))
    lines += ["", conditions(result), _run_by(result["rows"])]
    lines += [sentence for sentence in (answer(result), gain(result)) if sentence]
    lines += [said for row in result["rows"] for said in _under_load(row)]
    lines += [f"note: {warning}" for warning in result.get("warnings", ())]
    return "\n".join(lines)


def publish_text(result: Mapping[str, Any]) -> str:
    """Whether the figures may be published, in one line under their summary."""
    reasons = [text for text in result["unfit_to_publish"] if text not in result["warnings"]]
    if notes := len(result["unfit_to_publish"]) - len(reasons):
        reasons.insert(0, f"{notes} of the notes above" if notes > 1 else "a note above")
    return f"not fit to publish: {'; '.join(reasons)}" if reasons else "fit to publish: enough samples, a quiet machine"


def _run_by(rows: Sequence[Mapping[str, Any]]) -> str:
    """What computed each row; names are left out where it was the same for all."""
    by: dict[str, list[str]] = {}
    for row in rows:
        by.setdefault(f"{row['runtime']} ({row['provider']})", []).append(row["name"])
    if len(by) == 1:
        return f"run by {next(iter(by))}"
    return "; ".join(f"{', '.join(names)}: run by {runtime}" for runtime, names in by.items())


def _under_load(row: Mapping[str, Any]) -> list[str]:
    """Throughput and MLPerf scenario of a row in words, where they were measured."""
    said = []
    if load := row.get("throughput"):
        low, high = load["interval"]
        said.append(
            f"{row['name']}: {number(load['images_per_s'])} images/s [{number(low)}, {number(high)}] on {load['streams']} "
            f"stream{'s' if load['streams'] != 1 else ''} x {load['threads_a_stream']} thread"
            f"{'s' if load['threads_a_stream'] != 1 else ''}, batch {load['batch']}"
        )
    if scenario := row.get("mlperf"):
        said.append(
            f"{row['name']}: {scenario['scenario']}: {milliseconds(scenario['latency_ms'])} ms, {scenario['metric']}, "
            f"{number(scenario['queries'], 0)} queries; {scenario['note']}. Deviations: {'; '.join(scenario['deviations'])}"
        )
    if device := row.get("device_ms"):
        said.append(
            f"{row['name']}: by the device's clock {milliseconds(device['compute'])} ms compute, "
            f"{milliseconds(device['copy_in'])} ms copying in, {milliseconds(device['copy_out'])} ms out"
        )
    return said


def _cells(row: Mapping[str, Any]) -> list[str]:
    latency, stages, accuracy = row["latency_ms"], row["stages_ms"], row["map"]
    return [
        str(row["name"]) if str(row["name"]).endswith(row["precision"]) else f"{row['name']} {row['precision']}",
        ROLE_NAMES.get(row["role"], str(row["role"])),
        *(points(accuracy[key]) for key in ("ap50", "ap", "voc07")),
        milliseconds(latency["median"]),
        milliseconds(latency["p90"]),
        "/".join(milliseconds(stages[key]) for key in ("pre", "infer", "post")),
        times(row["speedup_vs_ensemble"]),
        number(row["parameters"], 2, 1e6),
        number(row["macs"], 2, 1e9),
        number(row["size_bytes"], 1, 1e6),
    ]


def gate_markdown(gate: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """A gate's verdict as GitHub-flavoured Markdown: what was compared, how, and what failed."""
    failed = [pair["name"] for pair in gate["pairs"] if pair["latency"]["regressed"] or pair["map"]["regressed"]]
    verdict = f"regression in {', '.join(map(in_markdown, failed))}" if failed else "no regression beyond the limits"
    lines = [
        f"### edgekd bench: {verdict}",
        "",
        "| | latency, ms | ratio [95 %] | limit | AP50 | difference [95 %] | limit | |",
        "|:--|--:|--:|--:|--:|--:|--:|:--|",
        *(_gate_row(pair) for pair in gate["pairs"]),
        "",
    ]
    lines += [
        f"- **{in_markdown(pair['name'])}**{_other_name(pair)}: latency {pair['latency']['basis']}; AP50 {pair['map']['basis']}"
        + "".join(f"; {in_markdown(text)}" for text in pair["conditions"])
        for pair in gate["pairs"]
    ]
    created = gate["baseline_created"]
    lines.append(f"- Baseline: {in_markdown(gate['baseline'])}" + (f", {in_markdown(created)}" if created else ""))
    lines += [f"- Otherwise than in the baseline: {in_markdown(text)}" for text in gate["conditions"]]
    if gate["versions"]:
        lines.append(f"- Versions: {in_markdown('; '.join(gate['versions']))}")
    lines += [f"- {in_markdown(text)}" for text in (*gate["notes"], *result["warnings"])]
    table = write_table(result, ".md")
    return "\n".join([*lines, "", "<details><summary>All figures</summary>", "", table, "</details>", ""])


def _other_name(pair: Mapping[str, Any]) -> str:
    """What it is held against, where that was called otherwise."""
    return "" if pair["baseline"] == pair["name"] else f" against {in_markdown(pair['baseline'])}"


def _gate_row(pair: Mapping[str, Any]) -> str:
    latency, accuracy = pair["latency"], pair["map"]
    cells = [
        in_markdown(pair["name"]),
        f"{milliseconds(latency['old'])} → {milliseconds(latency['new'])}",
        "not compared"
        if "change" not in latency
        else f"{latency['change']:.3f} [{latency['low']:.3f}, {latency['high']:.3f}]",
        NOTHING if latency["limit"] is None else f"{1 + latency['limit']:.3f}",
        f"{points(accuracy['old'])} → {points(accuracy['new'])}",
        "not compared"
        if "change" not in accuracy
        else f"{signed(100 * accuracy['change'])} {interval(100 * accuracy['low'], 100 * accuracy['high'])}",
        NOTHING if accuracy["limit"] is None else signed(-100 * accuracy["limit"]),
        _verdict(latency, accuracy),
    ]
    return "| " + " | ".join(cells) + " |"


def _verdict(latency: Mapping[str, Any], accuracy: Mapping[str, Any]) -> str:
    slower, worse = latency["regressed"], accuracy["regressed"]
    return "❌ " + " and ".join(["slower"] * slower + ["less accurate"] * worse) if slower or worse else "✅"
