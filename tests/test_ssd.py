"""SSD and SSD-lite as whole detectors: published sizes, grids, taps, one return type, training."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from edgekd.detectors import DETECTORS, spec_for
from edgekd.detectors.base import DetectorOutput, SoftTargets, Targets
from edgekd.detectors.complexity import count_macs, count_parameters
from edgekd.detectors.ssd import SSD, L2Norm, SsdLiteNeck
from edgekd.errors import RecipeError
from edgekd.recipe import ModelConfig
from edgekd.types import DetectorSpec, PreprocessSpec

MODELS = [name for name in DETECTORS if name.endswith(("-ssd", "-ssd-lite"))]
LITE = "mobilenetv2-ssd-lite"
VOC = tuple(f"class{index}" for index in range(20))


def build(model: str = LITE, size: int = 96, width: float = 0.25, classes: tuple[str, ...] = ("a", "b", "c")) -> SSD:
    torch.manual_seed(0)
    return SSD(spec_for(ModelConfig(model=model, input_size=size, width=width), classes))


def images(size: int = 96, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_vgg16_ssd300_has_the_published_size() -> None:
    detector = build("vgg16-ssd", 300, 1.0, VOC)
    assert count_parameters(detector) == 26_285_486
    assert len(detector.prior_boxes()) == 8732
    assert count_macs(detector) / 1e9 == pytest.approx(31.4, abs=0.05)


def test_mobilenetv2_ssd_lite_has_about_the_measured_size() -> None:
    detector = build(LITE, 300, 1.0, VOC)
    assert count_parameters(detector) / 1e6 == pytest.approx(3.36, rel=0.02)
    assert count_macs(detector) / 1e9 == pytest.approx(0.645, rel=0.03)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [300, 320])
def test_grids_are_the_published_ones(model: str, size: int) -> None:
    first = [19, 10] if size == 300 else [20, 10]
    if model.endswith("-lite"):
        sides, priors = [*first, 5, 3, 2, 1], {300: 3000, 320: 3234}
    else:
        sides, priors = [2 * first[0], *first, 5, 3, 1], {300: 8732, 320: 9590}
    detector = build(model, size)
    assert detector.prior_layout.grids_hw == tuple((side, side) for side in sides)
    assert len(detector.prior_boxes()) == priors[size]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("size", "batch"), [(96, 2), (64, 2), (130, 1), (99, 1)])
def test_output_and_taps_have_the_stated_shapes(model: str, size: int, batch: int) -> None:
    detector = build(model, size).eval()
    with torch.no_grad():
        output = detector(images(size, batch), taps=tuple(detector.tap_specs))
        boxes, scores = detector.decode(output)
    priors = len(detector.prior_boxes())
    assert output.cls_logits.shape == (batch, priors, 4)
    assert output.bbox_regression.shape == boxes.shape == (batch, priors, 4)
    assert scores.shape == (batch, priors, 3)
    assert (scores >= 0).all()
    assert (scores.sum(-1) <= 1 + 1e-5).all()
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    assert output.objectness is None
    assert list(output.taps) == list(detector.tap_specs)
    for name, spec in detector.tap_specs.items():
        assert spec.name == name
        assert output.taps[name].shape == (batch, spec.channels, *spec.grid_hw)


def test_a_rectangular_input_works() -> None:
    spec = DetectorSpec(LITE, ("a",), PreprocessSpec((96, 160)), 0.25)
    detector = SSD(spec).eval()
    with torch.no_grad():
        boxes, _ = detector.decode(detector(torch.randn(1, 3, 96, 160)))
    assert detector.tap_specs["neck.l0"].grid_hw == (6, 10)
    assert boxes.shape == (1, len(detector.prior_boxes()), 4)


def test_tap_names_do_not_depend_on_the_input_size() -> None:
    assert list(build(size=96).tap_specs) == list(build(size=320).tap_specs)
    grids = [spec.grid_hw for spec in build(size=320).tap_specs.values() if spec.kind == "neck"]
    assert grids == sorted(grids, reverse=True)


def test_one_return_type_in_both_modes() -> None:
    detector = build()
    trained = detector.train()(images())
    with torch.no_grad():
        evaluated = detector.eval()(images())
    assert type(trained) is type(evaluated) is DetectorOutput
    assert trained.cls_logits.shape == evaluated.cls_logits.shape
    assert trained.taps == evaluated.taps == {}


def test_equal_seeds_give_equal_detectors() -> None:
    first, second = build().eval(), build().eval()
    with torch.no_grad():
        assert torch.equal(first(images()).cls_logits, second(images()).cls_logits)


def test_batch_size_does_not_change_an_answer() -> None:
    detector = build().eval()
    with torch.no_grad():
        together, alone = detector(images()).cls_logits[1:], detector(images()[1:]).cls_logits
    assert torch.allclose(together, alone, atol=1e-5)


def test_rows_follow_the_priors() -> None:
    """A box predictor that answers a level's number and a cell's prior shows up in the right rows."""
    detector = build().eval()
    for level, predictor in enumerate(detector.head.boxes):
        last = list(predictor.children())[-1]
        last.weight.data.zero_()
        last.bias.data = torch.arange(6.0).repeat_interleave(4) + 10 * level
    with torch.no_grad():
        rows = detector(images()).bbox_regression[0, :, 0]
    wanted = [
        10 * level + prior
        for level, (h, w) in enumerate(detector.prior_layout.grids_hw)
        for _ in range(h * w)
        for prior in range(6)
    ]
    assert rows.tolist() == wanted


@pytest.mark.parametrize("model", [LITE, "vgg11-ssd"])
def test_rows_follow_the_grid(model: str) -> None:
    detector = SSD(DetectorSpec(model, ("a", "b"), PreprocessSpec((96, 160)), 0.25)).eval()
    names = [name for name in detector.tap_specs if name.startswith("neck.")]
    with torch.no_grad():
        output = detector(torch.randn(1, 3, 96, 160), taps=names)
        raw = [predict(output.taps[name]) for predict, name in zip(detector.head.boxes, names, strict=True)]
    priors, (height, width) = detector.prior_boxes(), (96, 160)
    row = 0
    for level, ((rows, columns), count) in enumerate(
        zip(detector.prior_layout.grids_hw, detector.prior_layout.priors_a_cell, strict=True)
    ):
        for y in range(rows):
            for x in range(columns):
                centre = [(x + 0.5) / columns * width, (y + 0.5) / rows * height]
                for prior in range(count):
                    cell = raw[level][0, 4 * prior : 4 * prior + 4, y, x]
                    assert torch.equal(output.bbox_regression[0, row], cell)
                    assert priors[row, :2].tolist() == pytest.approx(centre)
                    row += 1
    assert row == len(priors)


def test_l2norm_gives_every_cell_the_length_of_its_scale() -> None:
    x = torch.rand(2, 8, 3, 5) * 300
    x[0, :, 1, 1] = 0
    out = L2Norm(8)(x)
    assert torch.allclose(out, x / x.norm(dim=1, keepdim=True).clamp(min=1e-6) * 20, atol=1e-4)


def test_an_untrained_head_has_the_losses_share_of_background() -> None:
    detector = build().eval()
    with torch.no_grad():
        probabilities = detector(images()).cls_logits.softmax(-1)
    assert probabilities[..., 0].mean() == pytest.approx(0.75, abs=0.05)


def test_layouts_are_equal_exactly_when_rows_mean_the_same() -> None:
    assert build().layout() == build(classes=("x", "y")).layout() == build(model="mobilenetv1-ssd-lite").layout()
    hash(build().layout())
    assert build(size=96).layout() != build(size=320).layout()
    moved = SSD(spec_for(ModelConfig(model=LITE, input_size=96, width=0.25, options={"min_scale": 0.2}), "abc"))
    assert moved.layout() != build().layout()


def test_priors_are_rebuilt_rather_than_stored() -> None:
    assert "priors" not in build().state_dict()


def test_unknown_tap_and_wrong_size_are_named() -> None:
    detector = build()
    with pytest.raises(KeyError, match=r"neck\.l9.*neck\.l5"):
        detector(images(), taps=["neck.l9"])
    with pytest.raises(ValueError, match="96"):
        detector(images(size=128))


def test_training_on_one_image_says_why_not() -> None:
    with pytest.raises(RecipeError, match="batch_size to 2"):
        build().train()(images(batch=1))
    build("vgg11-ssd").train()(images(batch=1))  # has no batch norm


def test_gradients_reach_every_parameter_and_are_finite() -> None:
    detector = build()
    output = detector(images())
    targets = Targets(
        [torch.tensor([[10.0, 10.0, 40.0, 50.0], [0.0, 0.0, 90.0, 90.0]]), torch.zeros(0, 4)],
        [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.int64)],
    )
    soft = SoftTargets(targets.boxes_xyxy, [torch.tensor([[0.9, 0.0, 0.0], [0.1, 0.2, 0.3]]), torch.zeros(0, 3)])
    losses = [*detector.detection_losses(output, targets).values(), *detector.soft_losses(output, soft, 2.0).values()]
    assert all(loss.ndim == 0 and loss.isfinite() and loss > 0 for loss in losses)
    torch.stack(losses).sum().backward()
    missing = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


@pytest.mark.parametrize("model", [LITE, "vgg11-ssd"])
def test_a_batch_without_objects_teaches_background(model: str) -> None:
    detector = build(model)
    output = detector(images())
    empty = Targets([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    losses = detector.detection_losses(output, empty)
    assert losses["box"] == 0
    assert losses["cls"] > 0
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def scenes() -> tuple[Tensor, Targets]:
    """Four images of one or two coloured rectangles on noise."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randn(4, 3, 96, 96, generator=generator) * 0.2
    boxes = [
        [[8, 8, 40, 40]],
        [[40, 30, 88, 70], [4, 60, 30, 90]],
        [[20, 20, 80, 80]],
        [[50, 5, 90, 35], [6, 44, 46, 90]],
    ]
    labels = [[0], [1, 2], [2], [0, 1]]
    for picture, rectangles, kinds in zip(pictures, boxes, labels, strict=True):
        for (x1, y1, x2, y2), kind in zip(rectangles, kinds, strict=True):
            picture[kind, y1:y2, x1:x2] += 2.0
    return pictures, Targets([torch.tensor(b).float() for b in boxes], [torch.tensor(v) for v in labels])


@pytest.mark.parametrize("teach", ["truth", "soft"])
def test_sixty_steps_learn_four_images(teach: str) -> None:
    detector = build()
    pictures, targets = scenes()
    soft = SoftTargets(targets.boxes_xyxy, [torch.eye(3)[v] * 0.95 for v in targets.labels])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        output = detector(pictures)
        if teach == "truth":
            losses = detector.detection_losses(output, targets)
        else:
            losses = detector.soft_losses(output, soft)
        loss = losses["cls"] + losses["box"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.25 * history[0]
    with torch.no_grad():
        boxes, scores = detector.decode(
            detector(pictures)
        )  # batch statistics: the running ones lag so short a training
    for index, (wanted, labels) in enumerate(zip(targets.boxes_xyxy, targets.labels, strict=True)):
        for box, label in zip(wanted, labels, strict=True):
            best = boxes[index, scores[index, :, label].topk(len(wanted) + 6).indices]
            inter = (torch.min(best[:, 2:], box[2:]) - torch.max(best[:, :2], box[:2])).clamp(min=0).prod(-1)
            union = (best[:, 2:] - best[:, :2]).prod(-1) + (box[2:] - box[:2]).prod() - inter
            assert (inter / union).max() > 0.7
            assert scores[index, :, label].max() > 0.6


def fine(model: str = LITE, size: int = 96, classes: tuple[str, ...] = ("a", "b", "c"), width: float = 0.25) -> SSD:
    torch.manual_seed(0)
    options = {"finest_stride": 8}
    return SSD(spec_for(ModelConfig(model=model, input_size=size, width=width, options=options), classes))


@pytest.mark.parametrize("model", [name for name in MODELS if name.endswith("-lite")])
@pytest.mark.parametrize("size", [96, 130, 200])  # odd grids too: 17 over 9, 25 over 13
def test_a_finer_first_level(model: str, size: int) -> None:
    detector, usual = fine(model, size).eval(), build(model, size)
    assert detector.prior_layout.grids_hw[1:] == usual.prior_layout.grids_hw[:-1]
    assert detector.prior_layout.grids_hw[0] == detector.tap_specs["backbone.s8"].grid_hw
    found = detector(images(size), ("neck.l0",))
    assert found.cls_logits.shape == (2, len(detector.prior_boxes()), 4)
    assert found.taps["neck.l0"].shape[1:] == (detector.neck.channels[0], *detector.prior_layout.grids_hw[0])
    assert detector.spec.options["min_scale"] == pytest.approx(min(0.35, max(0.05, 16 / size)), abs=1e-3)


def test_the_finer_level_reads_both_maps_and_costs_little() -> None:
    detector = fine(size=320, width=1.0)
    assert count_macs(detector) < 1.1 * count_macs(build(size=320, width=1.0))
    maps = [
        torch.randn(2, m.channels, side, side, requires_grad=True)
        for m, side in zip(detector.backbone.sources, (12, 6, 3), strict=True)
    ]
    detector.neck(maps)[0].sum().backward()
    assert maps[0].grad is not None
    assert maps[0].grad.abs().sum() > 0
    assert maps[1].grad is not None
    assert maps[1].grad.abs().sum() > 0
    assert maps[2].grad is None


@pytest.mark.parametrize(("model", "stride"), [("vgg11-ssd", 8), (LITE, 4), (LITE, True), (LITE, "8")])
def test_a_finest_stride_that_cannot_be(model: str, stride: object) -> None:
    with pytest.raises(RecipeError, match="finest_stride"):
        spec_for(ModelConfig(model=model, input_size=96, width=0.25, options={"finest_stride": stride}), ("a",))


@pytest.mark.parametrize("finest_stride", [8, 16])
def test_levels_of_one_cell_keep_it_without_a_stride(finest_stride: int) -> None:
    # What a stride of 2 does there in bf16: the test below.
    detector = fine(size=96) if finest_stride == 8 else build(size=96)
    assert isinstance(detector.neck, SsdLiteNeck)
    convolutions = [m for m in detector.neck.extras.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    found = [conv.stride[0] for conv in convolutions]
    assert found == ([2, 2, 1] if finest_stride == 8 else [2, 2, 1, 1])
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    detector.eval()
    with torch.no_grad():
        output = detector(images)
        for conv in convolutions:
            conv.stride = (2, 2)
        strided = detector(images)
    torch.testing.assert_close(output.cls_logits, strided.cls_logits, rtol=0, atol=0)


def test_gradients_of_levels_of_one_cell_are_written_in_bf16() -> None:
    """On one cell only the kernel's centre sees anything but padding, so all other gradients are 0."""
    torch.manual_seed(0)
    detector = build(size=96).to(memory_format=torch.channels_last).train()
    assert isinstance(detector.neck, SsdLiteNeck)
    weight = detector.neck.extras[-1].get_submodule("1.0").weight
    around = [place for place in range(9) if place != 4]
    for _ in range(30):
        dirty = [torch.full((size,), 1e20) for size in (100, 288, 576, 1152, 2304, 8000)]  # memory that is used again
        del dirty
        with torch.autocast("cpu", torch.bfloat16):
            output = detector(torch.randn(4, 3, 96, 96).to(memory_format=torch.channels_last))
        detector.zero_grad()
        (output.cls_logits.float().square().mean() + output.bbox_regression.float().square().mean()).backward()
        assert weight.grad is not None
        assert weight.grad.flatten(1)[:, around].abs().max() == 0


def test_building_one_and_running_it_imports_no_compiler() -> None:
    """torch's tensors without values bring its compiler and sympy, 800 modules: seconds, each time a checkpoint is opened."""
    code = """
import sys, torch
from edgekd.detectors import build_detector, spec_for
from edgekd.recipe import ModelConfig
detector = build_detector(spec_for(ModelConfig(model="mobilenetv2-ssd-lite", input_size=96, width=0.25), ("a",))).eval()
with torch.no_grad():
    detector.decode(detector(torch.zeros(1, 3, 96, 96)))
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert told.stdout == "[]\n", told.stderr[-2000:]
