"""Every error that edgekd raises on purpose.

The tree reads as documentation: a `UserError` is something the person at the keyboard can mend (exit code 2), any
other `EdgeKDError` is a failure of ours or of the machine (exit code 1). The command line prints the message alone;
a traceback is shown only for exceptions outside this tree, which are bugs.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

# "/onnxruntime_src/.../model.cc:256 onnxruntime::Model::Model(...) Unsupported model IR version"
_SOURCE_PLACE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)? (?=[A-Z])")


class EdgeKDError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line exits with.

    The message is built from up to four parts, so that every error answers the same questions: what is wrong, what
    was found, what was expected, and how to mend it.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        self.what = what
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.fix = fix
        lines = [what]
        if self.got is not None:
            lines.append(f"  got:      {self.got}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if fix is not None:
            lines.append(f"  fix:      {fix}")
        super().__init__("\n".join(lines))


class UserError(EdgeKDError):
    """The input is wrong and the user can mend it: exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe does not validate. `problems` has every problem found, each with its place, not only the first."""

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
        problems: Sequence[object] = (),
    ) -> None:
        super().__init__(what, got=got, expected=expected, fix=fix)
        self.problems = tuple(problems)


class DataError(UserError):
    """A data set cannot be read, or training on it would be wrong."""


class ArtifactError(UserError):
    """An artefact (run folder, checkpoint, ONNX file, engine) is missing, foreign, stale or damaged."""


class WeightsError(UserError):
    """Published or user weights cannot be found, verified, or do not fit the model."""


class ClassMapError(UserError):
    """A teacher's label set cannot be mapped onto the student's."""


class DistillationSetupError(UserError):
    """A distillation term cannot be built for this pair; the message lists both sides' grids and channels."""


class TeacherError(UserError):
    """A teacher fails on an image, or gives an answer that cannot be used; names the teacher and the image."""


class MissingDependencyError(UserError):
    """An optional package or device is not there; the message says how to get it."""


class ExportError(EdgeKDError):
    """The exporter or engine builder failed."""


class ParityError(EdgeKDError):
    """Two runtimes disagree on the same detector beyond the stated tolerance."""


class NonFiniteLossError(EdgeKDError):
    """A loss or gradient became NaN or infinite; names the term, the step and the images."""


class RuntimeFailure(EdgeKDError):
    """An inference runtime failed while running, or silently fell back to another provider."""


class PeerError(EdgeKDError):
    """Another process of the same distributed run, or the machine it was on, has died."""


_NOT_ALLOWED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_refusal(error: BaseException) -> bool:
    """Whether the system refused a file (no right to it, no room for it), which is no bug of edgekd."""
    return isinstance(error, OSError) and error.errno in _NOT_ALLOWED | _FULL


def is_full(error: BaseException) -> bool:
    """Whether there is no room left for a file."""
    return isinstance(error, OSError) and error.errno in _FULL


def refusal(error: OSError, path: Path | str | None = None) -> EdgeKDError:
    """What to tell of an OSError: a place that the user may not use is a `UserError`, a full disk is the machine's.

    Args:
        error: what the system said.
        path: what was to be written, where the error names none or a temporary file.
    """
    said = error.strerror or str(error)
    if path is None:
        named = (error.filename2 if is_full(error) else None) or error.filename  # a copy fills the disk that it goes to
        what, got = f"{named or 'the disk'}: {said}", None
    else:
        what, got = f"{path} cannot be written", said
    if error.errno in _FULL:
        room = (
            "raise the limit on a file's size (`ulimit -f`)" if error.errno == errno.EFBIG else "free some space there"
        )
        return EdgeKDError(what, got=got, fix=f"{room}, or choose another place")
    if error.errno in _NOT_ALLOWED:
        return UserError(what, got=got, fix="choose another place, or give yourself the right to this one")
    return EdgeKDError(what, got=got)


def install_extra(name: str) -> str:
    """How to get one of edgekd's extras. The package index has no edgekd: it is installed from its own sources."""
    return f"pip install '.[{name}]' in a checkout of edgekd"


def first_line(error: BaseException) -> str:
    """The first line of an engine's message, which may go on for pages, without the C++ place that stands before it."""
    text = str(error).strip() or type(error).__name__
    return _SOURCE_PLACE.sub(" ", text.splitlines()[0])[:300]
