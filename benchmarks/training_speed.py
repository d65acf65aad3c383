"""What a training step on a CPU costs, and what each thing that edgekd does about it brings.

    python benchmarks/training_speed.py --size 320 --batch 16 --out benchmarks/results/training-speed.json

One process, one run: in each round every mode takes its turn in a drawn order. A step is forward pass, detection loss,
backward pass and AdamW on a drawn batch, without loading. "plain" is what torch does by itself, but for the optimiser,
which is edgekd's in every mode. Prints JSON and a Markdown table of medians, each with its ratio to "plain" of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from edgekd.artifact import source_commit, versions, write_json
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.backbones.depthwise import DepthwiseConv2d
from edgekd.detectors.base import Detector, Targets
from edgekd.machine import cpu_model
from edgekd.recipe import ModelConfig, TrainConfig
from edgekd.training.heap import kept
from edgekd.training.setup import frozen_layers, make_optimizer

MODES: dict[str, dict[str, Any]] = {
    "plain": {"plain_depthwise": True, "keeps": False},
    "depthwise gradients": {"keeps": False},
    "memory kept": {"plain_depthwise": True},
    "both, as edgekd trains": {},
    "freeze_stride: 2": {"freeze": 2},
    "freeze_stride: 4": {"freeze": 4},
    "freeze_stride: 8": {"freeze": 8},
}
CLASSES = tuple(f"class-{index}" for index in range(20))


class Student:
    """A detector with its optimiser and one batch."""

    def __init__(self, config: ModelConfig, batch: int, bf16: bool, freeze: int) -> None:
        torch.manual_seed(0)
        self.detector: Detector = build_detector(spec_for(config, CLASSES)).to(memory_format=torch.channels_last)
        self.frozen = frozen_layers(self.detector, freeze, pretrained=True)
        self.optimizer = make_optimizer(self.detector, [], TrainConfig(), pretrained=True, on_cpu=True)
        self.bf16, size = bf16, config.input_size
        self.images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        corners = torch.rand(batch, 8, 2) * size * 0.6
        boxes = torch.cat([corners, corners + size * 0.1 + torch.rand(batch, 8, 2) * size * 0.3], -1)
        self.targets = Targets(list(boxes), list(torch.randint(0, len(CLASSES), (batch, 8))))

    def step(self) -> None:
        self.detector.train()
        for layer in self.frozen:
            layer.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            losses = self.detector.detection_losses(self.detector(self.images), self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()


@contextlib.contextmanager
def conditions(plain_depthwise: bool = False, keeps: bool = True, freeze: int = 0) -> Iterator[None]:
    with kept() if keeps else contextlib.nullcontext():
        if plain_depthwise:
            with mock.patch.object(DepthwiseConv2d, "forward", nn.Conv2d.forward):
                yield
        else:
            yield


def measure(student: Student, steps: int, cpu_time: bool) -> tuple[float, float]:
    """(seconds, page faults) a step."""
    clock = time.process_time if cpu_time else time.perf_counter
    for _ in range(2):
        student.step()
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, clock()
    for _ in range(steps):
        student.step()
    seconds = clock() - start
    return seconds / steps, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2-ssd-lite")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each mode in a round, after two that are not counted")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the process's own time: for a shared machine, with one thread"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.cpu_time and given.threads != 1:
        parser.error("--cpu-time adds up the time of all threads: use it with --threads 1")
    torch.set_num_threads(given.threads)
    config = ModelConfig(model=given.model, input_size=given.size)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    faults: dict[str, list[float]] = {mode: [] for mode in MODES}
    rng = random.Random(0)
    students = {f: Student(config, given.batch, given.precision == "bf16", f) for f in (0, 2, 4, 8)}
    for number in range(given.rounds):
        for mode in rng.sample(list(MODES), len(MODES)):
            with conditions(**MODES[mode]):
                spent, missed = measure(students[MODES[mode].get("freeze", 0)], given.steps, given.cpu_time)
            seconds[mode].append(spent)
            faults[mode].append(missed)
        print(f"round {number + 1} of {given.rounds}", file=sys.stderr, flush=True)
    result = {
        "what": "training_speed",
        "settings": {name: value for name, value in vars(given).items() if name != "out"},
        "cpu": cpu_model(),
        "commit": source_commit(),
        "versions": versions(),
        "modes": {
            mode: {
                "images_per_s": given.batch / statistics.median(seconds[mode]),
                "ratio": statistics.median(p / s for p, s in zip(seconds["plain"], seconds[mode], strict=True)),
                "ratios": [p / s for p, s in zip(seconds["plain"], seconds[mode], strict=True)],
                "page_faults_a_step": statistics.median(faults[mode]),
            }
            for mode in MODES
        },
    }
    if given.out:
        write_json(given.out, result)
    print(json.dumps(result))
    print("\n| mode | images/s | ratio | page faults a step |\n|:--|--:|--:|--:|")
    for mode, m in result["modes"].items():
        print(f"| {mode} | {m['images_per_s']:.1f} | {m['ratio']:.2f} | {m['page_faults_a_step']:,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
