"""What is timed: edgekd's predictor from JPEG bytes to boxes on ONNX Runtime or OpenVINO, and single functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from environments import Skipped

from edgekd.data.images import decode_image
from edgekd.errors import EdgeKDError
from edgekd.predictor import Predictor, RuntimeChoice, load_predictor


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


def open_detector(
    path: Path, score: float, iou: float, limit: int, runtime: RuntimeChoice = "onnxruntime"
) -> Predictor:
    """A detector on one thread.

    Raises:
        Skipped: edgekd cannot run the file there.
    """
    settings = {"score_threshold": score, "nms_iou": iou, "max_detections": limit}
    try:
        return load_predictor(path, runtime=runtime, threads=1, **settings)
    except EdgeKDError as error:
        raise Skipped(str(error).splitlines()[0]) from error


def with_fixed_input(file: Path, size: int, folder: Path) -> Path:
    """A file whose input is free, as a copy fixed at (1, 3, size, size): no runtime then pays for freedom that nobody uses.

    Raises:
        Skipped: it cannot be read.
    """
    import onnx

    try:
        model = onnx.load(str(file))
    except Exception as error:  # protobuf's errors depend on its implementation
        raise Skipped(f"{file}: not a readable ONNX file") from error
    dims = model.graph.input[0].type.tensor_type.shape.dim
    if len(dims) != 4 or all(dim.dim_value for dim in dims):
        return file
    for dim, wanted in zip(dims, (1, 3, size, size), strict=True):
        dim.dim_value = dim.dim_value or wanted
    del model.graph.value_info[:]  # shapes that were inferred for any size
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    folder.mkdir(parents=True, exist_ok=True)
    fixed = folder / f"{file.stem}-{size}-fixed.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), str(fixed))
    return fixed
