"""Frames into a video file, through OpenCV.

What the wheels of opencv-python-headless can write: MPEG-4 Part 2 in .mp4, Motion JPEG in .avi, and VP8 in .webm, which
browsers play. They cannot write H.264, HEVC or AV1.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2

from edgekd.artifact import atomic_path
from edgekd.errors import EdgeKDError, UserError
from edgekd.types import ImageArray
from edgekd.video import silent

CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".webm": "VP80"}
"""What is written into each kind of file."""

_MIN_FREE_BYTES = 1 << 20


@contextlib.contextmanager
def written_video(path: Path, fps: float, hw: tuple[int, int]) -> Iterator[VideoWriter]:
    """A video file being written (kind by suffix, see `CODECS`), moved into place when it is done and can be read.

    Raises:
        UserError: an unknown suffix. EdgeKDError: OpenCV cannot write it. OSError: the disk is full.
    """
    if path.suffix not in CODECS:
        raise UserError(f"{path}: unknown kind of video", got=path.suffix, expected=", ".join(CODECS))
    with atomic_path(path) as temporary:
        writer = VideoWriter(temporary, fps, hw)
        try:
            yield writer
        finally:
            writer.close()
        writer.check(path)


class VideoWriter:
    """Frames into a file; see `written_video`."""

    def __init__(self, path: Path, fps: float, hw: tuple[int, int]) -> None:
        self.path, self.hw, self.frames = path, hw, 0
        codec = CODECS[path.suffix]
        with silent():
            self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (hw[1], hw[0]))
        if not self._writer.isOpened():
            raise EdgeKDError(f"OpenCV cannot write {codec} video here", fix="try another of " + ", ".join(CODECS))

    def write(self, image: ImageArray, times: int = 1) -> None:
        """Add an (H, W, 3) uint8 RGB picture `times` times."""
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        if bgr.shape[:2] != self.hw:  # a stream may change its size; OpenCV would leave such frames out
            bgr = cv2.resize(bgr, (self.hw[1], self.hw[0]))
        for _ in range(times):
            self._writer.write(bgr)
        self.frames += times

    def close(self) -> None:
        """Write what is left."""
        self._writer.release()

    def check(self, path: Path) -> None:
        """Look whether all that was written can be found again: OpenCV itself never says that a disk is full."""
        with silent():
            capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG, [])
            found = capture.get(cv2.CAP_PROP_FRAME_COUNT) if capture.isOpened() else 0
            capture.release()
        if self.frames and found < 0.95 * self.frames - 2:
            if shutil.disk_usage(self.path.parent).free < _MIN_FREE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            raise EdgeKDError(
                f"{path}: the video could not be written whole", got=f"{found:.0f} of {self.frames} frames"
            )
