"""How pictures are usually prepared for a foreign detector: by the exporter that its inputs and outputs give away.

A file seldom says it. What is taken here is said in a note, what is declared wins, and `teacher_check` tries it on labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgekd.runtimes.first_nodes import Beginning
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.rows import LAYOUTS
from edgekd.types import Channels, PreprocessSpec, ResizeMode

Triple = tuple[float, float, float]
ZERO: Triple = (0.0, 0.0, 0.0)
ONE: Triple = (1.0, 1.0, 1.0)
BYTES: Triple = (1 / 255, 1 / 255, 1 / 255)
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BGR_IMAGENET: tuple[Triple, Triple] = ((0.406, 0.456, 0.485), (0.225, 0.224, 0.229))
CAFFE: tuple[Triple, Triple] = ((104 / 255, 117 / 255, 123 / 255), BYTES)
HALVES: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Custom:
    """What an exporter's users do with pictures.

    Attributes:
        whose: for the note.
        scaling: (mean, std) of pixels from 0 to 1, in the order of `channels`.
    """

    whose: str
    resize: ResizeMode = "stretch"
    scaling: tuple[Triple, Triple] = (ZERO, ONE)
    channels: Channels = "rgb"

    def preprocess(self, input_hw: tuple[int, int], beginning: Beginning, takes_bytes: bool) -> PreprocessSpec:
        """The preprocessing, where the graph itself may normalise pixels or take bytes."""
        mean, std = self.scaling
        if takes_bytes or beginning.pixels == "0 to 255":
            mean, std = ZERO, BYTES
        elif beginning.pixels == "0 to 1":
            mean, std = ZERO, ONE
        return PreprocessSpec(input_hw, self.resize, mean, std, channels=beginning.channels or self.channels)


def custom_of(
    form: OutputFormat,
    inputs: Sequence[str],
    metadata: Mapping[str, str],
    *,
    a_row_a_cell: bool = False,
    sliced: bool = False,
) -> Custom:
    """What is usual for a detector with these outputs.

    Args:
        form: as it was recognised, with the outputs' names.
        inputs: the names of the graph's inputs. metadata: the file's own.
        a_row_a_cell: it gives as many candidates as the usual grids have cells.
        sliced: the graph begins by taking the picture apart into every second pixel.
    """
    outputs = {name.partition(":")[0] for name in form.names}
    normalised = form.box_format.endswith("normalised")
    if "stride" in metadata:  # Ultralytics, whose RT-DETR alone stretches
        ends = form.kind == "yolo" and normalised
        return Custom("RT-DETR of Ultralytics") if ends else Custom("Ultralytics", "letterbox")
    if {"scale_factor", "im_shape"} & set(inputs):
        return Custom("PaddleDetection")
    if "orig_target_sizes" in inputs:
        return Custom("RT-DETR")
    decoded = form.kind == "yolo-objectness" and a_row_a_cell and sliced
    if form.box_format == "grid-offsets" or decoded:  # its authors feed it what OpenCV reads
        return Custom("YOLOX", "letterbox-corner", (ZERO, BYTES), "bgr")
    if form.box_format == "grid-distances-corner" or any("pred_stride" in name for name in outputs):
        return Custom("NanoDet", "stretch", BGR_IMAGENET, "bgr")
    if form.box_format == "grid-priors":
        return Custom("RetinaFace", "letterbox", CAFFE, "bgr")
    if form.kind == "boxes-scores" and form.box_format == "grid-distances" and not form.channels_first:
        return Custom("PicoDet", "stretch", IMAGENET)  # NanoDet's like tables are named by their stride
    if outputs == {"dets", "labels"}:
        if form.kind == "boxes-scores":
            return Custom("RF-DETR", "stretch", IMAGENET)
        return Custom("MMDetection", "letterbox-corner", IMAGENET)
    if form.kind == "detections" and form.columns == LAYOUTS[7][2]:  # of Caffe and Open Model Zoo
        return Custom("SSD's DetectionOutput", "stretch", (ZERO, BYTES), "bgr")
    if form.box_format.startswith("yxyx") and len(form.names) == 1:
        return Custom("EfficientDet", "letterbox-corner")
    if "detection_boxes" in outputs and form.box_format.startswith("yxyx"):
        return Custom("TensorFlow's detection API", "stretch", (ZERO, BYTES))
    if outputs == {"box_ids", "scores", "bboxes"}:
        return Custom("GluonCV", "stretch", IMAGENET)
    if form.kind == "detections" and len(outputs) == 1 and len(form.names) == 4:
        return Custom("TensorFlow Lite's SSDs", "stretch", HALVES)
    if outputs == {"bboxes", "labels", "scores"}:
        return Custom("the ONNX model zoo's SSD", "stretch", IMAGENET)
    if "pixel_mask" in inputs or (form.activation == "softmax" and form.background == "last"):
        return Custom("DETR", "stretch", IMAGENET)
    if form.kind == "boxes-scores" and normalised and form.background == "first" and form.activation == "none":
        return Custom("SSD in PyTorch", "stretch", HALVES)
    if _like_yolo(form, outputs, inputs) or (form.kind == "boxes-scores" and a_row_a_cell):
        return Custom("YOLO", "letterbox")
    return Custom("such outputs")


def _like_yolo(form: OutputFormat, outputs: set[str], inputs: Sequence[str]) -> bool:
    """Raw heads, those with the best class of each candidate, what YOLOv7, YOLO-NAS and TensorRT's NMS call finished ones,
    and Keras' YOLOv3."""
    if form.kind.startswith("yolo"):
        return True
    if any("yolonms" in name for name in outputs) or {"det_boxes", "pred_boxes"} & outputs:
        return form.kind == "detections" or "image_shape" in inputs
    if {"boxes", "scores", "labels"} <= outputs and len(outputs) == 4:  # MMYOLO, with a count
        return True
    return form.kind == "detections" and (len(form.names) == 1 or form.overlapping)
