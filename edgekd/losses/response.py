"""Response distillation: class distributions and boxes, row by row on equal priors, or through boxes when they differ.

Sources: G. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (temperature); G. Chen et al.,
"Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017 (class and box imitation in
detectors); Z. Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022 (where a head gives a
distribution over each side's distance, that distribution is what is taught). Reading (ours): a row's weight is the teacher's
foreground confidence plus a small share for background, because an unweighted sum over thousands of background priors drowns
the objects. Objects of classes that no teacher knows are left to the ground truth: a teacher's silence there is not
background.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from edgekd.detectors.base import DetectorOutput, ScoreActivation, SoftTargets
from edgekd.errors import DistillationSetupError
from edgekd.losses.base import DistillBatch, Pair, Term
from edgekd.ranks import normaliser

BOX_TEMPERATURE = 10.0  # published


class ResponseTerm(Term):
    """The student learns the teachers' class distributions and boxes.

    Args:
        pair: student and teachers.
        mode: "boxes" assigns the ensemble's fused boxes to the student's priors (works for any teacher, black boxes
            too); "priors" compares raw outputs row by row and needs native teachers of the student's own layout.
        temperature: softens class distributions; gradients are rescaled by its square.
        box_temperature: in "priors" mode, the same of distributions over distances, for heads that have them.
        cls_weight: weight of the class part. box_weight: weight of the box part.
        background: share of weight that a pure background row keeps in "priors" mode.

    Raises:
        DistillationSetupError: "priors" was asked for and a teacher's layout differs from the student's.
    """

    name = "response"

    def __init__(
        self,
        pair: Pair,
        *,
        mode: Literal["boxes", "priors"] = "boxes",
        temperature: float = 1.0,
        box_temperature: float = BOX_TEMPERATURE,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        background: float = 0.02,
    ) -> None:
        super().__init__()
        self.student = [pair.student]  # in a list: the student is not a submodule of its own loss
        self.mode, self.temperature, self.box_temperature = mode, temperature, box_temperature
        self.cls_weight, self.box_weight, self.background = cls_weight, box_weight, background
        names = pair.student.spec.class_names
        self.unknown = [i for i, name in enumerate(names) if all(name in t.unknown_classes for t in pair.teachers)]
        self.needs_dense = mode == "priors"
        self.needs_answers = mode == "boxes"
        if self.needs_dense:
            _require_equal_layouts(pair)

    def forward(self, batch: DistillBatch) -> Tensor:
        """Weighted sum of the class and the box part."""
        student = self.student[0]
        if self.mode == "boxes":
            losses = student.soft_losses(batch.output, self._answer(batch), self.temperature)
            return self.cls_weight * losses["cls"] + self.box_weight * losses["box"]
        total = batch.output.cls_logits.new_zeros(())
        for view in batch.teachers:
            if view.dense is None:
                raise DistillationSetupError(f"response: teacher {view.name} gave no raw outputs")
            cls_loss, box_loss = dense_response_losses(
                batch.output,
                view.dense,
                student.score_activation,
                self.temperature,
                self.background,
                self.box_temperature,
            )
            total = total + view.weight * (self.cls_weight * cls_loss + self.box_weight * box_loss)
        return total

    def _answer(self, batch: DistillBatch) -> SoftTargets:
        """The fused answer, marked where ground truth has objects of classes that no teacher knows."""
        if not self.unknown:
            return batch.fused
        targets = zip(batch.targets.boxes_xyxy, batch.targets.labels, strict=True)
        unknown = [boxes[torch.isin(labels, labels.new_tensor(self.unknown))] for boxes, labels in targets]
        return replace(batch.fused, silent_xyxy=unknown)


def dense_response_losses(
    student: DetectorOutput,
    teacher: DetectorOutput,
    activation: ScoreActivation,
    temperature: float,
    background: float,
    box_temperature: float = BOX_TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    """Row-by-row (class, box) losses between two detectors of equal layout.

    Class: KL(teacher || student) at `temperature`, times its square; for sigmoid heads the binary KL summed over
    classes. Objectness, where there is one, is not softened. Box: smooth L1 on the raw coding of four offsets; of
    distributions, the mean over the sides of KL(teacher || student) at `box_temperature`, times its square. Both are means
    weighted by the teacher's foreground confidence, to which the class part adds `background`.
    """
    s_logits, t_logits = student.cls_logits.float(), teacher.cls_logits.float().detach()
    if activation == "softmax":
        t_prob = functional.softmax(t_logits / temperature, -1)
        kl = functional.kl_div(functional.log_softmax(s_logits / temperature, -1), t_prob, reduction="none").sum(-1)
        confidence = 1.0 - functional.softmax(t_logits, -1)[..., 0]
    else:
        t_prob = torch.sigmoid(t_logits / temperature)
        cross = functional.binary_cross_entropy_with_logits(s_logits / temperature, t_prob, reduction="none")
        entropy = functional.binary_cross_entropy_with_logits(t_logits / temperature, t_prob, reduction="none")
        kl = (cross - entropy).sum(-1)
        confidence = torch.sigmoid(t_logits).amax(-1)
    kl = kl * temperature**2
    if teacher.objectness is not None and student.objectness is not None:
        s_sure, t_sure = student.objectness.float(), teacher.objectness.float().detach()
        t_obj = torch.sigmoid(t_sure)
        # From logits on both sides: a GPU's autocast refuses the cross-entropy of probabilities.
        obj, entropy = (
            functional.binary_cross_entropy_with_logits(sure, t_obj, reduction="none") for sure in (s_sure, t_sure)
        )
        # Class probabilities of a row without an object mean nothing: objectness carries the background there.
        kl = kl * t_obj + obj - entropy
        confidence = confidence * t_obj
    weight = confidence + background
    cls_loss = (weight * kl).sum() / normaliser(weight.sum(), least=1.0)
    difference = _box_difference(student.bbox_regression.float(), teacher.bbox_regression.float(), box_temperature)
    box_loss = (confidence * difference).sum() / normaliser(confidence.sum(), least=1.0)
    return cls_loss, box_loss


def _box_difference(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B, P) between raw codings (B, P, R): R = 4 offsets, or 4 distributions of R / 4 logits."""
    teacher = teacher.detach()
    if student.shape[-1] == 4:
        return functional.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    told, wanted = (
        functional.log_softmax(logits.reshape(*logits.shape[:-1], 4, -1) / temperature, -1)
        for logits in (student, teacher)
    )
    kl = functional.kl_div(told, wanted, reduction="none", log_target=True).sum(-1).mean(-1)
    return kl * temperature**2


def _require_equal_layouts(pair: Pair) -> None:
    for teacher in pair.teachers:
        native = teacher.detector
        if native is None or native.layout() != pair.student.layout():
            grids = "a black box" if native is None else f"{native.spec.model}, {len(native.prior_boxes())} priors"
            raise DistillationSetupError(
                f"response with mode: priors needs teachers of the student's own layout; {teacher.name} differs",
                got=f"{grids} against the student's {pair.student.spec.model}, {len(pair.student.prior_boxes())} priors",
                fix="use mode: boxes, which matches any two detectors through their boxes",
            )
        if native.spec.class_names != pair.student.spec.class_names:
            raise DistillationSetupError(
                f"response with mode: priors needs equal class names in equal order; {teacher.name} differs",
                got=", ".join(native.spec.class_names),
                expected=", ".join(pair.student.spec.class_names),
                fix="use mode: boxes",
            )
        if teacher.class_map is not None:
            raise DistillationSetupError(
                f"response with mode: priors reads raw outputs, which no class map reaches; {teacher.name} has one",
                got=teacher.class_map.changes(),
                fix="use mode: boxes, or leave `class_map` out",
            )
