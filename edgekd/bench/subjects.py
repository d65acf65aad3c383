"""Artefacts opened for measuring: each as a deployed detector in the data set's classes, and their ensembles."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.bench.complexity import ArtifactFacts, describe_artifact
from edgekd.bench.entries import BenchArtifact, BenchEnsemble, Role
from edgekd.bench.result import together
from edgekd.bench.systems import Member, Parallel, Staged, System, ensemble_of
from edgekd.predictor import Predictor, load_predictor
from edgekd.recipe import BenchConfig, OnnxTeacher
from edgekd.types import Dataset


@dataclass
class Subject:
    """One row while it is being measured.

    Attributes:
        members: one detector, or those of an ensemble. loads: what `load_predictor` is given for each.
        threads: of one inference of each member.
        execution: how an ensemble's members run; None for a detector.
        shares_outputs: an ensemble that works on what its members compute by themselves.
    """

    name: str
    role: Role
    artifact: str
    system: System
    members: tuple[Member, ...]
    facts: ArtifactFacts
    loads: list[dict[str, Any]]
    threads: int
    execution: str | None = None
    shares_outputs: bool = False


class Opener:
    """Opens artefacts and ensembles over one data set; `stack` closes what was opened.

    Args:
        threads: of the whole machine that a system may use.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: BenchConfig,
        threads: int,
        provider: str | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self._dataset, self._config, self._threads, self._stack = dataset, config, threads, stack
        self._provider = provider

    def detector(self, artifact: BenchArtifact) -> Subject:
        """An artefact, answering in the data set's classes."""
        options = None if artifact.options is None else artifact.options.model_dump(mode="json")
        load = {
            "path": str(artifact.path.resolve()),
            "runtime": artifact.runtime,
            "provider": self._provider,
            "threads": self._threads,
            "score_threshold": self._config.score_threshold,
            "nms_iou": self._config.nms_iou,
            "max_detections": self._config.max_detections,
            "box_voting": self._config.box_voting,
            "cuda_graph": artifact.cuda_graph,
            "options": options,
        }
        class_map = (artifact.options.class_map if artifact.options is not None else None) or artifact.class_map
        # Messages name the path as it was given.
        member = self._member(artifact.name, {**load, "path": str(artifact.path)}, class_map)
        return Subject(
            artifact.name,
            artifact.role,
            _shown_path(artifact.path),
            System(self._deployed(member), [member.predictor.runtime]),
            (member,),
            describe_artifact(artifact.path, member.predictor.preprocess.input_hw),
            [load],
            self._threads,
        )

    def ensembles(self, ensemble: BenchEnsemble, subjects: Sequence[Subject]) -> list[Subject]:
        """The ensemble with its members one after the other, at the same time, or both, as the settings say.

        At the same time, members share the machine's threads, as they would on a device; with one thread there is
        nothing to share, and outputs that are averaged are computed in sequence.
        """
        by_name = {subject.name: subject for subject in subjects}
        chosen = [by_name[name] for name in ensemble.members]
        averaged = ensemble.config.fusion == "mean-outputs"
        wanted = self._config.ensemble
        can_share = self._threads > 1 and len(chosen) > 1 and not averaged
        found = []
        if wanted != "parallel" or not can_share:
            members = tuple(member for subject in chosen for member in subject.members)
            found.append(self._together(ensemble, ensemble.name, "sequential", members, chosen, self._threads))
        if wanted != "sequential" and can_share:
            each = max(1, self._threads // len(chosen))
            copies = tuple(self.copies(subject, each)[0] for subject in chosen)
            name = ensemble.name if wanted == "parallel" else f"{ensemble.name}-parallel"
            found.append(self._together(ensemble, name, "parallel", copies, chosen, each))
        return found

    def _together(
        self,
        ensemble: BenchEnsemble,
        name: str,
        execution: str,
        members: tuple[Member, ...],
        chosen: Sequence[Subject],
        threads: int,
    ) -> Subject:
        fused = ensemble_of(ensemble, members, self._dataset.class_names, self._config)
        staged: Staged = fused
        if execution == "parallel":
            staged = parallel = Parallel(fused)
            self._stack.callback(parallel.close)
        return Subject(
            name,
            "ensemble",
            " + ".join(subject.artifact for subject in chosen),
            System(staged, [member.predictor.runtime for member in members]),
            members,
            together([subject.facts for subject in chosen]),
            [{**load, "threads": threads} for subject in chosen for load in subject.loads],
            threads,
            execution,
            ensemble.config.fusion != "mean-outputs",
        )

    def copies(self, subject: Subject, threads: int) -> tuple[Member, ...]:
        """A subject's members loaded once more, to run beside it."""
        pairs = zip(subject.members, subject.loads, strict=True)
        return tuple(
            self._member(member.name, {**load, "threads": threads}, member.class_map) for member, load in pairs
        )

    def staged(self, members: Sequence[Member], ensemble: BenchEnsemble | None) -> Staged:
        """Members as one system, in sequence."""
        if ensemble is not None:
            return ensemble_of(ensemble, members, self._dataset.class_names, self._config)
        return self._deployed(members[0])

    def _deployed(self, member: Member) -> Predictor:
        return member.predictor.with_classes(self._dataset.class_names, member.class_map)

    def _member(self, name: str, load: dict[str, Any], class_map: Any) -> Member:
        options = None if load["options"] is None else OnnxTeacher(**load["options"])
        predictor = self._stack.enter_context(load_predictor(**{**load, "options": options}))
        return Member(name, predictor, class_map)


def _shown_path(path: Path) -> str:
    """A path for a file that others will read: relative where it can be, the bare name otherwise."""
    if not path.is_absolute():
        return path.as_posix()
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name
