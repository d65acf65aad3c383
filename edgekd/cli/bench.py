"""`edgekd bench`: artefacts measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from edgekd.cli.bundle import (
    PrecisionsOption,
    SecondsOption,
    SshConfigOption,
    TargetOption,
    TargetPythonOption,
    TimeLimitOption,
    measure_on_target,
    precisions_of,
)
from edgekd.cli.deploy import (
    ClassesOption,
    FormatOption,
    InputSizeOption,
    OutputOption,
    ThreadsOption,
    export_data,
    foreign_options,
    provider_of,
)
from edgekd.cli.session import DeviceOption, JsonOption, QuietOption, SeedOption, session_of

Given = TypeVar("Given")

if TYPE_CHECKING:
    from edgekd.bench.entries import BenchArtifact, BenchEnsemble
    from edgekd.recipe import BenchConfig


def bench(
    context: typer.Context,
    artifacts: Annotated[
        list[str],
        typer.Argument(
            help="ONNX files, engines, checkpoints or run folders, as [ROLE:][NAME=]PATH.", metavar="ARTIFACT..."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A data set (VOC, COCO or YOLO); needed unless --target is given.", metavar="DIR"),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="The split to measure on.", metavar="NAME")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", metavar="FILE.json")] = Path(
        "result.json"
    ),
    format: FormatOption = "auto",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N images.")] = None,
    ensemble: Annotated[
        bool | None,
        typer.Option("--ensemble/--no-ensemble", help="Measure all teachers as one; if there are two or more."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=20, help="Timed inferences of each; 200, or 1000 on a --target.")
    ] = None,
    warmup: Annotated[float, typer.Option("--warmup", min=0, help="Seconds of warm-up.")] = 1.0,
    energy_seconds: Annotated[
        float | None,
        typer.Option(
            "--energy-seconds",
            min=0,
            help="Each runs alone for so long where power can be read; 10, or 30 on a --target; 0: no energy.",
        ),
    ] = None,
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Lowest score that counts for mAP.")] = 0.001,
    iou: Annotated[float, typer.Option("--iou", min=0, max=1, help="Overlap at which the worse of two goes.")] = 0.5,
    max_detections: Annotated[int, typer.Option("--max-detections", min=1, help="Most an image.")] = 100,
    threads: ThreadsOption = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Measure each engine a second time, as one CUDA graph.")
    ] = False,
    target: TargetOption = None,
    target_python: TargetPythonOption = "python3",
    ssh_config: SshConfigOption = None,
    time_limit: TimeLimitOption = 1800.0,
    seconds: SecondsOption = 30.0,
    precision: PrecisionsOption = None,
    classes: ClassesOption = None,
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    json: JsonOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure accuracy, latency and memory of artefacts over the same images, and compare them.

    ROLE is teacher, student (if not given) or distilled: `edgekd bench teacher:a.onnx teacher:b.onnx distilled:s.onnx`.
    With --target, latency and energy are measured on that device, after every model gave its golden outputs there.
    """
    session = session_of(context)
    session.merge(json=json, seed=seed, device=device, quiet=quiet)
    from edgekd.bench.entries import parse_artifact_argument
    from edgekd.bench.runner import bench_artifacts
    from edgekd.console import Terminal
    from edgekd.data import read_dataset
    from edgekd.summary import summary_text
    from edgekd.workspace import is_synthetic

    entries = [_declared(parse_artifact_argument(text), classes, output, input_size) for text in artifacts]
    if target is not None:
        from edgekd.device.target import parse_target

        given_target = parse_target(target, python=target_python, ssh_config=ssh_config)
        images = None if data is None else export_data(data, split, format)
        wanted = {
            "--threads": threads,
            "--samples": samples,
            "--seconds": seconds,
            "--warmup": warmup,
            "--energy-seconds": energy_seconds,
        }
        measure_on_target(session, entries, given_target, out, images, precisions_of(precision), wanted, time_limit)
        return
    data, split = _given("--data", data), _given("--split", split)
    if cuda_graph:
        entries = _with_graphs(entries)
    given = {"score_threshold": score, "nms_iou": iou, "max_detections": max_detections, "threads": threads}
    config = _config(samples=samples or 200, warmup_seconds=warmup, **given)
    result = bench_artifacts(
        entries,
        read_dataset(data, split, format=format, limit=limit),
        config=config,
        out=out,
        ensemble=_ensemble(entries, ensemble),
        provider=_one_provider(entries, session.device),
        seed=session.seed or 0,
        synthetic=is_synthetic(data),
        energy_seconds=10.0 if energy_seconds is None else energy_seconds,
        progress=Terminal(session.quiet).staged(),
    )
    session.finish(result, lambda: typer.echo(f"{summary_text(result)}\n\nresult: {out}"))


def _given(name: str, value: Given | None) -> Given:
    """A value that cannot be left out.

    Raises:
        UserError: it was.
    """
    from edgekd.errors import UserError

    if value is None:
        raise UserError(f"{name} is missing", expected="a data set and its split, or a device with --target")
    return value


def _declared(
    artifact: BenchArtifact, classes: str | None, output: str | None, input_size: int | None
) -> BenchArtifact:
    """The artefact with what the options declare of it, if it is an ONNX file."""
    from dataclasses import replace

    options = foreign_options(artifact.path, classes, output, input_size)
    return artifact if options is None or artifact.path.suffix != ".onnx" else replace(artifact, options=options)


def _with_graphs(artifacts: list[BenchArtifact]) -> list[BenchArtifact]:
    """Each engine followed by itself with its work captured as a CUDA graph.

    Raises:
        UserError: there is no engine.
    """
    from dataclasses import replace

    from edgekd.bench.complexity import ENGINE_SUFFIXES
    from edgekd.errors import UserError

    found = []
    for artifact in artifacts:
        found.append(artifact)
        if artifact.path.suffix in ENGINE_SUFFIXES:
            found.append(replace(artifact, name=f"{artifact.name}+graph", cuda_graph=True))
    if len(found) == len(artifacts):
        raise UserError("--cuda-graph is for engines", got="none", fix="export one with --format engine")
    return found


def _config(**values: Any) -> BenchConfig:
    from pydantic import ValidationError

    from edgekd.errors import UserError
    from edgekd.recipe import BenchConfig

    try:
        return BenchConfig(**values)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise UserError(f"{detail['loc'][0]}: {detail['msg']}", got=str(detail["input"])) from error


def _ensemble(artifacts: list[BenchArtifact], asked: bool | None) -> BenchEnsemble | None:
    """All teachers as one system (each once): when asked for, and unasked where there are several.

    Raises:
        UserError: asked for without teachers.
    """
    from edgekd.bench.entries import BenchEnsemble
    from edgekd.errors import UserError

    names = tuple(artifact.name for artifact in artifacts if artifact.role == "teacher" and not artifact.cuda_graph)
    if asked and not names:
        raise UserError("an ensemble needs teachers", got="none", fix="name their role: teacher:PATH")
    return BenchEnsemble(names) if (len(names) > 1 if asked is None else asked) else None


def _one_provider(artifacts: list[BenchArtifact], device: str | None) -> str | None:
    providers = {provider_of(artifact.path, device) for artifact in artifacts}
    return providers.pop() if len(providers) == 1 else (device or "").partition(":")[0] or None
