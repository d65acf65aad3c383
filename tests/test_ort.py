from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.errors import ArtifactError, MissingDependencyError, RuntimeFailure, UserError
from edgekd.preprocess import normalise
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.onnx_file import open_onnx
from edgekd.runtimes.ort import OrtRuntime, has_provider, with_extra_outputs
from tests.toy_onnx import write_constant_detector

ARRAYS = {"boxes": np.ones((1, 5, 4), np.float32), "scores": np.full((1, 5, 2), 0.5, np.float32)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_constant_detector(tmp_path / "toy.onnx", ARRAYS, metadata={"key": "value"})


@pytest.mark.parametrize("as_bytes", [False, True])
def test_runs_and_tells_what_it_is(model: Path, as_bytes: bool) -> None:
    with OrtRuntime(model.read_bytes() if as_bytes else model, "cpu", threads=1) as runtime:
        assert (runtime.name, runtime.provider) == ("onnxruntime", "CPUExecutionProvider")
        assert runtime.input_shape == (1, 3, 64, 96)
        assert runtime.output_names == ("boxes", "scores")
        assert not runtime.dynamic_batch
        assert runtime.metadata["key"] == "value"
        outputs = runtime.run(np.zeros((1, 3, 64, 96), np.float32))
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(outputs[name], array)
    with pytest.raises(RuntimeFailure, match="closed"):
        runtime.run(np.zeros((1, 3, 64, 96), np.float32))


def test_threads_spin_within_a_run_and_not_on(model: Path) -> None:
    with OrtRuntime(model, "cpu", threads=2) as runtime:
        options = runtime._session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_dynamic_axes_are_told(tmp_path: Path) -> None:
    path = write_constant_detector(tmp_path / "d.onnx", ARRAYS, ("batch", 3, "h", "w"))
    runtime = OrtRuntime(path)
    assert runtime.dynamic_batch
    assert runtime.dynamic_hw
    assert runtime.input_shape == (1, 3, 0, 0)
    assert OrtRuntime(path, input_hw=(32, 48)).input_shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    ("shape", "kind"), [((1, 3, 64, 96), "FLOAT16"), ((3, 64, 96), "FLOAT")], ids=["half precision", "no batch axis"]
)
def test_feeds_what_the_graph_declares(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    path = write_constant_detector(tmp_path / "d.onnx", ARRAYS, shape, input_type=kind)
    outputs = OrtRuntime(path).run(np.zeros((1, 3, 64, 96), np.float32))
    np.testing.assert_array_equal(outputs["boxes"], ARRAYS["boxes"])


def test_a_wrong_input_is_a_failure_with_both_shapes(model: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"\(1, 3, 32, 32\)"):
        OrtRuntime(model).run(np.zeros((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize("kept", [0, 10, 200, -40])
def test_a_damaged_file_is_an_artifact_error(model: Path, kept: int) -> None:
    model.write_bytes(model.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="toy"):
        OrtRuntime(model)


def test_a_missing_file_and_a_foreign_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        OrtRuntime(tmp_path / "none.onnx")
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(ArtifactError, match="cannot load"):
        OrtRuntime(text)


@pytest.mark.parametrize("shape", [(1, 64, 96, 1), (1, 10)], ids=["grey", "no image"])
def test_an_input_that_is_no_image_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write_constant_detector(tmp_path / "d.onnx", ARRAYS, shape)
    with pytest.raises(ArtifactError, match="can feed"):
        OrtRuntime(path)


@pytest.mark.parametrize("shape", [(1, 64, 96, 3), (1, "h", "w", 3)])
def test_a_graph_with_channels_last_is_fed_so(tmp_path: Path, shape: tuple[int | str, ...]) -> None:
    path = write_constant_detector(tmp_path / "d.onnx", ARRAYS, shape)
    with OrtRuntime(with_extra_outputs(path, ["inner"]), input_hw=(64, 96)) as runtime:
        assert runtime.channels_last
        assert runtime.input_shape == (1, 3, 64, 96)
        images = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
        np.testing.assert_array_equal(runtime.run(images)["inner"], np.maximum(images, 0).transpose(0, 2, 3, 1))


def test_a_graph_that_takes_bytes_gets_the_pixels(tmp_path: Path) -> None:
    path = bytes_detector(tmp_path / "bytes.onnx")
    with OrtRuntime(path) as runtime:
        assert runtime.takes_bytes
        images = np.array([0.4, 127.99, 254.6, 300.0, -3.0], np.float32)
        batch = np.zeros((1, 3, 64, 96), np.float32)
        batch[0, 0, 0, :5] = images
        assert runtime.run(batch)["pixels"][0, 0, :5, 0].tolist() == [0, 128, 255, 255, 0]
    opened = open_onnx(path, OnnxTeacher(name="t", onnx=str(path), class_names=("a", "b"), box_format="xyxy"))
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    with opened.runtime as runtime:
        fed = runtime.run(normalise(picture, opened.preprocess))["pixels"][0]
    np.testing.assert_array_equal(fed, picture)
    with pytest.raises(UserError, match="leave `mean` and `std` out"):
        open_onnx(
            path, OnnxTeacher(name="t", onnx=str(path), class_names=("a", "b"), box_format="xyxy", mean=(0.5, 0.5, 0.5))
        )


def bytes_detector(path: Path) -> Path:
    """Takes (1, H, W, 3) bytes and shows them; its boxes and scores are constant."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    constants = {"b": np.array([[[0, 0, 9, 9], [5, 5, 20, 20]]], np.float32), "s": np.full((1, 2, 2), 0.5, np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["pixels"], to=kinds.FLOAT),
            helper.make_node("Identity", ["b"], ["boxes"]),
            helper.make_node("Identity", ["s"], ["scores"]),
        ],
        "bytes",
        [helper.make_tensor_value_info("images", kinds.UINT8, [1, 64, 96, 3])],
        [
            helper.make_tensor_value_info("boxes", kinds.FLOAT, [1, 2, 4]),
            helper.make_tensor_value_info("scores", kinds.FLOAT, [1, 2, 2]),
            helper.make_tensor_value_info("pixels", kinds.FLOAT, [1, 64, 96, 3]),
        ],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_an_unknown_provider_lists_those_there_are(model: Path) -> None:
    with pytest.raises(MissingDependencyError, match="CPUExecutionProvider"):
        OrtRuntime(model, "FancyExecutionProvider")
    assert has_provider("cpu")
    assert not has_provider("FancyExecutionProvider")


@pytest.mark.parametrize(
    ("asked", "really"),
    [
        ("cuda", ["CPUExecutionProvider"]),
        ("tensorrt", ["CPUExecutionProvider"]),
        ("tensorrt", ["CUDAExecutionProvider", "CPUExecutionProvider"]),
        ("TensorrtExecutionProvider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"]),
        ("cuda", []),
    ],
)
def test_a_silent_fallback_is_a_failure(
    model: Path, monkeypatch: pytest.MonkeyPatch, asked: str, really: list[str]
) -> None:
    import onnxruntime

    class Fallen:
        def __init__(self, *args: object, **kwargs: object) -> None: ...
        def disable_fallback(self) -> None: ...
        def get_providers(self) -> list[str]:
            return really

    both = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(RuntimeFailure, match="fell back"):
        OrtRuntime(model, asked)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_of_another_build_is_missing(model: Path, provider: str) -> None:
    if has_provider(provider):
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(MissingDependencyError, match="onnxruntime-gpu"):
        OrtRuntime(model, provider)


def test_without_onnx_runtime_the_message_says_how_to_get_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what importing it then raises is an ImportError
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime"):
        OrtRuntime(model)
    assert not has_provider("cpu")


def test_inner_tensors_become_outputs_in_memory_alone(model: Path) -> None:
    before = model.read_bytes()
    runtime = OrtRuntime(with_extra_outputs(model, ["inner"]))
    images = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    np.testing.assert_array_equal(runtime.run(images)["inner"], np.maximum(images, 0))
    assert model.read_bytes() == before


def test_an_unknown_inner_tensor_lists_near_ones(model: Path) -> None:
    with pytest.raises(UserError, match="such as inner"):
        with_extra_outputs(model, ["inne"])


def test_a_damaged_file_cannot_be_tapped(model: Path) -> None:
    model.write_bytes(b"junk" * 10)
    with pytest.raises(ArtifactError, match="not a readable ONNX"):
        with_extra_outputs(model, ["inner"])


def test_weights_that_are_missing_beside_a_file_are_told_of(model: Path, tmp_path: Path) -> None:
    import onnx

    apart = tmp_path / "apart.onnx"
    onnx.save(onnx.load(str(model)), str(apart), save_as_external_data=True, location="w.data", size_threshold=0)
    (tmp_path / "w.data").unlink()
    for opened in (lambda: with_extra_outputs(apart, ["inner"]), lambda: OrtRuntime(apart)):
        with pytest.raises(ArtifactError, match="put the file of weights"):
            opened()


def test_taps_without_onnx(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match="pip install onnx"):
        with_extra_outputs(model, ["inner"])


def test_a_second_input_for_original_sizes_is_filled(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    import onnxruntime

    class Session:
        """RT-DETR's exports ask for each image's (width, height)."""

        def __init__(self, *args: object, **kwargs: object) -> None: ...
        def disable_fallback(self) -> None: ...
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

        def get_inputs(self) -> list[SimpleNamespace]:
            image = SimpleNamespace(name="images", shape=["N", 3, 64, 96], type="tensor(float)")
            return [image, SimpleNamespace(name="orig_target_sizes", shape=["N", 2], type="tensor(int64)")]

        def get_outputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name="sizes", shape=["N", 2], type="tensor(int64)")]

        def get_modelmeta(self) -> SimpleNamespace:
            return SimpleNamespace(custom_metadata_map={})

        def run(self, names: object, feed: dict[str, np.ndarray], options: object) -> list[np.ndarray]:
            return [feed["orig_target_sizes"]]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    sizes = OrtRuntime(model).run(np.zeros((2, 3, 64, 96), np.float32))["sizes"]
    np.testing.assert_array_equal(sizes, [[96, 64], [96, 64]])
