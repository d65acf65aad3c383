"""SingleStream and MultiStream as MLPerf Inference defines them, with its early-stopping latency estimate.

Follows the rules of MLCommons' `inference_rules.adoc`; it is neither LoadGen nor a submission, and no result of it was
verified by MLCommons.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgekd.bench.latency import Clock
from edgekd.bench.systems import Staged
from edgekd.bench.throughput import batch_of
from edgekd.predictor import Predictor
from edgekd.types import ImageArray

Scenario = Literal["SingleStream", "MultiStream"]
RULE_SECONDS = 600.0
CONFIDENCE = 0.99
LIBRARY_IMAGES = 64
"""Samples held in memory, from which queries are drawn: the least the rules allow for detection."""


@dataclass(frozen=True)
class Rule:
    """A scenario: the percentile that is its metric, and samples a query."""

    percentile: float
    samples: int


RULES: dict[Scenario, Rule] = {"SingleStream": Rule(0.90, 1), "MultiStream": Rule(0.99, 8)}


def early_stopping(count: int, percentile: float) -> int | None:
    """How many of the largest of `count` latencies end at the one that stands for the percentile; None: too few.

    The estimate is the t-th largest latency, for the largest t such that t or fewer of `count` queries over the true
    percentile would be seen with a probability of at most 1 - `CONFIDENCE`: an upper bound that tightens with time.
    """
    over, under = math.log1p(-percentile), math.log(percentile)
    probability, largest = math.exp(count * under), 0
    for t in range(1, count):
        choose = math.lgamma(count + 1) - math.lgamma(t + 1) - math.lgamma(count - t + 1)
        probability += math.exp(choose + t * over + (count - t) * under)
        if probability > 1.0 - CONFIDENCE:
            break
        largest = t
    return largest or None


def least_queries(percentile: float) -> int:
    """The fewest queries that give an estimate: 64 at the 90th percentile, 662 at the 99th."""
    count = 2
    while early_stopping(count, percentile) is None:
        count += 1
    return count


def run_scenario(
    staged: Staged,
    images: Sequence[ImageArray],
    scenario: Scenario,
    *,
    seconds: float = RULE_SECONDS,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run one system alone: the next query when the last is answered, until time and number of queries suffice.

    Timed are inference and post-processing with NMS; images are resized and normalised beforehand, as the rules allow.

    Returns:
        The estimate in milliseconds and how it came about, in plain JSON types.
    """
    rule = RULES[scenario]
    prepared = [staged.prepare(image) for image in images]
    size = batch_of(staged, rule.samples)
    batched = isinstance(staged, Predictor) and size == rule.samples > 1
    answer = _batched(staged) if isinstance(staged, Predictor) and batched else _one_by_one(staged)
    rng = np.random.default_rng(seed)
    answer([prepared[i % len(prepared)] for i in range(rule.samples)])
    least, taken = least_queries(rule.percentile), list[int]()
    began = clock()
    while len(taken) < least or (clock() - began) / 1e9 < seconds:
        query = [prepared[i] for i in rng.integers(0, len(prepared), rule.samples)]
        start = clock()
        answer(query)
        taken.append(clock() - start)
        if progress is not None and len(taken) % 64 == 0:
            progress(min(int((clock() - began) / 1e9), int(seconds)), max(1, int(seconds)))
    lasted = (clock() - began) / 1e9
    if progress is not None:
        progress(max(1, int(seconds)), max(1, int(seconds)))
    rank = early_stopping(len(taken), rule.percentile) or 1
    latencies = np.sort(np.array(taken, np.float64)) / 1e6
    deviations = ["timed by edgekd, not by LoadGen"]
    if seconds < RULE_SECONDS:
        deviations.append(f"ran for {lasted:.0f} s where the rules want {RULE_SECONDS:.0f} s")
    if len(images) < LIBRARY_IMAGES:
        deviations.append(f"{len(images)} images in the library where the rules want {LIBRARY_IMAGES}")
    return {
        "scenario": scenario,
        "metric": f"early-stopping estimate of a query's {100 * rule.percentile:.0f}th percentile latency",
        "latency_ms": round(float(latencies[len(latencies) - rank]), 3),
        "percentile_ms": round(float(np.percentile(latencies, 100 * rule.percentile)), 3),
        "queries": len(taken),
        "samples_a_query": rule.samples,
        "batch": size if batched else 1,
        "seconds": round(lasted, 1),
        "deviations": deviations,
        "note": "follows MLPerf Inference's rules for this scenario but for the deviations; not a submission, not "
        "verified by MLCommons",
    }


Prepared = tuple[Any, Any]


def _one_by_one(staged: Staged) -> Callable[[Sequence[Prepared]], object]:
    return lambda query: [staged.finish(staged.infer(tensor), geometry) for tensor, geometry in query]


def _batched(predictor: Predictor) -> Callable[[Sequence[Prepared]], object]:
    def answer(query: Sequence[Prepared]) -> object:
        raw = predictor.infer(np.concatenate([tensor for tensor, _ in query]))
        return [predictor.finish(raw, geometry, item) for item, (_, geometry) in enumerate(query)]

    return answer
