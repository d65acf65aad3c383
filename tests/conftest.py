"""Shared fixtures: where the real data and weights lie, with a stated skip where they are absent; an untrained detector."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.engine_doubles import Machine
    from tests.fake_tensorrt import FakeTensorRT

os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(os.environ.get("EDGEKD_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))


def shared(relative: str) -> Path:
    """A file or folder of the shared data and weights; skips the test, saying so, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"real data absent: {relative} (set EDGEKD_SHARED to the folder that holds data/ and weights/)")
    return path


@pytest.fixture(scope="session")
def bccd() -> Path:
    """BCCD blood cells: 364 images, VOC layout."""
    return shared("data/bccd")


@pytest.fixture(scope="session")
def voc2007() -> Path:
    """VOC 2007 train and 1,700 images of val, VOC layout."""
    return shared("data/voc2007")


@pytest.fixture(scope="session")
def tiny_coco() -> Path:
    """50 + 50 images of COCO 2017, COCO layout."""
    return shared("data/tiny_coco")


@pytest.fixture(scope="session")
def mobilenet_v2_weights() -> Path:
    """ImageNet weights of MobileNetV2 as torchvision publishes them."""
    return shared("weights/mobilenet_v2/mobilenet_v2-b0353104.pth")


@pytest.fixture(scope="session")
def yolo11n_onnx() -> Path:
    """A COCO-trained detector as ONNX, a black box."""
    return shared("weights/onnx_teachers/yolo11n.onnx")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of cats and dogs: it finds boxes all over. For reading only."""
    import torch

    from edgekd.checkpoint import save_detector
    from edgekd.detectors import build_detector, spec_for
    from edgekd.recipe import ModelConfig

    torch.manual_seed(0)
    config = ModelConfig(model="mobilenetv2-ssd-lite", input_size=96, width=0.25)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_detector(path, build_detector(spec_for(config, ("cat", "dog"))), {})
    return path


# -- engines on a stand-in for TensorRT ------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Puts a fake TensorRT, and ordinary memory as its device's, in place of what is not here."""
    from tests.fake_tensorrt import FakeTensorRT
    from tests.host_buffers import HostBuffers

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(version: str = "10.3.0", **settings: Any) -> FakeTensorRT:
        fake = FakeTensorRT(version, **settings)
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        for module in ("edgekd.runtimes.tensorrt_runtime", "edgekd.export.engine_job"):
            monkeypatch.setattr(f"{module}.open_buffers", lambda: HostBuffers(fake._device))
        return fake

    return install


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A small ONNX file of edgekd's kind."""
    from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, write_detector

    return write_detector(tmp_path / "student.onnx", GOOD_BOXES, GOOD_SCORES)
