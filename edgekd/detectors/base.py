"""What every detector of edgekd offers: one forward with one return type, named taps, decoding, and its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from edgekd.types import DetectorSpec

ScoreActivation = Literal["softmax", "sigmoid"]
TapKind = Literal["backbone", "neck", "head"]


@dataclass(frozen=True)
class TapSpec:
    """A named intermediate feature map, (B, channels, *grid_hw).

    Attributes:
        name: what a recipe writes, such as "backbone.19x19" or "neck.p4"; unique within a detector.
        kind: where in the network it is.
        channels: C.
        grid_hw: (H, W) of the map at the spec's input size. Levels of two detectors are matched by this, never by
            their index.
    """

    name: str
    kind: TapKind
    channels: int
    grid_hw: tuple[int, int]


@dataclass(frozen=True)
class DetectorOutput:
    """Raw outputs, the same in training, evaluation and export. No activation, no decoding, no NMS.

    Attributes:
        cls_logits: (B, P, C). C = classes + 1 with background first when the detector's `score_activation` is
            "softmax"; C = classes when it is "sigmoid".
        bbox_regression: (B, P, R) in the detector's own coding: R = 4 offsets, or 4 * bins for distributions.
        objectness: (B, P) logits, or None where the head has none.
        taps: the maps that were asked for, by name, each (B, C, H, W).
    """

    cls_logits: Tensor
    bbox_regression: Tensor
    objectness: Tensor | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Targets:
    """Boxes to learn from for a batch, one entry an image, in the frame of the detector's input tensor.

    Attributes:
        boxes_xyxy: B tensors (N_i, 4) float32, input pixels, x2 > x1 and y2 > y1.
        labels: B tensors (N_i,) int64 in [0, classes).
    """

    boxes_xyxy: Sequence[Tensor]
    labels: Sequence[Tensor]

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets([b.to(device) for b in self.boxes_xyxy], [v.to(device) for v in self.labels])


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's answer as boxes with class probabilities, one entry an image, in the student's input frame.

    Attributes:
        boxes_xyxy: B tensors (M_i, 4) float32, input pixels.
        class_probs: B tensors (M_i, classes) float32 in [0, 1], in the student's label set. A row need not sum to 1;
            its maximum is the teacher's confidence that an object is there.
        silent_xyxy: B tensors (S_i, 4) of objects that the teacher cannot know, so that it having no box there is no
            evidence of background; empty when there are none in the batch.
    """

    boxes_xyxy: Sequence[Tensor]
    class_probs: Sequence[Tensor]
    silent_xyxy: Sequence[Tensor] = ()

    def to(self, device: torch.device) -> SoftTargets:
        """The same on another device."""
        return SoftTargets(
            [b.to(device) for b in self.boxes_xyxy],
            [p.to(device) for p in self.class_probs],
            [s.to(device) for s in self.silent_xyxy],
        )


class Detector(nn.Module):
    """Base of all native detectors.

    Class attribute `score_activation` says how `cls_logits` become probabilities. Instances set `spec` and
    `tap_specs` (ordered, from fine to coarse grids within a kind) in `__init__`.
    """

    score_activation: ScoreActivation
    spec: DetectorSpec
    tap_specs: Mapping[str, TapSpec]

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> DetectorOutput:
        """Run the network.

        Args:
            images: (B, 3, H, W) float, normalised by `spec.preprocess`, at `spec.preprocess.input_hw`.
            taps: names from `tap_specs` whose maps are wanted.

        Raises:
            KeyError: an unknown tap.
        """
        raise NotImplementedError

    def decode(self, output: DetectorOutput) -> tuple[Tensor, Tensor]:
        """Raw outputs to (boxes_xyxy (B, P, 4) input pixels, scores (B, P, classes) in [0, 1]).

        Traceable by the ONNX exporter. Boxes are not clipped; scores carry no background column and are already
        multiplied by objectness where there is one.
        """
        raise NotImplementedError

    def detection_losses(self, output: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
        """Named scalar losses against ground truth; their plain sum is the detection loss."""
        raise NotImplementedError

    def soft_losses(self, output: DetectorOutput, soft: SoftTargets, temperature: float = 1.0) -> dict[str, Tensor]:
        """Response distillation through boxes: {"cls": scalar, "box": scalar}.

        The teacher's boxes are assigned to this detector's own priors by the rule it uses for ground truth; assigned
        priors learn the teacher's class probabilities (softened by `temperature`) and boxes weighted by its
        confidence, others learn background, except those centred in a box of `soft.silent_xyxy`, which learn nothing.
        Works whatever the teacher's architecture.
        """
        raise NotImplementedError

    def prior_boxes(self) -> Tensor:
        """(P, 4) float32 cxcywh in input pixels: the prior, anchor, or grid cell behind each output row."""
        raise NotImplementedError

    def layout(self) -> tuple[object, ...]:
        """Hashable description of what each output row means (family, grids, priors a cell, box coding).

        Two detectors with equal layouts can be distilled row by row; otherwise through boxes.
        """
        raise NotImplementedError
