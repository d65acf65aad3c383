"""A bundle: a folder with all that a device needs to check and measure detectors, and nothing that it does not.

The device needs Python, NumPy and TensorRT or ONNX Runtime. The program in a bundle is edgekd's own modules, copied: what
is tested here is what runs there.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.artifact import MANIFEST_NAME, is_onnx, sha256_file, source_commit, versions, write_json, write_text
from edgekd.bench.complexity import describe_artifact
from edgekd.bench.entries import BenchArtifact
from edgekd.bench.roof import bytes_moved, product_models
from edgekd.data.images import evenly_spread, load_image
from edgekd.device.bundle_bench import BUNDLE_SCHEMA, read_bundle
from edgekd.device.bundle_program import readme, write_program
from edgekd.errors import ArtifactError, UserError, is_full, refusal
from edgekd.export.images import generated_scenes
from edgekd.preprocess import normalise, resize
from edgekd.recipe import ExportConfig
from edgekd.runtimes.model_files import external_files
from edgekd.runtimes.onnx_file import open_onnx
from edgekd.types import Dataset, ImageArray

if TYPE_CHECKING:
    from edgekd.export.job import ExportData
    from edgekd.export.onnx import Precision
    from edgekd.runtimes.onnx_session import OnnxRuntime

GOLDEN_IMAGES = 4
GOLDEN_FILE = "golden.npz"
ENGINES = "engines"
"""Where a bundle's program keeps the engines that it built, which takes minutes."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written.

    Attributes:
        sha256: of its manifest, which holds the hash of every other file: the bundle's identity.
        size_bytes: of all files. notes: what the user should know.
    """

    folder: Path
    sha256: str
    size_bytes: int
    models: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "folder": str(self.folder), "models": list(self.models), "notes": list(self.notes)}


def make_bundle(
    sources: Sequence[BenchArtifact],
    out: Path,
    *,
    precisions: Sequence[Precision] | None = None,
    config: ExportConfig | None = None,
    data: ExportData | None = None,
    say: Say | None = None,
) -> Bundle:
    """Write a bundle of runs, checkpoints (exported in every precision) and ONNX files (as they are) to folder `out`.

    The folder appears complete or not at all. An earlier bundle there is replaced (engines built from it stay, under
    their models' hashes), unless something lies in it that is not the bundle's: that is never deleted.

    Args:
        precisions: of runs and checkpoints, fp32 if left out; ONNX files must be of one of them if given.
        config: how runs are exported; int8 is laid out for TensorRT if left out.
        data: real images to calibrate, compare and make golden outputs on; generated ones if left out.

    Raises:
        UserError: `out` holds anything else, if only beside a bundle; or a precision that is not there.
        ArtifactError: a source cannot be read, or takes more inputs than an image.
        ParityError: an export does not agree with its original. EdgeKDError: the disk is full.
    """
    out = Path(out)
    _clear_killed(out)
    _refuse_foreign(out)
    if not sources:
        raise UserError("there is nothing to bundle", expected="a run folder, a checkpoint or ONNX files")
    say = say or (lambda text: None)
    notes: list[str] = []
    dataset = None if data is None else data.for_parity
    with _folder_in_place(out) as folder:
        models, arrays = [], dict[str, Any]()
        images, names = _golden_images(dataset)
        for source, file in _exported(sources, folder, precisions, config, data, say, notes):
            say(f"golden outputs of {file.name}")
            models.append(_describe(source, file, images, arrays))
        if dataset is None:
            notes.append("golden outputs are on generated scenes: give real images with --data DIR")
        np.savez_compressed(folder / GOLDEN_FILE, allow_pickle=False, **arrays)
        write_program(folder)
        for precision, product in product_models().items():
            (folder / f"roof.{precision}.onnx").write_bytes(product)
        write_text(folder / "README.md", readme(models))
        golden = {"file": GOLDEN_FILE, "images": names, "generated": dataset is None}
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_json(
            folder / MANIFEST_NAME,
            {
                "schema": BUNDLE_SCHEMA,
                "commit": source_commit(),
                "versions": versions(),
                "models": models,
                "golden": golden,
                "roof": {precision: f"roof.{precision}.onnx" for precision in product_models()},
                "files": {name: sha256_file(folder / name) for name in files},
            },
        )
    manifest = read_bundle(out)
    size = sum((out / name).stat().st_size for name in manifest["files"])
    return Bundle(out, manifest["sha256"], size, tuple(models), tuple(dict.fromkeys(notes)))


def is_bundle(folder: Path) -> bool:
    """Whether a folder calls itself a bundle, intact or not."""
    try:
        found = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("schema") == BUNDLE_SCHEMA


def _refuse_foreign(out: Path) -> None:
    """Only an empty folder may be replaced, or an earlier bundle with nothing else in it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_bundle(out):
        raise UserError("this is there already, and no bundle", got=out, expected="a new name for a folder")
    if others := _others(out):
        more = f", and {len(others) - 5} more" if len(others) > 5 else ""
        raise UserError(
            f"{out}: there is a bundle with other files in it, which would be deleted",
            got=", ".join(others[:5]) + more,
            expected="a new name, or a bundle as it was made",
            fix="move them away (a result.json speaks of the models that are there now), or choose another folder",
        )


def _others(bundle: Path) -> list[str]:
    """Files in a bundle's folder that its manifest does not list; not what its program leaves for itself."""
    listed = json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8")).get("files")
    known = {MANIFEST_NAME, *(listed if isinstance(listed, dict) else ())}
    there = [path for path in bundle.rglob("*") if path.is_symlink() or not path.is_dir()]
    places = {path.relative_to(bundle) for path in there}
    kept = {place for place in places if "__pycache__" in place.parts or place.parts[0] == ENGINES}
    return sorted(place.as_posix() for place in places - kept if place.as_posix() not in known)


@contextlib.contextmanager
def _folder_in_place(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place on success."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    held = os.open(work, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: what is left behind stays
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = work / "new"
        folder.mkdir()
        yield folder
        if out.exists():
            os.replace(out, work / "old")
        os.replace(folder, out)
        if (work / "old" / ENGINES).is_dir():
            os.replace(work / "old" / ENGINES, out / ENGINES)
    except OSError as error:
        if is_full(error):  # which names a file that was copied, or none
            raise refusal(error, out) from error
        raise
    finally:
        _put_back(work, out)
        os.close(held)


def _put_back(work: Path, out: Path) -> None:
    """Remove a temporary folder, and bring back the bundle in it where nothing has taken its place."""
    if (work / "old").exists() and not out.exists():
        os.replace(work / "old", out)
    shutil.rmtree(work, ignore_errors=True)


def _clear_killed(out: Path) -> None:
    """Remove what processes that were killed have left beside `out`; a living one holds its folder."""
    for work in out.parent.glob(f".{glob.escape(out.name)}.????????"):
        with contextlib.suppress(OSError):  # a file, another's folder, or one whose process lives
            names = {path.name for path in work.iterdir()}
            if work.is_symlink() or not names or not names <= {"new", "old"}:  # empty: about to be held
                continue
            held = os.open(work, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _put_back(work, out)
            finally:
                os.close(held)


def _exported(
    sources: Sequence[BenchArtifact],
    folder: Path,
    precisions: Sequence[Precision] | None,
    config: ExportConfig | None,
    data: ExportData | None,
    say: Say,
    notes: list[str],
) -> Iterator[tuple[BenchArtifact, Path]]:
    """(source, ONNX file in the bundle) of everything."""
    from edgekd.export.job import export_run

    config = config or ExportConfig(target="tensorrt")
    for source in sources:
        stem = "model" if len(sources) == 1 else _slug(source.name)
        if is_onnx(source.path):
            precision = describe_artifact(source.path).precision
            if precisions is not None and precision not in precisions:
                raise UserError(
                    f"{source.path}: an ONNX file is bundled as it is",
                    got=precision,
                    expected=" or ".join(precisions),
                    fix="give the run or checkpoint, from which every precision can be made",
                )
            yield source, _copy_onnx(source.path, _unused(folder, stem, precision))
            continue
        for wanted in precisions or ("fp32",):
            file = _unused(folder, stem, wanted)
            say(f"exporting {source.name} as {wanted}")
            result = export_run(source.path, file, precision=wanted, config=config, data=data, say=say)
            notes += result.notes
            yield source, file


def _slug(name: str) -> str:
    """A name that is safe in any file system and shell."""
    plain = re.sub(r"[.-]?(fp32|fp16|int8)$", "", re.sub(r"[^A-Za-z0-9_-]+", "-", name))
    return plain.strip("-") or "model"


def _unused(folder: Path, stem: str, precision: str) -> Path:
    number, file = 2, folder / f"{stem}.{precision}.onnx"
    while file.exists():
        file, number = folder / f"{stem}-{number}.{precision}.onnx", number + 1
    return file


def _copy_onnx(source: Path, file: Path) -> Path:
    """The file as it is; weights that lie beside it are taken in."""
    if external_files(source):
        import onnx

        onnx.save(onnx.load(str(source)), str(file))
    else:
        shutil.copyfile(source, file)
    return file


def _golden_images(dataset: Dataset | None) -> tuple[list[ImageArray], list[str]]:
    """A few pictures, (H, W, 3) uint8 RGB, with names."""
    if dataset is not None and len(dataset):
        paths = evenly_spread(dataset.records, GOLDEN_IMAGES)
        return [load_image(path) for path in paths], [path.name for path in paths]
    with tempfile.TemporaryDirectory(prefix="edgekd-scenes-") as folder:
        paths = generated_scenes(Path(folder))[:GOLDEN_IMAGES]
        return [load_image(path) for path in paths], [f"generated scene {path.name}" for path in paths]


def _can_be_fed(runtime: OnnxRuntime) -> bool:
    """Whether `device.sessions` and TensorRT's runtime give a model what it takes."""
    (image,) = runtime.inputs
    plain = image.type in ("tensor(float)", "tensor(float16)") and not runtime.channels_last
    return plain and len(image.shape) == 4 and image.shape[0] in (1, None)


def _describe(
    source: BenchArtifact, file: Path, images: Sequence[ImageArray], arrays: dict[str, Any]
) -> dict[str, Any]:
    """A model's entry in the manifest; puts its inputs and expected outputs into `arrays`."""
    import onnx

    from edgekd.export.engine import has_half
    from edgekd.export.parity import TOLERANCES

    opened = open_onnx(file, source.options, provider="cpu", threads=1)
    with opened.runtime as runtime:
        if len(runtime.inputs) != 1:
            raise ArtifactError(
                f"{source.path}: a bundle holds models with one input",
                got=", ".join(str(info) for info in runtime.inputs),
                expected="the image alone",
            )
        if not _can_be_fed(runtime):
            raise ArtifactError(
                f"{source.path}: a bundle feeds models one image at a time, channels first, in floating point",
                got=str(runtime.inputs[0]),
                expected="an input (B, 3, H, W) of float32 or float16, B 1 or open",
                fix="export it so; `edgekd bench` without --target measures it as it is",
            )
        key, outputs_key = f"images/{file.name}", f"outputs/{file.name}"
        prepared = [resize(image, opened.preprocess)[0] for image in images]
        arrays[key] = np.stack(prepared)
        for index, picture in enumerate(prepared):
            for name, value in runtime.run(normalise(picture, opened.preprocess)).items():
                arrays[f"{outputs_key}/{index}/{name}"] = np.array(value)
        shape = list(runtime.input_shape[:2]) + list(opened.preprocess.input_hw)
        image, outputs = runtime.inputs[0], runtime.outputs
    facts = describe_artifact(file, opened.preprocess.input_hw)
    precision = facts.precision if facts.precision in TOLERANCES else "fp32"
    return {
        "name": source.name,
        "role": source.role,
        "file": file.name,
        "sha256": facts.sha256,
        "size_bytes": facts.size_bytes,
        "precision": precision,
        "half_inside": has_half(onnx.load(str(file), load_external_data=False)),
        "target": opened.facts.get("target"),
        "input": {"name": image.name, "shape": shape, "dtype": image.type},
        "outputs": [{"name": info.name, "shape": list(info.shape), "dtype": info.type} for info in outputs],
        "preprocess": opened.preprocess.to_dict(),
        "class_names": list(opened.class_names),
        "output_format": opened.form.to_dict(),
        "tolerance": asdict(TOLERANCES[precision]),
        "golden": {"images": key, "outputs": outputs_key},
        "parameters": facts.parameters,
        "macs": facts.macs,
        "bytes_moved": bytes_moved(file, opened.preprocess.input_hw),
    }
