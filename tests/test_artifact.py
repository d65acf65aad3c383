"""Files that are written whole or not at all, and what is told where the system refuses them."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from edgekd.artifact import atomic_folder, atomic_path, require_file
from edgekd.checkpoint import checkpoint_facts, load_detector, read_payload
from edgekd.errors import ArtifactError, EdgeKDError, UserError


@pytest.mark.parametrize(("number", "kind"), [(13, UserError), (30, UserError), (28, EdgeKDError)])
def test_a_place_that_refuses_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[EdgeKDError]
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, "refused", str(tmp_path / ".model.x1.pt"))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(kind, match=r"/model\.pt cannot be written") as caught, atomic_path(tmp_path / "model.pt"):
        pass
    assert type(caught.value) is kind
    assert caught.value.fix is not None


def test_long_work_is_told_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match="Permission denied"):
        require_file(tmp_path / "new" / "result.json")
    (tmp_path / "open").mkdir()
    require_file(tmp_path / "open" / "result.json")


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space left on device")])
def test_a_disk_that_is_full_is_named_whatever_the_writer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    message = r"model\.pt cannot be written\n  got:      No space left"
    with pytest.raises(EdgeKDError, match=message), atomic_path(tmp_path / "model.pt"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_with_room_left_a_writer_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), atomic_path(tmp_path / "model.pt"):
        raise RuntimeError("a bug")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "model.pt"):
        (tmp_path / "input").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "big.onnx").write_bytes(b"\x08\x08:\x9c\xa3")
    with pytest.raises(ArtifactError, match="teacher's `onnx`"):
        load_detector(tmp_path / "big.onnx")


def test_a_changed_weight_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"schema": "edgekd.detector/1", "weights": {"w": torch.full((64,), 3.0)}}, path)
    assert read_payload(path, "edgekd.detector/1")
    data = bytearray(path.read_bytes())
    data[data.index(b"\0\0\x40\x40" * 64) + 99] ^= 8
    path.write_bytes(data)
    assert torch.load(path)["weights"]["w"][24] != 3  # torch has nothing to say
    with pytest.raises(ArtifactError, match="damaged or cut-off"):
        read_payload(path, "edgekd.detector/1")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("content", "found", "fix"),
    [
        ("module", "Python objects", "export that detector to ONNX"),
        ("pickle", "Python objects", "export that detector to ONNX"),
        ("half", "damaged or cut-off", "download it again"),
        (b"", "an empty file", "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer", "git lfs pull"),
        (b"<html>404</html>", "it begins with b'<html>404", None),
    ],
)
def test_checkpoints_of_others_are_named_for_what_they_are(
    tmp_path: Path, content: str | bytes, found: str, fix: str | None
) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(torch.nn.Conv2d(3, 3, 1), path)  # saved whole, as Ultralytics saves its own
    if content == "pickle":
        content = pickle.dumps(Path("x"), protocol=4)
    if content == "half":
        content = path.read_bytes()[:300]
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a readable checkpoint") as caught:
        load_detector(path)
    assert found in str(caught.value.got)
    assert "weights_only" not in str(caught.value)
    assert caught.value.fix is None if fix is None else fix in str(caught.value.fix)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"spec": None}, "damaged"),
        ({"weights": None}, "damaged"),
        ({"weights": [1]}, "damaged"),
        ({"spec": {"model": "yolo-huge"}}, "unknown model"),
        ({"spec": {"options": {"foo": 1}}}, "options of model 'yolo-nano' are wrong"),
        ({"weights": {}}, "do not fit"),
    ],
)
def test_a_checkpoint_of_another_version_is_named(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    pre = {"input_hw": [64, 64], "resize": "stretch", "mean": [0.5] * 3, "std": [0.5] * 3, "pad_value": 114}
    spec = {"model": "yolo-nano", "class_names": ["a"], "preprocess": pre, "width": 1.0, "options": {}}
    payload = {"schema": "edgekd.detector/1", "spec": spec, "weights": {}, "facts": {}, **changes}
    if isinstance(payload["spec"], dict):
        payload["spec"] = {**spec, **payload["spec"]}
    path = tmp_path / "teacher.pt"
    torch.save({key: value for key, value in payload.items() if value is not None}, path)
    with pytest.raises(ArtifactError, match=rf"teacher\.pt: .*{found}"):
        load_detector(path)


def test_a_checkpoint_without_facts_is_named(tmp_path: Path) -> None:
    torch.save({"schema": "edgekd.detector/1"}, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match=r"model\.pt: damaged"):
        checkpoint_facts(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("ultralytics.nn.tasks", "`yolo export model='{}' format=onnx` exports it"),
        ("models.yolo", "`python export.py --weights '{}' --include onnx` exports it"),
        ("somebody.net", None),
    ],
)
def test_a_pickled_detector_is_named_with_the_command_that_exports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, command: str | None
) -> None:
    parts = package.split(".")
    for name in (".".join(parts[: n + 1]) for n in range(len(parts))):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kind = type("Detector", (torch.nn.Conv2d,), {"__module__": package})
    sys.modules[package].Detector = kind  # type: ignore[attr-defined]
    path = tmp_path / "my best.pt"
    torch.save({"epoch": 3, "model": kind(3, 3, 1)}, path)
    with pytest.raises(ArtifactError, match=f"{package}.Detector") as caught:
        load_detector(path)
    fix = str(caught.value.fix)
    assert fix.startswith("export that detector to ONNX")
    assert fix.endswith("exports it") == (command is not None)
    assert command is None or command.format(path) in fix


def test_a_folder_that_can_never_be_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file/x", Path("/proc/edgekd")):  # some folders take none, whoever asks
        with pytest.raises(UserError, match="cannot be written"), atomic_folder(place):
            pass


def test_what_a_killed_process_has_left_of_a_folder_is_removed(tmp_path: Path) -> None:
    """A copy of a data set may be many GB; of one that still writes, nothing is touched, nor of the user's own folders."""
    code = "import os, sys, pathlib; from edgekd.artifact import atomic_folder\n"
    code += "with atomic_folder(pathlib.Path(sys.argv[1])) as folder: (folder / 'a').touch(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".out.original").mkdir()
    with atomic_folder(tmp_path / "out") as first:
        with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "out"):
            raise OSError("full")
        assert first.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.original"}
