"""Splits for a data set that has none: drawn once, written as the few files that each layout reads splits from.

Pictures whose pixels are the same stay together, so that none is in two splits. Classes are spread by iterative
stratification (Sechidis, Tsoumakas and Vlahavas, 2011, "On the Stratification of Multi-Label Data"): the class with the
fewest images left goes first, each of its images to the split that still lacks most of that class.

What is not noticed: pictures that are only alike, such as frames of one video or an image beside its augmented copies.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import write_text
from edgekd.data.check import pixel_digests
from edgekd.data.coco import EDGEKD_ID, CocoSource
from edgekd.data.coco_json import id_key, load_coco
from edgekd.data.layout import PARTS, Format, RawImage, Source, stem_of
from edgekd.data.problems import Problem, printable, raise_if_stopped
from edgekd.data.reading import open_source
from edgekd.data.voc import VocSource
from edgekd.data.yolo_yaml import find_yaml
from edgekd.errors import DataError, refusal


@dataclass(frozen=True)
class SplitReport:
    """How a data set was divided.

    Attributes:
        images: split -> number of images. objects: split -> class (index, where unnamed) -> number of objects.
        duplicates: images whose pixels another one has too.
        files: what was written, or would be.
        problems: what is wrong with the data set, of what splitting can pass over.
    """

    root: Path
    format: Format
    images: Mapping[str, int]
    objects: Mapping[str, Mapping[str, int]]
    duplicates: int
    files: tuple[Path, ...]
    problems: tuple[Problem, ...]


def split_dataset(
    root: Path | str,
    *,
    val: float,
    test: float = 0.0,
    seed: int = 0,
    format: str = "auto",
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SplitReport:
    """Divide the one split of a data set into train, val and (if `test` is more than 0) test, by these shares of images.

    Writes only split files, and none that is there already: ImageSets/Main/*.txt (VOC), instances_*.json beside the
    JSON file (COCO), *.txt lists of images (YOLO). `dry_run` writes none.

    Raises:
        DataError: the data set cannot be read, has splits already, or too few different images.
    """
    root = Path(root)
    shares = {"train": 1.0 - val - test, "val": val, "test": test}
    if not (val > 0 and test >= 0 and shares["train"] > 0):
        raise DataError(
            "shares that leave nothing", got=f"val {val:g}, test {test:g}", expected="0 < val, val + test < 1"
        )
    shares = {name: share for name, share in shares.items() if share > 0}
    source = open_source(root, format)
    problems: list[Problem] = []
    raws = source.scan(_whole(source), problems)
    raise_if_stopped(problems, printable(root))
    groups = _alike(raws, problems, progress)
    if len(groups) < len(shares):
        raise DataError(
            f"{printable(root)}: too few different images", got=len(groups), expected=f"{len(shares)} or more"
        )
    labels = [{obj.label for position in group for obj in raws[position].objects} for group in groups]
    chosen = stratify(labels, [len(group) for group in groups], list(shares.values()), np.random.default_rng(seed))
    parts: dict[str, list[RawImage]] = {}
    for part, name in enumerate(shares):
        positions = [p for group, found in zip(groups, chosen, strict=True) if found == part for p in group]
        parts[name] = [raws[position] for position in sorted(positions)]
    texts = _split_files(source, parts)
    there = [path for path in texts if path.exists()]
    if there:
        raise DataError(f"{printable(there[0])} is there already", fix="nothing was written; move it away first")
    if not dry_run:
        _write(texts, source, parts)
    return SplitReport(
        root,
        source.format,
        {name: len(found) for name, found in parts.items()},
        {name: dict(Counter(str(obj.label) for raw in found for obj in raw.objects)) for name, found in parts.items()},
        len(raws) - len(groups),
        tuple(texts),
        tuple(problems),
    )


def stratify(
    labels: Sequence[Collection[str | int]],
    sizes: Sequence[int],
    shares: Sequence[float],
    rng: np.random.Generator,
) -> list[int]:
    """The part that each group of images goes to; no part stays empty.

    Args:
        labels: the classes in each group. sizes: the images in each. shares: of each part, adding up to 1.
    """
    parts, order = range(len(shares)), rng.permutation(len(sizes)).tolist()
    room = [share * sum(sizes) for share in shares]
    totals = Counter({label: 0 for found in labels for label in found})
    for found, size in zip(labels, sizes, strict=True):
        totals.update(dict.fromkeys(found, size))
    lacking = {label: [share * total for share in shares] for label, total in totals.items()}
    chosen = dict[int, int]()

    def place(group: int, part: int) -> None:
        chosen[group] = part
        room[part] -= sizes[group]
        for label in labels[group]:
            lacking[label][part] -= sizes[group]

    while left := Counter(label for group in order if group not in chosen for label in labels[group]):
        rarest = min(left, key=lambda label: (left[label], str(label)))
        for group in order:
            if group not in chosen and rarest in labels[group]:
                place(group, max(parts, key=lambda part: (lacking[rarest][part], room[part])))
    for group in order:  # of background alone
        if group not in chosen:
            place(group, max(parts, key=lambda part: room[part]))
    for part in parts:
        if part not in chosen.values():
            largest = Counter(chosen.values()).most_common(1)[0][0]
            chosen[next(group for group in order if chosen[group] == largest)] = part
    return [chosen[group] for group in range(len(sizes))]


def _whole(source: Source) -> str:
    """The one split that is to be divided.

    Raises:
        DataError: there are several, or it is called like a part.
    """
    splits = source.splits()
    if len(splits) == 1 and splits[0] not in PARTS:
        return splits[0]
    ways = {"voc": "move ImageSets away"}
    if len(splits) == 1:
        listing = Path(f"{splits[0]}.txt")
        yolo = f"move {listing} away" if (source.root / listing).is_file() else f"rename the folder {splits[0]}"
        yolo = "call it `all:` in data.yaml" if find_yaml(source.root) else yolo
        ways |= {"coco": "rename its JSON file to instances_all.json", "yolo": yolo}
    way = ways.get(source.format)
    raise DataError(
        f"{printable(source.root)} has splits already",
        got=", ".join(splits),
        expected="a data set without any",
        fix=f"to draw them anew, {way}" if way else None,
    )


def _alike(
    raws: Sequence[RawImage], problems: list[Problem], progress: Callable[[int, int], None] | None
) -> list[list[int]]:
    """Positions of the images, those of the same pixels together."""
    digests = pixel_digests({"all": [raw.path for raw in raws]}, problems, progress)
    groups: dict[str, list[int]] = {}
    for position, raw in enumerate(raws):
        groups.setdefault(digests.get(raw.path, f"unreadable {position}"), []).append(position)
    return list(groups.values())


def _split_files(source: Source, parts: Mapping[str, Sequence[RawImage]]) -> dict[Path, str]:
    """The files that make these splits, by the layout's own rules."""
    if isinstance(source, VocSource):
        folder = source.base / "ImageSets" / "Main"
        return {
            folder / f"{name}.txt": "".join(f"{stem_of(raw.name)}\n" for raw in raws) for name, raws in parts.items()
        }
    if isinstance(source, CocoSource):
        path = source.file(_whole(source))
        data = load_coco(path)
        return {path.parent / f"instances_{name}.json": _coco_part(data, raws) for name, raws in parts.items()}
    folder = source.root if source.root.is_dir() else source.root.parent
    return {
        folder / f"{name}.txt": "".join(f"./{Path(os.path.relpath(raw.path, folder)).as_posix()}\n" for raw in raws)
        for name, raws in parts.items()
    }


def _coco_part(data: Mapping[str, Any], raws: Sequence[RawImage]) -> str:
    """A COCO file with some of its images and all that belongs to them; every other key stays."""
    wanted = {raw.image_id for raw in raws}
    images = [entry for entry in data["images"] if str(entry.get(EDGEKD_ID, id_key(entry["id"]))) in wanted]
    ids = {id_key(entry["id"]) for entry in images}
    annotations = [entry for entry in data["annotations"] if id_key(entry.get("image_id")) in ids]
    return json.dumps({**data, "images": images, "annotations": annotations}, ensure_ascii=False) + "\n"


def _write(texts: Mapping[Path, str], source: Source, parts: Mapping[str, Sequence[RawImage]]) -> None:
    """Write the files and read them back; on any error, none stays.

    Raises:
        DataError: the splits do not come back as they were drawn. EdgeKDError: the folder cannot be written to.
    """
    written: list[Path] = []
    try:
        for path, text in texts.items():
            write_text(path, text)
            written.append(path)
        again = open_source(source.root, source.format)
        for name, raws in parts.items():
            found = {raw.path for raw in again.scan(name, [])} if name in again.splits() else set()
            if found != {raw.path for raw in raws}:
                raise DataError(
                    f"{printable(source.root)}: its layout takes no split files from outside",
                    got=f"split {name}: {len(found)} of {len(raws)} images read back; nothing is left written",
                    fix="name the folder that holds the annotations themselves, or `edgekd data convert` it first",
                )
    except OSError as error:
        _remove(written)
        raise refusal(error, printable(source.root)) from error
    except BaseException:
        _remove(written)
        raise


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
