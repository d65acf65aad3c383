"""fp16, calibration, Q/DQ placement for both targets, the linter, and keeping layers in float."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekd.detectors import build_detector, spec_for
from edgekd.errors import DataError, ExportError
from edgekd.export.calibration import METHODS, collect, entropy_share, percentile_share
from edgekd.export.float16 import to_float16
from edgekd.export.graph import GraphIndex, copy_of, metadata_of, open_session, raw_tensors, set_metadata, with_outputs
from edgekd.export.lint import INT8_KEY, lint_qdq
from edgekd.export.onnx import trace
from edgekd.export.parity import onnx_run
from edgekd.export.placement import int8_nodes, tensors_to_quantise
from edgekd.export.precision import has_vnni, to_int8, weight_limit
from edgekd.export.qdq import activation_parameters, quantise
from edgekd.export.sensitivity import rank_layers
from edgekd.recipe import ExportConfig, ModelConfig
from tests.export_double import CLASSES, ToyDetector, traced

IMAGES = [np.random.default_rng(seed).normal(size=(1, 3, 64, 64)).astype(np.float32) for seed in range(6)]
TARGETS = ("x86", "tensorrt")


@pytest.fixture(scope="module")
def base() -> onnx.ModelProto:
    return traced(ToyDetector())


@pytest.fixture(scope="module")
def int8(base: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    return {target: to_int8(base, IMAGES, config=ExportConfig(target=target)).model for target in TARGETS}


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# -- fp16 ------------------------------------------------------------------------------------------------------------


def test_fp16_computes_in_half_but_decodes_in_float(base: onnx.ModelProto):
    half = to_float16(base)
    assert [i.type.tensor_type.elem_type for i in (*half.graph.input, *half.graph.output)] == [TensorProto.FLOAT] * 3
    weights = [value for name, value in constants(half).items() if value.ndim == 4]
    assert weights
    assert {value.dtype for value in weights} == {np.dtype(np.float16)}
    assert kinds(half)["Cast"] == 1 + len(raw_tensors(base))  # in at the image, out at the raw outputs, nowhere else
    for image in IMAGES[:2]:
        a, b = onnx_run(base)(image), onnx_run(half)(image)
        assert 0 < np.abs(a["scores"] - b["scores"]).max() < 0.01
        size = (a["boxes"][..., 2:] - a["boxes"][..., :2]).max(-1, keepdims=True)
        assert (np.abs(a["boxes"] - b["boxes"]) < 0.05 + 0.005 * size).all()
    assert len(half.SerializeToString()) < 0.75 * len(base.SerializeToString())


def test_fp16_keeps_sums_of_squares_in_float():
    nodes = [
        helper.make_node("Mul", ["images", "hundred"], ["big"], name="scale"),
        helper.make_node("ReduceL2", ["big"], ["norm"], name="norm", axes=[1], keepdims=1),
        helper.make_node("Div", ["big", "norm"], ["scores"], name="divide"),
    ]
    dims = [1, 512, 2, 2]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in ("images", "scores")]
    constant = [numpy_helper.from_array(np.float32(100), "hundred")]
    graph = helper.make_graph(nodes, "l2", info[:1], info[1:], constant)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    image = np.ones(dims, np.float32)  # the sum of squares is 5.12 million
    found = open_session(to_float16(model)).run(None, {"images": image})[0]
    assert np.allclose(found, 512**-0.5, rtol=2e-3)


def test_fp16_refuses_weights_that_do_not_fit(base: onnx.ModelProto):
    model = copy_of(base)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    value = numpy_helper.to_array(weight).copy()
    value.flat[0] = 1e6
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    with pytest.raises(ExportError, match="float16"):
        to_float16(model)


# -- calibration -----------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_tensors(base: onnx.ModelProto):
    names = ["images", *tensors_to_quantise(base, set(int8_nodes(base, "x86")), "x86")[1:4]]
    seen = collect(base, names, IMAGES, histograms=True)
    session = open_session(with_outputs(base, names[1:]), optimised=False)
    for name in names:
        values = [image if name == "images" else session.run([name], {"images": image})[0] for image in IMAGES]
        assert seen[name].lowest == pytest.approx(min(v.min() for v in values), abs=1e-4)
        assert seen[name].highest == pytest.approx(max(v.max() for v in values), abs=1e-4)
        assert seen[name].histogram.sum() == sum(v.size for v in values)
        low, high = seen[name].range("percentile")
        inside = np.mean([(v >= low - 1e-4) & (v <= high + 1e-4) for v in values])
        assert inside >= 0.9998
        for method in METHODS:
            low, high = seen[name].range(method)
            assert seen[name].lowest <= low <= high <= seen[name].highest


def test_percentile_leaves_out_the_tail_alone():
    histogram = np.zeros(2048, np.int64)
    histogram[:100], histogram[2047] = 10_000, 1
    assert percentile_share(histogram) == pytest.approx(100 / 2048)


@pytest.mark.parametrize(
    ("counts", "least", "most"),
    [
        (np.ones(2048), 0.99, 1.0),  # nothing to cut from a flat histogram
        (np.exp(-np.arange(2048) / 60.0) * 1e6, 0.1, 0.7),  # a long thin tail is cut
        (np.zeros(2048), 1.0, 1.0),
    ],
)
def test_entropy_cuts_thin_tails(counts: np.ndarray, least: float, most: float):
    assert least <= entropy_share(counts.astype(np.int64)) <= most


def test_calibration_needs_images_and_finite_values(base: onnx.ModelProto):
    with pytest.raises(DataError, match="calibrat"):
        to_int8(base, [], config=ExportConfig())
    with pytest.raises(ExportError, match="not finite"):
        to_int8(base, [np.full((1, 3, 64, 64), np.nan, np.float32)], config=ExportConfig())


@pytest.mark.parametrize(
    ("low", "high", "target", "scale", "zero_point"),
    [
        (0.0, 6.0, "x86", 6 / 255, 0),
        (-1.0, 1.0, "x86", 2 / 255, 128),
        (2.0, 5.0, "x86", 5 / 255, 0),  # zero must be representable
        (-5.0, -2.0, "x86", 5 / 255, 255),
        (-1.0, 2.0, "tensorrt", 2 / 127, 0),
    ],
)
def test_parameters(low: float, high: float, target: str, scale: float, zero_point: int):
    found = activation_parameters(low, high, target)
    assert float(found.scale) == pytest.approx(scale)
    assert int(found.zero_point) == zero_point
    assert found.zero_point.dtype == (np.uint8 if target == "x86" else np.int8)


def test_a_dead_tensor_gets_a_usable_scale():
    assert activation_parameters(0.0, 0.0, "x86").scale > 0


# -- placement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_int8_stays_close_and_passes_the_linter(base: onnx.ModelProto, int8: dict[str, onnx.ModelProto], target: str):
    model = int8[target]
    assert lint_qdq(model) == []
    assert metadata_of(model)["edgekd.target"] == target
    assert metadata_of(model)["edgekd.precision"] == "int8"
    for image in IMAGES:
        a, b = onnx_run(base)(image), onnx_run(model)(image)
        assert 1e-4 < np.abs(a["scores"] - b["scores"]).max() < 0.15


def test_x86_form(int8: dict[str, onnx.ModelProto]):
    model = int8["x86"]
    values = constants(model)
    assert kinds(model)["Clip"] == 1  # the ReLU6s are in the ranges; decoding's stays
    activations = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert {values[n.input[2]].dtype for n in activations} == {np.dtype(np.uint8)}
    assert [v.dtype for n, v in values.items() if n.endswith("_bias_quantised")] == [np.dtype(np.int32)] * 6
    weights = [v for n, v in values.items() if n.endswith("_weight_quantised")]
    assert [v.dtype for v in weights] == [np.dtype(np.int8)] * 6
    assert all(
        np.abs(v).reshape(len(v), -1).max(1).min() == weight_limit("x86") for v in weights
    )  # all of its range, a channel


def test_x86_form_runs_in_int8(int8: dict[str, onnx.ModelProto], tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(int8["x86"].SerializeToString(), options, providers=["CPUExecutionProvider"])
    ran = kinds(onnx.load(tmp_path / "optimised.onnx"))
    assert (ran["QLinearConv"], ran["QLinearAdd"], ran["Conv"], ran["FusedConv"]) == (6, 1, 0, 0)


def test_tensorrt_form(base: onnx.ModelProto, int8: dict[str, onnx.ModelProto]):
    model = int8["tensorrt"]
    values, index = constants(model), GraphIndex(model)
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(values[n.input[2]].dtype == np.int8 and not values[n.input[2]].any() for n in pairs)
    assert not any(value.dtype == np.int32 for value in values.values())
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    for conv in (n for n in model.graph.node if n.op_type == "Conv"):
        assert values[conv.input[2]].dtype == np.float32
        assert all(index.producer[name].op_type == "DequantizeLinear" for name in conv.input[:2])
    residual = next(n for n in model.graph.node if n.op_type == "Add" and n.name in int8_nodes(base, "tensorrt"))
    assert sorted(index.producer[name].op_type for name in residual.input) == ["Conv", "DequantizeLinear"]


def test_decoding_stays_float(base: onnx.ModelProto, int8: dict[str, onnx.ModelProto]):
    for model in int8.values():
        index = GraphIndex(model)
        body = index.before(raw_tensors(model))
        decoding = [node for node in model.graph.node if node.name not in body]
        assert decoding
        assert not any("QuantizeLinear" in node.op_type for node in decoding)


def test_dead_channels_with_a_bias_survive(base: onnx.ModelProto):
    model = copy_of(base)
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    for tensor in model.graph.initializer:
        if tensor.name in conv.input[1:3]:
            value = numpy_helper.to_array(tensor).copy()
            value[0] = 1e-20 if tensor.name == conv.input[1] else 3.0
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    result = to_int8(model, IMAGES, config=ExportConfig()).model
    a, b = onnx_run(model)(IMAGES[0]), onnx_run(result)(IMAGES[0])
    assert np.abs(a["scores"] - b["scores"]).max() < 0.15


def test_zero_channels_for_the_first_convolution_change_nothing(
    base: onnx.ModelProto, int8: dict[str, onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
):
    assert (kinds(int8["x86"])["Pad"], kinds(int8["tensorrt"])["Pad"]) == (1, 0)
    monkeypatch.setattr("edgekd.export.qdq._INPUT_CHANNELS", 0)
    plain = to_int8(base, IMAGES, config=ExportConfig()).model
    assert kinds(plain)["Pad"] == 0
    for image in IMAGES:
        wanted, found = onnx_run(plain)(image), onnx_run(int8["x86"])(image)
        assert np.array_equal(wanted["scores"], found["scores"])
        assert np.array_equal(wanted["boxes"], found["boxes"])


def test_narrow_weights_where_the_cpu_has_no_vnni(base: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edgekd.export.precision.has_vnni", lambda: False)
    model = to_int8(base, IMAGES, config=ExportConfig()).model
    weights = [v for n, v in constants(model).items() if n.endswith("_weight_quantised")]
    assert max(np.abs(v.astype(int)).max() for v in weights) == 63
    assert json.loads(metadata_of(model)[INT8_KEY])["reduce_range"] is True


def test_vnni_is_read_from_the_cpu():
    assert isinstance(has_vnni(), bool)


SILU_NODES = [
    helper.make_node("Conv", ["images", "w"], ["a"], name="first", pads=[1, 1, 1, 1]),
    helper.make_node("Sigmoid", ["a"], ["s"], name="sigmoid"),
    helper.make_node("Mul", ["a", "s"], ["silu"], name="silu"),
    helper.make_node("MaxPool", ["silu"], ["p"], name="pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    helper.make_node("LeakyRelu", ["p"], ["l"], name="leaky", alpha=0.1),
    helper.make_node("Concat", ["silu", "l"], ["c"], name="concat", axis=1),
    helper.make_node("Mul", ["c", "two"], ["d"], name="double"),
    helper.make_node("Resize", ["d", "", "scales"], ["r"], name="resize", mode="nearest"),
    helper.make_node("Conv", ["r", "v"], ["scores"], name="last"),
]


def silu_model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    values = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(5, 8, 1, 1)).astype(np.float32),
        "two": np.float32(2),
        "scales": np.float32([1, 1, 2, 2]),
    }
    graph = helper.make_graph(
        SILU_NODES,
        "silu",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 5, 16, 16])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("x86", {"first", "sigmoid", "silu", "pool", "leaky", "concat", "resize", "last"}),
        ("tensorrt", {"first", "pool", "last"}),
    ],
)
def test_operators_of_yolo_backbones(target: str, names: set[str]):
    model = silu_model()
    assert set(int8_nodes(model, target)) == names
    images = [image[..., :8, :8] for image in IMAGES]
    result = to_int8(model, images, config=ExportConfig(target=target)).model
    wanted, found = (open_session(m).run(None, {"images": images[0]})[0] for m in (model, result))
    assert np.abs(wanted - found).max() < 0.05 * np.abs(wanted).max()


def test_movers_share_their_inputs_scale():
    model = silu_model()
    images = [image[..., :8, :8] for image in IMAGES]
    result = to_int8(model, images, config=ExportConfig()).model
    values = constants(result)
    assert values["silu_scale"] == values["p_scale"]
    assert values["d_scale"] == values["r_scale"]


# -- the linter ------------------------------------------------------------------------------------------------------


def _set_constant(model: onnx.ModelProto, suffix: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith(suffix))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))


def _bypass(model: onnx.ModelProto, position: int) -> None:
    """Let the second convolution read float."""
    conv = [node for node in model.graph.node if node.op_type == "Conv"][1]
    pair = GraphIndex(model).producer[conv.input[position]]
    conv.input[position] = GraphIndex(model).producer[pair.input[0]].input[0] if position == 0 else pair.output[0]
    if position == 0:
        return


def _quantise_conv_side(model: onnx.ModelProto) -> None:
    index = GraphIndex(model)
    add = next(n for n in model.graph.node if n.op_type == "Add" and index.producer[n.input[1]].op_type == "Conv")
    side = add.input[1]
    scale, zero = "images_scale", "images_zero_point"
    add.input[1] = "side_dq"
    at = list(model.graph.node).index(add)
    model.graph.node.insert(at, helper.make_node("DequantizeLinear", ["side_q", scale, zero], ["side_dq"], name="sd"))
    model.graph.node.insert(at, helper.make_node("QuantizeLinear", [side, scale, zero], ["side_q"], name="sq"))


def _unfuse(model: onnx.ModelProto) -> None:
    conv = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    index = GraphIndex(model)
    quantiser = index.consumers[conv.output[0]][0]
    dequantised = index.consumers[quantiser.output[0]][0].output[0]
    for node in index.consumers[dequantised]:
        node.input[list(node.input).index(dequantised)] = conv.output[0]


def _dangle(model: onnx.ModelProto) -> None:
    model.graph.node.append(
        helper.make_node("QuantizeLinear", ["images", "images_scale", "images_zero_point"], ["nowhere"], name="lost")
    )


@pytest.mark.parametrize(
    ("target", "spoil", "code"),
    [
        ("tensorrt", lambda m: _set_constant(m, "images_zero_point", lambda v: v + 3), "zero-point"),
        ("x86", lambda m: _set_constant(m, "_weight_zero_point", lambda v: v + 1), "zero-point"),
        ("x86", lambda m: _set_constant(m, "images_scale", lambda v: v * 0), "scale"),
        ("x86", lambda m: _set_constant(m, "images_scale", lambda v: v * np.nan), "scale"),
        ("tensorrt", lambda m: _set_constant(m, "images_zero_point", lambda v: v.astype(np.uint8)), "activation-type"),
        ("x86", lambda m: _set_constant(m, "images_zero_point", lambda v: v.astype(np.int8)), "activation-type"),
        ("x86", lambda m: _bypass(m, 0), "float-conv"),
        ("tensorrt", lambda m: _bypass(m, 0), "float-conv"),
        ("x86", _unfuse, "unfused"),
        ("tensorrt", _quantise_conv_side, "residual"),
        ("x86", _dangle, "dangling"),
        ("x86", lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "opset-domain"),
    ],
)
def test_linter_finds(int8: dict[str, onnx.ModelProto], target: str, spoil: Callable, code: str):
    model = copy_of(int8[target])
    spoil(model)
    assert code in {finding.code for finding in lint_qdq(model)}


def test_linter_knows_which_target_forbids_int32_biases(int8: dict[str, onnx.ModelProto]):
    assert lint_qdq(int8["x86"], "x86") == []
    assert {"int32-bias", "zero-point", "activation-type"} <= {f.code for f in lint_qdq(int8["x86"], "tensorrt")}


# -- keeping layers in float -----------------------------------------------------------------------------------------


def test_auto_takes_the_best_method(base: onnx.ModelProto):
    seen: list[bytes] = []

    def evaluate(model: bytes) -> float:
        seen.append(model)
        return {1: 0.70, 2: 0.80, 3: 0.75}.get(len(seen), 0.80)  # minmax, entropy, percentile, then fp32

    result = to_int8(base, IMAGES, config=ExportConfig(calibration="auto"), evaluate=evaluate)
    assert result.method == "entropy"
    assert result.tried == {"minmax": 0.70, "entropy": 0.80, "percentile": 0.75}
    assert (result.ap50, result.reference_ap50, result.kept_float) == (0.80, 0.80, ())
    assert len(set(seen)) == 4


def test_auto_without_evaluation_takes_the_least_error(base: onnx.ModelProto):
    result = to_int8(base, IMAGES, config=ExportConfig(calibration="auto"))
    assert result.tried[result.method] == min(result.tried.values())


def outlier_model() -> onnx.ModelProto:
    """The toy with one weight channel so wide that its convolution cannot do with eight bits an activation."""
    detector = ToyDetector()
    detector.stem[1].weight.data[0] *= 40
    detector.stem[1].bias.data[0] = 0
    detector.pointwise[1].weight.data[3] *= 300
    return trace(detector)


def test_ranking_finds_the_layer_that_hurts():
    model = outlier_model()
    nodes = set(int8_nodes(model, "x86"))
    seen = collect(model, tensors_to_quantise(model, nodes, "x86"), IMAGES)
    ranges = {name: statistics.range("minmax") for name, statistics in seen.items()}
    ranking = rank_layers(model, ranges, IMAGES, "x86", reduce_range=not has_vnni())
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {entry.node for entry in ranking} == {node.name for node in convolutions}
    assert ranking[0].damage > 3 * ranking[len(ranking) // 2].damage
    pointwise = next(node for node in convolutions if _shape(model, node.input[1]) == (16, 16, 1, 1))
    assert pointwise.name in {entry.node for entry in ranking[:2]}


def _shape(model: onnx.ModelProto, name: str) -> tuple[int, ...]:
    return next(tuple(t.dims) for t in model.graph.initializer if t.name == name)


def float_convolutions(data: bytes) -> int:
    model = onnx.load_from_string(data)
    index = GraphIndex(model)
    return sum(node.op_type == "Conv" and index.is_constant(node.input[1]) for node in model.graph.node)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("needed", "kept"),
    [(0, 0), (1, 1), (2, 2), (3, 3), (100, 3)],  # at most half of six; the last never gets there
)
def test_layers_are_kept_until_the_budget_holds(base: onnx.ModelProto, target: str, needed: int, kept: int):
    def evaluate(model: bytes) -> float:
        return 0.9 if float_convolutions(model) >= needed else 0.8 + 0.01 * float_convolutions(model)

    result = to_int8(base, IMAGES, config=ExportConfig(target=target, map_budget=1.0), evaluate=evaluate)
    assert len(result.kept_float) == kept
    assert result.reference_ap50 == pytest.approx(0.9 if needed <= 6 else 0.86)
    assert json.loads(metadata_of(result.model)[INT8_KEY])["kept_float"] == list(result.kept_float)
    assert lint_qdq(result.model) == []
    assert float_convolutions(result.model.SerializeToString()) == kept
    open_session(result.model).run(None, {"images": IMAGES[0]})


def test_linter_wants_kept_layers_listed(base: onnx.ModelProto):
    nodes = set(int8_nodes(base, "x86"))
    seen = collect(base, tensors_to_quantise(base, nodes, "x86"), IMAGES)
    ranges = {name: statistics.range("minmax") for name, statistics in seen.items()}
    first = next(node.name for node in base.graph.node if node.op_type == "Conv")
    model = quantise(base, ranges, nodes - {first}, "x86")
    assert [finding.code for finding in lint_qdq(model)] == ["float-conv"]
    set_metadata(model, {INT8_KEY: {"kept_float": [first]}})
    assert lint_qdq(model) == []


@cache
def whole(name: str, width: float) -> onnx.ModelProto:
    config = ModelConfig(model=name, input_size=96, width=width)
    return trace(build_detector(spec_for(config, CLASSES)).eval())


@cache
def first_convolutions(name: str, width: float) -> onnx.ModelProto:
    """A detector's first convolutions one after the other, which say where a stem ends: tracing all takes seconds."""
    detector = build_detector(spec_for(ModelConfig(model=name, input_size=96, width=width), CLASSES))
    nodes, weights, channels = [], [], 3
    for module in [module for module in detector.modules() if isinstance(module, torch.nn.Conv2d)][:24]:
        if module.in_channels != channels or module.dilation != (1, 1):
            break
        channels, index = module.out_channels, len(nodes)
        weights.append(numpy_helper.from_array(module.weight.detach().numpy(), f"w{index}"))
        window = {"pads": [module.padding[0]] * 4, "strides": module.stride, "group": module.groups}
        nodes.append(
            helper.make_node("Conv", [f"c{index}", f"w{index}"], [f"c{index + 1}"], name=f"conv{index}", **window)
        )
    nodes[0].input[0], nodes[-1].output[0] = "images", "scores"
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 96, 96])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph(nodes, "stem", [image], [scores], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("make", "name", "width", "target", "convolutions"),
    [
        (whole, "mobilenetv2-ssd-lite", 0.35, "x86", 3),  # 16, 16 and 8 channels; the next one has 48
        (whole, "mobilenetv2-ssd-lite", 0.35, "tensorrt", 0),
        (first_convolutions, "mobilenetv2-ssd-lite", 1.0, "x86", 0),  # 32 channels from the start
        (first_convolutions, "vgg11-ssd", 0.25, "x86", 0),  # 16 channels, but at the image's own resolution
    ],
)
def test_a_narrow_stem_stays_float(
    make: Callable[[str, float], onnx.ModelProto], name: str, width: float, target: str, convolutions: int
):
    base = copy_of(make(name, width))
    images = [np.random.default_rng(0).normal(size=(1, 3, 96, 96)).astype(np.float32)]
    result = to_int8(base, images, config=ExportConfig(target=target))
    first = [node.name for node in base.graph.node if node.op_type == "Conv"][:convolutions]
    assert list(result.float_stem) == first == result.facts["float_stem"]
    assert set(first).isdisjoint(int8_nodes(base, target))
    assert lint_qdq(result.model, target) == []
    image_readers = [node.op_type for node in result.model.graph.node if "images" in node.input]
    assert image_readers == ["Conv" if first else "QuantizeLinear"]


@pytest.mark.parametrize(("opset", "dynamic_batch"), [(17, True), (21, False)])
def test_other_forms_convert_too(opset: int, dynamic_batch: bool):
    model = trace(ToyDetector(), opset=opset, dynamic_batch=dynamic_batch)
    images = np.concatenate(IMAGES[:2]) if dynamic_batch else IMAGES[0]
    wanted = onnx_run(model)(images)
    for converted in (
        to_float16(model),
        *(to_int8(model, IMAGES, config=ExportConfig(target=target)).model for target in TARGETS),
    ):
        found = onnx_run(converted)(images)
        assert found["scores"].shape == wanted["scores"].shape
        assert np.abs(found["scores"] - wanted["scores"]).max() < 0.15
