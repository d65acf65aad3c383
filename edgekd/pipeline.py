"""The whole chain: teachers, the student alone, the distilled student, export, benchmark, report.

A stage is skipped when its manifest says it was made from the same inputs and its files are intact. A stage that was
made from others is set aside in DIR/replaced, never overwritten. What was cut off goes on where it was.

    DIR/recipe.yaml  teachers/NAME/  answers/NAME/  student/  distilled/  export/NAME.PRECISION.onnx
        bench/result.json  report.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgekd.artifact import is_current, read_manifest, sha256_file, write_manifest
from edgekd.bench.entries import ArtifactRole, BenchArtifact, BenchEnsemble
from edgekd.bench.result import read_result
from edgekd.bench.runner import bench_artifacts
from edgekd.chain_tasks import Exports, chain_tasks, wanted_exports
from edgekd.console import Terminal
from edgekd.errors import EdgeKDError
from edgekd.recipe import CheckpointTeacher, OnnxTeacher, Recipe, TeacherConfig
from edgekd.recipe_file import RECIPE_FILE, write_recipe
from edgekd.report.summary import summary_text
from edgekd.runtimes.model_files import sha256_model
from edgekd.side_by_side import run_side_by_side, tasks_at_once
from edgekd.stages import distill_student, ready_teachers, train_student
from edgekd.teaching import check_setup, ensemble_weights, teacher_identity
from edgekd.workspace import Workspace, is_synthetic, open_workspace

STAGES = ("training and export", "benchmark", "report")


@dataclass(frozen=True)
class ChainResult:
    """What a run of the chain left behind.

    Attributes:
        result: what bench/result.json holds. table: it as text.
        failures: exports that did not pass, and so are not in the benchmark.
    """

    folder: Path
    report: Path
    result: Mapping[str, Any]
    table: str
    failures: tuple[EdgeKDError, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "run": str(self.folder),
            "report": str(self.report),
            "result": dict(self.result),
            "failures": [str(failure) for failure in self.failures],
        }


def run_recipe(
    recipe: Recipe, out: Path, *, device: str = "auto", quiet: bool = False, jobs: int | None = None
) -> ChainResult:
    """Run all of a recipe in `out`, with `jobs` trainings or exports at once (None for as many as there is room for).

    Raises:
        EdgeKDError: a stage failed; what was finished before stays, and the next run goes on from there.
    """
    with open_workspace(recipe, out, device=device, quiet=quiet) as work:
        return _Chain(replace(work, replaced=out / "replaced"), out, jobs).run()


@dataclass
class _Chain:
    work: Workspace
    out: Path
    jobs: int | None
    failures: list[EdgeKDError] = field(default_factory=list)

    def run(self) -> ChainResult:
        work, out = self.work, self.out
        asks_of_images = check_setup(work)
        write_recipe(work.recipe, out)
        self._begin(0)
        exports = Exports(out / "export")
        if self._side_by_side(exports, asks_of_images):
            # All is there now: what follows only reads it, and need not say so.
            work = replace(work, terminal=Terminal(quiet=True))
        teachers = ready_teachers(work, out / "teachers")
        train_student(work, out / "student")
        distill_student(work, teachers, out / "distilled", answers=out / "answers")
        files = self._export(exports, work, teachers)
        self._begin(1)
        result = self._bench(teachers, files)
        self._begin(2)
        from edgekd.report.page import write_report

        page = write_report(out, out / "report.html")
        self.work.terminal.note(str(page))
        return ChainResult(out, page, result, summary_text(result), tuple(self.failures))

    def _begin(self, index: int) -> None:
        self.work.terminal.stage(index + 1, len(STAGES), STAGES[index])

    # -- training and export -------------------------------------------------------------------------------------

    def _side_by_side(self, exports: Exports, asks_of_images: bool) -> bool:
        """Do what is to be done in processes side by side; False where there is no room, or too little to do for that."""
        at_once = tasks_at_once(self.work) if self.jobs is None else self.jobs
        if at_once < 2:
            return False
        tasks = chain_tasks(self.work, self.out, exports, asks_of_images=asks_of_images)
        if len(tasks) < 2:
            return False
        run_side_by_side(self.work, tasks, min(at_once, len(tasks)), exports.note)
        return True

    def _export(
        self, exports: Exports, work: Workspace, teachers: Sequence[TeacherConfig]
    ) -> dict[tuple[str, str], Path]:
        """(model, precision) to ONNX file."""
        files: dict[tuple[str, str], Path] = {}
        for one in wanted_exports(work.recipe, teachers, self.out):
            failure = exports.failed.get(one.file)
            if failure is None and not exports.is_current(work, one):
                exports.note(one.file, one.make(work))
                failure = exports.failed.get(one.file)
            elif failure is None:
                work.terminal.note(f"{one.file}: unchanged")
            if failure is None:
                files[one.name, one.precision] = exports.folder / one.file
            else:
                self.work.terminal.warn(f"{one.name} {one.precision} is left out: {failure}")
                self.failures.append(failure)
        return files

    # -- benchmark -----------------------------------------------------------------------------------------------

    def _bench(self, teachers: Sequence[TeacherConfig], files: Mapping[tuple[str, str], Path]) -> Mapping[str, Any]:
        work, path = self.work, self.out / "bench" / "result.json"
        artifacts = self._artifacts(teachers, files)
        ensemble = self._ensemble(teachers, artifacts)
        inputs = {
            "rows": [[a.name, a.role, sha256_model(a.path), _options(a)] for a in artifacts],
            "ensemble": None
            if ensemble is None
            else [ensemble.members, ensemble.weights, ensemble.config.model_dump(mode="json")],
            "config": work.recipe.bench.model_dump(mode="json"),
            "data": work.data_identity,
            "seed": work.recipe.seed,
        }
        facts = {"recipe": sha256_file(self.out / RECIPE_FILE)}  # by which a report knows figures of an earlier one
        files_of = ["result.json", "detections.npz"]
        if is_current(path.parent, "bench", inputs):
            work.terminal.note("unchanged")
            found = read_manifest(path.parent)
            if found is not None and found.facts.get("recipe") != facts["recipe"]:
                write_manifest(path.parent, "bench", inputs, files_of, facts)
            return read_result(path)
        result = bench_artifacts(
            artifacts,
            work.val,
            config=work.recipe.bench,
            out=path,
            ensemble=ensemble,
            seed=work.recipe.seed,
            synthetic=is_synthetic(work.val.root),
            progress=work.terminal.staged(),
        )
        write_manifest(path.parent, "bench", inputs, files_of, facts)
        return result

    def _artifacts(
        self, teachers: Sequence[TeacherConfig], files: Mapping[tuple[str, str], Path]
    ) -> list[BenchArtifact]:
        artifacts = []
        for teacher in teachers:
            if isinstance(teacher, OnnxTeacher):
                artifacts.append(BenchArtifact(Path(teacher.onnx), teacher.name, "teacher", options=teacher))
            elif isinstance(teacher, CheckpointTeacher):
                file = files[teacher.name, "fp32"]
                artifacts.append(BenchArtifact(file, teacher.name, "teacher", class_map=teacher.class_map))
            else:
                self.work.terminal.warn(f"teacher {teacher.name} has no file to deploy: it is not measured")
        roles: tuple[tuple[str, ArtifactRole], ...] = (("student", "student"), ("distilled", "student_distilled"))
        for name, role in roles:
            for (model, precision), file in files.items():
                if model == name:
                    artifacts.append(BenchArtifact(file, name if precision == "fp32" else f"{name}-{precision}", role))
        return artifacts

    def _ensemble(self, teachers: Sequence[TeacherConfig], artifacts: Sequence[BenchArtifact]) -> BenchEnsemble | None:
        """All teachers as one system; None where there is one teacher, or some cannot be deployed."""
        names = tuple(artifact.name for artifact in artifacts if artifact.role == "teacher")
        if len(teachers) < 2 or len(names) != len(teachers):
            return None
        if self.work.recipe.ensemble.fusion == "mean-outputs":
            self.work.terminal.warn("mean-outputs works on raw outputs, which files do not give: no ensemble row")
            return None
        weights = ensemble_weights(self.work, teachers, self.out / "answers")
        return BenchEnsemble(names, self.work.recipe.ensemble, weights)


def _options(artifact: BenchArtifact) -> Any:
    return None if artifact.options is None else teacher_identity(artifact.options)
