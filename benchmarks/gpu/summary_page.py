"""summary.md out of the stages' records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Data = Mapping[str, Any]


def markdown(found: Mapping[str, Data]) -> str:
    """One page: what ran and what did not, then a table a stage."""
    parts = ["# On this GPU", _machine(found), "## Stages", _stages(found)]
    for name, title, rows in (
        ("buffers", "Buffers", _buffers),
        ("engines", "Engines", _engines),
        ("latency_engines", "Latency of engines, `edgekd bench`", _latency),
        ("latency_torch", "Latency in torch", _latency),
        ("device_bundle", "The bundle's own program (inference alone)", _latency),
        ("training", "Training", _training),
    ):
        table = rows(found[name]) if name in found else ""
        if table:
            parts += [f"## {title}", table]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(found: Mapping[str, Data]) -> str:
    facts = found.get("facts", {})
    device, torch = facts.get("device") or {}, facts.get("torch") or {}
    gpu = (device.get("gpu") or {}).get("name") or "no CUDA device"
    said = [gpu, f"torch {torch.get('version')} (CUDA {torch.get('cuda')})", f"{device.get('cpu')}"]
    trt = found.get("engines", {}).get("tensorrt") or facts.get("tensorrt")
    said.append(f"TensorRT {trt}" if trt else "no TensorRT")
    return "; ".join(said) + f". Commit {next(iter(found.values()), {}).get('commit')}." if found else ""


def _stages(found: Mapping[str, Data]) -> str:
    rows = [[name, data["status"], _number(data["seconds"], 0), data["reason"]] for name, data in found.items()]
    return table(("stage", "status", "s", "why"), rows)


def _buffers(data: Data) -> str:
    columns = ("round_trip", "graph", "shared_with_torch", "torch_after_close", "to_device_gb_s", "to_host_gb_s")
    heads = ("backend", *(name.replace("_", " ").replace("gb s", "GB/s") for name in columns), "why not")
    rows = [
        [entry["name"], *(entry.get(name) for name in columns), entry.get("reason")]
        for entry in data.get("backends", ())
    ]
    return table(heads, rows) if rows else ""


def _engines(data: Data) -> str:
    rows = []
    for entry in data.get("engines", ()):
        layers = ", ".join(f"{count} {kind}" for kind, count in (entry.get("layer_precisions") or {}).items())
        parity = (entry.get("parity") or [{}])[-1]
        pair = [_points(parity.get(key)) for key in ("ap50_reference", "ap50")]
        agreed = f"{parity['matched']} of {parity['confident']}" if "matched" in parity else None
        size = _number(entry.get("size_bytes", 0) / 1e6, 1)
        what = f"{entry['name']} {entry['precision']}"
        rows.append([what, _number(entry.get("build_s"), 1), size, layers, agreed, *pair, entry.get("reason")])
    heads = ("engine", "build s", "MB", "layers", "detections found again", "AP50 of its ONNX", "AP50", "why not")
    return table(heads, rows) if rows else ""


def _latency(data: Data) -> str:
    rows = []
    for row in data.get("rows") or (data.get("result") or {}).get("rows", ()):
        if "reason" in row:
            rows.append([row["name"], *[None] * 8, row["reason"]])
            continue
        latency, stages, device = row["latency_ms"], row["stages_ms"], row.get("device_ms") or {}
        speed = row.get("speedup_vs_ensemble")
        rows.append(
            [
                row["name"],
                row["precision"],
                _points((row.get("map") or {}).get("ap50")),
                _number(latency["median"], 3),
                _number(latency["p99"], 3),
                _number(stages["infer"], 3),
                _number(device.get("compute"), 3),
                _number(row.get("energy_mj"), 1),
                None if speed is None else f"{speed:.2f}x",
                "; ".join(_sessions(row)) or None,
            ]
        )
    heads = ("what", "precision", "AP50", "median ms", "p99", "inference", "GPU compute", "mJ", "vs ensemble", "notes")
    return table(heads, rows) if rows else ""


def _sessions(row: Data) -> Iterable[str]:
    session = row.get("session")
    if session and session.get("build_seconds") is not None:
        yield f"built in {session['build_seconds']} s"
    if row.get("settled") is False:
        yield "had not settled"


def _training(data: Data) -> str:
    rows, costs = [], []
    for recipe in data.get("recipes", ()):
        if "reason" in recipe:
            costs.append([recipe["name"], *[None] * 4, recipe["reason"]])
            continue
        for one in recipe["trainings"]:
            speeds = one["images_per_s"]
            rates = [_number(speeds[key], 0) for key in ("loader_first_epoch", "loader", "step", "both")]
            bound = "the loader" if one["loader_bound"] else "arithmetic"
            name = f"{recipe['name']}: {one['name']} ({one['model']})"
            rows.append([name, one["precision"], *rates, _number(1e3 * one["s_per_step"], 1), bound])
        cost = [recipe["name"], recipe["images"], recipe["epochs"], recipe["batch_size"]]
        costs.append([*cost, _number(recipe["hours"], 2), None])
    if not costs:
        return ""
    heads = (
        "training",
        "precision",
        "loader, first epoch",
        "loader",
        "step on the device",
        "both",
        "ms a step",
        "bound by",
    )
    total = ("recipe", "images", "epochs", "batch", "hours of all its trainings", "why not")
    where = f"On {data.get('device')}; rates in images a second."
    return "\n\n".join([where, table(heads, rows), table(total, costs)])


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; nothing for None, and no cell that breaks its row."""
    lines = [heads, ["---"] * len(heads), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return " ".join(text.replace("|", "/").split())[:240]


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _points(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"
