"""Engines run: batches, CUDA graphs, times, and memory that is given back, on a strict stand-in for TensorRT."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgekd.bench.throughput import stream_of
from edgekd.errors import ArtifactError, MissingDependencyError, RuntimeFailure, UserError
from edgekd.export.engine import EngineOptions
from edgekd.export.engine_job import export_engine
from edgekd.export.nms import append_nms
from edgekd.export.topk import with_top_candidates
from edgekd.predictor import load_predictor
from edgekd.runtimes import buffers as buffers_module
from edgekd.runtimes.cuda_driver import l4t_release
from edgekd.runtimes.engine_file import read_engine_manifest, write_engine_manifest
from edgekd.runtimes.tensorrt_runtime import TensorRTRuntime
from edgekd.runtimes.trt_api import create_network, logger_of, parse_onnx
from edgekd.selection import Selection
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES
from tests.engine_doubles import IMAGES, Machine, moving_detector, ours, run_onnx
from tests.fake_tensorrt import ORIN, VERSIONS
from tests.host_buffers import HostBuffers


@pytest.mark.parametrize("version", VERSIONS)
def test_dynamic_batch_with_a_profile_and_graphs_captured_anew(machine: Machine, tmp_path: Path, version: str) -> None:
    fake = machine(version)
    model = moving_detector("batch")
    source, out = ours(model, tmp_path / "student.onnx"), tmp_path / "student.engine"
    manifest = export_engine(source, out, options=EngineOptions(batch=(1, 2, 4))).manifest
    assert manifest.profile == (1, 2, 4)
    memory = HostBuffers(ORIN)
    with TensorRTRuntime(out, cuda_graph=True, buffers=memory) as runtime:
        context = fake._contexts[-1]
        assert runtime.dynamic_batch
        assert context._runs == []
        for count in (2, 2, 4, 1):
            found = runtime.run(IMAGES[:count])
            wanted = run_onnx(with_top_candidates(model, ("boxes", "scores")), IMAGES[:count])
            np.testing.assert_allclose(found["boxes"], wanted["boxes"], rtol=1e-5)
            np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=1e-5)
        done = [what for what, _ in memory.log if what in ("capture", "launch", "graph closed")]
        again = ["graph closed", "capture", "launch"]
        assert done == ["capture", "launch", "launch", *again, *again]
        assert len(context._runs) == 3 + 4, "one plain run before each capture, then one a launch"
        with pytest.raises(RuntimeFailure, match="another shape"):
            runtime.run(np.concatenate([IMAGES, IMAGES]))
    assert not memory._memory, "device memory is given back"
    with pytest.raises(RuntimeFailure, match="closed"):
        runtime.run(IMAGES[:1])


def test_a_least_batch_is_filled_up(machine: Machine, tmp_path: Path) -> None:
    machine()
    source, out = ours(moving_detector("batch"), tmp_path / "s.onnx"), tmp_path / "s.engine"
    export_engine(source, out, options=EngineOptions(batch=(2, 2, 2)))
    with TensorRTRuntime(out, buffers=HostBuffers(ORIN)) as runtime:
        assert runtime.input_shape[0] == 2
        alone = {name: array[0].copy() for name, array in runtime.run(IMAGES[:1]).items()}
        both = runtime.run(IMAGES[:2])
        np.testing.assert_allclose(alone["boxes"], both["boxes"][0], rtol=1e-5)


def test_an_engine_is_given_no_larger_batches_than_its_profile(machine: Machine, tmp_path: Path) -> None:
    machine()
    source, out = ours(moving_detector("batch"), tmp_path / "s.onnx"), tmp_path / "s.engine"
    export_engine(source, out, options=EngineOptions(batch=(1, 2, 4)))
    with load_predictor(out) as predictor:
        answer, size = stream_of(predictor, 8)
        assert size == 4
        answer([np.zeros((64, 64, 3), np.uint8)] * 4)


def test_gpu_times_are_taken_around_each_step(machine: Machine, detector: Path, tmp_path: Path) -> None:
    machine()
    export_engine(detector, tmp_path / "s.engine")
    with TensorRTRuntime(tmp_path / "s.engine", buffers=HostBuffers(ORIN)) as runtime:
        runtime.device_times = True
        runtime.run(IMAGES[:1])
        times = runtime.gpu_times()
    assert min(times.to_device, times.compute, times.to_host) >= 0
    assert times.compute > 0


def test_layer_times_by_tensorrts_own_profiler(machine: Machine, detector: Path, tmp_path: Path) -> None:
    from edgekd.bench.profile import profile_predictor
    from edgekd.predictor import load_predictor

    fake = machine()
    out = tmp_path / "s.engine"
    export_engine(detector, out)
    with TensorRTRuntime(out, buffers=HostBuffers(ORIN)) as runtime:
        runtime.run(IMAGES[:1])
        assert fake._contexts[-1].profiler is None
        first, second = runtime.layer_times(IMAGES[:1]), runtime.layer_times(IMAGES[:1])
    assert first == second != {}
    with load_predictor(out) as predictor:
        found = profile_predictor(predictor, out, [IMAGES[:1]], None, runs=2)
    assert found is not None
    assert found["tool"] == "tensorrt"
    assert {layer["name"]: layer["ms"] for layer in found["layers"]} == first
    assert found["layers"][0]["ms"] == max(first.values())


def nms_inside() -> onnx.ModelProto:
    """A detector whose outputs are as long as there are objects."""
    model = moving_detector()
    helper.set_model_props(model, {})
    return append_nms(model, Selection(score_threshold=0.4))


@pytest.mark.parametrize("profile", [None, (1, 1, 2)])
def test_outputs_that_grow_with_the_picture_get_no_memory(
    machine: Machine, detector: Path, tmp_path: Path, profile: tuple[int, int, int] | None
) -> None:
    """TensorRT writes as many rows as it finds, whatever there is memory for."""
    trt = machine("8.6.1")
    out = tmp_path / "s.engine"
    export_engine(detector, out)
    builder = trt.Builder(logger_of(trt))
    network = create_network(trt, builder, strongly_typed=False)
    parse_onnx(trt, network, nms_inside().SerializeToString())
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    manifest = read_engine_manifest(out)
    changes: dict[str, Any] = {"plan_sha256": hashlib.sha256(plan).hexdigest()}
    if profile:  # as if the open size were the batch
        changes.update(profile=profile, inputs={"images": {"shape": [-1, 3, 64, 64], "dtype": "FLOAT"}})
    out.write_bytes(plan)
    write_engine_manifest(out, replace(manifest, **changes))
    buffers = HostBuffers(ORIN)
    with pytest.raises(ArtifactError, match="size depends on the picture"):
        TensorRTRuntime(out, buffers=buffers).run(IMAGES[:1])
    assert profile or not buffers._memory, "what was allocated before is given back"


def test_shapes_that_tensorrt_cannot_tell(
    machine: Machine, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`infer_shapes` lists what is missing, but raises for everything else."""
    from tests import fake_tensorrt

    def fails(_: Any) -> list[str]:
        raise RuntimeError("shape inference failed")

    machine("8.6.1")
    export_engine(detector, tmp_path / "s.engine")
    monkeypatch.setattr(fake_tensorrt._Context, "infer_shapes", fails)
    with (
        TensorRTRuntime(tmp_path / "s.engine", buffers=HostBuffers(ORIN)) as runtime,
        pytest.raises(RuntimeFailure, match="cannot tell its shapes"),
    ):
        runtime.run(IMAGES[:1])


def test_no_way_to_the_gpus_memory_says_why_for_each() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here")
    with pytest.raises(MissingDependencyError, match="no way to reach the GPU's memory") as caught:
        buffers_module.open_buffers()
    for backend in buffers_module.BACKENDS:
        assert f"{backend}: " in str(caught.value)
    with pytest.raises(UserError, match="unknown buffer backend"):
        buffers_module.open_buffers("host")


def test_a_package_that_breaks_on_import_does_not_keep_the_others_from_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch without its CUDA libraries raises OSError, PyCUDA for another NumPy raises ValueError."""
    broken = {"pycuda": ValueError("numpy.dtype size changed"), "torch": OSError("libcublas.so.12: cannot open")}

    def opened(name: str, index: int) -> HostBuffers:
        if name in broken:
            raise broken[name]
        if name == "cuda-python":
            raise RuntimeError
        return HostBuffers()

    monkeypatch.setattr("edgekd.runtimes.cuda_buffers.open_cuda_buffers", opened)
    assert buffers_module.open_buffers().name == "host"
    with pytest.raises(MissingDependencyError, match=r"pycuda: numpy\.dtype size changed"):
        buffers_module.open_buffers("pycuda")


def test_l4t(tmp_path: Path) -> None:
    assert l4t_release(tmp_path) is None
    file = tmp_path / "etc" / "nv_tegra_release"
    file.parent.mkdir()
    file.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert l4t_release(tmp_path) == "36.4.3"
    file.write_text("something else")
    assert l4t_release(tmp_path) is None


def test_an_engine_on_the_drivers_own_buffers(machine: Machine, detector: Path, tmp_path: Path) -> None:
    """The same engine over ctypes on a stub libcuda: addresses, streams and events as integers of full width."""
    import ctypes
    import subprocess

    from edgekd.runtimes.cuda_driver import CudaDriver
    from edgekd.runtimes.handle_buffers import driver_buffers

    library = tmp_path / "libcuda.so.1"
    source = Path(__file__).with_name("stub_cuda.c")
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no C compiler for the stub: {error}")
    buffers = driver_buffers(CudaDriver(0, str(library)))
    machine(device=buffers.device)
    out = tmp_path / "student.engine"
    export_engine(detector, out, buffers=buffers)
    with TensorRTRuntime(out, buffers=buffers) as runtime:
        found = runtime.run(IMAGES[:1])
        np.testing.assert_allclose(found["boxes"][0], GOOD_BOXES, atol=1e-5)
        np.testing.assert_allclose(found["scores"][0], GOOD_SCORES, atol=1e-5)
    buffers.close()
    loaded = ctypes.CDLL(str(library))
    assert (loaded.stub_live(), loaded.stub_depth(), loaded.stub_retained()) == (0, 0, 0)
