"""What a machine can do at most, and how near a detector comes to it. Ships in bundles.

The roof (Williams et al., "Roofline", CACM 2009): nothing can be faster than its multiply-accumulates at the machine's
peak, nor than its least traffic at the copy bandwidth. The peak is the fastest of several short matrix products, so that
other work on the machine hardly lowers it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SIDE = 512
"""Inner side of the matrix products."""

_INPUTS: Mapping[str, Any] = {"fp32": np.float32, "int8": np.uint8}
_ROWS = (SIDE, 8 * SIDE)  # few suit one thread, many keep several busy
_WORKING_SETS_MB = (0.25, 1, 4, 16, 64)
_LEAST_RUNS = 5


def machine_roof(models: Mapping[str, bytes], threads: int | None, seconds: float = 0.15) -> dict[str, Any]:
    """Measure this machine's processor; a second or so.

    Args:
        models: ONNX file of a matrix product (rows, SIDE) x (SIDE, SIDE) by precision, one input "a".
        threads: of one inference; ONNX Runtime's choice if None.
        seconds: of each measurement.

    Returns:
        "gmacs_per_s" by precision (None where it cannot be measured); "copy_gb_per_s" (bytes read and written) in memory,
        and "copies_gb_per_s" by the megabytes that a copy touches, since what fits in a cache is faster; "threads".
    """
    peaks: dict[str, Any] = {"fp32": None, "fp16": None, "int8": None}
    for precision, model in models.items():
        peaks[precision] = _product_peak(model, precision, threads, seconds)
    copies = {f"{size:g}": _copy_peak(int(size * 1e6), threads or 1, seconds / 3) for size in _WORKING_SETS_MB}
    memory = copies[f"{_WORKING_SETS_MB[-1]:g}"]
    return {"gmacs_per_s": peaks, "copy_gb_per_s": memory, "copies_gb_per_s": copies, "threads": threads}


def share_of_roof(
    machine: Mapping[str, Any] | None, precision: str, macs: int | None, moved: Sequence[int] | None, infer_ms: float
) -> dict[str, Any]:
    """An artefact under its machine's roof; None for whatever cannot be known.

    Args:
        machine: of `machine_roof`; None: not measured. moved: bytes of least traffic, layer by layer.
        infer_ms: median of inference alone.

    Returns:
        "limit_ms": what the roof allows; "bound": "compute" or "memory", whichever sets it; "share": limit_ms / infer_ms.
        Over 1 it says that the peak was measured while others worked.
    """
    peak = None if machine is None else machine["gmacs_per_s"].get(precision)
    compute_ms = macs / peak / 1e6 if macs and peak else None
    memory_ms = None if machine is None or moved is None else _memory_ms(machine["copies_gb_per_s"], moved)
    limit = None if compute_ms is None else max(compute_ms, memory_ms or 0.0)
    return {
        "macs": macs,
        "bytes": None if moved is None else sum(moved),
        "gmacs_per_s": _rounded(macs / infer_ms / 1e6 if macs and infer_ms > 0 else None, 3),
        "peak_gmacs_per_s": peak,
        "compute_ms": _rounded(compute_ms, 4),
        "memory_ms": _rounded(memory_ms, 4),
        "limit_ms": _rounded(limit, 4),
        "bound": None if limit is None else "compute" if limit == compute_ms else "memory",
        "share": _rounded(limit / infer_ms if limit is not None and infer_ms > 0 else None, 4),
    }


def fastest(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of many runs, the first not counted."""
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < _LEAST_RUNS or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return min(times)


def _product_peak(model: bytes, precision: str, threads: int | None, seconds: float) -> float | None:
    """Giga multiply-accumulates a second on ONNX Runtime's CPU provider; None where it does not run."""
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        rates = []
        for rows in _ROWS:
            feed = {"a": np.ones((rows, SIDE), _INPUTS[precision])}
            rates.append(rows * SIDE * SIDE / fastest(lambda: session.run(None, feed), seconds) / 1e9)  # noqa: B023
        return round(max(rates), 3)
    except Exception:  # no ONNX Runtime, or one without this operator: its errors share no base class
        return None


def _copy_peak(touched: int, threads: int, seconds: float) -> float:
    """Gigabytes read and written a second by copies that touch so many bytes in all, split over threads."""
    source = np.ones(touched // 2, np.uint8)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads)))
    turns = max(1, (4 << 20) // touched)  # so that starting the threads does not count

    def copy(part: Any) -> None:
        for _ in range(turns):
            np.copyto(*part)

    with ThreadPoolExecutor(threads) as pool:
        return round(turns * touched / fastest(lambda: list(pool.map(copy, parts)), seconds) / 1e9, 3)


def _memory_ms(copies: Mapping[str, float], moved: Sequence[int]) -> float:
    """Milliseconds of the traffic: each layer at the speed of copies that touch about as much."""
    sizes = sorted((float(size) * 1e6, speed) for size, speed in copies.items())
    return sum(touched / next((v for size, v in sizes if size >= touched), sizes[-1][1]) / 1e6 for touched in moved)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
