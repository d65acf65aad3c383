"""What can be wrong with a data set: every kind of problem, how grave it is, and what reading does about it.

`read_dataset` and `data check` walk the same code and gather the same `Problem`s. They differ only in what they do with
them: reading raises where a rule says `stops` and otherwise goes on as the rule states; check lists everything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgekd.errors import DataError

Severity = Literal["error", "warning"]

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rule:
    """How one kind of problem is treated.

    Attributes:
        severity: "error" where training or its figures would be wrong, so that `data check` exits 2.
        stops: whether `read_dataset` raises rather than going on.
        treatment: what reading does, in words.
    """

    severity: Severity
    stops: bool
    treatment: str

    @property
    def loses(self) -> bool:
        """Whether reading goes on with less, or with other numbers, than the files state."""
        return self.severity == "error" or self.treatment.endswith(("refused", "ignored", "left out", "clipped to it"))


RULES: dict[str, Rule] = {
    # files
    "bad-annotation": Rule("error", True, "the annotation cannot be understood: reading stops"),
    "bad-layout": Rule("error", True, "the data set's own description is wrong: reading stops"),
    "missing-annotation": Rule("error", True, "the split names an image without annotation: reading stops"),
    "missing-image": Rule("error", True, "the image is not there: reading stops"),
    "unread-image": Rule("error", True, "an annotated image is of a kind that is not read: reading stops"),
    "bad-image": Rule("error", True, "the image cannot be opened: reading stops"),
    "broken-pixels": Rule("error", False, "the header is sound, the pixels are not: found by check, stops in training"),
    "damaged-pixels": Rule("error", False, "the JPEG is damaged, a part of the picture is wrong: read as it is"),
    "odd-pixels": Rule("warning", False, "the JPEG is unusual: have a look at it"),
    "turned-images": Rule(
        "warning",
        False,
        "boxes are taken for ones of the upright pictures: see by --sheet whether they were made on these",
    ),
    "few-greys": Rule(
        "warning",
        False,
        "16-bit images whose high byte, which alone is read, tells little apart: stretch them, save 8 bits",
    ),
    "duplicate-id": Rule("error", True, "two images claim one id: reading stops"),
    "repeated-image": Rule("warning", False, "the split lists an image twice: read once"),
    "repeated-category": Rule("warning", False, "two COCO categories have one name: read as one class"),
    "shared-image": Rule(
        "error", True, "two annotations are of one image file, each with a part of its objects: reading stops"
    ),
    "repeated-annotation-id": Rule("warning", False, "two COCO annotations share an id: both are read"),
    "labels-of-teachers": Rule(
        "warning", False, "`edgekd data label` made the annotations: figures measure agreement with those teachers"
    ),
    "orphan-annotation": Rule("error", False, "the annotation belongs to no listed image: left out"),
    "orphan-label": Rule("warning", False, "a label file without its image: left out"),
    "unlabelled-split": Rule("warning", False, "no label file for any of the split's images: all show background"),
    "sparse-labels": Rule("warning", False, "no label file for more than a tenth of the images: they show background"),
    "misnamed-label": Rule("error", True, "a label file that its image does not find by its name: reading stops"),
    "other-names": Rule(
        "error",
        False,
        "a classes.txt beside the labels numbers the classes otherwise: the data set's own names are used",
    ),
    "unannotated-image": Rule("warning", False, "an image without annotation, in a folder that needs one: ignored"),
    "ambiguous-image": Rule(
        "warning", False, "several images may be the annotated one: the one of its name, then the one that it names"
    ),
    "stale-sidecar": Rule("warning", False, "edgekd.json no longer fits the label file: its flags are ignored"),
    "size-mismatch": Rule("error", False, "the annotated size is not the image's: the image's own is used"),
    "no-size": Rule("warning", False, "the annotated size is missing or zero: the image's own is used"),
    # objects
    "unknown-class": Rule("error", True, "the class is not among the data set's or the ones asked for: reading stops"),
    "non-finite-box": Rule("error", False, "NaN or infinite: refused"),
    "inverted-box": Rule("error", False, "x2 < x1 or y2 < y1: refused"),
    "outside-box": Rule("error", False, "wholly outside the image: refused"),
    "boxes-as-shares": Rule(
        "error", True, "boxes of the split look like shares of the image, not pixels: reading stops"
    ),
    "boxes-of-other-numbers": Rule(
        "error", True, "boxes reach beyond their images, and read in another usual way none does: reading stops"
    ),
    "boxes-of-other-sizes": Rule(
        "error", True, "boxes fit the sizes that most annotations state, which are not the images': reading stops"
    ),
    "keypoints-as-polygons": Rule("error", True, "keypoints would be read as corners of the object: reading stops"),
    "boxes-beyond-images": Rule("error", False, "most boxes of the split reach beyond their image: read as they stand"),
    "unnormalised-box": Rule("error", False, "YOLO coordinates that are no shares of the image: refused"),
    "empty-box": Rule("warning", False, "less than 0.1 px wide or high after clipping: refused"),
    "tiny-box": Rule("warning", False, "at most 1 px wide or high: kept"),
    "clipped-box": Rule("warning", False, "more than 1 px beyond the image: clipped to it"),
    "duplicate-box": Rule("warning", False, "the same box and class twice in one image: both kept"),
    # whole splits
    "empty-split": Rule("error", False, "no images, or training images without a single object"),
    "unmeasurable-split": Rule(
        "warning", False, "no object in a split that is not for training: it can measure nothing"
    ),
    "alike-classes": Rule(
        "warning", False, "class names that differ in case or spacing only: kept as classes of their own"
    ),
    "absent-class": Rule("warning", False, "a class without an object in the training split"),
    "duplicate-image": Rule("warning", False, "the same pixels twice in one split"),
    "leak": Rule("error", False, "the same pixels in two splits: figures on one would be too good"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where.

    Attributes:
        kind: a key of `RULES`.
        path: the file to mend.
        message: what is wrong with it.
        line: 1-based line in `path`, where the format has lines.
        item: the entry in `path`, where it has none, such as "annotations[3] (id 17)".
        split: the split in which it was found; empty if it concerns the whole data set.
    """

    kind: str
    path: Path
    message: str
    line: int | None = None
    item: str = ""
    split: str = ""

    @property
    def rule(self) -> Rule:
        """How this kind is treated."""
        return RULES[self.kind]

    @property
    def where(self) -> str:
        """`file:line`, or `file: entry`."""
        text = printable(self.path)
        if self.line is not None:
            text += f":{self.line}"
        return f"{text}: {self.item}" if self.item else text

    def __str__(self) -> str:
        return f"{self.where}: {printable(self.message)} [{self.kind}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "kind": self.kind,
            "severity": self.rule.severity,
            "file": printable(self.path),
            "line": self.line,
            "item": self.item,
            "split": self.split,
            "message": printable(self.message),
            "treatment": self.rule.treatment,
        }


def labels_of_teachers(path: Path, teachers: Sequence[str], where: str, split: str) -> Problem:
    """What is to be said of a split that `edgekd data label` has annotated; it says so itself in `path`."""
    message = f"annotated by {printable(', '.join(teachers))}, as `teachers` {where} says"
    return Problem("labels-of-teachers", path, message, split=split)


def printable(text: object) -> str:
    r"""Text that any UTF-8 stream takes: bytes of a file name that are not UTF-8 become \xNN, lone surrogates \uNNNN."""
    return _SURROGATE.sub(lambda match: _escape(ord(match.group())), str(text))


def _escape(code: int) -> str:
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def raise_if_stopped(problems: Sequence[Problem], what: str, fix: str | None = None) -> None:
    """Raise for the problems that reading cannot pass over, naming the first ten; `fix`, where `data check` knows none.

    Raises:
        DataError: at least one problem's rule says `stops`.
    """
    stopping = [problem for problem in problems if problem.rule.stops]
    if not stopping:
        return
    lines = [f"{what}: {len(stopping)} problem{'s' * (len(stopping) > 1)} that must be mended first"]
    lines += [f"  {problem}" for problem in stopping[:10]]
    if len(stopping) > 10:
        lines.append(f"  ... and {len(stopping) - 10} more")
    raise DataError("\n".join(lines), fix=fix or "`edgekd data check` lists every problem of the data set")
