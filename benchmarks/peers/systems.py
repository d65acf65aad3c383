"""What is timed: edgekd's predictor from JPEG bytes to boxes on ONNX Runtime or OpenVINO, and single functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from environments import Skipped

from edgekd.data.images import decode_image
from edgekd.errors import EdgeKDError
from edgekd.predictor import Predictor, load_predictor
from edgekd.recipe import OnnxTeacher


class Deployed:
    """A detector file as edgekd deploys it, from JPEG bytes."""

    device_ms = None

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def stages_ns(self, data: bytes, clock: Any) -> tuple[int, int, int]:
        start = clock()
        tensor, geometry = self.predictor.prepare(decode_image(data))
        prepared = clock()
        raw = self.predictor.infer(tensor)
        inferred = clock()
        self.predictor.finish(raw, geometry)
        return prepared - start, inferred - prepared, clock() - inferred


class Timing:
    """A function of one input."""

    device_ms = None

    def __init__(self, function: Callable[[Any], object]) -> None:
        self.function = function

    def stages_ns(self, value: Any, clock: Any) -> tuple[int, int, int]:
        start = clock()
        self.function(value)
        return clock() - start, 0, 0


class OpenVino:
    """An ONNX file compiled by OpenVINO for one thread of the CPU, in place of ONNX Runtime."""

    name = "openvino"
    provider = "CPU"

    def __init__(self, path: Path, input_shape: tuple[int, int, int, int]) -> None:
        import openvino

        model = openvino.Core().read_model(path)
        model.reshape({0: list(input_shape)})
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        self.input_shape = input_shape
        self.output_names = tuple(sorted(port.get_any_name() for port in compiled.outputs))
        self._request = compiled.create_infer_request()

    def run(self, images: Any) -> dict[str, Any]:
        self._request.infer([images], share_inputs=True, share_outputs=True)
        return {name: self._request.get_tensor(name).data for name in self.output_names}

    def close(self) -> None:
        self._request = None


def open_detector(path: Path, size: int | None, score: float, iou: float, limit: int) -> Predictor:
    """A detector on ONNX Runtime, one thread; `size` is the input's where the file leaves it open.

    Raises:
        Skipped: edgekd cannot run the file.
    """
    options = None
    if path.suffix == ".onnx" and size is not None and _takes_any_size(path):
        options = OnnxTeacher(name=path.stem, onnx=str(path), input_size=size)
    settings = {"score_threshold": score, "nms_iou": iou, "max_detections": limit}
    try:
        return load_predictor(path, threads=1, options=options, **settings)
    except EdgeKDError as error:
        raise Skipped(str(error).splitlines()[0]) from error


def _takes_any_size(path: Path) -> bool:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return any(not dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[2:])


def on_openvino(predictor: Predictor, path: Path) -> Predictor:
    """The same detector, preprocessing and thresholds with OpenVINO inside.

    Raises:
        Skipped: OpenVINO cannot compile the file.
    """
    shape = (1, 3, *predictor.preprocess.input_hw)
    try:
        runtime = OpenVino(path, shape)
    except RuntimeError as error:
        raise Skipped(f"OpenVINO cannot compile {path.name}: {str(error).splitlines()[0][:200]}") from error
    other = predictor.with_selection()
    other.runtime = runtime
    return other
