"""Training speed with three teachers: the student alone, with a teacher cache, with the teachers online.

    python benchmarks/cache_speed.py --out benchmarks/results/cache-speed.json

One process, one run: in each round every mode takes its turn in a drawn order, loading and augmentation included, so that
a machine that is slower for a while is so for all. Figures are medians over rounds and ratios of the same round; the bars
are cached >= 0.9 of the student alone, and >= 4 times online. The mode "held" is the cached one with what it reads already
in memory: what is lost against the student alone even then is the terms' own arithmetic. Prints JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgekd.artifact import source_commit, versions, write_json
from edgekd.checkpoint import save_detector
from edgekd.console import Terminal
from edgekd.data import read_dataset
from edgekd.data.loader import Batch, TrainLoader
from edgekd.data.scenes import make_scenes
from edgekd.data.view_store import StoredRows, ViewStore
from edgekd.detectors import build_detector, spec_for
from edgekd.detectors.complexity import count_macs
from edgekd.recipe import (
    CacheConfig,
    CheckpointTeacher,
    DataConfig,
    DistillConfig,
    ModelConfig,
    Recipe,
    TermConfig,
    TrainConfig,
)
from edgekd.teaching import gather_teachers, record_views, teacher_identity
from edgekd.training.distill import Clock, Distiller, term_parameters
from edgekd.training.learning import LearningStep, StepInput
from edgekd.workspace import Workspace

BARS = {"cached / alone": 0.9, "cached / online": 4.0, "cached / held": None}
TEACHERS = ("vgg16-ssd@300", "efficientnet-lite1-ssd-lite@320", "yolo-small@320")
RESPONSES = TermConfig(loss="response")


class Held:
    """A store whose rows are read once."""

    def __init__(self, store: ViewStore) -> None:
        self.store = store
        self.known: dict[Any, StoredRows] = {}

    def rows(self, slot: int, indices: list[int]) -> StoredRows:
        """What the store holds of these views."""
        key = (slot, *indices)
        if key not in self.known:
            self.known[key] = self.store.rows(slot, indices)
        return self.known[key]

    def prefetch(self, slot: int, indices: list[int]) -> None:
        """Nothing is to be read."""


@dataclass
class Mode:
    """One way to train, ready to take steps."""

    name: str
    learner: LearningStep
    optimizer: torch.optim.Optimizer
    loader: TrainLoader
    bf16: bool
    epoch: int = 0
    batches: Iterator[Batch] | None = None

    def step(self) -> int:
        """One optimiser step on the next batch; the number of its images."""
        batch = next(self.batches, None) if self.batches is not None else None
        if batch is None:
            self.batches = self.loader.epoch(self.epoch % 2)
            self.epoch += 1
            batch = next(self.batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            losses = self.learner(StepInput(batch, Clock(0, 2), False))
        losses["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return len(batch.image_ids)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "schema": "edgekd.cache-speed/1",
            "settings": {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "data")},
            "bars": BARS,
            "configs": {name: _measure(arguments, Path(folder), name) for name in arguments.configs.split(",")},
            "provenance": {"versions": versions(), "commit": source_commit(), "threads": torch.get_num_threads()},
        }
    print(json.dumps(result, indent=2))
    print(_table(result))
    if arguments.out is not None:
        write_json(arguments.out, result)
        arguments.out.with_suffix(".md").write_text(_table(result), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a data set; generated scenes if left out")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--student", default="mobilenetv2-ssd-lite")
    parser.add_argument("--input-size", type=int, default=320)
    parser.add_argument("--tap", default="backbone.s8", help="the student's map that the config `feature` teaches")
    parser.add_argument(
        "--teachers", default=",".join(TEACHERS), help="MODEL@SIZE (untrained) or a checkpoint, by commas"
    )
    parser.add_argument("--configs", default="responses,feature")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="steps a mode takes in each round; online takes one")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _measure(arguments: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    modes, facts = _modes(arguments, folder, name)
    for mode in modes:
        for epoch in range(2):  # decodes every image, and fills what is held
            for _ in mode.loader.epoch(epoch):
                pass
        mode.step()
    order, seconds = random.Random(0), {mode.name: [] for mode in modes}
    for number in range(arguments.rounds):
        for mode in order.sample(modes, len(modes)):
            steps = 1 if mode.name == "online" else arguments.steps
            start = time.perf_counter()
            images = sum(mode.step() for _ in range(steps))
            seconds[mode.name].append((time.perf_counter() - start) / images)
        print(f"{name}: round {number + 1} of {arguments.rounds}", file=sys.stderr)
    rates = {mode: [1 / value for value in values] for mode, values in seconds.items()}
    ratios = {bar: [a / b for a, b in zip(rates["cached"], rates[bar.split(" / ")[1]], strict=True)] for bar in BARS}
    return {
        **facts,
        "images_per_s": {
            mode: {"median": statistics.median(values), "values": values} for mode, values in rates.items()
        },
        "ratios": {
            bar: {"median": statistics.median(values), "least": min(values), "most": max(values), "bar": BARS[bar]}
            for bar, values in ratios.items()
        },
    }


def _modes(arguments: argparse.Namespace, folder: Path, name: str) -> tuple[list[Mode], dict[str, Any]]:
    root = arguments.data
    if root is None:
        root = folder / "scenes"
        if not root.exists():
            make_scenes(root, counts={"train": arguments.images})
    dataset = read_dataset(root, arguments.split, limit=arguments.images)
    student = ModelConfig(model=arguments.student, input_size=arguments.input_size)
    teachers = [_teacher(text, dataset.class_names, folder) for text in arguments.teachers.split(",")]
    terms = (RESPONSES, _feature(arguments.tap)) if name == "feature" else (RESPONSES,)

    def learner(cache: CacheConfig | None, distilled: bool) -> LearningStep:
        torch.manual_seed(0)
        detector = build_detector(spec_for(student, dataset.class_names))
        distiller = None
        if distilled:
            config = DistillConfig(terms=terms, answers="online", cache=cache)
            recipe = Recipe(
                name="speed",
                data=DataConfig(root=str(root)),
                student=student,
                teachers=tuple(teachers),
                train=TrainConfig(epochs=2),
                distill=config,
            )
            work = Workspace(recipe, dataset, dataset, "cpu", Terminal())
            identities = [teacher_identity(teacher) for teacher in teachers]
            distiller = Distiller(detector, gather_teachers(work, teachers, identities, folder / "answers"), config)
            if cache is not None:
                record_views(work, distiller, identities, folder / "views")
        detector.to(memory_format=torch.channels_last)
        step = LearningStep(detector, distiller, 1.0).train()
        step.channels_last = True
        return step

    learners = {
        "alone": learner(None, False),
        "cached": learner(CacheConfig(views=2), True),
        "held": learner(CacheConfig(views=2), True),
        "online": learner(None, True),
    }
    held = learners["held"].distiller
    assert held is not None
    held.stores = tuple(Held(store) for store in held.stores)  # type: ignore[misc]
    modes = [_mode(arguments, mode, step, dataset) for mode, step in learners.items()]
    cached = learners["cached"].distiller
    assert cached is not None
    facts = {
        "teachers_gmacs": {teacher.name: _gmacs(teacher) for teacher in teachers},
        "student_gmacs": count_macs(learners["alone"].detector) / 1e9,
        "maps": {one.name: list(want.taps) for one, want in zip(cached.set.teachers, cached.wanted, strict=True)},
        "cache_kib_per_view": sum(
            path.stat().st_size for store in cached.stores for path in store.folder.glob("*.safetensors")
        )
        / 2
        / len(dataset)
        / 1024,
    }
    return modes, facts


def _mode(arguments: argparse.Namespace, name: str, learner: LearningStep, dataset: Any) -> Mode:
    distiller = learner.distiller
    loader = TrainLoader(
        dataset,
        preprocess=learner.detector.spec.preprocess,
        augment=Recipe.model_fields["augment"].default,
        batch_size=arguments.batch_size,
        seed=0,
        epochs=2,
        extra_hw=distiller.loader_hw if distiller is not None else (),
        plan=distiller.plan if distiller is not None else None,
        stores=distiller.stores if distiller is not None else (),
    )
    optimizer = torch.optim.AdamW([*learner.detector.parameters(), *term_parameters(distiller)], lr=1e-4)
    return Mode(name, learner, optimizer, loader, arguments.bf16)


def _feature(tap: str) -> TermConfig:
    return TermConfig(loss="feature", student_taps="auto" if tap == "auto" else (tap,))


def _teacher(text: str, class_names: tuple[str, ...], folder: Path) -> CheckpointTeacher:
    if Path(text).exists():
        return CheckpointTeacher(name=Path(text).stem, checkpoint=text)
    model, _, size = text.partition("@")
    path = folder / f"{model}.pt"
    if not path.exists():
        torch.manual_seed(1)
        detector = build_detector(spec_for(ModelConfig(model=model, input_size=int(size or 320)), class_names))
        save_detector(path, detector.eval(), {})
    return CheckpointTeacher(name=model, checkpoint=str(path))


def _gmacs(teacher: CheckpointTeacher) -> float:
    from edgekd.checkpoint import load_detector

    return count_macs(load_detector(Path(teacher.checkpoint))) / 1e9


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| config | alone, images/s | cached | held | online | cached / alone (bar 0.9) | cached / online (bar 4) "
        "| cached / held | KiB a view |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, config in result["configs"].items():
        rates = [f"{config['images_per_s'][mode]['median']:.1f}" for mode in ("alone", "cached", "held", "online")]
        ratios = [
            f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
            for ratio in config["ratios"].values()
        ]
        lines.append("| " + " | ".join([name, *rates, *ratios, f"{config['cache_kib_per_view']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
