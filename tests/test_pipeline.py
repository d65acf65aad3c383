"""The chain end to end on a few generated scenes: what it leaves behind, what it skips, what it does again."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgekd.artifact import read_manifest
from edgekd.console import Terminal
from edgekd.data.scenes import make_scenes
from edgekd.errors import (
    DataError,
    DistillationSetupError,
    EdgeKDError,
    ParityError,
    RecipeError,
    UserError,
    WeightsError,
)
from edgekd.pipeline import ChainResult, run_recipe
from edgekd.recipe import EnsembleConfig, OnnxTeacher, Recipe
from edgekd.recipe_file import load_recipe
from edgekd.report.summary import summary_text
from edgekd.stages import train_student
from edgekd.teaching import check_setup, ensemble_weights, teacher_identity
from edgekd.workspace import Workspace, content_hash, is_synthetic, open_workspace

# VGG and tiny YOLO have few layers: their exports take half of the time that one of MobileNet takes.
TINY = """\
name: tiny
data: {root: scenes, workers: 0}
student: {model: vgg11-ssd, input_size: 96, width: 0.25}
teachers:
  - {name: one, train: {model: vgg11-ssd, input_size: 96, width: 0.25}, seed: 1}
  - {name: two, train: {model: yolov3-tiny, input_size: 64, width: 0.25}}
train: {epochs: 1, batch_size: 4}
export: {precisions: [fp32]}
bench: {samples: 20, warmup_seconds: 0, threads: 1}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_scenes(folder / "scenes", counts={"train": 8, "val": 4})
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return folder


def recipe(home: Path, *overrides: str) -> Recipe:
    return load_recipe(home / "tiny.yaml", overrides)


@pytest.fixture(scope="module")
def chain(home: Path) -> ChainResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekd.pipeline.run_side_by_side", None)  # one job starts no processes
        return run_recipe(recipe(home), home / "run", quiet=True, jobs=1)


@pytest.fixture
def run(chain: ChainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, to be changed; memory, a process for each row, has been measured once."""
    monkeypatch.setattr("edgekd.bench.measuring.peak_memory", lambda *_: None)
    return Path(shutil.copytree(chain.folder, tmp_path / "run"))


def stamps(folder: Path) -> dict[str, int]:
    """When each thing that took work was written."""
    kept = ("*/model.pt", "teachers/*/model.pt", "answers/*/*.npz", "export/*.onnx", "bench/result.json")
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for pattern in kept for p in folder.glob(pattern)}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before | after if before.get(name) != after.get(name)}


@pytest.mark.slow
def test_what_is_left_behind(chain: ChainResult) -> None:
    files = {
        "recipe.yaml",
        "teachers/one/model.pt",
        "teachers/two/manifest.json",
        "answers/one/manifest.json",
        "student/model.pt",
        "student/recipe.yaml",
        "distilled/model.pt",
        "export/one.fp32.onnx",
        "export/two.fp32.onnx",
        "export/student.fp32.onnx",
        "export/distilled.fp32.onnx",
        "bench/result.json",
        "report.html",
    }
    assert {name for name in files if not (chain.folder / name).is_file()} == set()
    roles = [(row["name"], row["role"]) for row in chain.result["rows"]]
    assert roles == [
        ("one", "teacher"),
        ("two", "teacher"),
        ("ensemble", "ensemble"),
        ("student", "student"),
        ("distilled", "student_distilled"),
    ]
    assert chain.result["data"]["synthetic"] is True
    json.dumps(chain.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_the_table_has_every_row_and_says_what_distillation_brought(chain: ChainResult) -> None:
    lines = chain.table.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == ["one", "two", "ensemble", "student", "distilled"]
    assert "synthetic" in chain.table
    assert "Distillation" in chain.table
    assert summary_text(chain.result) == chain.table


@pytest.mark.slow
def test_a_finished_chain_does_nothing_again(home: Path, run: Path) -> None:
    before = stamps(run)
    again = run_recipe(recipe(home, "data.cache_mib=0"), run, quiet=True, jobs=1)
    assert stamps(run) == before
    assert again.result == json.loads((run / "bench" / "result.json").read_text())
    assert "before this recipe" not in again.report.read_text(encoding="utf-8"), "other words that change no figure"


@pytest.mark.slow
def test_only_what_depends_on_a_change_is_done_again(home: Path, run: Path) -> None:
    before = stamps(run)
    run_recipe(recipe(home, "distill.detection_weight=2"), run, quiet=True, jobs=1)
    assert changed(before, stamps(run)) == {"distilled/model.pt", "export/distilled.fp32.onnx", "bench/result.json"}
    assert (run / "replaced" / "distilled-1" / "model.pt").is_file(), "what was there is set aside"


@pytest.mark.slow
def test_damaged_and_lost_files_are_made_again(home: Path, run: Path) -> None:
    before = stamps(run)
    both = ("export/student.fp32.onnx", "export/distilled.fp32.onnx")
    for name in both:
        (run / name).write_bytes(b"cut off")
    (run / "answers" / "two" / "manifest.json").unlink()
    (run / "bench" / "detections.npz").unlink()
    result = run_recipe(recipe(home), run, quiet=True, jobs=1)  # one export after the other
    assert set(both) <= changed(before, stamps(run)) <= {*both, "bench/result.json"}
    assert all((run / name).stat().st_size > 1000 for name in both)
    assert (run / "bench" / "detections.npz").is_file()
    assert result.report.is_file()


@pytest.mark.slow
def test_an_export_that_fails_is_left_out_and_told(home: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd import chain_tasks

    def fail(source: Path, path: Path, *, precision: str, **_: object) -> None:
        raise ParityError(f"{precision} differs")

    monkeypatch.setattr(chain_tasks, "export_run", fail)
    result = run_recipe(recipe(home, "export.precisions=[fp32,fp16]"), run, quiet=True, jobs=1)
    assert [str(error) for error in result.failures] == ["fp16 differs", "fp16 differs"]
    assert [row["name"] for row in result.result["rows"]] == ["one", "two", "ensemble", "student", "distilled"]


def test_another_run_is_never_overwritten(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    with open_workspace(recipe(home), out, quiet=True) as work:
        assert not train_student(work, out).skipped
        assert train_student(work, out).skipped
    with (
        open_workspace(recipe(home, "seed=1"), out, quiet=True) as work,
        pytest.raises(EdgeKDError, match="another recipe"),
    ):
        train_student(work, out)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.inputs["seed"] == 0


# -- mistakes show before anything is trained ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("student.options={min_scal: 0.1}", RecipeError, "min_scal"),
        ("teachers.1.train.options={x: 1}", RecipeError, "x"),
        ("distill.terms=[{loss: response, params: {nope: 1}}]", DistillationSetupError, "nope"),
        ("distill.terms=[{loss: feature, student_taps: [nope]}]", DistillationSetupError, "nope"),
        ("ensemble.fusion=mean-outputs", DistillationSetupError, "mean-outputs"),
        ("teachers.1={name: two, checkpoint: no.pt}", EdgeKDError, "no.pt"),
        ("data.val=tset", EdgeKDError, "no split 'tset'"),
        ("student.weights=no.pth", WeightsError, "no.pth"),
        ("teachers.1.train.weights=no.pth", WeightsError, "no.pth"),
        ("train.freeze_stride=4", RecipeError, "without `weights`"),
    ],
)
def test_setup_is_checked_first(home: Path, tmp_path: Path, override: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_recipe(recipe(home, override), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "teachers").exists()
    assert not (tmp_path / "run" / "student").exists()


# -- identities ---------------------------------------------------------------------------------------------------


@pytest.fixture
def work(home: Path, tmp_path: Path) -> Workspace:
    with open_workspace(recipe(home), tmp_path / "w", quiet=True) as opened:
        return opened


def test_a_data_sets_fingerprint_is_its_content(home: Path, work: Workspace, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(home / "scenes", tmp_path / "moved"))
    with open_workspace(recipe(home, f"data.root={moved}"), tmp_path / "x", quiet=True) as other:
        assert other.data_identity == work.data_identity
        record = other.train.records[0]
        shifted = replace(record, boxes_xyxy=record.boxes_xyxy + 1)
        assert content_hash(replace(other.train, records=(shifted, *other.train.records[1:]))) != content_hash(
            other.train
        )
        record.path.write_bytes(record.path.read_bytes() + b" ")
        assert content_hash(other.train) != work.data_identity["train"]


def test_a_teachers_identity_is_its_file_and_how_it_is_read(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.onnx", "b.onnx", "c.onnx")]
    for path, content in zip(paths, (b"1", b"1", b"2"), strict=True):
        path.write_bytes(content)
    first, same, other = (teacher_identity(OnnxTeacher(name=p.stem, onnx=str(p), weight=2.0)) for p in paths)
    assert first == same != other
    assert teacher_identity(OnnxTeacher(name="a", onnx=str(paths[0]), resize="stretch")) != first
    with pytest.raises(EdgeKDError, match=r"gone.onnx"):
        teacher_identity(OnnxTeacher(name="a", onnx=str(tmp_path / "gone.onnx")))


def test_generated_data_is_known_as_such(home: Path, tmp_path: Path) -> None:
    assert is_synthetic(home / "scenes")
    assert not is_synthetic(tmp_path)
    (tmp_path / "manifest.json").write_text('{"some": "other tool"}', encoding="utf-8")
    assert not is_synthetic(tmp_path)


def test_given_weights_are_shares(work: Workspace, tmp_path: Path) -> None:
    teachers = [
        teacher.model_copy(update={"weight": w}) for teacher, w in zip(work.recipe.teachers, (3, 1), strict=True)
    ]
    assert ensemble_weights(work, teachers, tmp_path) == (0.75, 0.25)


def test_learned_weights_of_two_ensembles_stay_apart(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[str] = []

    def fit(work: Workspace, *_: object) -> tuple[float, ...]:
        fitted.append(work.recipe.ensemble.fusion)
        torch.rand(1)  # as building the teachers does
        return (0.9, 0.1) if fitted[-1] == "wbf" else (0.3, 0.7)

    monkeypatch.setattr("edgekd.teaching._fitted_weights", fit)
    monkeypatch.setattr("edgekd.teaching.teacher_identity", lambda config: {"sha256": config.name})
    before = torch.get_rng_state()
    for _ in range(2):  # a comparison's recipes by turns
        for fusion, expected in (("wbf", (0.9, 0.1)), ("nms", (0.3, 0.7))):
            ensemble = EnsembleConfig(fusion=fusion, weights="learned")  # type: ignore[arg-type]
            other = replace(work, recipe=work.recipe.model_copy(update={"ensemble": ensemble}))
            assert ensemble_weights(other, work.recipe.teachers, tmp_path / "answers") == expected
    assert fitted == ["wbf", "nms"], "each once"
    assert torch.equal(torch.get_rng_state(), before), "a run that finds them there begins with the same random weights"


def test_setup_of_a_good_recipe_passes(work: Workspace) -> None:
    check_setup(work)


# -- the terminal -------------------------------------------------------------------------------------------------


def test_progress_lines_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    with terminal.counting("things") as count:
        for done in range(1, 101):
            count(done, 100)
            count(done, 100)
    with terminal.training("net") as listen:
        listen({"event": "eval", "map": {"ap50": 0.5}})
        listen(
            {
                "event": "step",
                "step": 9,
                "steps": 10,
                "epoch": 0,
                "epochs": 1,
                "losses": {"loss": 1.0},
                "images_per_s": 3,
            }
        )
    tell = terminal.staged()
    tell("accuracy", 1, 1)
    tell("latency", 1, 1)
    terminal.stage(1, 6, "teachers")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line.strip() for line in captured.err.splitlines()]
    assert lines == [
        "things: 100/100, 0 s",
        "net: 10/10, 0 s  epoch 1/1  loss 1.000  3 images/s  AP50 0.500",
        "accuracy: 1/1, 0 s",
        "latency: 1/1, 0 s",
        "[1/6] teachers",
    ]


def test_the_time_left_counts_steps_and_not_the_wait_before_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1.0]
    monkeypatch.setattr("edgekd.console.time.monotonic", lambda: now[0])
    with Terminal().counting("steps") as count:
        now[0] += 600  # teachers are asked
        for done in range(401, 501):  # of a run that is resumed
            now[0] += 1
            count(done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].strip() == "steps: 401/1000"
    assert lines[1].strip() == "steps: 411/1000, about 589 s left"


def test_what_is_said_begins_with_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (Terminal(about="amd, seed 3"), pickle.loads(pickle.dumps(Terminal(about="amd, seed 3")))):
        terminal.note("a note")
        terminal.warn("look")
        with terminal.training("net") as listen:
            listen({"event": "note", "message": "begins"})
        said = [line.strip() for line in capsys.readouterr().err.splitlines()]
        assert said == ["amd, seed 3: a note", "warning: amd, seed 3: look", "amd, seed 3: net: begins"]


def test_names_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    terminal.note("a :cat: [b]c[/b]")
    with terminal.counting("clip [final] [/x]") as progress:
        progress(1, 2)
    assert "a :cat: [b]c[/b]" in shown.getvalue()
    assert "clip [final] [/x]" in shown.getvalue()


def test_quiet_shows_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(quiet=True)
    terminal.stage(1, 6, "teachers")
    terminal.note("a note")
    with terminal.counting("things") as count, terminal.training("net") as listen:
        count(1, 1)
        listen({"event": "warning", "message": "odd"})
    terminal.warn("look")
    assert capsys.readouterr().err.splitlines() == ["warning: odd", "warning: look"]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path, home: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(UserError, match="is a file"), open_workspace(recipe(home), tmp_path / "f"):
        pass


def test_a_training_split_without_objects_is_refused(tmp_path: Path, home: Path) -> None:
    bare = Path(shutil.copytree(home / "scenes", tmp_path / "bare"))
    for path in bare.glob("Annotations/*.xml"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text[: text.index("<object>")] + "</annotation>", encoding="utf-8")
    overrides = (f"data.root={bare}", "data.classes=[circle]")
    with (
        pytest.raises(DataError, match="no object to train on"),
        open_workspace(recipe(home, *overrides), tmp_path / "out", quiet=True),
    ):
        pass


def test_figures_on_training_images_or_on_nothing_are_doubted(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_workspace(recipe(home), tmp_path / "a", device="cpu"):
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("warning") == 1
        assert "'val' has no object of ring, star5, unlike 'train': figures on it say nothing of them" in said
    with open_workspace(recipe(home, "data.val=train", "data.limit_val=3"), tmp_path / "b", device="cpu"):
        assert "3 of the 3 images of split 'train' are trained on" in " ".join(capsys.readouterr().err.split())
    shutil.copytree(home / "scenes", tmp_path / "scenes")
    images = tmp_path / "scenes" / "JPEGImages"
    trained, measured = (next(iter(sorted(images.glob(f"{split}*")))) for split in ("train", "val"))
    kept = measured.read_bytes()
    shutil.copy(trained, measured)
    with open_workspace(recipe(home, f"data.root={tmp_path / 'scenes'}"), tmp_path / "e", device="cpu"):
        assert "images of split 'val' are trained on" in " ".join(capsys.readouterr().err.split()), (
            "a copy is the same image"
        )
    measured.write_bytes(kept)
    for annotation in (tmp_path / "scenes" / "Annotations").glob("val*.xml"):
        annotation.write_text("<annotation/>")
    with open_workspace(recipe(home, f"data.root={tmp_path / 'scenes'}"), tmp_path / "c", device="cpu"):
        assert "split 'val' has no object" in " ".join(capsys.readouterr().err.split())


def test_an_empty_root_is_not_the_folder_of_the_recipe(home: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.root"):
        recipe(home, "data.root=''")
