"""Comparison over seeds: what is held equal, what is told, and that it goes on where it was cut off."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgekd.artifact import write_json
from edgekd.bench.matching import match_coco
from edgekd.cli import app
from edgekd.cli.compare import _share
from edgekd.cluster import MAX_TRIES, _Dispatcher
from edgekd.compare import CompareJob, Run, _tasks, compare, one_by_one
from edgekd.comparison import Evaluated, gain, spread, summary, table_markdown
from edgekd.data.scenes import make_scenes
from edgekd.errors import DataError, EdgeKDError, RecipeError, UserError
from edgekd.machine import cpu_model
from edgekd.recipe import Recipe
from edgekd.types import Detections
from tests.toy import CLASSES, toy_dataset


def evaluated(folder: Path, method: str, seed: int, shares: tuple[float, ...]) -> Evaluated:
    """A student that finds the first `share` of all objects exactly; AP50 is then about that share."""
    records = toy_dataset(folder / "images", count=40).records
    rng = np.random.default_rng(seed)
    found = []
    for record in records:
        keep = rng.random(len(record.labels)) < shares[seed]
        boxes, labels = record.boxes_xyxy[keep], record.labels[keep]
        found.append(Detections(boxes, np.full(len(boxes), 0.9, np.float32), labels))
    figures = {
        **dict.fromkeys(("ap50", "ap", "voc07"), shares[seed]),
        "per_class": {name: {"ap50": shares[seed]} for name in CLASSES},
        "by_size": {"small": {"ap50": None}, "large": {"ap50": shares[seed]}},
    }
    return Evaluated(method, seed, figures, match_coco(records, found, len(CLASSES)))


@pytest.mark.parametrize(
    ("alone", "method", "verdict"),
    [
        ((0.3, 0.32, 0.31), (0.8, 0.82, 0.81), "gain"),
        ((0.8, 0.82, 0.81), (0.3, 0.32, 0.31), "loss"),
        ((0.5, 0.6, 0.4), (0.6, 0.4, 0.55), "no difference shown"),
    ],
)
def test_a_difference_is_told_for_what_it_is(
    tmp_path: Path, alone: tuple[float, ...], method: tuple[float, ...], verdict: str
) -> None:
    a = [evaluated(tmp_path, "alone", seed, alone) for seed in range(3)]
    m = [evaluated(tmp_path, "m", seed, method) for seed in range(3)]
    result = gain(m, a)
    differences = np.array(method) - np.array(alone)
    assert result["verdict"] == verdict
    assert result["ap50"] == pytest.approx(differences.mean())
    half = 4.303 * differences.std(ddof=1) / np.sqrt(3)
    assert result["interval_seeds"] == pytest.approx([differences.mean() - half, differences.mean() + half])
    assert result["interval_images"][0] < result["interval_images"][1]
    assert result["by_size"]["small"] is None
    assert result["seeds_to_show"] is None or verdict == "no difference shown"


def test_it_is_told_how_many_seeds_would_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At +2 in the mean and a spread of 2 points, the interval of seven seeds leaves out zero, that of six does not."""
    shares = {"alone": (0.5, 0.5, 0.5), "a": (0.5, 0.52, 0.54), "b": (0.7, 0.71, 0.72)}
    runs = [evaluated(tmp_path, method, seed, own) for method, own in shares.items() for seed in range(3)]
    recipe = Recipe.model_validate({"name": "a", "data": {"root": "x"}, "student": {"model": "yolo-nano"}})
    work: Any = SimpleNamespace(train=toy_dataset(tmp_path / "t", 4), val=toy_dataset(tmp_path / "v", 4), device="cpu")
    data = summary(work, [recipe], runs)
    assert data["provenance"]["device"] == (f"cpu: {name}" if (name := cpu_model()) else "cpu")
    needed = {row["method"]: row["gain"]["seeds_to_show"] for row in data["rows"] if "gain" in row}
    assert needed == {"a": 7, "b": None}
    assert 2.571 * 2 / 6**0.5 > 2 > 2.447 * 2 / 7**0.5
    sentence = "Seeds that would decide what is not shown, if mean and spread stayed: a 7."
    assert sentence in table_markdown(data)
    runs.append(evaluated(tmp_path, "d", 0, (0.4,)))
    assert "b over" not in table_markdown(summary(work, [recipe], runs)), "of one seed nothing can be reckoned"
    either_way = property(lambda run: np.linspace(-1.0, 1.0, 1000) * (run.method == "a"))
    monkeypatch.setattr(Evaluated, "resampled", either_way)
    assert "Seeds that would decide" not in table_markdown(summary(work, [recipe], runs)), "other images could undo it"


def test_the_best_method_is_compared_with_the_others_over_the_seeds_that_all_have(tmp_path: Path) -> None:
    shares = {"alone": (0.3, 0.32, 0.31), "a": (0.5, 0.52, 0.51), "b": (0.8, 0.82, 0.1), "c": (0.78, 0.83)}
    runs = [evaluated(tmp_path, method, seed, own) for method, own in shares.items() for seed in range(len(own))]
    runs.reverse()
    recipe = Recipe.model_validate({"name": "a", "data": {"root": "x"}, "student": {"model": "yolo-nano"}})
    work: Any = SimpleNamespace(train=toy_dataset(tmp_path / "t", 4), val=toy_dataset(tmp_path / "v", 4), device="cpu")
    data = summary(work, [recipe], runs)
    best = data["best"]
    assert (best["method"], best["seeds"]) == ("b", [0, 1]), "its third seed, the worst, is not all methods'"
    assert best["ahead_of"]["a"]["values"] == pytest.approx([0.3, 0.3])
    assert best["ahead_of"]["c"]["verdict"] == "no difference shown"
    text = table_markdown(data)
    assert "b has the highest mean of the methods (seeds 0, 1)." in text
    assert "| a | +30.0 |" in text
    assert "| c (2 seeds) |" in text
    assert summary(work, [recipe], [run for run in runs if run.method in ("alone", "a")])["best"] is None


def test_the_interval_over_images_is_of_the_mean_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """95 % of the draws, the same images drawn for every run, and for each once; a verdict needs both intervals."""
    a = [evaluated(tmp_path, "alone", seed, (0.5, 0.52)) for seed in range(2)]
    m = [evaluated(tmp_path, "m", seed, (0.51, 0.53)) for seed in range(2)]
    own = {id(one.matches): float(place) for place, one in enumerate([*a, *m])}
    draws: list[np.ndarray] = []

    def drawn(matches: object, weights: np.ndarray) -> np.ndarray:
        draws.append(weights)
        return own[id(matches)] * np.arange(len(weights)) / 1000  # (2 - 0 + 3 - 1) / 2 = 2 a draw, in the mean

    monkeypatch.setattr("edgekd.bench.precision_recall.mean_ap50", drawn)
    result = gain(m, a)
    assert result["interval_images"] == pytest.approx([2 * 0.025975, 2 * 0.975025])
    assert result["interval_seeds"] == pytest.approx([0.01, 0.01])
    assert result["verdict"] == "gain"
    assert gain(a, m)["verdict"] == "loss"
    assert len(draws) == 4, "a run is resampled again for each that it is compared with"
    assert all(np.array_equal(weights, draws[0]) for weights in draws)
    assert draws[0].shape == (1001, 40)
    assert (draws[0].sum(1) == 40).all()
    assert (draws[0][0] == 1).all()
    own.update({id(one.matches): 0.0 for one in [*a, *m]})
    assert gain([replace(one) for one in m], [replace(one) for one in a])["verdict"] == "no difference shown"


def test_one_seed_shows_nothing(tmp_path: Path) -> None:
    one = [evaluated(tmp_path, name, 0, (share,)) for name, share in (("m", 0.9), ("alone", 0.2))]
    assert gain(one[:1], one[1:])["verdict"] == "no difference shown"


def test_names_of_classes_take_no_table_apart() -> None:
    figures = {"mean": 0.5, "sd": None, "values": [0.5]}
    alone = {"method": "alone", "seeds": [0], **dict.fromkeys(("ap50", "ap", "voc07"), figures)}
    found = {"ap50": 0.1, "interval_seeds": None, "interval_images": [0.0, 0.2], "verdict": "gain"}
    method = {**alone, "method": "kd", "gain": {**found, "by_size": {"small": 0.1}, "per_class": {"a|b": 0.1}}}
    data = {
        "student": {"model": "m", "width": 1.0, "input_size": 96},
        "data": {"name": "d", "train": "train", "val": "val", "train_images": 1, "images": 1, "synthetic": False},
        "train": {"epochs": 1},
        "rows": [alone, method],
    }
    assert r"| | small | a\|b |" in table_markdown(data)


def test_what_else_than_the_method_differs_is_told() -> None:
    figures = {"mean": 0.5, "sd": None, "values": [0.5]}
    data: dict[str, Any] = {
        "student": {"model": "m", "width": 1.0, "input_size": 96},
        "data": {"name": "d", "train": "train", "val": "val", "train_images": 1, "images": 20, "synthetic": False},
        "train": {"epochs": 4, "select": "best"},
        "methods": {"kd": {"distill": {"cache": {"views": 2}}}, "plain": {"distill": {"cache": None}}},
        "rows": [{"method": "alone", "seeds": [0], **dict.fromkeys(("ap50", "ap", "voc07"), figures)}],
    }
    told = table_markdown(data)
    assert "the best of several evaluations" in told
    assert "kd was shown 2 views of each image" in told
    data["train"] = {"epochs": 2, "select": "last"}  # a view for every epoch is what the student alone has
    assert table_markdown(data).count("\n") == told.count("\n") - 2
    data["data"]["images"] = 19
    assert "so few images (19)" in table_markdown(data)


def test_spread() -> None:
    assert spread([0.2, 0.4]) == {
        "mean": pytest.approx(0.3),
        "sd": pytest.approx(0.1414, abs=1e-4),
        "values": [0.2, 0.4],
    }
    assert spread([0.2])["sd"] is None
    assert spread([None])["mean"] is None


def recipe(root: Path, name: str, **changes: object) -> Recipe:
    teacher = {"name": "t", "train": {"model": "mobilenetv2-ssd-lite", "input_size": 96, "width": 0.35}}
    body = {
        "name": name,
        "data": {"root": str(root), "workers": 0},
        "student": {"model": "mobilenetv2-ssd-lite", "input_size": 96, "width": 0.25},
        "teachers": [teacher],
        "train": {"epochs": 1, "batch_size": 4},
        **changes,
    }
    return Recipe.model_validate(body)


def test_recipes_that_differ_in_more_than_the_method_are_refused(tmp_path: Path) -> None:
    a, b = recipe(tmp_path, "a"), recipe(tmp_path, "b", train={"epochs": 2, "batch_size": 4})
    other = recipe(tmp_path, "b", bench={"nms_iou": 0.4})
    with pytest.raises(RecipeError, match="thresholds in bench"):
        CompareJob((a, other), (0,), tmp_path)
    with pytest.raises(RecipeError, match="differ in more than their method"):
        CompareJob((a, b), (0,), tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"teachers": [{"name": "t", "train": {"model": "mobilenetv2-ssd-lite", "input_size": 96}}]}],
)
def test_different_teachers_of_one_name_are_told_before_one_is_trained(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="different teachers of the same name"):
        CompareJob((recipe(tmp_path, "a"), recipe(tmp_path, "b", **changes)), (0,), tmp_path)
    named = [{**teacher, "seed": 0} for teacher in recipe(tmp_path, "a").model_dump(mode="json")["teachers"]]
    CompareJob((recipe(tmp_path, "a"), recipe(tmp_path, "b", teachers=named, seed=1)), (0,), tmp_path)


@pytest.mark.parametrize(
    ("names", "seeds"), [(("a", "a"), (0,)), (("a",), (0, 0)), (("alone",), (0,)), ((), (0,)), (("a",), (0, -1))]
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, names: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    with pytest.raises(UserError):
        CompareJob(tuple(recipe(tmp_path, name) for name in names), seeds, tmp_path / "out")


def test_nothing_is_trained_where_nothing_can_be_compared(tmp_path: Path) -> None:
    root = make_scenes(tmp_path / "scenes", counts={"train": 4, "val": 2}, image_hw=(96, 128))
    for name in (root / "ImageSets/Main/val.txt").read_text().split():
        path = root / f"Annotations/{name}.xml"  # marked difficult, all of them
        path.write_text(path.read_text().replace("<difficult>0<", "<difficult>1<"))
    with pytest.raises(DataError, match="nothing can be compared"):
        compare(CompareJob((recipe(root, "response"),), (0,), tmp_path / "out", quiet=True))
    assert not (tmp_path / "out/alone").exists()


@pytest.mark.slow
def test_a_comparison_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_scenes(tmp_path / "scenes", counts={"train": 8, "val": 4}, image_hw=(96, 128))
    methods = (
        recipe(root, "response"),
        recipe(root, "with-feature", distill={"terms": [{"loss": "response"}, {"loss": "feature"}]}),
    )
    out = tmp_path / "out"
    job = CompareJob(methods[:1], (0,), out, quiet=True)
    shares = [[str(run) for run in one_by_one(job, job.runs[_share(f"{index}/2")])] for index in range(2)]
    assert shares == [["alone, seed 0"], ["response, seed 0"]]
    before = (out / "response/seed-0/model.pt").stat().st_mtime_ns
    tables: list[set[tuple[str, int]]] = []

    def written(path: Path, data: Any) -> None:
        tables.append({(row["method"], seed) for row in data["rows"] for seed in row["seeds"]})
        write_json(path, data)

    monkeypatch.setattr("edgekd.compare.write_json", written)
    result = compare(CompareJob(methods, (0, 1), out, quiet=True), jobs=2)
    assert tables[0] == {("alone", 0), ("response", 0)}, "what had been done before is in the first table already"
    assert all(earlier <= later for earlier, later in pairwise(tables))
    assert (out / "response/seed-0/model.pt").stat().st_mtime_ns == before, "a finished run was run again"
    data = json.loads((out / "comparison.json").read_text())
    assert [row["method"] for row in data["rows"]] == ["alone", "response", "with-feature"]
    assert all(row["seeds"] == [0, 1] for row in data["rows"])
    assert data["data"]["synthetic"] is True
    assert "synthetic" in result.table
    assert "4 images" in result.table
    assert table_markdown(data) == (out / "comparison.md").read_text()
    assert (out / "comparison.svg").stat().st_size > 1000


@pytest.mark.parametrize("more", [("--only", "0/2"), ("--launcher", "ray")])
def test_jobs_are_for_this_machine(tmp_path: Path, more: tuple[str, str]) -> None:
    (tmp_path / "a.yaml").write_text("name: a", encoding="utf-8")
    said = CliRunner().invoke(app, ["compare", str(tmp_path / "a.yaml"), "--out", str(tmp_path), "--jobs", "2", *more])
    assert said.exit_code == 2
    assert "--jobs goes with neither" in said.output


def test_what_is_done_side_by_side(tmp_path: Path) -> None:
    job = CompareJob((recipe(tmp_path, "a"),), (0, 1), tmp_path / "out")
    for run in job.runs:
        (job.folder(run) / "evaluation").mkdir(parents=True)
        if run != job.runs[-1]:
            (job.folder(run) / "evaluation/manifest.json").touch()
    assert {task.name: task.needs for task in _tasks(job)} == {
        "teacher t": (),
        "alone, seed 0": (),
        "a, seed 0": ("teacher t",),
        "alone, seed 1": (),
        "a, seed 1": ("teacher t",),
    }
    (job.folder(job.runs[-1]) / "evaluation/manifest.json").touch()
    assert _tasks(job) == [], "no process is begun where every run is there"


@pytest.mark.parametrize("only", ["3/3", "1", "a/2", "-1/2", "1/0", ""])
def test_a_share_that_is_none_is_refused(only: str) -> None:
    with pytest.raises(UserError, match="INDEX/COUNT"):
        _share(only)


class RayError(Exception):
    """A worker was lost."""


class RayTaskError(RayError):
    """The task itself failed."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class FakeRay:
    """As much of Ray as the dispatcher uses; what becomes of each unit's tries is written down beforehand."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, fates: dict[str, list[Exception | bool]]) -> None:
        self.fates, self.started = fates, list[str]()

    def remote(self, **options: object) -> Any:
        return lambda unit_function: SimpleNamespace(remote=self._start)

    def _start(self, job: CompareJob, unit: Run | str, folder: str) -> tuple[str, int]:
        self.started.append(str(unit))
        return str(unit), self.started.count(str(unit))

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[-1:], references[:-1]  # the last begun ends first: order must not matter

    def get(self, reference: tuple[str, int]) -> tuple[str, bool]:
        unit, number = reference
        fate = self.fates.get(unit, [])[number - 1 : number] or [True]
        if isinstance(fate[0], Exception):
            raise fate[0]
        return "node", bool(fate[0])


def dispatched(folder: Path, fates: dict[str, list[Exception | bool]]) -> tuple[FakeRay, list[str], str]:
    job = CompareJob((recipe(folder, "a"), recipe(folder, "b")), (0, 1), folder / "out", quiet=True)
    ray, done = FakeRay(fates), list[str]()
    try:
        for run in _Dispatcher(ray, job, {}).run():
            done.append(str(run))
    except EdgeKDError as error:
        return ray, done, str(error)
    return ray, done, ""


RUNS = {f"{method}, seed {seed}" for method in ("alone", "a", "b") for seed in (0, 1)}


def test_methods_begin_when_the_teachers_are_trained(tmp_path: Path) -> None:
    ray, done, told = dispatched(tmp_path, {})
    assert not told
    assert set(done) == RUNS
    assert len(ray.started) == len(RUNS) + 1
    assert set(ray.started[:3]) == {"t", "alone, seed 0", "alone, seed 1"}


def test_lost_workers_are_replaced(tmp_path: Path) -> None:
    ray, done, told = dispatched(tmp_path, {"t": [RayError("died")], "a, seed 1": [RayError("died"), False, True]})
    assert not told
    assert sorted(done) == sorted(RUNS)
    assert ray.started.count("t") == 2
    assert ray.started.count("a, seed 1") == 3


def test_what_fails_by_its_own_fault_is_told_after_the_rest(tmp_path: Path) -> None:
    fault = RayTaskError(UserError("the picture is broken"))
    ray, done, told = dispatched(tmp_path, {"a, seed 0": [fault], "b, seed 1": [RayError("died")] * 9})
    assert set(done) == RUNS - {"a, seed 0", "b, seed 1"}
    assert ray.started.count("a, seed 0") == 1
    assert ray.started.count("b, seed 1") == MAX_TRIES
    assert "2 of 7 runs failed" in told
    assert "a, seed 0: the picture is broken" in told


def test_without_its_teacher_no_method_begins_but_the_student_alone_does(tmp_path: Path) -> None:
    _, done, told = dispatched(tmp_path, {"t": [RayTaskError(UserError("no data"))]})
    assert set(done) == {"alone, seed 0", "alone, seed 1"}
    assert "4 runs not begun" in told
