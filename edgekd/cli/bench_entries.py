"""What `edgekd bench` is given on its command line, as what is to be measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from edgekd.artifact import is_onnx
from edgekd.cli.artifacts import foreign_options, provider_of

if TYPE_CHECKING:
    from edgekd.bench.entries import BenchArtifact, BenchEnsemble
    from edgekd.recipe import BenchConfig
    from edgekd.types import Dataset


def declared(
    artifact: BenchArtifact, classes: str | None, output: str | None, input_size: int | None, declare: list[str] | None
) -> BenchArtifact:
    """The artefact with what the options declare of it, if it is an ONNX file."""
    from dataclasses import replace

    options = foreign_options(artifact.path, classes, output, input_size, declare)
    return artifact if options is None or not is_onnx(artifact.path) else replace(artifact, options=options)


def doubts(entries: list[BenchArtifact], dataset: Dataset, note: Callable[[str], None] = lambda _: None) -> list[str]:
    """Which foreign files seem to be fed pictures otherwise than they were trained; files that say it themselves never do.

    Args:
        entries: what is to be measured. dataset: labelled.
        note: is told what was recognised or guessed of each, and of our own what a tool has changed.
    """
    from edgekd.predictor import load_predictor
    from edgekd.teacher_check import examine

    found = []
    for entry in {entry.path: entry for entry in reversed(entries) if is_onnx(entry.path)}.values():
        with load_predictor(entry.path, options=entry.options) as predictor:
            for taken in predictor.taken_for_granted():
                note(f"{entry.name}: {taken}")
            if predictor.facts.get("model") is not None:
                continue
            mapped = predictor.with_classes(dataset.class_names, entry.class_map)
            knows = [True] * len(dataset.class_names) if mapped.class_map is None else mapped.class_map.known.tolist()
            outcome = examine(dataset, entry.name, mapped, knows)
            if outcome["doubtful"]:
                found.append(outcome["says"])
    return found


def with_graphs(artifacts: list[BenchArtifact]) -> list[BenchArtifact]:
    """Each engine followed by itself with its work captured as a CUDA graph.

    Raises:
        UserError: there is no engine.
    """
    from dataclasses import replace

    from edgekd.errors import UserError
    from edgekd.runtimes.engine_file import ENGINE_SUFFIXES

    found = []
    for artifact in artifacts:
        found.append(artifact)
        if artifact.path.suffix.lower() in ENGINE_SUFFIXES:
            found.append(replace(artifact, name=f"{artifact.name}+graph", cuda_graph=True))
    if len(found) == len(artifacts):
        raise UserError("--cuda-graph is for engines", got="none", fix="export one with --format engine")
    return found


def on_runtimes(
    artifacts: list[BenchArtifact], runtimes: list[Literal["onnxruntime", "openvino"]]
) -> list[BenchArtifact]:
    """Each ONNX file on each of the runtimes; the first keeps its name.

    Raises:
        UserError: there is no ONNX file.
    """
    from dataclasses import replace

    from edgekd.errors import UserError

    found = []
    for artifact in artifacts:
        if not is_onnx(artifact.path):
            found.append(artifact)
            continue
        for position, runtime in enumerate(dict.fromkeys(runtimes)):
            name = f"{artifact.name}+{runtime}" if position else artifact.name
            found.append(replace(artifact, name=name, runtime=runtime))
    if all(artifact.runtime == "auto" for artifact in found):
        raise UserError("--runtime is for ONNX files", got="none", fix="write one with `edgekd export`")
    return found


def bench_config(**values: Any) -> BenchConfig:
    """The benchmark's settings.

    Raises:
        RecipeError: one is out of range.
    """
    from pydantic import ValidationError

    from edgekd.recipe import BenchConfig
    from edgekd.recipe_problems import option_problem

    try:
        return BenchConfig(**values)
    except ValidationError as error:
        raise option_problem(error, score_threshold="score", nms_iou="iou", warmup_seconds="warmup") from error


def asked_ensemble(artifacts: list[BenchArtifact], asked: bool | None) -> BenchEnsemble | None:
    """All teachers as one system (each once): when asked for, and unasked where there are several.

    Raises:
        UserError: asked for without teachers.
    """
    from edgekd.bench.entries import BenchEnsemble
    from edgekd.errors import UserError

    teachers = [artifact for artifact in artifacts if artifact.role == "teacher" and not artifact.cuda_graph]
    names = tuple(teacher.name for teacher in teachers if teacher.runtime == teachers[0].runtime)
    if asked and not names:
        raise UserError("an ensemble needs teachers", got="none", fix="name their role: teacher:PATH")
    return BenchEnsemble(names) if (len(names) > 1 if asked is None else asked) else None


def one_provider(artifacts: list[BenchArtifact], device: str | None) -> str | None:
    """ONNX Runtime's provider or torch's device for all, by `--device`; None for the files' own."""
    providers = {provider_of(artifact.path, device) for artifact in artifacts}
    return providers.pop() if len(providers) == 1 else (device or "").partition(":")[0] or None
