"""Every format of `onnx_zoo` must give the right boxes, classes and scores on a picture of another shape than the input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekd.predictor import Predictor, load_predictor
from edgekd.recipe import OnnxTeacher
from tests.onnx_zoo import BOXES, EXPORTS, LABELS, SCORES, SOURCE_HW, Export, write

onnx = pytest.importorskip("onnx")
PICTURE = np.full((*SOURCE_HW, 3), 114, np.uint8)


def opened(export: Export, path: Path, **options: object) -> Predictor:
    declared = OnnxTeacher(name="m", onnx=str(path), **{**export.declared, **options})
    return load_predictor(path, options=declared, score_threshold=0.01)


def check(export: Export, predictor: Predictor, tolerance: float = 0.05) -> None:
    found = predictor.detect(PICTURE)
    assert len(found) == 3, found
    np.testing.assert_allclose(found.boxes_xyxy, BOXES, atol=tolerance)
    np.testing.assert_allclose(found.scores, SCORES, atol=1e-3)
    assert predictor.class_names == export.names
    expected = ["person"] * 3 if export.names == ("person",) else [("cat", "dog", "cow")[label] for label in LABELS]
    assert [predictor.class_names[label] for label in found.labels] == expected


@pytest.mark.parametrize("case", EXPORTS)
def test_every_export_gives_its_boxes(case: str, tmp_path: Path) -> None:
    export = EXPORTS[case]
    with opened(export, write(export, tmp_path / "m.onnx")) as predictor:
        check(export, predictor, 2.0 if "half" in case else 0.05)
        spec = predictor.preprocess
        assert (spec.input_hw, spec.resize, spec.channels) == (export.input_hw, export.resize, export.channels)
        np.testing.assert_allclose((spec.mean, spec.std), export.scaling, atol=5e-3)
        assert predictor.facts["notes"]


@pytest.mark.parametrize("case", [case for case, export in EXPORTS.items() if export.hidden])
def test_a_probe_that_finds_nothing_leads_to_the_same(case: str, tmp_path: Path) -> None:
    export = EXPORTS[case]
    with opened(export, write(export, tmp_path / "m.onnx", empty_probe=True)) as predictor:
        check(export, predictor)
