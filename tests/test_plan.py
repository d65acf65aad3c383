"""`edgekd plan`: few measurements find what fits, recipes are ones that `edgekd run` takes, and a plan can go on."""

from __future__ import annotations

import getpass
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner, Result

from edgekd.cli import app
from edgekd.data.scenes import SCENE_CLASSES, make_scenes
from edgekd.errors import RecipeError, UserError
from edgekd.plan import job
from edgekd.plan.candidates import Candidate, Shape, grid
from edgekd.plan.job import Asked, make_plan
from edgekd.plan.recipes import combined, ranked, write_recipes
from edgekd.plan.search import Search
from edgekd.plan.table import plan_text
from edgekd.recipe import DataConfig, Recipe
from edgekd.recipe_file import load_recipe
from tests.export_double import traced
from tests.sshd import running_sshd

SSD, NANO = "mobilenetv2-ssd-lite", "yolo-nano"


def edgekd(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("plan") / "scenes", counts={"train": 4, "val": 2}, image_hw=(96, 128))


# -- candidates and search -------------------------------------------------------------------------------------------


def test_the_grid_counts_as_the_detector_does() -> None:
    from edgekd.detectors import build_detector, spec_for
    from edgekd.detectors.complexity import count_macs

    found = grid([NANO], [0.35], [160, 320], ["fp32", "int8"], SCENE_CLASSES)
    assert [c.name for c in found] == [f"{NANO}-w0.35-{s}-{p}" for s in (160, 320) for p in ("fp32", "int8")]
    exact = [count_macs(build_detector(spec_for(Shape(NANO, 0.35, s).config, SCENE_CLASSES))) for s in (160, 320)]
    assert found[2].macs == exact[1]
    assert found[0].macs == pytest.approx(exact[0], rel=0.03)
    most = grid([NANO], [0.35, 1.0], [160, 320], ["fp32"], SCENE_CLASSES, most_macs=exact[0] * 1.2)
    assert [c.name for c in most] == [f"{NANO}-w0.35-160-fp32"]


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UserError, match="resnet"):
        grid(["resnet"], [1.0], [320], ["fp32"], SCENE_CLASSES)


def made_up(models: dict[str, float]) -> list[Candidate]:
    every = itertools.product(models, (0.35, 0.5, 0.75, 1.0, 1.4), range(160, 417, 32), ("fp32", "int8"))
    return [Candidate(Shape(m, w, s), p, models[m] * 1e9 * w**1.8 * (s / 320) ** 2) for m, w, s, p in every]  # type: ignore[arg-type]


def takes_ms(candidate: Candidate) -> float:
    """Overhead, a speed of each family, and int8 that is not a constant factor: nothing that the search assumes."""
    speed = {"slow": 40e6, "fast": 90e6, "huge": 110e6}[candidate.shape.model]
    ms = 0.4 + candidate.macs / speed
    return ms if candidate.precision == "fp32" else 0.5 + 0.35 * ms


@pytest.mark.parametrize("budget_ms", [3.0, 8.0, 25.0])
def test_few_measurements_find_the_largest_that_fit(budget_ms: float) -> None:
    candidates = made_up({"slow": 0.7, "fast": 0.5, "huge": 30.0})
    search, measured = Search(candidates, budget_ms, rate=50e6), dict[Candidate, float | None]()
    while chosen := search.next_round(measured):
        assert not set(chosen) & set(measured)
        assert len({candidate.line for candidate in chosen}) == len(chosen)
        measured.update({candidate: takes_ms(candidate) for candidate in chosen})
    assert search.left(measured) == 0
    assert len(measured) <= 40
    for line in {candidate.line for candidate in candidates}:
        fitting = [c for c in candidates if c.line == line and takes_ms(c) <= budget_ms]
        found = [c for c in measured if c.line == line and takes_ms(c) <= budget_ms]
        if fitting:
            assert max(c.macs for c in found) == max(c.macs for c in fitting)


def test_what_cannot_be_measured_is_not_tried_again() -> None:
    candidates = made_up({"slow": 0.7})
    search, measured = Search(candidates, 8.0, rate=50e6), dict[Candidate, float | None]()
    for _ in range(len(candidates)):
        chosen = search.next_round(measured)
        measured.update({candidate: None if candidate.precision == "int8" else 4.0 for candidate in chosen})
        if not chosen:
            break
    assert search.next_round(measured) == []


# -- ranking and recipes ---------------------------------------------------------------------------------------------


def row(model: str, width: float, size: int, precision: str, macs: float, ms: float) -> dict[str, Any]:
    shape = Shape(model, width, size)
    return {
        "name": f"{shape.name}-{precision}", "model": model, "width": width, "input_size": size, "precision": precision,
        "macs": macs, "parameters": 10**6, "latency_ms": {"median": ms, "p90": ms, "samples": 60},
        "stages_ms": {"pre": 0.5, "infer": ms - 1.0, "post": 0.5}, "roof": {"share": 0.5},
    }  # fmt: skip


ROWS = [
    row(SSD, 1.0, 224, "fp32", 4e8, 7.5),
    row(SSD, 0.5, 224, "fp32", 1e8, 3.0),  # covered by the one above
    row(SSD, 1.0, 320, "int8", 8e8, 7.9),
    row(SSD, 0.5, 416, "int8", 5e8, 6.0),
    row(NANO, 0.5, 256, "fp32", 3e8, 7.0),
    row(NANO, 1.4, 416, "fp32", 30e8, 60.0),  # over the budget
    row("yolov3-tiny", 0.5, 224, "fp32", 9e8, 7.9),
    {"name": "broken", "failed": "it broke"},
]


def test_best_first_is_one_of_each_family_then_the_rest() -> None:
    assert [found["name"] for found in ranked(ROWS, 8.0)] == [
        f"{NANO}-w0.5-256-fp32", f"{SSD}-w1-320-int8", "yolov3-tiny-w0.5-224-fp32",
        f"{SSD}-w0.5-416-int8", f"{SSD}-w1-224-fp32",
    ]  # fmt: skip
    assert ranked(ROWS, 1.0) == []


def base_recipe(scenes: Path, folder: Path, **changes: Any) -> Recipe:
    text: dict[str, Any] = {
        "name": "base",
        "data": {"root": str(scenes)},
        "student": {"model": SSD, "input_size": 96, "options": {"min_scale": 0.2}},
        "teachers": [{"name": "t", "train": {"model": SSD, "input_size": 96, "width": 0.35}}],
        "train": {"epochs": 3},
        **changes,
    }
    file = folder / "base.yaml"
    file.write_text(json.dumps(text), encoding="utf-8")
    return load_recipe(file)


def test_recipes_take_all_but_the_student_from_the_base(scenes: Path, tmp_path: Path) -> None:
    base = base_recipe(scenes, tmp_path)
    chosen = [row(NANO, 0.5, 96, "fp32", 1e8, 5.0), row(SSD, 0.35, 96, "int8", 1e8, 5.0)]
    files, notes = write_recipes(chosen, base, None, tmp_path, 1, 8.0)
    assert [file.name for file in files] == [f"01-{NANO}-w0.5-96-fp32.yaml", f"02-{SSD}-w0.35-96-int8.yaml"]
    nano, ssd = (load_recipe(file, needs=("data", "teachers")) for file in files)
    assert (nano.student.model, nano.student.width, nano.student.options) == (NANO, 0.5, {})
    assert ssd.student.options == {"min_scale": 0.2}
    assert (nano.export.precisions, ssd.export.precisions) == (("fp32",), ("fp32", "int8"))
    for recipe in (nano, ssd):
        assert (recipe.data, recipe.teachers, recipe.train) == (base.data, base.teachers, base.train)
        assert recipe.bench.threads == 1
    assert notes == []
    assert "5.00 ms" in files[0].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "width", "model", "weights", "freeze"),
    [
        ("imagenet", 1.0, SSD, "imagenet", 8),
        ("imagenet", 0.5, SSD, "imagenet", 0),  # a part of its channels: a start, nothing to keep
        ("imagenet", 1.4, SSD, None, 0),
        ("imagenet", 1.0, "efficientnet-lite0-ssd-lite", "imagenet", 8),
        ("imagenet", 0.5, "vgg16-ssd", None, 0),
        ("imagenet", 1.0, "mobilenetv1-ssd-lite", None, 0),  # has no official weights
        ("mine.pth", 0.5, SSD, "mine.pth", 0),
        ("mine.pth", 1.0, "efficientnet-lite0-ssd-lite", None, 0),
        (None, 1.0, SSD, None, 0),
    ],
)
def test_candidates_start_from_the_weights_they_can_have(
    scenes: Path, tmp_path: Path, given: str | None, width: float, model: str, weights: str | None, freeze: int
) -> None:
    student = {"model": SSD, "input_size": 96, "weights": given}
    base = base_recipe(scenes, tmp_path, student=student, train={"epochs": 3, "freeze_stride": 8 if given else 0})
    [file], _ = write_recipes([row(model, width, 96, "fp32", 1e8, 5.0)], base, None, tmp_path, None, 8.0)
    found = load_recipe(file)
    assert (found.student.weights and Path(found.student.weights).name) == weights
    assert found.train.freeze_stride == freeze


def test_terms_that_do_not_fit_give_way(scenes: Path, tmp_path: Path) -> None:
    term = {"loss": "feature", "student_taps": ["no.such"], "teacher_taps": ["no.such"]}
    base = base_recipe(scenes, tmp_path, distill={"terms": [term]})
    [file], [note] = write_recipes([row(NANO, 0.35, 96, "fp32", 1e8, 5.0)], base, None, tmp_path, None, 8.0)
    assert [term.loss for term in load_recipe(file).distill.terms] == ["response"]
    assert "feature" in note


@pytest.mark.parametrize("given", [True, False])
def test_without_a_base_the_data_is_filled_in(scenes: Path, tmp_path: Path, given: bool) -> None:
    section = DataConfig(root=str(scenes)) if given else None
    [file], notes = write_recipes([row(NANO, 0.35, 96, "int8", 1e8, 5.0)], None, section, tmp_path, 2, 8.0)
    recipe = load_recipe(file, needs=("data",) if given else ())
    assert "no teachers" in notes[-1]
    assert any("made up" in note for note in notes) is not given
    assert recipe.bench.threads == 2
    assert recipe.export.precisions == ("fp32", "int8")
    assert recipe.student.weights is None


def test_without_a_base_a_backbone_with_official_weights_starts_from_them(scenes: Path, tmp_path: Path) -> None:
    section = DataConfig(root=str(scenes))
    [file], _ = write_recipes([row(SSD, 0.5, 96, "fp32", 1e8, 5.0)], None, section, tmp_path, None, 8.0)
    assert load_recipe(file).student.weights == "imagenet"


def test_several_recipes_give_all_their_teachers(scenes: Path, tmp_path: Path) -> None:
    first = base_recipe(scenes, tmp_path)
    other = {"name": "u", "train": {"model": NANO, "input_size": 96}}
    second = base_recipe(scenes, tmp_path, teachers=[*(t.model_dump() for t in first.teachers), other])
    both = combined([first, second])
    assert both is not None
    assert [teacher.name for teacher in both.teachers] == ["t", "u"]
    clashing = base_recipe(scenes, tmp_path, teachers=[{**other, "name": "t"}])
    with pytest.raises(RecipeError, match="same name"):
        combined([first, clashing])
    assert combined([]) is None


# -- the whole plan --------------------------------------------------------------------------------------------------


class Made:
    """A meter that knows without measuring."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def measure(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, dict[str, Any]]]:
        for c in candidates:
            self.asked.append(c.name)
            yield c, row(c.shape.model, c.shape.width, c.shape.input_size, c.precision, c.macs, c.macs / 5e7)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()
    monkeypatch.setattr(job, "_meter", lambda *rest: made)
    monkeypatch.setattr(job, "cpu_roof", lambda threads: {"gmacs_per_s": {"fp32": 100.0}, "copy_gb_per_s": 10.0})
    return made


def planned(
    out: Path, budget_ms: float = 8.0, candidates: Sequence[Candidate] | None = None, **changes: Any
) -> dict[str, Any]:
    asked = Asked(budget_ms, **{"threads": 1, **changes})
    candidates = candidates or made_up({NANO: 1.0, SSD: 0.7})
    return make_plan(candidates, asked, out, class_names=SCENE_CLASSES, images=None)


def test_a_plan_goes_on_with_what_it_has(tmp_path: Path, meter: Made) -> None:
    first = planned(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == first
    assert first["left"] == 0
    assert first["best"][0].startswith(NANO)
    assert len(first["recipes"]) == 6
    assert all((tmp_path / name).is_file() for name in first["recipes"])
    measured = len(meter.asked)
    again = planned(tmp_path, top=2)
    assert len(meter.asked) == measured, "nothing is measured twice"
    assert again["best"] == first["best"]
    assert sorted(file.name for file in tmp_path.glob("*.yaml")) == again["recipes"], "old recipes are gone"
    planned(tmp_path, budget_ms=3.0)
    assert len(set(meter.asked)) == len(meter.asked) > measured, "another budget needs others, and keeps what it can"
    planned(tmp_path, threads=2)
    assert len(set(meter.asked)) < len(meter.asked), "other circumstances start anew"


def test_recipes_of_the_users_own_stay(tmp_path: Path, meter: Made) -> None:
    mine = tmp_path / "01-mine.yaml"
    mine.write_text("name: mine\n", encoding="utf-8")
    planned(tmp_path)
    planned(tmp_path, top=2)
    assert mine.read_text(encoding="utf-8") == "name: mine\n"
    assert len(list(tmp_path.glob("*.yaml"))) == 3


def test_recipes_that_were_edited_stay(tmp_path: Path, meter: Made) -> None:
    first, _, third = (tmp_path / name for name in planned(tmp_path, top=3)["recipes"])
    edited = {file: file.read_text(encoding="utf-8") + "seed: 5\n" for file in (first, third)}
    for file, text in edited.items():
        file.write_text(text, encoding="utf-8")
    for _ in range(2):
        again = planned(tmp_path, top=1)
        assert again["recipes"] == [first.name]
        assert {file: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.yaml")} == edited
        assert any(first.name in note and "stays" in note for note in again["notes"])
    first.unlink()
    planned(tmp_path, top=1)
    assert "seed: 5" not in first.read_text(encoding="utf-8")


def test_recipes_of_a_plan_that_was_cut_off_are_known(
    tmp_path: Path, meter: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off() -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(job, "source_commit", cut_off)  # asked for once the recipes are there
        with pytest.raises(KeyboardInterrupt):
            planned(tmp_path)
    assert len(list(tmp_path.glob("*.yaml"))) == 6
    again = planned(tmp_path, top=2)
    assert sorted(file.name for file in tmp_path.glob("*.yaml")) == again["recipes"]
    assert not any("stays" in note for note in again["notes"])


def test_a_narrower_plan_speaks_of_its_own_candidates(tmp_path: Path, meter: Made) -> None:
    wide = planned(tmp_path)
    few = [candidate for candidate in made_up({SSD: 0.7}) if candidate.shape.width == 1.4]
    found = planned(tmp_path, budget_ms=0.1, candidates=few)
    assert len(found["rows"]) >= len(wide["rows"]), "what is known is kept"
    assert set(found["measured"]) <= {candidate.name for candidate in few}
    assert found["within"] == []
    text = plan_text(found)
    assert f"{len(found['measured'])} of {len(few)} candidates measured, 0 within 0.1 ms" in text
    assert f"the fastest was {SSD}-w1.4" in text


def test_what_could_not_be_measured_is_counted_apart(
    tmp_path: Path, meter: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, dict[str, Any]]]:
        yield from ((candidate, {"name": candidate.name, "failed": "it broke"}) for candidate in candidates)

    monkeypatch.setattr(meter, "measure", fail)
    found = planned(tmp_path, candidates=made_up({SSD: 0.7})[:4])
    assert found["measured"] == []
    assert len(found["failed"]) == 4
    assert "0 of 4 candidates measured, 0 within 8 ms; 4 could not be: it broke" in plan_text(found)
    assert "none could be measured" in plan_text(found)


def test_time_ends_a_plan(tmp_path: Path, meter: Made) -> None:
    found = planned(tmp_path, time_limit_s=0.0)
    assert meter.asked == []
    assert found["left"] > 0
    assert any("run again" in note for note in found["notes"])
    assert "nothing" in plan_text(found)


def test_a_damaged_plan_is_not_overwritten(tmp_path: Path, meter: Made) -> None:
    (tmp_path / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="move it away"):
        planned(tmp_path)
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == "{"


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: [plan],
        lambda plan: None,
        lambda plan: {**plan, "rows": [{**plan["rows"][0], "latency_ms": {"median": float("nan")}}]},
        lambda plan: {**plan, "rows": [{"name": plan["rows"][0]["name"]}]},
        lambda plan: {**plan, "rows": [3]},
    ],
)
def test_a_plan_that_others_have_changed_is_refused(tmp_path: Path, meter: Made, damage: Callable[[Any], Any]) -> None:
    changed = json.dumps(damage(planned(tmp_path)))
    (tmp_path / "plan.json").write_text(changed, encoding="utf-8")
    with pytest.raises(UserError, match="move it away"):
        planned(tmp_path)
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == changed


def test_the_text_says_what_matters(tmp_path: Path, meter: Made) -> None:
    found = planned(tmp_path)
    text = plan_text(found)
    assert "accuracy is not measured" in text
    assert found["recipes"][0] in text
    assert "50%" in text


ONE = ("--models", SSD, "--widths", "0.35", "--input-sizes", "96", "--threads", "1")


def test_real_candidates_here(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.export.onnx.trace", traced)
    base_recipe(scenes, tmp_path)
    out = tmp_path / "plan"
    words = ("plan", "--max-latency-ms", 1e6, "--teachers", tmp_path / "base.yaml", "--out", out, *ONE)
    done = edgekd(*words, "--quiet", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["rows"]] == [f"{SSD}-w0.35-96-{p}" for p in ("fp32", "int8")]
    for measured in found["rows"]:
        stages, latency = measured["stages_ms"], measured["latency_ms"]
        assert min(stages.values()) > 0
        assert latency["samples"] >= 60
        assert latency["median"] >= max(stages.values())  # the whole takes as long as any part of it, on any machine
        assert measured["roof"]["share"] > 0
        assert measured["roof"]["bytes"] > 0
    fp32, int8 = found["rows"]
    assert int8["size_bytes"] < fp32["size_bytes"]
    assert fp32["macs"] == int8["macs"] > 10**6
    for name in found["recipes"]:
        assert edgekd("recipe", "check", out / name).exit_code == 0
    assert found["identity"]["images"] == f"{scenes.name}/train"


def test_mistakes_exit_2(tmp_path: Path) -> None:
    mistakes = {
        ("--widths", "wide"): "--widths: not numbers",
        ("--widths", "9"): "--widths: Input should be",
        ("--input-sizes", "100.5"): "--input-sizes: not whole numbers",
        ("--input-sizes", "2048"): "--input-sizes: Input should be",
        ("--input-sizes", "100", "--models", NANO): "cannot take this input size",
        ("--input-sizes", "100", "--models", f"{SSD}, {NANO}"): "cannot take this input size",
        ("--models", "nope"): "nope",
        ("--precision", "fp8"): "fp8",
        ("--teachers", str(tmp_path / "no")): "no recipe",
    }
    for words, message in mistakes.items():
        done = edgekd("plan", "--max-latency-ms", 8, "--out", tmp_path / "o", *words)
        assert done.exit_code == 2, done.output
        assert message in done.stderr


def test_on_a_device(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.export.onnx.trace", traced)
    with running_sshd(tmp_path) as server:
        target = f"ssh://{getpass.getuser()}@127.0.0.1:{server.port}"
        there = ("--target", target, "--target-python", sys.executable, "--ssh-config", server.config, "--host-ms", 2)
        words = ("plan", "--max-latency-ms", 1e6, "--data", scenes, "--out", tmp_path / "plan", "--device", "cpu", *ONE)
        done = edgekd(*words, *there, "--quiet", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["rows"]) == 2
    for measured in found["rows"]:
        assert measured["latency_ms"]["median"] == pytest.approx(measured["stages_ms"]["infer"] + 2)
        assert measured["stages_ms"]["pre"] is None
        assert measured["roof"]["share"] > 0
    assert any("--host-ms" in note for note in found["notes"])
