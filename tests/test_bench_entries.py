from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.bench.entries import BenchArtifact, BenchEnsemble, check_entries, parse_artifact_argument
from edgekd.errors import UserError


@pytest.mark.parametrize(
    ("text", "path", "name", "role"),
    [
        ("student.onnx", "student.onnx", "student", "student"),
        ("runs/vgg16/best.pt", "runs/vgg16/best.pt", "vgg16", "student"),
        ("runs/vgg16", "runs/vgg16", "vgg16", "student"),
        ("kd=out/s.onnx", "out/s.onnx", "kd", "student"),
        ("teacher:out/s.onnx", "out/s.onnx", "s", "teacher"),
        ("teacher:big one=a/b.onnx", "a/b.onnx", "big one", "teacher"),
        ("distilled:kd=a/b.onnx", "a/b.onnx", "kd", "student_distilled"),
        ("student_distilled:kd=a/b.onnx", "a/b.onnx", "kd", "student_distilled"),
        ("teacher:v=a/x=y.onnx", "a/x=y.onnx", "v", "teacher"),
        ("a/x=y.onnx", "a/x=y.onnx", "x=y", "student"),
    ],
)
def test_arguments(text: str, path: str, name: str, role: str) -> None:
    assert parse_artifact_argument(text) == BenchArtifact(Path(path), name, role)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "master:a.onnx"])
def test_wrong_arguments(text: str) -> None:
    with pytest.raises(UserError, match="ROLE"):
        parse_artifact_argument(text)


def test_an_existing_file_is_never_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd=name.onnx").touch()
    assert parse_artifact_argument("odd=name.onnx").path == Path("odd=name.onnx")


A, B = BenchArtifact(Path("a"), "a", "teacher"), BenchArtifact(Path("b"), "b", "teacher")


@pytest.mark.parametrize(
    ("artifacts", "ensemble", "message"),
    [
        ([], None, "nothing to measure"),
        ([A, A], None, "same name"),
        ([A, B], BenchEnsemble(("a", "b"), name="a"), "same name"),
        ([A, B], BenchEnsemble(("a", "c")), "no such members"),
        ([A, B], BenchEnsemble(()), "no such members"),
        ([A, B], BenchEnsemble(("a", "b"), weights=(1.0,)), "weights do not fit"),
    ],
)
def test_benchmarks_that_cannot_be(
    artifacts: list[BenchArtifact], ensemble: BenchEnsemble | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_entries(artifacts, ensemble)
