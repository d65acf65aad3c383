"""Options of `edgekd bench` that come in groups: how long and how it measures, and the gate for CI."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgekd.cli.session import refuse_idle

if TYPE_CHECKING:
    from edgekd.bench.gate import Gate, Limits
    from edgekd.types import Dataset

_protocol = partial(typer.Option, rich_help_panel="How it is measured")
_gate = partial(typer.Option, rich_help_panel="Gate for CI (exit 3 on a regression)")


QuickOption = Annotated[
    bool,
    _protocol("--quick", help="Seconds, not minutes: few samples and 64 images, so wide intervals."),
]
PublishOption = Annotated[
    bool,
    _protocol("--publish", help="At least 1,000 samples and 30 s of each; says if it may be published."),
]
SamplesOption = Annotated[
    int | None,
    _protocol("--samples", min=20, help="Timed inferences of each; 200, or 1000 on a --target."),
]
SecondsOption = Annotated[
    float | None,
    _protocol("--seconds", min=0, help="Each is timed for so long at least; 0, or 30 on a --target."),
]
WarmupOption = Annotated[
    float | None,
    _protocol("--warmup", min=0, help="Seconds of warm-up at least (1), and until stable."),
]
EnergyOption = Annotated[
    float | None,
    _protocol(
        "--energy-seconds",
        min=0,
        help="Each runs alone for so long where power can be read; 10, or 30 on a --target; 0: no energy.",
    ),
]
PinOption = Annotated[
    str | None,
    _protocol("--pin", help="Run on these CPUs only, such as 0 or 0-3.", metavar="CPUS"),
]
ModeOption = Annotated[
    Literal["single", "throughput"],
    _protocol("--mode", help="Latency of one image; or images/s under full load too."),
]
StreamsOption = Annotated[
    int | None,
    _protocol("--streams", min=1, help="Throughput: inferences at once; one a thread if not given."),
]
BatchOption = Annotated[
    int,
    _protocol("--batch", min=1, help="Throughput: images of one inference, where a file takes more."),
]
MlperfOption = Annotated[
    Literal["SingleStream", "MultiStream"] | None,
    _protocol("--mlperf", help="Also measure by MLPerf's rules for this scenario."),
]
MlperfSecondsOption = Annotated[
    float,
    _protocol("--mlperf-seconds", min=0.1, help="How long, for each; the rules want 600, and less is told."),
]
ExecutionOption = Annotated[
    Literal["sequential", "parallel", "both"],
    _protocol("--execution", help="How an ensemble's members run."),
]
TableOption = Annotated[
    list[Path] | None,
    typer.Option("--table", help="Also write the table as .md, .csv or .tex; repeatable.", metavar="FILE"),
]
BaselineOption = Annotated[
    Path | None,
    _gate("--baseline", help="An earlier result.json.", metavar="FILE"),
]
BaselineFilesOption = Annotated[
    list[Path] | None,
    _gate(
        "--baseline-files",
        help="Where the earlier files lie, known by hash: they are measured again, side by side.",
        metavar="DIR",
    ),
]
MaxSlowdownOption = Annotated[
    str | None,
    _gate("--max-slowdown", help="Most that the median latency may rise, such as 5%.", metavar="PERCENT"),
]
MaxMapDropOption = Annotated[
    float | None,
    _gate("--max-map-drop", min=0, help="Most that AP50 may fall, in points of 100.", metavar="POINTS"),
]
AcrossOption = Annotated[
    bool,
    _gate("--across-conditions", help="Compare stored latencies although machine, threads, runtime or images differ."),
]
GateSummaryOption = Annotated[
    Path | None,
    _gate("--summary", help="Write the verdict as Markdown; also appended to $GITHUB_STEP_SUMMARY.", metavar="FILE.md"),
]


@dataclass(frozen=True)
class Effort:
    """How long to measure: timed inferences and seconds of each at least, warm-up, energy, and images at most."""

    samples: int = 200
    seconds: float = 0.0
    warmup: float = 1.0
    energy: float = 10.0
    limit: int | None = None


QUICK = Effort(samples=40, warmup=0.3, energy=0.0, limit=64)
PUBLISH = Effort(samples=1000, seconds=30.0, warmup=2.0, energy=30.0)


def effort(quick: bool, publish: bool, **given: Any) -> Effort:
    """What was given, and else what the preset says.

    Raises:
        UserError: both presets.
    """
    from edgekd.errors import UserError

    if quick and publish:
        raise UserError("--quick and --publish exclude each other", fix="leave one out")
    preset = QUICK if quick else PUBLISH if publish else Effort()
    return replace(preset, **{key: value for key, value in given.items() if value is not None})


_ALWAYS = {
    "artifacts",
    "out",
    "threads",
    "classes",
    "output",
    "input_size",
    "declare",
    "json",
    "seed",
    "device",
    "quiet",
}
_FOR_VIDEO = {"video", "max_frames", "realtime"}
_FOR_TARGET = {"target", "target_python", "ssh_config", "time_limit", "precision"}
_VIDEO_TOO = {"score", "iou", "max_detections", "box_voting", "runtime", "cuda_graph"}
_TARGET_TOO = {"data", "split", "format", "samples", "seconds", "warmup", "energy_seconds"}


def refuse_idle_options(context: typer.Context) -> None:
    """Refuse what does nothing in the benchmark that is asked for: over a data set, a video, or on a device.

    Raises:
        UserError: there is such an option.
    """
    given = context.params
    if given["target"] is not None:
        refuse_idle(context, {"--data, and without --target": given.keys() - _ALWAYS - _FOR_TARGET - _TARGET_TOO})
        return
    if given["video"] is not None:
        refuse_idle(context, {"--target": _FOR_TARGET})
        refuse_idle(context, {"--data, and without --video": given.keys() - _ALWAYS - _FOR_VIDEO - _VIDEO_TOO})
        return
    met = {
        "--video": (False, _FOR_VIDEO),
        "--target": (False, _FOR_TARGET),
        "--mode throughput": (given["mode"] == "throughput", {"streams", "batch"}),
        "--mlperf": (given["mlperf"] is not None, {"mlperf_seconds"}),
        "--baseline": (given["baseline"] is not None, {"baseline_files", "across_conditions", "summary"}),
    }
    refuse_idle(context, {need: names for need, (there, names) in met.items() if not there})


def limits_of(baseline: Path | None, max_slowdown: str | None, max_map_drop: float | None) -> Limits | None:
    """The gate's limits; None where no gate was asked for.

    Raises:
        UserError: a limit without a baseline, or one that is not a share.
    """
    from edgekd.bench.gate import Limits
    from edgekd.errors import UserError

    if baseline is None:
        if max_slowdown is not None or max_map_drop is not None:
            raise UserError(
                "a limit needs something to hold against", fix="add --baseline FILE, an earlier result.json"
            )
        return None
    return Limits(
        None if max_slowdown is None else share_of(max_slowdown), None if max_map_drop is None else max_map_drop / 100
    )


def share_of(text: str) -> float:
    """ "5%" or "0.05" as 0.05.

    Raises:
        UserError: neither, or a bare number of 1 or more, which might mean either.
    """
    from edgekd.errors import UserError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 and not (text.endswith("%") and 0 <= value < 100):
        raise UserError("--max-slowdown is not a share", got=repr(text), expected="such as 5% or 0.05")
    return value


def on_cpus(text: str | None) -> AbstractContextManager[None]:
    """The process on the CPUs that were asked for."""
    from edgekd.bench.affinity import parse_cpus, pinned

    return pinned(None if text is None else parse_cpus(text))


def check_out(out: Path, baseline: Path | None, tables: Sequence[Path] | None, summary: Path | None) -> None:
    """Refuse files that could not be written when everything is measured, or that would be written over the baseline.

    Raises:
        UserError: there is one.
    """
    from edgekd.artifact import require_file
    from edgekd.bench.baseline import read_baseline
    from edgekd.bench.runner import files_beside
    from edgekd.errors import UserError
    from edgekd.report.table import require_format

    for file in tables or ():
        require_format(file.suffix)
    require_file(out, (".json",))
    for file in (*(tables or ()), *(() if summary is None else (summary,))):
        require_file(file)
    if baseline is None:
        return
    kept = {baseline.resolve(), *(baseline.parent.resolve() / name for name in read_baseline(baseline).file_names)}
    if taken := kept & {path.resolve() for path in (out, *files_beside(out))}:
        raise UserError(
            "the result would be written over the baseline",
            got=", ".join(sorted(path.name for path in taken)),
            fix="give --out another name or folder",
        )


def write_tables(result: dict[str, Any], files: list[Path] | None) -> None:
    """The comparison table in as many formats as were asked for."""
    from edgekd.artifact import write_text
    from edgekd.report.table import write_table

    for file in files or ():
        write_text(file, write_table(result, file.suffix))


def judged(gate: Gate, result: dict[str, Any], dataset: Dataset, out: Path, summary: Path | None, seed: int) -> str:
    """The verdict for a terminal; it is added to the result in `out`, and in Markdown to `summary` and to the CI's own."""
    from edgekd.artifact import write_json, write_text
    from edgekd.bench.gate import judge
    from edgekd.bench.saved import read_saved
    from edgekd.report.summary import gate_markdown, summary_text

    saved = read_saved(out.parent / result["files"]["detections"])
    result["gate"] = judge(gate, result, saved, dataset, seed=seed)
    write_json(out, result)
    text = gate_markdown(result["gate"], result)
    if summary is not None:
        write_text(summary, text)
    if step := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(step, "a", encoding="utf-8") as stream:
            stream.write(text)
    return f"{summary_text(result)}\n\n{text.partition('<details>')[0]}"
