"""`edgekd quantize`: a finished run fine-tuned for int8, into a run folder of its own that exports like any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.artifact import MANIFEST_NAME, is_current, read_manifest, sha256_file, sha256_json, write_manifest
from edgekd.checkpoint import MODEL_FILE, checkpoint_facts, detector_file, load_detector, save_detector
from edgekd.data.images import evenly_spread
from edgekd.data.loader import TrainLoader
from edgekd.errors import ArtifactError, UserError
from edgekd.export.images import PreparedImages
from edgekd.export.qat import fine_tune
from edgekd.recipe_file import write_recipe
from edgekd.training.setup import uses_gpu
from edgekd.training.state import clear_leftovers, refuse_foreign
from edgekd.training.train import RunResult
from edgekd.workspace import Workspace, resolved_device

KIND = "qat"
_LABEL = "fine-tuning for int8"


def quantize_run(work: Workspace, source: Path, out: Path) -> RunResult:
    """Fine-tune the detector of `source` as the recipe's `export.qat` says, for int8 as `export.target` lays it out.

    Raises:
        UserError: the recipe's data has other classes than the detector, or there is no GPU where one is asked for.
        ArtifactError: no detector at `source`, or `out` holds a run made from other inputs.
    """
    uses_gpu(work.device)  # refuses one that is not there
    recipe, detector = work.recipe, load_detector(source)
    if tuple(work.train.class_names) != detector.spec.class_names:
        raise UserError(
            "the data's classes are not the detector's",
            got=", ".join(work.train.class_names),
            expected=", ".join(detector.spec.class_names),
        )
    config, target = recipe.export.qat, recipe.export.target
    inputs = {
        "source": sha256_file(detector_file(source)),
        "qat": config.model_dump(mode="json"),
        "target": target,
        "calibration_images": recipe.export.calibration_images,
        "augment": recipe.augment.model_dump(mode="json"),
        "data": work.data_identity,
        "seed": recipe.seed,
    }
    if is_current(out, KIND, inputs) and (manifest := read_manifest(out)) is not None:
        return RunResult(out, out / MODEL_FILE, dict(manifest.facts.get("metrics", {})), skipped=True)
    if not _cut_off(out, inputs):
        refuse_foreign(out, inputs)
    clear_leftovers(out)
    loader = TrainLoader(
        work.train,
        preprocess=detector.spec.preprocess,
        augment=recipe.augment,
        batch_size=config.batch_size,
        seed=recipe.seed,
        epochs=config.epochs,
        workers=recipe.data.workers,
        cache_mib=recipe.data.cache_mib,
        difficult=recipe.train.difficult,
    )
    images = PreparedImages(
        evenly_spread(work.train.records, recipe.export.calibration_images), detector.spec.preprocess
    )
    tell = work.terminal.staged()
    try:
        result = fine_tune(
            detector,
            images,
            loader,
            config=config,
            target=target,
            device=resolved_device(work.device),
            tell=lambda step, steps, loss: tell(_LABEL, step, steps),
        )
    finally:
        loader.close()
    metrics = {"loss": [round(loss, 4) for loss in result.losses]}
    facts = {**checkpoint_facts(source), **result.facts, "inputs": inputs}
    save_detector(out / MODEL_FILE, result.detector, facts)
    write_recipe(recipe, out)
    write_manifest(out, KIND, inputs, [MODEL_FILE], {"metrics": metrics, "seed": recipe.seed})
    return RunResult(out, out / MODEL_FILE, metrics)


def _cut_off(out: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether the process that wrote the model in `out` from these inputs was killed before the manifest."""
    if (out / MANIFEST_NAME).is_file() or not (out / MODEL_FILE).is_file():
        return False
    try:
        return sha256_json(checkpoint_facts(out / MODEL_FILE).get("inputs")) == sha256_json(inputs)
    except ArtifactError:
        return False
