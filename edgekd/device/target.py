"""Measuring on a device that is reached by ssh: push a bundle by its hash, run it there, bring the result back.

The system's own `ssh` does it, with the user's own keys, configuration and known hosts, as an argument list and without
ever asking anything (BatchMode). The remote command is a fixed string; names, hashes and sizes travel as data on stdin, to
`edgekd.device.agent`. That needs no sftp on the device, and tells a full disk from a cut connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from edgekd.artifact import sha256_file
from edgekd.device.bundle_bench import read_bundle
from edgekd.device.target_errors import agent_problem, disk_full, not_started, old_python, session_ended
from edgekd.errors import MissingDependencyError, RuntimeFailure, UserError

AGENT = Path(__file__).with_name("agent.py")
MARK = "\x1eedgekd "
CONNECT_S = 15
QUIET_S = 180
"""Seconds without a word from the device after which it counts as gone; while a bundle runs it speaks every 10."""

OPTIONS = (
    "-T",
    *("-o", "BatchMode=yes"),
    *("-o", f"ConnectTimeout={CONNECT_S}"),
    *("-o", "ServerAliveInterval=15"),
    *("-o", "ServerAliveCountMax=3"),
    *("-o", "ClearAllForwardings=yes"),
    *("-o", "RemoteCommand=none"),
)
_START = (
    """ -u -c "import sys; b = sys.stdin.buffer; exec(compile(b.read(int(b.readline())), 'edgekd-agent', 'exec'))" """
)
_PYTHON = re.compile(r"(~/)?[A-Za-z0-9_./+-]+")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|[0-9A-Fa-f:]+(%[A-Za-z0-9_.-]+)?")
_RESERVE = 64 << 20


@dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
        host: name, address, or an alias of the user's ssh configuration. user, port: as ssh's if None.
        python: the Python to use there: a name on its PATH, or a path.
        ssh_config: a configuration file instead of the user's own.
    """

    host: str
    user: str | None = None
    port: int | None = None
    python: str = "python3"
    ssh_config: Path | None = None

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.host) or (self.user is not None and not _NAME.fullmatch(self.user)):
            raise UserError("not a host that ssh can be given", got=repr(self.name), expected="ssh://user@host[:port]")
        if not _PYTHON.fullmatch(self.python) or self.python.startswith("-"):
            raise UserError(
                "not a path to a Python that can be passed on safely",
                got=repr(self.python),
                expected="letters, digits and _ . / + -, such as '~/venv/bin/python' in quotes",
            )

    @property
    def name(self) -> str:
        """user@host, as ssh takes it."""
        return self.host if self.user is None else f"{self.user}@{self.host}"

    def command(self) -> list[str]:
        """The whole argument list."""
        config = [] if self.ssh_config is None else ["-F", str(self.ssh_config)]
        port = [] if self.port is None else ["-p", str(self.port)]
        return ["ssh", *config, *OPTIONS, *port, "--", self.name, self.python + _START]


def parse_target(text: str, *, python: str = "python3", ssh_config: Path | None = None) -> Target:
    """Read `ssh://[user@]host[:port]`.

    Raises:
        UserError: it is something else, or holds a password or a path.
    """
    wrong = UserError("not a target", got=repr(text), expected="ssh://user@host[:port]")
    try:
        parts: SplitResult = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise wrong from error
    if parts.scheme != "ssh" or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise wrong
    if parts.password is not None:
        raise UserError(
            "a password has no place in a target", expected="ssh://user@host", fix="use a key: ssh-copy-id user@host"
        )
    shown = parts.netloc.rpartition("@")[2]
    host = parts.hostname if shown.startswith("[") else shown.partition(":")[0]  # hostname is lower case
    return Target(host, parts.username, port, python, ssh_config)


class Connection:
    """One ssh session with an agent at its other end, as a context manager."""

    def __init__(self, target: Target, say: Callable[[str], None]) -> None:
        self._target, self._say = target, say
        self._said = ""
        self._printed: str | None = None
        self._expired = self._heard = False

    def __enter__(self) -> Connection:
        try:
            self._ssh = subprocess.Popen(
                self._target.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C"},
            )
        except FileNotFoundError as error:
            raise MissingDependencyError("there is no ssh here", fix="install OpenSSH's client") from error
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()
        source = AGENT.read_bytes()
        self._send(b"%d\n" % len(source) + source)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            assert self._ssh.stdin is not None
            self._ssh.stdin.close()  # the agent's sign to end, and to kill what it started
        try:
            self._ssh.wait(10)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()
        self._reader.join(5)
        for stream in (self._ssh.stdout, self._ssh.stderr):
            if stream is not None:
                stream.close()

    def _read_stderr(self) -> None:
        assert self._ssh.stderr is not None
        for line in self._ssh.stderr:
            self._said = (self._said + line.decode("utf-8", "replace"))[-8000:]

    def ask(self, payload: Iterator[bytes] | None = None, quiet_s: float = QUIET_S, **request: Any) -> dict[str, Any]:
        """Send a request, then `payload`; returns the answer, passing on lines that come before it.

        Raises:
            UserError: something on the device that the user can mend. RuntimeFailure: the connection or the device failed.
        """
        self._send(json.dumps(request).encode() + b"\n")
        for block in payload or ():
            if not self._send(block):
                break  # the agent has ended, and said why
        while True:
            answer = self._receive(quiet_s)
            if answer.get("event") == "line":
                self._say(str(answer["text"]))
            elif "error" in answer:
                raise agent_problem(self._target.name, answer)
            elif "done" in answer:
                return answer

    def _send(self, data: bytes) -> bool:
        assert self._ssh.stdin is not None
        try:
            self._ssh.stdin.write(data)
            self._ssh.stdin.flush()
        except OSError:
            return False  # the reason comes on stdout or stderr
        return True

    def _receive(self, quiet_s: float) -> dict[str, Any]:
        """The next line of the agent's; what login scripts print is passed over."""
        assert self._ssh.stdout is not None
        timer = threading.Timer(quiet_s, self._expire)
        timer.daemon = True
        timer.start()
        try:
            for raw in self._ssh.stdout:
                line = raw.decode("utf-8", "replace")
                self._printed = line.split(MARK)[0].strip() or self._printed
                if MARK in line:
                    with contextlib.suppress(ValueError, TypeError):
                        answer = dict(json.loads(line.split(MARK, 1)[1]))
                        self._heard = True
                        return answer
        finally:
            timer.cancel()
        self._ssh.wait()
        self._reader.join(5)
        to, code = self._target, self._ssh.returncode
        if not (self._heard or self._expired or code == 255):
            raise not_started(to.name, to.python, code, self._said, self._printed)
        raise session_ended(to.name, to.host, code, self._said, self._expired)

    def _expire(self) -> None:
        self._expired = True
        self._ssh.kill()


def bench_on_target(
    folder: Path,
    target: Target,
    *,
    arguments: Sequence[str] = (),
    limit_s: float = 1800.0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a bundle on a device; returns what its `result.json` holds, with the device's versions.

    Args:
        folder: the bundle. arguments: of its bench.py.
        limit_s: after which the run there is ended.
        say: told what is going on, a line a step.

    Raises:
        UserError: something that the user can mend, such as a missing package, a full disk, an unknown host.
        RuntimeFailure: the connection was cut, time was up, or the measurement failed.
    """
    manifest = read_bundle(folder)
    files = _files(folder, manifest)
    with Connection(target, say) as connection:
        say(f"asking {target.name} what it has")
        found = connection.ask(do="probe", sha256=manifest["sha256"])
        _check_tools(target, found)
        if found["has_bundle"]:
            say("the bundle is there already")
        else:
            needed = sum(entry["size"] for entry in files)
            if found["free_bytes"] is not None and found["free_bytes"] < needed + _RESERVE:
                raise disk_full(target.name, found["free_bytes"], found["folder"], needed + _RESERVE)
            say(f"pushing {needed / 1e6:.1f} MB")
            connection.ask(_contents(folder, files), do="push", sha256=manifest["sha256"], files=files)
        answer = connection.ask(do="run", sha256=manifest["sha256"], arguments=list(arguments), limit_s=limit_s)
    result = answer["result"]
    if answer["rc"] != 0 or not isinstance(result, dict) or result.get("bundle") != manifest["sha256"]:
        kind = UserError if answer["rc"] == 2 else RuntimeFailure
        raise kind(f"{target.name}: the measurement failed there", got=_reason(answer))
    if found["jetson"]:
        say(steady_clocks(result))
    kept = ("python", "numpy", "onnxruntime", "providers", "tensorrt")
    return {**result, "target": {key: found.get(key) for key in kept}}


def steady_clocks(result: Mapping[str, Any]) -> str:
    """What to do for steadier figures on a Jetson; edgekd never uses sudo itself."""
    clocks = result.get("conditions", {}).get("before", {}).get("clocks", {})
    pinned = [clock["pinned"] for clock in clocks.values() if clock["pinned"] is not None]
    if pinned and all(pinned):
        return "clocks are pinned there"
    return "for steadier figures, on the device: sudo nvpmodel -m N (N from /etc/nvpmodel.conf), sudo jetson_clocks"


def _files(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    hashes = {**manifest["files"], "manifest.json": sha256_file(folder / "manifest.json")}
    return [{"path": name, "size": (folder / name).stat().st_size, "sha256": digest} for name, digest in hashes.items()]


def _contents(folder: Path, files: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    for entry in files:
        with open(folder / entry["path"], "rb") as stream:
            while block := stream.read(1 << 20):
                yield block


def _check_tools(target: Target, found: Mapping[str, Any]) -> None:
    numbers = tuple(int(part) for part in re.findall(r"\d+", str(found["python"]))[:2])
    if numbers < (3, 8):
        raise old_python(target.name, found["python"])
    if found.get("numpy") is None:
        raise UserError(
            f"{target.name}: NumPy is missing there",
            got=found.get("numpy_error"),
            fix=f"on the device: sudo apt-get install python3-numpy, or {found['executable']} -m pip install numpy",
        )
    if found.get("onnxruntime") is None and found.get("tensorrt") is None:
        raise UserError(
            f"{target.name}: neither TensorRT nor ONNX Runtime is there",
            got=f"{found.get('tensorrt_error')}; {found.get('onnxruntime_error')}",
            fix=f"on the device: {found['executable']} -m pip install onnxruntime (where pip refuses: in a virtual "
            "environment, named with --target-python); TensorRT comes with JetPack",
        )


def _reason(answer: Mapping[str, Any]) -> str:
    """The error that bench.py printed, or its last lines."""
    tail = [str(line) for line in answer["tail"]]
    at = next((index for index, line in enumerate(tail) if line.startswith("error: ")), None)
    lines = tail[-5:] if at is None else tail[at:]
    return "\n".join(lines).replace("error: ", "", 1) or f"exit code {answer['rc']}"
