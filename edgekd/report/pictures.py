"""Example pictures: what was to be found, what the reference found, what the student found, drawn over one JPEG."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.bench.examples import shown
from edgekd.bench.matching import assign
from edgekd.bench.saved import Saved
from edgekd.report import svg
from edgekd.report.marks import shortened
from edgekd.types import Detections, ImageRecord

_MOST_BYTES = 2_500_000


@dataclass(frozen=True)
class Panel:
    """One drawing over a picture."""

    title: str
    picture: str
    summary: str


@dataclass(frozen=True)
class Example:
    """One image with its panels; `jpeg` is the picture as a data URI, referred to by every panel."""

    key: str
    image_id: str
    why: str
    width: int
    height: int
    jpeg: str
    panels: Sequence[Panel]


def examples_of(
    folder: Path, entries: Sequence[Mapping[str, Any]], saved: Saved, wanted: Sequence[tuple[str, str]]
) -> list[Example]:
    """Examples out of a benchmark's `examples` folder; those that cannot be drawn, and those beyond 2.5 MB, are left out.

    Args:
        entries: of examples.json, fitted. wanted: (row name, panel title) of the models to show.
    """
    rows = {row.name: row for row in saved.rows}
    found: list[Example] = []
    room = _MOST_BYTES
    for position, entry in enumerate(entries):
        file = folder / Path(entry["file"] or "none").name
        record = _record(entry)
        index = entry["index"]
        if record is None or index is None or not file.is_file() or file.stat().st_size > room:
            continue
        room -= file.stat().st_size
        key = f"ex{position}"
        panels = [_truth_panel(key, record, saved.class_names)]
        panels += [
            _model_panel(key, title, record, rows[name].detections[index], saved.class_names)
            for name, title in wanted
            if name in rows and index < len(rows[name].detections)
        ]
        height, width = record.image_hw
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        jpeg = f"data:image/jpeg;base64,{data}"
        found.append(Example(key, record.image_id, entry["why"] or "", width, height, jpeg, panels))
    return found


def _record(entry: Mapping[str, Any]) -> ImageRecord | None:
    """An entry's image with its objects; None if its parts do not belong together."""
    objects, size = entry["objects"], entry["image_hw"]
    boxes, labels, ignored = objects["boxes_xyxy"], objects["labels"], objects["ignored"]
    whole = len(boxes) == len(labels) == len(ignored) and all(len(box) == 4 and None not in box for box in boxes)
    if not whole or None in labels or len(size) != 2 or not all(size):
        return None
    return ImageRecord(
        entry["image_id"] or "",
        Path(entry["file"]),
        (size[0], size[1]),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array([bool(value) for value in ignored], np.bool_),
        np.zeros(len(labels), np.bool_),
    )


def _truth_panel(key: str, record: ImageRecord, names: Sequence[str]) -> Panel:
    boxes = [
        (box, "ignored" if skip else "object", _name(names, label))
        for box, label, skip in zip(record.boxes_xyxy, record.labels.tolist(), record.difficult, strict=True)
    ]
    count = int((~record.difficult).sum())
    summary = f"{count} object{'s' if count != 1 else ''}"
    return Panel("Ground truth", _draw(key, record, boxes, f"Ground truth of {record.image_id}: {summary}"), summary)


def _model_panel(key: str, title: str, record: ImageRecord, found: Detections, names: Sequence[str]) -> Panel:
    """Detections that are right, wrong, on ignored objects; and the objects that were missed."""
    kept = shown(found.take(np.flatnonzero(np.isfinite(found.boxes_xyxy).all(1))))
    verdicts, owners = assign(record, kept)
    kinds = {1: "correct", 0: "wrong", -1: "ignored"}
    boxes = [
        (box, kinds[int(verdict)], f"{_name(names, label)} {100 * score:.0f} %")
        for box, label, score, verdict in zip(
            kept.boxes_xyxy, kept.labels.tolist(), kept.scores.tolist(), verdicts.tolist(), strict=True
        )
    ]
    missed = [i for i in range(len(record.labels)) if i not in owners.tolist() and not record.difficult[i]]
    boxes += [(record.boxes_xyxy[i], "missed", _name(names, int(record.labels[i]))) for i in missed]
    counts = [int((verdicts == 1).sum()), int((verdicts == 0).sum()), len(missed)]
    summary = f"{counts[0]} right, {counts[1]} wrong, {counts[2]} missed"
    return Panel(title, _draw(key, record, boxes, f"{title} on {record.image_id}: {summary}"), summary)


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else f"class {label}"


def _draw(key: str, record: ImageRecord, boxes: Sequence[tuple[Any, str, str]], label: str) -> str:
    """Boxes over the shared picture, in the image's own pixels; labels only while they can still be read."""
    height, width = record.image_hw
    type_px = width / 25  # panels of all pictures are equally wide on the page
    stroke = width / 160
    body = [f'<use href="#{key}"/>']
    for box, kind, _ in boxes:
        x1, y1, x2, y2 = (float(v) for v in box)
        place = f'x="{svg.num(x1)}" y="{svg.num(y1)}" width="{svg.num(x2 - x1)}" height="{svg.num(y2 - y1)}"'
        body.append(f'<rect {place} class="halo" stroke-width="{svg.num(2 * stroke)}"/>')
        body.append(f'<rect {place} class="box {kind}" stroke-width="{svg.num(stroke)}"/>')
    taken: list[tuple[float, float, float, float]] = []
    for box, kind, name in boxes:
        short = shortened(name, 22)
        spot = _label_place([float(v) for v in box], len(short) * type_px * 0.66, type_px, (height, width), taken)
        if spot is not None:
            body.append(
                f'<text x="{svg.num(spot[0])}" y="{svg.num(spot[1])}" class="boxname {kind}" '
                f'style="font-size:{svg.num(type_px)}px;stroke-width:{svg.num(type_px / 4)}px">{svg.escape(short)}</text>'
            )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label={svg.attribute(label)} class="photo">'
        + "".join(body)
        + "</svg>"
    )


def _label_place(
    box: Sequence[float],
    wide: float,
    tall: float,
    image_hw: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float] | None:
    """Where a box's name covers no other: above it, inside it, below it; None if there is no such place."""
    height, width = image_hw
    x = min(max(box[0], 0.0), max(0.0, width - wide))
    for y in (box[1] - 0.3 * tall, box[1] + 1.05 * tall, box[3] + tall, box[3] - 0.3 * tall):
        area = (x, y - 0.85 * tall, x + wide, y + 0.25 * tall)
        clear = all(
            area[0] >= b[2] or b[0] >= area[2] or area[1] >= b[3] or b[1] >= area[3]  # apart in x or in y
            for b in taken
        )
        if clear and area[1] >= 0 and area[3] <= height:
            taken.append(area)
            return x, y
    return None
