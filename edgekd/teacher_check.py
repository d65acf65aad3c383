"""Is a black box read rightly? What its boxes agree with, measured on labelled images before a student believes them.

A foreign detector's file seldom says how its pixels are to be scaled or its pictures resized. A wrong guess gives boxes
still, only worse ones, and nothing fails: the student learns from them. The training split is labelled, so the guess can
be tested: on a few of its images each usual preprocessing is tried, for a declared one may be wrong as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgekd.artifact import is_current, write_json, write_manifest
from edgekd.boxes import iou_matrix
from edgekd.data.images import load_image, spread_places
from edgekd.errors import ArtifactError
from edgekd.predictor import Predictor
from edgekd.recipe import OnnxTeacher, TeacherConfig
from edgekd.runtimes.output_format import Background, BoxFormat, OutputFormat
from edgekd.teachers.predicted import PredictorTeacher
from edgekd.types import BoolArray, Channels, Dataset, Detections, ImageArray, ImageRecord, PreprocessSpec, ResizeMode

IMAGES = 32
"""A teacher is tried on so many training images at most."""
FEWEST_IMAGES = 8
SECONDS = 20.0
"""All tries of one teacher together take about this, on fewer images if it must be."""
BETTER = 0.05
"""AP50 by which another reading must win to be spoken of, on each half of the images: on all of them alone, chance let one
of five readings that do as well win (yolov8n on 8 to 32 images of VOC), on both halves one of thirty."""
RARER = 0.02
"""AP50 by which a corner must win over the middle."""
POOR = 0.1
"""AP50 below which a teacher is hardly one, so that no other reading of its outputs is believed either."""
SURE = 0.25
"""Score from which on a box says what its object is."""
FEWEST_CALLED, MOSTLY_CALLED = 5, 0.8
"""Objects of one class, and the share of them that it finds, which it must call by one other name to be doubted."""
_PLAIN = ("xyxy", "yxyx", "cxcywh", "xywh")
_ALIKE = (("xyxy", "yxyx"), ("cxcywh", "xywh"))
"""Box formats that candidates all over a picture of noise do not tell apart."""
Reading = tuple[PreprocessSpec, str]
"""How pictures are prepared, and what declares the reading of the outputs."""
RESIZE_MODES: tuple[ResizeMode, ...] = ("stretch", "letterbox", "letterbox-corner")
_IMAGENET = (0.485, 0.456, 0.406)
# (channels, mean, std) of pixels scaled to [0, 1]: as they are, ImageNet's, from -1 to 1, from 0 to 255; what OpenCV reads,
# scaled alone, Caffe's, as it is, and ImageNet's (NanoDet, RTMDet).
_COLOURS: tuple[tuple[Channels, tuple[float, float, float], tuple[float, float, float]], ...] = (
    ("rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ("rgb", _IMAGENET, (0.229, 0.224, 0.225)),
    ("rgb", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ("rgb", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    ("bgr", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ("bgr", _IMAGENET[::-1], (1 / 255, 1 / 255, 1 / 255)),
    ("bgr", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    ("bgr", _IMAGENET[::-1], (0.225, 0.224, 0.229)),
)
_TRIES = len(_COLOURS) + len(RESIZE_MODES) - 2


def check_reading(
    dataset: Dataset,
    config: TeacherConfig,
    teacher: PredictorTeacher,
    identity: Mapping[str, Any],
    folder: Path,
    data_identity: object,
) -> dict[str, Any]:
    """How well a foreign detector agrees with the labels, and what would agree better; see `examine` for what it gives.

    Args:
        dataset: the training split. data_identity: its content. identity: the teacher's.
        folder: where the findings are kept, so that nobody waits for them twice.
    """
    place = folder / teacher.name / "reading"
    inputs = {"teacher": dict(identity), "data": data_identity, "classes": list(dataset.class_names)}
    if not is_current(place, "reading", inputs):
        # A module of the user's own prepares its pictures by code, which no key of the recipe could change; so are its boxes.
        searched = isinstance(config, OnnxTeacher)
        found = examine(dataset, f"teacher {teacher.name}", teacher.predictor, teacher.known, searched=searched)
        write_json(place / "reading.json", found)
        write_manifest(place, "reading", inputs, ["reading.json"], {"teacher": teacher.name})
    kept: dict[str, Any] = json.loads((place / "reading.json").read_text(encoding="utf-8"))
    return kept


def is_foreign(teacher: PredictorTeacher) -> bool:
    """Whether what a teacher's file says of itself was guessed: of edgekd's own files nothing is."""
    return teacher.detector is None and teacher.predictor.facts.get("model") is None


def other_colours(now: PreprocessSpec) -> list[PreprocessSpec]:
    """The same pictures with their colours in every other usual form."""
    forms = [replace(now, channels=channels, mean=mean, std=std) for channels, mean, std in _COLOURS]
    return [form for form in forms if form != now]


def other_sizes(now: PreprocessSpec) -> list[PreprocessSpec]:
    """The same colours, brought to the input's size in every other way."""
    return [replace(now, resize=mode) for mode in RESIZE_MODES if mode != now.resize]


def other_forms(now: OutputFormat) -> dict[str, OutputFormat]:
    """Readings of the same outputs that nothing but labels can tell from the present one, by what declares them."""
    found = {}
    coding, dash, unit = now.box_format.partition("-")
    others = tuple(other for pair in _ALIKE if coding in pair for other in pair if other != coding)
    if now.kind == "detections":
        start: Background = "none" if now.background == "first" else "first"
        found[f"background: {start}"] = replace(now, background=start)
        others = tuple(other for other in _PLAIN if other != coding) if coding in _PLAIN else ()
    if now.kind == "boxes-scores" and now.activation == "sigmoid" and now.background != "none":  # a column never used
        end: Background = "last" if now.background == "first" else "first"
        found[f"background: {end}"] = replace(now, background=end)
    if now.box_format == "grid-anchors":  # sizes of one's own under the name of another family
        family = "yolov3" if now.anchors_squared else "yolov5"
        other_set = replace(now, anchors_squared=not now.anchors_squared, centre_scales=())
        found[f"anchors: {{{family}: [...]}}"] = other_set
    for other in others:
        box_format = cast(BoxFormat, other + dash + unit)
        found[f"box_format: {box_format}"] = replace(now, box_format=box_format, unit_unseen=False)
    return found


def other_boxes(now: OutputFormat) -> dict[str, OutputFormat]:
    """What a module of the user's own may give in place of the corners in pixels that it is asked for, by its name."""
    formats = (cast(BoxFormat, f"{coding}{unit}") for unit in ("", "-normalised") for coding in _PLAIN)
    return {box_format: replace(now, box_format=box_format) for box_format in formats if box_format != now.box_format}


def to_declare(spec: PreprocessSpec, now: PreprocessSpec) -> str:
    """What a recipe says for `spec` where the teacher is read as `now`."""
    changes = []
    if spec.channels != now.channels:
        changes.append(f"channels: {spec.channels}")
    if (spec.mean, spec.std) != (now.mean, now.std):
        changes.append(f"mean: {_list(spec.mean)}, std: {_list(spec.std)}")
    if spec.resize != now.resize:
        changes.append(f"resize: {spec.resize}")
    return ", ".join(changes)


def examine(
    dataset: Dataset, who: str, predictor: Predictor, knows: Sequence[bool] | BoolArray, *, searched: bool = True
) -> dict[str, Any]:
    """How well a detector agrees with the labels of some images, and what would agree better.

    Args:
        dataset: labelled. who: what messages call the detector.
        predictor: answering in the set's classes. knows: for each of them, whether it can be found at all.
        searched: whether other ways to prepare pictures are tried, and of reading what a file may give; of a module's
            answers other boxes alone.

    Returns:
        "says", a sentence, and "doubtful", whether it is a warning.
    """
    known = [name for name, found in zip(dataset.class_names, knows, strict=True) if found]
    labels = {label for label, found in enumerate(knows) if found}
    telling = [r for r in dataset.records if labels & set(r.labels[r.trainable].tolist())]
    if not telling:
        return {"doubtful": False, "says": f"{who}: no image shows a class that it knows"}
    records = [telling[place] for place in spread_places(len(telling), IMAGES)]
    pictures = [load_image(record.path) for record in records]
    others_of = other_forms if searched else other_boxes
    spec, forms = predictor.preprocess, {"": predictor.form, **others_of(predictor.form)}
    start = time.perf_counter()
    _answers(predictor, pictures[:FEWEST_IMAGES], spec, forms)
    per_image = (time.perf_counter() - start) / len(pictures[:FEWEST_IMAGES])
    count = min(len(records), max(FEWEST_IMAGES, int(SECONDS / per_image / (1 + _TRIES * searched))))
    kept = spread_places(len(records), count)
    records, pictures = [records[place] for place in kept], [pictures[place] for place in kept]
    tried: dict[Reading, list[float]] = {}
    shuffled = np.random.default_rng(0).permutation(count)  # sets are sorted by content, and may take turns in it
    parts = [p.tolist() for p in (shuffled, shuffled[: count // 2], shuffled[count // 2 :]) if len(p)]

    def note(other: PreprocessSpec, answers: Mapping[str, Sequence[Detections]]) -> None:
        for declares, found in answers.items():
            tried[other, declares] = [
                agreement([records[i] for i in part], [found[i] for i in part], dataset.class_names, known)
                for part in parts
            ]

    def measure(others: Sequence[PreprocessSpec]) -> None:
        for other in others:
            note(other, _answers(predictor, pictures, other, forms))

    as_read = _answers(predictor, pictures, spec, forms)
    note(spec, as_read)
    now = tried[spec, ""][0]
    if searched:  # first colours, then sizes with the best of them: all pairs would take three times as long
        measure(other_colours(spec))
        best_colours = max(tried, key=lambda reading: tried[reading])[0]  # by chance, it may be: the present ones, too
        for colours in dict.fromkeys((best_colours, spec)):
            measure(other_sizes(colours))
    where = f"AP50 {100 * now:.1f} on {count} of the images of {dataset.split}"
    doubtful = True
    best = _better(tried, (spec, ""))
    if best is not None:
        declares = ", ".join(filter(None, (to_declare(best[0], spec), best[1])))
        if searched:
            says = f"{who} may be read wrongly: {where}, but {100 * tried[best][0]:.1f} with `{declares}`; declare that for it"
            says += " if it was trained so" if best[0] != spec else ""
        else:
            says = f"{who} may give other boxes than corners in pixels: {where}, but {100 * tried[best][0]:.1f} where they are "
            says += f"read as {declares}; its adapter must give them as xyxy, in pixels of its input"
        found = _answers(predictor, pictures, best[0], forms)[best[1]]
        if called := called_otherwise(records, found, dataset.class_names, labels):
            says += f". Even so, {called}: check its class names, their order and its class map, too"
    elif called := called_otherwise(records, as_read[""], dataset.class_names, labels):
        says = f"{who} may have its classes wrong: {where}, and {called}; check its class names, their order and its class map"
    elif now < POOR:
        look = " (`edgekd predict` draws what it finds)" if searched else ""
        says = (
            f"{who} agrees with hardly any label: {where}; its class names and map, box format or the labels "
            f"may be wrong{look}, or it does not know such pictures"
        )
    else:
        ways = len({other for other, _ in tried}) - 1
        besides = f"; {ways} other ways to prepare its pictures do no better" if ways else ""
        doubtful, says = False, f"{who}: {where}{besides}"
    return {"doubtful": doubtful, "says": says, "ap50": now, "images": count}


def _answers(
    predictor: Predictor, pictures: Sequence[ImageArray], spec: PreprocessSpec, forms: Mapping[str, OutputFormat]
) -> dict[str, list[Detections]]:
    """What the detector finds in pictures prepared so, by every reading of its outputs; without those that fail.

    Raises:
        ArtifactError: the present reading fails.
    """
    prepared = predictor.with_preprocess(spec)
    readers = {declares: prepared.with_form(form) for declares, form in forms.items()}
    found: dict[str, list[Detections]] = {declares: [] for declares in readers}
    for picture in pictures:
        tensor, geometry = prepared.prepare(picture)
        raw = prepared.infer(tensor)
        for declares in list(found):
            try:
                found[declares].append(readers[declares].finish(raw, geometry))
            except ArtifactError:  # labels that have no name when they are read so
                if spec == predictor.preprocess and readers[declares].form == predictor.form:
                    raise
                del found[declares]
    return found


def _better(tried: Mapping[Reading, Sequence[float]], now: Reading) -> Reading | None:
    """The reading that agrees clearly better with the labels; of several that do nearly as well, one that changes least.

    Args:
        tried: agreement on all images, then on each half of them.
    """

    def judged(reading: Reading, part: int = 0) -> float:
        # On a few images a corner does as well as the middle by chance; the rarer of the two must do better to be named.
        return tried[reading][part] - RARER * (reading[0].resize == "letterbox-corner" != now[0].resize)

    def wins(reading: Reading) -> bool:
        return all(judged(reading, part) >= of_now + BETTER for part, of_now in enumerate(tried[now]))

    better = [r for r in tried if wins(r) and (r[1] == now[1] or tried[r][0] >= POOR + BETTER)]
    good = [r for r in better if judged(r) > max(map(judged, better)) - BETTER]

    def changes(reading: Reading) -> int:
        spec, present = reading[0], now[0]
        colours = replace(spec, resize=present.resize) != present
        return colours + (spec.resize != present.resize) + (reading[1] != now[1])

    return min(good, key=lambda r: (changes(r), -judged(r)), default=None)


def agreement(
    records: Sequence[ImageRecord], found: Sequence[Detections], class_names: Sequence[str], known: Sequence[str]
) -> float:
    """AP50 over the classes that the teacher knows and the images show; 0 where there are none."""
    from edgekd.bench.accuracy import evaluate

    per_class = evaluate(records, found, class_names).per_class
    figures = [value for name in known if (value := per_class[name].ap50) is not None]
    return sum(figures) / len(figures) if figures else 0.0


def called_otherwise(
    records: Sequence[ImageRecord], found: Sequence[Detections], class_names: Sequence[str], labels: Collection[int]
) -> str:
    """Which class a detector mostly takes for which other one, in words; empty where there is none.

    Args:
        labels: of the classes that the detector knows.
    """
    called = np.zeros((len(class_names), len(class_names)), np.int64)
    for record, detections in zip(records, found, strict=True):
        sure = detections.scores > SURE
        overlaps = iou_matrix(record.boxes_xyxy, detections.boxes_xyxy[sure]) > 0.5
        for label, there, over in zip(record.labels.tolist(), record.trainable, overlaps, strict=True):
            if label in labels and there and over.any():
                called[label, detections.labels[sure][over.argmax()]] += 1  # the best one, since these come best first
    otherwise = called * (1 - np.eye(len(called), dtype=np.int64))
    met = called.sum(1, keepdims=True)
    otherwise[(otherwise < FEWEST_CALLED) | (otherwise < MOSTLY_CALLED * met)] = 0
    label, other = divmod(int(otherwise.argmax()), len(class_names))
    if not otherwise[label, other]:
        return ""
    objects = f"of the {met[label, 0]} objects labelled {class_names[label]} that it finds"
    return f"{objects} it calls {otherwise[label, other]} {class_names[other]}"


def _list(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
