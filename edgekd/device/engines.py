"""Engines on the target: built from a bundled ONNX model once, and kept under everything that decides what they are.

The rules of TensorRT's versions stand in `edgekd.runtimes.trt_api`; the graph's precision stands in the bundle's
manifest, so that no `onnx` package is needed here.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.artifact import atomic_path, sha256_json
from edgekd.errors import ArtifactError, ExportError
from edgekd.machine import memory_bytes
from edgekd.runtimes.cuda_driver import CudaDriver, DeviceFacts
from edgekd.runtimes.engine_file import EngineManifest, check_fits, read_engine_manifest, write_engine_manifest
from edgekd.runtimes.trt_api import (
    create_builder,
    create_network,
    is_strongly_typed,
    layers_of,
    logger_of,
    memory_of,
    open_engine,
    parse_onnx,
    said,
    tensorrt,
    tensors_of,
)
from edgekd.runtimes.trt_precision import precision_flags, set_precision


def engine_for(file: Path, model: Mapping[str, Any], cache: Path) -> tuple[Path, dict[str, Any]]:
    """The engine of a bundled model for this device, and how it came about.

    Raises:
        MissingDependencyError: no TensorRT, or no GPU. ExportError: TensorRT cannot build this model.
    """
    trt = tensorrt()
    driver = CudaDriver()
    device = driver.facts()
    flags = precision_flags(model["precision"], half_inside=model["half_inside"], strongly_typed=is_strongly_typed(trt))
    key = {"onnx": model["sha256"], "flags": flags, "tensorrt": trt.__version__, "device": device.key()}
    engine = cache / f"{sha256_json(key)[:32]}.engine"
    try:
        manifest = read_engine_manifest(engine)
        check_fits(engine, manifest, trt.__version__, device)
        built_s = None
    except ArtifactError:  # not built yet, damaged, or no longer fitting: build it
        started = time.monotonic()
        manifest = _build(trt, file, model, engine, flags, device)
        built_s = round(time.monotonic() - started, 1)
    return engine, {
        "tensorrt": trt.__version__,
        "device": device.to_dict(),
        "flags": list(manifest.flags),
        "strongly_typed": manifest.strongly_typed,
        "layer_precisions": manifest.layer_precisions(),
        "memory_bytes": manifest.memory_bytes,
        "from_cache": built_s is None,
        "build_seconds": built_s,
    }


def _build(
    trt: Any, file: Path, model: Mapping[str, Any], engine: Path, flags: list[str], device: DeviceFacts
) -> EngineManifest:
    logger = logger_of(trt)
    logger.clear()
    strongly_typed = is_strongly_typed(trt)
    builder = create_builder(trt, logger)
    network = create_network(trt, builder, strongly_typed=strongly_typed)
    parse_onnx(trt, network, file.read_bytes())
    image = network.get_input(0)
    if any(extent < 0 for extent in image.shape):  # one image of the size that was bundled
        image.shape = tuple(model["input"]["shape"])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    flags = set_precision(trt, network, config, flags)
    free = memory_bytes()[1] if device.integrated else None
    if free is not None:  # the CPU's memory too, as on a Jetson: all of it as workspace ends in a kill
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, free // 2)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"TensorRT {trt.__version__} could not build {file.name}",
            got=said(logger),
            fix="where memory is short: close other programs, stop the desktop, add swap; else --provider cuda or cpu",
        )
    manifest = _manifest(trt, bytes(plan), model, flags, strongly_typed, device)
    with atomic_path(engine) as temporary:
        temporary.write_bytes(bytes(plan))
    write_engine_manifest(engine, manifest)
    return manifest


def _manifest(
    trt: Any, plan: bytes, model: Mapping[str, Any], flags: list[str], strongly_typed: bool, device: DeviceFacts
) -> EngineManifest:
    """What was built, read back from the engine."""
    _runtime, engine = open_engine(trt, plan)
    inputs, outputs = tensors_of(trt, engine)
    return EngineManifest(
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        onnx_sha256=model["sha256"],
        source={"name": model["file"], "sha256": model["sha256"]},
        precision=model["precision"],
        tensorrt=trt.__version__,
        device=device.to_dict(),
        strongly_typed=strongly_typed,
        flags=tuple(flags),
        version_compatible=False,
        hardware="exact",
        options={},
        inputs=inputs,
        outputs=outputs,
        profile=(1, 1, 1),
        layers=tuple(layers_of(trt, engine)),
        memory_bytes=memory_of(engine),
        class_names=tuple(model["class_names"]),
        preprocess=model["preprocess"],
        form=model["output_format"],
        spec=None,
        parity=None,
        provenance={},
        rebuild="delete it: bench.py builds it again",
    )
