"""Splits for a data set that lacks them: drawn once, written as the few files that each layout reads splits from, or,
where such files would contradict what is there, as a new data set beside it.

Pictures whose pixels are the same stay together, so that none is in two splits. Classes are spread by iterative
stratification (Sechidis, Tsoumakas and Vlahavas, 2011, "On the Stratification of Multi-Label Data"): the class with the
fewest images left goes first, each of its images to the split that still lacks most of that class.

What is not noticed: pictures that are only alike, such as frames of one video or an image beside its augmented copies.
"""

from __future__ import annotations

import contextlib
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
from edgekd.data.convert import require_new, write_dataset
from edgekd.data.layout import (
    Format,
    RawImage,
    Source,
    find_split,
    is_part,
    split_advice,
    split_folder,
    stem_of,
    usual_split,
)
from edgekd.data.problems import Problem, printable, raise_if_stopped
from edgekd.data.reading import open_source
from edgekd.data.voc import VocSource
from edgekd.errors import DataError, refusal


@dataclass(frozen=True)
class SplitReport:
    """How a data set was divided.

    Attributes:
        images: split -> number of images. objects: split -> class (index, where unnamed) -> number of objects.
        duplicates: images whose pixels another one has too.
        files: what was written, or would be: files, or the new data set's folder.
        problems: what is wrong with the data set, of what splitting can pass over.
        left_out: splits that the new data set does not have, since they share images with the divided one or hold none.
    """

    root: Path
    format: Format
    images: Mapping[str, int]
    objects: Mapping[str, Mapping[str, int]]
    duplicates: int
    files: tuple[Path, ...]
    problems: tuple[Problem, ...]
    left_out: tuple[str, ...] = ()


def split_dataset(
    root: Path | str,
    *,
    val: float,
    test: float = 0.0,
    seed: int = 0,
    format: str = "auto",
    part: str | None = None,
    out: Path | None = None,
    link: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SplitReport:
    """Divide the one split of a data set, or `part`, into train, val and (if `test` is more than 0) test, by these shares
    of images.

    Writes only split files, and none that is there already: ImageSets/Main/*.txt (VOC), instances_*.json beside the
    JSON file (COCO), *.txt lists of images (YOLO). With `out`, which `part` needs, a new data set in the same layout, as
    `convert` writes it, with the other splits as they are; the old one stays as it is. `dry_run` writes nothing.

    Raises:
        DataError: the data set cannot be read, has such splits already, or too few different images; `out` is not new.
    """
    root = Path(root)
    shares = _shares(val, test)
    source = open_source(root, format)
    if part is not None and out is None:
        fix = f"--out {printable(split_folder(root))}: the new data set's folder; this one stays as it is"
        raise DataError("--from needs --out", fix=fix)
    if out is not None:
        require_new(out, root)
    whole = _whole(source, root) if part is None else find_split(part, source.splits(), root)
    problems: list[Problem] = []
    raws = source.scan(whole, problems)
    raise_if_stopped(problems, printable(root))
    others = {} if out is None else _others(source, whole, raws, shares, problems)
    groups = _alike(raws, problems, progress)
    if len(groups) < len(shares):
        raise DataError(
            f"{printable(root)}: too few different images", got=len(groups), expected=f"{len(shares)} or more"
        )
    labels = [{obj.label for position in group for obj in raws[position].objects} for group in groups]
    chosen = stratify(labels, [len(group) for group in groups], list(shares.values()), np.random.default_rng(seed))
    parts: dict[str, list[RawImage]] = {}
    for number, name in enumerate(shares):
        positions = [p for group, found in zip(groups, chosen, strict=True) if found == number for p in group]
        parts[name] = [raws[position] for position in sorted(positions)]
    if out is None:
        texts = _split_files(source, whole, parts)
        there = [path for path in texts if path.exists()]
        if there:
            raise DataError(f"{printable(there[0])} is there already", fix="nothing was written; move it away first")
        if not dry_run:
            _write(texts, source, parts)
    elif not dry_run:
        write_dataset(source, {**parts, **others}, out, source.format, link=link, problems=problems)
    return SplitReport(
        root,
        source.format,
        {name: len(found) for name, found in parts.items()},
        {name: dict(Counter(str(obj.label) for raw in found for obj in raw.objects)) for name, found in parts.items()},
        len(raws) - len(groups),
        tuple(texts) if out is None else (out,),
        tuple(problems),
        () if out is None else tuple(name for name in source.splits() if name != whole and name not in others),
    )


def _shares(val: float, test: float) -> dict[str, float]:
    shares = {"train": 1.0 - val - test, "val": val, "test": test}
    if not (val > 0 and test >= 0 and shares["train"] > 0):
        raise DataError(
            "shares that leave nothing", got=f"val {val:g}, test {test:g}", expected="0 < val, val + test < 1"
        )
    return {name: share for name, share in shares.items() if share > 0}


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


def _whole(source: Source, root: Path) -> str:
    """The one split that is to be divided.

    Raises:
        DataError: there are several, or it is called like a part.
    """
    splits = source.splits()
    if len(splits) == 1 and not is_part(splits[0]):
        return splits[0]
    raise DataError(
        f"{printable(root)} has splits already",
        got=", ".join(splits),
        expected="a data set without any, or --from with the name of one",
        fix=split_advice(root, [name for name in splits if source.scan(name, [])] or splits),
    )


def _others(
    source: Source, whole: str, raws: Sequence[RawImage], shares: Mapping[str, float], problems: list[Problem]
) -> dict[str, list[RawImage]]:
    """The splits that a new data set keeps beside the parts: those that hold images, and none of the divided ones.

    Raises:
        DataError: one is called like a part.
    """
    others: dict[str, list[RawImage]] = {}
    divided = {raw.path for raw in raws}
    for split in source.splits():
        trouble: list[Problem] = []
        found = source.scan(split, trouble) if split != whole else []
        if divided.isdisjoint(raw.path for raw in found) and (found or any(p.kind != "bad-layout" for p in trouble)):
            others[split] = found
            problems += trouble
    for name in shares:
        there = usual_split([name], tuple(others), source.root)
        if there is not None:
            raise DataError(
                f"{printable(source.root)} has a split {there!r} already",
                expected=f"none that {whole!r} could be divided into",
                fix="leave --test away: it comes along as it is" if name == "test" else "use it as it is",
            )
    return others


def _alike(
    raws: Sequence[RawImage], problems: list[Problem], progress: Callable[[int, int], None] | None
) -> list[list[int]]:
    """Positions of the images, those of the same pixels together."""
    digests = pixel_digests({"all": [raw.path for raw in raws]}, problems, progress)
    groups: dict[str, list[int]] = {}
    for position, raw in enumerate(raws):
        groups.setdefault(digests.get(raw.path, f"unreadable {position}"), []).append(position)
    return list(groups.values())


def _split_files(source: Source, whole: str, parts: Mapping[str, Sequence[RawImage]]) -> dict[Path, str]:
    """The files that make these splits, by the layout's own rules."""
    if isinstance(source, VocSource):
        folder = source.base / "ImageSets" / "Main"
        return {
            folder / f"{name}.txt": "".join(f"{stem_of(raw.name)}\n" for raw in raws) for name, raws in parts.items()
        }
    if isinstance(source, CocoSource):
        path = source.file(whole)
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
    made = [folder for path in texts for folder in path.parents if not folder.exists()]
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
                    fix=f"--out {printable(split_folder(source.root))} writes a new data set instead; or name the folder "
                    "that holds the annotations themselves",
                )
    except OSError as error:
        _remove(written, made)
        raise refusal(error, printable(source.root)) from error
    except BaseException:
        _remove(written, made)
        raise


def _remove(files: Sequence[Path], folders: Sequence[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
    for folder in folders:  # each before the one that it lies in
        with contextlib.suppress(OSError):
            folder.rmdir()
