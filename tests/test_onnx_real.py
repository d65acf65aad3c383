"""A published network, its graph rewritten into other export formats: each must find what the original finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgekd.boxes import iou_matrix
from edgekd.labels import COCO_CLASSES
from edgekd.predictor import Predictor, load_predictor
from edgekd.recipe import OnnxTeacher
from edgekd.types import Detections
from tests.conftest import shared

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
BOXES, SCORES = "/model.22/Mul_output_0", "/model.22/Sigmoid_output_0"  # (1, 4, 8400) centres, (1, 80, 8400)
CODED = [f"/model.22/Concat{suffix}_output_0" for suffix in ("", "_1", "_2")]
COCO = {"class_names": "coco"}


class Graph:
    """The network with its outputs taken off, to which others are added."""

    def __init__(self, original: Path) -> None:
        self.model = onnx.load(str(original))
        self.graph = self.model.graph
        del self.graph.output[:]
        del self.model.metadata_props[:]
        self.count = 0

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        self.count += 1
        self.graph.initializer.append(numpy_helper.from_array(np.array(value, kind), f"constant{self.count}"))
        return f"constant{self.count}"

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        self.count += 1
        names = [f"added{self.count}.{index}" for index in range(outputs)]
        self.graph.node.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def output(self, name: str, tensor: str, kind: str = "FLOAT") -> None:
        self.graph.node.append(helper.make_node("Identity", [tensor], [name]))
        self.graph.output.append(helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), None))

    def rows(self) -> tuple[str, str]:
        """((1, 8400, 4) centres, (1, 8400, 80) scores)."""
        return tuple(self.add("Transpose", name, perm=[0, 2, 1]) for name in (BOXES, SCORES))  # type: ignore[return-value]

    def corners(self) -> str:
        """(1, 8400, 4)."""
        centre, extent = self.add("Split", self.rows()[0], self.constant([2, 2], np.int64), outputs=2, axis=2)
        half = self.add("Mul", extent, self.constant(0.5))
        return self.add("Concat", self.add("Sub", centre, half), self.add("Add", centre, half), axis=2)

    def suppressed(self) -> dict[str, str]:
        """After NMS: image (N, 1), boxes (N, 4), label (N, 1) and score (N, 1), all as floats."""
        corners = self.corners()
        limits = [self.constant([v], k) for v, k in ((300, np.int64), (0.5, np.float32), (0.001, np.float32))]
        picked = self.add("NonMaxSuppression", corners, SCORES, *limits)
        image, label, place = self.add("Split", picked, self.constant([1, 1, 1], np.int64), outputs=3, axis=1)
        both = self.add("Concat", image, place, axis=1)
        three = self.add("Concat", image, label, place, axis=1)
        score = self.add("Unsqueeze", self.add("GatherND", SCORES, three), self.constant([1], np.int64))
        return {
            "image": self.add("Cast", image, to=onnx.TensorProto.FLOAT),
            "boxes": self.add("GatherND", corners, both),
            "label": self.add("Cast", label, to=onnx.TensorProto.FLOAT),
            "score": score,
        }

    def before_image(self, name: str, kind: str, shape: list[Any], nodes: Callable[[Graph, str], str]) -> None:
        """Another input, from which `nodes` make what the network takes."""
        old = self.graph.input[0].name
        del self.graph.input[:]
        self.graph.input.append(helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape))
        body = list(self.graph.node)
        del self.graph.node[:]
        self.graph.node.append(helper.make_node("Identity", [nodes(self, name)], [old]))
        self.graph.node.extend(body)


def _normalised(g: Graph) -> None:
    g.output("boxes", g.add("Div", g.rows()[0], g.constant(640.0)))
    g.output("scores", g.rows()[1])


def _split(g: Graph) -> None:
    g.output("884", g.corners())
    g.output("877", g.rows()[1])


def _across(g: Graph) -> None:
    g.output("tmp_16", g.corners())
    g.output("concat_14.tmp_0", SCORES)


def _joined(g: Graph) -> None:
    g.output("output", g.add("Concat", *g.rows(), axis=2))


def _objectness(g: Graph) -> None:
    boxes, scores = g.rows()
    g.output("outputs", g.add("Concat", boxes, g.constant(np.ones((1, 8400, 1))), scores, axis=2))


def _xyxy(g: Graph) -> None:
    g.output("output", g.add("Concat", g.corners(), g.rows()[1], axis=2))


def _levels(g: Graph) -> None:
    for index, name in enumerate(_level_names(g)):
        g.output(f"level{index}", name)


def _level_names(g: Graph) -> list[str]:
    return [
        node.input[0]
        for name in ("/model.22/Reshape_output_0", "/model.22/Reshape_1_output_0", "/model.22/Reshape_2_output_0")
        for node in g.graph.node
        if name in node.output
    ]


def _flat(g: Graph) -> None:
    g.output("raw", "/model.22/Concat_3_output_0")


def _end_to_end(g: Graph) -> None:
    found = g.suppressed()
    g.output("output", g.add("Concat", found["image"], found["boxes"], found["label"], found["score"], axis=1))


def _flat_predictions(g: Graph) -> None:
    found = g.suppressed()
    g.output(
        "graph2_flat_predictions", g.add("Concat", *(found[k] for k in ("image", "boxes", "score", "label")), axis=1)
    )


def _half(g: Graph) -> None:
    """Ultralytics' `half=True`: input, weights and output in float16."""
    _joined(g)
    scales = {name for node in g.graph.node if node.op_type == "Resize" for name in node.input[1:]}
    tensors = {tensor.name: tensor for tensor in g.graph.initializer}
    tensors |= {n.output[0]: e.t for n in g.graph.node if n.op_type == "Constant" for e in n.attribute}
    for name, tensor in tensors.items():
        if tensor.data_type == onnx.TensorProto.FLOAT and name not in scales:
            halved = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
            tensor.CopyFrom(halved)
    for info in (g.graph.input[0], g.graph.output[0]):
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del g.graph.value_info[:]


def _paddle(g: Graph) -> None:
    found = g.suppressed()
    g.output("multiclass_nms3_0.tmp_0", g.add("Concat", *(found[k] for k in ("label", "score", "boxes")), axis=1))


def _traced(g: Graph) -> None:
    found = g.suppressed()
    flat = g.constant([-1], np.int64)
    g.output("boxes", found["boxes"])
    label = g.add("Cast", g.add("Reshape", found["label"], flat), to=onnx.TensorProto.INT64)
    g.output("labels", g.add("Add", label, g.constant(1, np.int64)), "INT64")
    g.output("scores", g.add("Reshape", found["score"], flat))


def _best(g: Graph) -> None:
    g.output("boxes", g.corners())
    g.output("scores", g.add("ReduceMax", SCORES, axes=[1], keepdims=0))
    g.output("class_idx", g.add("ArgMax", SCORES, axis=1, keepdims=0), "INT64")


def _bytes_inside(g: Graph) -> None:
    _joined(g)
    g.before_image("image", "FLOAT", [1, 3, 640, 640], lambda g, x: g.add("Div", x, g.constant(255.0)))


def _channels_last(g: Graph) -> None:
    _joined(g)

    def nodes(g: Graph, x: str) -> str:
        first = g.add("Transpose", g.add("Cast", x, to=onnx.TensorProto.FLOAT), perm=[0, 3, 1, 2])
        return str(g.add("Mul", first, g.constant(1 / 255)))

    g.before_image("image", "UINT8", [1, 640, 640, 3], nodes)


def _imagenet_inside(g: Graph) -> None:
    """Takes pixels from 0 to 1, takes ImageNet's mean off and puts it on again."""
    _joined(g)

    def nodes(g: Graph, x: str) -> str:
        mean = g.constant(np.reshape([0.485, 0.456, 0.406], (1, 3, 1, 1)))
        return str(g.add("Add", g.add("Sub", x, mean), mean))

    g.before_image("image", "FLOAT", [1, 3, 640, 640], nodes)


CASES: Mapping[str, tuple[Callable[[Graph], None], Mapping[str, Any], float]] = {
    "no metadata": (lambda g: g.output("output", g.add("Concat", BOXES, SCORES, axis=1)), {}, 0.5),
    "a row a candidate": (_joined, {}, 0.5),
    "objectness of ones": (_objectness, {}, 0.5),
    "corners": (_xyxy, {}, 0.5),
    "boxes and scores": (_split, {}, 0.5),
    "boxes and scores across": (_across, {"resize": "letterbox"}, 0.5),
    "boxes as shares": (_normalised, {"resize": "letterbox"}, 0.5),
    "raw levels": (_levels, {}, 0.5),
    "raw and flat": (_flat, {}, 0.5),
    "best score and class, no NMS": (_best, COCO | {"resize": "letterbox"}, 0.5),
    "YOLOv7's end to end": (_end_to_end, COCO, 0.5),
    "YOLO-NAS's flat predictions": (_flat_predictions, COCO, 0.5),
    "PaddleDetection's rows": (_paddle, COCO | {"resize": "letterbox"}, 0.5),
    "torchvision's outputs": (
        _traced,
        {"class_names": COCO_CLASSES, "resize": "letterbox", "background": "first"},
        0.5,
    ),
    "pixels as 0 to 255": (_bytes_inside, {}, 0.5),
    "bytes, channels last": (_channels_last, {}, 0.5),
    "half precision": (_half, {}, 3.0),
    "normalised inside": (_imagenet_inside, {}, 0.5),
}


@pytest.fixture(scope="module")
def original() -> Path:
    return shared("weights/onnx_teachers/yolov8n.onnx")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    files = sorted((shared("data/tiny_coco") / "val2017").glob("*.jpg"))[:3]
    return [cv2.imread(str(file))[..., ::-1] for file in files]


@pytest.fixture(scope="module")
def expected(original: Path, pictures: list[np.ndarray]) -> list[Detections]:
    with load_predictor(original, threads=2, score_threshold=0.25) as predictor:
        return [predictor.detect(picture) for picture in pictures]


def same(predictor: Predictor, pictures: list[np.ndarray], expected: list[Detections], pixels: float) -> None:
    assert sum(len(found) for found in expected) > 5
    assert len({picture.shape[:2] for picture in pictures}) > 1
    for picture, wanted in zip(pictures, expected, strict=True):
        found = predictor.detect(picture)
        assert len(found) == len(wanted)
        nearest = iou_matrix(wanted.boxes_xyxy, found.boxes_xyxy).argmax(1)
        np.testing.assert_allclose(found.boxes_xyxy[nearest], wanted.boxes_xyxy, atol=pixels)
        np.testing.assert_allclose(found.scores[nearest], wanted.scores, atol=0.01)
        names = [predictor.class_names[label] for label in found.labels[nearest]]
        assert names == [COCO_CLASSES[label] for label in wanted.labels]


@pytest.mark.parametrize("case", CASES)
def test_a_rewritten_network_finds_the_same(
    case: str, original: Path, pictures: list[np.ndarray], expected: list[Detections], tmp_path: Path
) -> None:
    rewrite, declared, pixels = CASES[case]
    graph = Graph(original)
    rewrite(graph)
    path = tmp_path / "rewritten.onnx"
    onnx.save(graph.model, str(path))
    options = OnnxTeacher(name="m", onnx=str(path), **declared)
    with load_predictor(path, options=options, threads=2, score_threshold=0.25) as predictor:
        same(predictor, pictures, expected, pixels)
