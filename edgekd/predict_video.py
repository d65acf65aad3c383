"""A detector over a video: the video with boxes drawn in, and everything found as JSON lines, one a frame."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekd.artifact import atomic_path
from edgekd.draw import draw_detections
from edgekd.errors import UserError
from edgekd.predict import detections_as_dicts
from edgekd.predictor import Predictor
from edgekd.video import USUAL_FPS, Video
from edgekd.video_writer import written_video


def predict_video(
    predictor: Predictor,
    source: str,
    out: Path,
    *,
    stem: str,
    suffix: str = ".mp4",
    realtime: bool = False,
    max_frames: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run over a file, camera or stream until it ends, `max_frames` of it have come, or Ctrl-C.

    Writes `out`/STEM.mp4 (or .avi, .webm) and `out`/STEM.jsonl with a line a frame: frame, time_s, detections. Frames
    that were dropped (live sources, `realtime`) have no line; in the video the next one stands for them.

    Returns:
        What happened, as plain JSON types: source, rates, frames, dropped, objects, files, notes, interrupted.

    Raises:
        UserError: the source cannot be opened, or a result would overwrite it or another one. OSError: the disk is full.
    """
    with Video(source) as video:
        picture, lines = (out / f"{stem}{ending}" for ending in (suffix, ".jsonl"))
        if not video.live and picture.resolve() == Path(source).resolve():
            raise UserError("--out would overwrite the video", got=picture, fix="choose another folder for --out")
        if picture.exists() and not lines.exists():  # each that is written here has its lines beside it
            raise UserError(
                "--out holds a file that `edgekd predict` would overwrite and did not write",
                got=picture,
                fix="choose another folder for --out, or move that file away",
            )
        predictor.warm()
        objects, interrupted, start = 0, False, time.perf_counter()
        fps = video.fps or USUAL_FPS
        with (
            atomic_path(lines) as temporary,
            open(temporary, "w", encoding="utf-8") as stream,
            written_video(picture, fps, video.hw) as writer,
        ):
            try:
                for frame in video.frames(realtime=realtime, limit=max_frames):
                    image = frame.rgb()
                    found = predictor.detect(image)
                    drawn = draw_detections(image, found, predictor.class_names)
                    writer.write(drawn, frame.index + 1 - writer.frames)
                    entries = detections_as_dicts(found, predictor.class_names)
                    line = {"frame": frame.index, "time_s": round(frame.time_s, 4), "detections": entries}
                    stream.write(json.dumps(line, allow_nan=False) + "\n")
                    stream.flush()  # a full disk is noticed at once
                    objects += len(found)
                    if progress is not None:
                        progress(video.offered, max(video.offered, _expected(video, max_frames)))
            except KeyboardInterrupt:  # how one ends a camera's run: what is done is kept
                interrupted = True
        seconds = time.perf_counter() - start
        return {
            "source": video.name,
            "live": video.live,
            "width": video.hw[1],
            "height": video.hw[0],
            "source_fps": video.fps,
            "frames": video.taken,
            "dropped": video.dropped,
            "seconds": round(seconds, 3),
            "fps": round(video.taken / seconds, 2),
            "objects": objects,
            "video": picture.name,
            "lines": lines.name,
            "interrupted": interrupted,
            "notes": [] if interrupted else video.notes(max_frames),
        }


def _expected(video: Video, max_frames: int | None) -> int:
    """How many frames there will be, where that is known; else always one more."""
    known = [count for count in (video.length, max_frames) if count]
    return min(known) if known else video.offered + 1
