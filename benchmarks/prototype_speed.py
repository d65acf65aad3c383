"""How long GKD's prototype search takes at the size of VOC, once an epoch.

    python benchmarks/prototype_speed.py

A bank as a run over VOC 2007+2012 leaves it: 20 classes, each with as many instances as GKD keeps (800) or as the data set has
where that is fewer; features are random directions around a few centres a class, L2-normalised. Then the same with every
object of VOC 2007+2012 kept, as an upper end. The search is `edgekd.losses.prototypes.search_prototypes`, which the tests
compare with a plain reference. Exits 1 if either takes over a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from edgekd.artifact import source_commit, versions, write_json
from edgekd.bench.device import Contention
from edgekd.losses.prototypes import search_prototypes
from edgekd.machine import cpu_model

BAR_SECONDS = 60.0
OBJECTS = {
    "aeroplane": 1285, "bicycle": 1208, "bird": 1820, "boat": 1397, "bottle": 2116, "bus": 909, "car": 4008, "cat": 1616,
    "chair": 4338, "cow": 1058, "diningtable": 1057, "dog": 2079, "horse": 1156, "motorbike": 1141, "person": 15576,
    "pottedplant": 1724, "sheep": 1347, "sofa": 1211, "train": 984, "tvmonitor": 1193,
}  # fmt: skip
"""Objects in trainval of VOC 2007 and 2012 together, difficult ones included: 47,223."""


def features(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """(count, channels) L2-normalised rows around eight centres."""
    centres = torch.randn(8, channels, generator=generator)
    noise = torch.randn(count, channels, generator=generator)
    return normalize(centres[torch.randint(8, (count,), generator=generator)] + noise, dim=1)


def main() -> int:
    """Search at both sizes; say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student-channels", type=int, default=96)
    parser.add_argument("--teacher-channels", type=int, default=512)
    parser.add_argument("--per-class", type=int, default=800, help="what GKD keeps of a class")
    parser.add_argument("--count", type=int, default=10, help="prototypes a class")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    result: dict[str, object] = {"channels": [args.student_channels, args.teacher_channels], "prototypes": args.count}
    slowest = 0.0
    contention = Contention()
    for name, limit in (("as GKD keeps them", args.per_class), ("every object", 10**9)):
        sizes = [min(objects, limit) for objects in OBJECTS.values()]
        channels = (args.student_channels, args.teacher_channels)
        bank = [[features(size, width, generator) for width in channels] for size in sizes]
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            for student, teacher in bank:
                search_prototypes(student, teacher, count=args.count)
            seconds.append(time.perf_counter() - start)
        result[name] = {"instances": sum(sizes), "seconds": [round(s, 3) for s in seconds]}
        slowest = max(slowest, *seconds)
    result |= {
        "bar_seconds": BAR_SECONDS,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "contention": contention.facts(),
        "commit": source_commit(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        write_json(args.out, result)
    return int(slowest > BAR_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
