"""A comparison's runs on an existing Ray cluster whose machines see the comparison's folder.

Ray is asked for little: a place for each run. What a run has reached is in its folder, so a run whose worker or machine died is
simply started again elsewhere, and goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.compare import CompareJob, Run, do_run, do_teacher
from edgekd.comparison import ALONE
from edgekd.console import Terminal
from edgekd.errors import EdgeKDError, MissingDependencyError, UserError, install_extra
from edgekd.workspace import LOCK_FILE

MAX_TRIES = 4
"""Times that a run is started; after that, whatever kills its workers is not chance."""


@dataclass(frozen=True)
class Resources:
    """What each run takes of a machine; None for `gpus` is one where the cluster has any and the device allows it."""

    cpus: float = 1.0
    gpus: float | None = None


def on_ray(job: CompareJob, resources: Resources) -> Iterator[Run]:
    """Do the comparison's runs on the cluster that RAY_ADDRESS names, or that runs on this machine.

    Teachers and the student alone come first; the methods follow when all teachers are trained. Tells of each run when it is
    done. A run that fails by its own fault lets the others go on.

    Raises:
        MissingDependencyError: Ray is not installed.
        UserError: there is no cluster, or none of its machines has what a run takes.
        EdgeKDError: after all others, that some runs failed.
    """
    ray = _connect(job)
    try:
        yield from _Dispatcher(ray, job, _options(ray, job, resources)).run()
    finally:
        ray.shutdown()


def _connect(job: CompareJob) -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("--launcher ray needs Ray", fix=install_extra("ray")) from error
    address = os.environ.get("RAY_ADDRESS", "auto")
    host, _, port = address.rpartition(":")
    try:
        if host and "/" not in host:  # Ray itself would go on trying for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=not job.quiet, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        raise UserError(
            "no Ray cluster can be reached",
            got=str(error).splitlines()[0],
            fix="start one (`ray start --head`, and `ray start --address=HEAD:6379` on other machines) or set RAY_ADDRESS",
        ) from error
    return ray


def _options(ray: Any, job: CompareJob, resources: Resources) -> dict[str, float]:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpu = any(machine.get("GPU", 0) >= 1 for machine in machines)
    gpus = resources.gpus if resources.gpus is not None else float(job.device != "cpu" and has_gpu)
    if not any(m.get("CPU", 0) >= resources.cpus and m.get("GPU", 0) >= gpus for m in machines):
        shown = "; ".join(f"{m.get('CPU', 0):g} CPUs, {m.get('GPU', 0):g} GPUs" for m in machines)
        raise UserError(
            "no machine of the Ray cluster has what a run takes",
            got=shown,
            expected=f"{resources.cpus:g} CPUs and {gpus:g} GPUs on one machine",
            fix="see --cpus and --gpus",
        )
    return {"num_cpus": resources.cpus, "num_gpus": gpus}


class _Dispatcher:
    """Starts what can start, hears what ended, and starts again what was lost. A unit is a run or a teacher's name."""

    def __init__(self, ray: Any, job: CompareJob, options: dict[str, float]) -> None:
        self.ray, self.job, self.terminal = ray, job, Terminal(job.quiet)
        # max_calls: a process of its own for each, so that nothing of one run is left for the next. max_retries: ours.
        self.task = ray.remote(**options, max_calls=1, max_retries=0)(_unit)
        self.running: dict[Any, Run | str] = {}
        self.tries: dict[Run | str, int] = {}
        self.failures: dict[Run | str, str] = {}

    def run(self) -> Iterator[Run]:
        teachers = set(self.job.trained_teachers)
        first: list[Run | str] = [*teachers, *(run for run in self.job.runs if run.method == ALONE)]
        for unit in first:
            self._start(unit)
        methods = [run for run in self.job.runs if run.method != ALONE]
        while True:
            if not teachers:
                for run in methods:
                    self._start(run)
                methods = []
            if not self.running:
                break
            done, _ = self.ray.wait(list(self.running), num_returns=1)
            unit = self.running.pop(done[0])
            if not self._succeeded(unit, done[0]):
                continue
            if isinstance(unit, Run):
                yield unit
            else:
                teachers.discard(unit)
        self._report(len(methods))

    def _start(self, unit: Run | str) -> None:
        self.tries[unit] = self.tries.get(unit, 0) + 1
        self.running[self.task.remote(self.job, unit, os.getcwd())] = unit

    def _succeeded(self, unit: Run | str, reference: Any) -> bool:
        exceptions = self.ray.exceptions
        try:
            where, finished = self.ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, EdgeKDError) else str(error).strip().splitlines()[-1]
            self.failures[unit] = str(cause)
            self.terminal.warn(f"{unit} failed: {cause}")
            return False
        except exceptions.RayError as error:  # the worker or its machine died
            where, finished = type(error).__name__, False
        if finished:
            self.terminal.note(f"{unit}: done on {where}")
            return True
        if self.tries[unit] >= MAX_TRIES:
            self.failures[unit] = f"its worker was lost {MAX_TRIES} times ({where})"
        else:
            self.terminal.warn(f"{unit}: its worker was lost ({where}); it goes on elsewhere from its last checkpoint")
            self._start(unit)
        return False

    def _report(self, not_begun: int) -> None:
        if not self.failures:
            return
        total = len(self.job.runs) + len(self.job.trained_teachers)
        lines = [f"{unit}: {why}" for unit, why in self.failures.items()]
        if not_begun:
            lines.append(f"{not_begun} runs not begun, for want of a teacher")
        raise EdgeKDError(
            f"{len(self.failures)} of {total} runs failed",
            got="\n            ".join(lines),
            fix="what is done stays; the same command does the rest",
        )


def _unit(job: CompareJob, unit: Run | str, folder: str) -> tuple[str, bool]:
    """On a worker: do one unit; where, and whether it is done (it is not if the worker was told to stop)."""
    host = socket.gethostname()
    if not (job.out / LOCK_FILE).is_file() or not Path(folder).is_dir():
        raise UserError(
            f"Ray's worker on {host} does not see {job.out}",
            expected="a file system that all machines of the cluster share, under the same path",
        )
    os.chdir(folder)  # recipes may name files relative to where the command was given
    try:
        if isinstance(unit, Run):
            do_run(job, unit)
        else:
            do_teacher(job, unit)
    except KeyboardInterrupt:
        return host, False
    return host, True
