from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgekd.boxes import cxcywh_from_xyxy
from edgekd.checkpoint import save_detector
from edgekd.errors import ArtifactError, ClassMapError, RuntimeFailure, UserError
from edgekd.labels import VOC_CLASSES
from edgekd.predictor import load_predictor
from edgekd.recipe import OnnxTeacher
from edgekd.types import DetectorSpec, PreprocessSpec
from tests.bench_doubles import write_detector
from tests.conftest import shared
from tests.toy import CLASSES, toy_detector
from tests.toy_onnx import write_constant_detector

IMAGE = np.full((128, 128, 3), 90, np.uint8)
# A 128 x 128 image fills 64 x 64 of a 64 x 96 letterbox: scale 0.5, shifted 16 to the right.
BOXES = np.array([[16, 0, 48, 32], [17, 0, 48, 32], [60, 40, 80, 64]], np.float32)
SCORES = np.array([[0.9, 0.1], [0.6, 0.2], [0.05, 0.4]], np.float32)
IN_IMAGE = np.array([[0, 0, 64, 64], [88, 80, 128, 128]], np.float32)


def yolo_file(path: Path, **kwargs: object) -> Path:
    head = np.concatenate([cxcywh_from_xyxy(BOXES), SCORES], 1)
    noise = np.tile(np.array([[40, 30, 8, 8, 1e-5, 1e-5]], np.float32), (60, 1))
    metadata = {"names": "{0: 'cat', 1: 'dog'}", "stride": "32"}
    return write_constant_detector(
        path, {"output0": np.concatenate([head, noise]).T[None]}, metadata=metadata, **kwargs  # type: ignore[arg-type]
    )  # fmt: skip


def ours(path: Path, kind: str = "boxes-scores", **changes: str) -> Path:
    spec = DetectorSpec("mobilenetv2-ssd-lite", ("cat", "dog"), PreprocessSpec((64, 96), "letterbox"))
    outputs = {"boxes": BOXES[None], "scores": SCORES[None]}
    if kind == "detections":
        outputs = {"boxes": BOXES[[0, 2]], "scores": SCORES.max(1)[[0, 2]], "labels": np.array([0, 1])}
    metadata = {
        "edgekd.schema": "edgekd.onnx/1",
        "edgekd.spec": json.dumps(spec.to_dict()),
        "edgekd.output": json.dumps({"kind": kind}),
        "edgekd.precision": "int8",
        "edgekd.target": "x86",
        "edgekd.provenance": "{}",
    }
    return write_constant_detector(path, outputs, metadata={**metadata, **changes})


def changed_spec(preprocess: tuple[str, object] | None = None, **changes: object) -> str:
    spec = DetectorSpec("mobilenetv2-ssd-lite", ("cat", "dog"), PreprocessSpec((64, 96), "letterbox")).to_dict()
    return json.dumps(
        {**spec, **changes, "preprocess": {**spec["preprocess"], **dict([preprocess] if preprocess else [])}}
    )


def test_a_foreign_yolo_file_from_metadata_alone(tmp_path: Path) -> None:
    with load_predictor(yolo_file(tmp_path / "foreign.onnx"), threads=1) as predictor:
        found = predictor.detect(IMAGE)
        np.testing.assert_allclose(found.boxes_xyxy[:2], IN_IMAGE, atol=1e-3)
        np.testing.assert_allclose(found.scores[:2], [0.9, 0.4])
        np.testing.assert_array_equal(found.labels[:2], [0, 1])
        facts = predictor.describe()
        json.dumps(facts)
        assert facts["class_names"] == ["cat", "dog"]
        assert facts["preprocess"]["resize"] == "letterbox"
        assert facts["output"]["kind"] == "yolo"
        assert facts["size_bytes"] == (tmp_path / "foreign.onnx").stat().st_size
        assert len(facts["sha256"]) == 64
        assert any("recognised" in note for note in facts["notes"])


@pytest.mark.parametrize("kind", ["boxes-scores", "detections"])
def test_a_file_of_ours_says_everything_itself(tmp_path: Path, kind: str) -> None:
    predictor = load_predictor(ours(tmp_path / "ours.onnx", kind), score_threshold=0.3)
    assert predictor.class_names == ("cat", "dog")
    assert predictor.preprocess == PreprocessSpec((64, 96), "letterbox")
    assert predictor.describe()["precision"] == "int8"
    found = predictor.detect(IMAGE)
    np.testing.assert_allclose(found.boxes_xyxy, IN_IMAGE, atol=1e-3)
    np.testing.assert_array_equal(found.labels, [0, 1])


def test_the_stages_apart_are_the_whole(tmp_path: Path) -> None:
    predictor = load_predictor(yolo_file(tmp_path / "m.onnx"))
    tensor, geometry = predictor.prepare(IMAGE)
    assert tensor.shape == (1, 3, 64, 96)
    raw = predictor.infer(tensor)
    np.testing.assert_array_equal(predictor.finish(raw, geometry).boxes_xyxy, predictor.detect(IMAGE).boxes_xyxy)
    np.testing.assert_array_equal(predictor.soften(raw, geometry).class_probs, predictor.answer(IMAGE).class_probs)
    predictor.warm()


def test_answers_keep_class_vectors(tmp_path: Path) -> None:
    answer = load_predictor(ours(tmp_path / "m.onnx"), score_threshold=0.3).answer(IMAGE)
    np.testing.assert_allclose(answer.class_probs, SCORES[[0, 2]])


def test_boxes_outside_the_image_are_left_out(tmp_path: Path) -> None:
    boxes = np.array([[[0, 0, 12, 60], [16, 0, 48, 32]]], np.float32)  # the first lies in the padding
    path = write_constant_detector(tmp_path / "m.onnx", {"boxes": boxes, "scores": np.full((1, 2, 1), 0.5, np.float32)})
    options = OnnxTeacher(name="m", onnx="", class_names=("cat",), box_format="xyxy", resize="letterbox")
    predictor = load_predictor(path, options=options)
    for found in (predictor.detect(IMAGE), predictor.answer(IMAGE)):
        np.testing.assert_allclose(found.boxes_xyxy, IN_IMAGE[:1])


def test_other_classes_share_the_session(tmp_path: Path) -> None:
    predictor = load_predictor(ours(tmp_path / "m.onnx"), score_threshold=0.3)
    mapped = predictor.with_classes(("bird", "Dog"))
    assert mapped.runtime is predictor.runtime
    np.testing.assert_array_equal(mapped.detect(IMAGE).labels, [1])
    assert predictor.class_names == ("cat", "dog")
    assert mapped.describe()["unknown_classes"] == ["bird"]
    merged = predictor.with_classes(("animal",), {"cat": "animal", "dog": "animal"})
    np.testing.assert_allclose(merged.detect(IMAGE).scores, [0.9, 0.4])
    with pytest.raises(ClassMapError):
        predictor.with_classes(("rbc",))


def test_thresholds_can_be_changed(tmp_path: Path) -> None:
    predictor = load_predictor(ours(tmp_path / "m.onnx"))
    assert len(predictor.with_selection(score_threshold=0.5).detect(IMAGE)) == 1
    assert len(predictor.with_selection(max_detections=1).detect(IMAGE)) == 1
    assert len(predictor.with_selection(score_threshold=0.5, nms_iou=0.999).detect(IMAGE)) == 2


def test_box_voting_moves_a_detection_but_not_what_is_taught(tmp_path: Path) -> None:
    path = ours(tmp_path / "m.onnx")
    plain, voting = load_predictor(path), load_predictor(path, box_voting=0.6)
    before, after = plain.detect(IMAGE), voting.detect(IMAGE)
    cat = (0.9 * BOXES[0] + 0.6 * BOXES[1]) / 1.5
    expected = (cat - [16, 0, 16, 0]) * 2  # out of the letterbox, to the image's pixels
    np.testing.assert_allclose(after.boxes_xyxy[0], expected, atol=1e-3)
    assert not np.allclose(after.boxes_xyxy[0], before.boxes_xyxy[0], atol=0.1)
    np.testing.assert_array_equal(after.scores, before.scores)
    np.testing.assert_array_equal(voting.answer(IMAGE).boxes_xyxy, plain.answer(IMAGE).boxes_xyxy)


def test_a_file_of_ours_says_what_it_was_measured_with(tmp_path: Path) -> None:
    path = ours(
        tmp_path / "m.onnx", **{"edgekd.thresholds": '{"nms_iou": 0.4, "box_voting": null, "max_detections": 7}'}
    )
    predictor = load_predictor(path)
    assert predictor.own_selection() == {"nms_iou": 0.4, "max_detections": 7}
    chosen = predictor.with_selection(**predictor.own_selection()).selection
    assert (chosen.nms_iou, chosen.max_detections, chosen.box_voting) == (0.4, 7, None)
    assert load_predictor(yolo_file(tmp_path / "foreign.onnx")).own_selection() == {}
    thresholds = {"edgekd.thresholds": '{"nms_iou": 0.4, "box_voting": 0.6, "max_detections": 7}'}
    inside = load_predictor(ours(tmp_path / "nms.onnx", "detections", **thresholds))
    own = inside.own_selection()
    assert own == {"nms_iou": 0.4, "max_detections": 7}  # its NMS does not vote
    assert inside.with_selection(**own).not_applied() is None


def test_finished_detections_see_no_second_nms(tmp_path: Path) -> None:
    boxes = np.array([[0, 0, 40, 40], [1, 0, 40, 40]], np.float32)
    arrays = {"boxes": boxes, "scores": np.array([0.9, 0.8], np.float32), "labels": np.array([1, 1])}
    path = write_constant_detector(tmp_path / "m.onnx", arrays)
    options = OnnxTeacher(name="m", onnx="", class_names=("cat", "dog"))
    predictor = load_predictor(path, options=options)
    assert len(predictor.detect(IMAGE)) == 2
    assert len(predictor.answer(IMAGE)) == 2
    voting = load_predictor(path, options=options, box_voting=0.6)
    np.testing.assert_array_equal(voting.detect(IMAGE).boxes_xyxy, predictor.detect(IMAGE).boxes_xyxy)
    # Merging two classes into one can make doubles of what the detector kept apart.
    assert len(predictor.with_classes(("animal",), {"cat": "animal", "dog": "animal"}).detect(IMAGE)) == 1


def test_a_native_checkpoint_and_its_run_folder(tmp_path: Path) -> None:
    detector = toy_detector()
    save_detector(tmp_path / "run" / "best.pt", detector, {})
    by_file = load_predictor(tmp_path / "run" / "best.pt", threads=1)
    by_folder = load_predictor(tmp_path / "run")
    assert by_folder.name == "run"
    assert by_file.class_names == CLASSES
    tensor, _ = by_file.prepare(IMAGE)
    raw = by_file.infer(tensor)
    priors = len(detector.prior_boxes())
    assert raw["boxes"].shape == (1, priors, 4)
    assert raw["scores"].shape == (1, priors, 2)
    np.testing.assert_allclose(raw["scores"], by_folder.infer(tensor)["scores"], atol=1e-5)
    assert by_file.describe()["runtime"] == "torch"
    by_file.close()
    with pytest.raises(RuntimeFailure, match="closed"):
        by_file.infer(tensor)


@pytest.mark.parametrize(
    ("name", "content", "kwargs", "error", "words"),
    [
        ("none.onnx", None, {}, ArtifactError, "no such file"),
        ("bad.onnx", b"\x08\x08junk", {}, ArtifactError, "cannot load"),
        ("bad.pt", b"PK\x03\x04junk", {}, ArtifactError, "not a readable checkpoint"),
        ("junk.pt", b"junk", {}, ArtifactError, "not a readable checkpoint"),
        ("junk.pt", b"\x80\x02}q", {}, ArtifactError, "not a readable checkpoint"),
        ("image.jpg", b"\xff\xd8", {}, ArtifactError, "not a kind of file that detects"),
        ("model.ort", b"x", {}, ArtifactError, "not a kind of file that detects"),
        ("model.engine", b"x", {}, ArtifactError, "manifest"),
        ("model.pt", b"x", {"runtime": "onnxruntime"}, UserError, "does not fit"),
        ("model.onnx", b"x", {"runtime": "torch"}, UserError, "does not fit"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, name, content, kwargs, error, words) -> None:  # type: ignore[no-untyped-def]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words):
        load_predictor(tmp_path / name, **kwargs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edgekd.schema": "edgekd.onnx/9"}, "another version"),
        ({"edgekd.spec": "{"}, "metadata is damaged"),
        ({"edgekd.spec": "{}"}, r"m\.onnx: its metadata is damaged"),
        ({"edgekd.output": '{"kind": "masks"}'}, "not what its metadata says"),
        ({"edgekd.output": '{"kind": "detections"}'}, "not what its metadata says"),
        ({"edgekd.spec": changed_spec(class_names=["cat"])}, r"m\.onnx: its outputs are not what its metadata says"),
        (
            {"edgekd.spec": changed_spec(preprocess=("resize", "crop"))},
            "metadata is damaged",
        ),  # of a later version, say
        ({"edgekd.spec": changed_spec(preprocess=("std", [0, 1, 1]))}, "metadata is damaged"),
        ({"edgekd.thresholds": '{"nms_iou": "x"}'}, "metadata is damaged"),
        ({"edgekd.provenance": '{"run": 3}'}, "metadata is damaged"),
    ],
)
def test_damaged_metadata_of_ours_is_an_artifact_error(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        load_predictor(ours(tmp_path / "m.onnx", **changes))


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no detector in this folder"):
        load_predictor(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.pt").touch()
    with pytest.raises(ArtifactError, match=r"give .*student"):
        load_predictor(tmp_path)


def test_a_dynamic_input_needs_a_size(tmp_path: Path) -> None:
    path = yolo_file(tmp_path / "m.onnx", input_shape=(1, 3, "h", "w"))
    with pytest.raises(UserError, match="input_size"):
        load_predictor(path)
    options = OnnxTeacher(name="m", onnx="", input_size=96)
    assert load_predictor(path, options=options).preprocess.input_hw == (96, 96)


def test_a_declared_size_must_fit_a_fixed_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="64x96"):
        load_predictor(yolo_file(tmp_path / "m.onnx"), options=OnnxTeacher(name="m", onnx="", input_size=320))


def test_declared_preprocessing_is_a_foreign_files(tmp_path: Path) -> None:
    options = OnnxTeacher(name="m", onnx="", resize="stretch", mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.3))
    spec = load_predictor(yolo_file(tmp_path / "foreign.onnx"), options=options).preprocess
    assert (spec.resize, spec.mean, spec.std) == ("stretch", (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    # An export of ours knows how it was trained, and the options of `edgekd bench` are for all files at once.
    plain = load_predictor(ours(tmp_path / "ours.onnx"))
    declared = load_predictor(tmp_path / "ours.onnx", options=options)
    assert declared.preprocess == plain.preprocess
    assert not any("not used" in note for note in plain.facts["notes"])
    assert any("declared resize, mean, std: not used" in note for note in declared.facts["notes"])


@pytest.mark.parametrize("text", ["{0: 'a', 2: 'b'}", "__import__('os').getcwd()", "{0: 'a'", "17", "['a', 3]", ""])
def test_odd_names_in_metadata_are_no_names(text: str) -> None:
    from edgekd.runtimes.onnx_file import names_in_metadata

    assert names_in_metadata({"names": text}) is None


def test_names_in_metadata_may_be_numbers() -> None:
    from edgekd.runtimes.onnx_file import names_in_metadata

    assert names_in_metadata({"names": "{0: 0, 1: 1}"}) == ("0", "1")


def test_names_in_metadata_may_stand_a_line_each() -> None:
    from edgekd.runtimes.onnx_file import names_in_metadata

    assert names_in_metadata({"character": "text\ntable caption\n"}) == ("text", "table caption")
    assert names_in_metadata({"names": "{0: 'a',\n 1: 'b'}"}) == ("a", "b")
    assert names_in_metadata({"names": "{0: 'a',\n 1: 'b'"}) is None


def test_outputs_that_are_not_finite_are_a_failure(tmp_path: Path) -> None:
    path = ours(tmp_path / "m.onnx")
    predictor = load_predictor(path)
    raw = {"boxes": BOXES[None] * np.nan, "scores": SCORES[None]}
    with pytest.raises(RuntimeFailure, match="not finite"):
        predictor.finish(raw, predictor.prepare(IMAGE)[1])


def test_outputs_that_cannot_be_read_name_their_detector(tmp_path: Path) -> None:
    """One of many in a benchmark."""
    file = write_detector(tmp_path / "percent.onnx", BOXES, 100 * SCORES)
    with load_predictor(file) as predictor, pytest.raises(ArtifactError, match=r"^percent: .* scores above 1"):
        predictor.detect(IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo11n", "yolov8n"])
def test_real_black_boxes_find_what_is_there(name: str, voc2007: Path) -> None:
    """The first ten images of VOC 2007 val: most objects found by a confident box of the right class."""
    from edgekd.boxes import iou_matrix
    from edgekd.data import read_dataset
    from edgekd.data.images import load_image

    path = shared(f"weights/onnx_teachers/{name}.onnx")
    records = read_dataset(voc2007, "val", limit=10).records
    found = total = 0
    with load_predictor(path, threads=1, score_threshold=0.25) as predictor:
        mapped = predictor.with_classes(VOC_CLASSES)
        assert mapped.preprocess.input_hw == (640, 640)
        for record in records:
            answer = mapped.detect(load_image(record.path))
            overlap = iou_matrix(record.boxes_xyxy, answer.boxes_xyxy) > 0.5
            overlap &= record.labels[:, None] == answer.labels[None, :]
            found += int((overlap.any(1) & record.trainable).sum())
            total += int(record.trainable.sum())
    assert total > 10
    assert found / total > 0.6


def test_yolox_is_fed_as_its_authors_do(tmp_path: Path) -> None:
    cells = sum((64 // stride) * (96 // stride) for stride in (8, 16, 32))
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(0, 0.5, (cells, 4)), rng.uniform(0, 1, (cells, 3))], 1)
    path = write_constant_detector(tmp_path / "yolox.onnx", {"output": rows[None].astype(np.float32)})
    options = OnnxTeacher(name="m", onnx=str(path), class_names=("a", "b"))
    predictor = load_predictor(path, options=options)
    spec = predictor.preprocess
    assert (spec.channels, spec.resize, spec.std) == ("bgr", "letterbox-corner", (1 / 255,) * 3)
    assert predictor.form.box_format == "grid-offsets"
    assert any("[0, 255], BGR, not declared" in note for note in predictor.facts["notes"])
    old = options.model_copy(update={"channels": "rgb", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    assert load_predictor(path, options=old).preprocess.channels == "rgb"
