"""From an ONNX file or a run to an engine past its parity gate, benched and asked for on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgekd.errors import ExportError, UserError
from edgekd.export.engine import EngineOptions
from edgekd.export.engine_job import export_engine
from edgekd.export.engine_parity import aligned
from edgekd.export.float16 import to_float16
from edgekd.predictor import load_predictor
from edgekd.runtimes.engine_file import manifest_path, read_engine_manifest
from edgekd.runtimes.tensorrt_runtime import TensorRTRuntime
from edgekd.types import Dataset
from tests.bench_doubles import NAMES, make_dataset
from tests.engine_doubles import HELD, IMAGES, WEAK, Machine, moving_detector, ours, run_onnx
from tests.fake_tensorrt import VERSIONS
from tests.onnx_zoo import BOXES, EXPORTS, SOURCE_HW, write


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_from_file_to_detections(machine: Machine, tmp_path: Path, version: str, precision: Any) -> None:
    fake = machine(version)
    source = ours(moving_detector(), tmp_path / "student.onnx")
    out = tmp_path / "student.engine"
    result = export_engine(source, out, precision=precision)
    manifest = read_engine_manifest(out)
    assert json.dumps(manifest.to_dict()) == json.dumps(result.manifest.to_dict())
    assert manifest.tensorrt == version
    assert manifest.precision == precision
    assert manifest.device["compute_capability"] == "8.7"
    strong = version not in WEAK
    assert manifest.strongly_typed is strong
    assert manifest.flags == (("no TF32",) if precision == "fp32" else () if strong else ("FP16", HELD))
    assert manifest.layer_precisions()[precision] > 1
    assert manifest.outputs["boxes"]["shape"] == [1, 1000, 4]
    assert result.parity[-1].ok
    assert result.parity[-1].confident > 0
    assert json.loads(manifest_path(out).read_text())["schema"] == "edgekd.engine/1"
    image = np.random.default_rng(1).integers(0, 255, (90, 120, 3), np.uint8)
    with load_predictor(out, score_threshold=0.3) as engine, load_predictor(source, score_threshold=0.3) as plain:
        assert engine.runtime.name == "tensorrt"
        assert engine.runtime.provider == "Orin"
        found, wanted = engine.detect(image), plain.detect(image)
        assert engine.describe()["precision"] == precision
    assert len(wanted) > 5
    if precision == "fp32":
        np.testing.assert_allclose(found.boxes_xyxy, wanted.boxes_xyxy, atol=1e-3)
    assert fake._contexts
    assert all(stream > 0 for stream in fake._contexts[-1]._runs)


def test_an_engine_that_disagrees_does_not_appear(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd.errors import ParityError

    machine()
    source, out = ours(moving_detector(), tmp_path / "s.onnx"), tmp_path / "s.engine"
    honest = TensorRTRuntime.run
    monkeypatch.setattr(
        TensorRTRuntime, "run", lambda self, images: {k: v * np.float32(0.9) for k, v in honest(self, images).items()}
    )
    with pytest.raises(ParityError, match=r"TensorRT 10\.3\.0 on Orin"):
        export_engine(source, out)
    assert list(tmp_path.glob("*engine*")) == []


def test_a_killed_export_leaves_nothing_beside_the_engine(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the plan is tried, which takes longest, nothing large and hidden lies where nobody would look for it."""
    from edgekd.export import engine_job

    machine()
    source, out = ours(moving_detector(), tmp_path / "s.onnx"), tmp_path / "made" / "s.engine"
    beside: list[list[Path]] = []
    honest = engine_job.compare_engine

    def watched(*arguments: Any) -> Any:
        beside.append(list(out.parent.glob("*")))
        return honest(*arguments)

    monkeypatch.setattr(engine_job, "compare_engine", watched)
    export_engine(source, out)
    assert beside == [[]]
    assert {path.name for path in out.parent.iterdir()} == {"s.engine", "s.engine.json"}


def test_fp16_of_graphs_that_write_constants_as_nodes(tmp_path: Path) -> None:
    """As torch's older exporter does; Range knows no float16, and a constant beyond its largest must not become infinite."""
    model = moving_detector()
    graph, node = model.graph, helper.make_node
    value = onnx.numpy_helper.from_array
    stored = {"start": 0, "stop": 3, "step": 1, "scale": 0.5}
    extra = [node("Constant", [], [n], f"c_{n}", value=value(np.float32(v))) for n, v in stored.items()]
    scale = extra[-1]
    extra.append(node("Range", ["start", "stop", "step"], ["ramp"], "ramp"))
    extra.append(node("Mul", ["ramp", "scale"], ["bias"], "bias"))
    extra.append(node("Add", ["logits", "bias"], ["moved"], "moved"))
    position = next(i for i, found in enumerate(graph.node) if found.op_type == "Sigmoid")
    graph.node[position].input[0] = "moved"
    for offset, found in enumerate(extra):
        graph.node.insert(position + offset, found)
    half = to_float16(model)
    kinds = {tensor.data_type for tensor in half.graph.initializer if tensor.name.startswith("scale")}
    assert kinds == {onnx.TensorProto.FLOAT16}
    wanted, made = run_onnx(model, IMAGES[:1]), run_onnx(half, IMAGES[:1])
    np.testing.assert_allclose(made["scores"], wanted["scores"], atol=5e-3)
    scale.attribute[0].t.CopyFrom(value(np.float32(1e9)))
    graph.node[position + 3].CopyFrom(scale)
    with pytest.raises(ExportError, match="does not fit in float16"):
        to_float16(model)


def foreign(case: str, path: Path, **changes: Any) -> Path:
    """An export of `onnx_zoo` that says its class names itself."""
    export = replace(EXPORTS[case], **changes)
    model = onnx.load(str(write(export, path)))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    named = {} if "names" in metadata else {"class_names": str(list(export.names))}
    helper.set_model_props(model, {**metadata, **named})
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize(
    "case",
    [
        "RF-DETR",  # logits and shares of the input
        "YOLOv8 for RKNN",  # distributions over distances, in maps
        "SSD of jetson-inference",
        "YOLOv4",  # boxes (B, P, 1, 4)
        "one class without an axis",
        "Ultralytics v8, 11",
        "Ultralytics v8, half",
    ],
)
def test_foreign_detectors_become_engines(machine: Machine, tmp_path: Path, case: str) -> None:
    machine()
    source, out = foreign(case, tmp_path / "m.onnx"), tmp_path / "m.engine"
    result = export_engine(source, out, precision="fp16" if "half" in case else "fp32")
    for report in result.parity:
        assert report.confident == 2 * 3 * report.images, "boxes and scores are compared as they are meant"
    assert bool(result.parity) is (result.manifest.output_format.kind == "boxes-scores")
    assert not any("float16" in note for note in result.notes)
    with load_predictor(out, score_threshold=0.01) as predictor:
        found = predictor.detect(np.full((*SOURCE_HW, 3), 114, np.uint8))
    np.testing.assert_allclose(found.boxes_xyxy, BOXES, atol=2 if "half" in case else 0.05)


def test_what_a_file_does_not_say_cannot_be_declared_to_export(machine: Machine, tmp_path: Path) -> None:
    machine()
    with pytest.raises(UserError, match=r"declare `anchors`.*takes no declarations"):
        export_engine(foreign("raw yolov5 in maps", tmp_path / "m.onnx"), tmp_path / "m.engine")


def test_a_foreign_detector_that_decodes_in_float16_says_so(machine: Machine, tmp_path: Path) -> None:
    machine()
    result = export_engine(foreign("Ultralytics v8, 11", tmp_path / "m.onnx"), tmp_path / "m.engine", precision="fp16")
    assert any("float16 does that too" in note for note in result.notes)


def test_bytes_reach_an_engine_rounded(machine: Machine, tmp_path: Path) -> None:
    machine()
    inputs = {"images": ("UINT8", (1, 3, 64, 96))}
    out = tmp_path / "m.engine"
    export_engine(foreign("YOLO-NAS raw", tmp_path / "m.onnx", inputs=inputs), out)
    with TensorRTRuntime(out) as runtime:
        runtime.run(np.full((1, 3, 64, 96), 126.99999, np.float32))
        assert (runtime._input.host == 127).all()


@pytest.mark.parametrize("case", ["PP-YOLOE without NMS", "the zoo's YOLOv3", "EfficientDet"])
def test_inputs_that_an_engine_cannot_be_fed_are_refused_before_it_is_built(
    machine: Machine, tmp_path: Path, case: str
) -> None:
    trt = machine()
    source = foreign(case, tmp_path / "m.onnx")
    with pytest.raises(UserError, match="channels first"):
        export_engine(source, tmp_path / "m.engine")
    assert not trt._builds


def test_rows_are_compared_in_one_order() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 300, (1, 500, 2)).astype(np.float32)
    truth = {"boxes": np.concatenate([corner, corner + 40], 2), "scores": rng.random((1, 500, 3)).astype(np.float32)}
    order = rng.permutation(500)
    one, other = aligned(truth, {name: array[:, order] for name, array in truth.items()})
    assert one["boxes"].shape == (1, 100, 4)
    for name in truth:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, t: export_engine(s, t / "x.onnx"), "goes to an .engine file"),
        (lambda s, t: export_engine(t / "none.onnx", t / "x.engine"), "no such file"),
        (lambda s, t: export_engine(s, t / "x.engine", precision="int8"), "another"),
        (lambda s, t: export_engine(s, t / "x.engine", options=EngineOptions(batch=(1, 4, 8))), "batch is fixed"),
        (lambda s, t: EngineOptions(batch=(4, 2, 8)), "does not rise"),
        (lambda s, t: EngineOptions(level=7), "optimisation level"),
        (lambda s, t: EngineOptions(workspace_mib=0), "workspace"),
    ],
)
def test_user_mistakes(
    machine: Machine, detector: Path, tmp_path: Path, call: Callable[[Path, Path], object], words: str
) -> None:
    machine()
    with pytest.raises(UserError, match=words):
        call(detector, tmp_path)


def test_bench_measures_an_engine_beside_its_onnx(machine: Machine, detector: Path, tmp_path: Path) -> None:
    from edgekd.bench.entries import BenchArtifact
    from edgekd.bench.runner import bench_artifacts
    from edgekd.recipe import BenchConfig

    machine("8.6.1")
    dataset = make_dataset(tmp_path / "data", images=4)
    out = tmp_path / "student.engine"
    export_engine(detector, out)
    result = bench_artifacts(
        [
            BenchArtifact(detector, "onnx"),
            BenchArtifact(out, "engine"),
            BenchArtifact(out, "engine+graph", cuda_graph=True),
        ],
        dataset,
        config=BenchConfig(samples=20, warmup_seconds=0, threads=1),
        out=tmp_path / "result.json",
        memory=False,
    )
    plain, engine, graph = result["rows"]
    assert (engine["runtime"], engine["provider"]) == ("tensorrt", "Orin")
    assert [row["cuda_graph"] for row in result["rows"]] == [None, False, True]
    assert engine["map"]["ap50"] == graph["map"]["ap50"] == plain["map"]["ap50"]
    assert engine["precision"] == "fp32"
    assert engine["size_bytes"] == out.stat().st_size
    assert tuple(result["data"]["class_names"]) == NAMES


@pytest.fixture
def edgekd(machine: Machine) -> Callable[..., Any]:
    """The command line, on the stand-in."""
    from typer.testing import CliRunner

    from edgekd.cli import app

    machine("10.13.3.9")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_line_exports_and_benches_an_engine(edgekd: Callable[..., Any], tmp_path: Path) -> None:
    from edgekd.data.scenes import SCENE_CLASSES, make_scenes

    names = tuple(SCENE_CLASSES)
    detector = ours(moving_detector(classes=len(names)), tmp_path / "student.onnx", names)
    out = tmp_path / "student.engine"
    done = edgekd("export", detector, "--format", "engine", "--out", out, "--batch", "1", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tensorrt"] == "10.13.3.9"
    root = make_scenes(tmp_path / "scenes", counts={"val": 3}, image_hw=(64, 64))
    words = ("bench", out, "--data", root, "--split", "val", "--samples", 20, "--warmup", 0, "--cuda-graph")
    done = edgekd(*words, "--profile", "--out", tmp_path / "result.json")
    assert done.exit_code == 0, done.output
    assert "student: the slowest" in done.output
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["name"], row["cuda_graph"]) for row in rows] == [("student", False), ("student+graph", True)]
    assert {row["runtime"] for row in rows} == {"tensorrt"}
    assert {row["profile"]["tool"] for row in rows} == {"tensorrt"}
    assert all(row["roof"]["share"] is None for row in rows), "no GPU here to measure the roof of"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch", "1:2"], "unknown --batch"),
        (["--batch", "many"], "unknown --batch"),
        (["--dla", "0", "--precision", "fp16"], "no such DLA core"),
        (["--precision", "int8"], "precision lives in the ONNX file"),
    ],
)
def test_the_command_lines_mistakes(
    edgekd: Callable[..., Any], detector: Path, tmp_path: Path, words: list[str], says: str
) -> None:
    done = edgekd("export", detector, "--format", "engine", "--out", tmp_path / "s.engine", "--quiet", *words)
    assert done.exit_code == 2
    assert says in done.stderr


@pytest.mark.parametrize(("precision", "own"), [("fp32", True), ("fp16", False), ("int8", False)])
def test_a_run_becomes_an_engine(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, own: bool
) -> None:
    """From a checkpoint through the export's own gate, laid out for TensorRT, to an engine past the last hop.

    Both look at the images that the run's own recipe names where none are given.
    """
    import edgekd.checkpoint
    from edgekd.data import read_dataset
    from edgekd.data.scenes import make_scenes
    from edgekd.export import ExportData
    from edgekd.export.parity import TOLERANCES
    from edgekd.recipe import ExportConfig
    from tests.export_double import CLASSES, ToyDetector

    def as_toys(dataset: Dataset) -> Dataset:
        records = tuple(replace(record, labels=record.labels % len(CLASSES)) for record in dataset.records)
        return replace(dataset, class_names=CLASSES, records=records)

    machine("11.4.0.106")
    monkeypatch.setattr(edgekd.checkpoint, "build_detector", lambda spec: ToyDetector())
    monkeypatch.setitem(TOLERANCES, "int8", replace(TOLERANCES["int8"], matched=0.3))  # the toy is untrained
    run = tmp_path / "run"
    edgekd.checkpoint.save_detector(run / "model.pt", ToyDetector(), {})
    root = make_scenes(tmp_path / "set", counts={"train": 4, "val": 3}, image_hw=(96, 128))
    data = ExportData(*(as_toys(read_dataset(root, split)) for split in ("train", "val")))
    config = ExportConfig(map_budget=100.0, calibration_images=4)
    out = tmp_path / "toy.engine"
    monkeypatch.setattr("edgekd.export.job.data_of_run", lambda source: (data, []))
    result = export_engine(run, out, precision=precision, config=config, data=None if own else data)
    more = "--max-map-drop 100.0" if precision != "fp32" else ""
    more += " --calibration minmax" if precision == "int8" else ""
    more += "" if own else f" --data {root} --data-format voc"
    start = f"edgekd export {run} --format engine --precision {precision} --out {out}"
    assert result.manifest.rebuild == " ".join([start, *more.split()])
    assert not any("generated" in note for note in result.notes)
    assert [report.precision for report in result.parity] == [*dict.fromkeys(["fp32", precision]), precision]
    assert result.parity[-1].ap50 is not None
    assert not result.parity[-1].generated
    assert result.manifest.spec is not None
    assert result.manifest.layer_precisions()[precision] > 0
    assert result.manifest.source["path"] == "run/model.pt"
    load_predictor(out).close()
