"""What is to be measured: artefacts with names and roles, and how they are written on the command line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from edgekd.errors import UserError
from edgekd.predictor import RuntimeChoice
from edgekd.recipe import EnsembleConfig, OnnxTeacher

Role = Literal["teacher", "ensemble", "student", "student_distilled", "baseline"]
ArtifactRole = Literal["teacher", "student", "student_distilled", "baseline"]
"""A baseline is an earlier artefact, measured again beside what is to replace it."""

_SHORT_ROLES: dict[str, ArtifactRole] = {
    **{role: role for role in get_args(ArtifactRole)},
    "distilled": "student_distilled",
}
_GENERIC_STEMS = {"best", "last", "model"}
_ARGUMENT = re.compile(r"(?:(?P<role>[a-z_]+):)?(?:(?P<name>[^=/]+)=)?(?P<path>.+)", re.DOTALL)


@dataclass(frozen=True)
class BenchArtifact:
    """One artefact of a benchmark.

    Attributes:
        path: an ONNX file, a checkpoint or a run folder.
        name: how tables call it; unique within a benchmark.
        role: what it is in the comparison.
        options: how to read a black box, as a recipe's teacher says it; None if the file says it all.
        class_map: its classes onto the data set's, by name if left out (those of `options` come first).
        cuda_graph: engines only: launch an inference as one CUDA graph.
        runtime: what runs it; "auto" goes by what the file is.
    """

    path: Path
    name: str
    role: ArtifactRole = "student"
    options: OnnxTeacher | None = None
    class_map: dict[str, str] | None = None
    cuda_graph: bool = False
    runtime: RuntimeChoice = "auto"


@dataclass(frozen=True)
class BenchEnsemble:
    """Several of the artefacts measured as one deployed system: every member on every image, then fusion.

    Attributes:
        members: names among the artefacts.
        config: how their answers are fused.
        weights: one a member; equal if left out.
        name: how tables call it.
    """

    members: tuple[str, ...]
    config: EnsembleConfig = field(default_factory=EnsembleConfig)
    weights: tuple[float, ...] | None = None
    name: str = "ensemble"


def parse_artifact_argument(text: str) -> BenchArtifact:
    """Read `[ROLE:][NAME=]PATH`, such as `best.onnx`, `teacher:vgg16=runs/vgg16`, `distilled:kd=student.onnx`.

    The role is teacher, student (if left out) or student_distilled (or distilled). The name, if left out, is the
    file's or folder's, and for files that are all called alike (`best.pt`) that of the folder around them.

    Raises:
        UserError: an unknown role, or nothing where the path should be.
    """
    if text and Path(text).exists():
        return BenchArtifact(Path(text), _name_of(Path(text)))
    match = _ARGUMENT.fullmatch(text)
    if match is None:
        raise UserError("an artefact is missing", got=repr(text), expected="[ROLE:][NAME=]PATH")
    role, name, path = match["role"], match["name"], Path(match["path"])
    if role is not None and role not in _SHORT_ROLES:
        raise UserError(
            f"unknown role in {text!r}",
            got=role,
            expected="one of " + ", ".join(_SHORT_ROLES),
            fix="[ROLE:][NAME=]PATH",
        )
    return BenchArtifact(path, name or _name_of(path), _SHORT_ROLES[role or "student"])


def _name_of(path: Path) -> str:
    stem = path.stem if path.suffix.lower() in (".onnx", ".pt", ".pth", ".engine") else path.name
    return path.resolve().parent.name if stem in _GENERIC_STEMS else stem or path.resolve().name


def check_entries(artifacts: Sequence[BenchArtifact], ensemble: BenchEnsemble | None) -> None:
    """Refuse a benchmark that could not be told apart or put together.

    Raises:
        UserError: no artefacts, a name twice, or an ensemble of unknown members or odd weights.
    """
    if not artifacts:
        raise UserError("there is nothing to measure", expected="at least one artefact")
    names = [artifact.name for artifact in artifacts] + ([ensemble.name] if ensemble else [])
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise UserError(
            "two artefacts have the same name",
            got=", ".join(twice),
            fix="name them: teacher:first=a.onnx second=b.onnx",
        )
    if ensemble is None:
        return
    unknown = [member for member in ensemble.members if member not in names]
    if unknown or not ensemble.members:
        raise UserError(
            f"{ensemble.name}: no such members",
            got=", ".join(unknown) or "none",
            expected="names among " + ", ".join(names[:-1]),
        )
    if ensemble.weights is not None and len(ensemble.weights) != len(ensemble.members):
        raise UserError(
            f"{ensemble.name}: weights do not fit its members",
            got=f"{len(ensemble.weights)} weights",
            expected=f"{len(ensemble.members)}, one a member",
        )
