"""`edgekd bench --target` against a real sshd: what works, and every way in which a device can fail."""

from __future__ import annotations

import errno
import fcntl
import getpass
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from edgekd.bench.entries import BenchArtifact
from edgekd.cli import app
from edgekd.device import target as target_module
from edgekd.device.bundle import Bundle, make_bundle
from edgekd.device.target import Target, bench_on_target, parse_target
from edgekd.errors import ArtifactError, RuntimeFailure, UserError
from edgekd.export import ExportData
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, make_dataset, write_detector
from tests.sshd import Sshd, running_sshd

QUICK = ["--provider", "cpu", "--threads", "1", "--samples", "20", "--seconds", "0", "--warmup", "0"]
HOSTILE = "a; touch PWNED; $(touch PWNED2) `touch PWNED3` 'q' \"d\" -oProxyCommand=x\n&.onnx"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("target")
    data = ExportData(val=make_dataset(folder / "data", images=3))
    source = write_detector(folder / "models" / HOSTILE, GOOD_BOXES, GOOD_SCORES)
    return make_bundle([BenchArtifact(source, HOSTILE)], folder / "bundle", data=data)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        # A login script that prints must not get in the way.
        (server.home / ".bashrc").write_text("echo welcome to this device\n", encoding="utf-8")
        yield server


def at(server: Sshd, **changes: object) -> Target:
    known = {"host": "127.0.0.1", "user": getpass.getuser(), "port": server.port, "python": sys.executable}
    return Target(**{**known, "ssh_config": server.config, **changes})  # type: ignore[arg-type]


def test_pushes_runs_and_brings_back_the_result(sshd: Sshd, bundle: Bundle) -> None:
    said: list[str] = []
    result = bench_on_target(bundle.folder, at(sshd), arguments=QUICK, say=said.append)
    assert result["bundle"] == bundle.sha256
    assert result["rows"][0]["latency_ms"]["samples"] >= 20
    assert result["target"]["python"] == sys.version.split()[0]
    assert any(line.startswith("pushing") for line in said)
    assert any("golden outputs" in line for line in said), "the device's own lines are passed on"
    assert (sshd.home / ".cache/edgekd/bundles" / bundle.sha256 / "bench.py").is_file()
    assert not list(sshd.home.rglob("run-*")), "nothing of the run is left behind"
    said.clear()
    bench_on_target(bundle.folder, at(sshd), arguments=QUICK, say=said.append)
    assert "the bundle is there already" in said


def test_no_name_reaches_a_shell(sshd: Sshd, bundle: Bundle) -> None:
    result = bench_on_target(bundle.folder, at(sshd), arguments=QUICK)
    assert result["rows"][0]["name"] == HOSTILE
    assert not [path for path in sshd.home.rglob("*") if path.name.startswith("PWNED")]
    assert not list(Path.home().glob("PWNED*"))
    assert not list(Path.cwd().glob("PWNED*"))


def test_a_damaged_copy_is_pushed_again(sshd: Sshd, bundle: Bundle) -> None:
    bench_on_target(bundle.folder, at(sshd), arguments=QUICK)
    (sshd.home / ".cache/edgekd/bundles" / bundle.sha256 / "golden.npz").write_bytes(b"x")
    said: list[str] = []
    bench_on_target(bundle.folder, at(sshd), arguments=QUICK, say=said.append)
    assert any(line.startswith("pushing") for line in said)


def test_command_line(sshd: Sshd, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    url = f"ssh://{getpass.getuser()}@127.0.0.1:{sshd.port}"
    options = ["--target-python", sys.executable, "--ssh-config", sshd.config, "--samples", 20, "--seconds", 0]
    command = ["bench", bundle.folder, "--target", url, "--out", out, "--threads", 1, "--warmup", 0, *options, "-q"]
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text(encoding="utf-8"))["bundle"] == bundle.sha256


def test_a_bundle_is_measured_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    command = ["bench", bundle.folder, "--target", "ssh://nowhere", "--precision", "int8", "--out", tmp_path / "r.json"]
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 2
    assert "--precision does nothing here" in done.stderr


def test_unknown_host(sshd: Sshd, bundle: Bundle, tmp_path: Path) -> None:
    config = tmp_path / "config"
    text = sshd.config.read_text(encoding="utf-8").replace(str(sshd.known_hosts), str(tmp_path / "none"))
    config.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="does not know this host"):
        bench_on_target(bundle.folder, at(sshd, ssh_config=config))
    assert not (tmp_path / "none").exists(), "the host must not be trusted in passing"


def test_changed_host_key(sshd: Sshd, bundle: Bundle, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    kind, key = (tmp_path / "other.pub").read_text(encoding="utf-8").split()[:2]
    (tmp_path / "known").write_text(f"[127.0.0.1]:{sshd.port} {kind} {key}\n", encoding="utf-8")
    text = sshd.config.read_text(encoding="utf-8").replace(str(sshd.known_hosts), str(tmp_path / "known"))
    (tmp_path / "config").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="not the one that ssh knows"):
        bench_on_target(bundle.folder, at(sshd, ssh_config=tmp_path / "config"))


def test_permission_denied(sshd: Sshd, bundle: Bundle, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    text = sshd.config.read_text(encoding="utf-8").replace(str(sshd.folder / "id"), str(tmp_path / "other"))
    (tmp_path / "config").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="ssh-copy-id"):
        bench_on_target(bundle.folder, at(sshd, ssh_config=tmp_path / "config"))


def test_nothing_listens(sshd: Sshd, bundle: Bundle) -> None:
    with pytest.raises(UserError, match="nothing answers on this port"):
        bench_on_target(bundle.folder, at(sshd, port=1))


def test_no_python(sshd: Sshd, bundle: Bundle) -> None:
    with pytest.raises(UserError, match="no Python there"):
        bench_on_target(bundle.folder, at(sshd, python="python3.999"))


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        (
            "echo This account is not available.; exit 1",
            UserError,
            "Python did not start there.*account is not available",
        ),
        ("/nowhere/setup; exit 3", UserError, "Python did not start there.*/nowhere/setup"),
        ("not_there; kill -9 $PPID", RuntimeFailure, "connection was cut"),
        (r"printf '\036edgekd [1]\n\036edgekd {\n'; exit 1", UserError, "did not start"),
    ],
)
def test_logins_that_start_nothing(
    tmp_path: Path, bundle: Bundle, script: str, error: type[Exception], words: str
) -> None:
    with running_sshd(tmp_path / "sshd") as server:
        (server.home / ".bashrc").write_text(script + "\n", encoding="utf-8")
        with pytest.raises(error, match="(?s)" + words):
            bench_on_target(bundle.folder, at(server))


def test_a_home_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edgekd.device.agent import MARK, Agent
    from edgekd.device.target_errors import agent_problem

    def refuse(path: str, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr("os.makedirs", refuse)
    sink = io.BytesIO()
    Agent(io.BytesIO(b'{"do": "push", "sha256": "", "files": []}\n'), sink).serve()
    problem = agent_problem("me@board", json.loads(sink.getvalue().decode().removeprefix(MARK)))
    assert isinstance(problem, UserError)
    assert "Read-only file system" in problem.what
    assert ".cache/edgekd" in str(problem.fix)


@pytest.mark.parametrize(
    ("missing", "message"),
    [(["numpy"], "NumPy is missing"), (["onnxruntime", "tensorrt"], "neither TensorRT nor ONNX Runtime")],
)
def test_lacking_packages(tmp_path: Path, bundle: Bundle, missing: list[str], message: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in missing:
        (broken / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n", encoding="utf-8")
    with (
        running_sshd(tmp_path / "sshd", {"PYTHONPATH": str(broken)}) as server,
        pytest.raises(UserError, match=message) as caught,
    ):
        bench_on_target(bundle.folder, at(server))
    assert "pip install" in str(caught.value)
    assert not (server.home / ".cache").exists(), "nothing is pushed to a device that cannot run it"


@pytest.mark.parametrize("preflight", [True, False])
def test_full_disk(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, preflight: bool) -> None:
    with running_sshd(tmp_path / "sshd") as server:
        small = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(server.home)], capture_output=True
        )
        if small.returncode != 0:
            pytest.skip("a small file system cannot be mounted here")
        try:
            if not preflight:  # as if it filled up on the way
                monkeypatch.setattr(target_module, "_RESERVE", -(1 << 40))
            with pytest.raises(UserError, match="its disk is full") as caught:
                bench_on_target(bundle.folder, at(server))
            assert ("expected" in str(caught.value)) == preflight
            assert not list(server.home.rglob("*.onnx")), "half a bundle is not left on a full disk"
        finally:
            subprocess.run(["umount", str(server.home)], check=True)


def _children_of_bundle(server: Sshd) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(server.home) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_cut_connection(tmp_path: Path, bundle: Bundle) -> None:
    with running_sshd(tmp_path / "sshd") as server:
        running = threading.Event()

        def say(text: str) -> None:
            if "timing" in text:
                running.set()

        def cut() -> None:
            running.wait(60)
            server.cut()

        threading.Thread(target=cut, daemon=True).start()
        with pytest.raises(RuntimeFailure, match="connection was cut"):
            bench_on_target(bundle.folder, at(server), arguments=[*QUICK[:-4], "--seconds", "60"], say=say)
        assert running.is_set()
        until = time.monotonic() + 4  # before its next line would find nobody listening
        while _children_of_bundle(server) and time.monotonic() < until:
            time.sleep(0.1)
        assert not _children_of_bundle(server), "what ran on the device ends with the connection"
        result = bench_on_target(bundle.folder, at(server), arguments=QUICK)  # and the lock is free again
        assert result["rows"]


def test_time_limit(sshd: Sshd, bundle: Bundle) -> None:
    with pytest.raises(RuntimeFailure, match="not done within 2 s"):
        bench_on_target(bundle.folder, at(sshd), arguments=[*QUICK[:-4], "--seconds", "60"], limit_s=2)


def test_one_session_at_a_time(sshd: Sshd, bundle: Bundle) -> None:
    lock = sshd.home / ".cache/edgekd/lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w", encoding="utf-8") as held:
        held.write("since yesterday, process 7")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another session measures there") as caught:
            bench_on_target(bundle.folder, at(sshd), arguments=QUICK)
    assert "since yesterday, process 7" in str(caught.value)
    assert bench_on_target(bundle.folder, at(sshd), arguments=QUICK)["rows"]


def test_two_users_do_not_measure_at_once(sshd: Sshd, bundle: Bundle) -> None:
    """Each has his own home, and so his own lock; the machine has one as well."""
    with (sshd.folder / "tmp" / "edgekd.lock").open("w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another session measures there[\s\S]*another user"):
            bench_on_target(bundle.folder, at(sshd), arguments=QUICK)


def test_a_remote_command_of_the_users_configuration_is_not_run(sshd: Sshd, bundle: Bundle, tmp_path: Path) -> None:
    """ssh refuses to run ours beside it otherwise."""
    config = tmp_path / "ssh_config"
    config.write_text(sshd.config.read_text(encoding="utf-8") + "  RemoteCommand tmux attach\n", encoding="utf-8")
    assert bench_on_target(bundle.folder, at(sshd, ssh_config=config), arguments=QUICK)["rows"]


def test_packages_that_take_too_long_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.device import agent

    def slow(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 120)

    monkeypatch.setattr(agent.subprocess, "run", slow)
    sink = io.BytesIO()
    request = {"do": "probe", "sha256": "0" * 64}
    agent.Agent(io.BytesIO(json.dumps(request).encode() + b"\n"), sink).serve()
    assert "took more than 120 s" in json.loads(sink.getvalue().decode().split(agent.MARK)[1])["message"]


def test_a_failure_there_is_told_here(sshd: Sshd, bundle: Bundle) -> None:
    with pytest.raises(UserError, match="TensorRT cannot be imported"):
        bench_on_target(bundle.folder, at(sshd), arguments=["--provider", "tensorrt"])


def test_a_damaged_bundle_is_not_sent(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="not a bundle"):
        bench_on_target(tmp_path, Target("nowhere"))


@pytest.mark.parametrize(
    ("url", "host", "user", "port"),
    [
        ("ssh://nano", "nano", None, None),
        ("ssh://me@Orin.local:2222", "Orin.local", "me", 2222),
        ("ssh://me@192.168.0.7/", "192.168.0.7", "me", None),
        ("ssh://me@[fe80::1]:22", "fe80::1", "me", 22),
    ],
)
def test_targets_that_parse(url: str, host: str, user: str | None, port: int | None) -> None:
    found = parse_target(url)
    assert (found.host, found.user, found.port) == (host, user, port)
    command = found.command()
    assert command[command.index("--") + 1] == found.name
    assert "BatchMode=yes" in command
    assert not any("StrictHostKeyChecking" in part for part in command), "hosts are the user's own ssh's business"


@pytest.mark.parametrize(
    "url",
    [
        "nano",
        "http://nano",
        "ssh://",
        "ssh://me:secret@nano",
        "ssh://nano/path",
        "ssh://nano:port",
        "ssh://-oProxyCommand=touch",
        "ssh://me@-oProxyCommand=x",
        "ssh://-l@nano",
        "ssh://me;id@nano",
        "ssh://na$(id)no",
        "ssh://na no",
    ],
)
def test_targets_that_do_not(url: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_target(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("python", ["python3; id", "$(id)", "-c", "a b", "", "~root/python\n"])
def test_a_python_that_is_no_path(python: str) -> None:
    with pytest.raises(UserError, match="passed on safely"):
        Target("nano", python=python)
