"""The comparison as a table for other documents: GitHub-flavoured Markdown, CSV with full figures, LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from edgekd.data.problems import printable
from edgekd.errors import UserError
from edgekd.report.shape import RESULT, measured
from edgekd.report.words import NOTHING, ROLE_NAMES, answer, gain, images, milliseconds, number, points, times

Row = Mapping[str, Any]

_HEADINGS = (
    "", "role", "AP50", "AP50:95", "VOC07 AP", "latency ms", "p90", "stages ms", "speed-up", "parameters M",
    "GMACs", "file MB", "memory MB",
)  # fmt: skip
_INTERVALS = ("median_interval", "speedup_interval", "ap50_interval")


def write_table(result: Mapping[str, Any], suffix: str) -> str:
    """A result's rows as `.md`, `.csv` or `.tex`.

    Raises:
        UserError: another suffix.
    """
    require_format(suffix)
    return printable(FORMATS[suffix](measured(result, RESULT)))


def require_format(suffix: str) -> None:
    """Refuse what no table is written as.

    Raises:
        UserError: another suffix.
    """
    if suffix not in FORMATS:
        raise UserError("a table is not written in that format", got=suffix or "no suffix", expected=", ".join(FORMATS))


def _markdown(result: Mapping[str, Any]) -> str:
    """With the findings and conditions under it."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|:--|:--|" + "--:|" * (len(_HEADINGS) - 2)]
    lines += ["| " + " | ".join(in_markdown(cell) for cell in _cells(row)) + " |" for row in result["rows"]]
    said = [in_markdown(text) for text in (answer(result), gain(result)) if text]
    return "\n".join([*lines, "", " ".join(said), "", in_markdown(conditions(result))]) + "\n"


def conditions(result: Mapping[str, Any]) -> str:
    """What was measured on, how, and what the figures mean."""
    data, settings = result["data"], result["settings"]
    cpu = result["device"]["cpu"] or result["device"]["machine"] or "an unknown processor"
    threads = settings.get("threads") or NOTHING
    kind = "Synthetic data" if data["synthetic"] else "Data"
    return (
        f"{kind}: {data['name'] or 'unnamed'}, split {data['split'] or NOTHING}, {images(result)}. Latency: batch 1, "
        f"{threads} {'thread' if str(threads) == '1' else 'threads'} on {cpu}, decoded image to detections, median. "
        "AP in points; intervals are 95 %."
    )


def _cells(row: Row) -> list[str]:
    latency, accuracy = row["latency_ms"], row["map"]
    return [
        f"{row['name']} {row['precision']}".strip(),
        ROLE_NAMES.get(row["role"], row["role"]),
        *(points(accuracy[key]) for key in ("ap50", "ap", "voc07")),
        milliseconds(latency["median"]),
        milliseconds(latency["p90"]),
        " / ".join(milliseconds(value) for value in row["stages_ms"].values()) or NOTHING,
        times(row["speedup_vs_ensemble"]),
        number(row["parameters"], 2, 1e6),
        number(row["macs"], 2, 1e9),
        number(row["size_bytes"], 1, 1e6),
        number(row["peak_memory_bytes"], 0, 1e6),
    ]


def aligned(rows: Sequence[Sequence[str]], words: Collection[int]) -> list[str]:
    """Lines for a terminal, the first row underlined: columns at `words` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return [lines[0].rstrip(), "-" * len(lines[0].rstrip()), *(line.rstrip() for line in lines[1:])]


def in_markdown(text: object) -> str:
    """Text that no Markdown table or HTML takes apart."""
    plain = " ".join(str(text).split())
    for character, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        plain = plain.replace(character, written)
    return plain


def _csv(result: Mapping[str, Any]) -> str:
    """Every figure of every row under a name of its own, unrounded; what was not measured is empty."""
    rows = [_flat(row) for row in result["rows"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, inner in value.items():
        key = f"{prefix}{name}"
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{key}.")
        elif name in _INTERVALS:
            low, high = inner or (None, None)
            found |= {f"{key}.low": low, f"{key}.high": high}
        elif name == "input_hw":
            found[key] = " ".join("x".join(map(str, hw)) for hw in inner)
        elif not isinstance(inner, list):
            found[key] = _inert(inner)
    return found


def _inert(value: Any) -> Any:
    """Text that a spreadsheet takes for a formula gets a quote before it."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _latex(result: Mapping[str, Any]) -> str:
    """A booktabs table with a caption; needs `\\usepackage{booktabs}`."""
    lines = [
        r"% \usepackage{booktabs}", r"\begin{table}", r"\centering\small",
        rf"\caption{{{_in_latex(answer(result))} {_in_latex(conditions(result))}}}",
        r"\begin{tabular}{l" + "r" * 6 + "}", r"\toprule",
        r"Detector & AP$_{50}$ & AP & Latency (ms) & Speed-up & Params (M) & GMACs \\", r"\midrule",
    ]  # fmt: skip
    for row in result["rows"]:
        cells = _cells(row)
        interval = row["map"]["ap50_interval"]
        spread = f" [{points(interval[0])}, {points(interval[1])}]" if interval else ""
        shown = [cells[0], cells[2] + spread, cells[3], cells[5], cells[8], cells[9], cells[10]]
        lines.append(" & ".join(_in_latex(cell) for cell in shown) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "[": "{[}", "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{MINUS SIGN}": "$-$", "\N{EN DASH}": "--", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


def _in_latex(text: object) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(str(text).split(" ")))


FORMATS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {".md": _markdown, ".csv": _csv, ".tex": _latex}
