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

from edgekd.artifact import is_current, read_manifest, sha256_file, sha256_json, write_manifest, write_text
from edgekd.bench.entries import ArtifactRole, BenchArtifact, BenchEnsemble
from edgekd.bench.result import read_result
from edgekd.bench.runner import bench_artifacts
from edgekd.checkpoint import detector_file
from edgekd.errors import EdgeKDError
from edgekd.export import ExportData, Thresholds, export_run
from edgekd.recipe import CheckpointTeacher, OnnxTeacher, Recipe, TeacherConfig
from edgekd.recipe_file import dump_recipe
from edgekd.runtimes.model_files import sha256_model
from edgekd.side_by_side import train_independent
from edgekd.stages import RECIPE_FILE, distill_student
from edgekd.summary import summary_text
from edgekd.teaching import check_setup, ensemble_weights, teacher_identity
from edgekd.workspace import Workspace, is_synthetic, open_workspace

STAGES = ("teachers and the student alone", "distilled student", "export", "benchmark", "report")


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
    """Run all of a recipe in `out`, with `jobs` trainings at once (None for as many as the machine has room for).

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
        check_setup(work)
        write_text(out / RECIPE_FILE, dump_recipe(work.recipe, out))
        self._begin(0)
        teachers, student = train_independent(work, out / "teachers", out / "student", self.jobs)
        self._begin(1)
        distilled = distill_student(work, teachers, out / "distilled", answers=out / "answers")
        self._begin(2)
        files = self._export(teachers, student.folder, distilled.folder)
        self._begin(3)
        result = self._bench(teachers, files)
        self._begin(4)
        from edgekd.report.page import write_report

        page = write_report(out, out / "report.html")
        work.terminal.note(str(page))
        return ChainResult(out, page, result, summary_text(result), tuple(self.failures))

    def _begin(self, index: int) -> None:
        self.work.terminal.stage(index + 1, len(STAGES), STAGES[index])

    # -- export --------------------------------------------------------------------------------------------------

    def _export(self, teachers: Sequence[TeacherConfig], student: Path, distilled: Path) -> dict[tuple[str, str], Path]:
        """(model, precision) to ONNX file. Teachers in fp32, since they are what students are compared with."""
        asked = self.work.recipe.export.precisions
        native = [(t.name, Path(t.checkpoint)) for t in teachers if isinstance(t, CheckpointTeacher)]
        wanted = [(name, source, "fp32") for name, source in native]
        wanted += [
            (name, source, p) for name, source in (("student", student), ("distilled", distilled)) for p in asked
        ]
        files: dict[tuple[str, str], Path] = {}
        for name, source, precision in wanted:
            try:
                files[name, precision] = self._export_one(name, source, precision)
            except EdgeKDError as error:
                if precision == "fp32":
                    raise
                self.work.terminal.warn(f"{name} {precision} is left out: {error}")
                self.failures.append(error)
        return files

    def _export_one(self, name: str, source: Path, precision: Any) -> Path:
        work, folder = self.work, self.out / "export"
        path = folder / f"{name}.{precision}.onnx"
        inputs = {
            "source": sha256_file(detector_file(source)),
            "precision": precision,
            "config": work.recipe.export.model_dump(mode="json", exclude={"precisions"}),
            "thresholds": work.recipe.bench.model_dump(mode="json", include={"nms_iou", "max_detections"}),
            "data": work.data_identity,
        }
        manifest = read_manifest(folder) if folder.is_dir() else None
        made = dict(manifest.inputs) if manifest is not None else {}
        known = sha256_json(made.get(path.name)) == sha256_json(inputs)
        if manifest is not None and known and path.is_file() and sha256_file(path) == manifest.files.get(path.name):
            work.terminal.note(f"{path.name}: unchanged")
            return path
        bench = work.recipe.bench
        export_run(
            source,
            path,
            precision=precision,
            config=work.recipe.export,
            thresholds=Thresholds(nms_iou=bench.nms_iou, max_detections=bench.max_detections),
            data=ExportData(work.train, work.val),
            say=work.terminal.note,
        )
        made = {file: value for file, value in made.items() if (folder / file).is_file()} | {path.name: inputs}
        write_manifest(folder, "onnx", made, sorted(made), {})
        return path

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
        if is_current(path.parent, "bench", inputs):
            work.terminal.note("unchanged")
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
        write_manifest(path.parent, "bench", inputs, ["result.json", "detections.npz"], {})
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
