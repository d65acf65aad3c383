"""The far end of `edgekd bench --target`: sent as source over ssh, answers requests until its input ends.

Python 3.8, standard library alone, nothing of edgekd: it runs before a bundle is there. Requests are lines of JSON on
stdin, after a push followed by the files' bytes; answers are lines of JSON on stdout behind a mark, since login scripts
may print there too. When stdin ends, the connection is gone: whatever runs is killed and the lock is freed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import IO, Any

MARK = "\x1eedgekd "
KEPT_BUNDLES = 4
TAIL_LINES = 40
_PROBE = """
import json
found = {}
try:
    import numpy
    found["numpy"] = numpy.__version__
except Exception as error:
    found["numpy_error"] = str(error)[:200]
try:
    import onnxruntime
    found["onnxruntime"] = onnxruntime.__version__
    found["providers"] = onnxruntime.get_available_providers()
except Exception as error:
    found["onnxruntime_error"] = str(error)[:200]
try:
    import tensorrt
    found["tensorrt"] = tensorrt.__version__
except Exception as error:
    found["tensorrt_error"] = str(error)[:200]
print("\\n" + json.dumps(found))
"""


class Problem(Exception):
    """Something to tell the other end: a code that it knows, and details."""

    def __init__(self, code: str, **details: Any) -> None:
        super().__init__(code)
        self.body: dict[str, Any] = dict(details, error=code)


class Agent:
    """Answers requests; holds the lock from the first push or run on."""

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        self.source, self.sink = source, sink
        self.base = os.path.join(os.path.expanduser("~"), ".cache", "edgekd")
        self._lock: Any = None
        self._machine_lock: int | None = None
        self._write = threading.Lock()

    def say(self, **body: Any) -> None:
        """One line to the other end."""
        with self._write:
            self.sink.write((MARK + json.dumps(body) + "\n").encode())
            self.sink.flush()

    def serve(self) -> None:
        """Until stdin ends or something goes wrong."""
        known = {"probe": self.probe, "push": self.push, "run": self.run}
        while True:
            line = self.source.readline()
            if not line:
                return
            request = json.loads(line.decode())
            try:
                answer = known[request["do"]](request)
            except Problem as problem:
                self.say(**problem.body)
                return  # what follows on stdin may be half a file
            except OSError as error:
                details = {"error": _code_of(error.errno), "message": error.strerror, "file": error.filename}
                self.say(free_bytes=self._free(), folder=self.base, **details)
                return
            self.say(done=request["do"], **answer)

    def bundle(self, sha256: str) -> str:
        """Where a bundle belongs."""
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise Problem("system", message="not a bundle's hash")
        return os.path.join(self.base, "bundles", sha256)

    def probe(self, request: dict[str, Any]) -> dict[str, Any]:
        """What is here."""
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROBE],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=120,
            )
        except subprocess.TimeoutExpired:
            raise Problem("system", message="importing its packages took more than 120 s") from None
        try:
            found: dict[str, Any] = json.loads(done.stdout.decode().strip().splitlines()[-1])
        except (ValueError, IndexError):
            found = {"numpy_error": f"python exited with code {done.returncode} when asked for packages"}
        found.update(
            python=sys.version.split()[0],
            executable=sys.executable,
            folder=self.base,
            free_bytes=self._free(),
            has_bundle=self._intact(request["sha256"]),
            jetson=os.path.exists("/etc/nv_tegra_release"),
        )
        return found

    def _free(self) -> int | None:
        folder = self.base
        while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
            folder = os.path.dirname(folder)
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            return None

    def _intact(self, sha256: str) -> bool:
        folder = self.bundle(sha256)
        try:
            with open(os.path.join(folder, "manifest.json"), "rb") as stream:
                text = stream.read()
            if hashlib.sha256(text).hexdigest() != sha256:
                return False
            files = json.loads(text.decode())["files"]
            return all(_sha256(os.path.join(folder, name)) == digest for name, digest in files.items())
        except (OSError, ValueError, KeyError):
            return False

    def lock(self) -> None:
        """Make this the only session that measures here.

        Raises:
            Problem: another one does.
        """
        if self._lock is not None:
            return
        os.makedirs(self.base, exist_ok=True)
        handle = open(os.path.join(self.base, "lock"), "a+")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read()[:300]
            handle.close()
            raise Problem("busy", holder=holder) from None
        handle.seek(0)
        handle.truncate()
        with contextlib.suppress(OSError):  # who holds it is a courtesy: a full disk must not hide behind it
            handle.write(f"since {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}")
            handle.flush()
        self._lock = handle
        self._lock_machine()

    def _lock_machine(self) -> None:
        """Sessions of two users would disturb each other as well. Where there is no shared folder, each has his own lock."""
        path = os.path.join(tempfile.gettempdir(), "edgekd.lock")
        flags = os.O_RDONLY | os.O_NOFOLLOW  # to lock a file it need not be ours, and others may not create it over
        try:
            with contextlib.suppress(FileExistsError):
                handle = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
                os.fchmod(handle, 0o644)
                os.close(handle)
            handle = os.open(path, flags)
        except OSError:
            return
        self._machine_lock = handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem("busy", holder="another user") from None
        except OSError:
            return  # no locks on this file system

    def push(self, request: dict[str, Any]) -> dict[str, Any]:
        """Receive a bundle; it appears complete and verified, or not at all."""
        self.lock()
        final = self.bundle(request["sha256"])
        root = os.path.dirname(final)
        os.makedirs(root, exist_ok=True)
        for name in os.listdir(root):  # what a cut connection left, which the lock says nobody is writing
            if name.startswith(".incoming-"):
                shutil.rmtree(os.path.join(root, name), ignore_errors=True)
        folder = tempfile.mkdtemp(prefix=".incoming-", dir=root)
        try:
            for entry in request["files"]:
                self._receive(folder, entry)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(folder, final)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._prune(root, final)
        return {"folder": final}

    def _receive(self, folder: str, entry: dict[str, Any]) -> None:
        path = os.path.normpath(os.path.join(folder, entry["path"]))
        if not path.startswith(folder + os.sep):
            raise Problem("system", message="a file outside of the bundle")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        digest, left = hashlib.sha256(), entry["size"]
        with open(path, "wb") as stream:
            while left:
                block = self.source.read(min(left, 1 << 20))
                if not block:
                    raise Problem("cut")
                stream.write(block)
                digest.update(block)
                left -= len(block)
            stream.flush()
            os.fsync(stream.fileno())
        if digest.hexdigest() != entry["sha256"]:
            raise Problem("system", message="a file arrived changed")

    def _prune(self, root: str, keep: str) -> None:
        """Only the latest few bundles stay: devices are small."""
        folders = [os.path.join(root, name) for name in os.listdir(root) if not name.startswith(".")]
        for folder in sorted(folders, key=os.path.getmtime, reverse=True)[KEPT_BUNDLES:]:
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run a bundle's bench.py under a time limit, passing on what it prints; answers with its result."""
        self.lock()
        folder = self.bundle(request["sha256"])
        work = tempfile.mkdtemp(prefix="run-", dir=self.base)
        out = os.path.join(work, "result.json")
        command = [sys.executable, "-B", os.path.join(folder, "bench.py"), *request["arguments"], "--out", out]
        command += ["--cache", os.path.join(self.base, "engines")]
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=work,
                env=dict(os.environ, PYTHONUNBUFFERED="1"),
                start_new_session=True,
            )
            try:
                tail, ended = self._follow(child, request["limit_s"])
            finally:
                _kill(child)
            if ended is not None:
                raise Problem(ended, tail=tail, limit_s=request["limit_s"])
            result = None
            with contextlib.suppress(OSError, ValueError), open(out, "rb") as stream:
                result = json.loads(stream.read().decode())
            return {"rc": child.returncode, "tail": tail, "result": result}
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _follow(self, child: subprocess.Popen[bytes], limit_s: float) -> tuple[list[str], str | None]:
        """(last lines, why it was ended or None) of a child that runs until it ends, its limit, or the connection's end."""
        events: queue.Queue[tuple[str, str]] = queue.Queue()
        threading.Thread(target=_read_lines, args=(child.stdout, events), daemon=True).start()
        threading.Thread(target=_await_end, args=(self.source, events), daemon=True).start()
        deadline = time.monotonic() + limit_s
        tail: list[str] = []
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return tail, "limit"
            try:
                kind, text = events.get(timeout=min(left, 10.0))
            except queue.Empty:
                self.say(event="alive")  # fails, and so ends this, where nobody listens any more
                continue
            if kind == "gone":
                return tail, "cut"
            if kind == "end":
                child.wait()
                return tail, None
            tail = [*tail, text][-TAIL_LINES:]
            self.say(event="line", text=text)


def _code_of(number: int | None) -> str:
    """What a failed call means to the other end."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "disk"
    return "refused" if number in (errno.EACCES, errno.EPERM, errno.EROFS) else "system"


def _read_lines(stream: IO[bytes], events: queue.Queue[tuple[str, str]]) -> None:
    for line in stream:
        events.put(("line", line.decode("utf-8", "replace").rstrip("\n")))
    events.put(("end", ""))


def _await_end(source: IO[bytes], events: queue.Queue[tuple[str, str]]) -> None:
    with contextlib.suppress(OSError, ValueError):
        while source.read(1):  # nothing is asked while something runs
            pass
    events.put(("gone", ""))


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a child and all that it started."""
    for how, wait_s in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
        with contextlib.suppress(OSError):
            os.killpg(child.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(wait_s)
            return


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _stop(*_: object) -> None:
    raise SystemExit(1)


def main() -> None:
    """Serve on stdin and stdout."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        Agent(sys.stdin.buffer, sys.stdout.buffer).serve()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # an ordinary exit would wait for the thread that still reads stdin


if __name__ == "__main__":
    main()
