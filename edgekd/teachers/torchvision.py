"""torchvision's detectors as teachers, where torchvision can be imported at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekd.errors import MissingDependencyError, UserError, WeightsError
from edgekd.labels import COCO_BY_ID
from edgekd.recipe import TorchvisionTeacher
from edgekd.teachers.module import AdapterAnswer, AdapterTeacher
from edgekd.types import PreprocessSpec


def torchvision_teacher(config: TorchvisionTeacher, class_names: Sequence[str], device: str) -> AdapterTeacher:
    """A torchvision detection model as a teacher.

    Raises:
        MissingDependencyError: torchvision is not there, or does not work with this torch.
        UserError: an unknown model. WeightsError: its weights cannot be had.
    """
    models = _import_models()
    available = models.list_models(module=models.detection)
    if config.torchvision not in available:
        raise UserError(
            f"teacher {config.name!r}: torchvision has no such detection model",
            got=config.torchvision,
            expected="one of " + ", ".join(available),
        )
    model, names = _with_weights(models, config)
    adapter = TorchvisionAdapter(model.to(device).eval().requires_grad_(False), names)
    facts = {"torchvision": config.torchvision, "weights": config.weights or "DEFAULT"}
    return AdapterTeacher(config.name, adapter, class_names, config.class_map, device=device, facts=facts)


class TorchvisionAdapter:
    """A torchvision detection model as a `ModuleAdapter`; it normalises and suppresses inside."""

    def __init__(self, model: Any, class_names: Sequence[str]) -> None:
        self.model = model
        self.class_names = tuple(class_names)
        transform = model.transform
        fixed = getattr(transform, "fixed_size", None)  # (width, height), of the SSD family
        side = int(transform.min_size[-1])
        input_hw = (int(fixed[1]), int(fixed[0])) if fixed else (side, side)
        self.preprocess = PreprocessSpec(
            input_hw, "stretch" if fixed else "letterbox", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        )

    def __call__(self, images: Tensor) -> AdapterAnswer:
        """Answer a batch: images (B, 3, h, w) float32 in [0, 1]."""
        answers = []
        for found in self.model(list(images)):
            probs = np.zeros((len(found["labels"]), len(self.class_names)), np.float32)
            probs[np.arange(len(probs)), found["labels"].cpu().numpy()] = found["scores"].cpu().numpy()
            answers.append((found["boxes"], probs))
        return answers


def _import_models() -> Any:
    try:
        import torchvision.models
        import torchvision.models.detection
    except Exception as error:  # a build for another torch raises OSError or RuntimeError rather than ImportError
        raise MissingDependencyError(
            "torchvision does not work here",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="install the torchvision that belongs to your torch, or give the teacher as `onnx`",
        ) from error
    return torchvision.models


def _with_weights(models: Any, config: TorchvisionTeacher) -> tuple[Any, tuple[str, ...]]:
    """(model, names by label): labels are COCO's category ids unless the weights say otherwise."""
    path = Path(os.path.expanduser(config.weights)) if config.weights else None
    try:
        if path is not None and path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            model = models.get_model(config.torchvision, weights=None, weights_backbone=None)
            model.load_state_dict(state)
            return model, COCO_BY_ID
        known = models.get_model_weights(config.torchvision)
        weights = known[config.weights or "DEFAULT"]
        model = models.get_model(config.torchvision, weights=weights)
    except Exception as error:  # a damaged file, an unknown name, no network: torch raises all sorts
        raise WeightsError(
            f"teacher {config.name!r}: its weights cannot be loaded",
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            expected="a state dict for this model with 91 classes, or a torchvision weights name such as DEFAULT",
        ) from error
    names = weights.meta["categories"]
    unused = {"N/A", "__background__"}
    return model, tuple(f"(id {i}, unused)" if name in unused else name for i, name in enumerate(names))
