"""Detectors on a video or camera: sustained rate, dropped frames, and latency from a frame to its boxes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import write_json
from edgekd.bench.device import Contention, device_facts
from edgekd.bench.entries import BenchArtifact, check_entries
from edgekd.device.stats import P99_NEEDS, summarise
from edgekd.predictor import Predictor, load_predictor
from edgekd.recipe import BenchConfig
from edgekd.types import Detections
from edgekd.video import Frame, Video, shown_name

SCHEMA = "edgekd.video-bench/1"
LIVE_FRAMES = 300
"""Frames of a camera or stream that each artefact is measured on, unless a number is given."""

WARM_RUNS = 10
STAGES = ("convert", "pre", "infer", "post")


def bench_video(
    artifacts: Sequence[BenchArtifact],
    source: str,
    *,
    config: BenchConfig,
    out: Path,
    realtime: bool = False,
    max_frames: int | None = None,
    provider: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure each artefact by itself over the whole source, and write and return the result.

    A file is read as fast as it is answered (one thread reads and detects in turn), so that `fps` is what the detector
    with decoding sustains. With `realtime`, and from live sources, a thread delivers frames at the source's own rate,
    the detector always takes the newest, and what it had no time for is `dropped`. Latency begins when a decoded frame
    could be had and ends with its boxes; `infer` is a part of it.

    Raises:
        UserError: the source cannot be opened, or artefacts cannot be told apart. ArtifactError: one cannot be read.
    """
    check_entries(artifacts, None)
    rows, notes, facts, contention = [], [], {}, Contention()
    for artifact in artifacts:
        with _open(artifact, config, provider) as predictor, Video(source) as video:
            limit = max_frames or (LIVE_FRAMES if video.live else None)
            rows.append(_row(artifact, predictor, video, realtime, limit, progress))
            notes += [note for note in video.notes(limit) if note not in notes]
            if said := predictor.not_applied():
                notes.append(f"{artifact.name}: {said}")
            facts = {"fps": video.fps, "width": video.hw[1], "height": video.hw[0], "live": video.live}
    result = {
        "schema": SCHEMA,
        "source": {"name": shown_name(source), **facts},
        "realtime": realtime or bool(facts["live"]),
        "device": device_facts(),
        "contention_cores": contention.cores(),
        "threads": config.threads,
        "rows": rows,
        "notes": notes,
    }
    write_json(out, result)
    return result


def _open(artifact: BenchArtifact, config: BenchConfig, provider: str | None) -> Predictor:
    return load_predictor(
        artifact.path,
        runtime=artifact.runtime,
        provider=provider,
        threads=config.threads,
        score_threshold=config.score_threshold,
        nms_iou=config.nms_iou,
        max_detections=config.max_detections,
        box_voting=config.box_voting,
        options=artifact.options,
        cuda_graph=artifact.cuda_graph,
    )


def _row(
    artifact: BenchArtifact,
    predictor: Predictor,
    video: Video,
    realtime: bool,
    limit: int | None,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, Any]:
    predictor.warm(WARM_RUNS)
    expected = min(video.length or limit or 0, limit or 1 << 60)
    latencies, stages, objects = [], [], 0
    start = time.perf_counter()
    for frame in video.frames(realtime=realtime, limit=limit):
        found, passed = _timed(predictor, frame)
        stages.append(np.diff(passed))
        latencies.append(passed[-1] - frame.ready_ns)
        objects += len(found)
        if progress is not None:
            progress(artifact.name, video.offered, max(expected, video.offered + 1))
    seconds = time.perf_counter() - start
    if progress is not None:
        progress(artifact.name, video.offered, video.offered)
    about = predictor.describe()
    return {
        "name": artifact.name,
        "role": artifact.role,
        "artifact": about["path"],
        **{key: about[key] for key in ("sha256", "precision", "runtime", "provider", "input_hw")},
        "frames": video.taken,
        "offered": video.offered,
        "dropped": video.dropped,
        "seconds": round(seconds, 3),
        "fps": round(video.taken / seconds, 2),
        "source_fps_reached": round(video.offered / seconds, 2),
        "latency_ms": summarise(np.array(latencies) / 1e6),
        "stages_ms": dict(zip(STAGES, np.round(np.median(stages, axis=0) / 1e6, 3).tolist(), strict=True)),
        "objects": objects,
    }


def _timed(predictor: Predictor, frame: Frame) -> tuple[Detections, list[int]]:
    """The frame's detections, and the clock before each stage and after the last, in nanoseconds."""
    clock = time.perf_counter_ns
    passed = [clock()]
    image = frame.rgb()
    passed.append(clock())
    tensor, geometry = predictor.prepare(image)
    passed.append(clock())
    raw = predictor.infer(tensor)
    passed.append(clock())
    found = predictor.finish(raw, geometry)
    passed.append(clock())
    return found, passed


def video_table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    source = result["source"]
    rate = f"{source['fps']:g} frames/s" if source["fps"] else "rate unknown"
    how = "in real time, newest frame first" if result["realtime"] else "as fast as it goes"
    width = max(len(row["name"]) for row in result["rows"])
    head = f"{'':{width}}     fps  dropped   median      p90      p99      max   convert / pre / infer / post ms"
    lines = [f"{source['name']}: {source['width']} x {source['height']}, {rate}, {how}", "", head]
    for row in result["rows"]:
        latency, stages = row["latency_ms"], row["stages_ms"]
        dropped = f"{row['dropped'] / max(1, row['offered']):.1%}" if result["realtime"] else "-"
        figures = [latency[key] for key in ("median", "p90", "p99", "max")]
        shown = " ".join(f"{'-' if value is None else format(value, '.2f'):>8}" for value in figures)
        parts = " / ".join(f"{stages[stage]:.2f}" for stage in STAGES)
        lines.append(f"{row['name']:{width}} {row['fps']:7.1f} {dropped:>8} {shown}   {parts}")
    lines += ["", "Latency in ms from a decoded frame to its boxes, of all frames answered."]
    if any(row["latency_ms"]["p99"] is None for row in result["rows"]):
        lines.append(f"p99 needs {P99_NEEDS} frames.")
    if not result["realtime"] and source["fps"]:
        slow = [row["name"] for row in result["rows"] if row["fps"] < source["fps"]]
        if slow:
            lines.append(f"Slower than the source: {', '.join(slow)}. --realtime counts the frames that it drops.")
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])
