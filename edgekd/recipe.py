"""What a recipe may say: the schema, with its defaults. Reading YAML with line numbers is in `recipe_file.py`.

Every default here is meant to be good: a recipe names its data, its student, its teachers, and little else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MODELS: tuple[str, ...] = (
    "vgg16-ssd",
    "vgg11-ssd",
    "mobilenetv1-ssd-lite",
    "mobilenetv2-ssd-lite",
    "efficientnet-lite0-ssd-lite",
    "efficientnet-lite1-ssd-lite",
    "yolov3",
    "yolov3-tiny",
    "yolo-nano",
    "yolo-small",
)
"""The names in `edgekd.detectors.DETECTORS`, written out so that checking a recipe needs no torch."""

LOSSES: tuple[str, ...] = (
    "response",
    "feature",
    "adversarial",
    "information_map",
    "amd",
    "gkd",
    "decoupled",
    "cwd",
    "mgd",
    "fgd",
    "pkd",
)
"""The names in `edgekd.losses.TERMS`, likewise."""

TEACHER_KINDS = ("train", "checkpoint", "onnx", "module", "torchvision")
"""The keys of which a teacher has exactly one: what it comes from."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that is safe in a file name."""

Count = Annotated[int, Field(ge=0)]
SEEDS = range(1 << 63)
"""What NumPy and torch both take."""
Seed = Annotated[int, Field(ge=SEEDS.start, lt=SEEDS.stop)]
Positive = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(ge=0)]
Triple = tuple[float, float, float]


def mean_of_shares(mean: Triple) -> Triple:
    """The mean of pixels from 0 to 1, as it is.

    Raises:
        ValueError: it can be none.
    """
    if any(not -1 <= value <= 1 for value in mean):
        raise ValueError("of pixels from 0 to 1, so no value over 1: divide what is meant for 0 to 255 by 255")
    return mean


def std_of_shares(std: Triple) -> Triple:
    """The standard deviation of pixels from 0 to 1, as it is.

    Raises:
        ValueError: it can be none.
    """
    if any(not 0 < value <= 2 for value in std):  # 128 / 127.5 occurs
        raise ValueError(
            "of pixels from 0 to 1, so above 0 and hardly over 1: divide what is meant for 0 to 255 by 255"
        )
    return std


def _no_blank(names: tuple[str, ...]) -> tuple[str, ...]:
    for place, name in enumerate(names, 1):
        if not name.strip():
            raise ValueError(f"name {place} of {len(names)} is blank")
    return names


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataConfig(_Section):
    """The data set. `root` is relative to the recipe's folder, or to the working directory if not found there."""

    root: str = Field(min_length=1, description="Folder of the data set (VOC, COCO or YOLO layout).")
    format: Literal["auto", "voc", "coco", "yolo"] = "auto"
    train: str = Field("train", description="Split to train on.")
    val: str = Field("val", description="Split that every reported figure is measured on.")
    classes: tuple[str, ...] | None = Field(
        None, description="Class names in label order; found in the data if left out."
    )
    workers: Count | Literal["auto"] = Field("auto", description="Loader threads; auto fits the machine.")
    cache_mib: int = Field(1024, ge=0, description="Memory for decoded images; 0 decodes every time.")
    limit_train: int | None = Field(None, ge=1, description="Use only the first N training images.")
    limit_val: int | None = Field(None, ge=1, description="Use only the first N validation images.")


class AugmentConfig(_Section):
    """Augmentation as the SSD and YOLO papers use it; each is a probability or switched off by 0."""

    photometric: float = Field(0.5, ge=0, le=1, description="Chance of each photometric distortion.")
    zoom_out: float = Field(0.5, ge=0, le=1, description="Chance of placing the image on a larger canvas.")
    zoom_out_max: float = Field(3.0, ge=1, description="Largest canvas, as a multiple of the image's side.")
    iou_crop: float = Field(0.85, ge=0, le=1, description="Chance of a crop with a minimum IoU with some object.")
    min_crop: float = Field(
        0.3,
        gt=0,
        le=1,
        description="Smallest side of a crop, as a share of the image's, or of the canvas after zooming out.",
    )
    flip: float = Field(0.5, ge=0, le=1, description="Chance of a horizontal flip.")
    flip_vertical: float = Field(
        0.0, ge=0, le=1, description="Chance of a vertical flip: for pictures without an up, as from a microscope."
    )
    mosaic: float = Field(0.0, ge=0, le=1, description="Chance of a four-image mosaic.")
    close_mosaic_epochs: int = Field(5, ge=0, description="Last epochs that go without mosaic.")


class ModelConfig(_Section):
    """A native detector."""

    model: str = Field(
        description="A native detector, such as mobilenetv2-ssd-lite.", json_schema_extra={"enum": list(MODELS)}
    )
    input_size: int = Field(320, ge=64, le=1280, description="Side of the square input, pixels.")
    width: float = Field(1.0, gt=0, le=2, description="Channel multiplier.")
    weights: str | None = Field(
        None,
        description="Backbone weights: a path, 'imagenet' for the official ones, or none. Where width is below 1, a "
        "backbone with batch norm takes a part of each layer's channels, as a start.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Model-specific settings, such as min_scale.")


class TrainConfig(_Section):
    """The training loop."""

    epochs: int = Field(60, ge=1)
    batch_size: int = Field(16, ge=1, description="Images a step, over all processes together.")
    accumulate: int = Field(1, ge=1, description="Batches an optimiser step.")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    backbone_lr_factor: Factor | Literal["auto"] = Field(
        "auto",
        description="Backbone's learning rate as a share of lr; 0 freezes its weights, not its batch-norm statistics. auto: "
        "0.3 of a backbone with `weights` made for its width, which has less to learn than a new head, else 1.",
    )
    freeze_stride: Literal[0, 2, 4, 8] = Field(
        0,
        description="The layers of an SSD's pretrained backbone whose maps have at most this stride keep their weights and "
        "batch-norm statistics: they are most of a CPU step's time. 0: none.",
    )
    weight_decay: float = Field(0.01, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum.")
    warmup_steps: Count | Literal["auto"] = Field(
        "auto", description="Linear warm-up; auto is 5 % of all steps, at most 1000."
    )
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_factor: float = Field(0.01, ge=0, le=1)
    ema: float = Field(0.998, ge=0, lt=1, description="Decay of the weights' moving average; 0 is off.")
    clip_norm: float = Field(10.0, ge=0, description="Largest gradient norm; 0 is off.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 on a CPU. A CPU that would emulate bf16 goes in fp32."
    )
    channels_last: bool = True
    deterministic: bool = False
    eval_every: Positive | Literal["auto"] = Field("auto", description="Epochs between evaluations.")
    checkpoint_every: Positive | Literal["auto"] = Field("auto", description="Steps between checkpoints; auto: epochs.")
    select: Literal["last", "best"] = Field(
        "last",
        description="What ships as model.pt: the last averaged weights, or the best on `data.val`. With best, figures "
        "on that same split are optimistic.",
    )
    difficult: bool = Field(False, description="Train on objects marked difficult.")


class TrainedTeacher(_Section):
    """A native teacher that `edgekd run` trains itself before distilling."""

    name: Name
    train: ModelConfig
    settings: TrainConfig | None = Field(
        None, description="Its own training settings; the recipe's `train` if left out."
    )
    weight: float = Field(1.0, gt=0)
    seed: Seed | None = None


class CheckpointTeacher(_Section):
    """A native teacher from a checkpoint or a run folder."""

    name: Name
    checkpoint: str
    weight: float = Field(1.0, gt=0)
    class_map: dict[str, str] | None = Field(None, description="Teacher class to student class; by name if left out.")


AnchorFamily = Literal[
    "yolov2",
    "yolov2-voc",
    "yolov2-tiny-voc",
    "yolov3",
    "yolov3-tiny",
    "yolov4",
    "yolov4-tiny",
    "yolov5",
    "yolov7",
    "yolov7-tiny",
    "retinaface",
]
"""Published raw heads with anchors; how each is decoded stands in `runtimes.anchored.ANCHOR_SETS`."""
AnchorSizes = tuple[tuple[float, float], ...]


def _one_family(sizes: dict[AnchorFamily, AnchorSizes]) -> dict[AnchorFamily, AnchorSizes]:
    if len(sizes) != 1:
        raise ValueError("one set's name with its sizes is wanted, such as {yolov4-tiny: [[23, 27], ...]}")
    return sizes


class OnnxTeacher(_Section):
    """Any detector as an ONNX file, run by ONNX Runtime."""

    name: Name
    onnx: str
    output: Literal["auto", "yolo", "yolo-objectness", "boxes-scores", "detections"] = "auto"
    class_names: Annotated[tuple[str, ...], AfterValidator(_no_blank)] | Literal["auto", "coco", "coco91", "voc"] = (
        "auto"
    )
    class_map: dict[str, str] | None = None
    resize: Literal["auto", "stretch", "letterbox", "letterbox-corner"] = "auto"
    channels: Literal["auto", "rgb", "bgr"] = Field("auto", description="Order in which it takes colours.")
    input_size: int | None = Field(None, ge=32, description="Needed where the file's input is dynamic.")
    mean: Annotated[Triple, AfterValidator(mean_of_shares)] | None = None
    std: Annotated[Triple, AfterValidator(std_of_shares)] | None = None
    score_activation: Literal["auto", "none", "sigmoid", "softmax"] = "auto"
    background: Literal["auto", "none", "first", "last"] = "auto"
    box_format: Literal[
        "auto",
        "xyxy",
        "cxcywh",
        "xywh",
        "yxyx",
        "xyxy-normalised",
        "cxcywh-normalised",
        "xywh-normalised",
        "yxyx-normalised",
        "cxcywh-rotated",
        "grid-offsets",
        "grid-distances",
        "grid-distances-corner",
    ] = "auto"
    anchors: (
        AnchorFamily | AnchorSizes | Annotated[dict[AnchorFamily, AnchorSizes], AfterValidator(_one_family)] | None
    ) = Field(
        None,
        description="Of a raw head whose boxes are coded by anchors: a published set; or its own, (width, height) in input "
        "pixels, fine to coarse, under the name of the set that it is decoded like: {yolov4-tiny: [[23, 27], ...]}. A bare "
        "list is decoded as YOLOv5's.",
    )
    taps: dict[str, str] | Literal["auto"] = Field(
        default_factory=dict,
        description="Feature maps to learn from: tap name to the name of a tensor in the graph; auto: the ends of its neck at "
        "strides 8, 16 and 32, as p3, p4, p5.",
    )
    weight: float = Field(1.0, gt=0)


class ModuleTeacher(_Section):
    """A torch module of the user's own, through an adapter factory 'package.module:function'."""

    name: Name
    module: str
    args: dict[str, Any] = Field(default_factory=dict)
    class_map: dict[str, str] | None = None
    weight: float = Field(1.0, gt=0)


class TorchvisionTeacher(_Section):
    """A torchvision detection model, where torchvision works."""

    name: Name
    torchvision: str
    weights: str | None = Field(None, description="A path, or a torchvision weights name such as DEFAULT.")
    class_map: dict[str, str] | None = None
    weight: float = Field(1.0, gt=0)


TeacherConfig = TrainedTeacher | CheckpointTeacher | OnnxTeacher | ModuleTeacher | TorchvisionTeacher


def teacher_kind(teacher: object) -> str | None:
    """Which of `TEACHER_KINDS` a teacher is, by the one key it has; None when it has none or several."""
    present = teacher if isinstance(teacher, Mapping) else getattr(type(teacher), "model_fields", ())
    kinds = [kind for kind in TEACHER_KINDS if kind in present]
    return f"teacher:{kinds[0]}" if len(kinds) == 1 else None


# Tagged by that key, so that a mistake in one teacher is not reported once for every kind of teacher there is.
_AnyTeacher = Annotated[
    Annotated[TrainedTeacher, Tag("teacher:train")]
    | Annotated[CheckpointTeacher, Tag("teacher:checkpoint")]
    | Annotated[OnnxTeacher, Tag("teacher:onnx")]
    | Annotated[ModuleTeacher, Tag("teacher:module")]
    | Annotated[TorchvisionTeacher, Tag("teacher:torchvision")],
    Discriminator(teacher_kind),
]


class EnsembleConfig(_Section):
    """How several teachers become one answer."""

    fusion: Literal["wbf", "nms", "soft-nms", "mean-outputs"] = "wbf"
    iou: float = Field(0.55, gt=0, lt=1, description="Of wbf and nms: boxes that overlap by more are one object's.")
    weights: Literal["given", "learned"] = Field(
        "given", description="learned: fitted to AP50 on about 300 of the training images."
    )

    @model_validator(mode="after")
    def _learnable(self) -> EnsembleConfig:
        if self.fusion == "mean-outputs" and self.weights == "learned":
            raise ValueError("weights: learned are fitted on boxes, which mean-outputs has none of; use fusion: wbf")
        return self


class TermConfig(_Section):
    """One distillation term."""

    loss: str = Field(
        description="A distillation term, such as response or feature.", json_schema_extra={"enum": list(LOSSES)}
    )
    weight: float | None = Field(None, ge=0, description="Multiplier; the term's own default if left out.")
    gradient_ratio: float | None = Field(
        None,
        gt=0,
        description="Instead of weight: target gradient norm as a share of the detection loss's.",
    )
    fade: bool | None = Field(
        None,
        description="Let the pull fall to nothing over training, by 1 - epoch / epochs; if left out, gkd's does, as published.",
    )
    student_taps: tuple[str, ...] | Literal["auto"] = Field(
        "auto", description="The student's maps that learn, for terms that read maps; auto matches both sides by grid."
    )
    teacher_taps: tuple[str, ...] | Literal["auto"] = Field(
        "auto", description="The teachers' maps, pair by pair with student_taps where both are named."
    )
    params: dict[str, Any] = Field(default_factory=dict, description="The term's own settings: see edgekd/losses.")

    @model_validator(mode="after")
    def _one_weight(self) -> TermConfig:
        if self.weight is not None and self.gradient_ratio is not None:
            raise ValueError("give weight or gradient_ratio, not both")
        return self


class CacheConfig(_Section):
    """Teachers look once at a fixed number of augmented views of each image; what they said is kept on disk."""

    views: Positive = Field(4, description="Augmented views of each image; epoch e shows view e modulo this.")
    features: bool = Field(True, description="Keep feature maps and raw outputs too, where terms read them.")
    disk_budget_gib: float = Field(20.0, gt=0, description="What the cache's folder may hold, GiB.")
    fallback: Literal["error", "online"] = Field(
        "error", description="Where it may not be kept: stop, or run the teachers on the same views at every step."
    )
    folder: str | None = Field(
        None, description="To share a cache between runs; DIR/views if left out. Relative to the working directory."
    )
    seed: Seed | None = Field(
        None, description="Of the views; the recipe's if left out. Given, runs of several seeds share one cache."
    )


class DistillConfig(_Section):
    """What the student learns from its teachers besides the ground truth."""

    terms: tuple[TermConfig, ...] = (TermConfig(loss="response"),)
    detection_weight: float = Field(1.0, ge=0, description="Weight of the ground-truth loss.")
    answers: Literal["image", "online"] = Field(
        "image",
        description="Where the boxes come from that terms read, if any does. image: each teacher sees every training image "
        "once, and its boxes follow the augmentation; online: from the augmented view itself.",
    )
    cache: CacheConfig | None = Field(
        None,
        description="Keep what teachers say about a few views of each image, instead of running them at every step.",
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillConfig:
        if self.detection_weight == 0 and any(term.gradient_ratio is not None for term in self.terms):
            raise ValueError(
                "gradient_ratio is a share of the detection loss's pull, and detection_weight is 0: give weight"
            )
        if self.detection_weight == 0 and all(term.weight == 0 for term in self.terms):
            raise ValueError("detection_weight and every term's weight are 0: nothing would be learned")
        return self


class QatConfig(_Section):
    """Quantisation-aware fine-tuning, `edgekd quantize`."""

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(8, ge=1)
    lr: float = Field(5e-5, gt=0, description="Of Adam, at the start; it falls to 0 along a cosine.")
    distill: float = Field(1.0, ge=0, description="Weight of learning from the fp32 detector; 0: ground truth alone.")


class ExportConfig(_Section):
    """What is written for the device."""

    precisions: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32",)
    target: Literal["x86", "tensorrt"] = "x86"
    nms: bool = Field(False, description="Also write the form with NMS inside.")
    opset: int = Field(17, ge=17)
    dynamic_batch: bool = False
    calibration_images: int = Field(128, ge=1)
    calibration: Literal["minmax", "entropy", "percentile", "auto"] = "minmax"
    map_budget: float = Field(1.0, ge=0, description="AP50 points that fp16 or int8 may lose against fp32.")
    qat: QatConfig = QatConfig()


class BenchConfig(_Section):
    """How artefacts are measured."""

    samples: int = Field(200, ge=20, description="Timed inferences an artefact.")
    seconds: float = Field(0.0, ge=0, description="Each artefact is timed for so long at least.")
    warmup_seconds: float = Field(1.0, ge=0)
    threads: int | None = Field(None, ge=1, description="Inference threads; all cores if left out.")
    ensemble: Literal["sequential", "parallel", "both"] = Field(
        "both", description="How an ensemble's members run; parallel needs two threads or more."
    )
    mode: Literal["single", "throughput"] = Field("single", description="Throughput: images/s under full load as well.")
    streams: int | None = Field(None, ge=1, description="Of throughput, at once; one a thread if left out.")
    batch: int = Field(1, ge=1, description="Images of one inference in throughput, where a file takes more than one.")
    mlperf: Literal["SingleStream", "MultiStream"] | None = Field(None, description="A scenario by MLPerf's rules.")
    mlperf_seconds: float = Field(600.0, gt=0, description="Of each artefact; the rules want 600.")
    score_threshold: float = Field(0.001, ge=0, lt=1, description="For mAP.")
    nms_iou: float = Field(0.5, gt=0, lt=1)
    max_detections: int = Field(100, ge=1, description="Boxes an image; above 100, teachers answer with as many, too.")
    box_voting: float | None = Field(
        None, gt=0, lt=1, description="Candidates that overlap a kept box by more than this move it, each by its score."
    )


class Recipe(_Section):
    """A whole recipe: `edgekd run` does all of it, the other commands the part they are named for."""

    name: Name
    seed: Seed = 0
    data: DataConfig
    student: ModelConfig
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    teachers: tuple[_AnyTeacher, ...] = ()
    ensemble: EnsembleConfig = EnsembleConfig()
    distill: DistillConfig = DistillConfig()
    export: ExportConfig = ExportConfig()
    bench: BenchConfig = BenchConfig()

    @model_validator(mode="after")
    def _unique_names(self) -> Recipe:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teachers need different names, got {names}")
        return self

    @model_validator(mode="after")
    def _fusible(self) -> Recipe:
        if self.ensemble.fusion == "mean-outputs" and self.distill.answers == "online" and len(self.teachers) > 1:
            raise ValueError(
                "ensemble.fusion: mean-outputs averages raw outputs, and distill.answers: online fuses boxes at every step; "
                "use fusion: wbf, or answers: image"
            )
        return self
