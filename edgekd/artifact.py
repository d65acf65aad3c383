"""Files that are never half-written, and manifests that say what a file is and what it was made from.

A stage writes its files, then its `manifest.json` last, so a folder without one is unfinished.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd import __version__
from edgekd.errors import ArtifactError, EdgeKDError, UserError, is_refusal, refusal

MANIFEST_NAME = "manifest.json"
SCHEMA = "edgekd.manifest/1"
_UNFINISHED = ".unfinished"
_FULL_BYTES = 1 << 16
"""Free bytes below which a writer that failed has filled the disk."""


def require_file(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Refuse what can never be written as a file; for long work to ask before it begins.

    Args:
        path: to be written, over what is there.
        suffixes: of files of the kind; what is there under another one was hardly meant to be replaced.

    Raises:
        ArtifactError: a folder, or something below a file. UserError: nothing can be written there, or not by this user, or
            a file of another kind is there.
    """
    if suffixes and path.suffix and path.is_file() and path.suffix.lower() not in suffixes:
        raise UserError(
            f"{path} is there, and what is to be written is of another kind",
            got=path.suffix or "no suffix",
            expected=" or ".join(suffixes),
            fix="give it another name, or move that file away",
        )
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder", expected="a file to write", fix=f"such as {path / 'NAME'}")
    over = next(parent for parent in path.absolute().parents if parent.exists())
    if not over.is_dir():
        raise ArtifactError(f"{path} cannot be written", got=f"{over} is a file", expected="a folder to write into")
    if not os.access(over, os.W_OK | os.X_OK):
        raise refusal(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), path)
    try:
        with tempfile.TemporaryFile(dir=over):  # some folders take none, such as /proc, whoever asks
            pass
    except OSError as error:
        raise _refused_place(error, path) from error


def _refused_place(error: OSError, path: Path) -> EdgeKDError:
    """What to tell where nothing can be begun, for whatever reason."""
    if is_refusal(error):
        return refusal(error, path)
    return UserError(f"{path} cannot be written", got=error.strerror, fix="choose another place")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it into place on success; on any error, nothing is left.

    The temporary name keeps the suffix, since some writers choose the format by it.

    Raises:
        ArtifactError: there can be no such file. UserError: not by this user. EdgeKDError: the disk is full.
    """
    path = Path(path)
    require_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise refusal(error, path) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if is_refusal(error) and error.filename in (None, name):  # else it speaks of another file
            raise refusal(error, path) from error
        raise
    except Exception as error:
        if shutil.disk_usage(path.parent).free < _FULL_BYTES:  # torch and ONNX say nothing of the disk
            raise refusal(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` and move it into place on success; on any error, nothing is left.

    What a process that was killed has left of the same folder is removed first: it may be a copy of a whole data set.

    Raises:
        UserError: there can be no such folder. EdgeKDError: the disk is full.
        OSError: the system refuses it later, such as where `path` is a folder with something in it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{_UNFINISHED}"):
            if (alone := _held(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(alone)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent))
    except OSError as error:
        raise _refused_place(error, path) from error
    held = _held(folder)
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        os.replace(folder, path)
    finally:
        if held is not None:
            os.close(held)
        shutil.rmtree(folder, ignore_errors=True)


def _held(folder: Path) -> int | None:
    """A descriptor that holds the folder against other processes until it is closed, or its process ends; None where
    another one holds it, or nothing can be held."""
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _umask() -> int:
    """What the user keeps from others; temporary files and folders begin as the user's alone."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def leftovers_of(path: Path) -> list[Path]:
    """Temporary files that `atomic_path` began for `path` in processes that were killed, or in one that still writes."""
    return [found for found in path.parent.glob(f".{path.stem}.*{path.suffix}") if found.is_file()]


def write_text(path: Path, text: str) -> None:
    """Write text atomically, UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: object) -> None:
    """Write JSON atomically: two-space indent, no NaN (which is not JSON)."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def cache_folder() -> Path:
    """Where what can be had again is kept for other runs: $XDG_CACHE_HOME/edgekd, else ~/.cache/edgekd."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgekd"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(data: object) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def unread_torch_file(path: Path, error: Exception, instead: str) -> tuple[str, str | None]:
    """What a file seems to be that torch does not load with `weights_only=True`; torch's own advice is to run its code.

    Args:
        path: the file.
        error: what torch raised.
        instead: what to do with a file that holds Python objects.

    Returns:
        (what was found, how to mend it).
    """
    try:
        head = _head_of(path)
    except OSError as refused:
        return refused.strerror or str(refused), None
    if (nothing := _stand_in(head)) is not None:
        return nothing
    if is_onnx(path):
        return "an ONNX file", "give it as a teacher's `onnx`; `edgekd export` takes it with --format engine only"
    if "TorchScript" in str(error):
        return "a TorchScript archive", instead
    if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or head[:1] == b"\x80"):
        return _pickled(str(error), path, instead)
    if head.startswith(b"PK"):
        return "a damaged or cut-off file", "copy or download it again"
    return f"no file of torch.save: it begins with {head[:16]!r}", None


def _pickled(error: str, path: Path, instead: str) -> tuple[str, str]:
    found = re.search(r"GLOBAL ([\w.]+)", error)
    kind = f"pickled Python objects ({found[1]})" if found else "pickled Python objects"
    for package, export in _EXPORTS.items():
        if found and found[1].startswith(f"{package}."):
            instead += f"; `{export.format(shlex.quote(str(path)))}` exports it"
    return f"{kind}, whose loading may run any code; they are never loaded", instead


_EXPORTS = {
    "ultralytics": "yolo export model={} format=onnx",
    "models": "python export.py --weights {} --include onnx",  # YOLOv5's own repository, whose module is `models.yolo`
}
"""How projects whose checkpoints are pickled detectors export them, by the package that the pickle names."""


def is_onnx(path: Path) -> bool:
    """Whether a file is called like an ONNX model, in whatever letters."""
    return path.suffix.lower() == ".onnx"


def stand_in(path: Path) -> tuple[str, str] | None:
    """(What a file is, how to mend it) where it only stands in the place of what was meant; None of all others."""
    try:
        return _stand_in(_head_of(path))
    except OSError:
        return None


def _head_of(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(64)


def _stand_in(head: bytes) -> tuple[str, str] | None:
    if not head:
        return "an empty file (0 bytes)", "copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself", "`git lfs pull` fetches the file"
    return None


def versions() -> dict[str, str]:
    """Versions of what figures depend on, without importing any of it; absent packages are left out."""
    from importlib import metadata

    found = {"edgekd": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "onnx", "onnxruntime", "openvino", "opencv-python-headless", "tensorrt"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def source_commit() -> str | None:
    """The git commit of edgekd's own source tree, with "+dirty" when it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+dirty" if changed else "")


@dataclass(frozen=True)
class Manifest:
    """What a stage made and from what.

    Attributes:
        kind: "run", "onnx", "engine", "bench", "answers", ...
        inputs: whatever decides the result (resolved recipe part, seed, hashes of parents): a stage is skipped only
            if this is equal.
        files: relative path to sha256 of each file that the stage vouches for.
        facts: everything else worth knowing (metrics, device, versions, commit).
    """

    kind: str
    inputs: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_manifest(
    folder: Path, kind: str, inputs: Mapping[str, Any], files: list[str], facts: Mapping[str, Any]
) -> Manifest:
    """Hash `files` (relative to `folder`) and write the manifest last."""
    hashes = {name: sha256_file(folder / name) for name in files}
    provenance = {"versions": versions(), "commit": source_commit(), "machine": platform.machine()}
    manifest = Manifest(kind, dict(inputs), hashes, {**provenance, **facts})
    write_json(
        folder / MANIFEST_NAME,
        {"schema": SCHEMA, "kind": kind, "inputs": manifest.inputs, "files": hashes, "facts": manifest.facts},
    )
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished stage, or None when there is none.

    Raises:
        ArtifactError: it is there but cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "schema" not in data:
            raise ArtifactError(f"{path} is not edgekd's", fix="choose another folder, or move that file away")
        if data["schema"] != SCHEMA:
            raise ArtifactError(f"{path}: unknown schema", got=data["schema"], expected=SCHEMA)
        found = Manifest(data["kind"], data["inputs"], data["files"], data["facts"])
        if not all(isinstance(part, dict) for part in (found.inputs, found.files, found.facts)):
            raise TypeError("inputs, files and facts must be objects")
        return found
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged", got=error, fix="delete it and run the stage again") from error


def is_current(folder: Path, kind: str, inputs: Mapping[str, Any]) -> bool:
    """Whether a finished stage in `folder` was made from exactly these inputs and its files are still intact."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.kind != kind:
        return False
    if sha256_json(manifest.inputs) != sha256_json(inputs):
        return False
    return all(
        (folder / name).is_file() and sha256_file(folder / name) == digest for name, digest in manifest.files.items()
    )
