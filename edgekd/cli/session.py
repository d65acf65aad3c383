"""What all commands share: the options that may stand before or after a command, results, and how errors end.

`--json` prints exactly one JSON document to stdout; everything else, whoever prints it, goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Annotated, Any

import typer
from typer.core import TyperGroup

from edgekd.errors import EdgeKDError, PeerError, RecipeError, UserError, is_refusal, refusal
from edgekd.torchrun import place

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

PANEL = "Common options"

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.", rich_help_panel=PANEL)]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Random seed.", rich_help_panel=PANEL)]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=PANEL, metavar="NAME")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.", rich_help_panel=PANEL)]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an internal error.", hidden=True)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe key, such as train.epochs=3; repeatable.", metavar="KEY=VALUE"),
]


@dataclass
class Session:
    """The options in force for one command line.

    Attributes:
        resume_hint: what to say after Ctrl-C, set by commands that can go on from where they were.
        asked_json: whether --json stands anywhere in the command line, even if that cannot be read.
    """

    json: bool = False
    seed: int | None = None
    device: str | None = None
    quiet: bool = False
    debug: bool = False
    sets: list[str] = field(default_factory=list)
    resume_hint: str | None = None
    asked_json: bool = False
    _stdout: IO[str] | None = None
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def merge(
        self,
        *,
        json: bool = False,
        seed: int | None = None,
        device: str | None = None,
        quiet: bool = False,
        debug: bool = False,
        sets: Sequence[str] | None = None,
    ) -> None:
        """Add what stood after the command to what stood before it; the later one wins."""
        self.json, self.quiet, self.debug = self.json or json, self.quiet or quiet, self.debug or debug
        self.seed = self.seed if seed is None else seed
        self.device = self.device if device is None else device
        self.sets += sets or []
        if self.device is not None and not _is_device(self.device):
            raise UserError("unknown --device", got=self.device, expected="auto, cpu, cuda or cuda:N")
        if self.json and self._stdout is None:
            self._keep_stdout()

    @property
    def overrides(self) -> list[str]:
        """`--set` and `--seed` as recipe overrides."""
        return [*self.sets, *([] if self.seed is None else [f"seed={self.seed}"])]

    @property
    def rank(self) -> int:
        """Which of the processes that torchrun started this is; the first one speaks for all."""
        return place()[0]

    def finish(self, result: Mapping[str, Any], show: Callable[[], None]) -> None:
        """End a command: its result as JSON when asked for, and else for a person, unless that one wants quiet."""
        if self.rank > 0:
            return
        if self.json:
            self._write(result)
        elif not self.quiet:
            show()

    def close(self) -> None:
        """Give stdout back."""
        self._undo.close()
        self._stdout = None

    def fail(self, error: BaseException) -> int:
        """Tell what went wrong on stderr (and as JSON on stdout when asked for); returns the exit code.

        Of several processes the first tells at once; another one only what it has met alone.
        """
        if isinstance(error, OSError) and is_refusal(error):
            error = refusal(error)
        if isinstance(error, KeyboardInterrupt):
            hint = f"; {self.resume_hint}" if self.resume_hint else ""
            message, code = f"interrupted{hint}", INTERRUPTED
        elif isinstance(error, EdgeKDError):
            message, code = f"error: {error}", error.exit_code
        else:
            message, code = f"internal error: {type(error).__name__}: {error}", 1
            if isinstance(error, OSError) and error.strerror:
                message = f"error: {error.filename or 'system'}: {error.strerror}"
            try:
                kept = None if self.debug else _keep_traceback(error)
            except OSError:  # there is no place for it, or no room
                kept = None
            if kept is None:
                traceback.print_exception(error)
            else:
                message += f"\n  traceback: {kept}"
        if self.rank > 0:
            time.sleep(1.0)  # if the first process has met the same, torchrun has ended this one by now
            if not isinstance(error, KeyboardInterrupt | PeerError):
                print(f"process {self.rank}: {message}", file=sys.stderr)
            return code
        print(message, file=sys.stderr)
        if self.json:
            problems = [str(problem) for problem in error.problems] if isinstance(error, RecipeError) else []
            body = {"kind": type(error).__name__, "message": message.removeprefix("error: "), "exit_code": code}
            with contextlib.suppress(OSError):  # stdout may be what failed, as on a full disk
                self._write({"error": body | ({"problems": problems} if problems else {})})
        return code

    def misused(self, error: Any) -> None:
        """A usage error of Typer's, as JSON where that is asked for."""
        if self.asked_json and self.rank == 0:
            body = {"kind": "UsageError", "message": error.format_message(), "exit_code": error.exit_code}
            with contextlib.suppress(OSError):
                self._write({"error": body})

    def _write(self, result: Mapping[str, Any]) -> None:
        stream = self._stdout or sys.stdout
        stream.write(json.dumps(result, indent=2, allow_nan=False) + "\n")
        stream.flush()

    def _keep_stdout(self) -> None:
        """Send stdout to stderr from here on, C libraries' too, and keep the real one for the result."""
        sys.stdout.flush()
        self._stdout = sys.stdout
        with contextlib.suppress(OSError, ValueError):
            if sys.stdout.fileno() == 1:
                real = os.dup(1)
                self._stdout = os.fdopen(real, "w", encoding="utf-8")
                os.dup2(2, 1)
                self._undo.callback(os.dup2, real, 1)
        self._undo.enter_context(contextlib.redirect_stdout(sys.stderr))


def _is_device(name: str) -> bool:
    kind, colon, index = name.partition(":")
    return name in ("auto", "cpu", "cuda") or (kind == "cuda" and bool(colon) and index.isdigit())


def _keep_traceback(error: BaseException) -> str:
    """Write the traceback where a bug report can pick it up; returns the file."""
    handle, path = tempfile.mkstemp(prefix="edgekd-error-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        traceback.print_exception(error, file=stream)
    return path


def session_of(context: typer.Context) -> Session:
    """The session of a running command, with what this command was given of the common options.

    A command declares those it takes in its signature and need not look at them.
    """
    session = context.find_root().obj
    if not isinstance(session, Session):
        raise TypeError("no session: the root group has not run")
    session.merge(**{name: value for name, value in context.params.items() if name in _COMMON})
    given = {"sets": session.sets, "seed": session.seed, "device": session.device}
    for name in given.keys() - context.params:  # given before a command that does not take it
        if given[name] not in (None, []):
            option = f"--{name.removesuffix('s')}"
            raise UserError(f"{option} does nothing here", expected=f"a command whose --help has {option}")
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{parameter.opts[0]} cannot be this", got=value, expected="a finite number")
    return session


_COMMON = ("json", "seed", "device", "quiet", "debug", "sets")


def refuse_idle(context: typer.Context, unmet: Mapping[str, Collection[str]]) -> None:
    """Refuse options that would do nothing in this command line.

    Args:
        unmet: what was not given -> the parameters that only matter together with it.

    Raises:
        UserError: one of them was given.
    """
    for need, names in unmet.items():
        sources = {parameter.opts[0]: context.get_parameter_source(str(parameter.name))
                   for parameter in context.command.params if parameter.name in names}  # fmt: skip
        idle = [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if idle:
            said = "does" if len(idle) == 1 else "do"
            raise UserError(f"{', '.join(idle)} {said} nothing here", expected=f"only together with {need}")


# Typer's base of usage errors, which it does not export (older ones take click's, newer ones their own).
_UsageProblem: type[BaseException] = typer.BadParameter.__mro__[2]


class CommandGroup(TyperGroup):
    """The root group: turns exceptions into messages and exit codes, for scripts and tests alike."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the command; what follows it is read when the command runs."""
        ctx.obj = session = Session()
        session.asked_json = "--json" in args  # before or after the command, which may never be read
        try:
            return super().parse_args(ctx, args)
        except _UsageProblem as error:
            session.misused(error)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command line.

        Raises:
            typer.Exit: with the error's exit code.
        """
        session: Session = ctx.obj
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except _UsageProblem as error:
            session.misused(error)
            raise  # Typer itself tells it on stderr
        except BrokenPipeError:
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(session.fail(error)) from error
        finally:
            session.close()
