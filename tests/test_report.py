from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgekd.artifact import sha256_file, write_manifest
from edgekd.bench.entries import BenchArtifact, BenchEnsemble
from edgekd.bench.runner import bench_artifacts
from edgekd.cli import app
from edgekd.errors import ArtifactError, UserError
from edgekd.recipe import BenchConfig
from edgekd.report import svg, words
from edgekd.report.commands import commands_of
from edgekd.report.page import write_report
from edgekd.report.shape import RESULT, measured
from edgekd.report.sources import collect
from edgekd.report.table import write_table
from edgekd.report.tradeoff import pareto_front
from edgekd.report.training import training_runs
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, POOR_SCORES, make_dataset, write_detector

HOSTILE = "<script>alert(1)</script>\"'&|"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `edgekd run` leaves: a real benchmark of tiny detectors, with logs of made-up trainings."""
    folder = tmp_path_factory.mktemp("run")
    good = write_detector(folder / "export" / "good.onnx", GOOD_BOXES, GOOD_SCORES, width=64)
    poor = write_detector(folder / "export" / "poor.onnx", GOOD_BOXES, POOR_SCORES)
    bench_artifacts(
        [
            BenchArtifact(good, "one", "teacher"),
            BenchArtifact(good, HOSTILE, "teacher"),
            BenchArtifact(poor, "alone", "student"),
            BenchArtifact(good, "distilled", "student_distilled"),
            BenchArtifact(poor, "distilled-int8", "student_distilled"),
        ],
        make_dataset(folder / "data"),
        config=BenchConfig(samples=20, warmup_seconds=0.0, threads=1),
        out=folder / "bench" / "result.json",
        ensemble=BenchEnsemble(("one", HOSTILE)),
        synthetic=True,
        memory=False,
    )
    for name in ("student", "distilled", "teachers/one"):
        records = [
            {"event": "step", "step": i, "steps": 200, "epoch": i // 20, "epochs": 10,
             "losses": {"loss": 3.0 / (i + 1), HOSTILE: 1.0 / (i + 1)}, "lr": 0.1, "images_per_s": 3.0}
            for i in range(200)
        ]  # fmt: skip
        records += [
            {"event": "eval", "step": 100, "map": {"ap50": 0.4}},
            {"event": "eval", "step": 200, "map": {"ap50": None}},
        ]
        path = folder / name / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(map(json.dumps, records)) + '\n{"event": "step", "st')  # cut off by a kill
    (folder / "recipe.yaml").write_text(f"name: demo\nnote: {json.dumps(HOSTILE)}\n")
    return folder


class Page(HTMLParser):
    """Tags, ids, attributes and text of a page; complains about tags closed in the wrong order."""

    VOID = frozenset({"meta", "link", "br", "image", "use"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(run_folder: Path) -> str:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_is_whole_small_and_self_contained(html: str) -> None:
    page = Page(html)
    assert len(html.encode()) < 5_000_000
    names = [tag for tag, _ in page.tags]
    assert not set(names) & {"iframe", "object", "embed", "base", "form"}
    assert names.count("script") == 1  # ours, and nothing but it may run:
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "action", "xlink:href"):
            if (value := attributes.get(key)) is not None:
                assert value.startswith(("#", "data:")), (tag, value)
        assert not [key for key in attributes if key.startswith("on")], tag
    assert not re.search(r"url\(|@import", html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"] for t, a in page.tags if t == "use"} <= {f"#{i}" for i in ids}


def test_names_cannot_inject(html: str) -> None:
    assert html.count("<script") == 1
    assert "<script>alert" not in html
    assert "alert(1)" in html  # it is shown, as text
    assert HOSTILE in Page(html).text


def test_every_plot_is_there_and_says_what_it_shows(html: str) -> None:
    page = Page(html)
    labels = [a["aria-label"] or "" for t, a in page.tags if t == "svg" and a.get("role") == "img"]
    for start in (
        "Accuracy against latency. one: ", "Stage times.", "Spread of latency.",
        "Precision and recall.", "AP50 by class. round: ", "AP50 by size. ", "Share of the roof.",
        "Validation accuracy while training.", "Losses of student.",
        "Ground truth of im", "Ensemble on im", "Distilled student (distilled) on im",
    ):  # fmt: skip
        assert any(label.startswith(start) for label in labels), start
    assert all(a.get("role") == "img" or a.get("aria-hidden") for t, a in page.tags if t == "svg")
    geometry = "".join(re.findall(r' (?:d|x|y|x1|y1|width|height|viewBox)="([^"]*)"', html))
    assert not re.search("nan|inf", geometry, re.IGNORECASE)


def test_page_says_what_matters(html: str) -> None:
    text = " ".join(Page(html).text.split())
    assert text.count("synthetic") >= 5
    assert "The distilled student (distilled) is" in text
    assert "Against alone, a student trained alone:" in text
    assert "that is another network, so this does not show what distillation brings." in text
    assert "edgekd run recipe.yaml --out RUN" in text
    assert "no difference shown" in text  # int8 against alone: the same detector
    assert re.search(r"[0-9a-f]{64}", text)


@pytest.mark.parametrize("left", ["result alone", "a file", "damaged detections", "no rows"])
def test_everything_but_the_result_is_optional(run_folder: Path, tmp_path: Path, left: str) -> None:
    result = json.loads((run_folder / "bench" / "result.json").read_text())
    if left == "no rows":
        result |= {"rows": [], "comparisons": [], "reference": None}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    if left == "damaged detections":
        (tmp_path / "detections.npz").write_bytes(b"PK\x03\x04 no")
    page = write_report(path if left == "a file" else tmp_path, tmp_path / "out" / "page.html")
    text = Page(page.read_text(encoding="utf-8")).text
    assert "no detections and examples beside the result" in text
    assert ("Could not be read" in text) == (left == "damaged detections")
    assert str(tmp_path) not in text  # pages are passed on
    assert ("Nothing was measured." in text) == (left == "no rows")


def test_detections_of_another_benchmark_are_not_drawn(run_folder: Path, tmp_path: Path) -> None:
    """A benchmark that was killed while it wrote, or a file copied over another."""
    copy = shutil.copytree(run_folder / "bench", tmp_path / "bench")
    assert collect([copy]).saved is not None
    with np.load(copy / "detections.npz") as saved:
        np.savez(copy / "detections.npz", **{**saved, "0/scores": saved["0/scores"] / 2})
    found = collect([copy])
    assert found.saved is None
    assert found.problems == ["pictures: detections.npz is not the file that result.json was written with"]


def test_no_result(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing to report"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_without_objects(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", images=1, class_names=("round", "square"))
    record = dataset.records[0]
    none = np.zeros(0, bool)
    empty = type(record)(
        record.image_id, record.path, record.image_hw, np.zeros((0, 4), np.float32), np.zeros(0, int), none, none
    )
    dataset = type(dataset)(dataset.root, dataset.format, dataset.split, dataset.class_names, (empty,))
    path = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES)
    config = BenchConfig(samples=20, warmup_seconds=0.0, threads=1)
    artifacts = [BenchArtifact(path, "t", "teacher"), BenchArtifact(path, "s")]
    bench_artifacts(artifacts, dataset, config=config, out=tmp_path / "result.json", memory=False)
    assert "their accuracy could not be compared" in write_report(tmp_path).read_text(encoding="utf-8")


def test_the_command_measures_the_same_again(run_folder: Path, tmp_path: Path) -> None:
    result = json.loads((run_folder / "bench" / "result.json").read_text())
    found = dict(commands_of(collect([run_folder])))["The benchmark alone, from the exported files"]
    assert not any(option in found for option in ("--runtime", "--mode", "--batch", "--mlperf"))
    for row in result["rows"]:
        row.update(artifact="a.onnx", runtime="openvino")
    student = next(row for row in result["rows"] if row["role"] == "student")
    result["rows"].append({**student, "name": f"{student['name']}+onnxruntime", "runtime": "onnxruntime"})
    result["settings"].update(mode="throughput", streams=2, mlperf="MultiStream", mlperf_seconds=3.0)
    (tmp_path / "result.json").write_text(json.dumps(result))
    found = dict(commands_of(collect([tmp_path])))["The benchmark alone, from the exported files"]
    assert f":{student['name']}=a.onnx" in found
    assert "+onnxruntime=" not in found
    assert "--runtime openvino --runtime onnxruntime" in found
    assert "--mode throughput --streams 2 --batch 1" in found
    assert "--mlperf MultiStream --mlperf-seconds 3.0" in found


def test_training_curves_follow_the_log(run_folder: Path) -> None:
    runs = {run.name: run for run in training_runs(run_folder)}
    assert set(runs) == {"student", "distilled", "one"}
    assert runs["one"].role == "teacher"
    curve = runs["student"].losses["loss"]
    assert len(curve) == 120
    assert 9.5 < curve[-1][0] < 10
    assert runs["student"].accuracy == [(5.0, 40.0)]


def make_result(**changes: object) -> dict:
    def row(name: str, role: str, speedup: float | None, interval: list[float] | None) -> dict:
        return {
            "name": name, "role": role, "precision": "fp32", "latency_ms": {"median": 20.0, "p90": 25.0},
            "stages_ms": {"pre": 1.0, "infer": 18.0, "post": 1.0}, "map": {"ap50": 0.8, "ap": 0.5, "voc07": None},
            "speedup_vs_ensemble": speedup, "speedup_interval": interval, "parameters": 3e6, "macs": None,
            "size_bytes": 12e6, "peak_memory_bytes": None,
        }  # fmt: skip

    def comparison(a: str, b: str, role: str, difference: float, low: float, high: float) -> dict:
        return {"a": a, "b": b, "a_role": "student_distilled", "b_role": role, "difference": difference, "low": low,
                "high": high, "images": 1700, "difference_shown": not low <= 0 <= high}  # fmt: skip

    return {
        "rows": [
            row("kd", "student_distilled", 9.13, [8.8, 9.4]),
            row("alone", "student", 9.1, [8.8, 9.4]),
            row("ens", "ensemble", 1.0, [1.0, 1.0]),
        ],
        "reference": "ens",
        "comparisons": [
            comparison("kd", "alone", "student", 0.021, 0.009, 0.034),
            comparison("kd", "ens", "ensemble", -0.008, -0.015, -0.001),
        ],
        "data": {"name": "voc", "split": "val", "images": 1700, "synthetic": False},
        "device": {"cpu": "A|B <c>", "machine": "x"},
        "settings": {"threads": 1, "rounds": 20, "block": 10},
        **changes,
    }


def plain(text: str | None) -> str:
    """Typed characters for typeset ones."""
    return (text or "").translate({0xA0: " ", 0x2212: "-", 0xD7: "x"})


def test_the_answer_in_one_sentence() -> None:
    result = make_result()
    assert plain(words.answer(result)) == (
        "The distilled student is 9.1x faster than its ensemble, -0.8 AP50 points [-1.5, -0.1], 1,700 images."
    )
    assert plain(words.gain(result)) == (
        "Distillation brings it +2.1 AP50 points [+0.9, +3.4] over the same student trained alone. "
        "One training of each: the interval is over images, not over seeds."
    )


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"precision": "int8"}, "another precision"),
        ({"parameters": 2e6}, "another network"),
        ({"model": "yolo-nano"}, "another network"),
        ({"input_hw": [[640, 640]], "macs": 5e9}, "another input size"),
        ({"parameters": 2e6, "precision": "fp16"}, "another network and another precision"),
        ({"parameters": None}, "a network not known to be the same"),
        ({"counted_from": "graph", "parameters": 2e6}, "a network not known to be the same"),
    ],
)
def test_another_student_is_not_called_the_same(changes: dict, differs: str) -> None:
    result = make_result()
    for row in result["rows"]:
        row.update(model="mobilenetv1-ssd-lite", macs=1e9, input_hw=[[320, 320]], counted_from="detector")
    result["rows"][1].update(changes)
    assert plain(words.gain(result)) == (
        f"Against alone, a student trained alone: +2.1 AP50 points [+0.9, +3.4]; that is {differs}, so this does not show "
        "what distillation brings. One training of each: the interval is over images, not over seeds."
    )
    assert plain(words.gain(measured(result, RESULT))) == plain(words.gain(result))
    result["data"] |= {"images": 12}
    assert str(words.gain(result)).endswith(
        "not over seeds. On so few images (12) the interval over images is too narrow."
    )


def test_figures_of_an_earlier_recipe_are_told_from_those_of_this_one(tmp_path: Path) -> None:
    """As after `edgekd run` with a changed recipe was broken off: the recipe is there, the benchmark is the old one."""
    recipe, bench = tmp_path / "recipe.yaml", tmp_path / "bench"
    recipe.write_text("name: demo\ntrain: {epochs: 1}\n")
    written(bench, {"result.json": make_result(schema="edgekd.result/1")})
    write_manifest(bench, "bench", {}, ["result.json"], {"recipe": sha256_file(recipe)})
    (tmp_path / "student").mkdir()
    write_manifest(tmp_path / "student", "run", {}, [], {})

    def report() -> tuple[str, str]:
        done = CliRunner().invoke(app, ["report", str(tmp_path), "--quiet"])
        assert done.exit_code == 0, done.output
        return done.stderr, (tmp_path / "report.html").read_text(encoding="utf-8")

    said, html = report()
    assert "before this recipe" not in said + html
    recipe.write_text("name: demo\ntrain: {epochs: 2}\n")
    said, html = report()
    assert "measured before this recipe: the recipe has changed since" in " ".join(said.split())
    assert "Measured before this recipe: the recipe has changed since." in html
    (tmp_path / "student" / "manifest.json").unlink()
    assert "student is being trained again" in report()[1]
    written(bench, {"result.json": make_result(schema="edgekd.result/1", created="by hand, later")})
    assert "before this recipe" not in "".join(report())
    (tmp_path / "student" / "manifest.json").write_text("")
    written(bench, {"result.json": make_result(schema="edgekd.result/1")})
    write_manifest(bench, "bench", {}, ["result.json"], {"recipe": sha256_file(recipe)})
    assert "student/manifest.json is damaged" in report()[1]
    (bench / "manifest.json").write_text("{")
    said, html = report()
    assert "before this recipe" not in said + html
    assert "bench/manifest.json is damaged" in html


def test_what_was_not_measured_is_no_figure(tmp_path: Path) -> None:
    result = make_result(schema="edgekd.result/1", reference=None, comparisons=[])
    student = result["rows"][0]
    student["map"]["ap50"] = None
    assert plain(words.answer(result)) == (
        "The distilled student takes 20.0 ms an image over 1,700 images; its accuracy was not measured."
    )
    html = write_report(written(tmp_path, {"result.json": result})).read_text(encoding="utf-8")
    tiles = re.search(r'<dl class="tiles">(.*?)</dl>', html, re.DOTALL)
    assert tiles
    assert words.NOTHING not in tiles[1]
    assert "Peak memory" not in tiles[1]
    student["latency_ms"]["median"] = None
    assert words.answer(result) == "Neither accuracy nor latency of the distilled student was measured."
    student["map"]["ap50"] = 0.5
    assert "reaches 50.0 AP50 over 1,700 images; its latency was not" in plain(words.answer(result))
    result["rows"][2]["peak_memory_bytes"] = 1e8
    result["reference"] = "ens"
    html = write_report(written(tmp_path, {"result.json": result})).read_text(encoding="utf-8")
    assert "<dt>Peak memory</dt><dd>not measured<small>ensemble: 100 MB</small>" in html


def test_no_difference_is_said_plainly() -> None:
    result = make_result()
    for comparison in result["comparisons"]:
        comparison.update(difference=0.001, low=-0.01, high=0.012, difference_shown=False)
    result["rows"][0].update(speedup_vs_ensemble=1.01, speedup_interval=[0.98, 1.04])
    result["data"]["synthetic"] = True
    assert plain(words.answer(result)) == (
        "The distilled student is not shown to be faster or slower than its ensemble, with no difference in accuracy "
        "shown: +0.1 AP50 points [-1.0, +1.2], 1,700 synthetic images."
    )
    assert plain(words.gain(result)).startswith("Distillation is not shown to make a difference")


def test_slower_and_worse_are_said_too() -> None:
    result = make_result()
    result["rows"][0].update(speedup_vs_ensemble=0.5, speedup_interval=[0.45, 0.55])
    result["comparisons"][0].update(difference=-0.02, low=-0.03, high=-0.01)
    assert "is 2.0x slower than its ensemble" in plain(words.answer(result))
    assert plain(words.gain(result)).startswith("Distillation costs it accuracy")


def test_answers_without_comparison() -> None:
    result = make_result(reference=None, comparisons=[])
    assert (
        plain(words.answer(result)) == "The distilled student reaches 80.0 AP50 at 20.0 ms an image over 1,700 images."
    )
    only_teacher = make_result(reference=None, comparisons=[])
    only_teacher["rows"] = [only_teacher["rows"][2]]
    assert plain(words.answer(only_teacher)).startswith("The ensemble reaches 80.0 AP50")
    assert words.answer(make_result(rows=[])) == "Nothing was measured."


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.04, "0.0"), (0.0, "0.0"), (-1.26, "-1.3"), (1234.5, "+1,234.5"), (0.06, "+0.1")]
)
def test_signed(value: float, shown: str) -> None:
    assert plain(words.signed(value)) == shown


def test_a_page_replaces_no_file_of_another_kind(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine")
    with pytest.raises(UserError, match="of another kind"):
        write_report(written(tmp_path / "run", samples()), recipe)
    assert recipe.read_text() == "name: mine"


def test_markdown_table() -> None:
    result = make_result()
    result["rows"][0]["name"] = "a|b\n<i>"
    lines = write_table(result, ".md").splitlines()
    cells = [re.split(r"(?<!\\)\|", line) for line in lines[:5]]
    assert len({len(row) for row in cells}) == 1
    assert "a\\|b &lt;i&gt; fp32" in lines[2]
    assert "A\\|B &lt;c&gt;" in lines[-1]
    assert "faster than its ensemble" in plain(lines[-3])
    assert "batch 1, 1 thread on" in lines[-1]


@pytest.mark.parametrize(
    ("low", "high", "log", "least"),
    [(0, 100, False, 4), (9.5, 310, True, 3), (0.93, 1.21, True, 3), (3.2, 3.3, False, 3)],
)
def test_ticks_are_round_and_within(low: float, high: float, log: bool, least: int) -> None:
    ticks = svg.Scale(low, high, 0, 100, log).ticks(5)
    assert least <= len(ticks) <= 8
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)
    assert all(len(svg.tick_label(tick)) <= 5 for tick in ticks)


def test_csv_has_every_figure_and_no_formula() -> None:
    result = make_result()
    result["rows"][0] |= {"name": "=HYPERLINK(1)", "latency_ms": {"median": 20.125, "median_interval": [19.5, 21.0]}}
    rows = list(csv.DictReader(io.StringIO(write_table(result, ".csv"))))
    assert [row["role"] for row in rows] == ["student_distilled", "student", "ensemble"]
    assert rows[0]["name"] == "'=HYPERLINK(1)"
    figures = [rows[0][f"latency_ms.{key}"] for key in ("median", "median_interval.low", "median_interval.high")]
    assert figures == ["20.125", "19.5", "21.0"]
    assert rows[0]["map.voc07"] == ""


def test_latex_is_escaped() -> None:
    result = make_result()
    result["rows"][0]["name"] = r"a_b & 50% \input{x} [y]"
    text = write_table(result, ".tex")
    assert r"a\_b \& 50\% \textbackslash{}input\{x\} {[}y] fp32 & 80.0" in text
    assert text.count(r"\\") == 1 + len(result["rows"])
    assert r"9.1$\times$" in text
    with pytest.raises(UserError, match="format"):
        write_table(result, ".xlsx")


def test_pareto_front() -> None:
    rows = measured(make_result(), RESULT)["rows"]
    for row, (ms, ap) in zip(rows, [(1.0, 0.3), (2.0, 0.2), (3.0, 0.5)], strict=True):
        row["latency_ms"]["median"], row["map"]["ap50"] = ms, ap
    assert [row["name"] for row in pareto_front(rows)] == ["kd", "ens"]


SAMPLES = Path(__file__).parent / "report_samples.json"


def samples() -> dict[str, dict]:
    """One small file of each schema, with every key that a page reads."""
    return {"result.json": make_result(schema="edgekd.result/1"), **json.loads(SAMPLES.read_text(encoding="utf-8"))}


def written(folder: Path, files: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return folder


def test_one_page_of_a_benchmark_a_comparison_a_device_and_a_video(tmp_path: Path) -> None:
    text = Page(write_report(written(tmp_path, samples())).read_text(encoding="utf-8")).text
    said = " ".join(plain(text).split())
    for part in (
        "No gain is shown for kd: +1.0 AP50 points [-4.1, +6.1] over 3 seeds",
        "The distilled student is 2.5x faster than its ensemble on NVIDIA Jetson Orin Nano.",
        "L4T 36.4.3, JetPack 6.2, power mode 15W", "gpu-thermal 47 → 55 °C", "cpu0 1,510 MHz (pinned)", "none seen",
        "61.5", "8 of 9", "street.mp4, 1280 x 720, 30.0 frames a second", "6.7 %",
        "edgekd compare kd.yaml --seeds 0,1,2 --out DIR", "git checkout 0123456789abcdef",
    ):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("comparison.json", "No gain is shown for kd"),
        ("device-result.json", "2.5x faster than its ensemble on NVIDIA Jetson Orin Nano."),
        ("video.json", "distilled sustains 28.0 frames a second on street.mp4."),
    ],
)
def test_each_kind_of_result_makes_a_page_alone(tmp_path: Path, name: str, answer: str) -> None:
    html = write_report(written(tmp_path, {name: samples()[name]}) / name, tmp_path / "page.html").read_text("utf-8")
    found = re.search(r'<p class="answer">(.*?)</p>', html)
    assert found
    assert answer in plain(found[1])
    assert "no result of edgekd bench among these files" in html


def test_a_gain_that_is_shown_is_told_before_a_larger_one_that_is_not(tmp_path: Path) -> None:
    data = samples()["comparison.json"]
    row = next(row for row in data["rows"] if "gain" in row)
    data["rows"].append({**row, "method": "sure", "gain": {**row["gain"], "ap50": 0.005, "verdict": "gain"}})
    html = write_report(written(tmp_path, {"comparison.json": data}), tmp_path / "page.html").read_text("utf-8")
    assert "sure brings +0.5 AP50 points" in plain(html)


def test_the_best_method_s_lead_is_in_the_page(tmp_path: Path) -> None:
    data = samples()["comparison.json"]
    gain = next(row["gain"] for row in data["rows"] if "gain" in row)
    data["best"] = {
        "method": "kd",
        "seeds": [0, 1, 2],
        "ahead_of": {"other": {**gain, "ap50": 0.03, "verdict": "gain"}},
    }
    html = write_report(written(tmp_path, {"comparison.json": data}), tmp_path / "page.html").read_text("utf-8")
    said = " ".join(Page(html).text.split())
    assert re.search(r"kd, the highest mean, ahead of.*other\+3\.0.*ahead Gain by class", plain(said))


def test_a_page_tells_what_several_methods_and_few_seeds_do_to_a_comparison(tmp_path: Path) -> None:
    data = samples()["comparison.json"]
    row = next(row for row in data["rows"] if "gain" in row)

    def page() -> str:
        html = write_report(written(tmp_path, {"comparison.json": data}), tmp_path / "page.html").read_text("utf-8")
        return " ".join(plain(Page(html).text).split())

    data["rows"].append({**row, "method": "other"})
    assert "judged at 95 %" not in page(), "two are compared with each other as well"
    assert "Seeds that would decide" not in page(), "a file of before says nothing of them"
    data["rows"].append({**row, "method": "open", "gain": {**row["gain"], "seeds_to_show": 1000}})
    assert "Seeds that would decide what is not shown, if mean and spread stayed: open 1,000." in page()
    assert "Each of 3 methods is judged at 95 % by itself" in page()


def test_several_folders_make_one_page(tmp_path: Path) -> None:
    parts = samples()
    folders = [written(tmp_path / str(i), {name: data}) for i, (name, data) in enumerate(parts.items())]
    out, tables = tmp_path / "page.html", [tmp_path / "table.csv", tmp_path / "table.md"]
    arguments = ["report", *map(str, folders), "--out", str(out), "--json"]
    arguments += [part for table in tables for part in ("--table", str(table))]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"report": str(out), "tables": [str(table) for table in tables]}
    html = out.read_text(encoding="utf-8")
    assert all(f'id="{part}"' in html for part in ("comparison", "gains0", "device0", "video0"))
    assert all("kd" in table.read_text(encoding="utf-8") for table in tables)
    refused = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "b.html"), "--table", "x.xlsx"])
    assert refused.exit_code == 2
    assert not (tmp_path / "b.html").exists()


def test_names_that_are_no_utf_8_break_no_page(tmp_path: Path) -> None:
    result = make_result(schema="edgekd.result/1")
    result["data"]["name"] = "d\udce9"
    tables = [tmp_path / "table.md", tmp_path / "table.csv"]
    page = write_report(written(tmp_path, {"result.json": result}), tables=tables)
    assert "d\\xe9" in page.read_text(encoding="utf-8")
    assert "d\\xe9" in tables[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["day: 2024-99-99", "[", "name: 7"])
def test_a_recipe_that_gives_no_title(tmp_path: Path, text: str) -> None:
    folder = written(tmp_path / "mine", {"device-result.json": samples()["device-result.json"]})
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    assert "<title>mine" in write_report(folder).read_text(encoding="utf-8")


def test_another_version_is_said_and_a_stranger_is_refused(tmp_path: Path) -> None:
    newer = samples()["result.json"] | {"schema": "edgekd.result/7"}
    html = write_report(written(tmp_path / "a", {"result.json": newer})).read_text(encoding="utf-8")
    assert "result.json is edgekd.result/7, of another version" in html
    for data in ({"schema": "other/1", "rows": []}, {"rows": []}, [], {"schema": "edgekd.result/1", "rows": 3}):
        with pytest.raises(ArtifactError, match="unknown schema"):
            write_report(written(tmp_path / "b", {"x.json": data}) / "x.json")
    (tmp_path / "b" / "x.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="not a readable result"):
        write_report(tmp_path / "b" / "x.json")


STRANGE = (
    None,
    True,
    -1,
    0,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    HOSTILE,
    [],
    {},
    [[]],
    [None, "a"],
    {"": 1},
)


def spoilt(value: object, rng: random.Random, odds: float) -> object:
    """A copy in which values here and there are something else, or gone."""
    if rng.random() < odds:
        return rng.choice(STRANGE)
    if isinstance(value, dict):
        return {k: spoilt(v, rng, odds) for k, v in value.items() if k in ("schema", "rows") or rng.random() > odds}
    return [spoilt(v, rng, odds) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(24))
def test_no_result_file_breaks_the_page(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    files = {}
    for name, data in samples().items():
        found = spoilt(data, rng, rng.choice((0.02, 0.1, 0.3)))
        found = found if isinstance(found, dict) else {}
        rows = found.get("rows")
        files[name] = found | {"schema": data["schema"], "rows": rows if isinstance(rows, list) else []}
    html = write_report(written(tmp_path, files), tables=[tmp_path / "t.csv"]).read_text(encoding="utf-8")
    assert html.count("<script") == 1
    Page(html)
    geometry = "".join(re.findall(r' (?:d|x|y|x1|y1|width|height|viewBox)="([^"]*)"', html))
    assert not re.search("nan|inf|e[+-]", geometry, re.IGNORECASE)
    for suffix in (".md", ".tex"):
        write_table(files["result.json"], suffix)


def test_a_page_stays_under_5_mb(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    for picture in (folder / "bench" / "examples").glob("*.jpg"):
        picture.write_bytes(picture.read_bytes() + bytes(400_000))
    html = write_report(folder).read_text(encoding="utf-8")
    assert 2_500_000 < len(html) < 5_000_000
    assert 0 < html.count('<figure class="example"') < 12


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_contrast(html: str, scheme: int) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what is drawn."""
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    ]
    full = {
        k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in (themes[0] | themes[scheme]).items()
    }
    pairs = [("ink", "paper", 4.5), ("ink-2", "paper", 4.5), ("ink", "card", 4.5), ("ink-2", "card", 4.5)]
    pairs += [("note-ink", "note", 4.5), ("ink", "hero", 4.5), ("ink-2", "hero", 4.5), ("ensemble", "paper", 4.5)]
    pairs += [(name, "paper", 3.0) for name in ("distilled", "alone", "teacher", "infer")]
    for ink, paper, least in pairs:
        light, dark = sorted((luminance(full[ink]), luminance(full[paper])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, (ink, paper)


def test_tables_and_controls_can_be_read_aloud(html: str) -> None:
    page = Page(html)
    assert all("scope" in a for t, a in page.tags if t == "th")
    assert all(a.get("aria-label") for t, a in page.tags if a.get("role") in ("region", "group", "img"))
    assert all(a.get("tabindex") == "0" for t, a in page.tags if a.get("role") == "region" or t == "pre")
    targets = {a["id"] for _, a in page.tags if "id" in a}
    links = [a["href"] for t, a in page.tags if t == "a"]
    assert len(links) > 5
    assert {str(link)[1:] for link in links} <= targets


def test_the_first_pictures_need_no_script(html: str) -> None:
    body = html[html.index("<div data-browse>") :]
    assert body[: body.index("<details>")].count('<figure class="example"') == 3
    assert re.search(r'<div class="browse-bar" hidden', body)


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(run_folder: Path, tmp_path: Path, width: int) -> None:
    """No horizontal scrolling, every plot drawn, nothing asked of the network, no complaints; pictures can be browsed."""
    parts = written(tmp_path / "parts", {k: v for k, v in samples().items() if k != "result.json"})
    write_report([run_folder, parts], tmp_path / "page.html")
    (tmp_path / "outer.html").write_text(
        f"""<!doctype html><iframe id=f src=page.html style="border:0;width:{width}px;height:800px"></iframe><script>
        onload = () => {{
          const d = f.contentDocument, root = d.documentElement;
          const shown = (all) => [...d.querySelectorAll(all)].filter((s) => s.getClientRects().length);
          const seen = () => shown('figure.example figcaption b').map((b) => b.textContent).join();
          const press = (which, n = 0) => d.querySelectorAll(which)[n].click();
          const first = seen();
          press('[data-step]', 1);
          const second = seen();
          d.querySelector('[data-browse]').dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowLeft'}}));
          const back = seen();
          press('[data-all]');
          const plots = shown('figure svg');
          document.title = JSON.stringify({{
            overflow: root.scrollWidth - root.clientWidth,
            plots: plots.length,
            empty: plots.filter((s) => s.getBBox().width < 1).length,
            unpainted: shown('figure svg path').filter((p) => {{
              const c = f.contentWindow.getComputedStyle(p);
              return c.fill === 'none' && c.stroke === 'none' || c.fill === 'rgb(0, 0, 0)';
            }}).map((p) => p.getAttribute('class')),
            requests: f.contentWindow.performance.getEntriesByType('resource')
              .filter((e) => !e.name.startsWith('data:')).length,
            first, second, back, all: shown('figure.example').length,
          }});
        }}</script>""",
        encoding="utf-8",
    )
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         "--window-size=1400,900", "--virtual-time-budget=4000", "--dump-dom", f"file://{tmp_path / 'outer.html'}"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(unescape(title[1]))
    assert seen["overflow"] == 0
    assert seen["plots"] >= 14 + 12 * 3
    assert seen["empty"] == 0
    assert seen["unpainted"] == []
    assert seen["requests"] == 0
    assert seen["first"] == seen["back"] != seen["second"]
    assert "," not in seen["first"] + seen["second"]
    assert seen["all"] == 12
    assert "CONSOLE" not in done.stderr
