"""The YOLO family: sizes, taps, box coding, losses, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.base import Detector, DetectorOutput, SoftTargets, Targets
from edgekd.detectors.box_losses import paired_iou
from edgekd.errors import RecipeError
from edgekd.recipe import ModelConfig
from edgekd.types import DetectorSpec

MODELS = ("yolov3", "yolov3-tiny", "yolo-nano", "yolo-small")
SMALL = (("yolov3", 0.125), ("yolov3-tiny", 0.25), ("yolo-nano", 0.5))
NAMES = ("a", "b", "c")


def make(model: str, size: int = 64, width: float = 1.0, classes: int = 3, **options: object) -> Detector:
    config = ModelConfig(model=model, input_size=size, width=width, options=options)
    return build_detector(spec_for(config, [f"class {i}" for i in range(classes)]))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# YOLOv3 and its tiny: the published networks for COCO (62.0 M and 8.85 M, batch norm's statistics apart).
# Nano and small are our own: the figures pin them.
@pytest.mark.parametrize(
    ("model", "count"),
    [("yolov3", 61_949_149), ("yolov3-tiny", 8_852_366), ("yolo-nano", 2_921_472), ("yolo-small", 9_445_648)],
)
def test_parameter_counts_for_80_classes(model: str, count: int) -> None:
    with torch.device("meta"):
        assert parameters(make(model, 320, classes=80)) == count


def test_darknet53_backbone_count() -> None:
    with torch.device("meta"):
        backbone = make("yolov3").get_submodule("backbone")
        # 41,609,928 published for the classifier, less its last layer of 1024 x 1000 + 1000
        assert parameters(backbone) == 41_609_928 - 1_025_000


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize(("model", "width"), SMALL)
def test_every_tap_is_what_its_spec_says(model: str, width: float, size: int) -> None:
    detector = make(model, size, width).eval()
    with torch.no_grad():
        output = detector(torch.rand(2, 3, size, size), tuple(detector.tap_specs))
    assert {name: tuple(tap.shape) for name, tap in output.taps.items()} == {
        name: (2, spec.channels, *spec.grid_hw) for name, spec in detector.tap_specs.items()
    }
    levels = ("s16", "s32") if model == "yolov3-tiny" else ("s8", "s16", "s32")
    assert [name for name in detector.tap_specs if name.startswith("backbone")] == [f"backbone.{v}" for v in levels]
    assert [spec.kind for spec in detector.tap_specs.values()] == ["backbone"] * len(levels) + ["neck"] * len(levels)


def test_rectangular_input_and_shapes() -> None:
    config = ModelConfig(model="yolo-nano", width=0.5)
    spec = spec_for(config, NAMES)
    data = spec.to_dict()
    data["preprocess"]["input_hw"] = [64, 128]
    detector = build_detector(DetectorSpec.from_dict(data)).eval()
    output = detector(torch.rand(1, 3, 64, 128))
    rows = 8 * 16 + 4 * 8 + 2 * 4
    boxes, scores = detector.decode(output)
    assert output.cls_logits.shape == (1, rows, 3)
    assert output.bbox_regression.shape == (1, rows, 64)
    assert (boxes.shape, scores.shape, detector.prior_boxes().shape) == ((1, rows, 4), (1, rows, 3), (rows, 4))


def test_an_unknown_tap_is_a_key_error_that_lists_the_taps() -> None:
    with pytest.raises(KeyError, match=r"neck\.p9.*neck\.p3"):
        make("yolo-nano", width=0.25)(torch.rand(1, 3, 64, 64), ("neck.p9",))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("options", "size", "says"),
    [
        ({}, 100, "use 96"),
        ({"grid": 3}, 64, "grid"),
        ({"overlap": "diou"}, 64, "overlap"),
        ({"box_gain": -1}, 64, "box_gain"),
    ],
)
def test_wrong_settings_are_recipe_errors(model: str, options: dict[str, object], size: int, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        make(model, size, **options)


@pytest.mark.parametrize("anchors", [[[10, 10]] * 4, [], [[0, 5]] * 3])
def test_anchors_must_share_out_among_the_levels(anchors: list[list[float]]) -> None:
    with pytest.raises(RecipeError, match="anchors"):
        make("yolov3", anchors=anchors)


def test_anchors_scale_with_the_input_and_are_written_into_the_spec() -> None:
    spec = spec_for(ModelConfig(model="yolov3-tiny", input_size=416), NAMES)
    assert spec.options["anchors"][0] == [10.0, 14.0]
    assert spec_for(ModelConfig(model="yolov3-tiny", input_size=832), NAMES).options["anchors"][0] == [20.0, 28.0]
    assert spec.preprocess.resize == "letterbox"
    assert build_detector(DetectorSpec.from_dict(spec.to_dict())).layout() == build_detector(spec).layout()


def test_layout_tells_detectors_apart() -> None:
    detectors = [make("yolo-nano", width=0.25), make("yolo-nano", width=0.5), make("yolo-nano", 96, width=0.25)]
    detectors += [make("yolov3-tiny", width=0.25), make("yolov3-tiny", width=0.25, grid_sensitivity=1.0)]
    same, other, *rest = [hash(detector.layout()) for detector in detectors]
    assert same == other
    assert len({same, *rest}) == 4


def encoded_yolov3(detector: Detector, boxes: Tensor) -> Tensor:
    """Raw coding with which each row decodes to its box; the box's centre must lie in the row's cell."""
    prior = detector.prior_boxes()
    stride = detector.get_buffer("strides_of_rows")
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    share = (centre - prior[:, :2]) / stride + 0.5
    return torch.cat([torch.logit((share + 0.025) / 1.05), (side / prior[:, 2:]).log()], dim=1)


def test_yolov3_decode_inverts_the_papers_coding() -> None:
    detector = make("yolov3", width=0.125)
    prior = detector.prior_boxes()
    stride = detector.get_buffer("strides_of_rows")
    draw = torch.Generator().manual_seed(0)
    centre = prior[:, :2] + (torch.rand(len(prior), 2, generator=draw) - 0.5) * stride
    half = prior[:, 2:] * (0.3 + torch.rand(len(prior), 2, generator=draw))
    boxes = torch.cat([centre - half, centre + half], dim=1)
    rows = len(prior)
    output = DetectorOutput(torch.zeros(1, rows, 3), encoded_yolov3(detector, boxes)[None], torch.zeros(1, rows))
    decoded, scores = detector.decode(output)
    torch.testing.assert_close(decoded[0], boxes, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scores, torch.full((1, rows, 3), 0.25))


def test_anchor_free_decode_inverts_distances_in_cells() -> None:
    detector = make("yolo-nano", width=0.25)
    cells = detector.prior_boxes()
    draw = torch.Generator().manual_seed(0)
    distances = torch.rand(len(cells), 4, generator=draw) * 15
    low = distances.floor().clamp(max=14)
    bins = torch.arange(16.0)
    # All of the mass on the two bins beside the distance, in the shares that make it the mean.
    mass = (1 - (bins - distances.unsqueeze(-1)).abs()).clamp(min=0)
    assert (mass.sum(-1) - 1).abs().max() < 1e-5
    assert ((mass > 0).sum(-1) <= 2).all()
    assert (low >= 0).all()
    raw = (mass + 1e-9).log().flatten(1)
    decoded, scores = detector.decode(DetectorOutput(torch.zeros(1, len(cells), 3), raw[None]))
    pixels = distances * cells[:, 2:3]
    expected = torch.cat([cells[:, :2] - pixels[:, :2], cells[:, :2] + pixels[:, 2:]], dim=1)
    torch.testing.assert_close(decoded[0], expected, atol=1e-2, rtol=1e-4)
    assert (scores == 0.5).all()


def shapes_on_grey(size: int = 64) -> tuple[Tensor, Targets]:
    """Four images with two coloured rectangles each: class 0 is red, class 1 blue."""
    images = torch.full((4, 3, size, size), 0.45)
    places = [(6, 8, 26, 24), (34, 30, 60, 58), (8, 34, 26, 60), (30, 4, 62, 22)]
    boxes, labels = [], []
    for index in range(4):
        pair = [places[index], places[(index + 1) % 4]]
        for label, (x1, y1, x2, y2) in enumerate(pair):
            images[index, :, y1:y2, x1:x2] = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.2, 0.9]])[label].view(3, 1, 1)
        boxes.append(torch.tensor(pair, dtype=torch.float32))
        labels.append(torch.tensor([0, 1]))
    return images, Targets(boxes, labels)


def empty_targets(batch: int) -> Targets:
    return Targets([torch.zeros(0, 4)] * batch, [torch.zeros(0, dtype=torch.int64)] * batch)


def as_soft(targets: Targets, confidence: float, classes: int = 3) -> SoftTargets:
    probs = [nn.functional.one_hot(v, classes).float() * confidence for v in targets.labels]
    return SoftTargets(targets.boxes_xyxy, probs)


def seeded(model: str, width: float, **options: object) -> Detector:
    torch.manual_seed(0)
    return make(model, 64, width, **options)


@pytest.mark.parametrize(("model", "width"), SMALL)
def test_losses_start_at_the_order_of_one_to_ten_and_reach_every_parameter(model: str, width: float) -> None:
    images, targets = shapes_on_grey()
    detector = seeded(model, width)
    losses = detector.detection_losses(detector(images), targets)
    assert set(losses) == ({"cls", "box", "dfl"} if model == "yolo-nano" else {"cls", "box", "obj"})
    total = torch.stack(list(losses.values())).sum()
    assert 1 < total.item() < 20
    total.backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("model", "width"), SMALL)
@pytest.mark.parametrize("kind", ["truth", "soft"])
def test_empty_images_teach_background_alone(model: str, width: float, kind: str) -> None:
    detector = seeded(model, width)
    output = detector(torch.rand(2, 3, 64, 64))
    if kind == "truth":
        losses = detector.detection_losses(output, empty_targets(2))
    else:
        losses = detector.soft_losses(output, as_soft(empty_targets(2), 1.0), 2.0)
    assert losses["box"].item() == 0
    torch.stack(list(losses.values())).sum().backward()
    gradients = [p.grad for p in detector.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    # A step down the gradient makes every image emptier: the bias of what says "an object" falls.
    bias = output_bias(detector)
    assert bias.grad is not None
    assert (bias.grad > 0).all() if model == "yolo-nano" else bias.grad.view(-1, 8)[:, 4].min() > 0


def output_bias(detector: Detector) -> nn.Parameter:
    head = detector.get_submodule("head.0.cls" if "head.0.cls.0.0.weight" in detector.state_dict() else "head.0")
    convolution = list(head.children())[-1]
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    return convolution.bias


@pytest.mark.parametrize(("model", "width"), SMALL)
def test_losses_do_not_depend_on_the_batch_size(model: str, width: float) -> None:
    images, targets = shapes_on_grey()
    detector = seeded(model, width).eval()
    with torch.no_grad():
        once = detector.detection_losses(detector(images), targets)
        twice_targets = Targets([*targets.boxes_xyxy] * 2, [*targets.labels] * 2)
        twice = detector.detection_losses(detector(images.repeat(2, 1, 1, 1)), twice_targets)
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("model", "width"), SMALL)
def test_a_sure_teacher_is_the_same_as_ground_truth(model: str, width: float) -> None:
    images, targets = shapes_on_grey()
    detector = seeded(model, width)
    output = detector(images)
    hard = detector.detection_losses(output, targets)
    soft = detector.soft_losses(output, as_soft(targets, 1.0))
    torch.testing.assert_close(soft["cls"], hard["cls"] + hard.get("obj", torch.tensor(0.0)))
    torch.testing.assert_close(soft["box"], hard["box"] + hard.get("dfl", torch.tensor(0.0)))
    tempered = detector.soft_losses(output, as_soft(targets, 0.8), 2.0)
    assert set(tempered) == {"cls", "box"}
    assert all(torch.isfinite(v) and v > 0 for v in tempered.values())


@pytest.mark.parametrize(("model", "width"), SMALL)
def test_soft_losses_ignore_rows_without_confidence_or_extent(model: str, width: float) -> None:
    images, targets = shapes_on_grey()
    detector = seeded(model, width)
    output = detector(images)
    plain = as_soft(targets, 0.7)
    junk_boxes = torch.tensor([[5.0, 5, 50, 50], [20, 20, 20, 40]])
    junk_probs = torch.tensor([[0.0, 0, 0], [0.9, 0, 0]])
    noisy = SoftTargets(
        [torch.cat([b, junk_boxes]) for b in plain.boxes_xyxy], [torch.cat([p, junk_probs]) for p in plain.class_probs]
    )
    for name, value in detector.soft_losses(output, plain).items():
        torch.testing.assert_close(detector.soft_losses(output, noisy)[name], value)


def learn(
    model: str, width: float, steps: int, loss: Callable[[Detector, DetectorOutput], dict[str, Tensor]]
) -> Detector:
    images, _ = shapes_on_grey()
    detector = seeded(model, width)
    optimiser = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.stack(list(loss(detector, detector(images)).values())).sum().backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimiser.step()
    return detector.eval()


def assert_finds_all(detector: Detector) -> None:
    images, targets = shapes_on_grey()
    with torch.no_grad():
        boxes, scores = detector.decode(detector(images))
    for index, (truth, labels) in enumerate(zip(targets.boxes_xyxy, targets.labels, strict=True)):
        for box, label in zip(truth, labels, strict=True):
            best = int(scores[index, :, label].argmax())
            assert paired_iou(boxes[index, best], box) > 0.7
            assert scores[index, best].argmax() == label
            assert scores[index, best, label] > 0.4


@pytest.mark.parametrize(("model", "width"), SMALL)
def test_overfits_four_images_from_ground_truth(model: str, width: float) -> None:
    _, targets = shapes_on_grey()
    assert_finds_all(learn(model, width, 100, lambda d, o: d.detection_losses(o, targets)))


@pytest.mark.parametrize(("model", "width"), SMALL)
def test_overfits_four_images_from_a_teachers_answer(model: str, width: float) -> None:
    _, targets = shapes_on_grey()
    assert_finds_all(learn(model, width, 100, lambda d, o: d.soft_losses(o, as_soft(targets, 0.95), 2.0)))


class _Exported(nn.Module):
    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.detector.decode(self.detector(images))


@pytest.mark.parametrize(("model", "width"), [("yolov3-tiny", 0.125), ("yolo-nano", 0.25)])
def test_forward_and_decode_export_without_branches_on_data(model: str, width: float) -> None:
    wrapped = _Exported(make(model, 64, width)).eval()
    program = torch.export.export(wrapped, (torch.rand(1, 3, 64, 64),))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for found, expected in zip(program.module()(images), wrapped(images), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model", ["yolov3-tiny", "yolo-nano"])
def test_scores_start_from_the_prior(model: str) -> None:
    detector = make(model, 64, 0.25).eval()
    with torch.no_grad():
        output = detector(torch.zeros(1, 3, 64, 64))
    logits = output.cls_logits if output.objectness is None else output.objectness
    prior = 0.01 / 3 if output.objectness is None else 0.01
    assert abs(logits.mean().item() - math.log(prior / (1 - prior))) < 1.0
