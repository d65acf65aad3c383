"""A strict stand-in for TensorRT, one a version: it has that version's names and no others, and keeps its rules.

What it builds is the ONNX model itself; what it runs is ONNX Runtime, on the very addresses that it was given. So
build, cache, load, run and bench go whole on a machine without a GPU, and a name, flag or call that one version does
not have fails as it would there. `names.json` was read from NVIDIA's bindings; `test_tensorrt_contract` reads them again.
"""

from __future__ import annotations

import ctypes
import enum
import json
import types
from base64 import b64decode, b64encode
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.runtimes.cuda_driver import DeviceFacts

NAMES = json.loads((Path(__file__).parent / "names.json").read_text(encoding="utf-8"))
VERSIONS: tuple[str, ...] = tuple(NAMES["versions"])
ORIN = DeviceFacts("Orin", "8.7", 8 * 2**30, "12.6", "36.4.3", True)

ENUMS = (
    "BuilderFlag",
    "NetworkDefinitionCreationFlag",
    "MemoryPoolType",
    "HardwareCompatibilityLevel",
    "DeviceType",
    "LayerInformationFormat",
    "TensorIOMode",
    "ProfilingVerbosity",
    "DataType",
    "TacticSource",
    "LayerType",
)
_LAYER_TYPES = {
    "Conv": "CONVOLUTION",
    "ConvTranspose": "DECONVOLUTION",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "Shape": "SHAPE",
    "Constant": "CONSTANT",
    "Softmax": "SOFTMAX",
    "Add": "ELEMENTWISE",
    "Mul": "ELEMENTWISE",
    "Div": "ELEMENTWISE",
    "Exp": "UNARY",
    "Sqrt": "UNARY",
}
"""Of operators; those that begin with Reduce are REDUCE, the rest goes as SHUFFLE."""
_PRECISION_FLAGS = {"FP16", "BF16", "INT8", "FP8"}
_CONSTRAINTS = {"PREFER_PRECISION_CONSTRAINTS", "OBEY_PRECISION_CONSTRAINTS"}
_MAGIC = b"fake plan\n"


def members(version: str, name: str) -> frozenset[str]:
    """What a class has in a version."""
    found = NAMES["classes"][name]
    return frozenset([*found["every"], *(member for member, where in found["some"].items() if version in where)])


class Strict:
    """An object with a TensorRT class's names and no others; names that begin with _ are the fake's own."""

    _as = ""

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt

    def _check(self, name: str) -> None:
        if not name.startswith("_") and name not in members(self._trt.__version__, self._as):
            raise AttributeError(f"TensorRT {self._trt.__version__}: {self._as} has no {name}")

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "_check")(name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._check(name)
        object.__setattr__(self, name, value)


class FakeTensorRT(types.ModuleType):
    """The module `tensorrt` of one version on one device.

    Attributes:
        device: what it runs on. dla_cores: of the device. builds: how many plans were asked for.
        contexts: every execution context, for tests to look at.
    """

    def __init__(self, version: str, device: DeviceFacts = ORIN, *, dla_cores: int = 0, has_gpu: bool = True) -> None:
        super().__init__("tensorrt")
        assert version in VERSIONS, version
        self.__version__ = version
        self.__spec__ = ModuleSpec("tensorrt", None)  # torch's exporter asks for it
        self._device, self._dla_cores, self._has_gpu = device, dla_cores, has_gpu
        self._builds = 0
        self._contexts: list[_Context] = []
        for name in ENUMS:
            listed = sorted(members(version, name) - {"name", "value", "itemsize"})
            if listed:  # else this version lacks it altogether
                setattr(self, name, enum.IntEnum(name, {member: index for index, member in enumerate(listed)}))
        self.ILogger = type(
            "ILogger", (_Logger,), {"ERROR": 1, "INTERNAL_ERROR": 0, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
        )
        self.IProfiler = type("IProfiler", (_Logger,), {})

    @property
    def major(self) -> int:
        return int(self.__version__.split(".")[0])

    def __getattr__(self, name: str) -> Any:
        classes = {"Builder": _Builder, "OnnxParser": _Parser, "Runtime": _Runtime}
        if name in classes:
            return lambda *arguments: classes[name](self, *arguments)
        raise AttributeError(f"module 'tensorrt' {self.__version__} has no attribute {name!r}")


class _Logger:
    def __init__(self) -> None:
        pass


class _HostMemory(bytes):
    """`bytes(plan)` works as on the real one's buffer."""

    nbytes = property(len)


class _Builder(Strict):
    _as = "Builder"

    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        super().__init__(trt)
        assert isinstance(logger, trt.ILogger)
        if not trt._has_gpu:
            logger.log(trt.ILogger.WARNING, "CUDA initialization failure with error: 35")  # no error, as 8.5 and 8.6 do
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    @property
    def num_DLA_cores(self) -> int:  # noqa: N802, TensorRT's name
        return self._trt._dla_cores

    def create_network(self, flags: int = 0) -> _Network:
        return _Network(self._trt, flags)

    def create_builder_config(self) -> _Config:
        return _Config(self._trt)

    def create_optimization_profile(self) -> _Profile:
        return _Profile(self._trt)

    def build_serialized_network(self, network: _Network, config: _Config) -> _HostMemory | None:
        trt = self._trt
        trt._builds += 1
        problem = _problem_of(trt, network, config)
        if problem is not None:
            self._logger.log(trt.ILogger.ERROR, problem)
            return None
        if config._timing_cache is not None:
            config._timing_cache._entries += 1
        free = not network._strong and network._in_half()
        header = {
            "tensorrt": trt.__version__,
            "capability": trt._device.compute_capability,
            "compatible": "VERSION_COMPATIBLE" in config._flags,
            "hardware": config._hardware,
            "profile": config._profiles[0]._shapes if config._profiles else {},
            "detailed": config._verbosity == trt.ProfilingVerbosity.DETAILED,
            "flags": sorted(config._flags),
            "half": "FP16" in config._flags and (free or not config._flags & _CONSTRAINTS),
            "onnx": b64encode(network._model.SerializeToString()).decode(),
        }
        return _HostMemory(_MAGIC + json.dumps(header).encode())


def _problem_of(trt: FakeTensorRT, network: _Network, config: _Config) -> str | None:
    """What would make the real builder give None."""
    asked = config._flags & _PRECISION_FLAGS
    has = network._precisions()
    if network._strong and asked:
        return f"strongly typed networks do not take precision flags: {', '.join(sorted(asked))}"
    if not network._strong and has - {flag.lower() for flag in asked}:
        return f"the network has {', '.join(sorted(has))} tensors, but the builder flag is not set"
    if any(extent < 0 for extent in network._shape) and not config._profiles:
        return "network has dynamic or shape inputs, but no optimization profile has been defined"
    if config._device == trt.DeviceType.DLA:
        if "GPU_FALLBACK" not in config._flags:
            return "layers that a DLA cannot run, and no GPU_FALLBACK"
        if not has and not asked:
            return "a DLA runs fp16 and int8 alone"
    return None


class _Tensor(Strict):
    _as = "ITensor"

    def __init__(self, trt: FakeTensorRT, name: str, shape: tuple[int, ...], dtype: Any = None) -> None:
        super().__init__(trt)
        self.name, self.shape, self.dtype = name, shape, dtype


class _Network(Strict):
    _as = "INetworkDefinition"

    def __init__(self, trt: FakeTensorRT, flags: int) -> None:
        super().__init__(trt)
        known = {1 << int(flag): flag.name for flag in trt.NetworkDefinitionCreationFlag}
        names = {name for bit, name in known.items() if flags & bit}
        assert 0 <= flags < 2 * max(known), f"unknown network flags {flags}"
        self._explicit = trt.major >= 10 or "EXPLICIT_BATCH" in names
        self._strong = trt.major >= 11 or "STRONGLY_TYPED" in names
        self._model: Any = None
        self._shape: tuple[int, ...] = ()
        self._layers: list[_Layer] = []

    def _precisions(self) -> set[str]:
        """ "int8" and "fp16" as far as the graph has them."""
        from onnx import TensorProto

        found = set()
        if any(node.op_type == "QuantizeLinear" for node in self._model.graph.node):
            found.add("int8")
        halves = [tensor.data_type for tensor in self._model.graph.initializer]
        halves += [a.i for node in self._model.graph.node if node.op_type == "Cast" for a in node.attribute]
        if TensorProto.FLOAT16 in halves:
            found.add("fp16")
        return found

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(self._trt, self._model.graph.input[index].name, self._shape)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> _Layer:
        return self._layers[index]

    def _read_layers(self) -> None:
        """One layer an operator, with the types that the graph gives its tensors."""
        import onnx

        graph = onnx.shape_inference.infer_shapes(self._model).graph
        infos = (*graph.value_info, *graph.input, *graph.output)
        kinds = {info.name: info.type.tensor_type.elem_type for info in infos}
        self._layers = [_Layer(self._trt, node, kinds) for node in graph.node]

    def _in_half(self) -> bool:
        """Whether a decoded output comes from a layer that may run in float16, though float32 in the graph."""
        makers = {name: layer for layer in self._layers for name in layer._node.output}
        finals = (makers[output.name] for output in self._model.graph.output)
        return any(layer._free() for layer in finals)


class _Layer(Strict):
    _as = "ILayer"

    def __init__(self, trt: FakeTensorRT, node: Any, kinds: dict[str, int]) -> None:
        super().__init__(trt)
        self._node, self._kinds = node, kinds
        self._held: set[str] = set()
        self._precision: Any = None

    @property
    def name(self) -> str:
        return str(self._node.name)

    @property
    def type(self) -> Any:
        operator = self._node.op_type
        name = "REDUCE" if operator.startswith("Reduce") else _LAYER_TYPES.get(operator, "SHUFFLE")
        if operator == "Cast":
            name = "CAST" if "CAST" in members(self._trt.__version__, "LayerType") else "IDENTITY"
        return self._trt.LayerType[name]

    @property
    def num_inputs(self) -> int:
        return len(self._node.input)

    @property
    def num_outputs(self) -> int:
        return len(self._node.output)

    def get_input(self, index: int) -> _Tensor | None:
        name = self._node.input[index]
        return self._edge(name) if name else None

    def get_output(self, index: int) -> _Tensor:
        return self._edge(self._node.output[index])

    def _edge(self, name: str) -> _Tensor:
        known = {10: "HALF", 6: "INT32", 7: "INT32", 3: "INT8", 9: "BOOL"}
        return _Tensor(self._trt, name, (), self._trt.DataType[known.get(self._kinds.get(name, 1), "FLOAT")])

    def set_output_type(self, index: int, dtype: Any) -> None:
        assert self.get_output(index).dtype == dtype == self._trt.DataType.FLOAT, "a type that the graph does not have"
        self._held.add(self._node.output[index])

    precision = property(lambda self: self._precision, lambda self, v: object.__setattr__(self, "_precision", v))

    def _free(self) -> bool:
        float32 = self._trt.DataType.FLOAT
        names = [name for index, name in enumerate(self._node.output) if self.get_output(index).dtype == float32]
        return bool(names) and (self._precision != float32 or not self._held.issuperset(names))


class _Problem(Strict):
    _as = "ParserError"

    def __init__(self, trt: FakeTensorRT, index: int, node: Any, text: str) -> None:
        super().__init__(trt)
        self._index, self._node, self._text = index, node, text

    def node(self) -> int:
        return self._index

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return str(self._node.name)

    def node_operator(self) -> str:
        return str(self._node.op_type)


class _Parser(Strict):
    _as = "OnnxParser"

    def __init__(self, trt: FakeTensorRT, network: _Network, logger: Any) -> None:
        super().__init__(trt)
        self._network, self._problems = network, []  # type: ignore[var-annotated]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        import onnx

        proto = onnx.load_from_string(model)
        for index, node in enumerate(proto.graph.node):
            text = self._refusal(proto, node)
            if text is not None:
                self._problems.append(_Problem(self._trt, index, node, text))
        if not self._network._explicit:
            self._problems.append(_Problem(self._trt, 0, proto.graph.node[0], "the network has an implicit batch"))
        if self._problems:
            return False
        self._network._model = proto
        dims = proto.graph.input[0].type.tensor_type.shape.dim
        self._network._shape = tuple(dim.dim_value or -1 for dim in dims)
        self._network._read_layers()
        return True

    def _refusal(self, proto: Any, node: Any) -> str | None:
        from onnx import numpy_helper

        constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        if node.domain not in ("", "ai.onnx"):
            return f"no importer registered for op {node.domain}.{node.op_type}"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            zero = numpy_helper.to_array(constants[node.input[2]])
            if zero.any():
                return "TensorRT only supports symmetric quantization: the zero point must be 0"
            if zero.dtype != np.int8:
                return f"TensorRT takes int8 alone, not {zero.dtype}"
        if node.op_type == "TopK":
            count = constants.get(node.input[1])
            if count is None and self._trt.__version__.startswith("8.5"):
                return "This version of TensorRT only supports input K as an initializer."
            if count is not None and int(numpy_helper.to_array(count)[0]) > 3840:
                return "TopK with k greater than 3840"
        return None

    @property
    def num_errors(self) -> int:
        return len(self._problems)

    def get_error(self, index: int) -> _Problem:
        return self._problems[index]


class _Profile(Strict):
    _as = "IOptimizationProfile"

    def __init__(self, trt: FakeTensorRT) -> None:
        super().__init__(trt)
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]


class _TimingCache(Strict):
    _as = "ITimingCache"

    def __init__(self, trt: FakeTensorRT, content: bytes) -> None:
        super().__init__(trt)
        self._header = f"{trt.__version__} {trt._device.name}".encode()
        header, _, count = content.partition(b"|")
        self._fits = not content or header == self._header
        self._entries = int(count or 0) if self._fits else 0

    def serialize(self) -> _HostMemory:
        return _HostMemory(self._header + b"|%d" % self._entries)


class _Config(Strict):
    _as = "IBuilderConfig"

    def __init__(self, trt: FakeTensorRT) -> None:
        super().__init__(trt)
        self._flags: set[str] = {"TF32"}
        self._profiles: list[_Profile] = []
        self._timing_cache: _TimingCache | None = None
        self._device: Any = trt.DeviceType.GPU
        self._pools: dict[str, int] = {}
        self._hardware, self._level, self._sources = "NONE", None, (1 << len(trt.TacticSource)) - 1
        self._verbosity: Any = None
        self._core = -1

    def set_flag(self, flag: Any) -> None:
        assert isinstance(flag, self._trt.BuilderFlag)
        self._flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        assert isinstance(flag, self._trt.BuilderFlag)
        self._flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = pool_size

    def can_run_on_DLA(self, layer: _Layer) -> bool:  # noqa: N802, TensorRT's name
        return self._device == self._trt.DeviceType.DLA and layer._node.op_type == "Conv"

    def add_optimization_profile(self, profile: _Profile) -> int:
        for least, usual, most in profile._shapes.values():
            if not all(0 < a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
                return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> _TimingCache:
        return _TimingCache(self._trt, bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        if cache._fits:
            self._timing_cache = cache
        return cache._fits

    def get_timing_cache(self) -> _TimingCache | None:
        return self._timing_cache

    def get_tactic_sources(self) -> int:
        return self._sources

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        self._sources = tactic_sources
        return True

    profiling_verbosity = property(
        lambda self: self._verbosity, lambda self, v: object.__setattr__(self, "_verbosity", v)
    )
    builder_optimization_level = property(
        lambda self: self._level, lambda self, v: object.__setattr__(self, "_level", v)
    )
    hardware_compatibility_level = property(
        lambda self: self._hardware, lambda self, v: object.__setattr__(self, "_hardware", v.name)
    )
    default_device_type = property(lambda self: self._device, lambda self, v: object.__setattr__(self, "_device", v))
    DLA_core = property(lambda self: self._core, lambda self, v: object.__setattr__(self, "_core", v))


class _Runtime(Strict):
    _as = "Runtime"

    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        super().__init__(trt)
        if not trt._has_gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger, self._host_code = logger, False

    engine_host_code_allowed = property(
        lambda self: self._host_code, lambda self, v: object.__setattr__(self, "_host_code", v)
    )

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> _Engine | None:
        trt = self._trt
        header, problem = {}, None
        if not serialized_engine.startswith(_MAGIC):
            problem = "Serialization assertion magicTagRead == magicTag failed"
        else:
            header = json.loads(serialized_engine[len(_MAGIC) :])
            if header["tensorrt"] != trt.__version__ and not header["compatible"]:
                problem = "The engine plan file is not compatible with this version of TensorRT"
            elif header["compatible"] and not self._host_code:
                problem = "the plan holds host code, which is not allowed"
            elif header["capability"] != trt._device.compute_capability and header["hardware"] == "NONE":
                problem = "The engine plan file is generated on an incompatible device"
        if problem is not None:
            self._logger.log(trt.ILogger.ERROR, problem)
            return None
        return _Engine(trt, header)


class _Engine(Strict):
    _as = "ICudaEngine"

    def __init__(self, trt: FakeTensorRT, header: dict[str, Any]) -> None:
        import onnx
        import onnxruntime

        super().__init__(trt)
        self._header = header
        content = b64decode(header["onnx"])
        self._model = onnx.load_from_string(content)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._infos = [*self._model.graph.input, *self._model.graph.output]
        batch = self._model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        self._opened = [info for info in self._infos if batch and info.type.tensor_type.shape.dim[0].dim_param == batch]

    def _info(self, name: str) -> Any:
        return next(info for info in self._infos if info.name == name)

    @property
    def num_io_tensors(self) -> int:
        return len(self._infos)

    @property
    def device_memory_size(self) -> int:
        return 1 << 20

    @property
    def device_memory_size_v2(self) -> int:
        return 1 << 20

    def get_tensor_name(self, index: int) -> str:
        return str(self._infos[index].name)

    def get_tensor_mode(self, name: str) -> Any:
        inputs = {info.name for info in self._model.graph.input}
        return self._trt.TensorIOMode.INPUT if name in inputs else self._trt.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim.dim_value or -1 for dim in self._info(name).type.tensor_type.shape.dim)

    def get_tensor_dtype(self, name: str) -> Any:
        long = "INT64" if self._trt.major >= 10 else "INT32"  # TensorRT 8 casts down
        kinds = {1: "FLOAT", 2: "UINT8", 10: "HALF", 6: "INT32", 7: long}
        return self._trt.DataType[kinds[self._info(name).type.tensor_type.elem_type]]

    def _kind(self, name: str) -> Any:
        kinds = {"FLOAT": "f4", "UINT8": "u1", "HALF": "f2", "INT32": "i4", "INT64": "i8"}
        return kinds[self.get_tensor_dtype(name).name]

    def create_execution_context(self) -> _Context:
        context = _Context(self._trt, self)
        self._trt._contexts.append(context)
        return context

    def create_engine_inspector(self) -> _Inspector:
        return _Inspector(self._trt, self)


class _Inspector(Strict):
    _as = "EngineInspector"

    def __init__(self, trt: FakeTensorRT, engine: _Engine) -> None:
        super().__init__(trt)
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        import onnx

        assert format == self._trt.LayerInformationFormat.JSON
        graph = onnx.shape_inference.infer_shapes(self._engine._model).graph
        kinds = {
            info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.input, *graph.output)
        }
        dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        layers: list[Any] = []
        for node in graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
                continue
            word = {1: "FP32", 10: "FP16", 7: "Int64"}.get(kinds.get(node.output[0], 1), "FP32")
            word = "Int8" if node.op_type == "Conv" and node.input[0] in dequantised else word
            tensor = {"Name": node.output[0], "Format/Datatype": f"Row major linear {word} format"}
            layers.append(
                {"Name": node.name, "LayerType": node.op_type, "Inputs": [tensor], "Outputs": [tensor]}
                if self._engine._header["detailed"]
                else node.name
            )
        return json.dumps({"Layers": layers, "Bindings": []})


class _Context(Strict):
    _as = "IExecutionContext"

    def __init__(self, trt: FakeTensorRT, engine: _Engine) -> None:
        super().__init__(trt)
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._runs: list[int] = []
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self._engine.get_tensor_shape(name)
        profile = self._engine._header["profile"].get(name)
        if profile is not None:
            if not all(a <= s <= b for a, s, b in zip(profile[0], shape, profile[2], strict=True)):
                return False
        elif tuple(shape) != declared:
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """As far as it is known before running: -1 stays where the picture decides."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._engine._model)
        for given in model.graph.input:
            for dim, extent in zip(given.type.tensor_type.shape.dim, self._shapes.get(given.name, ()), strict=False):
                dim.dim_value = extent
        for result in model.graph.output:
            if result.name in {info.name for info in self._engine._opened}:
                result.type.tensor_type.shape.dim[0].dim_value = next(iter(self._shapes.values()))[0]
        found = next(info for info in (*model.graph.input, *model.graph.output) if info.name == name)
        return tuple(dim.dim_value or -1 for dim in found.type.tensor_type.shape.dim)

    def infer_shapes(self) -> list[str]:
        inputs = [info.name for info in self._engine._model.graph.input]
        return [n for n in inputs if n not in self._shapes and any(d < 0 for d in self._engine.get_tensor_shape(n))]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in {info.name for info in self._engine._infos} or not memory:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if not stream_handle or self.infer_shapes() or len(self._addresses) != len(engine._infos):
            return False
        feed = {}
        for info in engine._model.graph.input:
            shape = self._shapes.get(info.name, engine.get_tensor_shape(info.name))
            feed[info.name] = _at(self._addresses[info.name], shape, engine._kind(info.name)).copy()
        names = [info.name for info in engine._model.graph.output]
        for name, value in zip(names, engine._session.run(names, feed), strict=True):
            if engine._header["half"] and value.dtype == np.float32:  # as TensorRT runs what nobody holds in float32
                value = value.astype(np.float16)
            _at(self._addresses[name], value.shape, engine._kind(name))[...] = value
        self._runs.append(stream_handle)
        if self.profiler is not None:
            for index, node in enumerate(engine._model.graph.node):
                self.profiler.report_layer_time(f"{node.name or node.op_type} + fused", 0.25 * (index + 1))
        return True


def _at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The array at an address, as the device sees it."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)
