"""What a person sees while edgekd works: stages, progress bars, notes, on stderr only.

On a terminal bars move; in a log file or CI, a line is printed every few seconds instead.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINE_EVERY_S = 10.0
"""Seconds between progress lines where nobody watches a terminal."""

Counter = Callable[[int, int], None]
Listener = Callable[[Mapping[str, Any]], None]


class Terminal:
    """Progress and notes on stderr.

    Args:
        quiet: show warnings only.
        bars: False where several processes write to one terminal: lines, as in a log file.
        about: what all that is said is about, put before it.
    """

    def __init__(self, quiet: bool = False, bars: bool = True, about: str = "") -> None:
        from rich.console import Console

        self.quiet, self.bars, self.about = quiet, bars, f"{about}: " if about else ""
        self.console: Console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

    def __reduce__(self) -> tuple[type[Terminal], tuple[bool, bool, str]]:
        """In another process: the same, in lines, since two processes' bars would overwrite each other."""
        return Terminal, (self.quiet, False, self.about.removesuffix(": "))

    def stage(self, number: int, total: int, title: str) -> None:
        """Say which part of the chain begins."""
        if not self.quiet:
            self.console.print(f"[bold]\\[{number}/{total}] {title}[/bold]")

    def note(self, text: str) -> None:
        """Say something worth knowing."""
        if not self.quiet:
            self.console.print(f"      {self.about}{text}", markup=False)

    def warn(self, text: str) -> None:
        """Say something that should not go unseen, even when quiet."""
        self.console.print(f"warning: {self.about}{text}", style="yellow", markup=False)

    @contextlib.contextmanager
    def counting(self, label: str) -> Iterator[Counter]:
        """Progress over a known number of things, told as (done, total)."""
        with self._bar(label) as update:
            yield lambda done, total: update(done, total, "")

    @contextlib.contextmanager
    def training(self, label: str) -> Iterator[Listener]:
        """Progress of a training run, told by its log records."""
        with self._bar(label) as update:
            yield _TrainingListener(update, self.warn, lambda text: self.note(f"{label}: {text}"))

    def staged(self) -> Callable[[str, int, int], None]:
        """Progress over several things one after another, told as (what, done, total)."""
        open_bars: dict[str, contextlib.AbstractContextManager[Counter]] = {}
        counters: dict[str, Counter] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in counters:
                open_bars[what] = self.counting(what)
                counters[what] = open_bars[what].__enter__()
            counters[what](done, total)
            if done >= total and what in open_bars:
                open_bars.pop(what).__exit__(None, None, None)

        return tell

    @contextlib.contextmanager
    def _bar(self, label: str) -> Iterator[Callable[[int, int, str], None]]:
        label = self.about + label
        if self.quiet:
            yield lambda done, total, text: None
        elif self.bars and self.console.is_terminal:
            with self._live() as progress:
                task = progress.add_task(label, total=None, text="")
                yield lambda done, total, text: progress.update(task, completed=done, total=total, text=text)
        else:
            yield _Lines(self.console, label)

    def _live(self) -> Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        label, text = (TextColumn(form, markup=False) for form in ("      {task.description}", "{task.fields[text]}"))
        columns = (label, BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), text)
        return Progress(*columns, console=self.console, transient=True)


class _Lines:
    """Progress as lines, at most one every few seconds and one at the end."""

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label = console, label
        self.start = self.last = time.monotonic()
        self.first, self.first_at = 0, 0.0
        self.finished = False

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if self.finished:
            return
        if not self.first_at:  # a run that is resumed does not begin at 0
            self.first, self.first_at = done, now
        if now - self.last < LINE_EVERY_S and done < total:
            return
        self.last, self.finished = now, done >= total
        known = done - self.first
        tail = f", {now - self.start:.0f} s"
        if done < total:  # what comes before the first also loads, compiles and asks teachers: no measure of the others
            left = (now - self.first_at) / max(1, known) * (total - done)
            tail = f", about {left:.0f} s left" if known > 1 else ""
        self.console.print(f"      {self.label}: {done}/{total}{tail}  {text}".rstrip(), markup=False)


class _TrainingListener:
    """Turns log records into a bar's numbers: losses, images/s, the last mAP."""

    def __init__(
        self, update: Callable[[int, int, str], None], warn: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        self.update, self.warn, self.note = update, warn, note
        self.accuracy = ""

    def __call__(self, record: Mapping[str, Any]) -> None:
        if record["event"] == "eval":
            ap50 = record["map"].get("ap50")
            self.accuracy = "" if ap50 is None else f"  AP50 {ap50:.3f}"
        elif record["event"] == "warning":
            self.warn(str(record["message"]))
        elif record["event"] == "note":
            self.note(str(record["message"]))
        elif record["event"] == "step":
            loss = record["losses"].get("loss")
            shown = "" if loss is None else f"loss {loss:.3f}  "
            speed = f"{record['images_per_s']:.0f} images/s"
            epoch = f"epoch {record['epoch'] + 1}/{record['epochs']}  "
            self.update(record["step"] + 1, record["steps"], f"{epoch}{shown}{speed}{self.accuracy}")
