"""Video files, cameras and network streams as frames, through OpenCV.

The wheels of opencv-python-headless read whatever their FFmpeg decodes: H.264, HEVC, VP9, AV1, MPEG-4, Motion JPEG.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgekd.errors import UserError
from edgekd.types import ImageArray

SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp"}
)
"""What counts as a video file."""

SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp")
USUAL_FPS = 25.0
"""Assumed where a source does not say its rate."""

_OPEN_TIMEOUT_MS = 10_000


@dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        index: its position in the source, from 0, counting the ones that were dropped.
        time_s: its time in the source; for live ones since the first frame.
        ready_ns: `time.perf_counter_ns()` when it could be had.
        bgr: (H, W, 3) uint8 as OpenCV decodes it.
    """

    index: int
    time_s: float
    ready_ns: int
    bgr: ImageArray

    def rgb(self) -> ImageArray:
        """The frame as detectors take it."""
        return np.asarray(cv2.cvtColor(self.bgr, cv2.COLOR_BGR2RGB), np.uint8)


def is_video(text: str) -> bool:
    """Whether this names a camera (a number), a stream (a URL) or a video file (by its suffix), rather than an image."""
    if re.fullmatch(r"[a-z]+://.+", text, re.IGNORECASE | re.DOTALL):
        return True
    if text.isdigit() and not Path(text).exists():
        return True
    path = Path(text)
    return not path.is_dir() and (path.suffix.lower() in SUFFIXES or text.startswith("/dev/video"))


def shown_name(source: str) -> str:
    """A source as results and messages may name it: a URL goes without user and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)


def video_stems(sources: Sequence[str]) -> list[str]:
    """A different file name without suffix for what is made of each source."""
    stems: list[str] = []
    for source in sources:
        stem = f"camera-{source}" if source.isdigit() else Path(source).stem
        if "://" in source:
            stem = re.sub(r"\W+", "-", shown_name(source).partition("://")[2]).strip("-")
        tries = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        stems.append(next(name for name in tries if name.lower() not in map(str.lower, stems)))
    return stems


class Video:
    """An open source of frames.

    Args:
        source: a file, a camera's number or device, or a URL.

    Attributes:
        name: how messages and results call it, without the password that a URL may hold.
        live: a camera or stream: its frames come when they come, and those that nobody takes are lost.
        fps: its own rate; None where it does not say. hw: (height, width) of its frames, pixels.
        length: frames that the file claims to hold; None if unknown.
        offered: frames that were there to be had so far. taken: those that were had.

    Raises:
        UserError: there is no such file, camera or stream, or it is no video.
    """

    def __init__(self, source: str) -> None:
        self.live = "://" in source or source.isdigit() or source.startswith("/dev/video")
        self.name = shown_name(source)
        self._capture = _open(source, self.name)
        fps, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = float(fps) if 0.5 <= fps <= 1000 else None
        self.length = int(count) if not self.live and 0 < count < 1e9 else None
        self.offered = self.taken = 0
        self._first = self._read(0)
        if self._first is None:
            self.close()
            raise UserError(f"{self.name}: not a single frame can be read", expected="a video with pictures")
        self.hw = (self._first.bgr.shape[0], self._first.bgr.shape[1])

    @property
    def dropped(self) -> int:
        """Frames that came while nobody was ready for them."""
        return self.offered - self.taken

    def frames(self, *, realtime: bool = False, limit: int | None = None) -> Iterator[Frame]:
        """The source's frames, at most the first `limit`; once only.

        Files give every frame, as fast as it is asked for. Live sources, and files when `realtime`, give the newest
        frame each time one is asked for, at their own rate; what came in between is dropped and counted. What a camera
        or the network holds back before OpenCV sees it is in no figure.
        """
        if realtime or self.live:
            yield from self._newest(limit)
            return
        for frame in self._all(limit):
            self.offered = self.taken = frame.index + 1
            yield frame

    def notes(self, limit: int | None = None) -> list[str]:
        """What a person should know of a source that was read to its end, or to `limit`."""
        expected = min(self.length or 0, limit or 1 << 60)
        found = []
        if self.offered < 0.98 * expected - 2:
            found.append(f"{self.name} ends after {self.offered} of {expected} frames: is it damaged or cut off?")
        if self.live and (limit is None or self.offered < limit):  # a camera has no end of its own
            found.append(
                f"{self.name} gave no more after {self.offered} frames: was it unplugged, or is the stream over?"
            )
        if self.fps is None:
            found.append(f"{self.name} does not say its rate; {USUAL_FPS:g} frames/s are assumed")
        return found

    def close(self) -> None:
        """Let the file or camera go."""
        self._capture.release()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _all(self, limit: int | None) -> Iterator[Frame]:
        for index in itertools.count() if limit is None else range(limit):
            frame = self._first if index == 0 else self._read(index)
            if frame is None:
                return
            if index == 0:  # decoded when the source was opened: what the reader did since then is none of its latency
                frame = replace(frame, ready_ns=time.perf_counter_ns())
            yield frame

    def _read(self, index: int) -> Frame | None:
        try:
            there, bgr = self._capture.read()
        except cv2.error:
            return None
        if not there or bgr is None:
            return None
        ready_ns, at_ms = time.perf_counter_ns(), self._capture.get(cv2.CAP_PROP_POS_MSEC)
        time_s = at_ms / 1000 if at_ms > 0 else index / (self.fps or USUAL_FPS)
        return Frame(index, time_s, ready_ns, np.asarray(bgr, np.uint8))

    def _newest(self, limit: int | None) -> Iterator[Frame]:
        slot = _Slot()
        reader = threading.Thread(target=self._feed, args=(slot, limit), name="edgekd-video", daemon=True)
        reader.start()
        try:
            while (frame := slot.take()) is not None:
                self.taken += 1
                yield frame
        finally:
            slot.stopped.set()
            reader.join()

    def _feed(self, slot: _Slot, limit: int | None) -> None:
        """Put frames into the slot as they come; a file's when each is due."""
        period, start = 1 / (self.fps or USUAL_FPS), time.perf_counter()
        try:
            for frame in self._all(limit):
                due = 0.0 if self.live else start + frame.index * period
                slot.stopped.wait(max(0.0, due - time.perf_counter()))
                if slot.stopped.is_set():
                    return
                now = time.perf_counter_ns()
                time_s = now / 1e9 - start if self.live else frame.time_s
                slot.put(Frame(frame.index, time_s, now, frame.bgr))
                self.offered = frame.index + 1
            if not self.live:  # the last frame lasts as long as any other
                slot.stopped.wait(max(0.0, start + self.offered * period - time.perf_counter()))
        finally:
            slot.put(None)


class _Slot:
    """Room for one frame: a newer one takes the place of one that nobody took."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._ended = False

    def put(self, frame: Frame | None) -> None:
        """None is the end; a frame that waits is still given out."""
        with self._changed:
            self._frame, self._ended = frame or self._frame, frame is None
            self._changed.notify()

    def take(self) -> Frame | None:
        with self._changed:
            while self._frame is None and not self._ended:
                self._changed.wait()
            frame, self._frame = self._frame, None
            return frame


def _open(source: str, name: str) -> Any:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # its complaints are told in our words
    timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _OPEN_TIMEOUT_MS]
    scheme, is_url, _ = source.partition("://")
    if is_url and scheme.lower() not in SCHEMES:
        raise UserError(f"{name}: unknown kind of stream", got=scheme, expected=", ".join(SCHEMES))
    if source.isdigit() or source.startswith("/dev/video"):
        with silent():
            capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, not the oldest of a queue
        if not capture.isOpened():
            there = ", ".join(str(path) for path in sorted(Path("/dev").glob("video*"))) or "none"
            fix = "plug one in, and check that you may use it (group video); --device /dev/videoN in a container"
            raise UserError(f"camera {source} cannot be opened", got=f"cameras here: {there}", fix=fix)
        return capture
    if not is_url:
        path = Path(source)
        if not path.is_file():
            raise UserError(f"{name}: there is no such video", got="a folder" if path.is_dir() else None)
        try:
            empty = not path.open("rb").read(1)
        except OSError as error:
            raise UserError(f"{name} cannot be read", got=error.strerror) from error
        if empty:
            raise UserError(f"{name}: the video file is empty (0 bytes)")
    place = source if is_url else os.path.abspath(source)  # FFmpeg takes 12:30:00.mp4 for a stream of protocol 12
    with silent():
        capture = cv2.VideoCapture(place, cv2.CAP_FFMPEG, timeouts if is_url else [])
    if not capture.isOpened():
        if is_url:
            raise UserError(f"{name} cannot be reached", fix=f"it must answer within {_OPEN_TIMEOUT_MS // 1000} s")
        fix = "if a player shows it, `ffmpeg -i IN -c:v libx264 OUT.mp4` makes one that OpenCV reads"
        raise UserError(f"{name}: not a video, damaged, or of a kind that OpenCV's FFmpeg cannot decode", fix=fix)
    return capture


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep what C libraries say on stderr away from the user: FFmpeg has no other switch for some of it."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
