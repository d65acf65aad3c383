"""Tracing, the form with NMS inside, opsets, metadata."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgekd.detectors import DETECTORS, build_detector, spec_for
from edgekd.errors import ExportError
from edgekd.export.graph import GraphIndex, metadata_of, open_session, opset_of, raw_tensors
from edgekd.export.job import thresholds_of_run
from edgekd.export.nms import append_nms
from edgekd.export.onnx import _fold_batch_norms, export_onnx, trace
from edgekd.export.opset import to_opset_17
from edgekd.export.parity import compare, onnx_run, torch_run
from edgekd.postprocess import PRE_NMS_TOP_K, select
from edgekd.recipe import ModelConfig
from edgekd.selection import Selection
from edgekd.types import DetectorSpec
from tests.export_double import CLASSES, ToyDetector, traced


def noise(hw: tuple[int, int], count: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, *hw)).astype(np.float32)


@pytest.fixture(scope="module")
def toy() -> ToyDetector:
    return ToyDetector()


@pytest.fixture(scope="module")
def model(toy: ToyDetector) -> onnx.ModelProto:
    return traced(toy)


def test_graph_is_folded_named_and_free_of_notes(model: onnx.ModelProto):
    assert [(i.name, [d.dim_value for d in i.type.tensor_type.shape.dim]) for i in model.graph.input] == [
        ("images", [1, 3, 64, 64])
    ]
    shapes = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output}
    assert shapes == {"boxes": [1, 512, 4], "scores": [1, 512, len(CLASSES)]}
    kinds = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("Conv") == 6
    assert len({node.name for node in model.graph.node}) == len(kinds)
    assert (opset_of(model), model.ir_version) == (17, 8)
    text = model.SerializeToString()
    assert b"site-packages" not in text
    assert str(Path(__file__).resolve().parent.parent).encode() not in text


def test_raw_outputs_are_found_inside_the_graph(model: onnx.ModelProto):
    raw = raw_tensors(model)
    assert set(raw) <= set(GraphIndex(model).producer)
    assert len(raw) == 2


@pytest.mark.parametrize("name", [name for name in DETECTORS if not name.startswith("vgg")])
def test_every_batch_norm_is_folded_before_the_exporter_takes_it_apart(name: str):
    """Which takes it much longer: 40 % of an export's time."""
    spec = spec_for(ModelConfig(model=name, input_size=64, width=0.25), CLASSES)
    detector = build_detector(spec).eval()
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):  # as if trained
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 2)
        images = torch.rand(1, 3, 64, 64)
        before = detector(images)
        _fold_batch_norms(detector)
        after = detector(images)
    assert [n for n, module in detector.named_modules() if isinstance(module, nn.BatchNorm2d)] == []
    torch.testing.assert_close(after.cls_logits, before.cls_logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.bbox_regression, before.bbox_regression, rtol=1e-3, atol=1e-4)


def test_the_exporter_is_silent_and_leaves_the_callers_detector_as_it_was(capfd: pytest.CaptureFixture[str]):
    detector = ToyDetector().train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    activations = [module for module in detector.modules() if isinstance(module, nn.ReLU6)]
    for module in activations:
        module.inplace = True
    trace(detector)
    assert capfd.readouterr() == ("", "")
    assert detector.training
    assert all(module.training for module in detector.modules())
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert all(module.inplace for module in activations)


def test_the_exporter_is_given_no_activation_in_place(monkeypatch: pytest.MonkeyPatch):
    """Which it would take apart first: some 8 % of an export's time."""
    given: list[nn.Module] = []
    monkeypatch.setattr(torch.onnx, "export", lambda module, *_, **__: given.append(module))
    config = ModelConfig(model="mobilenetv2-ssd-lite", input_size=96, width=0.25)
    detector = build_detector(spec_for(config, CLASSES))
    with pytest.raises(ExportError, match="gave nothing"):
        trace(detector)
    assert [getattr(module, "inplace", False) for module in detector.modules()].count(True) > 50
    assert not any(getattr(module, "inplace", False) for module in given[0].modules())


@pytest.mark.parametrize("opset", [18, 20])
def test_other_opsets(toy: ToyDetector, opset: int):
    model = trace(toy, opset=opset)
    assert opset_of(model) == opset
    image = noise((64, 64))
    assert np.allclose(onnx_run(model)(image)["boxes"], torch_run(toy)(image)["boxes"], atol=1e-3)


def test_an_opset_that_does_not_come_out_is_an_error(toy: ToyDetector):
    with pytest.raises(ExportError, match="opset"):
        trace(toy, opset=99)


def test_dynamic_batch_has_a_name_and_works(toy: ToyDetector):
    model = trace(toy, dynamic_batch=True)
    for info in (*model.graph.input, *model.graph.output):
        assert info.type.tensor_type.shape.dim[0].dim_param == "batch"
    images = noise((64, 64), 3)
    together = open_session(model).run(None, {"images": images})
    for index in range(3):
        alone = open_session(model).run(None, {"images": images[index : index + 1]})
        for one, many in zip(alone, together, strict=True):
            assert np.allclose(one[0], many[index], atol=1e-4)
    complete = append_nms(model, Selection())
    assert [dim.dim_value for dim in complete.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 64, 64]
    assert len(open_session(complete).run(None, {"images": images[:1]})[1]) == 100


QUICK = ("mobilenetv2-ssd-lite", "yolo-nano")
LARGE = ("vgg16-ssd", "yolov3")
"""Hundreds of megabytes: their smaller siblings have the same parts."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in DETECTORS if n not in LARGE],
)
def test_native_detectors_agree_with_torch(name: str):
    torch.manual_seed(0)
    detector = build_detector(spec_for(ModelConfig(model=name, input_size=96), [f"class {i}" for i in range(20)]))
    model = trace(detector)
    images = [noise((96, 96), seed=seed) for seed in range(2)]
    report = compare(
        torch_run(detector),
        onnx_run(model),
        images,
        ["first", "second"],
        precision="fp32",
        against="torch",
        thresholds=Selection(),
    )
    assert report.ok, report.failures


# -- NMS inside ------------------------------------------------------------------------------------------------------


def decoded_model(boxes: int, classes: int) -> onnx.ModelProto:
    """A 'detector' whose inputs are its decoded outputs, to feed NMS with any case."""
    shape = {"boxes": [1, boxes, 4], "scores": [1, boxes, classes]}
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"in_{name}"], [name], name=name) for name in shape],
        "decoded",
        [helper.make_tensor_value_info(f"in_{name}", TensorProto.FLOAT, dims) for name, dims in shape.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in shape.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def random_candidates(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centre, size = rng.uniform(0, 320, (count, 2)), rng.uniform(5, 120, (count, 2))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1).astype(np.float32)
    return boxes, rng.uniform(0, 1, (count, classes)).astype(np.float32) ** 3


@pytest.mark.parametrize(
    ("count", "classes", "thresholds"),
    [
        (50, 3, Selection(0.05, 0.5, 100)),
        (400, 20, Selection(0.001, 0.5, 100)),  # more pairs than may enter NMS
        (400, 20, Selection(0.001, 0.95, 5000)),  # more wanted than may enter
        (400, 4, Selection(0.3, 0.45, 7)),
        (PRE_NMS_TOP_K, 1, Selection(0.001, 0.5, 100)),  # exactly as many as may enter
        (1, 1, Selection(0.001, 0.5, 100)),
        (60, 3, Selection(0.9999, 0.5, 100)),  # nothing left
    ],
)
def test_nms_inside_equals_select(count: int, classes: int, thresholds: Selection):
    complete = append_nms(decoded_model(count, classes), thresholds)
    session = open_session(complete)
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores", "labels"]
    for seed in range(5):
        boxes, scores = random_candidates(count, classes, seed)
        found = session.run(None, {"in_boxes": boxes[None], "in_scores": scores[None]})
        wanted = select(
            boxes,
            scores,
            score_threshold=thresholds.score_threshold,
            nms_iou=thresholds.nms_iou,
            max_detections=thresholds.max_detections,
        )
        assert len(found[1]) == len(wanted)
        assert np.array_equal(found[0], wanted.boxes_xyxy)
        assert np.array_equal(found[1], wanted.scores)
        assert np.array_equal(found[2], wanted.labels)
        assert found[2].dtype == np.int64


def test_nms_is_class_wise():
    complete = append_nms(decoded_model(2, 2), Selection(0.5, 0.5, 10))
    boxes = np.float32([[[0, 0, 10, 10], [0, 0, 10, 10]]])
    scores = np.float32([[[0.9, 0.8], [0.7, 0.6]]])
    found = open_session(complete).run(None, {"in_boxes": boxes, "in_scores": scores})
    assert found[1].tolist() == pytest.approx([0.9, 0.8])
    assert found[2].tolist() == [0, 1]


# -- files -----------------------------------------------------------------------------------------------------------


def test_export_writes_all_that_a_reader_needs(toy: ToyDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edgekd.export.onnx.trace", traced)
    thresholds = Selection(0.1, 0.45, 50)
    file = export_onnx(toy, tmp_path / "toy.onnx", nms=True, thresholds=thresholds, facts={"seed": 7})
    model = onnx.load(file)
    metadata = metadata_of(model)
    assert metadata["edgekd.schema"] == "edgekd.onnx/1"
    assert DetectorSpec.from_dict(json.loads(metadata["edgekd.spec"])) == toy.spec
    assert json.loads(metadata["edgekd.output"]) == {"kind": "detections"}
    assert (metadata["edgekd.precision"], metadata["edgekd.target"]) == ("fp32", "x86")
    assert json.loads(metadata["edgekd.thresholds"]) == thresholds.to_dict()
    provenance = json.loads(metadata["edgekd.provenance"])
    assert provenance["seed"] == 7
    assert provenance["versions"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["toy.onnx"]


def test_same_detector_gives_the_same_bytes(toy: ToyDetector, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekd.export.onnx.trace", traced)  # an earlier trace
        first = export_onnx(toy, tmp_path / "a.onnx").read_bytes()
    assert export_onnx(toy, tmp_path / "b.onnx").read_bytes() == first


def test_a_failing_detector_is_an_export_error(tmp_path: Path):
    class Broken(ToyDetector):
        def decode(self, output):
            if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
                raise RuntimeError("no")
            boxes, scores = super().decode(output)
            return boxes, scores * np.float32(float(scores.sum()))  # a value that tracing cannot follow

    with pytest.raises(ExportError, match="exporter failed on toy"):
        export_onnx(Broken(), tmp_path / "toy.onnx")
    assert list(tmp_path.iterdir()) == []


# -- opset 17 --------------------------------------------------------------------------------------------------------


def opset_18(node: onnx.NodeProto, constants: dict[str, np.ndarray], shape: list[int]):
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in node.output],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


AXES = {"axes": np.int64([1])}


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (helper.make_node("ReduceL2", ["x", "axes"], ["y"], name="n", keepdims=1, noop_with_empty_axes=0), AXES),
        (helper.make_node("ReduceMax", ["x", "axes"], ["y"], name="n", keepdims=1), AXES),
        (helper.make_node("ReduceSum", ["x", "axes"], ["y"], name="n", keepdims=1), AXES),
        (helper.make_node("Split", ["x"], ["y", "z"], name="n", axis=1, num_outputs=2), {}),
        (helper.make_node("Pad", ["x", "pads"], ["y"], name="n"), {"pads": np.int64([0, 0, 0, 0, 0, 0, 1, 1])}),
    ],
)
def test_opset_17_computes_the_same(node: onnx.NodeProto, constants: dict[str, np.ndarray]):
    image = noise((5, 5))[:, :2]
    model = opset_18(node, constants, [1, 2, 5, 5])
    wanted = open_session(model).run(None, {"x": image})
    older = to_opset_17(model)
    onnx.checker.check_model(older)
    assert opset_of(older) == 17
    for a, b in zip(wanted, open_session(older).run(None, {"x": image}), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("node", "constants", "what"),
    [
        (helper.make_node("ReduceL2", ["x"], ["y"], name="n", noop_with_empty_axes=1), {}, "noop_with_empty_axes"),
        (helper.make_node("Resize", ["x", "", "s"], ["y"], name="n", antialias=1), {"s": np.ones(4, "f")}, "antialias"),
        (
            helper.make_node("Pad", ["x", "pads", "", "axes"], ["y"], name="n"),
            {"pads": np.int64([1, 1]), "axes": np.int64([2])},
            "Pad with axes",
        ),
    ],
)
def test_what_opset_17_cannot_say_is_an_error(node: onnx.NodeProto, constants: dict[str, np.ndarray], what: str):
    with pytest.raises(ExportError, match=what):
        to_opset_17(opset_18(node, constants, [1, 2, 5, 5]))


def test_leftover_batchnorm_is_an_error(toy: ToyDetector, monkeypatch: pytest.MonkeyPatch):
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["boxes"], name="n")
    constants = {name: np.ones(2, np.float32) for name in "sbmv"}
    model = opset_18(node, constants, [1, 2, 5, 5])
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: SimpleNamespace(model_proto=model))
    with pytest.raises(ExportError, match="BatchNormalization"):
        trace(toy)


def test_a_run_s_own_recipe_says_the_thresholds(tmp_path: Path) -> None:
    usual = Selection()
    assert thresholds_of_run(tmp_path) == usual
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: a\ndata: {root: x}\nstudent: {model: yolo-nano}\nbench: {nms_iou: 0.4, box_voting: 0.6}\n")
    assert thresholds_of_run(tmp_path / "model.pt") == Selection(nms_iou=0.4, box_voting=0.6)
    recipe.write_text("name: [")
    assert thresholds_of_run(tmp_path) == usual
