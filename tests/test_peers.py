"""The benchmark against peers: its parts are right, and one command runs with nothing installed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
sys.path.insert(0, str(PEERS))

import environments  # noqa: E402
import page  # noqa: E402
import session  # noqa: E402
import tensorrt_tools  # noqa: E402
import usual  # noqa: E402

from edgekd.data.images import decode_image  # noqa: E402
from edgekd.postprocess import select  # noqa: E402
from edgekd.preprocess import prepare  # noqa: E402
from edgekd.types import PreprocessSpec  # noqa: E402
from tests.conftest import shared  # noqa: E402

TRTEXEC = """
[11/21/2025-10:00:00] [I] Latency: min = 0.9 ms, max = 2.5 ms, mean = 1.0 ms, median = 1.01 ms, percentile(90%) = 1.1 ms
[11/21/2025-10:00:00] [I] GPU Compute Time: min = 0.7 ms, max = 2 ms, mean = 0.8 ms, median = 0.81 ms, percentile(90%) = 0.9 ms
"""


def crowd(seed: int, count: int = 500, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 250, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(10, 80, (count, 2))], 1).astype(np.float32)
    return boxes, (rng.random((count, classes)) ** 5).astype(np.float32)


@pytest.mark.parametrize("form", usual.PLAIN_NMS)
@pytest.mark.parametrize("limit", [5, 200])
def test_every_plain_nms_gives_what_edgekd_gives(form: str, limit: int) -> None:
    for seed in range(5):
        boxes, scores = crowd(seed)
        ours = select(boxes, scores, score_threshold=0.1, nms_iou=0.45, max_detections=limit)
        assert len(ours) >= 5
        session.assert_same(ours, {form: usual.PLAIN_NMS[form](boxes, scores, 0.1, 0.45, limit)})


@pytest.mark.parametrize("form", usual.PLAIN_NMS)
def test_plain_nms_of_nothing(form: str) -> None:
    boxes, scores = crowd(0)
    found = usual.PLAIN_NMS[form](boxes, scores, 1.0, 0.45, 10)
    assert [len(column) for column in found] == [0, 0, 0]


def test_different_detections_are_noticed() -> None:
    boxes, scores = crowd(1)
    ours = select(boxes, scores, score_threshold=0.1, nms_iou=0.45, max_detections=50)
    other = usual.nms_per_class(boxes, scores, 0.1, 0.6, 50)
    with pytest.raises(AssertionError, match="other detections"):
        session.assert_same(ours, {"per class": other})


def test_the_usual_preprocessing_is_edgekds_but_for_the_resizer() -> None:
    smooth = np.linspace(0, 255, 90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", quality=95)
    spec = PreprocessSpec((90, 120))  # no resizing, so nothing but decoding and normalising is left
    naive, size = usual.prepare(file.getvalue(), spec.input_hw, spec.mean, spec.std)
    ours, _ = prepare(decode_image(file.getvalue()), spec)
    assert size == (120, 90)
    assert np.allclose(naive, ours, atol=1e-5)


@pytest.mark.parametrize(
    ("numerator", "at_most", "met"), [(3.0, False, "yes"), (2.0, False, "no"), (2.0, True, "yes"), (3.0, True, "no")]
)
def test_bars(numerator: float, at_most: bool, met: str) -> None:
    slow, fast = np.full((10, 5), numerator), np.ones((10, 5))
    assert session.bar("x", 2.5, slow, fast, at_most=at_most)["met"] == met


def test_a_bar_within_the_interval_is_unclear() -> None:
    slow = np.repeat([[2.4], [2.6]], 10, axis=0) * np.ones((20, 5))
    assert session.bar("x", 2.5, slow, np.ones((20, 5)))["met"] == "unclear"


def test_trtexec_medians() -> None:
    assert tensorrt_tools.read_trtexec(TRTEXEC) == {"latency_ms": 1.01, "compute_ms": 0.81}
    with pytest.raises(environments.Skipped, match="no medians"):
        tensorrt_tools.read_trtexec("&&&& FAILED")


def test_an_environment_that_fails_is_skipped_with_a_reason_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments.venv, "create", lambda folder, **_: Path(folder).mkdir(parents=True))
    monkeypatch.setattr(environments, "python_of", lambda folder: Path(sys.executable))
    monkeypatch.setattr(environments, "_PIP", ("-c", "pass"))
    folder = tmp_path / "envs" / "one"
    with pytest.raises(environments.Skipped, match="does not work: ZeroDivisionError"):
        environments.make(folder, (["one"], "1 / 0"))
    with pytest.raises(environments.Skipped, match=r"ZeroDivisionError.*delete .*skipped\.txt"):
        environments.make(folder, (["one"], "pass"))
    (folder / "skipped.txt").unlink()
    folder.rmdir()
    assert environments.make(folder, (["one"], "pass")) == Path(sys.executable)
    assert environments.make(folder, (["one"], "1 / 0")) == Path(sys.executable)  # ready: not tried again


@pytest.mark.parametrize("entry", ["nameless.onnx", "yolo11n=missing.onnx"])
def test_a_wrong_peer_is_a_usage_error(entry: str, tmp_path: Path) -> None:
    command = [sys.executable, str(PEERS / "run.py"), "--out", str(tmp_path), "--no-install", "--onnx", entry]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert entry.split("=")[-1] in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_one_command(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(PEERS / "run.py"),
        "--out",
        str(tmp_path),
        "--no-install",
        "--quick",
        *("--size", "96", "--samples", "5", "--limit", "4"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    result = json.loads((tmp_path / "peers.json").read_text())
    assert {"yolo11n", "yolov8n", "torchvision-ssdlite320"} <= set(result["skipped"])
    assert result["rows"][0]["name"] == session.USUAL
    assert {"edgekd fp32, ONNX Runtime", "edgekd int8, ONNX Runtime"} <= {row["name"] for row in result["rows"]}
    measured = [bar["what"] for bar in result["bars"] if "ratio" in bar]
    assert [any(start in what for what in measured) for start in ("fp32", "int8", "preprocessing", "NMS")] == [True] * 4
    assert page.markdown(result) == (tmp_path / "peers.md").read_text()


@pytest.mark.parametrize(("name", "shape"), [("yolo11n", (2, 3, 96, 128)), ("yolov8n", (1, 3, 640, 640))])
def test_a_published_network_can_be_taken_apart_and_written_again(name: str, shape: tuple[int, ...]) -> None:
    """With its batch norms put back it computes what it did, and with new classes it has as many scores."""
    import onnxruntime
    import torch
    from finetune import Peer, load_peer

    model = load_peer(shared(f"weights/onnx_teachers/{name}.onnx"))
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    peer = Peer(model)
    peer.restore_norms(images)

    def answer(proto) -> np.ndarray:  # type: ignore[no-untyped-def]
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]

    before = answer(model)
    np.testing.assert_allclose(answer(peer.write(model, [str(i) for i in range(80)])), before, rtol=1e-3, atol=1e-2)
    peer.train()
    assert sum(float(cls.detach().sum()) for _, cls in peer(images)) != pytest.approx(float(before[:, 4:].sum()))
    peer.new_classes(3)
    assert answer(peer.write(model, ["a", "b", "c"])).shape == (shape[0], 7, before.shape[2])
