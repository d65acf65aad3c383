"""What a file is before it runs: its size, hash, precision, parameters and multiply-accumulates."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal

from edgekd.artifact import is_onnx
from edgekd.bench.layers import graph_layers, inferred, stored_shapes
from edgekd.errors import ArtifactError, EdgeKDError
from edgekd.runtimes.engine_file import ENGINE_SUFFIXES, read_engine_manifest
from edgekd.runtimes.model_files import external_files, sha256_model, weights_precision

CountedFrom = Literal["detector", "graph"]


@dataclass(frozen=True)
class ArtifactFacts:
    """Facts of one artefact; None where a count would be a guess.

    Attributes:
        file: what is deployed: the artefact itself, or the detector in a run folder.
        size_bytes: of it, with the external data of an ONNX file.
        precision: "fp32", "fp16" or "int8": of most weights.
        parameters: trainable ones of the detector, or of the graph's layers (BatchNorm is folded into those).
        macs: multiply-accumulates of convolutions and matrix products, one image.
        counted_from: the native detector's definition, or the graph.
    """

    file: Path
    sha256: str
    size_bytes: int
    precision: str
    parameters: int | None
    macs: int | None
    counted_from: CountedFrom | None


def describe_artifact(path: Path, input_hw: tuple[int, int] | None = None) -> ArtifactFacts:
    """Read what there is to know of an ONNX file, checkpoint or run folder without running it.

    Args:
        path: the artefact.
        input_hw: the size it runs at where the graph leaves it open; its MACs depend on it.

    Raises:
        ArtifactError: it is missing or cannot be read.
    """
    file = deployed_file(path)
    sha256 = sha256_model(file)
    if file.suffix.lower() in ENGINE_SUFFIXES:
        return _engine_facts(file)
    if not is_onnx(file):
        return ArtifactFacts(file, sha256, file.stat().st_size, "fp32", *_native_counts(file))
    import onnx

    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's errors share no useful base class
        raise ArtifactError(f"{file}: not a readable ONNX file", got=str(error).splitlines()[0][:200]) from error
    if not model.graph.node:
        raise ArtifactError(f"{file}: not a readable ONNX file", got="a file without a graph")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    size = file.stat().st_size + sum(part.stat().st_size for part in external_files(file, model))
    counts = _spec_counts(metadata) or _graph_counts(model, input_hw)
    precision = metadata.get("edgekd.precision") or weights_precision(model)
    return ArtifactFacts(file, sha256, size, precision, *counts)


def _engine_facts(file: Path) -> ArtifactFacts:
    """An engine's facts stand in its manifest; counts are of the native detector that it came from."""
    manifest = read_engine_manifest(file)
    spec = {} if manifest.spec is None else {"edgekd.spec": json.dumps(manifest.spec)}
    counts = _spec_counts(spec) or (None, None, None)
    return ArtifactFacts(file, manifest.plan_sha256, file.stat().st_size, manifest.precision, *counts)


def deployed_file(path: Path) -> Path:
    """The file that is run: `path` itself, or the detector in a run folder.

    Raises:
        ArtifactError: there is none.
    """
    if path.is_dir():
        from edgekd.checkpoint import detector_file

        return detector_file(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file", expected="an ONNX file, a checkpoint or a finished run folder")
    return path


_Counts = tuple[int | None, int | None, CountedFrom | None]


def _native_counts(file: Path) -> _Counts:
    from edgekd.checkpoint import load_detector
    from edgekd.detectors.complexity import count_macs, count_parameters

    detector = load_detector(file)
    return count_parameters(detector), count_macs(detector), "detector"


def _spec_counts(metadata: Mapping[str, str]) -> _Counts | None:
    """Counts of the native detector that an ONNX file of ours was exported from."""
    return _counts_of(metadata["edgekd.spec"]) if "edgekd.spec" in metadata else None


@lru_cache(maxsize=64)  # a student alone, distilled and in several precisions is one detector
def _counts_of(spec: str) -> _Counts | None:
    from edgekd.types import DetectorSpec

    try:
        from edgekd.detectors import build_detector
        from edgekd.detectors.complexity import count_macs, count_parameters

        detector = build_detector(DetectorSpec.from_dict(json.loads(spec)))
        return count_parameters(detector), count_macs(detector), "detector"
    except (EdgeKDError, ValueError, ImportError):  # no torch, which a benchmark of engines does without
        return None  # a family that this version does not know; the graph can still be counted


_WEIGHTED = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (1, 2)),
    **dict.fromkeys(("MatMul", "MatMulInteger"), (0, 1)),
    **dict.fromkeys(("PRelu", "ConvInteger"), (1,)),
    **dict.fromkeys(("QLinearConv", "QGemm"), (3, 8)),
    "QLinearMatMul": (0, 3),
}
"""Operators with learnt inputs, and which inputs those may be."""


def _graph_counts(model: Any, input_hw: tuple[int, int] | None) -> _Counts:
    """Parameters and MACs as the graph's own layers have them; MACs None where a shape is open."""
    graph = inferred(model, input_hw)
    stored = stored_shapes(graph)
    learnt: dict[str, int] = {}
    for node in graph.node:
        for position in _WEIGHTED.get(node.op_type, ()):
            if position < len(node.input) and node.input[position] in stored:
                learnt[node.input[position]] = prod(stored[node.input[position]])
    macs = [layer.macs for layer in graph_layers(graph)]
    total = None if None in macs else sum(count for count in macs if count is not None) // _fixed_batch(graph, stored)
    return sum(learnt.values()) or None, total or None, "graph"


def _fixed_batch(graph: Any, stored: Collection[str]) -> int:
    """How many images the graph always computes at once; 1 where it leaves that open."""
    shapes = (info.type.tensor_type.shape.dim for info in graph.input if info.name not in stored)
    return next((shape[0].dim_value or 1 for shape in shapes if len(shape) == 4), 1)
