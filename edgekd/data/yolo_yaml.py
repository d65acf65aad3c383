"""How a YOLO data set describes itself in YAML, as people and services write it; `yolo_folders` is for those without."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from edgekd.data.layout import each_file, is_image, is_part, is_regular, numbered_lines, tails
from edgekd.data.problems import printable
from edgekd.errors import DataError

_YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
USUAL_SPLITS = ("train", "val", "valid", "test")
NOT_SPLITS = frozenset({"path", "names", "nc", "download", "yaml_file", "kpt_shape", "flip_idx", "channels", "license"})


def find_yaml(root: Path) -> Path | None:
    """The YAML file that describes the data set at `root` (a folder, or that file itself), if there is one."""
    if root.is_file():
        return root if root.suffix.lower() in (".yaml", ".yml") else None
    for name in _YAMLS:
        if (root / name).is_file():
            return root / name
    return next((path for path, _ in _described(root)), None)


def require_one_description(root: Path) -> None:
    """Refuse a folder in which YAML files of no usual name describe different data sets: none of them is to be preferred.

    Raises:
        DataError: they name other classes, or other splits.
    """
    if not root.is_dir() or any((root / name).is_file() for name in _YAMLS):
        return
    found = {
        path: {k: v for k, v in data.items() if k == "names" or is_part(str(k))} for path, data in _described(root)
    }
    if any(said != next(iter(found.values())) for said in found.values()):
        raise DataError(
            f"{printable(root)} is described by several YAML files",
            got=", ".join(printable(path.name) for path in found),
            expected="one, or several that say the same of classes and splits",
            fix=f"name the file in place of the folder, or call the one that counts {_YAMLS[0]}",
        )


def _described(root: Path) -> Iterator[tuple[Path, dict[Any, Any]]]:
    """Each YAML file in the folder that has names and splits, with its content."""
    for path in sorted(path for path in root.glob("[!.]*.y*ml") if path.is_file()):
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
        if isinstance(data, dict) and "names" in data and any(map(is_part, map(str, data))):
            yield path, data


def load_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping.

    Raises:
        DataError: it is malformed (the message names the line) or no mapping.
    """
    try:
        content = path.read_bytes()
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell's > writes
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
        data = yaml.safe_load(text)
        if isinstance(data, dict) and data.get("names") is not None:  # as written: YAML makes false of no, 8 of 010
            data["names"] = yaml.load(text, Loader=yaml.BaseLoader)["names"]  # texts alone
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{printable(path)}:{mark.line + 1}" if mark else printable(path)
        raise DataError(f"{where}: malformed YAML", got=getattr(error, "problem", None) or error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(path)} cannot be read", got=error, fix="save it as UTF-8") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{printable(path)} cannot be read", got=error) from error
    if not isinstance(data, dict):
        raise DataError(f"{printable(path)}: no YOLO data file", expected="keys such as train, val, names")
    return data


def splits_of(path: Path, data: Mapping[str, Any]) -> tuple[Path, dict[str, list[Path]]]:
    """The base folder, and each split's folders and lists."""
    base = path.parent
    stated = data.get("path")
    if isinstance(stated, str) and os.path.isdir(base / stated):  # a path from the author's machine is passed over
        base = base / stated
    splits: dict[str, list[Path]] = {}
    for key, value in data.items():
        if not isinstance(key, str) or key in NOT_SPLITS or value in (None, ""):  # "" would be the whole data set
            continue
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts) or not texts:
            if is_part(key):
                raise DataError(f"{printable(path)}: {key} must be a path or a list of paths", got=repr(value))
            continue
        entries = [_resolve(text, base, path.parent) for text in texts]
        if is_part(key) or all(map(_leads_to_images, entries)):
            splits[key] = entries
    return base, splits


def _leads_to_images(entry: Path) -> bool:
    """Whether it is a folder with images in it, or a list of such; other tools keep paths to labels or weights there."""
    if entry.is_dir():
        return any(map(is_image, each_file(entry)))
    if entry.suffix.lower() != ".txt" or not is_regular(entry):
        return False
    return any(is_image(Path(text)) for _, text in numbered_lines(entry))


def _resolve(text: str, base: Path, beside: Path) -> Path:
    """A path as the YAML states it: on this machine, written ../train/images for train/images as some services do, from
    above the set's own folder, or from the root of the author's disk."""
    text = re.sub(r"^[A-Za-z]:/", "/", text.replace("\\", "/"))
    tries = [base / text, beside / text]
    if text.startswith("../"):
        tries.append(beside / text[3:])
    parts = text.split("/")
    if beside.name in parts[:-1]:  # my-set/images/train, in my-set/data.yaml
        tries.append(beside.joinpath(*parts[parts.index(beside.name) + 1 :]))
    if text.startswith("/"):
        tries += [beside / tail for tail in tails(text)[2:]]
    return next((path for path in tries if os.path.exists(path)), tries[0])


def names_of(path: Path, data: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names by `names` (a list, or number to name) in label order; None where there are none.

    Raises:
        DataError: they repeat, leave a number out, or disagree with `nc`.
    """
    names, count = data.get("names"), data.get("nc")
    if names is None:
        return None
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            message = f"{printable(path)}: names must be numbered 0..{len(names) - 1}"
            got = ", ".join(map(str, list(names)[:20]))
            raise DataError(message, got=got, fix="name every class id from 0 on, unused ones too")
        by_index = {int(key): value for key, value in names.items()}
        names = [by_index[index] for index in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{printable(path)}: names must be a list, or a mapping from number to name",
            got=repr(names)[:200],
            fix=f"write `names: [{names}]`" if isinstance(names, str) and "," not in names else None,
        )
    texts = tuple(names)
    if count is not None and str(count) != str(len(texts)):
        fix = "mend the one that is wrong: the class ids in the label files tell"
        raise DataError(f"{printable(path)}: nc and names disagree", got=f"nc {count}, {len(texts)} names", fix=fix)
    return distinct_names(path, texts)


def distinct_names(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """The class names that a file gives.

    Raises:
        DataError: they repeat, or there is none.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        fix = "give each class id a name of its own; where two ids are one class, write one of them in the label files"
        raise DataError(f"{printable(path)}: class names repeat", got=", ".join(twice), fix=fix)
    if not names:
        raise DataError(f"{printable(path)}: no class names")
    return names
