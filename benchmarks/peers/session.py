"""All measurements of one run, and the bars they are held against."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import students
import tensorrt_tools
import usual
from environments import Skipped
from peers import Peer
from pictures import Pictures
from systems import Deployed, Timing, open_detector, with_fixed_input

from edgekd.bench.accuracy import evaluate
from edgekd.bench.latency import Measurement, MeasurementPlan, measure
from edgekd.data.images import decode_image, load_image
from edgekd.device.stats import median_ratio, summarise
from edgekd.errors import ClassMapError
from edgekd.postprocess import select
from edgekd.predictor import Predictor
from edgekd.preprocess import prepare
from edgekd.selection import Selection

USUAL = "usual: Pillow, torch eager, NMS per class"
IOU, LIMIT = 0.45, 200
"""SSD's published settings (Liu et al. 2016), with its score threshold of 0.01; the same for everyone here."""

USUAL_CANDIDATES = 300
"""What a trained detector lets through; an untrained one's threshold is set so that as many pass in its median image."""

PLACEHOLDER_CLASSES = tuple(f"class {index}" for index in range(80))
"""As many as the peers were trained on, so that an untrained student's heads are as wide as theirs."""


@dataclass
class Row:
    """One system: what is timed, and the detector in it for accuracy."""

    name: str
    timed: Any
    predictor: Predictor | None = None
    runtime: str = ""
    input_hw: tuple[int, int] = (0, 0)
    classes: int = 0
    note: str = ""


@dataclass
class Session:
    """One run over the same images.

    Attributes:
        skipped: name to reason, of everything that was not measured.
    """

    options: argparse.Namespace
    pictures: Pictures
    peers: Sequence[Peer]
    skipped: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        samples = min(40, self.options.samples) if self.options.quick else self.options.samples
        warmup, at_most = (0.1, 0.5) if self.options.quick else (1.0, 5.0)  # seconds
        self.plan = MeasurementPlan(
            samples, max(2, min(10, samples // 10)), warmup_seconds=warmup, warmup_limit_seconds=at_most
        )
        self.clock = time.process_time_ns if self.options.cpu_time else time.perf_counter_ns
        dataset = self.pictures.dataset
        self.class_names = PLACEHOLDER_CLASSES if dataset is None else dataset.class_names

    def measure(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        detector = students.load(self.options.student, self.options.size, self.class_names)
        self.score = self.options.score if self.options.student else self._score_for(detector)
        opened = self._open_peers()
        sizes = {detector.spec.preprocess.input_hw[0], *(p.preprocess.input_hw[0] for _, p in opened)}
        made = {size: self._student(size) for size in sorted(sizes)}
        student = made[detector.spec.preprocess.input_hw[0]]
        self._add_rows(student, made, opened)
        tell("timing", len(self.rows), "systems end to end")
        measured = measure([row.timed for row in self.rows], self.pictures.jpegs, self.plan, clock=self.clock)
        found = {row.name: result for row, result in zip(self.rows, measured, strict=True)}
        bars = [*self._end_to_end_bars(found, student), *self._preprocessing(student), *self._nms(student, opened)]
        accuracy = self._accuracy()
        return {
            "data": self.pictures.source,
            "images": len(self.pictures.jpegs),
            "student": {
                "model": student.detector.spec.model,
                "width": student.detector.spec.width,
                "trained": student.trained,
                "classes": len(student.detector.spec.class_names),
            },
            "settings": {
                "score_threshold": self.score,
                "nms_iou": IOU,
                "max_detections": LIMIT,
                "samples": self.plan.rounds * self.plan.block,
                "rounds": self.plan.rounds,
                "clock": "CPU time" if self.options.cpu_time else "wall time",
            },
            "rows": [self._row(row, found[row.name], found[USUAL], accuracy.get(row.name)) for row in self.rows],
            "bars": bars,
            "tensorrt": tensorrt_tools.measure(self.files),
            "skipped": self.skipped,
        }

    def _score_for(self, detector: Any) -> float:
        """The threshold that lets a usual number of an untrained detector's candidates through."""
        import torch

        spec, marks = detector.spec.preprocess, []
        for data in self.pictures.jpegs[:8]:
            with torch.inference_mode():
                output = detector(torch.from_numpy(prepare(decode_image(data), spec)[0]))
                scores = detector.decode(output)[1].numpy().ravel()
            marks.append(np.partition(scores, -USUAL_CANDIDATES)[-USUAL_CANDIDATES])
        return float(np.median(marks))

    def _open_peers(self) -> list[tuple[Peer, Predictor]]:
        opened = []
        for peer in self.peers:
            try:
                file = with_fixed_input(peer.file, self.options.size, self.options.out / "peers")
                opened.append((replace(peer, file=file), open_detector(file, self.options.score, IOU, LIMIT)))
            except Skipped as reason:
                self.skipped[peer.name] = str(reason)
        return opened

    def _student(self, size: int) -> students.Student:
        detector = students.load(self.options.student, size, self.class_names)
        thresholds = Selection(self.score, IOU, LIMIT)
        trained = self.options.student is not None
        return students.export(detector, trained, self.options.out / "students", thresholds, self.pictures.jpegs)

    def _add_rows(
        self, student: students.Student, made: dict[int, students.Student], opened: list[tuple[Peer, Predictor]]
    ) -> None:
        spec = student.detector.spec
        eager = usual.UsualPath(student.detector, self.score, IOU, LIMIT)
        self.rows.append(Row(USUAL, eager, None, "torch", spec.preprocess.input_hw, len(spec.class_names)))
        for size, at_size in made.items():
            tag = "" if at_size is student else f" {size} px"
            kinds = [(f"edgekd fp32{tag}", at_size.fp32)]
            if at_size is student:
                kinds += [("edgekd int8", at_size.int8), ("edgekd fp32, NMS in the graph", at_size.finished)]
            for name, file in kinds:
                self._add_detector(name, file, open_detector(file, self.score, IOU, LIMIT))
        for peer, predictor in opened:
            self._add_detector(peer.name, peer.file, predictor, peer.note)

    def _add_detector(self, name: str, file: Path, predictor: Predictor, note: str = "") -> None:
        """Rows on ONNX Runtime and OpenVINO."""
        predictors = {"ONNX Runtime": predictor}
        if "int8" not in name:
            self.files[f"{name}, ONNX Runtime"] = file
        if "OpenVINO" not in self.skipped:
            try:
                score = predictor.selection.score_threshold
                predictors["OpenVINO"] = open_detector(file, score, IOU, LIMIT, "openvino")
            except Skipped as reason:
                self.skipped[f"{name}, OpenVINO"] = str(reason)
        for runtime, found in predictors.items():
            hw, classes = found.preprocess.input_hw, len(found.class_names)
            self.rows.append(Row(f"{name}, {runtime}", Deployed(found), found, runtime, hw, classes, note))

    def _row(
        self, row: Row, measured: Measurement, usual_path: Measurement, accuracy: dict[str, Any] | None
    ) -> dict[str, Any]:
        stages = np.median(measured.stages_ms.reshape(-1, 3), axis=0)
        return {
            "name": row.name,
            "runtime": row.runtime,
            "input_hw": list(row.input_hw),
            "classes": row.classes,
            "latency_ms": summarise(measured.total_ms),
            "stages_ms": dict(zip(("pre", "infer", "post"), (round(float(v), 3) for v in stages), strict=True)),
            "times_faster_than_usual": interval(usual_path.total_ms, measured.total_ms),
            "settled": measured.settled,
            "accuracy": accuracy,
            "note": row.note,
        }

    def _end_to_end_bars(self, found: dict[str, Measurement], student: students.Student) -> list[dict[str, Any]]:
        usual_path, fp32 = found[USUAL].total_ms, found["edgekd fp32, ONNX Runtime"]
        int8 = found["edgekd int8, ONNX Runtime"].total_ms
        bars = [
            bar("end to end from JPEG bytes, fp32, over the usual path", 2.5, usual_path, fp32.total_ms),
            bar("end to end from JPEG bytes, int8, over the usual path", 4.5, usual_path, int8),
        ]
        rival = next((row for row in self.rows if row.name == "yolo11n, ONNX Runtime"), None)
        if rival is None:
            reason = self.skipped.get("yolo11n", "not given")
            return [*bars, {"what": "student's latency over yolo11n's", "not_measured": reason}]
        same = rival.input_hw == student.detector.spec.preprocess.input_hw
        ours = fp32 if same else found[f"edgekd fp32 {rival.input_hw[0]} px, ONNX Runtime"]
        theirs, at = found[rival.name], f"fp32, both at {rival.input_hw[0]} px"
        return [
            *bars,
            bar(
                f"student's latency over yolo11n's, end to end, {at}",
                0.85,
                ours.total_ms,
                theirs.total_ms,
                at_most=True,
            ),
            bar(
                f"student's latency over yolo11n's, inference alone, {at}",
                0.85,
                ours.stages_ms[..., 1],
                theirs.stages_ms[..., 1],
                at_most=True,
            ),
        ]

    def _preprocessing(self, student: students.Student) -> list[dict[str, Any]]:
        spec = student.detector.spec.preprocess

        def naive(data: bytes) -> object:
            return usual.prepare(data, spec.input_hw, spec.mean, spec.std)

        def ours(data: bytes) -> object:
            return prepare(decode_image(data), spec)

        tell("timing", 2, "preprocessings")
        slow, fast = measure([Timing(naive), Timing(ours)], self.pictures.jpegs, self.plan, clock=self.clock)
        return [bar("preprocessing, JPEG bytes to tensor, over Pillow + naive", 2.5, slow.total_ms, fast.total_ms)]

    def _nms(self, student: students.Student, opened: list[tuple[Peer, Predictor]]) -> list[dict[str, Any]]:
        bars = []
        ours = open_detector(student.fp32, self.score, IOU, LIMIT)
        for name, predictor in [
            ("the student's candidates", ours),
            *((f"{p.name}'s candidates", q) for p, q in opened),
        ]:
            if predictor.form.is_finished:
                continue
            inputs = [self._candidates(predictor, data) for data in self.pictures.jpegs]
            bars.append(self._nms_bar(name, inputs, predictor.selection.score_threshold))
        return bars

    def _candidates(self, predictor: Predictor, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        tensor, _ = predictor.prepare(decode_image(data))
        boxes, scores = predictor.candidates(predictor.infer(tensor))
        return np.array(boxes), np.array(scores)  # copies: a runtime may reuse its outputs

    def _nms_bar(self, name: str, inputs: list[Any], score: float) -> dict[str, Any]:
        """The best of the plain forms against edgekd's, once all are known to give the same detections."""

        def select_(value: Any) -> object:
            return select(*value, score_threshold=score, nms_iou=IOU, max_detections=LIMIT)

        def plain(form: Callable[..., usual.Found]) -> Callable[[Any], object]:
            return lambda value: form(*value, score, IOU, LIMIT)

        taken = dict.fromkeys(usual.PLAIN_NMS, 0.0)
        for value in inputs:
            found = {}
            for key, form in usual.PLAIN_NMS.items():
                start = self.clock()
                found[key] = plain(form)(value)
                taken[key] += self.clock() - start
            assert_same(select_(value), found)
        forms = {
            key: usual.PLAIN_NMS[key] for key in taken if taken[key] < 3 * min(taken.values())
        }  # who could be best
        tell("timing", len(forms) + 1, f"forms of NMS on {name}")
        systems = [Timing(select_), *(Timing(plain(form)) for form in forms.values())]
        ours, *others = measure(systems, inputs, self.plan, clock=self.clock)
        medians = {key: float(np.median(m.total_ms)) for key, m in zip(forms, others, strict=True)}
        best = min(medians, key=medians.__getitem__)
        fastest = others[list(medians).index(best)]
        passing = int(np.median([np.count_nonzero(scores > score) for _, scores in inputs]))
        what = f"NMS on {name} ({passing:,} an image) over the best plain numpy ({best}), same detections"
        return bar(what, 3.0, fastest.total_ms, ours.total_ms)

    def _accuracy(self) -> dict[str, dict[str, Any]]:
        """By row; what runs the same network elsewhere is measured too, since runtimes round differently."""
        dataset, found = self.pictures.dataset, {}
        if dataset is None:
            return {}
        records = dataset.records[: self.options.limit or (20 if self.options.quick else None)]
        for row in self.rows:
            is_ours = row.name.startswith("edgekd")
            if row.predictor is None or (is_ours and (self.options.student is None or " px," in row.name)):
                continue
            try:
                predictor = row.predictor.with_classes(dataset.class_names).with_selection(score_threshold=0.001)
            except ClassMapError as error:
                self.skipped[f"accuracy of {row.name}"] = str(error).splitlines()[0]
                continue
            tell("accuracy", len(records), f"images, {row.name}")
            answers = [predictor.detect(load_image(record.path)) for record in records]
            score = evaluate(records, answers, dataset.class_names)
            found[row.name] = {"ap50": score.ap50, "ap": score.ap, "images": score.images}
        return found


def assert_same(ours: Any, others: dict[str, usual.Found]) -> None:
    """Every form of NMS gave exactly these detections.

    Raises:
        AssertionError: one did not; a speed of different results would mean nothing.
    """
    mine = (ours.boxes_xyxy, ours.scores, ours.labels)
    for name, theirs in others.items():
        if not all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            raise AssertionError(f"NMS {name!r} gives other detections than edgekd.postprocess.select")


def interval(numerator: Any, denominator: Any) -> dict[str, float]:
    """A ratio of medians with its 95 % interval."""
    found = median_ratio(numerator, denominator)
    return {"value": round(found.value, 3), "low": round(found.low, 3), "high": round(found.high, 3)}


def bar(what: str, wanted: float, numerator: Any, denominator: Any, *, at_most: bool = False) -> dict[str, Any]:
    """A ratio and whether it reaches what was aimed for: "yes" or "no" where the whole interval does, "unclear" between."""
    ratio = interval(numerator, denominator)
    sides = [ratio[end] <= wanted if at_most else ratio[end] >= wanted for end in ("low", "high")]
    met = "unclear" if sides[0] != sides[1] else ("yes" if sides[0] else "no")
    return {"what": what, "wanted": wanted, "at_most": at_most, "ratio": ratio, "met": met}


def tell(stage: str, count: int, what: str) -> None:
    """Progress, on stderr."""
    print(f"  {stage}: {count} {what}", file=sys.stderr, flush=True)
