"""`edgekd predict`: a detector over photographs, videos and cameras."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgekd.cli.artifacts import (
    BoxVotingOption,
    ClassesOption,
    DeclareOption,
    InputSizeOption,
    OutputOption,
    RuntimeOption,
    ThreadsOption,
    foreign_options,
    provider_of,
    refuse_declared,
)
from edgekd.cli.session import INTERRUPTED, DeviceOption, JsonOption, QuietOption, Session, session_of
from edgekd.errors import UserError

if TYPE_CHECKING:
    from edgekd.bench.entries import BenchArtifact
    from edgekd.predictor import Predictor
    from edgekd.recipe import BenchConfig

VIDEO = "Videos and cameras"
MaxFramesOption = Annotated[
    int | None, typer.Option("--max-frames", min=1, help="Only the first N frames.", rich_help_panel=VIDEO)
]
RealtimeOption = Annotated[
    bool, typer.Option("--realtime", help="Play files at their own rate, dropping frames.", rich_help_panel=VIDEO)
]


def predict(
    context: typer.Context,
    artifact: Annotated[Path, typer.Argument(help="An ONNX file, a checkpoint or a run folder.", metavar="ARTIFACT")],
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Images, and folders of them; or videos, cameras (0, 1, ...) and streams (rtsp://...).",
            metavar="IMAGES|VIDEO...",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for annotated pictures and JSON.", metavar="DIR")],
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Lowest score shown.")] = 0.3,
    iou: Annotated[
        float | None,
        typer.Option(
            "--iou",
            min=0,
            max=1,
            help="NMS: of two boxes that overlap by more, the one of lower score goes; the file's own, or 0.5.",
        ),
    ] = None,
    max_detections: Annotated[
        int | None, typer.Option("--max-detections", min=1, help="Most boxes an image; the file's own, or 100.")
    ] = None,
    box_voting: BoxVotingOption = None,
    threads: ThreadsOption = None,
    runtime: RuntimeOption = None,
    classes: ClassesOption = None,
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    declare: DeclareOption = None,
    max_frames: MaxFramesOption = None,
    realtime: RealtimeOption = False,
    video_format: Annotated[
        Literal["mp4", "avi", "webm"],
        typer.Option("--video-format", help="mp4 is MPEG-4, avi Motion JPEG, webm VP8.", rich_help_panel=VIDEO),
    ] = "mp4",
    json: JsonOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Find objects: annotated pictures or videos, and predictions.json with everything found (of videos: NAME.jsonl).

    Images that cannot be read are reported and the rest go on; the exit code is 2 then. Of folders, hidden files and what
    lies in --out are left out. Ctrl-C ends a camera's run, and what was recorded is kept.
    """
    session = session_of(context)
    refuse_declared(context, [artifact])
    from edgekd.artifact import require_file
    from edgekd.console import Terminal
    from edgekd.predict import JSON_NAME
    from edgekd.predictor import load_predictor
    from edgekd.video import is_video

    require_file(out / JSON_NAME)
    videos = [source for source in sources if is_video(source)]
    if videos and len(videos) < len(sources):
        other = next(source for source in sources if source not in videos)
        raise UserError("images and videos in one command", got=f"{videos[0]}, {other}", fix="one command for each")
    predictor = load_predictor(
        artifact,
        runtime="auto" if runtime is None else runtime.value,
        provider=provider_of(artifact, session.device),
        threads=threads,
        score_threshold=score,
        options=foreign_options(artifact, classes, output, input_size, declare),
    )
    asked = {"nms_iou": iou, "max_detections": max_detections, "box_voting": box_voting}
    chosen = {**predictor.own_selection(), **{key: value for key, value in asked.items() if value is not None}}
    if box_voting == 0:
        del chosen["box_voting"]
    predictor = predictor.with_selection(**chosen)
    with predictor:
        for note in predictor.taken_for_granted():
            Terminal(session.quiet).note(note)
        if said := predictor.not_applied():
            Terminal(session.quiet).warn(said)
        if videos:
            options = {"suffix": f".{video_format}", "realtime": realtime, "max_frames": max_frames}
            _predict_videos(session, predictor, videos, out, options)
        else:
            _predict_images(session, predictor, [Path(source) for source in sources], out)


def _predict_images(session: Session, predictor: Predictor, images: list[Path], out: Path) -> None:
    from edgekd.console import Terminal
    from edgekd.predict import predict_images

    with Terminal(session.quiet).counting("images") as progress:
        found = predict_images(predictor, images, out, progress)
    for path, reason in found.failures.items():
        print(f"error: {reason if path in reason else f'{path}: {reason}'}", file=sys.stderr)
    count = sum(len(image["detections"]) for image in found.images)
    line = f"{found.file}: {count} objects in {len(found.images)} images"
    if not count and found.images:
        line += f"; nothing scored {predictor.selection.score_threshold:g} or more (--score)"
    session.finish(found.to_dict(), lambda: typer.echo(line))
    if found.failures:
        total = len(found.failures) + len(found.images)
        print(f"{len(found.failures)} of {total} images are not in the result", file=sys.stderr)
        raise typer.Exit(2)


def _predict_videos(
    session: Session, predictor: Predictor, videos: list[str], out: Path, options: dict[str, Any]
) -> None:
    from edgekd.artifact import write_json
    from edgekd.console import Terminal
    from edgekd.predict import JSON_NAME, SCHEMA
    from edgekd.predict_video import predict_video
    from edgekd.video import video_stems

    terminal = Terminal(session.quiet)
    made: list[dict[str, Any]] = []
    for source, stem in zip(videos, video_stems(videos), strict=True):
        with terminal.counting(stem) as progress:
            made.append(predict_video(predictor, source, out, stem=stem, progress=progress, **options))
        for note in made[-1]["notes"]:
            terminal.warn(note)
        if made[-1]["interrupted"]:
            break
    body = {"schema": SCHEMA, "detector": predictor.describe(), "videos": made}
    write_json(out / JSON_NAME, body)
    session.finish(body, _shown(made, out))
    if len(made) < len(videos) or (made[-1]["interrupted"] and not made[-1]["live"]):
        raise typer.Exit(INTERRUPTED)


def _shown(made: list[dict[str, Any]], out: Path) -> Callable[[], None]:
    def show() -> None:
        for video in made:
            dropped = f", {video['dropped']} dropped" if video["dropped"] else ""
            rate = f"{video['frames']} frames{dropped}, {video['fps']:.1f} frames/s, drawing and writing included"
            typer.echo(f"{out / video['video']}: {video['objects']} objects in {rate}")

    return show


def measure_video(
    session: Session,
    entries: list[BenchArtifact],
    source: str,
    out: Path,
    config: BenchConfig,
    options: dict[str, Any],
) -> None:
    """`edgekd bench --video`: each artefact over a video or camera; write and show the result."""
    from edgekd.bench.video import bench_video, video_table
    from edgekd.console import Terminal

    progress = Terminal(session.quiet).staged()
    result = bench_video(entries, source, config=config, out=out, progress=progress, **options)
    session.finish(result, lambda: typer.echo(f"{video_table(result)}\n\nresult: {out}"))
