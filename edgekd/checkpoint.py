"""Checkpoints: a detector ready for use (`model.pt`, `best.pt`), and the whole state of a run (`last.pt`).

Everything is read with `weights_only=True`: a checkpoint from a stranger can be wrong, but it cannot run code.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import atomic_path, unread_torch_file
from edgekd.detectors import build_detector
from edgekd.errors import ArtifactError, UserError
from edgekd.types import DetectorSpec

if TYPE_CHECKING:
    from edgekd.detectors.base import Detector

DETECTOR_SCHEMA = "edgekd.detector/1"
STATE_SCHEMA = "edgekd.state/1"
MODEL_FILE, BEST_FILE, LAST_FILE = "model.pt", "best.pt", "last.pt"
_EXPORT = "export that detector to ONNX and give it as a teacher's `onnx`, or load it in a `module` of your own"
_OTHER_VERSION = "load it with the version of edgekd that wrote it, or train it again"


def save_detector(path: Path, detector: Detector, facts: Mapping[str, Any]) -> None:
    """Write a detector's spec, weights and facts (plain JSON types) in one atomic file."""
    import torch

    payload = {
        "schema": DETECTOR_SCHEMA,
        "spec": detector.spec.to_dict(),
        "weights": {name: value.detach().cpu() for name, value in detector.state_dict().items()},
        "facts": dict(facts),
    }
    with atomic_path(path) as temporary:
        torch.save(payload, temporary)


def detector_file(path: Path) -> Path:
    """The detector checkpoint behind a path that may be a file or a run folder.

    Raises:
        ArtifactError: neither; says what lies there instead.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder", expected="a detector checkpoint or a run folder")
    for name in (MODEL_FILE, BEST_FILE):
        if (path / name).is_file():
            return path / name
    inside = sorted(str(found.parent) for found in path.glob(f"*/{MODEL_FILE}"))
    raise ArtifactError(
        f"{path}: no detector in this folder",
        got=", ".join(sorted(child.name for child in path.iterdir())[:8]) or "an empty folder",
        expected=f"a run folder with {MODEL_FILE}, as `edgekd train` and `edgekd distill` write",
        fix=f"a folder of `edgekd run` holds several: give {' or '.join(inside)}"
        if inside
        else "give the run's folder, or run the same command again to finish a run that was cut off",
    )


def read_payload(path: Path, schema: str) -> dict[str, Any]:
    """A checkpoint's dictionary, checked against its schema.

    Raises:
        ArtifactError: the file is missing, damaged, holds code, or is not of this schema.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own words about a file that is refused below
            payload = torch.load(path, map_location="cpu", weights_only=True)
        _require_checksums(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except Exception as error:  # a damaged file makes torch raise nearly anything, struct.error among it
        got, fix = unread_torch_file(path, error, _EXPORT)
        raise ArtifactError(
            f"{path}: not a readable checkpoint", got=got, expected="a file written by edgekd", fix=fix
        ) from error
    found = payload.get("schema") if isinstance(payload, dict) else type(payload).__name__
    if found != schema:
        raise ArtifactError(
            f"{path}: not the expected kind of checkpoint",
            got=found if found is not None else "a file without a schema, such as a bare state dict",
            expected=schema,
            fix="backbone weights belong under `student.weights` in a recipe; a whole detector of another kind teaches as ONNX"
            if found is None
            else f"give the run's folder, or the {MODEL_FILE} in it",
        )
    return dict(payload)


def _require_checksums(path: Path) -> None:
    """Torch reads a weight that a disk or a copy has changed as it is; the archive knows better.

    Raises:
        zipfile.BadZipFile: a part is not what was written.
    """
    if zipfile.is_zipfile(path):  # torch's old format has no checksums
        with zipfile.ZipFile(path) as archive:
            if changed := archive.testzip():
                raise zipfile.BadZipFile(changed)


def load_detector(path: Path) -> Detector:
    """The detector of a checkpoint file or run folder, in eval mode, on the CPU.

    Raises:
        ArtifactError: missing, damaged, or its weights do not fit its spec.
    """
    file = detector_file(path)
    return _detector_in(read_payload(file, DETECTOR_SCHEMA), file)


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """The facts stored beside a detector: metrics, epochs, seed, commit.

    Raises:
        ArtifactError: missing or damaged.
    """
    file = detector_file(path)
    return _facts_in(read_payload(file, DETECTOR_SCHEMA), file)


def load_with_facts(path: Path) -> tuple[Detector, dict[str, Any]]:
    """What `load_detector` and `checkpoint_facts` give, the file read once."""
    file = detector_file(path)
    payload = read_payload(file, DETECTOR_SCHEMA)
    return _detector_in(payload, file), _facts_in(payload, file)


def _detector_in(payload: Mapping[str, Any], file: Path) -> Detector:
    try:
        detector = build_detector(DetectorSpec.from_dict(payload["spec"]))
        detector.load_state_dict(payload["weights"])
    except UserError as error:  # of several files, which one
        raise ArtifactError(
            f"{file}: {error.what}", got=error.got, expected=error.expected, fix=error.fix or _OTHER_VERSION
        ) from error
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{file}: damaged", got=f"{type(error).__name__}: {error}", fix=_OTHER_VERSION) from error
    except RuntimeError as error:
        raise ArtifactError(
            f"{file}: weights do not fit the model", got=str(error).splitlines()[-1].strip()[:200]
        ) from error
    return detector.eval()


def _facts_in(payload: Mapping[str, Any], file: Path) -> dict[str, Any]:
    try:
        return dict(payload["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file}: damaged", got=f"{type(error).__name__}: {error}", fix=_OTHER_VERSION) from error
