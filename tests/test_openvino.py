from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgekd.detectors import build_detector
from edgekd.errors import ArtifactError, MissingDependencyError, RuntimeFailure, UserError
from edgekd.export.onnx import export_onnx
from edgekd.predictor import load_predictor
from edgekd.recipe import ExportConfig, OnnxTeacher
from edgekd.runtimes.openvino_runtime import OpenVinoRuntime
from edgekd.runtimes.ort import OrtRuntime
from edgekd.types import DetectorSpec, PreprocessSpec
from tests.onnx_zoo import BOXES, EXPORTS, SOURCE_HW, write
from tests.toy_onnx import write_constant_detector

ARRAYS = {"boxes": np.ones((1, 5, 4), np.float32), "scores": np.full((1, 5, 2), 0.5, np.float32)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_constant_detector(tmp_path / "toy.onnx", ARRAYS, metadata={"key": "value"})


def test_without_openvino_the_message_says_how_to_get_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # what importing it then raises is an ImportError
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[openvino\]'"):
        OpenVinoRuntime(model)


class TestInstalled:
    @pytest.fixture(autouse=True)
    def _openvino(self) -> None:
        pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install '.[openvino]'")

    @pytest.mark.parametrize("as_bytes", [False, True])
    def test_runs_and_tells_what_it_is(self, model: Path, as_bytes: bool) -> None:
        with OpenVinoRuntime(model.read_bytes() if as_bytes else model, "cpu", threads=1) as runtime:
            assert (runtime.name, runtime.provider, runtime.threads) == ("openvino", "CPU", 1)
            assert runtime.input_shape == (1, 3, 64, 96)
            assert runtime.output_names == ("boxes", "scores")
            assert runtime.metadata["key"] == "value"
            outputs = runtime.run(np.zeros((1, 3, 64, 96), np.float32))
            for name, array in ARRAYS.items():
                np.testing.assert_array_equal(outputs[name], array)
        with pytest.raises(RuntimeFailure, match="closed"):
            runtime.run(np.zeros((1, 3, 64, 96), np.float32))

    @pytest.mark.parametrize(
        ("shape", "kind"),
        [
            ((1, 3, 64, 96), "FLOAT16"),
            ((3, 64, 96), "FLOAT"),
            (("batch", 3, "h", "w"), "FLOAT"),
            ((1, 3, 64, 96), "DOUBLE"),
        ],
        ids=["half precision", "no batch axis", "open sizes", "double precision"],
    )
    def test_feeds_what_the_graph_declares(self, tmp_path: Path, shape: tuple[int | str, ...], kind: str) -> None:
        path = write_constant_detector(tmp_path / "d.onnx", ARRAYS, shape, input_type=kind)
        with OpenVinoRuntime(path, input_hw=(64, 96)) as runtime, OrtRuntime(path, input_hw=(64, 96)) as reference:
            assert (runtime.input_shape, runtime.dynamic_batch) == (reference.input_shape, reference.dynamic_batch)
            np.testing.assert_array_equal(runtime.run(np.zeros((1, 3, 64, 96), np.float32))["boxes"], ARRAYS["boxes"])

    @pytest.mark.parametrize("case", ["YOLO-NAS batch", "EfficientDet"])
    def test_bytes_are_fed_as_onnx_runtime_is(self, case: str, tmp_path: Path) -> None:
        export = EXPORTS[case]
        options = OnnxTeacher(name="m", onnx=str(write(export, tmp_path / "m.onnx")), **export.declared)
        with load_predictor(tmp_path / "m.onnx", runtime="openvino", options=options) as predictor:
            found = predictor.detect(np.full((*SOURCE_HW, 3), 114, np.uint8))
        np.testing.assert_allclose(found.boxes_xyxy, BOXES, atol=0.05)

    def test_an_int8_yolo_computes_what_onnx_runtime_does(self, tmp_path: Path) -> None:
        """OpenVINO moves the scales of the last convolutions behind the objectness, and must still know its axes."""
        spec = DetectorSpec("yolov3-tiny", ("a", "b"), PreprocessSpec((96, 96)), width=0.25)
        image = np.random.default_rng(0).normal(size=(1, 3, 96, 96)).astype(np.float32)
        config = ExportConfig(calibration="minmax")
        path = export_onnx(
            build_detector(spec), tmp_path / "tiny.onnx", config=config, precision="int8", calibration=[image]
        )
        with OpenVinoRuntime(path) as runtime, OrtRuntime(path) as reference:
            outputs, wanted = runtime.run(image), reference.run(image)
        np.testing.assert_allclose(outputs["scores"], wanted["scores"], atol=0.02)
        assert np.abs(outputs["boxes"] - wanted["boxes"]).mean() < 0.5

    def test_a_wrong_input_is_a_failure_with_both_shapes(self, model: Path) -> None:
        with pytest.raises(RuntimeFailure, match=r"1, 3, 32, 32"):
            OpenVinoRuntime(model).run(np.zeros((1, 3, 32, 32), np.float32))

    @pytest.mark.parametrize("kept", [0, 10, 200, -40])
    def test_a_damaged_file_is_an_artifact_error(self, model: Path, kept: int) -> None:
        model.write_bytes(model.read_bytes()[:kept])
        with pytest.raises(ArtifactError, match="toy"):
            OpenVinoRuntime(model)

    def test_a_missing_file_and_a_missing_device(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="no such file"):
            OpenVinoRuntime(tmp_path / "none.onnx")
        with pytest.raises(MissingDependencyError, match="no such device"):
            OpenVinoRuntime(model, "cuda")

    def test_a_checkpoint_does_not_run_on_it(self, tmp_path: Path) -> None:
        (tmp_path / "model.pt").write_bytes(b"")
        with pytest.raises(UserError, match="does not fit"):
            load_predictor(tmp_path / "model.pt", runtime="openvino")
