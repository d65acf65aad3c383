"""FILE.engine and FILE.engine.json beside it: what an engine was built from, by what, for what; and whether it fits here.

TensorRT's plans hold for one version of TensorRT, one kind of GPU and one L4T release. What the manifest says is
checked before TensorRT sees the plan, since its own messages do not say what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from edgekd.artifact import sha256_file, write_json
from edgekd.errors import ArtifactError
from edgekd.runtimes.cuda_driver import DeviceFacts
from edgekd.runtimes.output_format import OutputFormat
from edgekd.runtimes.trt_api import version_numbers
from edgekd.types import PreprocessSpec

SCHEMA = "edgekd.engine/1"
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
Hardware = Literal["exact", "same-capability", "ampere+"]


@dataclass(frozen=True)
class EngineManifest:
    """What stands beside an engine.

    Attributes:
        plan_sha256: of the engine file.
        onnx_sha256: of the ONNX model that TensorRT was given, fixed TopK included.
        source: {"name", "sha256"} of what the user named: an ONNX file or a checkpoint. "path" is relative to the
            engine where it lies near it, so that a source that has changed since is noticed; "weights" are the SHA-256 by
            such paths of other files that an ONNX file keeps its weights in.
        precision: "fp32", "fp16" or "int8", as the graph has it.
        tensorrt: version. device: `DeviceFacts` as a dictionary.
        strongly_typed: whether precision came from the graph's types alone. flags: builder flags that were set.
        version_compatible: later versions of the same major one may run it. hardware: which GPUs may.
        options: everything else that was asked of the builder.
        inputs, outputs: name to {"shape", "dtype"}; -1 where a profile leaves it open.
        profile: (least, usual, most) images a batch.
        layers: one entry a layer, as the inspector says. memory_bytes: device memory for activations.
        class_names, preprocess, form: as `Predictor` takes them; `model`: the detector's name, None if foreign.
        spec: the native detector's spec, where there is one. parity: what the engine was compared with.
        rebuild: the command that builds it again.
        thresholds: what the detector was measured with, as `Selection` has it; empty where its source does not say.
    """

    plan_sha256: str
    onnx_sha256: str
    source: Mapping[str, Any]
    precision: str
    tensorrt: str
    device: Mapping[str, Any]
    strongly_typed: bool
    flags: tuple[str, ...]
    version_compatible: bool
    hardware: Hardware
    options: Mapping[str, Any]
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    profile: tuple[int, int, int]
    layers: tuple[Mapping[str, Any], ...]
    memory_bytes: int
    class_names: tuple[str, ...]
    preprocess: Mapping[str, Any]
    form: Mapping[str, Any]
    spec: Mapping[str, Any] | None
    parity: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    rebuild: str
    thresholds: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output_format(self) -> OutputFormat:
        """How the outputs are read."""
        return OutputFormat.from_dict(self.form)

    @property
    def preprocess_spec(self) -> PreprocessSpec:
        """How images are prepared."""
        return PreprocessSpec.from_dict(self.preprocess)

    def layer_precisions(self) -> dict[str, int]:
        """How many layers run in each number format, most first; "unknown" where the inspector does not say."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            key = layer["precision"] or "unknown"
            counts[key] = counts.get(key, 0) + 1
        return dict(sorted(counts.items(), key=lambda entry: -entry[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"schema": SCHEMA, **asdict(self), "layer_precisions": self.layer_precisions()}


def manifest_path(engine: Path) -> Path:
    """student.engine -> student.engine.json."""
    return engine.with_name(engine.name + ".json")


def write_engine_manifest(engine: Path, manifest: EngineManifest) -> None:
    """Write it beside the engine, which must be in place already."""
    write_json(manifest_path(engine), manifest.to_dict())


def read_engine_manifest(engine: Path) -> EngineManifest:
    """What stands beside an engine.

    Raises:
        ArtifactError: the engine or its manifest is missing or damaged, or they do not belong together.
    """
    if not engine.is_file():
        raise ArtifactError(f"{engine}: no such file", expected="an engine", fix=_export_hint(engine))
    path = manifest_path(engine)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{engine}: the manifest that belongs to it is missing",
            expected=path.name + " beside it; without it nothing says what this engine is or where it may run",
            fix=_export_hint(engine),
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged", got=error, fix=_export_hint(engine)) from error
    try:
        if data["schema"] != SCHEMA:
            raise ArtifactError(f"{path}: written by another version of edgekd", got=data["schema"], expected=SCHEMA)
        data.setdefault("thresholds", {})  # engines built before they were kept
        manifest = EngineManifest(**{entry.name: _as_tuple(data[entry.name]) for entry in fields(EngineManifest)})
        _ = manifest.output_format, manifest.preprocess_spec
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: damaged", got=f"{type(error).__name__}: {error}", fix=_export_hint(engine)
        ) from error
    found = sha256_file(engine)
    if found != manifest.plan_sha256:
        raise ArtifactError(
            f"{engine}: not the engine that its manifest speaks of",
            got=f"sha256 {found[:12]}",
            expected=f"sha256 {manifest.plan_sha256[:12]}",
            fix=manifest.rebuild,
        )
    return manifest


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _export_hint(engine: Path) -> str:
    return f"edgekd export RUN --format engine --out {engine}"


def check_fits(engine: Path, manifest: EngineManifest, tensorrt: str, device: DeviceFacts) -> None:
    """Refuse an engine that is stale (its source has changed) or foreign (built for something else).

    Args:
        tensorrt: the version here. device: the GPU here.

    Raises:
        ArtifactError: it does not fit; `fix` is the command that builds it again.
    """
    for what, here, built in _differences(engine, manifest, tensorrt, device):
        raise ArtifactError(
            f"{engine}: this engine was built for another {what}", got=built, expected=here, fix=manifest.rebuild
        )


def _differences(
    engine: Path, manifest: EngineManifest, tensorrt: str, device: DeviceFacts
) -> list[tuple[str, object, object]]:
    """(what, here, when it was built) of everything that does not fit."""
    found: list[tuple[str, object, object]] = []
    sources = {manifest.source.get("path"): manifest.source["sha256"], **manifest.source.get("weights", {})}
    for source, built in sources.items():
        if source is not None and (engine.parent / source).is_file():
            now = sha256_file(engine.parent / source)
            if now != built:
                found.append((f"{source}", f"sha256 {now[:12]}", f"sha256 {built[:12]}"))
    if not _version_fits(manifest, tensorrt):
        found.append(("TensorRT", tensorrt, manifest.tensorrt))
    capability = str(manifest.device["compute_capability"])
    if not _hardware_fits(manifest.hardware, capability, device.compute_capability):
        here = f"compute capability {device.compute_capability} ({device.name})"
        found.append(("GPU", here, f"compute capability {capability} ({manifest.device['name']})"))
    if manifest.device["l4t"] != device.l4t:
        here, built = (value or "none: not a Jetson" for value in (device.l4t, manifest.device["l4t"]))
        found.append(("L4T release", here, built))
    return found


def _version_fits(manifest: EngineManifest, here: str) -> bool:
    built, now = version_numbers(manifest.tensorrt), version_numbers(here)
    if manifest.version_compatible:
        return built[:1] == now[:1] and now >= built
    return built == now


def _hardware_fits(hardware: Hardware, built: str, here: str) -> bool:
    if hardware == "ampere+":
        return version_numbers(here) >= (8, 0)
    return built == here
