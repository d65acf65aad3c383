"""What the builder is asked for: precisions, options, and what each supported TensorRT refuses, on a strict stand-in."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import ArtifactError, ExportError, MissingDependencyError, ParityError, UserError
from edgekd.export.engine import EngineOptions, build_engine, graph_precision
from edgekd.export.engine_job import export_engine
from edgekd.export.float16 import to_float16
from edgekd.export.graph import name_nodes
from edgekd.predictor import load_predictor
from edgekd.runtimes.trt_api import create_network, logger_of, open_engine, optional, parse_onnx, precision_in, tensorrt
from edgekd.runtimes.trt_precision import set_precision
from tests.engine_doubles import HELD, WEAK, Machine, moving_detector, ours, quantised
from tests.fake_tensorrt import ORIN, VERSIONS, FakeTensorRT


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


def test_operators_that_tensorrt_lacks_are_refused_before_it_is_asked(machine: Machine, tmp_path: Path) -> None:
    """As `quantize_dynamic` of ONNX Runtime writes them."""
    fake = machine()
    model = moving_detector()
    node = helper.make_node("DynamicQuantizeLinear", ["images"], ["q", "s", "z"], "dynamic")
    model.graph.node.insert(0, node)
    with pytest.raises(UserError, match=r"operator: dynamic: TensorRT has no DynamicQuantizeLinear"):
        export_engine(ours(model, tmp_path / "s.onnx"), tmp_path / "s.engine", precision="int8")
    assert fake._builds == 0


def test_an_engine_converted_to_float16_agrees_with_the_file_it_was_given(machine: Machine, tmp_path: Path) -> None:
    """To add 3,001 and take away 3,000 changes nothing in float16, in the engine and on ONNX Runtime alike."""
    machine("10.13.3.9")
    model = moving_detector()
    graph = model.graph
    for name, value in (("more", 3001.0), ("less", 3000.0)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    sigmoid = graph.node.pop()
    sigmoid.input[0] = "back"
    up, down = (["logits", "more"], ["up"], "up_add"), (["up", "less"], ["back"], "down_sub")
    graph.node.extend([helper.make_node("Add", *up), helper.make_node("Sub", *down), sigmoid])
    with pytest.raises(ParityError, match="scores"):
        export_engine(ours(model, tmp_path / "s.onnx"), tmp_path / "s.engine", precision="fp16")
    assert not (tmp_path / "s.engine").exists()


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


def test_a_dla_that_runs_nothing_is_not_the_gpu(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU_FALLBACK would build all of it for the GPU without a word."""
    fake = machine("10.3.0", dla_cores=2)
    source, out = ours(moving_detector("n"), tmp_path / "s.onnx"), tmp_path / "s.engine"
    options = EngineOptions(batch=(2, 2, 2), dla_core=0)
    notes = export_engine(source, out, precision="fp16", options=options).notes
    assert any(note.startswith("the DLA can run 1 of ") for note in notes)
    with pytest.raises(UserError, match="one batch size"):
        EngineOptions(batch=(1, 2, 2), dla_core=0)
    monkeypatch.setattr("tests.fake_tensorrt._Config.can_run_on_DLA", lambda config, layer: False)
    builds = fake._builds
    with pytest.raises(ExportError, match="can run no layer"):
        export_engine(source, out, precision="fp16", options=options)
    assert fake._builds == builds


def test_the_timing_cache_is_kept_by_version_and_device(
    machine: Machine, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr("tests.fake_tensorrt._TimingCache.serialize", lambda cache: None)
    export_engine(detector, tmp_path / "s.engine")
    assert first.read_bytes() == b"10.3.0 Orin|1", "what TensorRT does not give cannot be kept"


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
    dynamic = moving_detector()
    dynamic.graph.node.insert(0, onnx.helper.make_node("DynamicQuantizeLinear", ["images"], ["q", "scale", "zero"]))
    assert graph_precision(dynamic) == "int8", "by quantize_dynamic of ONNX Runtime, as `bench` has it"
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
