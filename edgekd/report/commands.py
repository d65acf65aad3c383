"""What to type to get a page's figures again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from edgekd.report.sources import Sources
from edgekd.selection import OPTIONS

_ROLES = {"student_distilled": "distilled"}
_OPTIONS = {
    "samples": "--samples", "seconds": "--seconds", "warmup_seconds": "--warmup", "threads": "--threads",
    **OPTIONS, "seed": "--seed",
}  # fmt: skip
_THROUGHPUT = {"mode": "--mode", "streams": "--streams", "batch": "--batch"}
_MLPERF = {"mlperf": "--mlperf", "mlperf_seconds": "--mlperf-seconds"}


def commands_of(sources: Sources) -> list[tuple[str, str]]:
    """(what it does, command), with line breaks that a shell understands."""
    found = []
    if (commit := _commit(sources)) is not None:
        found.append(("The code that measured this, in a clone of edgekd", f"git checkout {commit}\npip install -e ."))
    if sources.recipe is not None:
        found.append(("Everything, from the recipe above", "edgekd run recipe.yaml --out RUN"))
    if sources.result is not None and sources.result["rows"]:
        found.append(("The benchmark alone, from the exported files", _bench(sources.result)))
    for _, comparison in sources.comparisons:
        found.append(("The comparison of methods over seeds", _compare(comparison)))
    if sources.devices:
        command = "edgekd bench RUN/export/*.onnx --target ssh://USER@DEVICE --out device-result.json"
        found.append(("The device", command))
    return found


def _commit(sources: Sources) -> str | None:
    """The first commit that a result names; what is not one is left out."""
    places = [sources.result["commit"]] if sources.result else []
    places += [comparison["provenance"]["commit"] for _, comparison in sources.comparisons]
    places += [device["commit"] for _, device in sources.devices]
    found = (re.match(r"[0-9a-f]{7,64}", place or "") for place in places)
    return next((match[0] for match in found if match), None)


def _bench(result: Mapping[str, Any]) -> str:
    settings, data = result["settings"], result["data"]
    rows = [row for row in result["rows"] if row["role"] != "ensemble"]
    runtimes = [str(row["runtime"]) for row in rows if str(row["artifact"]).endswith(".onnx")]
    names = {f"{row['name']}+{runtime}" for row in rows for runtime in runtimes}
    files = [
        shlex.quote(f"{_ROLES.get(row['role'], row['role'])}:{row['name']}={row['artifact'] or 'FILE'}")
        for row in rows
        if row["name"] not in names  # `--runtime` twice measures each file on both
    ]
    place = [("--data", data["name"]), ("--split", data["split"])]
    if "openvino" in runtimes:
        place += [("--runtime", runtime) for runtime in dict.fromkeys(runtimes)]
    wanted = {
        **_OPTIONS,
        **(_THROUGHPUT if settings.get("mode") == "throughput" else {}),
        **(_MLPERF if settings.get("mlperf") else {}),
    }
    options = [f"{option} {shlex.quote(settings[key])}" for key, option in wanted.items() if settings.get(key)]
    parts = [f"{option} {shlex.quote(value)}" for option, value in place if value]
    ensemble = ["--ensemble"] if result["ensemble"]["members"] else []
    return " \\\n    ".join(
        ["edgekd bench", *files, " ".join(parts), " ".join([*options, *ensemble]), "--out result.json"]
    )


def _compare(comparison: Mapping[str, Any]) -> str:
    recipes = " ".join(shlex.quote(f"{name}.yaml") for name in comparison["methods"]) or "RECIPE.yaml"
    seeds = next((row["seeds"] for row in comparison["rows"] if row["seeds"]), [0])
    return f"edgekd compare {recipes} --seeds {','.join(str(seed) for seed in seeds)} --out DIR"
