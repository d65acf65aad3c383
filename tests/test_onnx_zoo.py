"""Every format of `onnx_zoo` must give the right boxes, classes and scores on a picture of another shape than the input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edgekd.bench.complexity import describe_artifact
from edgekd.cli import app
from edgekd.errors import ArtifactError, UserError
from edgekd.export.engine_job import can_be_cut
from edgekd.predictor import Predictor, load_predictor
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.anchored import ANCHOR_SETS
from edgekd.runtimes.customs import custom_of
from edgekd.runtimes.first_nodes import Beginning, beginning_of
from edgekd.runtimes.model_files import external_files, weights_precision
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.side_inputs import value_for
from edgekd.runtimes.tensor_info import TensorInfo
from edgekd.teachers import build_teacher
from edgekd.teaching import teacher_identity
from tests.onnx_zoo import (
    BOXES,
    EXPORTS,
    INPUT_HW,
    LABELS,
    NAMES,
    SCORES,
    SOURCE_HW,
    ULTRALYTICS,
    Export,
    apart,
    efficient_nms,
    head,
    write,
)

onnx = pytest.importorskip("onnx")
PICTURE = np.full((*SOURCE_HW, 3), 114, np.uint8)


def opened(export: Export, path: Path, **options: object) -> Predictor:
    declared = OnnxTeacher(name="m", onnx=str(path), **{**export.declared, **options})
    return load_predictor(path, options=declared, score_threshold=0.01)


def check(export: Export, predictor: Predictor, tolerance: float = 0.05) -> None:
    found = predictor.detect(PICTURE)
    assert len(found) == 3, found
    np.testing.assert_allclose(found.boxes_xyxy, BOXES, atol=tolerance)
    np.testing.assert_allclose(found.scores, SCORES, atol=1e-3)
    assert predictor.class_names == export.names
    expected = ["person"] * 3 if export.names == ("person",) else [("cat", "dog", "cow")[label] for label in LABELS]
    assert [predictor.class_names[label] for label in found.labels] == expected


@pytest.mark.parametrize("case", EXPORTS)
def test_every_export_gives_its_boxes(case: str, tmp_path: Path) -> None:
    export = EXPORTS[case]
    with opened(export, write(export, tmp_path / "m.onnx")) as predictor:
        check(export, predictor, 2.0 if "half" in case else 0.05)
        spec = predictor.preprocess
        assert (spec.input_hw, spec.resize, spec.channels) == (export.input_hw, export.resize, export.channels)
        np.testing.assert_allclose((spec.mean, spec.std), export.scaling, atol=5e-3)
        assert predictor.facts["notes"]


@pytest.mark.parametrize("case", [case for case, export in EXPORTS.items() if export.hidden])
def test_a_probe_that_finds_nothing_leads_to_the_same(case: str, tmp_path: Path) -> None:
    export = EXPORTS[case]
    with opened(export, write(export, tmp_path / "m.onnx", empty_probe=True)) as predictor:
        check(export, predictor)


@pytest.mark.parametrize(
    "case", ["Ultralytics v8, 11", "YOLOv7 end to end for TensorRT", "YOLOv7 end to end", "YOLOv4"]
)
def test_a_fixed_batch_of_two_is_read_image_by_image(case: str, tmp_path: Path) -> None:
    export = EXPORTS[case]

    def twice(boxes: np.ndarray) -> dict[str, np.ndarray]:
        arrays = export.outputs(boxes)
        other = {name: array.copy() for name, array in arrays.items()}
        if case == "YOLOv7 end to end":
            other["output"][:, 0] = 1
        return {name: np.concatenate([array, other[name]]) for name, array in arrays.items()}

    inputs = {name: (kind, (2, *shape[1:])) for name, (kind, shape) in export.inputs.items()}
    both = replace(export, outputs=twice, inputs=inputs)
    with opened(both, write(both, tmp_path / "m.onnx")) as predictor:
        check(export, predictor)
        tensor, geometry = predictor.prepare(PICTURE)
        raw = predictor.infer(np.concatenate([tensor, tensor]))
        np.testing.assert_allclose(predictor.finish(raw, geometry, 1).boxes_xyxy, BOXES, atol=0.05)


@pytest.mark.parametrize("case", ["torchvision", "PP-YOLOE"])
def test_rows_that_name_no_image_are_asked_for_one_image_at_a_time(case: str, tmp_path: Path) -> None:
    export = EXPORTS[case]
    inputs = {name: (kind, ("n", *shape[1:])) for name, (kind, shape) in export.inputs.items()}
    export = replace(export, inputs=inputs)
    config = OnnxTeacher(name="t", onnx=str(write(export, tmp_path / "m.onnx")), **export.declared)
    teacher = build_teacher(config, NAMES)
    pictures = torch.full((3, 3, *export.input_hw), 114, dtype=torch.uint8)
    answers = teacher.respond(pictures).soft
    assert [len(boxes) for boxes in answers.boxes_xyxy] == [3, 3, 3]
    for boxes in answers.boxes_xyxy:
        np.testing.assert_allclose(boxes.numpy(), export.input_boxes(), atol=1e-3)


def test_a_head_without_batch_axis_is_asked_for_one_image_at_a_time(tmp_path: Path) -> None:
    """The graph takes a batch, and gives what it made of the first image."""
    export = EXPORTS["Ultralytics v8, dynamic"]
    first = replace(export, outputs=lambda b: {"output0": export.outputs(b)["output0"][0]})
    for given, batched in ((export, True), (first, False)):
        with opened(given, write(given, tmp_path / "m.onnx")) as predictor:
            check(given, predictor)
            assert predictor.runtime.dynamic_batch is batched  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "first",
    [
        "Div by 255",
        "Mul by 1/127.5",
        "Sub mean of bytes",
        "Sub mean of shares",
        "Sub mean of shares, BGR",
        "Sub next to nothing",
        "Conv",
    ],
)
def test_pixels_that_the_graph_normalises_come_as_it_wants_them(first: str, tmp_path: Path) -> None:
    export = EXPORTS["Ultralytics v8, 11"]
    path = write(export, tmp_path / "m.onnx")
    model = onnx.load(str(path))
    operator, value = {
        "Div by 255": ("Div", 255.0),
        "Mul by 1/127.5": ("Mul", 1 / 127.5),
        "Sub mean of bytes": ("Sub", [[[123.0]], [[116.0]], [[103.0]]]),
        "Sub mean of shares, BGR": ("Sub", [[[0.406]], [[0.456]], [[0.485]]]),
        "Sub mean of shares": ("Sub", [[[0.485]], [[0.456]], [[0.406]]]),
        "Sub next to nothing": ("Sub", [[[0.01]], [[0.02]], [[-0.01]]]),
        "Conv": ("Relu", None),
    }[first]
    inputs = ["images"]
    if value is not None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), "value"))
        inputs.append("value")
    for node in model.graph.node:
        node.input[:] = ["first" if name == "images" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node(operator, inputs, ["first"]))
    onnx.save(model, str(path))
    with opened(export, path) as predictor:
        assert predictor.preprocess.std == (
            (1 / 255,) * 3 if "25" in first or "bytes" in first or "127" in first else (1, 1, 1)
        )
        assert predictor.preprocess.mean == (0, 0, 0)
        assert predictor.preprocess.channels == ("bgr" if "BGR" in first else "rgb")
        said = [note for note in predictor.facts["notes"] if "the graph itself normalises" in note]
        assert len(said) == (first not in ("Sub next to nothing", "Conv"))


def test_scores_that_quantisation_left_nothing_are_told(tmp_path: Path) -> None:
    """One scale for boxes and scores: 640 / 255 a step, which no score reaches half of."""
    export = EXPORTS["Ultralytics v8, 11"]
    rounded = replace(export, outputs=lambda b: {n: 2.5 * np.rint(a / 2.5) for n, a in export.outputs(b).items()})
    with opened(rounded, write(rounded, tmp_path / "m.onnx")) as predictor:
        assert any("exactly 0: where the file is quantised" in note for note in predictor.facts["notes"])
    with opened(export, write(export, tmp_path / "m.onnx")) as predictor:
        assert not any("exactly 0" in note for note in predictor.facts["notes"])


def test_the_precision_is_of_the_weights(tmp_path: Path) -> None:
    """Files quantised by others keep their inputs in fp32, as half ones that keep their types do."""
    export = EXPORTS["Ultralytics v8, 11"]
    model = onnx.load(str(write(export, tmp_path / "m.onnx")))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((64, 64, 3, 3), np.int8), "weights"))
    onnx.save(model, str(tmp_path / "m.onnx"))
    with opened(export, tmp_path / "m.onnx") as predictor:
        assert predictor.describe()["precision"] == "int8"
    (weights,) = (tensor for tensor in model.graph.initializer if tensor.name == "weights")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["weights"], value=weights))
    model.graph.initializer.remove(weights)
    assert weights_precision(model) == "int8", "some exporters write weights as nodes"
    with opened(export, write(export, tmp_path / "m.onnx")) as predictor:
        assert predictor.describe()["precision"] == "fp32"


def halved_inside(export: Export, path: Path) -> Path:
    """The file, taking pictures twice as large, which its graph first brings to its own size."""
    image, (kind, shape) = next(iter(export.inputs.items()))
    doubled = tuple(2 * extent if extent in (64, 96) else extent for extent in shape)
    write(replace(export, inputs={image: (kind, doubled)}), path)
    model = onnx.load(str(path))
    for name, value in (("by", np.array(1 / 255, np.float32)), ("size", np.array(shape, np.int64))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for node in model.graph.node:
        node.input[:] = ["resized" if name == image else name for name in node.input]
    resize = onnx.helper.make_node("Resize", ["scaled", "", "", "size"], ["resized"], mode="linear")
    for node in (
        resize,
        onnx.helper.make_node("Mul", ["numbers", "by"], ["scaled"]),
        onnx.helper.make_node("Cast", [image], ["numbers"], to=onnx.TensorProto.FLOAT),
    ):
        model.graph.node.insert(0, node)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("Ultralytics v8, 11", ", and boxes are of that"),
        ("YOLO-NAS raw", ", and boxes are of that"),
        ("YOLOX", ", whose cells the boxes are coded by"),
        ("YOLOv8's raw levels", ", whose cells the boxes are coded by"),
        ("raw yolov5 in maps", ", whose cells the boxes are coded by"),
        ("Ultralytics RT-DETR", ""),
    ],
)
def test_a_graph_that_resizes_pictures_itself(case: str, says: str, tmp_path: Path) -> None:
    export = EXPORTS[case]
    with opened(export, halved_inside(export, tmp_path / "m.onnx")) as predictor:
        check(export, predictor, 1.1)  # letterboxes round by sides of other lengths
        assert predictor.preprocess.input_hw == (128, 192)
        said = [note for note in predictor.facts["notes"] if "resizes pictures to 64x96" in note]
        assert said == ["the graph itself resizes pictures to 64x96" + says] * bool(says)
        assert OutputFormat.from_dict(json.loads(json.dumps(predictor.form.to_dict()))) == predictor.form
        assert any("the graph itself normalises 0 to 255" in note for note in predictor.facts["notes"])


def test_a_graph_that_resizes_pictures_and_scales_boxes_back(tmp_path: Path) -> None:
    export = EXPORTS["Ultralytics v8, 11"]

    def doubled(boxes: np.ndarray) -> dict[str, np.ndarray]:
        (array,) = export.outputs(boxes).values()
        return {"output0": np.concatenate([2 * array[:, :4], array[:, 4:]], 1)}

    scaled = replace(export, outputs=doubled)
    with opened(scaled, halved_inside(scaled, tmp_path / "m.onnx")) as predictor:
        check(export, predictor, 1.1)
        assert any(note.endswith("boxes are scaled back to the input") for note in predictor.facts["notes"])


def test_a_few_finished_boxes_do_not_show_of_which_picture_they_are(tmp_path: Path) -> None:
    export = EXPORTS["Ultralytics v10, 26 end to end"]
    with opened(export, halved_inside(export, tmp_path / "m.onnx")) as predictor:
        assert not predictor.form.frame_hw
        assert any("boxes taken to be of the input" in note for note in predictor.facts["notes"])


def test_bytes_that_the_graph_resizes_itself(tmp_path: Path) -> None:
    export = replace(EXPORTS["YOLO-NAS raw"], inputs={"image": ("UINT8", (1, *INPUT_HW, 3))})
    with opened(export, halved_inside(export, tmp_path / "m.onnx")) as predictor:
        check(export, predictor, 1.1)  # letterboxes round by sides of other lengths


def test_colours_exchanged_before_a_mean_is_taken_off_leave_their_order_open(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    values = {"mean": np.reshape([0.406, 0.456, 0.485], (3, 1, 1)).astype(np.float32), "reversed": np.array([2, 1, 0])}
    nodes = [
        helper.make_node("Gather", ["image", "reversed"], ["turned"], axis=1),
        helper.make_node("Sub", ["turned", "mean"], ["out"]),
    ]
    shape = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])
    weights = [numpy_helper.from_array(value, name) for name, value in values.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [shape], [], weights)), str(tmp_path / "m.onnx"))
    assert beginning_of(tmp_path / "m.onnx", "image") == Beginning("0 to 1")


def test_deformable_detr_is_known_by_its_mask_of_padding() -> None:
    form = OutputFormat("boxes-scores", ("logits", "pred_boxes"), 3, "cxcywh-normalised", "sigmoid")
    assert custom_of(form, ("pixel_values", "pixel_mask"), {}).whose == "DETR"
    assert custom_of(form, ("pixel_values",), {}).whose != "DETR"


def test_a_decoded_yolox_is_known_by_its_first_layer(tmp_path: Path) -> None:
    export = replace(EXPORTS["YOLOX"], outputs=lambda b: {"output": head(b, "objectness")})
    path = write(export, tmp_path / "m.onnx")
    model = onnx.load(str(path))
    bounds = [("start0", [0]), ("start1", [1]), ("end", [9999]), ("axis", [2]), ("step", [2])]
    for name, value in bounds:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    for node in model.graph.node:
        node.input[:] = ["whole" if name == "images" else name for name in node.input]
    for index in (1, 0):
        inputs = ["images", f"start{index}", "end", "axis", "step"]
        model.graph.node.insert(0, onnx.helper.make_node("Slice", inputs, [f"half{index}"]))
    model.graph.node.insert(2, onnx.helper.make_node("Concat", ["half0", "half1"], ["whole"], axis=2))
    onnx.save(model, str(path))
    with opened(export, path) as predictor:
        check(export, predictor)
        spec = predictor.preprocess
        assert (spec.channels, spec.resize, spec.std) == ("bgr", "letterbox-corner", (1 / 255,) * 3)


@pytest.mark.parametrize("name", ["m.onnx", "M.ONNX"])
def test_weights_in_another_file_belong_to_the_model(name: str, tmp_path: Path) -> None:
    export = EXPORTS["Ultralytics v8, 11"]
    path, parts = write(export, tmp_path / name), tmp_path / f"{name}.data"
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location=parts.name, size_threshold=0)
    with opened(export, path) as predictor:
        check(export, predictor)
        about = predictor.describe()
    assert about["size_bytes"] == path.stat().st_size + parts.stat().st_size
    assert about["sha256"] == describe_artifact(path).sha256
    before = teacher_identity(OnnxTeacher(name="t", onnx=str(path)))
    content = bytearray(parts.read_bytes())
    content[-1] ^= 1
    parts.write_bytes(content)
    assert teacher_identity(OnnxTeacher(name="t", onnx=str(path))) != before
    parts.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="cut off"):
        opened(export, path)
    parts.unlink()
    with pytest.raises(ArtifactError, match="same folder"):
        opened(export, path)


def test_weights_of_nodes_in_another_file_belong_to_the_model(tmp_path: Path) -> None:
    weights = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32))
    node = onnx.helper.make_node("Constant", [], ["weights"], value=weights)
    out = onnx.helper.make_tensor_value_info("weights", onnx.TensorProto.FLOAT, None)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [out]))
    kept = {"save_as_external_data": True, "size_threshold": 0, "convert_attribute": True}
    onnx.save(model, str(tmp_path / "m.onnx"), location="m.data", **kept)
    assert external_files(tmp_path / "m.onnx") == [tmp_path / "m.data"]


@pytest.mark.parametrize(("version", "word"), [({"ir": 99}, "ir_version"), ({"opset": 99}, "lower opset")])
def test_a_file_newer_than_the_runtime_says_how_to_mend_it(version: dict[str, int], word: str, tmp_path: Path) -> None:
    export = EXPORTS["Ultralytics v8, 11"]
    with pytest.raises(ArtifactError, match=word):
        opened(export, write(export, tmp_path / "m.onnx", **version))


@pytest.mark.parametrize(
    ("content", "found", "fix"),
    [
        (b"", "empty file", "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer", "git lfs pull"),
        (b"<!DOCTYPE html>404", "parsing failed", "another kind of file"),
    ],
)
def test_a_file_that_is_no_model_is_named_for_what_it_is(content: bytes, found: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=found) as caught:
        load_predictor(tmp_path / "m.onnx")
    assert fix in str(caught.value.fix)


def test_class_names_in_another_encoding_are_an_artifact_error(tmp_path: Path) -> None:
    """What is not Python may write whatever bytes it likes."""
    export = replace(
        EXPORTS["Ultralytics v8, 11"], metadata=ULTRALYTICS | {"names": "{0: 'caf\u00e9', 1: 'b', 2: 'c'}"}
    )
    path = write(export, tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xe9\xe9"))
    with pytest.raises(ArtifactError, match="not UTF-8"):
        opened(export, path)


def test_an_old_file_with_its_weights_among_the_inputs(tmp_path: Path) -> None:
    export = EXPORTS["Ultralytics v8, 11"]
    path = write(export, tmp_path / "m.onnx", opset=9, ir=3)
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(info)
    onnx.save(model, str(path))
    with opened(export, path) as predictor:
        check(export, predictor)


NOISE = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return NOISE.normal(size=shape).astype(np.float32)


REFUSED = {
    "anchors in maps": ({"a": noise(1, 255, 8, 12), "b": noise(1, 255, 4, 6), "c": noise(1, 255, 2, 3)}, "anchors"),
    "anchors apart": ({"a": noise(1, 3, 8, 12, 85), "b": noise(1, 3, 4, 6, 85), "c": noise(1, 3, 2, 3, 85)}, "anchors"),
    "one map": ({"grid": noise(1, 125, 2, 3)}, "feature maps"),
    "CenterNet": ({"hm": noise(1, 80, 16, 24), "wh": noise(1, 2, 16, 24), "reg": noise(1, 2, 16, 24)}, "feature maps"),
    "FCOS": (
        {f"{n}{i}": noise(1, c, 8 >> i, 12 >> i) for i in range(3) for n, c in (("c", 80), ("b", 4))},
        "feature maps",
    ),
    "a classifier": ({"logits": noise(1, 1000)}, "neither a raw YOLO head"),
    "a segmenter": ({"out": noise(1, 21, 64, 96)}, "no pair of boxes"),
    "two heads": ({"a": noise(1, 84, 126), "b": noise(1, 84, 126)}, "several outputs"),
    "torchvision without names": (apart(BOXES, ("15", "16", "17"), first=1, batch=False), "background: first"),
    "rotated boxes without a task": (
        {"o": np.concatenate([head(BOXES), NOISE.uniform(-1, 2, (1, 126, 1))], 2).astype(np.float32)},
        "angle",
    ),
    "keypoints without a task": ({"o": np.concatenate([head(BOXES), noise(1, 126, 51)], 2)}, "keypoints"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_outputs(case: str, tmp_path: Path) -> None:
    arrays, word = REFUSED[case]
    names = {} if case.startswith(("anch", "one", "Cent", "FC", "two", "a ")) else {"class_names": NAMES}
    export = Export(lambda _: arrays, declared=names)
    with pytest.raises(UserError, match=word) as caught:
        opened(export, write(export, tmp_path / "m.onnx"))
    for name, array in arrays.items():
        assert f"{name} {array.shape}" in str(caught.value)


def test_labels_as_text_are_refused(tmp_path: Path) -> None:
    export = replace(
        EXPORTS["torchvision"],
        outputs=lambda b: (
            apart(b, ("boxes", "scores", "labels")) | {"labels": np.array([["cow", "cat", "dog"]], object)}
        ),
    )
    with pytest.raises(UserError, match="as numbers"):
        opened(export, write(export, tmp_path / "m.onnx"))


def test_tensorflow_s_names_alone_are_not_its_shares(tmp_path: Path) -> None:
    """NVIDIA's EfficientNMS has the same four, with corners in pixels and labels from 0."""
    names = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
    export = Export(lambda b: efficient_nms(b, names), "stretch")
    with opened(export, write(export, tmp_path / "m.onnx")) as predictor:
        check(export, predictor)
        assert predictor.preprocess.std == (1, 1, 1)


def test_inputs_that_nothing_is_known_of_are_refused(tmp_path: Path) -> None:
    export = replace(EXPORTS["RF-DETR"], inputs={**EXPORTS["RF-DETR"].inputs, "input_ids": ("INT64", (1, 12))})
    with pytest.raises(ArtifactError, match="input_ids"):
        opened(export, write(export, tmp_path / "m.onnx"))


def test_a_size_that_is_open_in_name_only(tmp_path: Path) -> None:
    export = EXPORTS["Ultralytics v8, dynamic"]
    path = write(export, tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 3, 64, 96), np.float32), "grid"))
    model.graph.node[0].input[0] = "placed"
    model.graph.node.insert(0, onnx.helper.make_node("Add", ["images", "grid"], ["placed"]))
    onnx.save(model, str(path))
    with opened(export, path):
        pass
    with pytest.raises(UserError, match="fails at 160x160") as caught:
        opened(export, path, input_size=160)
    assert "input_size" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("name", "value"), [("iou_threshold", 0.65), ("score_threshold", 0.001), ("max_output_boxes", 300)]
)
def test_thresholds_are_filled_in(name: str, value: float) -> None:
    kind = "tensor(int64)" if value > 1 else "tensor(float)"
    np.testing.assert_allclose(value_for(TensorInfo(name, (1,), kind), 1, (64, 96)), [value], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("orig_target_sizes", (96, 64)), ("target_sizes", (64, 96)), ("im_shape", (64, 96))]
)
def test_a_size_comes_in_its_detectors_order(name: str, value: tuple[int, int]) -> None:
    np.testing.assert_array_equal(value_for(TensorInfo(name, (1, 2), "tensor(int64)"), 1, (64, 96)), [value])


def test_labels_that_start_at_0_after_all_are_an_error(tmp_path: Path) -> None:
    export = replace(
        EXPORTS["torchvision"], outputs=lambda b: apart(b, ("boxes", "scores", "labels"), first=0, batch=False)
    )
    with (
        opened(export, write(export, tmp_path / "m.onnx")) as predictor,
        pytest.raises(ArtifactError, match="background: none"),
    ):
        predictor.detect(PICTURE)


def test_anchors_of_ones_own(tmp_path: Path) -> None:
    export = EXPORTS["raw yolov5 in maps"]
    path = write(export, tmp_path / "m.onnx")
    sizes = ANCHOR_SETS["yolov5"].sizes
    own = tuple(zip(sizes[::2], sizes[1::2], strict=True))
    for declared in (own, {"yolov5": own}):
        with opened(export, path, anchors=declared) as predictor:
            check(export, predictor)
        assert OutputFormat.from_dict(json.loads(json.dumps(predictor.form.to_dict()))) == predictor.form
    with pytest.raises(UserError, match="8 anchors for maps of 9"):
        opened(export, path, anchors=own[:-1])


def test_what_is_declared_to_no_effect_is_said(tmp_path: Path) -> None:
    export = EXPORTS["Ultralytics v8, 11"]
    with opened(export, write(export, tmp_path / "m.onnx"), anchors="yolov5", background="first") as predictor:
        check(export, predictor)
        said = " ".join(predictor.facts["notes"])
    assert "declared anchors: not used" in said
    assert "declared background: first: not used" in said


def test_the_command_line_says_what_it_took_and_takes_what_is_declared(tmp_path: Path) -> None:
    path = write(EXPORTS["raw yolov5 in maps"], tmp_path / "m.onnx")
    cv2.imwrite(str(tmp_path / "p.png"), PICTURE)
    given = ["predict", str(path), str(tmp_path / "p.png"), "--out", str(tmp_path / "out"), "--classes", "cat,dog,cow"]
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 2
    assert "yolov3, " in refused.output
    assert "`anchors: {yolov4-tiny: " in refused.output
    result = CliRunner().invoke(app, [*given, "--declare", "anchors=yolov5"])
    assert result.exit_code == 0, result.output
    assert "9 anchors over 3 levels" in result.output
    (found,) = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))["images"]
    boxes = [detection["box_xyxy"] for detection in found["detections"]]
    np.testing.assert_allclose(boxes, BOXES, atol=0.1)


@pytest.mark.parametrize(
    ("case", "cut"),
    [
        ("YOLO-NAS raw", True),
        ("PP-YOLOE without NMS", False),
        ("YOLOv8 for RKNN", False),
        ("one class without an axis", False),
        ("Hugging Face RT-DETR", False),
        ("YOLOv4", False),
    ],
)
def test_an_engine_cuts_only_candidates_that_stand_in_rows(case: str, cut: bool, tmp_path: Path) -> None:
    export = EXPORTS[case]
    path = write(export, tmp_path / "m.onnx")
    with opened(export, path) as predictor:
        assert can_be_cut(predictor.form, onnx.load(str(path))) is cut
