"""Feature maps of ONNX teachers that nobody has named: `taps: auto`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.checkpoint import load_detector
from edgekd.errors import UserError
from edgekd.export.onnx import export_onnx
from edgekd.losses.base import Pair
from edgekd.losses.pkd import PKDTerm
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.auto_taps import shared_maps, taps_by_stride
from edgekd.runtimes.onnx_file import open_onnx
from edgekd.teachers import build_teacher
from tests.export_double import traced
from tests.toy_onnx import write_constant_detector


def test_a_yolos_neck_is_found(yolo11n_onnx: Path) -> None:
    opened = open_onnx(yolo11n_onnx, OnnxTeacher(name="t", onnx=str(yolo11n_onnx), taps="auto"))
    opened.runtime.close()
    assert opened.tap_tensors == {
        f"p{level}": f"/model.{layer}/cv2/act/Mul_output_0" for level, layer in ((3, 16), (4, 19), (5, 22))
    }
    assert opened.tap_grids == {"p3": (64, (80, 80)), "p4": (128, (40, 40)), "p5": (256, (20, 20))}
    assert any("/model.19/cv2/act/Mul_output_0 (128 channels, 40x40)" in note for note in opened.facts["notes"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_what_the_heads_of_our_own_exports_read_is_found(
    checkpoint: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.export.onnx.trace", traced)
    detector = load_detector(checkpoint)
    pictures = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (detector.spec.preprocess.mean, detector.spec.preprocess.std))
    prepared = (pictures.float() / 255 - mean) / std
    calibration = [one[None].numpy() for one in prepared]
    file = export_onnx(detector, tmp_path / "own.onnx", precision=precision, calibration=calibration)  # type: ignore[arg-type]
    teacher = build_teacher(OnnxTeacher(name="t", onnx=str(file), taps="auto"), ("cat", "dog"))
    try:
        assert {name: tap.grid_hw for name, tap in teacher.tap_specs.items()} == {"p4": (6, 6), "p5": (3, 3)}
        maps = teacher.respond(pictures, ["p4", "p5"]).taps
        with torch.no_grad():
            sources = detector.eval().backbone(prepared).sources  # type: ignore[operator]
        for found, source in zip((maps["p4"], maps["p5"]), sources[1:], strict=True):
            assert found.shape == source.shape
            close = torch.nn.functional.cosine_similarity(found.flatten(1), source.flatten(1))
            assert (close > (0.5 if precision == "int8" else 0.999)).all()
        assert len(PKDTerm(Pair(detector, (teacher,))).levels[0]) == 2
    finally:
        teacher.close()


def test_a_graph_without_such_maps_says_so(tmp_path: Path) -> None:
    arrays = {"boxes": np.zeros((1, 3, 4), np.float32), "scores": np.zeros((1, 3, 2), np.float32)}
    file = write_constant_detector(tmp_path / "t.onnx", arrays, (1, 3, 64, 96))
    assert shared_maps(file) == []
    with pytest.raises(UserError, match="finds no feature map"):
        build_teacher(OnnxTeacher(name="t", onnx=str(file), taps="auto"), ("a", "b"))


def test_the_last_map_of_each_stride_counts() -> None:
    shapes = [
        ("stem", (1, 32, 48, 80)),
        ("early", (1, 24, 12, 20)),
        ("late", (1, 64, 12, 20)),
        ("thin", (1, 3, 12, 20)),
        ("coarse", (1, 96, 3, 5)),
        ("vector", (1, 1000)),
    ]
    assert taps_by_stride(Path("f.onnx"), shapes, (96, 160)) == {"p3": "late", "p5": "coarse"}
    assert taps_by_stride(Path("f.onnx"), [("odd", (1, 64, 10, 10))], (300, 300)) == {"p5": "odd"}
