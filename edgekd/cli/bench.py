"""`edgekd bench`: artefacts measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from edgekd.cli.artifacts import (
    BoxVotingOption,
    ClassesOption,
    DeclareOption,
    FormatOption,
    InputSizeOption,
    OutputOption,
    RuntimeName,
    ThreadsOption,
    export_data,
    refuse_declared,
)
from edgekd.cli.bench_entries import (
    asked_ensemble,
    bench_config,
    declared,
    doubts,
    on_runtimes,
    one_provider,
    with_graphs,
)
from edgekd.cli.bench_options import (
    AcrossOption,
    BaselineFilesOption,
    BaselineOption,
    BatchOption,
    EnergyOption,
    ExecutionOption,
    GateSummaryOption,
    MaxMapDropOption,
    MaxSlowdownOption,
    MlperfOption,
    MlperfSecondsOption,
    ModeOption,
    PinOption,
    PublishOption,
    QuickOption,
    SamplesOption,
    SecondsOption,
    StreamsOption,
    TableOption,
    WarmupOption,
    check_out,
    effort,
    judged,
    limits_of,
    on_cpus,
    refuse_idle_options,
    write_tables,
)
from edgekd.cli.bundle import (
    PrecisionsOption,
    SshConfigOption,
    TargetOption,
    TargetPythonOption,
    TimeLimitOption,
    measure_on_target,
    precisions_of,
)
from edgekd.cli.predict import VIDEO, MaxFramesOption, RealtimeOption, measure_video
from edgekd.cli.session import DeviceOption, JsonOption, QuietOption, SeedOption, refuse_idle, session_of

Given = TypeVar("Given")


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
    execution: ExecutionOption = "both",
    table: TableOption = None,
    quick: QuickOption = False,
    publish: PublishOption = False,
    samples: SamplesOption = None,
    seconds: SecondsOption = None,
    warmup: WarmupOption = None,
    energy_seconds: EnergyOption = None,
    pin: PinOption = None,
    mode: ModeOption = "single",
    streams: StreamsOption = None,
    batch: BatchOption = 1,
    mlperf: MlperfOption = None,
    mlperf_seconds: MlperfSecondsOption = 600.0,
    baseline: BaselineOption = None,
    baseline_files: BaselineFilesOption = None,
    max_slowdown: MaxSlowdownOption = None,
    max_map_drop: MaxMapDropOption = None,
    across_conditions: AcrossOption = False,
    summary: GateSummaryOption = None,
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Lowest score that counts for mAP.")] = 0.001,
    iou: Annotated[
        float,
        typer.Option(
            "--iou", min=0, max=1, help="NMS: of two boxes that overlap by more, the one of lower score goes."
        ),
    ] = 0.5,
    max_detections: Annotated[int, typer.Option("--max-detections", min=1, help="Most boxes an image.")] = 100,
    box_voting: BoxVotingOption = None,
    threads: ThreadsOption = None,
    runtime: Annotated[
        list[RuntimeName] | None,
        typer.Option("--runtime", help="What runs ONNX files; given twice, each runs on both."),
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Measure each engine a second time, as one CUDA graph.")
    ] = False,
    video: Annotated[
        str | None,
        typer.Option("--video", help="Instead of --data: a video, a camera (0) or a stream.", rich_help_panel=VIDEO),
    ] = None,
    max_frames: MaxFramesOption = None,
    realtime: RealtimeOption = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also say which layers are slowest; ONNX files and engines.")
    ] = False,
    target: TargetOption = None,
    target_python: TargetPythonOption = "python3",
    ssh_config: SshConfigOption = None,
    time_limit: TimeLimitOption = 1800.0,
    precision: PrecisionsOption = None,
    classes: ClassesOption = None,
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    declare: DeclareOption = None,
    json: JsonOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure accuracy, latency and memory of artefacts over the same images, and compare them.

    ROLE is teacher, student (if not given) or distilled: `edgekd bench teacher:a.onnx teacher:b.onnx distilled:s.onnx`.
    With --target, latency and energy are measured on that device, after every model gave its golden outputs there.
    With --baseline, the new figures are held against an earlier result, and a regression beyond its interval exits 3.
    """
    session = session_of(context)
    refuse_idle_options(context)
    from edgekd.bench.entries import parse_artifact_argument
    from edgekd.bench.gate import EXIT_REGRESSED, open_gate
    from edgekd.bench.runner import bench_artifacts
    from edgekd.console import Terminal
    from edgekd.data import read_dataset
    from edgekd.report.summary import publish_text, summary_text
    from edgekd.workspace import is_synthetic

    entries = [declared(parse_artifact_argument(text), classes, output, input_size, declare) for text in artifacts]
    refuse_declared(context, [entry.path for entry in entries])
    limits = limits_of(baseline, max_slowdown, max_map_drop)
    check_out(out, baseline, table, summary)
    if target is not None:
        from edgekd.device.bundle import is_bundle
        from edgekd.device.target import parse_target

        if len(entries) == 1 and is_bundle(entries[0].path):
            refuse_idle(context, {"a run, checkpoint or ONNX file": {"data", "split", "format", "precision"}})
        given_target = parse_target(target, python=target_python, ssh_config=ssh_config)
        images = None if data is None else export_data(data, split, format)
        on_device = {
            "--threads": threads,
            "--samples": samples,
            "--seconds": 30.0 if seconds is None else seconds,
            "--warmup": 1.0 if warmup is None else warmup,
            "--energy-seconds": energy_seconds,
        }
        measure_on_target(session, entries, given_target, out, images, precisions_of(precision), on_device, time_limit)
        return
    if cuda_graph:
        entries = with_graphs(entries)
    if runtime:
        entries = on_runtimes(entries, [chosen.value for chosen in runtime])
    if video is not None:
        given = {
            "score_threshold": score,
            "nms_iou": iou,
            "max_detections": max_detections,
            "box_voting": box_voting or None,
            "threads": threads,
        }
        on_video = {"realtime": realtime, "max_frames": max_frames, "provider": one_provider(entries, session.device)}
        measure_video(session, entries, video, out, bench_config(**given), on_video)
        return
    data, split = _given("--data", data), _given("--split", split)
    wanted = effort(quick, publish, samples=samples, seconds=seconds, warmup=warmup, energy=energy_seconds, limit=limit)
    with on_cpus(pin):
        config = bench_config(
            samples=wanted.samples,
            seconds=wanted.seconds,
            warmup_seconds=wanted.warmup,
            threads=threads,
            ensemble=execution,
            mode=mode,
            streams=streams,
            batch=batch,
            mlperf=mlperf,
            mlperf_seconds=mlperf_seconds,
            score_threshold=score,
            nms_iou=iou,
            max_detections=max_detections,
            box_voting=box_voting or None,
        )
        dataset = read_dataset(data, split, format=format, limit=wanted.limit)
        if not quick:
            for doubt in doubts(entries, dataset, Terminal(session.quiet).note):
                Terminal(session.quiet).warn(doubt)
        gate = None
        if baseline is not None and limits is not None:
            gate = open_gate(
                baseline, limits, entries, dataset, config, folders=baseline_files or (), across=across_conditions
            )
        result = bench_artifacts(
            [*entries, *(() if gate is None else gate.again)],
            dataset,
            config=config,
            out=out,
            ensemble=asked_ensemble(entries, ensemble),
            provider=one_provider(entries, session.device),
            seed=session.seed or 0,
            synthetic=is_synthetic(data),
            energy_seconds=wanted.energy,
            memory=not quick,
            progress=Terminal(session.quiet).staged(),
        )
        layers = ""
        if profile:
            from edgekd.bench.profile import add_profiles, profile_text

            add_profiles(result, entries, dataset, out, provider=one_provider(entries, session.device))
            layers = f"\n\n{profile_text(result)}"
    write_tables(result, table)
    fit = f"\n{publish_text(result)}" if publish else ""
    if gate is None:
        session.finish(result, lambda: typer.echo(f"{summary_text(result)}{fit}{layers}\n\nresult: {out}"))
        return
    verdict = judged(gate, result, dataset, out, summary, session.seed or 0)
    session.finish(result, lambda: typer.echo(f"{verdict}{fit}{layers}\nresult: {out}"))
    if not result["gate"]["passed"]:
        typer.echo(f"regression beyond the limits: see gate in {out}", err=True)
        raise typer.Exit(EXIT_REGRESSED)


def _given(name: str, value: Given | None) -> Given:
    """A value that cannot be left out.

    Raises:
        UserError: it was.
    """
    from edgekd.errors import UserError

    if value is None:
        raise UserError(f"{name} is missing", expected="a data set and its split, a --video, or a device with --target")
    return value
