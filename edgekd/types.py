"""The data types that every layer shares. Plain numpy and dataclasses: importing this needs no torch.

Frames: a `boxes_xyxy` array is always (x1, y1, x2, y2) float32 in **pixels**, x2 >= x1, y2 >= y1, continuous
coordinates (a box covering the whole of a W x H image is 0, 0, W, H). Which image the pixels belong to is said by
the container: `Detections` and `ImageRecord` speak of the original image after EXIF orientation; everything at the
level of torch tensors speaks of the detector's input tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from edgekd.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    FloatArray = NDArray[np.float32]
    IntArray = NDArray[np.int64]
    BoolArray = NDArray[np.bool_]
    ImageArray = NDArray[np.uint8]
    """An RGB picture, (H, W, 3) uint8."""
else:  # bundles run on NumPy 1.17 too, which JetPack 5 comes with: `numpy.typing` is 1.20's
    Array = FloatArray = IntArray = BoolArray = ImageArray = np.ndarray

ResizeMode = Literal["stretch", "letterbox", "letterbox-corner"]
Channels = Literal["rgb", "bgr"]


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image, in columns, validated when made.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the original image.
        scores: (N,) float32 in [0, 1], not necessarily sorted.
        labels: (N,) int64, indices into the class names of whoever made it.

    Raises:
        ValueError: lengths differ, a value is not finite, or a box has negative extent.
    """

    boxes_xyxy: FloatArray
    scores: FloatArray
    labels: IntArray

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        scores = np.asarray(self.scores, dtype=np.float32).reshape(-1)
        labels = np.asarray(self.labels, dtype=np.int64).reshape(-1)
        if not len(boxes) == len(scores) == len(labels):
            raise ValueError(
                f"Detections columns differ in length: boxes {len(boxes)}, scores {len(scores)}, labels {len(labels)}"
            )
        # Counted, since on so few numbers `all` and `any` take longer than what they reduce.
        if np.count_nonzero(np.isfinite(boxes)) < boxes.size or np.count_nonzero(np.isfinite(scores)) < scores.size:
            raise ValueError("Detections hold non-finite boxes or scores")
        if np.count_nonzero(boxes[:, 2:] < boxes[:, :2]):
            raise ValueError("Detections hold a box with x2 < x1 or y2 < y1")
        object.__setattr__(self, "boxes_xyxy", boxes)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> Detections:
        """No detections."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

    def take(self, index: Array) -> Detections:
        """The rows that `index` (integer or boolean) picks."""
        return Detections(self.boxes_xyxy[index], self.scores[index], self.labels[index])


@dataclass(frozen=True)
class SoftDetections:
    """A teacher's answer to one image with whole class distributions, before scores are cut to one label.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the original image.
        class_probs: (N, classes) float32 in [0, 1]; a row need not sum to 1, its maximum is the confidence.
    """

    boxes_xyxy: FloatArray
    class_probs: FloatArray

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        probs = np.asarray(self.class_probs, dtype=np.float32)
        if probs.ndim != 2 or len(probs) != len(boxes):
            raise ValueError(f"SoftDetections need (N, 4) boxes and (N, K) probs, got {boxes.shape} and {probs.shape}")
        if not (np.isfinite(boxes).all() and np.isfinite(probs).all()):
            raise ValueError("SoftDetections hold non-finite boxes or probabilities")
        object.__setattr__(self, "boxes_xyxy", boxes)
        object.__setattr__(self, "class_probs", probs)

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    @classmethod
    def empty(cls, num_classes: int) -> SoftDetections:
        """No candidates."""
        return cls(np.zeros((0, 4), np.float32), np.zeros((0, num_classes), np.float32))


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set with its ground truth.

    Attributes:
        image_id: unique within the data set; the file stem for VOC and YOLO, str(id) for COCO.
        path: the image file.
        image_hw: (height, width) in pixels, after EXIF orientation.
        boxes_xyxy: (N, 4) float32 pixels, clipped to the image.
        labels: (N,) int64 indices into `Dataset.class_names`.
        difficult: (N,) bool, VOC's flag: not used in training unless asked, ignored in evaluation.
        crowd: (N,) bool, COCO's iscrowd: never trained on, matched by COCO's crowd rule in evaluation.
    """

    image_id: str
    path: Path
    image_hw: tuple[int, int]
    boxes_xyxy: FloatArray
    labels: IntArray
    difficult: BoolArray
    crowd: BoolArray

    @property
    def trainable(self) -> BoolArray:
        """(N,) bool: the objects that training may use as positives."""
        return ~(self.difficult | self.crowd)


LABELLED_BY_TEACHERS = (
    "has been annotated by teachers (`edgekd data label`): figures on it say how far a detector agrees with them, not how "
    "often it is right"
)


@dataclass(frozen=True)
class Dataset:
    """One split of a detection data set, held in memory as annotations (images stay on disk).

    Attributes:
        by_teachers: `edgekd data label` has annotated it: figures on it measure agreement with those teachers.
    """

    root: Path
    format: Literal["voc", "coco", "yolo"]
    split: str
    class_names: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    by_teachers: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def __post_init__(self) -> None:
        ids = [record.image_id for record in self.records]
        if len(set(ids)) != len(ids):
            raise DataError(f"{self.root}: image ids repeat in split {self.split!r}")


@dataclass(frozen=True)
class PreprocessSpec:
    """How an original image becomes a detector's input tensor; part of every artefact.

    input = (pixels / 255 - mean) / std after resizing with OpenCV's bilinear filter: "stretch" to `input_hw`, or
    "letterbox" (aspect kept, scaled by min(h/H, w/W), centred, padded with `pad_value`), or "letterbox-corner" (the same, in
    the upper left corner). Ours are RGB and never in a corner; foreign detectors may be otherwise. `mean` and `std` are in the
    order of `channels`.
    """

    input_hw: tuple[int, int]
    resize: ResizeMode = "stretch"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pad_value: int = 114
    channels: Channels = "rgb"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PreprocessSpec:
        """Inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: something is missing, or is not what it should be.
        """
        h, w = data["input_hw"]
        mean, std = (tuple(float(v) for v in data[key]) for key in ("mean", "std"))
        channels = data.get("channels", "rgb")  # files written before there was a choice
        if data["resize"] not in get_args(ResizeMode) or channels not in get_args(Channels):
            raise ValueError(f"resize {data['resize']!r}, channels {channels!r}: not known here")
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(f"mean {mean}, std {std}: not three each, or a std that is not positive")
        return cls((int(h), int(w)), data["resize"], mean, std, int(data["pad_value"]), channels)


@dataclass(frozen=True)
class DetectorSpec:
    """All that is needed to build a detector again: `edgekd.detectors.build_detector(spec)`.

    Attributes:
        model: a name in `edgekd.detectors.DETECTORS`, such as "mobilenetv2-ssd-lite".
        class_names: foreground classes in label order.
        preprocess: how images are prepared.
        width: channel multiplier of the backbone.
        options: model-specific settings, plain JSON types, such as {"min_scale": 0.08}.
    """

    model: str
    class_names: tuple[str, ...]
    preprocess: PreprocessSpec
    width: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back."""
        return {
            "model": self.model,
            "class_names": list(self.class_names),
            "preprocess": self.preprocess.to_dict(),
            "width": self.width,
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DetectorSpec:
        """Inverse of `to_dict`.

        Raises:
            ArtifactError: a key is missing or has the wrong type.
        """
        try:
            return cls(
                str(data["model"]),
                tuple(str(name) for name in data["class_names"]),
                PreprocessSpec.from_dict(data["preprocess"]),
                float(data["width"]),
                dict(data["options"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError("a detector spec is damaged", got=f"{type(error).__name__}: {error}") from error
