"""A real sshd on loopback, in a directory of its own, for tests of what drives the system's ssh."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


@dataclass
class Sshd:
    """A running server and what a client needs to reach it.

    Attributes:
        home: what sessions take for their home. config: for `ssh -F`, with key and known hosts.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    home: Path
    port: int

    @property
    def config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def cut(self) -> None:
        """End every session at once, as a pulled cable would, and leave the server up."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("sshd"):
                    child.kill()


def _keygen(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_name(path.name + ".pub").read_text(encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            pytest.skip(f"sshd does not start here: {log.read_text(encoding='utf-8').strip()[-300:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    pytest.skip("sshd does not answer here")


@contextlib.contextmanager
def running_sshd(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Sshd]:
    """A server whose sessions have `folder`/home for their home and this environment on top; skips where there is none."""
    binary = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if binary is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("OpenSSH is absent: apt-get install openssh-server openssh-client")
    if os.geteuid() == 0:  # sshd's own requirement, where root runs it
        with contextlib.suppress(OSError):
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    home, port, log = folder / "home", _free_port(), folder / "sshd.log"
    for place in (home, folder / "tmp"):  # sessions of other tests on this machine must not be in the way
        place.mkdir(exist_ok=True)
    host_key = _keygen(folder / "host_key")
    (folder / "authorized_keys").write_text(_keygen(folder / "id"), encoding="utf-8")
    settings = {"HOME": str(home), "TMPDIR": str(folder / "tmp"), **(environment or {})}
    variables = " ".join(f'"{name}={value}"' for name, value in settings.items())
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host_key'}\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {folder / 'authorized_keys'}\nPasswordAuthentication no\n"
        f"KbdInteractiveAuthentication no\nUsePAM no\nPermitRootLogin prohibit-password\nSetEnv {variables}\n",
        encoding="utf-8",
    )
    kind, key = host_key.split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n", encoding="utf-8")
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder / 'id'}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {folder / 'known_hosts'}\n  GlobalKnownHostsFile none\n",
        encoding="utf-8",
    )
    with log.open("wb") as stream:
        process = subprocess.Popen([binary, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=stream)
    try:
        _await(port, process, log)
        yield Sshd(process, folder, home, port)
    finally:
        process.terminate()
        process.wait(10)
