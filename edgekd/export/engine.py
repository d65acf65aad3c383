"""ONNX to a TensorRT plan, by one path for 8.5 to 11.x.

Precision lives in the ONNX. Where TensorRT can be strongly typed (from 10.12) the graph's types are all it is told;
below that the FP16 and INT8 flags are read off the graph, see `runtimes.trt_precision`. What was really built is read
back from the inspector.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import atomic_path, cache_folder, sha256_json
from edgekd.errors import ExportError, MissingDependencyError, UserError
from edgekd.machine import memory_bytes
from edgekd.runtimes.cuda_driver import DeviceFacts
from edgekd.runtimes.engine_file import Hardware
from edgekd.runtimes.trt_api import (
    create_builder,
    create_network,
    is_strongly_typed,
    layers_of,
    logger_of,
    memory_of,
    open_engine,
    optional,
    parse_onnx,
    said,
    tensorrt,
    tensors_of,
)
from edgekd.runtimes.trt_precision import precision_flags, set_precision

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekd.export.onnx import Precision

_MIB = 2**20
_QUANTISING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
"""The last is for other runtimes: TensorRT itself says that it cannot read it."""


@dataclass(frozen=True)
class EngineOptions:
    """What can be asked of the builder; the defaults ask for nothing special.

    Attributes:
        workspace_mib: limit of scratch memory; TensorRT's own (all of the GPU's) if left out, half of what is free
            where the GPU's memory is the CPU's too, as on a Jetson.
        level: builder optimisation level, 0 (quick) to 5 (thorough); TensorRT's own if left out.
        batch: (least, usual, most) images; (1, 1, 1) is a fixed batch.
        version_compatible: later versions of the same major one may run the engine; larger and a little slower.
        hardware: "exact" GPU, any of the "same-capability" (TensorRT 10.13), or "ampere+" (any from compute 8.0).
        dla_core: build for this core of a Jetson's DLA; what it cannot run falls back to the GPU.
        library_tactics: let TensorRT 8 and 10 try cuBLAS and cuDNN, where those are installed.
        timing_cache: folder of timing caches; in the user's cache folder if left out.
    """

    workspace_mib: int | None = None
    level: int | None = None
    batch: tuple[int, int, int] = (1, 1, 1)
    version_compatible: bool = False
    hardware: Hardware = "exact"
    dla_core: int | None = None
    library_tactics: bool = True
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        least, usual, most = self.batch
        if not 1 <= least <= usual <= most:
            raise UserError(
                "a batch profile that does not rise", got=self.batch, expected="1 <= least <= usual <= most"
            )
        if self.level is not None and not 0 <= self.level <= 5:
            raise UserError("unknown optimisation level", got=self.level, expected="0 to 5")
        if self.dla_core is not None and least != most:
            raise UserError("a DLA takes one batch size", got=self.batch, expected="a number, such as --batch 1")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UserError("no workspace at all", got=f"{self.workspace_mib} MiB", expected="1 MiB or more")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without this machine's paths."""
        return {**asdict(self), "batch": list(self.batch), "timing_cache": None}


@dataclass(frozen=True)
class BuiltEngine:
    """A plan and what it turned out to be; see `runtimes.engine_file.EngineManifest`."""

    plan: bytes
    tensorrt: str
    strongly_typed: bool
    flags: tuple[str, ...]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    layers: list[dict[str, Any]]
    memory_bytes: int
    notes: tuple[str, ...] = field(default_factory=tuple)


def graph_precision(model: ModelProto) -> Precision:
    """What a graph's own types make it: int8 if it quantises anything, else fp16 with float16 tensors, else fp32."""
    if any(node.op_type in _QUANTISING for node in model.graph.node):
        return "int8"
    return "fp16" if has_half(model) else "fp32"


def has_half(model: ModelProto) -> bool:
    """Whether float16 tensors are in a graph: TensorRT before 10.12 must be told."""
    from onnx import TensorProto

    half, graph = TensorProto.FLOAT16, model.graph
    attributes = [(node.op_type, entry) for node in graph.node for entry in node.attribute]
    casts = (entry.i for kind, entry in attributes if (kind, entry.name) == ("Cast", "to"))
    constants = (entry.t.data_type for kind, entry in attributes if (kind, entry.name) == ("Constant", "value"))
    return half in (
        *(tensor.data_type for tensor in graph.initializer),
        *(info.type.tensor_type.elem_type for info in graph.input),
        *casts,
        *constants,
    )


def build_engine(model: ModelProto, options: EngineOptions, device: DeviceFacts) -> BuiltEngine:
    """Build a plan for the GPU here.

    Args:
        model: as TensorRT shall see it; its types say the precision.
        device: the GPU here, for the timing cache's name and a Jetson's memory.

    Raises:
        MissingDependencyError: TensorRT or a GPU is missing, or this version cannot do what was asked for.
        ExportError: TensorRT cannot read or build the model, or built another precision than the graph's.
        UserError: options that do not fit the model or the machine.
    """
    trt = tensorrt()
    logger = logger_of(trt)
    logger.clear()
    precision = graph_precision(model)
    strongly_typed = is_strongly_typed(trt, dla=options.dla_core is not None)
    builder = create_builder(trt, logger)
    network = create_network(trt, builder, strongly_typed=strongly_typed)
    parse_onnx(trt, network, model.SerializeToString())
    config = builder.create_builder_config()
    wanted = precision_flags(precision, half_inside=has_half(model), strongly_typed=strongly_typed)
    flags = set_precision(trt, network, config, wanted)
    flags += _set_options(trt, builder, config, options, precision, device)
    _set_profile(builder, network, config, options)
    on_dla = () if options.dla_core is None else (_on_dla(network, config),)
    cache_file = _timing_cache_file(trt, options, device)
    timing_cache = _attach_timing_cache(config, cache_file)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT {trt.__version__} could not build this engine", got=said(logger))
    plan_bytes = bytes(plan)
    if timing_cache is not None:
        _keep_timing_cache(timing_cache, cache_file)
    return _describe(trt, plan_bytes, precision, strongly_typed, flags, options, on_dla)


def _set_options(
    trt: Any, builder: Any, config: Any, options: EngineOptions, precision: Precision, device: DeviceFacts
) -> list[str]:
    """Everything else that was asked for; returns the flags that were set."""
    flags = []
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector then tells precisions
    workspace = _workspace_bytes(options, device)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if options.level is not None:
        optional(config, "builder_optimization_level", "TensorRT 8.6")
        config.builder_optimization_level = options.level
    if options.version_compatible:
        config.set_flag(optional(trt.BuilderFlag, "VERSION_COMPATIBLE", "TensorRT 8.6"))
        flags.append("VERSION_COMPATIBLE")
    if options.hardware != "exact":
        levels = optional(trt, "HardwareCompatibilityLevel", "TensorRT 8.6")
        optional(config, "hardware_compatibility_level", "TensorRT 8.6")
        if options.hardware == "ampere+":
            config.hardware_compatibility_level = optional(levels, "AMPERE_PLUS", "TensorRT 8.6")
        else:
            config.hardware_compatibility_level = optional(levels, "SAME_COMPUTE_CAPABILITY", "TensorRT 10.13")
    if not options.library_tactics:
        sources = config.get_tactic_sources()
        for name in ("CUBLAS", "CUBLAS_LT", "CUDNN"):
            if hasattr(trt.TacticSource, name):  # gone in 11, where they are never used
                sources &= ~(1 << int(getattr(trt.TacticSource, name)))
        if not config.set_tactic_sources(sources):
            raise ExportError("TensorRT did not take its tactic sources", got=said(logger_of(trt)))
    if options.dla_core is not None:
        flags += _set_dla(trt, builder, config, options.dla_core, precision)
    return flags


def _set_dla(trt: Any, builder: Any, config: Any, core: int, precision: Precision) -> list[str]:
    cores = int(builder.num_DLA_cores)
    if core >= cores:
        raise MissingDependencyError(
            "this device has no such DLA core",
            got=f"core {core}, TensorRT {trt.__version__}",
            expected=f"one of {cores}" if cores else "a Jetson with a DLA; TensorRT 10.7 is the last to drive one",
        )
    if precision != "fp16":  # GPU_FALLBACK would quietly run all of it on the GPU
        raise UserError("a DLA takes fp16 models only, no Q/DQ pairs", got=precision, fix="--precision fp16")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    return ["GPU_FALLBACK"]


def _on_dla(network: Any, config: Any) -> str:
    """What to say of a network that is set to run on a DLA.

    Raises:
        ExportError: no layer of it can; GPU_FALLBACK would quietly run all of it on the GPU.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    able = sum(bool(config.can_run_on_DLA(layer)) for layer in layers)
    if not able:
        raise ExportError(
            "the DLA can run no layer of this model",
            got=f"{len(layers)} layers for the GPU",
            fix="export without --dla",
        )
    return f"the DLA can run {able} of {len(layers)} layers, the GPU runs the others"


def _workspace_bytes(options: EngineOptions, device: DeviceFacts) -> int | None:
    """The limit to set: as asked, never more than is left of memory that the CPU shares (which would end in a kill)."""
    free = memory_bytes()[1] if device.integrated else None
    if options.workspace_mib is None:
        return None if free is None else free // 2
    wanted = options.workspace_mib * _MIB
    if free is not None and wanted > free:
        raise UserError(
            "less memory is free than the workspace asks for",
            got=f"{free // _MIB} MiB free, shared by CPU and GPU",
            expected=f"{options.workspace_mib} MiB",
            fix="close other programs, or ask for a smaller workspace",
        )
    return wanted


def _set_profile(builder: Any, network: Any, config: Any, options: EngineOptions) -> None:
    """A profile where the graph leaves the batch open; a fixed one must be what was asked for."""
    image = network.get_input(0)
    shape = tuple(int(extent) for extent in image.shape)
    if any(extent < 0 for extent in shape[1:]):
        raise UserError(
            "an engine needs a fixed input size", got=shape, fix="export the ONNX file with a fixed height and width"
        )
    if shape[0] >= 0:
        if options.batch not in ((1, 1, 1), (shape[0],) * 3):
            raise UserError(
                "the batch is fixed in this ONNX model",
                got=f"batch {shape[0]}",
                expected=f"an open one, for {options.batch}",
                fix="export from the run, or an ONNX file with --dynamic-batch",
            )
        return
    profile = builder.create_optimization_profile()
    profile.set_shape(image.name, *((batch, *shape[1:]) for batch in options.batch))
    if config.add_optimization_profile(profile) < 0:
        raise ExportError("TensorRT did not take the batch profile", got=options.batch)


def _timing_cache_file(trt: Any, options: EngineOptions, device: DeviceFacts) -> Path:
    """One cache for each TensorRT, GPU and L4T release, since timings hold for nothing else."""
    folder = options.timing_cache or cache_folder() / "tensorrt"
    key = {"tensorrt": trt.__version__, **device.key(), "dla": options.dla_core}
    return folder / f"timing-{trt.__version__}-{sha256_json(key)[:16]}.cache"


def _attach_timing_cache(config: Any, file: Path) -> Any:
    """The cache that the build uses; it must live until the build is over."""
    try:
        known = file.read_bytes()
    except OSError:
        known = b""
    for content in (known, b"") if known else (known,):  # one that is damaged or another driver's is begun again
        timing_cache = config.create_timing_cache(content)
        if timing_cache is not None and config.set_timing_cache(timing_cache, False):
            return timing_cache
    return None


def _keep_timing_cache(timing_cache: Any, file: Path) -> None:
    # A full disk or a read-only home costs only the next build's time.
    content = timing_cache.serialize()
    if content is not None:
        with contextlib.suppress(OSError), atomic_path(file) as temporary:
            temporary.write_bytes(bytes(content))


def _describe(
    trt: Any,
    plan: bytes,
    precision: Precision,
    strongly_typed: bool,
    flags: list[str],
    options: EngineOptions,
    on_dla: tuple[str, ...],
) -> BuiltEngine:
    """Read back what was built.

    Raises:
        ExportError: no layer runs in the graph's precision.
    """
    _runtime, engine = open_engine(trt, plan, host_code=options.version_compatible)
    inputs, outputs = tensors_of(trt, engine)
    layers = layers_of(trt, engine)
    known = {layer["precision"] for layer in layers} - {None}
    if known and precision not in known:
        raise ExportError(
            f"TensorRT built an {precision} model without a single {precision} layer",
            got=", ".join(sorted(known)),
            expected=precision,
            fix="export fp32: at this size TensorRT finds nothing faster",
        )
    notes = on_dla if known else (*on_dla, "the inspector does not say in which precision layers run")
    return BuiltEngine(
        plan,
        trt.__version__,
        strongly_typed,
        tuple(flags),
        inputs,
        outputs,
        layers,
        memory_of(engine),
        notes,
    )
