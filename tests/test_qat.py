"""Fine-tuning for int8: the rounding is the exporter's, scales are learned, and the export uses what was learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgekd.checkpoint import checkpoint_facts, load_detector
from edgekd.cli import app
from edgekd.detectors import build_detector
from edgekd.detectors.base import Detector, DetectorOutput
from edgekd.errors import ExportError
from edgekd.export.calibration import collect
from edgekd.export.capture import Program
from edgekd.export.graph import open_session, raw_tensors, with_outputs
from edgekd.export.placement import Target, int8_nodes, tensors_to_quantise
from edgekd.export.precision import to_int8, weight_limit
from edgekd.export.qat import FACTS_KEY, learned_ranges, unused_ranges
from edgekd.export.qdq import activation_parameters, quantise
from edgekd.export.simulation import (
    ActivationGrid,
    QuantisedDetector,
    conv_inputs,
    range_keys,
    scaled_tensors,
)
from edgekd.recipe import ExportConfig
from edgekd.types import DetectorSpec, PreprocessSpec
from tests.export_double import CLASSES, ToyDetector, traced

IMAGES = [np.random.default_rng(seed).normal(size=(1, 3, 64, 64)).astype(np.float32) for seed in range(3)]


@pytest.fixture(autouse=True)
def _simulation_traces_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.export.simulation.trace", traced)


@pytest.fixture(scope="module")
def base() -> onnx.ModelProto:
    return traced(ToyDetector())


@cache
def _lively(model: str) -> Detector:
    """A real family as if trained: untrained norms leave next to nothing of the image, and of the rounding."""
    torch.manual_seed(0)
    detector = build_detector(DetectorSpec(model, CLASSES, PreprocessSpec((96, 96)), width=0.35))
    norms = [module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # the plain mean over the batches below
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.normal_(0, 0.5)
        detector.train()(torch.randn(8, 3, 96, 96))
    return detector.eval()


def _images(detector: Detector) -> list[np.ndarray]:
    shape = (1, 3, *detector.spec.preprocess.input_hw)
    return [np.random.default_rng(seed).normal(size=shape).astype(np.float32) for seed in range(3)]


def _outputs(model: onnx.ModelProto, image: np.ndarray, *, optimised: bool) -> list[np.ndarray]:
    names = ["raw_cls_logits", "raw_bbox_regression", "raw_objectness"]
    names = [name for name in names if name in raw_tensors(model)]
    session = open_session(with_outputs(model, names), optimised=optimised)
    return [session.run([name], {"images": image})[0] for name in names]


def _assert_same_rounding(
    quantised: QuantisedDetector, model: onnx.ModelProto, base: onnx.ModelProto, image: np.ndarray
) -> None:
    """Simulation and file differ by float noise and rare ties (more of them behind a stem that stays float, whose sums are
    not exact); each differs from fp32 by far more.

    An x86 file counts as ONNX Runtime runs it, a TensorRT file as it is written: ONNX Runtime's optimiser, which has no say
    on that target, rounds the float biases of such files as well.
    """
    exported = _outputs(model, image, optimised=quantised.target == "x86")
    exact = _outputs(base, image, optimised=False)
    with torch.no_grad():
        output = quantised(torch.from_numpy(image))
    outputs = [output.cls_logits, output.bbox_regression, output.objectness]
    for found, truth, fp32 in zip([x.numpy() for x in outputs if x is not None], exported, exact, strict=True):
        assert np.abs(found - truth).mean() < 0.2 * np.abs(fp32 - truth).mean()


def _as_calibrated(base: onnx.ModelProto, images: Sequence[np.ndarray], target: Target) -> onnx.ModelProto:
    """The whole detector in int8, with the ranges that fine-tuning starts from."""
    nodes = set(int8_nodes(base, target))
    seen = collect(base, tensors_to_quantise(base, nodes, target), images)
    ranges = {name: found.range("minmax") for name, found in seen.items()}
    return quantise(base, ranges, nodes, target, reduce_range=weight_limit(target) < 127)


@pytest.mark.parametrize("target", ["x86", "tensorrt"])
def test_it_rounds_as_the_exported_file_does(base: onnx.ModelProto, target: Target) -> None:
    assert "Add" in {node.op_type for node in base.graph.node if node.name in int8_nodes(base, target)}
    model = _as_calibrated(base, IMAGES, target)
    _assert_same_rounding(QuantisedDetector(ToyDetector(), IMAGES, target), model, base, IMAGES[0])


@pytest.mark.parametrize("target", ["x86", "tensorrt"])
@pytest.mark.parametrize("family", ["mobilenetv2-ssd-lite", "yolo-nano"])
def test_it_rounds_every_tensor_as_the_exported_file_does(family: str, target: Target) -> None:
    """Each from the file's own values before it, and but for values in the middle between two steps: in a network this
    deep, one that float noise sends the other way has become a different noise by the end. yolo-nano has SiLU, Concat
    and Split as well as Adds.
    """
    detector = _lively(family)
    base, images = traced(detector), _images(detector)
    model, quantised = _as_calibrated(base, images, target), QuantisedDetector(detector, images, target)
    tensors = scaled_tensors(base, target)
    names = [f"{name}_dequantised" for name in tensors]
    session = open_session(with_outputs(model, names), optimised=False)
    files = dict(zip(tensors, session.run(names, {"images": images[0]}), strict=True))
    compared = set()

    def forced(name: str, grid: ActivationGrid, values: torch.Tensor) -> torch.Tensor:
        truth = torch.from_numpy(files[name][:, : values.shape[1]].copy())  # without the zero channels for speed
        steps = values / grid.log_scale.exp()
        differs = (ActivationGrid.forward(grid, values) - truth).abs() > 0.5 * grid.log_scale.exp()
        tie = (steps - steps.floor() - 0.5).abs() < 0.01
        wrong = int((differs & ~tie).sum())  # a weight can be a tie as well, and moves a channel by less than a step
        assert wrong <= 1 + 0.002 * differs.numel(), f"{name}: {wrong} of {differs.numel()} values"
        compared.add(name)
        return truth

    for name, grid in zip(tensors, quantised.grids, strict=True):
        grid.forward = partial(forced, name, grid)
    _assert_same_rounding(quantised, model, base, images[0])
    assert compared == set(tensors)


@pytest.mark.parametrize("target", ["x86", "tensorrt"])
@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_the_export_rounds_as_was_learned(base: onnx.ModelProto, target: Target, factor: float) -> None:
    """Every scale moved, as if learned: narrower ranges saturate, wider ones reach past the ReLU6 that x86 drops."""
    quantised = QuantisedDetector(ToyDetector(), IMAGES, target)
    with torch.no_grad():
        for scale in quantised.scales():
            scale += float(np.log(factor))
    facts = json.loads(json.dumps({FACTS_KEY: {"target": target, "ranges": quantised.ranges()}}))
    learned = learned_ranges(base, facts, target)
    assert set(learned) == set(scaled_tensors(base, target))
    model = to_int8(base, IMAGES, config=ExportConfig(calibration="minmax", target=target), learned=learned).model
    _assert_same_rounding(quantised, model, base, IMAGES[0])


def test_ranges_have_the_same_names_in_every_trace(base: onnx.ModelProto) -> None:
    inputs = {"stem.0", "depthwise.0", "pointwise.0", "down.0", "cls", "box"}
    for model in (base, traced(ToyDetector(), opset=18), traced(ToyDetector(), dynamic_batch=True)):
        assert set(range_keys(model, "tensorrt")) == inputs
        assert set(range_keys(model, "x86")) == inputs | {"output of pointwise.0", "output of cls", "output of box"}


@pytest.mark.parametrize("target", ["x86", "tensorrt"])
def test_everything_learns_at_any_batch_size(target: Target) -> None:
    quantised = QuantisedDetector(ToyDetector(), IMAGES, target)
    one, three = (quantised(torch.from_numpy(np.concatenate(images))) for images in (IMAGES[:1], IMAGES))
    assert (one.cls_logits - three.cls_logits[:1]).abs().mean() < 0.01 * one.cls_logits.abs().mean()
    (three.cls_logits.square().sum() + three.bbox_regression.square().sum()).backward()
    still = [name for name, value in quantised.named_parameters() if value.grad is None or not value.grad.any()]
    assert not still


class _Twice(ToyDetector):
    def forward(self, images: torch.Tensor, taps: Sequence[str] = ()) -> DetectorOutput:
        features = self.down(self.pointwise(self.pointwise(self.stem(images))))
        cls, box = (head(features).permute(0, 2, 3, 1) for head in (self.cls, self.box))
        return DetectorOutput(cls.reshape(len(images), -1, len(CLASSES) + 1), box.reshape(len(images), -1, 4))


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(ExportError, match="used twice"):
        QuantisedDetector(_Twice(), IMAGES, "x86")
    with pytest.raises(ExportError, match=r"val_7: Tanh\(output of stem\.0\)"):
        Program(ToyDetector().eval()).find({"val_7": "Tanh(output of stem.0)"})


@pytest.mark.parametrize("target", ["x86", "tensorrt"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.5, 3.0)])
def test_a_grid_gives_its_range_back(target, low: float, high: float) -> None:
    start = activation_parameters(low, high, target)
    grid = ActivationGrid(start, target)
    again = activation_parameters(*grid.range, target)
    assert float(again.scale) == pytest.approx(float(start.scale), rel=1e-5)
    assert int(again.zero_point) == int(start.zero_point)
    values = torch.linspace(low - 1, high + 1, 999).reshape(1, -1)
    scale, zero = float(start.scale), int(start.zero_point)
    least, most = (0, 255) if target == "x86" else (-128, 127)
    wanted = (np.clip(np.rint(values.numpy() / scale) + zero, least, most) - zero) * scale
    np.testing.assert_allclose(grid(values).detach().numpy(), wanted, atol=scale * 1.01)
    assert (np.abs(grid(values).detach().numpy() - wanted) > 1e-4).mean() < 0.01


def test_scales_learn_and_values_within_range_pass_gradients() -> None:
    grid = ActivationGrid(activation_parameters(0.0, 1.0, "x86"), "x86")
    values = torch.tensor([[0.3, 0.7, 5.0]], requires_grad=True)
    grid(values).sum().backward()
    assert values.grad.tolist() == [[1.0, 1.0, 0.0]]  # straight through, but not where it saturates
    assert grid.log_scale.grad > 0  # a larger scale lets the clipped value through


def test_a_checkpoint_keeps_its_names(base: onnx.ModelProto) -> None:
    detector = ToyDetector()
    inputs = conv_inputs(base, "x86")
    convs = {name for name, module in detector.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert set(inputs) == convs
    quantised = QuantisedDetector(detector, IMAGES, "x86")
    assert len(quantised.scales()) == len(set(inputs.values())) + 3  # cls and box share one; three outputs
    before, after = detector.state_dict(), quantised.plain().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_export_takes_learned_ranges_for_its_target_alone(base: onnx.ModelProto) -> None:
    """Also those of earlier versions, which had ranges for the inputs of convolutions alone."""
    facts = {FACTS_KEY: {"target": "x86", "ranges": {"cls": [0.0, 2.55]}}}
    assert learned_ranges(base, facts, "tensorrt") == {}
    assert "quantize with --set export.target=tensorrt" in (unused_ranges(facts, "tensorrt") or "")
    assert unused_ranges(facts, "x86") is None
    assert unused_ranges({}, "tensorrt") is None
    assert learned_ranges(base, {}, "x86") == {}
    learned = learned_ranges(base, facts, "x86")
    (tensor,) = learned
    model = to_int8(base, IMAGES, config=ExportConfig(calibration="minmax"), learned=learned).model
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert float(scales[f"{tensor}_scale"]) == pytest.approx(0.01)
    facts = {FACTS_KEY: {"target": "x86", "ranges": {"gone.0": [0.0, 2.55]}}}
    with pytest.raises(ExportError, match=r"gone\.0"):
        learned_ranges(base, facts, "x86")


def test_quantize_from_the_command_line(tmp_path: Path) -> None:
    """A small student on generated scenes: fine-tuned, exported with the learned ranges, and skipped the second time."""
    from typer.testing import CliRunner

    from edgekd.data.scenes import make_scenes

    make_scenes(tmp_path / "scenes", counts={"train": 12, "val": 4}, seed=0, image_hw=(96, 96))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: tiny\ndata: {root: scenes, train: train, val: val, workers: 0}\n"
        "student: {model: vgg11-ssd, input_size: 96, width: 0.25}\n"
        "train: {epochs: 1, batch_size: 4, precision: fp32}\n"
        "export: {calibration_images: 4, qat: {epochs: 1, batch_size: 4}}\n"
    )
    runner = CliRunner()

    def run(*words: str) -> dict:
        result = runner.invoke(app, [*words, "--json", "--quiet"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    student, tuned = tmp_path / "student", tmp_path / "tuned"
    run("train", str(recipe), "--out", str(student))
    if not torch.cuda.is_available():
        told = runner.invoke(app, ["quantize", str(student), "--out", str(tmp_path / "gpu"), "--device", "cuda"])
        assert told.exit_code == 2
        assert "torch sees no GPU" in told.stderr
    assert not run("quantize", str(student), "--out", str(tuned))["skipped"]
    facts = checkpoint_facts(tuned)[FACTS_KEY]
    assert facts["target"] == "x86"
    before, after = load_detector(student).state_dict(), load_detector(tuned).state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name)
    out = tmp_path / "tuned.onnx"
    run("export", str(tuned), "--precision", "int8", "--out", str(out), "--max-map-drop", "100")
    scales = {
        float(numpy_helper.to_array(t))
        for t in onnx.load(out).graph.initializer
        if t.name.endswith("_scale") and not t.dims
    }
    for low, high in facts["ranges"].values():
        assert min(abs(scale - (high - low) / 255) for scale in scales) < 1e-7
    assert run("quantize", str(student), "--out", str(tuned))["skipped"]
    # Killed when the model was written and the manifest was not: the same command goes on; of other inputs it does not.
    (tuned / "manifest.json").unlink()
    assert runner.invoke(app, ["quantize", str(student), "--out", str(tuned), "--seed", "5"]).exit_code == 2
    (left := tuned / ".model.killed00.pt").write_bytes(b"half")
    assert not run("quantize", str(student), "--out", str(tuned))["skipped"]
    assert not left.exists()
