"""The roof over every row of a benchmark: this machine's measured peak, and each artefact's share of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.artifact import is_onnx
from edgekd.bench.layers import read_layers
from edgekd.device.roof import SIDE, fastest, machine_roof, share_of_roof

_GPU_SIDE = 8192
_GPU_BYTES = 1 << 30


def add_roof(rows: Sequence[dict[str, Any]], files: Sequence[Sequence[Path]], threads: int) -> dict[str, Any]:
    """Put `roof` into every row; returns the machine's own, {"cpu": ..., "gpu": ... or None}.

    Args:
        rows: of a result. files: per row, what runs, several for an ensemble.
    """
    machines = {"cpu": cpu_roof(threads), "gpu": gpu_roof() if any(_where(row) == "gpu" for row in rows) else None}
    for row, paths in zip(rows, files, strict=True):
        sizes = row.get("input_hw") or [None] * len(paths)
        moved = [bytes_moved(path, size and tuple(size)) for path, size in zip(paths, sizes, strict=True)]
        total = None if None in moved else [count for counts in moved for count in counts or ()]
        infer_ms = row["stages_ms"]["infer"]
        row["roof"] = share_of_roof(machines[_where(row)], row["precision"], row["macs"], total, infer_ms)
    return machines


def bytes_moved(file: Path, input_hw: Any = None) -> list[int] | None:
    """Least traffic of one inference of an ONNX file by layer: see `bench.layers.Layer`; None for anything else."""
    if not is_onnx(Path(file)):
        return None
    counts = [layer.bytes for layer in read_layers(Path(file), input_hw)]
    return None if None in counts or not counts else [count for count in counts if count is not None]


@functools.lru_cache(maxsize=4)
def cpu_roof(threads: int | None) -> dict[str, Any]:
    """The processor's peak by precision and its copy bandwidth, measured once a process."""
    machine = machine_roof(product_models(), threads)
    by_torch = _torch_peak(threads)
    peaks = machine["gmacs_per_s"]
    if by_torch is not None and by_torch > (peaks["fp32"] or 0.0):
        peaks["fp32"] = by_torch
    return machine


def product_models() -> dict[str, bytes]:
    """ONNX files for `machine_roof`: a matrix product in fp32, and one of unsigned by signed bytes."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    def model(operator: str, given: int, weight: Any, out: int) -> bytes:
        # Written as a fill, so that the file is small; runtimes fold it into a constant and pack that once.
        fill = helper.make_node("ConstantOfShape", ["shape"], ["b"], value=numpy_helper.from_array(weight))
        graph = helper.make_graph(
            [fill, helper.make_node(operator, ["a", "b"], ["c"])],
            "product",
            [helper.make_tensor_value_info("a", given, ["rows", SIDE])],
            [helper.make_tensor_value_info("c", out, ["rows", SIDE])],
            [numpy_helper.from_array(np.array([SIDE, SIDE], np.int64), "shape")],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return bytes(made.SerializeToString())

    types = TensorProto
    return {
        "fp32": model("MatMul", types.FLOAT, np.ones(1, np.float32), types.FLOAT),
        "int8": model("MatMulInteger", types.UINT8, np.ones(1, np.int8), types.INT32),
    }


def _torch_peak(threads: int | None) -> float | None:
    """The same product by torch, whose library is the faster one on some processors; None without it."""
    try:
        import torch
    except ImportError:  # engines are measured without it too
        return None

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        a = torch.ones(2 * SIDE, 2 * SIDE)
        return round((2 * SIDE) ** 3 / fastest(lambda: a @ a, 0.15) / 1e9, 3)
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def gpu_roof() -> dict[str, Any] | None:
    """The first GPU's, by torch: fp32 with TF32, as TensorRT computes it; None without one that torch can use."""
    try:
        import torch
    except ImportError:  # engines are measured without it too
        return None

    if not torch.cuda.is_available():
        return None

    def rate(make: Any, product: Any) -> float | None:
        try:
            a = make()
            return round(_GPU_SIDE**3 / _gpu_fastest(lambda: product(a, a)) / 1e9, 1)
        except RuntimeError:  # not on this GPU, or no memory for it
            return None

    def ones(dtype: torch.dtype) -> Any:
        return lambda: torch.ones(_GPU_SIDE, _GPU_SIDE, dtype=dtype, device="cuda")

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        peaks = {
            "fp32": rate(ones(torch.float32), torch.mm),
            "fp16": rate(ones(torch.float16), torch.mm),
            "int8": rate(ones(torch.int8), lambda a, b: torch._int_mm(a, b.t())),
        }
        source = torch.ones(_GPU_BYTES // 4, device="cuda")
        target = torch.empty_like(source)
        copy = 2 * _GPU_BYTES / _gpu_fastest(lambda: target.copy_(source)) / 1e9
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    copies = {f"{_GPU_BYTES / 1e6:g}": round(copy, 1)}
    return {"gmacs_per_s": peaks, "copy_gb_per_s": round(copy, 1), "copies_gb_per_s": copies, "threads": None}


def _gpu_fastest(run: Any) -> float:
    import torch

    def finished() -> None:
        run()
        torch.cuda.synchronize()

    return fastest(finished, 0.2)


def _where(row: Mapping[str, Any]) -> str:
    """Which of the machine's processors a row ran on."""
    said = f"{row['runtime']} {row['provider']}".lower()
    return "gpu" if any(word in said for word in ("cuda", "tensorrt", "gpu")) else "cpu"
