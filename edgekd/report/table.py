"""The comparison table, for a README or a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekd.report.words import ROLE_NAMES, answer, gain, images, milliseconds, number, points, times

_HEADINGS = (
    "", "role", "AP50", "AP50:95", "VOC07 AP", "latency ms", "p90", "pre / infer / post", "speed-up", "parameters M",
    "GMACs", "file MB", "memory MB",
)  # fmt: skip


def write_table_markdown(result: Mapping[str, Any]) -> str:
    """All rows of a result as a GitHub-flavoured Markdown table, with the findings and conditions under it."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|:--|:--|" + "--:|" * (len(_HEADINGS) - 2)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result["rows"]]
    device, settings, data = result["device"], result["settings"], result["data"]
    kind = "synthetic data" if data.get("synthetic") else "data"
    cpu = device.get("cpu") or device.get("machine") or "unknown processor"
    conditions = (
        f"{kind.capitalize()}: {_escape(data['name'])}, split {_escape(data['split'])}, {images(result)}. Latency: batch 1, "
        f"{settings['threads']} thread{'s' if settings['threads'] != 1 else ''} on {_escape(cpu)}, decoded image to "
        f"detections, median of {settings['rounds'] * settings['block']}. AP in points; intervals are 95 %."
    )
    said = [_escape(answer(result))] + ([_escape(text)] if (text := gain(result)) else [])
    return "\n".join([*lines, "", " ".join(said), "", conditions]) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    latency, stages, accuracy = row["latency_ms"], row["stages_ms"], row["map"]
    return [
        f"{_escape(row['name'])} {row['precision']}",
        ROLE_NAMES.get(row["role"], _escape(row["role"])),
        *(points(accuracy[key]) for key in ("ap50", "ap", "voc07")),
        milliseconds(latency["median"]),
        milliseconds(latency["p90"]),
        " / ".join(milliseconds(stages[key]) for key in ("pre", "infer", "post")),
        times(row["speedup_vs_ensemble"]),
        number(row["parameters"], 2, 1e6),
        number(row["macs"], 2, 1e9),
        number(row["size_bytes"], 1, 1e6),
        number(row["peak_memory_bytes"], 0, 1e6),
    ]


def _escape(text: object) -> str:
    """Text that no Markdown table or HTML takes apart."""
    plain = " ".join(str(text).split())
    for character, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        plain = plain.replace(character, written)
    return plain
