"""Files that are written whole or not at all, and what is told where the system refuses them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekd.artifact import atomic_path
from edgekd.errors import EdgeKDError, UserError


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
