"""What a stage has found so far, in its JSON at once."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from edgekd.artifact import source_commit, write_json


class Record:
    """One stage's JSON: {"stage", "status", "reason", "seconds", ...}, written whole after every change.

    The status is "running", "done", "not run" (something is missing here), "failed" or "cut off" (by its time limit).
    """

    def __init__(self, out: Path, stage: str, data: dict[str, Any] | None = None) -> None:
        self.file = out / f"{stage}.json"
        self.data: dict[str, Any] = data or {
            "stage": stage,
            "status": "running",
            "reason": None,
            "seconds": None,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": source_commit(),
            "python": sys.version.split()[0],
        }

    def write(self) -> None:
        """Put it into the file, which is never half-written."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.data)

    def set(self, **found: Any) -> None:
        """Keep some facts."""
        self.data.update(found)
        self.write()

    def add(self, key: str, entry: Any) -> None:
        """Append to a list."""
        self.data.setdefault(key, []).append(entry)
        self.write()

    def end(self, status: str, reason: str | None = None) -> None:
        """Say what became of the stage."""
        self.set(status=status, reason=reason)


def read_record(file: Path) -> dict[str, Any] | None:
    """A stage's JSON; None where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
