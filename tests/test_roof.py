"""The roof: what the graph says of each layer, what the machine does at most, and the share of it in a result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.bench.layers import read_layers
from edgekd.bench.roof import add_roof, bytes_moved, cpu_roof, product_models
from edgekd.device.roof import SIDE, fastest, machine_roof, share_of_roof
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, write_detector
from tests.bench_doubles import SIDE as INPUT_SIDE


def graph_of(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[int]) -> Path:
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_layers_equal_hand_counts(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], name="first", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "d"], ["out"], name="depthwise", pads=[1, 1, 1, 1], group=8),
    ]
    weights = {"w": np.ones((8, 3, 3, 3), np.float32), "d": np.ones((8, 1, 3, 3), np.float32)}
    first, depthwise = read_layers(graph_of(tmp_path / "a.onnx", nodes, weights, [1, 3, 16, 16]))
    assert (first.names, first.macs) == (("first", "a", "b"), 8 * 8 * 8 * 27)
    assert first.bytes == 4 * (3 * 16 * 16 + 8 * 27 + 8 * 8 * 8)
    assert (depthwise.names, depthwise.macs) == (("depthwise", "out"), 8 * 8 * 8 * 9)
    assert depthwise.bytes == 4 * (2 * 8 * 8 * 8 + 8 * 9)
    assert bytes_moved(tmp_path / "a.onnx") == [first.bytes, depthwise.bytes]


def test_quantised_layers_move_a_quarter(tmp_path: Path) -> None:
    scale, zero = {"s": np.array(0.1, np.float32)}, {"z": np.array(0, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"]),
        helper.make_node("Conv", ["images", "w"], ["out"]),
    ]
    weights = {"q": np.ones((4, 3, 1, 1), np.int8), **scale, **zero}
    [layer] = read_layers(graph_of(tmp_path / "q.onnx", nodes, weights, [1, 3, 8, 8]))
    assert layer.bytes == 3 * 64 + 12 + 4 * 64
    assert layer.macs == 64 * 12


def test_an_open_size_is_counted_at_the_size_it_runs_at(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["images", "w"], ["out"])]
    file = graph_of(tmp_path / "o.onnx", nodes, {"w": np.ones((4, 3, 1, 1), np.float32)}, [1, 3, "h", "w"])  # type: ignore[list-item]
    assert bytes_moved(file) is None
    assert bytes_moved(file, (8, 8)) == [4 * (3 * 64 + 12 + 4 * 64)]


def test_what_is_no_graph_has_no_count(tmp_path: Path) -> None:
    assert bytes_moved(tmp_path / "model.pt") is None


def test_the_machine_is_measured() -> None:
    found = machine_roof(product_models(), 1, seconds=0.01)
    assert 0.1 < found["gmacs_per_s"]["fp32"] < 10_000
    assert found["gmacs_per_s"]["int8"] > 0.1
    assert found["gmacs_per_s"]["fp16"] is None
    assert set(found["copies_gb_per_s"]) == {"0.25", "1", "4", "16", "64"}
    assert all(0.001 < speed < 10_000 for speed in found["copies_gb_per_s"].values())
    assert found["copy_gb_per_s"] == found["copies_gb_per_s"]["64"]
    assert machine_roof({"fp32": b"no model"}, 1, seconds=0.01)["gmacs_per_s"]["fp32"] is None


def test_products_compute_what_they_say() -> None:
    import onnxruntime

    for precision, dtype in (("fp32", np.float32), ("int8", np.uint8)):
        session = onnxruntime.InferenceSession(product_models()[precision], providers=["CPUExecutionProvider"])
        [product] = session.run(None, {"a": np.ones((2, SIDE), dtype)})
        assert (product == SIDE).all()


def test_the_fastest_run_counts() -> None:
    import time

    turns = iter([0.0, 0.02, 0.001, 0.02, 0.02, 0.02])
    assert fastest(lambda: time.sleep(next(turns)), 0) < 0.015


MACHINE = {
    "gmacs_per_s": {"fp32": 100.0, "int8": 400.0, "fp16": None},
    "copies_gb_per_s": {"1": 100.0, "64": 10.0},
    "threads": 1,
}


@pytest.mark.parametrize(
    ("precision", "macs", "moved", "limit_ms", "bound", "share"),
    [
        ("fp32", 200_000_000, [10_000_000], 2.0, "compute", 0.5),
        ("int8", 200_000_000, [4_000_000, 6_000_000], 1.0, "memory", 0.25),
        ("int8", 200_000_000, [1_000_000] * 10, 0.5, "compute", 0.125),  # ten layers that each stay in the cache
        ("fp32", 200_000_000, [900_000_000], 90.0, "memory", 22.5),  # more than any copy that was measured
        ("fp32", 200_000_000, None, 2.0, "compute", 0.5),
        ("fp16", 200_000_000, [10_000_000], None, None, None),
        ("fp32", None, [10_000_000], None, None, None),
    ],
)
def test_share_of_the_roof(
    precision: str,
    macs: int | None,
    moved: list[int] | None,
    limit_ms: float | None,
    bound: str | None,
    share: float | None,
) -> None:
    found = share_of_roof(MACHINE, precision, macs, moved, 4.0)
    assert (found["limit_ms"], found["bound"], found["share"]) == (limit_ms, bound, share)
    assert found["gmacs_per_s"] == (50.0 if macs else None)


def test_without_a_machine_only_counts_are_known() -> None:
    found = share_of_roof(None, "fp32", 100, [4, 6], 1.0)
    assert (found["macs"], found["bytes"], found["share"]) == (100, 10, None)


def test_every_row_has_a_roof(tmp_path: Path) -> None:
    file = write_detector(tmp_path / "a.onnx", GOOD_BOXES, GOOD_SCORES, width=16)
    one = {"runtime": "onnxruntime", "provider": "CPUExecutionProvider", "precision": "fp32", "macs": 10**6}
    rows = [
        {**one, "stages_ms": {"infer": 1.0}, "input_hw": [[INPUT_SIDE, INPUT_SIDE]]},
        {**one, "stages_ms": {"infer": 2.0}, "input_hw": [[INPUT_SIDE, INPUT_SIDE]] * 2},
        {**one, "stages_ms": {"infer": 1.0}, "input_hw": [[64, 64]], "runtime": "tensorrt", "provider": "Orin"},
    ]
    machines = add_roof(rows, [[file], [file, file], [tmp_path / "b.engine"]], 1)
    assert machines["cpu"] == cpu_roof(1)
    single, double, engine = (row["roof"] for row in rows)
    assert single["bytes"] == 4 * (3 * INPUT_SIDE**2 + 16 * 27 + 16 * INPUT_SIDE**2)
    assert double["bytes"] == 2 * single["bytes"]
    assert single["share"] > 0
    assert engine["bytes"] is None
