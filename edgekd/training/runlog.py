"""The log of a run: every step to JSONL, a selection to TensorBoard, and to whoever listens (the terminal).

A record is a flat JSON object: {"event": "step", "step": 12, "epoch": 0, "losses": {...}, "lr": ..., ...} or
{"event": "eval", "step": ..., "map": {...}} or {"event": "warning" or "note", "message": ...}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from edgekd.artifact import write_text
from edgekd.console import Listener

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends records to `metrics.jsonl`; a context manager.

    Args:
        folder: the run's.
        start_step: a resumed run drops what an earlier one logged from this step on, so no step stands twice.
        listener: called with each record.
        enabled: False on all ranks but the first: nothing is written or told.
    """

    def __init__(
        self, folder: Path, *, start_step: int = 0, listener: Listener | None = None, enabled: bool = True
    ) -> None:
        self.path = folder / METRICS_FILE
        self.listener, self.enabled = listener, enabled
        self._writer: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(line + "\n" for line in _kept_lines(self.path, start_step)))
        self._stream = self.path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one record; NaN and infinity become null, as JSON has neither."""
        if not self.enabled:
            return
        clean = _finite(record)
        self._stream.write(json.dumps(clean) + "\n")
        self._stream.flush()
        if self._writer is not None and (record["event"] != "step" or record["step"] % 10 == 0):
            for key, value in _flatten(clean):
                self._writer.add_scalar(key, value, record["step"])
        if self.listener is not None:
            self.listener(clean)

    def close(self) -> None:
        """Flush and close the files."""
        if self.enabled:
            self._stream.close()
            if self._writer is not None:
                self._writer.close()
        self.enabled = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Every whole record of a run's log; a line that a kill has cut off, or a disk has damaged, is left out."""
    path = folder / METRICS_FILE
    return [json.loads(line) for line in _kept_lines(path, None)] if path.is_file() else []


def _kept_lines(path: Path, start_step: int | None) -> list[str]:
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                step = int(record.get("step", 0))
            except (ValueError, TypeError, AttributeError, RecursionError):
                continue
            # An evaluation carries the number of steps done, so the one before the checkpoint has its step.
            if start_step is None or step < start_step or (record.get("event") == "eval" and step <= start_step):
                kept.append(line)
    return kept


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flatten(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for key, value in record.items():
        if key in ("event", "step"):
            continue
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            pairs.append((f"{prefix}{key}", float(value)))
    return pairs
