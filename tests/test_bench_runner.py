from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgekd.bench.complexity import describe_artifact
from edgekd.bench.device import Contention, device_facts
from edgekd.bench.entries import BenchArtifact, BenchEnsemble
from edgekd.bench.examples import agreement, read_examples
from edgekd.bench.latency import Measurement
from edgekd.bench.layers import read_layers
from edgekd.bench.matching import match_coco
from edgekd.bench.memory import process_peak_bytes
from edgekd.bench.precision_recall import percentile_interval, resampled_ap50, share_interval
from edgekd.bench.result import _pairs as pairs_of
from edgekd.bench.result import compare, headline_rows, read_result
from edgekd.bench.runner import bench_artifacts, fingerprint
from edgekd.bench.saved import read_saved
from edgekd.errors import ArtifactError, ClassMapError, DataError
from edgekd.export.graph import set_metadata
from edgekd.export.onnx import detections_form
from edgekd.recipe import BenchConfig
from edgekd.selection import Selection
from edgekd.types import Dataset, Detections, ImageRecord
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, NAMES, POOR_SCORES, make_dataset, write_detector

CONFIG = BenchConfig(samples=20, warmup_seconds=0.0, threads=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, Dataset]:
    folder = tmp_path_factory.mktemp("bench")
    dataset = make_dataset(folder / "data")
    good = write_detector(folder / "good.onnx", GOOD_BOXES, GOOD_SCORES, width=16)
    poor = write_detector(folder / "poor.onnx", GOOD_BOXES, POOR_SCORES)
    artifacts = [
        BenchArtifact(good, "one", "teacher"),
        BenchArtifact(poor, "two", "teacher"),
        BenchArtifact(poor, "alone", "student"),
        BenchArtifact(good, "distilled", "student_distilled"),
    ]
    out = folder / "bench" / "result.json"
    told: list[tuple[str, int, int]] = []
    result = bench_artifacts(
        artifacts,
        dataset,
        config=CONFIG,
        out=out,
        ensemble=BenchEnsemble(("one", "two")),
        synthetic=True,
        progress=lambda *step: told.append(step),
    )
    assert {stage for stage, _, _ in told} == {"accuracy", "latency", "memory"}
    assert all(done <= total for _, done, total in told)
    return result, out, dataset


def test_result_holds_what_is_promised(bench: tuple[dict, Path, Dataset]) -> None:
    result, out, _ = bench
    assert json.loads(out.read_text()) == result == read_result(out)
    assert result["schema"] == "edgekd.result/1"
    assert result["data"]["synthetic"] is True
    assert [row["role"] for row in result["rows"]] == ["teacher", "teacher", "ensemble", "student", "student_distilled"]
    for row in result["rows"]:
        assert set(row) >= {
            "name", "role", "artifact", "sha256", "precision", "runtime", "provider", "latency_ms", "stages_ms", "map",
            "parameters", "macs", "size_bytes", "peak_memory_bytes", "speedup_vs_ensemble", "roof",
        }  # fmt: skip
        assert row["latency_ms"]["samples"] == 20
        assert set(row["roof"]) >= {"macs", "bytes", "limit_ms", "bound", "share"}
        assert row["latency_ms"]["p99"] is None
        assert 0 < row["latency_ms"]["median"] <= row["latency_ms"]["p90"]
        assert set(row["stages_ms"]) == {"pre", "infer", "post"}
        assert row["map"]["images"] == 12
        assert row["peak_memory_bytes"] > 10_000_000
        low, high = row["speedup_interval"]
        assert low <= row["speedup_vs_ensemble"] <= high
    text = out.read_text()
    assert str(out.parent.parent) not in text  # no path of this machine


def test_accuracy_and_comparisons(bench: tuple[dict, Path, Dataset]) -> None:
    result, _, _ = bench
    rows = {row["name"]: row for row in result["rows"]}
    # Every detector answers every picture alike, so the second class's 8 objects are found among 12 answers.
    assert rows["one"]["map"]["per_class"]["round"]["ap50"] == pytest.approx(1.0)
    assert rows["one"]["map"]["per_class"]["square"]["objects"] == 8
    assert rows["distilled"]["map"]["ap50"] == rows["one"]["map"]["ap50"] > rows["alone"]["map"]["ap50"]
    pairs = {(c["a"], c["b"]): c for c in result["comparisons"]}
    assert set(pairs) == {("distilled", "alone"), ("distilled", "ensemble"), ("alone", "ensemble")}
    gain = pairs["distilled", "alone"]
    assert gain["difference"] == pytest.approx(
        rows["distilled"]["map"]["ap50"] - rows["alone"]["map"]["ap50"], abs=1e-5
    )
    assert gain["difference_shown"]
    assert gain["unlike"] == ["another network"]  # these doubles differ in width
    assert gain["low"] > 0
    assert [c["a"] for c in result["comparisons"] if c["headline"]] == ["distilled"]
    assert rows["ensemble"]["speedup_vs_ensemble"] == 1.0
    assert rows["ensemble"]["parameters"] == rows["one"]["parameters"] + rows["two"]["parameters"]
    assert result["reference"] == "ensemble"


def test_a_batch_fixed_in_the_file_is_said_and_one_image_of_it_counted(tmp_path: Path) -> None:
    one = write_detector(tmp_path / "one.onnx", GOOD_BOXES, GOOD_SCORES)
    model = onnx.load(one)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    mean = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    mean.attribute.remove(next(a for a in mean.attribute if a.name == "axes"))  # over the batch as well
    onnx.save(model, tmp_path / "eight.onnx")
    result = bench_artifacts(
        [BenchArtifact(one, "one"), BenchArtifact(tmp_path / "eight.onnx", "eight")],
        make_dataset(tmp_path / "data"),
        config=CONFIG,
        out=tmp_path / "result.json",
        memory=False,
        energy_seconds=0,
    )
    alone, fixed = result["rows"]
    assert alone["macs"] == fixed["macs"] == 4 * 64 * 64 * 3 * 9
    said = [text for text in result["warnings"] if "batch is fixed" in text]
    assert len(said) == 1
    assert said[0].startswith("eight: its batch is fixed at 8")
    assert said[0] in result["unfit_to_publish"]


def test_speed_ups_and_differences_are_of_the_right_way_round(tmp_path: Path) -> None:
    """A reference of 10 ms: the quicker way to run the ensemble. A student of 2 ms is 5 times as fast, not a fifth."""
    dataset = make_dataset(tmp_path)
    whole = [Detections(r.boxes_xyxy, np.full(len(r.labels), 0.9, np.float32), r.labels) for r in dataset.records]
    half = [found.take(found.labels == 0) for found in whole]  # nothing of the second class
    roles = ("ensemble", "ensemble", "student", "student_distilled", "teacher")
    times_ms, answers = (20.0, 10.0, 4.0, 2.0, 8.0), (whole, whole, half, whole, whole)
    measured = [Measurement(np.full((10, 4, 3), time / 3)) for time in times_ms]
    same = {"parameters": 1, "macs": 1, "precision": "fp32", "counted_from": "graph"}
    rows = [
        {**same, "name": f"{role}{time:g}", "role": role, "latency_ms": {"median": time}, "map": {}}
        for role, time in zip(roles, times_ms, strict=True)
    ]
    assert headline_rows(rows) == (1, 3)
    assert headline_rows([rows[4], rows[2]]) == (0, 1)
    assert headline_rows([rows[4], rows[4], rows[2]])[0] is None  # neither of two teachers is what is to be replaced
    found = compare(rows, dataset, answers, measured, *headline_rows(rows), seed=0)
    assert [row["speedup_vs_ensemble"] for row in rows] == [0.5, 1.0, 2.5, 5.0, 1.25]
    assert rows[3]["speedup_interval"] == [5.0, 5.0]
    assert [(c["a"], c["b"], c["difference"], c["headline"], c["difference_shown"]) for c in found] == [
        ("student_distilled2", "student4", 0.5, False, True),
        ("student_distilled2", "ensemble10", 0.0, True, False),
        ("student4", "ensemble10", -0.5, False, True),
    ]
    assert [row["map"]["ap50_interval"] for row in rows[2:4]] == [[0.5, 0.5], [1.0, 1.0]]


def test_an_ap_s_interval_is_mirrored_in_a_result(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    rng = np.random.default_rng(0)
    answers = [
        Detections(
            r.boxes_xyxy[:1], rng.random(1).astype(np.float32), r.labels[:1] if rng.random() < 0.6 else 1 - r.labels[:1]
        )
        for r in dataset.records
    ]
    row = {"name": "a", "role": "teacher", "latency_ms": {"median": 1.0}, "map": {}}
    compare([row], dataset, [answers], [Measurement(np.ones((10, 4, 3)))], None, None, seed=0)
    drawn = resampled_ap50([match_coco(dataset.records, answers, 2)], seed=0)[0]
    expected = share_interval(drawn) or pytest.fail("no interval")
    assert row["map"]["ap50_interval"] == pytest.approx(expected[1:], abs=1e-6)
    assert expected != percentile_interval(drawn)


def test_saved_detections_and_examples(bench: tuple[dict, Path, Dataset]) -> None:
    result, out, dataset = bench
    saved = read_saved(out.parent / result["files"]["detections"])
    assert saved.class_names == dataset.class_names
    assert [row.name for row in saved.rows] == [row["name"] for row in result["rows"]]
    first = saved.rows[0]
    assert len(first.detections) == 12
    assert first.detections[0].boxes_xyxy[0].tolist() == pytest.approx([20, 20, 60, 60])
    assert first.stages_ms.shape == (10, 2, 3)
    assert set(first.curves) == {"", "round", "square"}
    read = read_examples(out.parent / result["files"]["examples"])
    examples = read["images"]
    assert len(examples) == len(dataset)  # fewer than are wanted
    reference, student = (next(r for r in saved.rows if r.name == name) for name in (result["reference"], "distilled"))
    objects = sum(int((~r.difficult & ~r.crowd).sum()) for r in dataset.records)
    agreed = read["agreement"]
    assert agreed == agreement(dataset.records, reference.detections, student.detections, dataset.class_names)
    assert sum(agreed["objects"].values()) == objects == sum(sum(v.values()) for v in agreed["per_class"].values())
    assert sum(agreed["images"].values()) == len(dataset)
    for row in result["rows"]:
        low, high = row["latency_ms"]["median_interval"]
        assert low <= row["latency_ms"]["median"] <= high
        assert len(row["latency_ms"]["percentiles"]) == 101
    assert all((out.parent / "examples" / e["file"]).is_file() for e in examples)


def test_agreement_counts_every_object_once() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [80, 0, 90, 10]], np.float32)
    ignored = np.array([False, False, False, False, True])
    none = np.zeros(5, bool)
    record = ImageRecord("a", Path("a"), (20, 100), boxes, np.array([0, 0, 1, 1, 1]), ignored, none)

    def finds(*indices: int, score: float = 0.9) -> Detections:
        index = list(indices)
        return Detections(boxes[index], np.full(len(index), score, np.float32), record.labels[index])

    found = agreement([record], [finds(0, 1, 4)], [finds(1, 2)], ("round", "square"))
    assert found["objects"] == {"neither": 1, "reference": 1, "student": 1, "both": 1}
    assert found["per_class"]["round"] == {"neither": 0, "reference": 1, "student": 0, "both": 1}
    assert found["images"] == {"reference_ahead": 0, "level": 1, "student_ahead": 0}
    faint = agreement([record], [finds(0)], [finds(0, score=0.1)], ("round", "square"))
    assert faint["objects"]["reference"] == 1
    assert faint["images"]["reference_ahead"] == 1


def test_the_ensemble_answers_as_it_would_alone(bench: tuple[dict, Path, Dataset], tmp_path: Path) -> None:
    """Its accuracy is computed from its members' outputs; deployed, it computes all itself."""
    from edgekd.bench.systems import Member, ensemble_of
    from edgekd.data.images import load_image
    from edgekd.predictor import load_predictor

    _, out, dataset = bench
    saved = next(row for row in read_saved(out.parent / "detections.npz").rows if row.name == "ensemble")
    folder = out.parent.parent
    members = [Member(name, load_predictor(folder / f"{name}.onnx"), None) for name in ("good", "poor")]
    ensemble = ensemble_of(BenchEnsemble(("good", "poor")), members, dataset.class_names, CONFIG)
    for record, found in zip(dataset.records[:3], saved.detections, strict=False):
        alone = ensemble.detect(load_image(record.path))
        assert len(alone) > 0
        np.testing.assert_array_equal(alone.boxes_xyxy, found.boxes_xyxy)
        np.testing.assert_array_equal(alone.scores, found.scores)


def test_a_distilled_student_is_held_against_the_one_alone_that_is_most_like_it() -> None:
    network = {"parameters": 1, "macs": 1, "precision": "fp32"}
    rows = [
        {**network, "role": "student", "parameters": 2},
        {**network, "role": "student", "precision": "fp16"},
        {**network, "role": "student_distilled"},
        {**network, "role": "student_distilled", "precision": "int8", "parameters": 2},
    ]
    assert pairs_of(rows, None) == [(2, 1), (3, 0)]


def test_thresholds_that_nms_inside_does_not_heed_are_told(tmp_path: Path) -> None:
    import onnx

    dataset = make_dataset(tmp_path / "data", images=3)
    file = write_detector(tmp_path / "plain.onnx", GOOD_BOXES, GOOD_SCORES)
    inside = tmp_path / "inside.onnx"
    onnx.save(detections_form(onnx.load(str(file)), Selection(0.01, 0.4, 50)), str(inside))
    asked = {"score_threshold": 0.2, "nms_iou": 0.7, "max_detections": 100, "box_voting": 0.6}
    result = bench_artifacts(
        [BenchArtifact(file, "plain"), BenchArtifact(inside, "inside")],
        dataset,
        config=CONFIG.model_copy(update=asked),
        out=tmp_path / "result.json",
        memory=False,
    )
    rows = {row["name"]: row["thresholds"] for row in result["rows"]}
    assert rows["plain"] == {"nms": "after", **asked}
    assert rows["inside"] == {
        "nms": "inside", "score_threshold": 0.2, "nms_iou": 0.4, "max_detections": 50, "box_voting": None,
    }  # fmt: skip
    told = "inside: NMS inside: IoU 0.4, at most 50, from 0.01; IoU 0.7, at most 100, box voting from 0.6 do not apply"
    assert [warning for warning in result["warnings"] if "NMS" in warning] == [told]
    assert told not in result["unfit_to_publish"]


def test_thresholds_that_are_not_the_file_s_own_are_told(tmp_path: Path) -> None:
    import onnx

    dataset = make_dataset(tmp_path / "data", images=3)
    file = write_detector(tmp_path / "plain.onnx", GOOD_BOXES, GOOD_SCORES)
    model = onnx.load(str(file))
    set_metadata(model, {"edgekd.thresholds": Selection(nms_iou=0.4, box_voting=0.6).to_dict()})
    onnx.save(model, str(file))

    def warnings(**asked: float) -> list[str]:
        config = CONFIG.model_copy(update=asked)
        out = tmp_path / "result.json"
        return bench_artifacts([BenchArtifact(file, "s")], dataset, config=config, out=out, memory=False)["warnings"]

    assert "s: its own recipe measures it with --iou 0.4 --box-voting 0.6" in warnings()
    assert not any("own recipe" in warning for warning in warnings(nms_iou=0.4, box_voting=0.6))


@pytest.mark.parametrize("kind", ["onnx", "checkpoint"])
def test_weights_chosen_on_the_measured_images_are_told(tmp_path: Path, checkpoint: Path, kind: str) -> None:
    import torch

    names = ("cat", "dog")
    dataset, other = (make_dataset(tmp_path / f"{n}", images=n, class_names=names) for n in (2, 3))
    run = {"chosen_on": fingerprint(dataset)}
    if kind == "onnx":
        file = write_detector(tmp_path / "s.onnx", GOOD_BOXES, GOOD_SCORES)
        model = onnx.load(str(file))
        set_metadata(model, {"edgekd.provenance": {"run": run}})
        onnx.save(model, str(file))
        artifact = BenchArtifact(file, "s", class_map=dict(zip(NAMES, names, strict=True)))
    else:
        file = tmp_path / "s.pt"
        torch.save({**torch.load(checkpoint, weights_only=True), "facts": run}, file)
        artifact = BenchArtifact(file, "s")

    def is_told(images: Dataset) -> bool:
        out = tmp_path / "result.json"
        warnings = bench_artifacts([artifact], images, config=CONFIG, out=out, memory=False)["warnings"]
        return any(text.startswith("s: the best of several evaluations on these very images") for text in warnings)

    assert is_told(dataset)
    assert not is_told(other)


def test_one_teacher_is_the_reference(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", images=1)
    path = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES)
    artifacts = [BenchArtifact(path, "t", "teacher"), BenchArtifact(path, "s")]
    result = bench_artifacts(artifacts, dataset, config=CONFIG, memory=False, out=tmp_path / "r.json")
    assert result["reference"] == "t"
    assert result["rows"][1]["speedup_vs_ensemble"] > 0
    alone = bench_artifacts(artifacts[1:], dataset, config=CONFIG, memory=False, out=tmp_path / "r2.json")
    assert alone["reference"] is None
    assert alone["rows"][0]["speedup_vs_ensemble"] is None
    assert alone["comparisons"] == []


def test_other_classes_are_mapped_or_refused(tmp_path: Path) -> None:
    path = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES)
    swapped = make_dataset(tmp_path / "data", images=2, class_names=("square", "Round"))
    mapped = bench_artifacts([BenchArtifact(path, "a")], swapped, config=CONFIG, memory=False, out=tmp_path / "r.json")
    assert mapped["rows"][0]["map"]["ap50"] == 0.0  # right places, but the labels' names are exchanged
    foreign = make_dataset(tmp_path / "data2", images=2, class_names=("cat", "dog"))
    with pytest.raises(ClassMapError):
        bench_artifacts([BenchArtifact(path, "a")], foreign, config=CONFIG, memory=False, out=tmp_path / "r2.json")
    assert not (tmp_path / "r2.json").exists()
    by_map = BenchArtifact(path, "a", class_map={"round": "cat", "square": "dog"})
    assert (
        bench_artifacts([by_map], foreign, config=CONFIG, memory=False, out=tmp_path / "r3.json")["rows"][0]["map"][
            "ap50"
        ]
        == 1.0
    )


@pytest.mark.parametrize("content", [None, b"", b"not an onnx file"])
def test_broken_artefacts(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError):
        describe_artifact(path)
    with pytest.raises(ArtifactError):
        bench_artifacts(
            [BenchArtifact(path, "a")],
            make_dataset(tmp_path / "d", 1),
            config=CONFIG,
            memory=False,
            out=tmp_path / "r.json",
        )


def test_a_split_without_objects_is_told(tmp_path: Path) -> None:
    path = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES)
    dataset = make_dataset(tmp_path / "data", images=1)
    nothing = dataset.records[0].boxes_xyxy[:0]
    empty = replace(
        dataset.records[0],
        boxes_xyxy=nothing,
        labels=np.zeros(0, np.int64),
        difficult=np.zeros(0, np.bool_),
        crowd=np.zeros(0, np.bool_),
    )
    found = bench_artifacts(
        [BenchArtifact(path, "a")],
        replace(dataset, records=(empty,)),
        config=CONFIG,
        memory=False,
        out=tmp_path / "r.json",
    )
    assert any("has no object: accuracy cannot be measured" in text for text in found["warnings"])


def test_classes_without_an_object_are_told(tmp_path: Path) -> None:
    path = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES)
    dataset = make_dataset(tmp_path / "data", images=3)
    dataset = replace(dataset, records=dataset.records[2:], by_teachers=True)
    found = bench_artifacts([BenchArtifact(path, "a")], dataset, config=CONFIG, memory=False, out=tmp_path / "r.json")
    says = f"split 'val' has no object of 1 of the 2 classes, and AP leaves them out: {dataset.class_names[1]}"
    assert says in found["warnings"]
    assert says not in found["unfit_to_publish"]
    assert any("annotated by teachers" in text for text in found["warnings"])


def test_empty_split(tmp_path: Path) -> None:
    path = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES)
    with pytest.raises(DataError, match="no images"):
        bench_artifacts(
            [BenchArtifact(path, "a")],
            make_dataset(tmp_path / "d", 0),
            config=CONFIG,
            memory=False,
            out=tmp_path / "r.json",
        )


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"schema": "other/1", "rows": []}'])
def test_broken_results(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArtifactError):
        read_result(path)
    with pytest.raises(ArtifactError):
        read_saved(path)


def test_graph_counts(tmp_path: Path) -> None:
    facts = describe_artifact(write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES, width=16))
    assert facts.parameters == 16 * 27 + 16
    assert facts.macs == 16 * 27 * 64 * 64
    assert (facts.precision, facts.counted_from) == ("fp32", "graph")


def test_layers_that_compute_in_integers_count_too(tmp_path: Path) -> None:
    """A file quantised to integer operators, of which a layer is left in float, as ONNX Runtime's quantiser makes them."""
    node, tensor, rng = onnx.helper.make_node, onnx.numpy_helper.from_array, np.random.default_rng(0)
    stored = [
        tensor(rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "float"),
        tensor(rng.integers(-9, 9, (5, 4, 3, 3)).astype(np.int8), "integer"),
        tensor(rng.integers(-9, 9, (6, 5, 1, 1)).astype(np.int8), "linear"),
        tensor(np.float32(1), "one"),
        tensor(np.uint8(0), "zero"),
        tensor(np.int8(0), "none"),
    ]
    nodes = [
        node("Conv", ["images", "float"], ["a"], pads=[1] * 4),
        node("QuantizeLinear", ["a", "one", "zero"], ["b"]),
        node("ConvInteger", ["b", "integer", "zero", "none"], ["c"], pads=[1] * 4),
        node("Cast", ["c"], ["d"], to=onnx.TensorProto.FLOAT),
        node("QuantizeLinear", ["d", "one", "zero"], ["e"]),
        node("QLinearConv", ["e", "one", "zero", "linear", "one", "none", "one", "zero"], ["f"]),
    ]
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, (1, 3, 8, 8))
    found = onnx.helper.make_tensor_value_info("f", onnx.TensorProto.UINT8, None)
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "integers", [images], [found], stored))
    onnx.save(model, tmp_path / "a.onnx")
    facts = describe_artifact(tmp_path / "a.onnx")
    assert facts.macs == 64 * (4 * 27 + 5 * 36 + 6 * 5)
    assert facts.parameters == 4 * 27 + 5 * 36 + 6 * 5
    assert [layer.bytes for layer in read_layers(tmp_path / "a.onnx")] == [
        4 * (3 * 64 + 4 * 27 + 4 * 64),
        4 * 64 + 5 * 36 + 5 * 64,
        5 * 64 + 6 * 5 + 6 * 64,
    ]


@pytest.mark.parametrize(
    ("stored_as", "chain", "precision"),
    [
        (np.float32, ["QuantizeLinear", "DequantizeLinear"], "int8"),  # as NVIDIA's tools write int8 for TensorRT
        (np.int8, ["DequantizeLinear"], "int8"),
        (np.float16, ["Cast"], "fp16"),
    ],
)
def test_weights_behind_conversions_count(tmp_path: Path, stored_as: Any, chain: list[str], precision: str) -> None:
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    stored = [tensor(np.ones((4, 3, 3, 3), stored_as), "w0"), tensor(np.float32(1), "one"), tensor(np.int8(0), "zero")]
    nodes = []
    for index, kind in enumerate(chain):
        names, to = [f"w{index}", "one", "zero"], {}
        if kind == "Cast":
            names, to = names[:1], {"to": onnx.TensorProto.FLOAT}
        nodes.append(node(kind, names, [f"w{index + 1}"], **to))
    nodes.append(node("Conv", ["images", f"w{len(chain)}"], ["out"], pads=[1] * 4))
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, (1, 3, 8, 8))
    found = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "converted", [images], [found], stored)),
        tmp_path / "a.onnx",
    )
    facts = describe_artifact(tmp_path / "a.onnx")
    assert (facts.precision, facts.parameters, facts.macs) == (precision, 108, 64 * 108)


def test_published_counts_of_a_black_box(yolo11n_onnx: Path) -> None:
    facts = describe_artifact(yolo11n_onnx, (640, 640))
    assert facts.parameters == pytest.approx(2.62e6, rel=0.01)
    assert facts.macs == pytest.approx(6.5e9 / 2, rel=0.02)  # 6.5 GFLOPs as published
    assert describe_artifact(yolo11n_onnx).macs is None  # its input size is open


def test_device_facts_are_json_and_never_fail() -> None:
    facts = device_facts()
    json.dumps(facts, allow_nan=False)
    assert facts["usable_threads"] >= 1
    assert facts["memory_bytes"] > 0
    contention = Contention()
    np.linalg.svd(np.ones((300, 300)))
    used = contention.cores()
    assert used is None or used >= 0
    assert process_peak_bytes() > 1_000_000
