"""Fine-tuning for int8: the rounding is the exporter's, scales are learned, and the export uses what was learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgekd.checkpoint import checkpoint_facts, load_detector
from edgekd.cli import app
from edgekd.detectors.base import DetectorOutput
from edgekd.export.calibration import collect
from edgekd.export.onnx import trace
from edgekd.export.placement import int8_nodes, tensors_to_quantise
from edgekd.export.precision import to_int8
from edgekd.export.qat import FACTS_KEY, ActivationGrid, QuantisedDetector, conv_inputs, learned_ranges
from edgekd.export.qdq import activation_parameters, quantise
from edgekd.export.sensitivity import raw_values
from edgekd.recipe import ExportConfig
from tests.export_double import CLASSES, ToyDetector

IMAGES = [np.random.default_rng(seed).normal(size=(1, 3, 64, 64)).astype(np.float32) for seed in range(3)]


@pytest.fixture(scope="module")
def base() -> onnx.ModelProto:
    return trace(ToyDetector())


class _Chain(ToyDetector):
    """Without the residual Add, whose own pair is not simulated."""

    def forward(self, images: torch.Tensor, taps: Sequence[str] = ()) -> DetectorOutput:
        features = self.down(self.pointwise(self.depthwise(self.stem(images))))
        cls, box = (head(features).permute(0, 2, 3, 1) for head in (self.cls, self.box))
        return DetectorOutput(cls.reshape(len(images), -1, len(CLASSES) + 1), box.reshape(len(images), -1, 4))


def test_it_rounds_as_the_exported_file_does() -> None:
    """Simulation and file differ by float noise and rare ties; each differs from fp32 by far more."""
    base = trace(_Chain())
    nodes = set(int8_nodes(base, "tensorrt"))
    seen = collect(base, tensors_to_quantise(base, nodes, "tensorrt"), IMAGES)
    model = quantise(base, {name: found.range("minmax") for name, found in seen.items()}, nodes, "tensorrt")
    simulated = QuantisedDetector(_Chain(), IMAGES, "tensorrt").module
    exported, exact = raw_values(model, IMAGES[:1])[0], raw_values(base, IMAGES[:1])[0]
    with torch.no_grad():
        output = simulated(torch.from_numpy(IMAGES[0]))
    outputs = (output.bbox_regression.numpy(), output.cls_logits.numpy())  # in the order of raw_values
    for found, truth, fp32 in zip(outputs, exported, exact, strict=True):
        assert np.abs(found - truth).mean() < 0.2 * np.abs(fp32 - truth).mean()


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


def test_convolutions_are_found_and_unwrapped(base: onnx.ModelProto) -> None:
    detector = ToyDetector()
    inputs = conv_inputs(base, set(int8_nodes(base, "x86")), "x86")
    convs = {name for name, module in detector.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert set(inputs) == convs
    quantised = QuantisedDetector(detector, IMAGES, "x86")
    assert len(quantised.scales()) == len(set(inputs.values()))  # cls and box share one
    assert quantised.plain().state_dict().keys() == detector.state_dict().keys()


def test_the_export_takes_learned_ranges_for_its_target_alone(base: onnx.ModelProto) -> None:
    facts = {FACTS_KEY: {"target": "x86", "ranges": {"cls": [0.0, 2.55]}}}
    assert learned_ranges(base, facts, "tensorrt") == {}
    assert learned_ranges(base, {}, "x86") == {}
    learned = learned_ranges(base, facts, "x86")
    (tensor,) = learned
    model = to_int8(base, IMAGES, config=ExportConfig(calibration="minmax"), learned=learned).model
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert float(scales[f"{tensor}_scale"]) == pytest.approx(0.01)


def test_quantize_from_the_command_line(tmp_path: Path) -> None:
    """A small student on generated scenes: fine-tuned, exported with the learned ranges, and skipped the second time."""
    from typer.testing import CliRunner

    from edgekd.data.scenes import make_scenes

    make_scenes(tmp_path / "scenes", counts={"train": 12, "val": 4}, seed=0, image_hw=(96, 96))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: tiny\ndata: {root: scenes, train: train, val: val, workers: 0}\n"
        "student: {model: mobilenetv2-ssd-lite, input_size: 96, width: 0.25}\n"
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
