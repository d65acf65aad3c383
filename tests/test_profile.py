"""Layer profiles: traces read right, layers matched to the graph, and the command that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from edgekd.bench.entries import BenchArtifact
from edgekd.bench.layers import Layer, read_layers
from edgekd.bench.profile import add_profiles, macs_of, profile_predictor, profile_text, read_trace
from edgekd.cli import app
from edgekd.detectors import build_detector
from edgekd.export.onnx import Precision, export_onnx
from edgekd.predictor import load_predictor
from edgekd.types import DetectorSpec, PreprocessSpec
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, SIDE, make_dataset, write_detector
from tests.export_double import traced


def node(name: str, ms: float, op: str = "Conv") -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": ms * 1e3, "args": {"op_name": op}}


RUN = {"cat": "Session", "name": "model_run", "dur": 1}


def test_a_trace_is_read_without_its_first_runs() -> None:
    events = [
        node("a", 9.0),
        RUN,
        node("a", 1.0),
        RUN,
        node("a", 3.0),
        node("b", 2.0, "Relu"),
        RUN,
        node("a", 2.0),
        RUN,
    ]
    times = read_trace(events, unrecorded=1)
    assert times == {("a", "Conv"): pytest.approx(2.0), ("b", "Relu"): pytest.approx(2.0 / 3)}


@pytest.mark.parametrize(
    ("name", "op", "macs"),
    [
        ("conv2d_nchwc", "Conv", 1),
        ("conv2d_1_nchwc", "Conv", 2),
        ("node_conv2d_1_token_9", "QLinearConv", 2),
        ("conv2d_12", "Conv", 3),
        ("InsertedPrecisionFreeCast_conv2d_1_nchwc", "Conv", 2),
        ("conv2d_13", "Conv", None),
        ("conv2d_1/relu", "Relu", None),
        ("elsewhere", "Conv", None),
        ("conv2d", None, None),
    ],
)
def test_layers_are_found_by_what_is_left_of_their_names(name: str, op: str | None, macs: int | None) -> None:
    known = (("node_conv2d", "conv2d"), ("node_conv2d_1", "conv2d_1"), ("node_conv2d_12", "conv2d_12"))
    counted = {n: Layer(names, "Conv", index, None) for index, names in enumerate(known, 1) for n in names}
    assert macs_of(name, op, counted) == macs


def test_the_layers_of_a_real_session(tmp_path: Path) -> None:
    file = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES, width=16)
    with load_predictor(file, threads=1) as predictor:
        found = profile_predictor(predictor, file, [np.zeros((1, 3, SIDE, SIDE), np.float32)], 1, runs=4)
    assert found is not None
    assert (found["tool"], found["runs"]) == ("onnxruntime", 4)
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1, abs=0.01)
    [conv] = [layer for layer in found["layers"] if "Conv" in layer["op"]]
    assert conv["macs"] == SIDE * SIDE * 16 * 27
    assert conv["gflops"] == pytest.approx(2 * conv["macs"] / conv["ms"] / 1e6, rel=0.01)
    times = [layer["ms"] for layer in found["layers"]]
    assert times == sorted(times, reverse=True)
    assert not list(tmp_path.glob("*.json")), "the trace is not left behind"


def test_an_open_size_of_channels_last_is_filled_in_its_place(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["image"], ["turned"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["turned", "kernel"], ["out"], "conv", pads=[1, 1, 1, 1]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", "h", "w", 3])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    kernel = numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), "kernel")
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [image], [out], [kernel])), str(tmp_path / "m.onnx"))
    [layer] = read_layers(tmp_path / "m.onnx", (20, 30))
    assert layer.macs == 20 * 30 * 4 * 27


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_convolution_of_a_student_is_counted(
    tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ReLU6 behind a convolution, and the sum of a residual, give the fused layer their name."""
    spec = DetectorSpec("mobilenetv2-ssd-lite", ("a",), PreprocessSpec((64, 64)), width=0.35)
    images = [np.random.default_rng(0).random((1, 3, 64, 64), np.float32)] * 2
    torch.manual_seed(0)
    monkeypatch.setattr("edgekd.export.onnx.trace", traced)
    file = export_onnx(build_detector(spec), tmp_path / "a.onnx", precision=precision, calibration=images)
    with load_predictor(file, threads=1) as predictor:
        found = profile_predictor(predictor, file, images, 1, runs=2)
    assert found is not None
    convolutions = [layer for layer in found["layers"] if "Conv" in layer["op"]]
    assert sum(layer["macs"] or 0 for layer in convolutions) == sum(layer.macs or 0 for layer in read_layers(file))


def test_profiles_go_into_the_result(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", images=3)
    file = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES)
    rows = [{"name": "a", "role": "student", "runtime": "onnxruntime"}, {"name": "all", "role": "ensemble"}]
    result = {"settings": {"threads": 1}, "rows": rows}
    add_profiles(result, [BenchArtifact(file, "a")], dataset, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert rows[1]["profile"] is None
    shown = profile_text(result, shown=2)
    assert "a: the slowest 2 of" in shown
    assert shown.count("\n") == 3


@pytest.mark.parametrize(
    ("runtime", "way"), [("torch", "export it to ONNX"), ("openvino", "--runtime onnxruntime shows them")]
)
def test_a_runtime_without_profiler_says_so(runtime: str, way: str) -> None:
    rows = [{"name": "a", "role": "student", "runtime": runtime, "profile": None}]
    assert profile_text({"rows": rows}) == f"a: {runtime} says nothing of its layers; {way}"


def test_not_on_a_target(tmp_path: Path) -> None:
    file = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES)
    done = CliRunner().invoke(app, ["bench", str(file), "--profile", "--target", "ssh://nowhere"])
    assert done.exit_code == 2
    assert "--profile" in done.output
