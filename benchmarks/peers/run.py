"""Peers side by side: edgekd's deployed path against the usual one, and its students against other detectors.

    python benchmarks/peers/run.py --out runs/peers --onnx yolo11n=yolo11n.onnx

One pinned core, one thread, interleaved randomised blocks, medians and their ratios with bootstrap intervals. See README.md
beside this file for what is compared with what. Writes peers.json and peers.md into --out.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path

SCHEMA = "edgekd.peers/1"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for environments, exports and results")
    parser.add_argument("--data", type=Path, help="a data set (VOC, COCO, YOLO); generated scenes if left out")
    parser.add_argument("--split", default="val", help="its split")
    parser.add_argument("--limit", type=int, help="images for accuracy; all if left out")
    parser.add_argument("--student", type=Path, help="a run folder or checkpoint of edgekd; untrained if left out")
    parser.add_argument(
        "--size", type=int, default=320, help="input size, pixels, of every detector whose size is free"
    )
    parser.add_argument("--onnx", action="append", default=[], metavar="NAME=FILE", help="an exported peer; repeatable")
    parser.add_argument("--no-install", action="store_true", help="make no environments: only what is at hand")
    parser.add_argument("--torch-index", help="pip index that CPU builds of torch come from")
    parser.add_argument("--score", type=float, default=0.01, help="lowest score of a detection while timing")
    parser.add_argument("--samples", type=int, default=300, help="timed runs of each")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, with wider intervals")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time by the process's CPU time, for a machine that others use too"
    )
    parser.add_argument("--core", type=int, help="the core to run on; the last one if left out")
    return parser.parse_args()


def pin(core: int | None) -> int | None:
    """Put this process on one core and its libraries on one thread; the core is None where the system does not let us.

    To be called before the libraries are imported, which read the variables then.
    """
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    if not hasattr(os, "sched_setaffinity"):
        return None
    chosen = max(os.sched_getaffinity(0)) if core is None else core
    os.sched_setaffinity(0, {chosen})
    return chosen


def main() -> int:
    options = arguments()
    given = dict(entry.split("=", 1) for entry in options.onnx if "=" in entry)
    wrong = [entry for entry in options.onnx if "=" not in entry] + [f for f in given.values() if not Path(f).is_file()]
    if wrong:
        print(f"--onnx wants NAME=FILE, a file that exists; got {', '.join(wrong)}", file=sys.stderr)
        return 2
    from environments import CPU_TORCH
    from peers import gather, openvino

    options.out.mkdir(parents=True, exist_ok=True)
    install = not options.no_install
    files = {name: Path(file) for name, file in given.items()}
    peers, skipped = gather(options.out, files, options.size, options.torch_index or CPU_TORCH, install)
    if (reason := openvino(options.out, install)) is not None:
        skipped["OpenVINO"] = reason
    core = pin(options.core)

    import cv2
    import torch
    from page import markdown
    from pictures import gather_pictures
    from session import Session

    from edgekd.artifact import source_commit, write_json, write_text
    from edgekd.bench.device import Contention, device_facts
    from edgekd.errors import EdgeKDError

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    contention = Contention()
    try:
        found = Session(options, gather_pictures(options.out, options.data, options.split), peers, skipped).measure()
    except EdgeKDError as error:
        print(error, file=sys.stderr)
        return 2
    result = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "device": device_facts(),
        "core": core,
        "threads": 1,
        "cores_used_by_others": contention.cores(),
        **found,
    }
    write_json(options.out / "peers.json", result)
    text = markdown(result)
    write_text(options.out / "peers.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
