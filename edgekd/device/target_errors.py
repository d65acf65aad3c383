"""What a failed session on a device means, and how to mend it: out of ssh's words and exit code, or the agent's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgekd.errors import EdgeKDError, RuntimeFailure, UserError

_REASONS = (
    (
        "HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one that ssh knows",
        "find out why; if the device was set up anew: ssh-keygen -R {host}, then connect once by hand",
    ),
    (
        "Host key verification failed",
        "ssh does not know this host yet",
        "connect once by hand and compare the fingerprint: ssh {name}",
    ),
    (
        "Permission denied",
        "it does not let you in",
        "set up a key: ssh-copy-id {name}; one with a passphrase needs ssh-add first",
    ),
    ("Could not resolve hostname", "there is no such host", "check the name, or use its address"),
    ("Connection refused", "nothing answers on this port", "check the port, and that sshd runs there"),
    (
        "(Connection|Operation) timed out|No route to host|Network is unreachable",
        "it cannot be reached",
        "check that it is on and in this network",
    ),
    ("Bad configuration option|Bad owner or permissions|Can't open user config", "ssh's configuration is wrong", ""),
)


def old_python(name: str, version: str | None) -> UserError:
    """What to say of a Python before 3.8."""
    return UserError(
        f"{name}: its Python is too old",
        got=version,
        expected="3.8 or later",
        fix="name another one with --target-python",
    )


def agent_problem(name: str, answer: Mapping[str, Any]) -> EdgeKDError:
    """What an agent's error means."""
    code = answer["error"]
    if code == "disk":
        return disk_full(name, answer.get("free_bytes"), str(answer.get("folder")), None)
    if code == "busy":
        return UserError(
            f"{name}: another session measures there", got=answer.get("holder") or None, fix="wait until it is over"
        )
    tail = "\n".join(answer.get("tail", ())[-5:]) or None
    if code == "limit":
        return RuntimeFailure(
            f"{name}: not done within {answer['limit_s']:g} s, and ended",
            got=tail,
            fix="allow more with --time-limit; engines that were built stay",
        )
    if code == "refused":
        fix = f"give yourself the right to write into {answer['folder']} there"
        return UserError(f"{name}: {answer['message']}", got=answer.get("file"), fix=fix)
    return RuntimeFailure(f"{name}: {answer.get('message') or code}", got=answer.get("file") or tail)


def disk_full(name: str, free: int | None, folder: str, needed: int | None) -> UserError:
    """What to say where a bundle or a result finds no room."""
    return UserError(
        f"{name}: its disk is full",
        got=None if free is None else f"{free / 1e6:.0f} MB free for {folder}",
        expected=None if needed is None else f"{needed / 1e6:.0f} MB",
        fix=f"make room there; older bundles and engines in {folder} can be deleted",
    )


def not_started(name: str, python: str, code: int, stderr: str, printed: str | None) -> UserError:
    """Why a session ended before the agent said a word, though ssh got through.

    Args:
        code: of the remote command. printed: the last line on its stdout, where shells that let nobody in say so.
    """
    said = stderr.strip().splitlines()
    if "SyntaxError" in stderr:
        return old_python(name, None)
    absent = re.compile(rf"{re.escape(python.removeprefix('~'))}.*(not found|No such file)|Unknown command")
    if code in (126, 127) or any(map(absent.search, said)):
        return UserError(
            f"{name}: no Python there",
            got=said[-1] if said else f"exit code {code}",
            expected=python,
            fix="install Python 3.8 or later there (apt install python3), or name it with --target-python",
        )
    return UserError(
        f"{name}: Python did not start there",
        got=said[-1] if said else printed or f"exit code {code}",
        expected=python,
        fix=f"see what `ssh {name} {python} --version` does: the login's shell or its scripts stand in the way",
    )


def session_ended(name: str, host: str, code: int | None, stderr: str, expired: bool) -> EdgeKDError:
    """Why ssh ended before the answer came.

    Args:
        name: user@host. code: ssh's exit code, which is the remote command's, or 255 for its own failures.
        expired: we ended it, since nothing came for too long.
    """
    said = stderr.strip()
    last = said.splitlines()[-1].strip() if said else None
    if expired:
        return RuntimeFailure(f"{name} did not answer in time", got=last)
    for sign, what, fix in _REASONS:
        if re.search(sign, said):
            return UserError(f"{name}: {what}", got=last, fix=fix.format(name=name, host=host) or None)
    if code == 255 or not said:
        again = "run the same command again: files that are there stay"
        return RuntimeFailure(f"{name}: the connection was cut", got=last, fix=again)
    return RuntimeFailure(f"{name}: the session ended with code {code}", got=last)
