"""An engine and its manifest: kept with what its source was measured with, refused where it does not belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgekd.errors import ArtifactError
from edgekd.export.engine import EngineOptions
from edgekd.export.engine_job import EngineResult, export_engine
from edgekd.predictor import load_predictor
from edgekd.runtimes.engine_file import manifest_path, read_engine_manifest
from edgekd.runtimes.tensorrt_runtime import TensorRTRuntime
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, write_detector
from tests.engine_doubles import Machine, moving_detector, ours
from tests.fake_tensorrt import ORIN, FakeTensorRT


def test_an_engine_keeps_what_its_source_was_measured_with(machine: Machine, tmp_path: Path) -> None:
    machine()
    source, out = ours(moving_detector(), tmp_path / "student.onnx"), tmp_path / "student.engine"
    thresholds = {"score_threshold": 0.01, "nms_iou": 0.55, "max_detections": 50, "box_voting": 0.8}
    model = onnx.load(source)
    entry = model.metadata_props.add()
    entry.key, entry.value = "edgekd.thresholds", json.dumps(thresholds)
    onnx.save(model, source)
    assert export_engine(source, out).manifest.thresholds == thresholds
    with load_predictor(out) as engine, load_predictor(source) as plain:
        assert engine.own_selection() == plain.own_selection() == {k: thresholds[k] for k in list(thresholds)[1:]}
    written = json.loads(manifest_path(out).read_text(encoding="utf-8"))
    del written["thresholds"]  # as engines were before they kept them
    manifest_path(out).write_text(json.dumps(written), encoding="utf-8")
    with load_predictor(out) as engine:
        assert engine.own_selection() == {}


@pytest.fixture
def built(machine: Machine, detector: Path, tmp_path: Path) -> tuple[FakeTensorRT, Path, EngineResult]:
    fake = machine()
    out = tmp_path / "student.engine"
    return fake, out, export_engine(detector, out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "10.13.3.9"}, "another TensorRT"),
        ({"device": replace(ORIN, compute_capability="8.6")}, "another GPU"),
        ({"device": replace(ORIN, l4t="36.3.0")}, "another L4T"),
        ({"device": replace(ORIN, l4t=None)}, "not a Jetson"),
    ],
)
def test_a_foreign_engine_is_refused_with_the_command_that_rebuilds_it(
    built: tuple[FakeTensorRT, Path, EngineResult], machine: Machine, change: dict[str, Any], words: str
) -> None:
    _, out, result = built
    machine(**change)
    with pytest.raises(ArtifactError, match=words) as caught:
        load_predictor(out)
    assert caught.value.fix == result.manifest.rebuild
    assert "--format engine --precision fp32" in result.manifest.rebuild


def test_a_stale_engine_is_refused(built: tuple[FakeTensorRT, Path, EngineResult], detector: Path) -> None:
    _, out, _ = built
    write_detector(detector, GOOD_BOXES, GOOD_SCORES * 0.5)
    with pytest.raises(ArtifactError, match=r"another student\.onnx"):
        load_predictor(out)
    detector.unlink()  # an engine alone, as on a target, is no stale one
    load_predictor(out).close()


def test_another_file_of_the_source_s_name_beside_the_engine_is_not_its_source(
    machine: Machine, detector: Path, tmp_path: Path
) -> None:
    """The comparison runs the plan from a folder below, from where ../student.onnx is another one."""
    machine()
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / detector.name).write_bytes(b"an earlier student")
    export_engine(detector, folder / "s.engine")
    assert read_engine_manifest(folder / "s.engine").source["path"] == f"../{detector.name}"
    TensorRTRuntime(folder / "s.engine").close()


def test_an_engine_is_stale_too_when_weights_beside_its_source_have_changed(
    machine: Machine, detector: Path, tmp_path: Path
) -> None:
    machine()
    weights = tmp_path / "weights.data"
    onnx.save(onnx.load(detector), detector, save_as_external_data=True, location=weights.name, size_threshold=0)
    out = tmp_path / "student.engine"
    export_engine(detector, out)
    load_predictor(out).close()
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(ArtifactError, match=r"another weights\.data"):
        load_predictor(out)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: out.unlink(), "no such file"),
        (lambda out: manifest_path(out).unlink(), "manifest that belongs to it is missing"),
        (lambda out: manifest_path(out).write_text("{"), "damaged"),
        (lambda out: manifest_path(out).write_text('{"schema": "edgekd.engine/1"}'), "damaged"),
        (lambda out: manifest_path(out).write_text('{"schema": "edgekd.engine/9"}'), "another version of edgekd"),
        (lambda out: out.write_bytes(out.read_bytes() + b" "), "not the engine that its manifest speaks of"),
    ],
)
def test_damaged_engines(
    built: tuple[FakeTensorRT, Path, EngineResult], damage: Callable[[Path], object], words: str
) -> None:
    _, out, _ = built
    damage(out)
    with pytest.raises(ArtifactError, match=words):
        load_predictor(out, runtime="tensorrt")


def test_a_version_compatible_engine_goes_to_later_versions_of_its_major(
    machine: Machine, detector: Path, tmp_path: Path
) -> None:
    machine("10.3.0")
    out = tmp_path / "s.engine"
    manifest = export_engine(detector, out, options=EngineOptions(version_compatible=True)).manifest
    assert "VERSION_COMPATIBLE" in manifest.flags
    machine("10.16.1.11")
    load_predictor(out).close()
    machine("11.4.0.106")
    with pytest.raises(ArtifactError, match="another TensorRT"):
        load_predictor(out)
