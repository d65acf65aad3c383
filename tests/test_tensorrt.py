"""Engines whole: built, kept, loaded, run and benched, on a strict stand-in for each supported TensorRT."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.bench.throughput import stream_of
from edgekd.errors import ArtifactError, ExportError, MissingDependencyError, RuntimeFailure, UserError
from edgekd.export.engine import EngineOptions, build_engine, graph_precision
from edgekd.export.engine_job import EngineResult, export_engine
from edgekd.export.engine_parity import aligned
from edgekd.export.float16 import to_float16
from edgekd.export.graph import name_nodes
from edgekd.export.nms import append_nms
from edgekd.export.topk import with_top_candidates
from edgekd.postprocess import select
from edgekd.predictor import load_predictor
from edgekd.runtimes import buffers as buffers_module
from edgekd.runtimes.cuda_driver import l4t_release
from edgekd.runtimes.engine_file import manifest_path, read_engine_manifest, write_engine_manifest
from edgekd.runtimes.tensorrt_runtime import TensorRTRuntime
from edgekd.runtimes.trt_api import create_network, logger_of, open_engine, optional, parse_onnx, precision_in, tensorrt
from edgekd.runtimes.trt_precision import set_precision
from edgekd.selection import Selection
from edgekd.types import Dataset
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, NAMES, make_dataset, write_detector
from tests.fake_tensorrt import ORIN, VERSIONS, FakeTensorRT
from tests.host_buffers import HostBuffers
from tests.onnx_zoo import BOXES, EXPORTS, SOURCE_HW, write

IMAGES = np.random.default_rng(3).normal(size=(4, 3, 64, 64)).astype(np.float32)
Machine = Callable[..., FakeTensorRT]
WEAK = ("8.5.3.1", "8.6.1", "10.3.0")
"""Versions that take precision as flags."""
HELD = "PREFER_PRECISION_CONSTRAINTS"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Puts a fake TensorRT, and ordinary memory as its device's, in place of what is not here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(version: str = "10.3.0", **settings: Any) -> FakeTensorRT:
        fake = FakeTensorRT(version, **settings)
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        for module in ("edgekd.runtimes.tensorrt_runtime", "edgekd.export.engine_job"):
            monkeypatch.setattr(f"{module}.open_buffers", lambda: HostBuffers(fake._device))
        return fake

    return install


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    return write_detector(tmp_path / "student.onnx", GOOD_BOXES, GOOD_SCORES)


def moving_detector(batch: int | str = 1, candidates: int = 3000, classes: int = 3, opset: int = 17) -> onnx.ModelProto:
    """Boxes and scores that depend on the picture: the image's values laid out anew, then scores through a sigmoid."""
    columns = 4 + classes
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["features"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["features", "rows"], ["table"], "reshape"),
        helper.make_node("Slice", ["table", "zero", "four", "last"], ["corners"], "corners_slice"),
        helper.make_node("Slice", ["table", "four", "end", "last"], ["logits"], "logits_slice"),
        helper.make_node("Slice", ["corners", "zero", "two", "last"], ["first"], "first_slice"),
        helper.make_node("Slice", ["corners", "two", "four", "last"], ["size"], "size_slice"),
        helper.make_node("Abs", ["size"], ["extent"], "abs"),
        helper.make_node("Add", ["first", "extent"], ["second"], "second_add"),
        helper.make_node("Concat", ["first", "second"], ["boxes"], "boxes_concat", axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"], "sigmoid"),
    ]
    side = 64
    depth = -(-candidates * columns // side**2)
    nodes.insert(1, helper.make_node("Reshape", ["features", "flat"], ["flattened"], "flatten"))
    nodes.insert(2, helper.make_node("Slice", ["flattened", "zero", "used", "one"], ["trimmed"], "trim"))
    nodes[3].input[0] = "trimmed"
    weights = {
        "kernel": rng.normal(scale=0.2, size=(depth, 3, 3, 3)).astype(np.float32),
        "flat": np.array([0, -1], np.int64),
        "used": np.array([candidates * columns], np.int64),
        "rows": np.array([-1, candidates, columns], np.int64),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "four": np.array([4], np.int64),
        "end": np.array([columns], np.int64),
        "last": np.array([2], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "moving",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, side, side])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [batch, candidates, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, candidates, classes]),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def ours(model: onnx.ModelProto, path: Path, names: tuple[str, ...] = ("circle", "square", "star")) -> Path:
    """A model with our metadata, as a file."""
    preprocess = {"input_hw": [64, 64], "resize": "stretch", "mean": [0.5] * 3, "std": [0.5] * 3, "pad_value": 114}
    spec = {"model": "double", "class_names": list(names), "preprocess": preprocess, "width": 1.0, "options": {}}
    entries = {"schema": "edgekd.onnx/1", "spec": json.dumps(spec), "output": '{"kind": "boxes-scores"}'}
    helper.set_model_props(model, {f"edgekd.{key}": value for key, value in entries.items()})
    onnx.save(model, str(path))
    return path


def run_onnx(model: onnx.ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("batch", [1, 4, "batch"])
def test_topk_keeps_the_best_rows_and_selection_the_same(batch: int | str, opset: int) -> None:
    model = moving_detector(batch, opset=opset)
    cut = with_top_candidates(model, ("boxes", "scores"))
    images = IMAGES[: 1 if batch == 1 else 4]
    whole, top = run_onnx(model, images), run_onnx(cut, images)
    assert top["boxes"].shape == (len(images), 1000, 4)
    assert top["scores"].shape == (len(images), 1000, 3)
    for item in range(len(images)):
        order = np.argsort(-whole["scores"][item].max(1), kind="stable")[:1000]
        np.testing.assert_allclose(top["scores"][item].max(1), whole["scores"][item][order].max(1))
        settings = {"score_threshold": 0.3, "nms_iou": 0.5, "max_detections": 100}
        wanted, found = (select(side["boxes"][item], side["scores"][item], **settings) for side in (whole, top))
        np.testing.assert_array_equal(found.boxes_xyxy, wanted.boxes_xyxy)
        np.testing.assert_array_equal(found.labels, wanted.labels)


def test_topk_leaves_small_models_alone_and_refuses_what_tensorrt_would() -> None:
    small = moving_detector(candidates=200)
    assert with_top_candidates(small, ("boxes", "scores")) is small
    with pytest.raises(UserError, match="3839"):
        with_top_candidates(small, ("boxes", "scores"), 3840)
    small.graph.output[1].type.tensor_type.shape.dim[1].dim_param = "open"
    with pytest.raises(ExportError, match="not fixed"):
        with_top_candidates(small, ("boxes", "scores"))


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


def quantised(
    zero_point: int = 0, kind: type[np.generic] = np.int8, model: onnx.ModelProto | None = None
) -> onnx.ModelProto:
    """The moving detector with its convolution between pairs."""
    model = model or moving_detector()
    graph = model.graph
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(0.05, np.float32), "scale"),
            numpy_helper.from_array(np.array(zero_point, kind), "zero_point"),
        ]
    )
    pair = ["scale", "zero_point"]
    graph.node.insert(0, helper.make_node("QuantizeLinear", ["images", *pair], ["images_q"], "quantise"))
    graph.node.insert(1, helper.make_node("DequantizeLinear", ["images_q", *pair], ["images_d"], "dequantise"))
    graph.node[2].input[0] = "images_d"
    return model


@pytest.mark.parametrize("version", VERSIONS)
def test_int8_engines(machine: Machine, tmp_path: Path, version: str) -> None:
    machine(version)
    source = ours(quantised(), tmp_path / "student.onnx")
    manifest = export_engine(source, tmp_path / "student.engine", precision="int8").manifest
    assert manifest.layer_precisions()["int8"] == 1
    assert manifest.flags == (("INT8", "FP16", HELD) if version in WEAK else ())


def wide_detector() -> onnx.ModelProto:
    """The moving detector at 2,000 px and more, where float16 has steps of a pixel and larger."""
    model = moving_detector()
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(2003.3, np.float32), "offset"))
    graph.node.insert(len(graph.node) - 3, helper.make_node("Add", ["first", "offset"], ["moved"], "move"))
    for node in graph.node:
        if node.name in ("second_add", "boxes_concat"):
            node.input[0] = "moved"
    helper.set_model_props(model, {"edgekd.raw": json.dumps({"features": "features"})})
    return model


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_float16_would_spoil_is_held_in_float32(machine: Machine, version: str, precision: str) -> None:
    """Weakly typed TensorRT would decode in float16 too: boxes at 2,003 px would be a pixel off."""
    machine(version)
    model = wide_detector() if precision == "fp16" else quantised(model=wide_detector())
    if precision == "fp16":
        model = to_float16(model)
    built = build_engine(model, EngineOptions(), ORIN)
    _, engine = open_engine(tensorrt(), built.plan)
    assert engine._header["half"] is False
    assert (HELD in built.flags) is (version in WEAK)


def test_sums_of_squares_are_held_inside_int8_graphs(machine: Machine) -> None:
    """SSD's L2Norm over 512 channels passes 65,504; convolutions, and what only feeds them, may be float16."""
    trt = machine("8.6.1")
    builder = trt.Builder(logger_of(trt))
    network = create_network(trt, builder, strongly_typed=False)
    parse_onnx(trt, network, normed().SerializeToString())
    config = builder.create_builder_config()
    assert set_precision(trt, network, config, ["INT8", "FP16"]) == ["INT8", "FP16", HELD]
    held = [layer.name for layer in network._layers if layer._precision is not None]
    assert held == ["norm_square", "norm_sum", "norm_root", "decode"]


def test_a_body_is_not_held_where_types_are_not_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a version call every tensor float32, an fp16 model must not become an fp32 one."""
    from tests.fake_tensorrt import _Network

    trt = machine("8.6.1")
    network = _Network(trt, 1)
    parse_onnx(trt, network, to_float16(wide_detector()).SerializeToString())
    config = trt.Builder(logger_of(trt)).create_builder_config()
    convolution = next(layer for layer in network._layers if layer._node.op_type == "Conv")
    assert convolution.get_output(0).dtype == trt.DataType.HALF
    for layer in network._layers:
        monkeypatch.setattr(layer, "_kinds", {})
    assert set_precision(trt, network, config, ["FP16"]) == ["FP16", HELD]
    assert convolution._precision is None
    assert network._layers[-1]._precision == trt.DataType.FLOAT


def normed() -> onnx.ModelProto:
    """Convolution, L2 norm, convolution, decoding."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], "first"),
        helper.make_node("Mul", ["a", "a"], ["b"], "norm_square"),
        helper.make_node("ReduceSum", ["b", "axes"], ["c"], "norm_sum"),
        helper.make_node("Sqrt", ["c"], ["d"], "norm_root"),
        helper.make_node("Div", ["a", "d"], ["e"], "norm_divide"),
        helper.make_node("Conv", ["e", "w"], ["f"], "second"),
        helper.make_node("Exp", ["f"], ["boxes"], "decode"),
    ]
    weights = [
        numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w"),
        numpy_helper.from_array(np.array([1], np.int64), "axes"),
    ]
    shape = [1, 3, 8, 8]
    images, boxes = info("images", TensorProto.FLOAT, shape), info("boxes", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "normed", [images], [boxes], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("zero_point", "kind"), [(3, np.int8), (0, np.uint8)])
def test_int8_that_tensorrt_refuses_is_refused_before_it_is_asked(
    machine: Machine, tmp_path: Path, zero_point: int, kind: type[np.generic]
) -> None:
    fake = machine()
    source = ours(quantised(zero_point, kind), tmp_path / "student.onnx")
    if kind is np.uint8:
        with pytest.raises(ExportError, match="uint8"):
            build_engine(quantised(zero_point, kind), EngineOptions(), ORIN)
    else:
        with pytest.raises(UserError, match=r"zero point 3[\s\S]*--target tensorrt"):
            export_engine(source, tmp_path / "student.engine", precision="int8")
    assert fake._builds == 0


def test_an_engine_keeps_what_its_source_was_measured_with(machine: Machine, tmp_path: Path) -> None:
    machine()
    source, out = ours(moving_detector(), tmp_path / "student.onnx"), tmp_path / "student.engine"
    thresholds = {"score_threshold": 0.01, "nms_iou": 0.55, "max_detections": 50, "box_voting": 0.8}
    model = onnx.load(source)
    entry = model.metadata_props.add()
    entry.key, entry.value = "edgekd.thresholds", json.dumps(thresholds)
    onnx.save(model, source)
    assert export_engine(source, out).manifest.thresholds == thresholds
    with load_predictor(out) as engine, load_predictor(source) as plain:
        assert engine.own_selection() == plain.own_selection() == {k: thresholds[k] for k in list(thresholds)[1:]}
    written = json.loads(manifest_path(out).read_text(encoding="utf-8"))
    del written["thresholds"]  # as engines were before they kept them
    manifest_path(out).write_text(json.dumps(written), encoding="utf-8")
    with load_predictor(out) as engine:
        assert engine.own_selection() == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_dynamic_batch_with_a_profile_and_graphs_captured_anew(machine: Machine, tmp_path: Path, version: str) -> None:
    fake = machine(version)
    model = moving_detector("batch")
    source, out = ours(model, tmp_path / "student.onnx"), tmp_path / "student.engine"
    manifest = export_engine(source, out, options=EngineOptions(batch=(1, 2, 4))).manifest
    assert manifest.profile == (1, 2, 4)
    memory = HostBuffers(ORIN)
    with TensorRTRuntime(out, cuda_graph=True, buffers=memory) as runtime:
        context = fake._contexts[-1]
        assert runtime.dynamic_batch
        assert context._runs == []
        for count in (2, 2, 4, 1):
            found = runtime.run(IMAGES[:count])
            wanted = run_onnx(with_top_candidates(model, ("boxes", "scores")), IMAGES[:count])
            np.testing.assert_allclose(found["boxes"], wanted["boxes"], rtol=1e-5)
            np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=1e-5)
        done = [what for what, _ in memory.log if what in ("capture", "launch", "graph closed")]
        again = ["graph closed", "capture", "launch"]
        assert done == ["capture", "launch", "launch", *again, *again]
        assert len(context._runs) == 3 + 4, "one plain run before each capture, then one a launch"
        with pytest.raises(RuntimeFailure, match="another shape"):
            runtime.run(np.concatenate([IMAGES, IMAGES]))
    assert not memory._memory, "device memory is given back"
    with pytest.raises(RuntimeFailure, match="closed"):
        runtime.run(IMAGES[:1])


def test_a_least_batch_is_filled_up(machine: Machine, tmp_path: Path) -> None:
    machine()
    source, out = ours(moving_detector("batch"), tmp_path / "s.onnx"), tmp_path / "s.engine"
    export_engine(source, out, options=EngineOptions(batch=(2, 2, 2)))
    with TensorRTRuntime(out, buffers=HostBuffers(ORIN)) as runtime:
        assert runtime.input_shape[0] == 2
        alone = {name: array[0].copy() for name, array in runtime.run(IMAGES[:1]).items()}
        both = runtime.run(IMAGES[:2])
        np.testing.assert_allclose(alone["boxes"], both["boxes"][0], rtol=1e-5)


def test_an_engine_is_given_no_larger_batches_than_its_profile(machine: Machine, tmp_path: Path) -> None:
    machine()
    source, out = ours(moving_detector("batch"), tmp_path / "s.onnx"), tmp_path / "s.engine"
    export_engine(source, out, options=EngineOptions(batch=(1, 2, 4)))
    with load_predictor(out) as predictor:
        answer, size = stream_of(predictor, 8)
        assert size == 4
        answer([np.zeros((64, 64, 3), np.uint8)] * 4)


def test_gpu_times_are_taken_around_each_step(machine: Machine, detector: Path, tmp_path: Path) -> None:
    machine()
    export_engine(detector, tmp_path / "s.engine")
    with TensorRTRuntime(tmp_path / "s.engine", buffers=HostBuffers(ORIN)) as runtime:
        runtime.device_times = True
        runtime.run(IMAGES[:1])
        times = runtime.gpu_times()
    assert min(times.to_device, times.compute, times.to_host) >= 0
    assert times.compute > 0


def test_layer_times_by_tensorrts_own_profiler(machine: Machine, detector: Path, tmp_path: Path) -> None:
    from edgekd.bench.profile import profile_predictor
    from edgekd.predictor import load_predictor

    fake = machine()
    out = tmp_path / "s.engine"
    export_engine(detector, out)
    with TensorRTRuntime(out, buffers=HostBuffers(ORIN)) as runtime:
        runtime.run(IMAGES[:1])
        assert fake._contexts[-1].profiler is None
        first, second = runtime.layer_times(IMAGES[:1]), runtime.layer_times(IMAGES[:1])
    assert first == second != {}
    with load_predictor(out) as predictor:
        found = profile_predictor(predictor, out, [IMAGES[:1]], None, runs=2)
    assert found is not None
    assert found["tool"] == "tensorrt"
    assert {layer["name"]: layer["ms"] for layer in found["layers"]} == first
    assert found["layers"][0]["ms"] == max(first.values())


@pytest.fixture
def built(machine: Machine, detector: Path, tmp_path: Path) -> tuple[FakeTensorRT, Path, EngineResult]:
    fake = machine()
    out = tmp_path / "student.engine"
    return fake, out, export_engine(detector, out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "10.13.3.9"}, "another TensorRT"),
        ({"device": replace(ORIN, compute_capability="8.6")}, "another GPU"),
        ({"device": replace(ORIN, l4t="36.3.0")}, "another L4T"),
        ({"device": replace(ORIN, l4t=None)}, "not a Jetson"),
    ],
)
def test_a_foreign_engine_is_refused_with_the_command_that_rebuilds_it(
    built: tuple[FakeTensorRT, Path, EngineResult], machine: Machine, change: dict[str, Any], words: str
) -> None:
    _, out, result = built
    machine(**change)
    with pytest.raises(ArtifactError, match=words) as caught:
        load_predictor(out)
    assert caught.value.fix == result.manifest.rebuild
    assert "--format engine --precision fp32" in result.manifest.rebuild


def test_a_stale_engine_is_refused(built: tuple[FakeTensorRT, Path, EngineResult], detector: Path) -> None:
    _, out, _ = built
    write_detector(detector, GOOD_BOXES, GOOD_SCORES * 0.5)
    with pytest.raises(ArtifactError, match=r"another student\.onnx"):
        load_predictor(out)
    detector.unlink()  # an engine alone, as on a target, is no stale one
    load_predictor(out).close()


def test_another_file_of_the_source_s_name_beside_the_engine_is_not_its_source(
    machine: Machine, detector: Path, tmp_path: Path
) -> None:
    """The comparison runs the plan from a folder below, from where ../student.onnx is another one."""
    machine()
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / detector.name).write_bytes(b"an earlier student")
    export_engine(detector, folder / "s.engine")
    assert read_engine_manifest(folder / "s.engine").source["path"] == f"../{detector.name}"
    TensorRTRuntime(folder / "s.engine").close()


def test_an_engine_is_stale_too_when_weights_beside_its_source_have_changed(
    machine: Machine, detector: Path, tmp_path: Path
) -> None:
    machine()
    weights = tmp_path / "weights.data"
    onnx.save(onnx.load(detector), detector, save_as_external_data=True, location=weights.name, size_threshold=0)
    out = tmp_path / "student.engine"
    export_engine(detector, out)
    load_predictor(out).close()
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(ArtifactError, match=r"another weights\.data"):
        load_predictor(out)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: out.unlink(), "no such file"),
        (lambda out: manifest_path(out).unlink(), "manifest that belongs to it is missing"),
        (lambda out: manifest_path(out).write_text("{"), "damaged"),
        (lambda out: manifest_path(out).write_text('{"schema": "edgekd.engine/1"}'), "damaged"),
        (lambda out: manifest_path(out).write_text('{"schema": "edgekd.engine/9"}'), "another version of edgekd"),
        (lambda out: out.write_bytes(out.read_bytes() + b" "), "not the engine that its manifest speaks of"),
    ],
)
def test_damaged_engines(
    built: tuple[FakeTensorRT, Path, EngineResult], damage: Callable[[Path], object], words: str
) -> None:
    _, out, _ = built
    damage(out)
    with pytest.raises(ArtifactError, match=words):
        load_predictor(out, runtime="tensorrt")


def test_a_version_compatible_engine_goes_to_later_versions_of_its_major(
    machine: Machine, detector: Path, tmp_path: Path
) -> None:
    machine("10.3.0")
    out = tmp_path / "s.engine"
    manifest = export_engine(detector, out, options=EngineOptions(version_compatible=True)).manifest
    assert "VERSION_COMPATIBLE" in manifest.flags
    machine("10.16.1.11")
    load_predictor(out).close()
    machine("11.4.0.106")
    with pytest.raises(ArtifactError, match="another TensorRT"):
        load_predictor(out)


def test_hardware_compatibility(machine: Machine, detector: Path, tmp_path: Path) -> None:
    machine("10.3.0")
    out = tmp_path / "s.engine"
    with pytest.raises(MissingDependencyError, match=r"SAME_COMPUTE_CAPABILITY[\s\S]*10\.3\.0[\s\S]*10\.13"):
        export_engine(detector, out, options=EngineOptions(hardware="same-capability"))
    assert not out.exists()
    export_engine(detector, out, options=EngineOptions(hardware="ampere+"))
    machine("10.3.0", device=replace(ORIN, compute_capability="9.0"))
    load_predictor(out).close()
    machine("10.3.0", device=replace(ORIN, compute_capability="7.5"))
    with pytest.raises(ArtifactError, match="another GPU"):
        load_predictor(out)


def test_dla_needs_one_and_a_precision_that_it_computes(machine: Machine, tmp_path: Path) -> None:
    source, out = ours(moving_detector(), tmp_path / "s.onnx"), tmp_path / "s.engine"
    machine("10.13.3.9")
    with pytest.raises(MissingDependencyError, match=r"no such DLA core[\s\S]*TensorRT 10\.7"):
        export_engine(source, out, precision="fp16", options=EngineOptions(dla_core=0))
    machine("10.3.0", dla_cores=2)
    with pytest.raises(UserError, match="fp16 models only"):
        export_engine(source, out, options=EngineOptions(dla_core=0))
    with pytest.raises(UserError, match="no Q/DQ pairs"):
        build_engine(quantised(), EngineOptions(dla_core=0), ORIN)
    manifest = export_engine(source, out, precision="fp16", options=EngineOptions(dla_core=1)).manifest
    assert not manifest.strongly_typed
    assert manifest.flags == ("FP16", HELD, "GPU_FALLBACK")
    assert "--dla 1" in manifest.rebuild


def test_the_timing_cache_is_kept_by_version_and_device(machine: Machine, detector: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "edgekd" / "tensorrt"
    machine("10.3.0")
    for _ in range(2):
        export_engine(detector, tmp_path / "s.engine")
    machine("10.3.0", device=replace(ORIN, cuda="12.8", memory_bytes=ORIN.memory_bytes - 4096))
    export_engine(detector, tmp_path / "s.engine")
    (first,) = folder.iterdir()
    assert first.read_bytes() == b"10.3.0 Orin|3", "a reboot and another driver change no timings"
    machine("10.13.3.9")
    export_engine(detector, tmp_path / "s.engine")
    assert len(list(folder.iterdir())) == 2
    first.write_bytes(b"something else")
    machine("10.3.0")
    export_engine(detector, tmp_path / "s.engine")
    assert first.read_bytes() == b"10.3.0 Orin|1", "a cache that does not fit is begun again"


def test_everything_asked_of_the_builder_reaches_it(
    machine: Machine, detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import fake_tensorrt

    fake = machine("10.13.3.9")
    seen: list[Any] = []
    monkeypatch.setattr(fake_tensorrt, "_problem_of", lambda trt, network, config: seen.append(config))
    monkeypatch.setattr("edgekd.export.engine.memory_bytes", lambda: (2**33, 2**30))
    options = EngineOptions(workspace_mib=256, level=4, library_tactics=False)
    build_engine(onnx.load(str(detector)), options, ORIN)
    (config,) = seen
    assert config._pools == {"WORKSPACE": 256 * 2**20}
    assert config._level == 4
    left = {source.name for source in fake.TacticSource if config._sources & (1 << int(source))}
    assert left == {"EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"}
    build_engine(onnx.load(str(detector)), EngineOptions(), ORIN)
    assert seen[-1]._pools == {"WORKSPACE": 2**29}, "half of what a Jetson has left"
    with pytest.raises(UserError, match="less memory is free"):
        build_engine(onnx.load(str(detector)), EngineOptions(workspace_mib=2048), ORIN)
    build_engine(onnx.load(str(detector)), EngineOptions(workspace_mib=2048), replace(ORIN, integrated=False))
    build_engine(onnx.load(str(detector)), EngineOptions(), replace(ORIN, l4t=None))
    assert seen[-1]._pools == {"WORKSPACE": 2**29}, "a container may hide the L4T release"


def test_strong_typing_with_flags_fails_as_it_does_on_tensorrt(machine: Machine) -> None:
    """The stand-in's own rule: without it, the tests above would prove nothing."""
    trt = machine("10.13.3.9")
    half = moving_detector()
    name_nodes(half)
    half = to_float16(half)
    logger = logger_of(trt)
    builder = trt.Builder(logger)
    for strong, flag, works in [(True, True, False), (True, False, True), (False, True, True), (False, False, False)]:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strong else 0)
        assert trt.OnnxParser(network, logger).parse(half.SerializeToString())
        config = builder.create_builder_config()
        if flag:
            config.set_flag(trt.BuilderFlag.FP16)
        assert (builder.build_serialized_network(network, config) is not None) is works


@pytest.mark.parametrize(
    ("version", "owner", "name"),
    [
        ("11.4.0.106", "BuilderFlag", "FP16"),
        ("11.4.0.106", "NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"),
        ("8.6.1", "NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("10.3.0", "HardwareCompatibilityLevel", "SAME_COMPUTE_CAPABILITY"),
        ("10.3.0", "BuilderFlag", "NO_SUCH_FLAG"),
    ],
)
def test_the_stand_in_has_a_versions_names_and_no_others(machine: Machine, version: str, owner: str, name: str) -> None:
    trt = machine(version)
    with pytest.raises(AttributeError):
        getattr(getattr(trt, owner), name)
    with pytest.raises(MissingDependencyError, match=rf"{name}[\s\S]*{version}[\s\S]*some other"):
        optional(getattr(trt, owner), name, "some other TensorRT")
    with pytest.raises(AttributeError):
        _ = trt.Builder(logger_of(trt)).platform_has_fast_fp17
    with pytest.raises(AttributeError):
        _ = trt.no_such_function


def test_every_parser_error_is_told(machine: Machine, tmp_path: Path) -> None:
    model = quantised(5)
    model.graph.node.append(helper.make_node("Odd", ["scores"], ["more"], "odd", domain="some.where"))
    machine("10.3.0")
    with pytest.raises(ExportError, match=r"quantise[\s\S]*symmetric[\s\S]*dequantise[\s\S]*some\.where\.Odd"):
        build_engine(model, EngineOptions(), ORIN)


def test_a_plan_of_none_raises_with_what_tensorrt_said(machine: Machine, detector: Path, tmp_path: Path) -> None:
    machine()
    from tests import fake_tensorrt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_tensorrt, "_problem_of", lambda *_: "out of memory while timing")
        with pytest.raises(ExportError, match="out of memory while timing"):
            export_engine(detector, tmp_path / "s.engine")
    assert list(tmp_path.glob("*engine*")) == []


def test_an_engine_that_is_not_what_was_asked_for_raises(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    layers = [{"name": "a", "type": "Conv", "precision": "fp32"}]
    monkeypatch.setattr("edgekd.export.engine.layers_of", lambda *_: layers)
    half = moving_detector()
    name_nodes(half)
    with pytest.raises(ExportError, match="without a single fp16 layer"):
        build_engine(to_float16(half), EngineOptions(), ORIN)


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


def test_without_tensorrt_or_a_gpu(detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"TensorRT cannot be imported[\s\S]*JetPack"):
        tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("10.3.0", has_gpu=False))
    with pytest.raises(MissingDependencyError, match=r"cannot start here[\s\S]*CUDA initialization failure"):
        build_engine(onnx.load(str(detector)), EngineOptions(), ORIN)
    old = FakeTensorRT("8.6.1")
    old.__version__ = "8.4.1.5"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(MissingDependencyError, match="too old"):
        tensorrt()


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


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Channel major FP16 format where channel % 4 == 0", "fp16"),
        ("Row major Int8 format", "int8"),
        ("Row major linear FP32", "fp32"),
        ("Half", "fp16"),
        ("BF16", "bf16"),
        ("UInt8", "uint8"),
        ("N/A", None),
    ],
)
def test_the_inspectors_words(words: str, kind: str | None) -> None:
    assert precision_in(words) == kind


def test_the_precision_of_a_graph() -> None:
    half = moving_detector()
    name_nodes(half)
    assert [graph_precision(model) for model in (moving_detector(), to_float16(half), quantised())] == [
        "fp32",
        "fp16",
        "int8",
    ]
    named = to_float16(half)
    weights = next(tensor for tensor in named.graph.initializer if tensor.data_type == TensorProto.FLOAT16)
    del named.graph.node[:]
    named.graph.node.append(helper.make_node("Constant", [], [weights.name], value=weights))
    named.graph.initializer.remove(weights)
    assert graph_precision(named) == "fp16", "some exporters write weights as nodes"


def test_l4t(tmp_path: Path) -> None:
    assert l4t_release(tmp_path) is None
    file = tmp_path / "etc" / "nv_tegra_release"
    file.parent.mkdir()
    file.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert l4t_release(tmp_path) == "36.4.3"
    file.write_text("something else")
    assert l4t_release(tmp_path) is None


def test_a_package_that_breaks_on_import_does_not_keep_the_others_from_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch without its CUDA libraries raises OSError, PyCUDA for another NumPy raises ValueError."""
    broken = {"pycuda": ValueError("numpy.dtype size changed"), "torch": OSError("libcublas.so.12: cannot open")}

    def opened(name: str, index: int) -> HostBuffers:
        if name in broken:
            raise broken[name]
        if name == "cuda-python":
            raise RuntimeError
        return HostBuffers()

    monkeypatch.setattr("edgekd.runtimes.cuda_buffers.open_cuda_buffers", opened)
    assert buffers_module.open_buffers().name == "host"
    with pytest.raises(MissingDependencyError, match=r"pycuda: numpy\.dtype size changed"):
        buffers_module.open_buffers("pycuda")


def nms_inside() -> onnx.ModelProto:
    """A detector whose outputs are as long as there are objects."""
    model = moving_detector()
    helper.set_model_props(model, {})
    return append_nms(model, Selection(score_threshold=0.4))


@pytest.mark.parametrize("profile", [None, (1, 1, 2)])
def test_outputs_that_grow_with_the_picture_get_no_memory(
    machine: Machine, detector: Path, tmp_path: Path, profile: tuple[int, int, int] | None
) -> None:
    """TensorRT writes as many rows as it finds, whatever there is memory for."""
    trt = machine("8.6.1")
    out = tmp_path / "s.engine"
    export_engine(detector, out)
    builder = trt.Builder(logger_of(trt))
    network = create_network(trt, builder, strongly_typed=False)
    parse_onnx(trt, network, nms_inside().SerializeToString())
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    manifest = read_engine_manifest(out)
    changes: dict[str, Any] = {"plan_sha256": hashlib.sha256(plan).hexdigest()}
    if profile:  # as if the open size were the batch
        changes.update(profile=profile, inputs={"images": {"shape": [-1, 3, 64, 64], "dtype": "FLOAT"}})
    out.write_bytes(plan)
    write_engine_manifest(out, replace(manifest, **changes))
    buffers = HostBuffers(ORIN)
    with pytest.raises(ArtifactError, match="size depends on the picture"):
        TensorRTRuntime(out, buffers=buffers).run(IMAGES[:1])
    assert profile or not buffers._memory, "what was allocated before is given back"


def test_shapes_that_tensorrt_cannot_tell(
    machine: Machine, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`infer_shapes` lists what is missing, but raises for everything else."""
    from tests import fake_tensorrt

    def fails(_: Any) -> list[str]:
        raise RuntimeError("shape inference failed")

    machine("8.6.1")
    export_engine(detector, tmp_path / "s.engine")
    monkeypatch.setattr(fake_tensorrt._Context, "infer_shapes", fails)
    with (
        TensorRTRuntime(tmp_path / "s.engine", buffers=HostBuffers(ORIN)) as runtime,
        pytest.raises(RuntimeFailure, match="cannot tell its shapes"),
    ):
        runtime.run(IMAGES[:1])


def test_no_way_to_the_gpus_memory_says_why_for_each() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here")
    with pytest.raises(MissingDependencyError, match="no way to reach the GPU's memory") as caught:
        buffers_module.open_buffers()
    for backend in buffers_module.BACKENDS:
        assert f"{backend}: " in str(caught.value)
    with pytest.raises(UserError, match="unknown buffer backend"):
        buffers_module.open_buffers("host")


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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_run_becomes_an_engine(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    """From a checkpoint through the export's own gate, laid out for TensorRT, to an engine past the last hop."""
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
    result = export_engine(run, out, precision=precision, config=config, data=data)
    assert [report.precision for report in result.parity] == [*dict.fromkeys(["fp32", precision]), precision]
    assert result.parity[-1].ap50 is not None
    assert not result.parity[-1].generated
    assert result.manifest.spec is not None
    assert result.manifest.layer_precisions()[precision] > 0
    assert result.manifest.source["path"] == "run/model.pt"
    load_predictor(out).close()


def test_an_engine_on_the_drivers_own_buffers(machine: Machine, detector: Path, tmp_path: Path) -> None:
    """The same engine over ctypes on a stub libcuda: addresses, streams and events as integers of full width."""
    import ctypes
    import subprocess

    from edgekd.runtimes.cuda_driver import CudaDriver
    from edgekd.runtimes.handle_buffers import driver_buffers

    library = tmp_path / "libcuda.so.1"
    source = Path(__file__).with_name("stub_cuda.c")
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no C compiler for the stub: {error}")
    buffers = driver_buffers(CudaDriver(0, str(library)))
    machine(device=buffers.device)
    out = tmp_path / "student.engine"
    export_engine(detector, out, buffers=buffers)
    with TensorRTRuntime(out, buffers=buffers) as runtime:
        found = runtime.run(IMAGES[:1])
        np.testing.assert_allclose(found["boxes"][0], GOOD_BOXES, atol=1e-5)
        np.testing.assert_allclose(found["scores"][0], GOOD_SCORES, atol=1e-5)
    buffers.close()
    loaded = ctypes.CDLL(str(library))
    assert (loaded.stub_live(), loaded.stub_depth(), loaded.stub_retained()) == (0, 0, 0)
