"""Images a second under full load: several streams at once, each with a model of its own, in interleaved windows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgekd.bench.matching import Float64Array
from edgekd.bench.systems import Staged
from edgekd.predictor import Predictor
from edgekd.types import ImageArray

ROUNDS = 10
LEAST_WINDOW_S = 0.5

Stream = Callable[[Sequence[ImageArray]], object]
"""Answers all of the images it is given, from decoded image to detections."""


def stream_of(staged: Staged, batch: int) -> tuple[Stream, int]:
    """(what answers images on one stream, images of one inference): a batch where the detector takes one."""
    size = batch_of(staged, batch)
    if not isinstance(staged, Predictor) or size == 1:
        return lambda images: [staged.detect(image) for image in images], 1
    predictor = staged

    def answer(images: Sequence[ImageArray]) -> object:
        tensors, geometries = zip(*(predictor.prepare(image) for image in images), strict=True)
        raw = predictor.infer(np.concatenate(tensors))
        return [predictor.finish(raw, geometry, item) for item, geometry in enumerate(geometries)]

    return answer, size


def batch_of(staged: Staged, batch: int) -> int:
    """Images that one inference can take, at most `batch`; an ensemble and a file with a fixed batch of one take one."""
    if not isinstance(staged, Predictor):
        return 1
    runtime: Any = staged.runtime
    if batch > 1 and hasattr(runtime, "try_batch"):  # an ONNX file may leave its batch open in name only
        runtime.try_batch(np.zeros((2, 3, *staged.preprocess.input_hw), np.float32))
    if getattr(runtime, "dynamic_batch", False):
        return min(batch, int(getattr(runtime, "largest_batch", batch)))
    return min(batch, max(1, int(runtime.input_shape[0])))


def measure_throughput(
    systems: Sequence[Sequence[Stream]],
    batches: Sequence[int],
    images: Sequence[ImageArray],
    *,
    seconds: float = 0.0,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Float64Array]:
    """Images a second of every system in each round: (rounds,) each, in random interleaved windows (ABBA).

    Args:
        systems: the streams of each, which run at once. batches: images that a stream is given at a time.
        seconds: of each system in all, split into windows.
    """
    window = max(LEAST_WINDOW_S, seconds / rounds)
    for streams, batch in zip(systems, batches, strict=True):
        _window(streams, batch, images, LEAST_WINDOW_S)  # warm up
    rates = [np.empty(rounds) for _ in systems]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(systems))
    for done in range(rounds):
        order = rng.permutation(len(systems)) if done % 2 == 0 else order[::-1]
        for index in order.tolist():
            rates[index][done] = _window(systems[index], batches[index], images, window)
        if progress is not None:
            progress(done + 1, rounds)
    return rates


def _window(streams: Sequence[Stream], batch: int, images: Sequence[ImageArray], seconds: float) -> float:
    """Images a second over about so many seconds; what is begun is finished and counts.

    Each stream's rate is over its own busy time, so that waiting for the last one counts for nobody.
    """
    rates, errors = [0.0] * len(streams), list[BaseException]()
    together = threading.Barrier(len(streams))

    def work(index: int) -> None:
        try:
            together.wait()
            start, count = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - start) < seconds or not count:
                at = index + len(streams) * count
                streams[index]([images[(at + i) % len(images)] for i in range(batch)])
                count += batch
            elapsed = time.perf_counter() - start
            rates[index] = count / elapsed
        except BaseException as error:
            together.abort()
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,), name=f"edgekd-stream-{i}") for i in range(len(streams))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return sum(rates)


def throughput_facts(rates: Float64Array, streams: int, threads: int, batch: int, seed: int = 0) -> dict[str, Any]:
    """Plain JSON types: the mean over rounds with a 95 % interval from resampling them."""
    draws = np.random.default_rng(seed).integers(0, len(rates), (2000, len(rates)))
    low, high = np.percentile(rates[draws].mean(1), [2.5, 97.5])
    return {
        "images_per_s": round(float(rates.mean()), 3),
        "interval": [round(float(low), 3), round(float(high), 3)],
        "rounds": len(rates),
        "streams": streams,
        "threads_a_stream": threads,
        "batch": batch,
    }
