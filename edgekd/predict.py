"""A detector over photographs: annotated pictures and one JSON file, one image in memory at a time."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.artifact import atomic_path, write_json
from edgekd.data.images import load_image
from edgekd.data.layout import IMAGE_SUFFIXES, files_under, is_image, unread_images, unread_message
from edgekd.draw import draw_detections
from edgekd.errors import EdgeKDError, UserError
from edgekd.predictor import Predictor
from edgekd.types import Detections, ImageArray

JSON_NAME = "predictions.json"
SCHEMA = "edgekd.predictions/1"
_COMMENT = b"annotated by edgekd predict"
"""In each picture, by which a later command knows that it may be replaced."""


@dataclass
class Predictions:
    """What was found.

    Attributes:
        images: one entry an image that could be read. failures: path to reason for those that could not.
    """

    file: Path
    detector: Mapping[str, Any]
    images: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"schema": SCHEMA, "detector": dict(self.detector), "images": self.images, "failures": self.failures}


def find_images(paths: Sequence[Path], out: Path | None = None) -> tuple[list[Path], list[Path]]:
    """Files as they are, whatever they are called; folders as all the images in them (and below); each once, in order.

    The second list has those in the folders that are of a kind which is not read. Links to folders are followed, hidden
    files and folders left out, and so is what lies in `out`, if that is a folder below: annotated pictures of an earlier
    time are nothing to look at.

    Raises:
        UserError: `out` is one of the folders, so that nothing tells its images from annotated ones.
    """
    found: dict[Path, Path] = {}
    unread: dict[Path, Path] = {}
    for path in paths:
        inside = [path]
        if path.is_dir():
            written = None if out is None else _real(out)
            if written == _real(path):
                raise UserError(
                    "--out is the folder of the images: annotated pictures would be taken for images next time",
                    got=path,
                    fix="choose another folder for --out; it may lie in this one",
                )
            files = list(files_under(path))
            if written is not None and _real(path) in written.parents:
                files = [file for file in files if written not in _real(file).parents]
            inside = [file for file in files if is_image(file)]
            unread.update((_real(file), file) for file in unread_images(files))
        for file in inside:
            found.setdefault(_real(file), file)
    return list(found.values()), list(unread.values())


def _real(path: Path) -> Path:
    """Where symbolic links lead; unlike `Path.resolve`, it takes links that lead to themselves."""
    return Path(os.path.realpath(path))


def output_names(images: Sequence[Path]) -> list[str]:
    """A file name without suffix for each image: its stem, with as many folders before it as tell it apart."""
    parents = [_real(path).parent for path in images]
    siblings = Counter((parent, path.stem.lower()) for parent, path in zip(parents, images, strict=True))
    stems = [  # a.jpg beside a.png: no folder tells them apart
        path.stem if siblings[parent, path.stem.lower()] == 1 else path.name.replace(".", "_")
        for parent, path in zip(parents, images, strict=True)
    ]
    names = list(stems)
    for depth in range(1, max((len(parent.parts) for parent in parents), default=0)):
        count = Counter(name.lower() for name in names)
        for index, parent in enumerate(parents):
            if count[names[index].lower()] > 1:
                names[index] = "_".join([*parent.parts[1:][-depth:], stems[index]])
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):  # a/b.jpg beside a_b.jpg
        seen[name.lower()] += 1
        if seen[name.lower()] > 1:
            names[index] = f"{name}-{seen[name.lower()]}"
    return names


def predict_images(
    predictor: Predictor, paths: Sequence[Path], out: Path, progress: Callable[[int, int], None] | None = None
) -> Predictions:
    """Run over `paths` (files and folders), telling `progress` (images done, images in all).

    Annotated pictures go to `out`/NAME.jpg, everything found to `out`/predictions.json, written at the end. An image
    that cannot be read is noted in `failures`, and the rest go on; if none can be, nothing is written.

    Raises:
        UserError: there are no images, none could be read, or an output would overwrite one.
    """
    images, unread = find_images(paths, out)
    if not images:
        given = ", ".join(str(path) for path in paths)
        raise UserError(
            "there are no images to look at",
            got=f"{given}: {len(unread)} images of a kind that is not read, such as {unread[0].name}"
            if unread
            else given,
            expected=f"images: {' '.join(sorted(IMAGE_SUFFIXES))}",
        )
    if not any(path.exists() for path in images):
        raise UserError(
            "there is no such file", got=", ".join(map(str, images)), expected="images, and folders of them"
        )
    targets = [out / f"{name}.jpg" for name in output_names(images)]
    own, written = {_real(path) for path in images}, _pictures_before(out)
    for target in targets:
        if _real(target) in own:
            raise UserError("--out would overwrite an image", got=target, fix="choose another folder for --out")
        # Not among those to look at, and a photograph all the same.
        if target.exists() and target.name not in written and not _is_annotated(target):
            raise UserError(
                "--out holds a file that `edgekd predict` would overwrite and did not write",
                got=target,
                fix="choose another folder for --out, or move that file away",
            )
    found = Predictions(out / JSON_NAME, predictor.describe())
    found.failures.update((str(path), unread_message(path)) for path in unread)
    for done, (image, target) in enumerate(zip(images, targets, strict=True), 1):
        try:
            picture = load_image(image)
            detections = predictor.detect(picture)
        except EdgeKDError as error:
            found.failures[str(image)] = str(error)
        else:  # what cannot be written is no fault of the image
            _write_picture(target, draw_detections(picture, detections, predictor.class_names))
            found.images.append(_entry(image, target, picture, detections, predictor.class_names))
        if progress is not None:
            progress(done, len(images))
    if not found.images:
        path, reason = next(iter(found.failures.items()))
        what = f"none of {len(images)} images could be read" if len(images) > 1 else f"{path} could not be read"
        raise UserError(what, got=" ".join(reason.split()))
    write_json(found.file, found.to_dict())
    return found


def _write_picture(path: Path, picture: ImageArray) -> None:
    from PIL import Image

    encoded = io.BytesIO()  # Pillow itself does not notice where a file ends short, on a full disk
    Image.fromarray(picture).save(encoded, "JPEG", quality=92, comment=_COMMENT)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def _is_annotated(path: Path) -> bool:
    """Whether a picture says that `predict_images` has written it."""
    try:
        with open(path, "rb") as stream:
            return _COMMENT in stream.read(4096)
    except OSError:
        return False


def _pictures_before(out: Path) -> set[str]:
    """The pictures of the last command that ended here, which may be older than the comment in each."""
    try:
        found = json.loads((out / JSON_NAME).read_text(encoding="utf-8"))
        return {str(image["picture"]) for image in found["images"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _entry(
    image: Path, target: Path, picture: ImageArray, detections: Detections, class_names: Sequence[str]
) -> dict[str, Any]:
    return {
        "image": str(image),
        "picture": target.name,
        "width": picture.shape[1],
        "height": picture.shape[0],
        "detections": detections_as_dicts(detections, class_names),
    }


def detections_as_dicts(detections: Detections, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Detections as plain JSON types, best first: class, label, score, box_xyxy (pixels)."""
    return [
        {
            "class": class_names[int(label)],
            "label": int(label),
            "score": round(float(score), 6),
            "box_xyxy": [round(float(value), 2) for value in box],
        }
        for box, score, label in zip(detections.boxes_xyxy, detections.scores, detections.labels, strict=True)
    ]
