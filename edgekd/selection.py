"""How candidates become detections; and what of that a file with NMS inside leaves to decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgekd.boxes import have_extent
from edgekd.postprocess import select
from edgekd.preprocess import Geometry
from edgekd.recipe import BenchConfig
from edgekd.types import Detections, FloatArray


@dataclass(frozen=True)
class Selection:
    """How candidates become detections.

    Attributes:
        score_threshold: candidates must score more than this.
        nms_iou: boxes of one class that overlap a better one by more than this go; not used after a detector's own NMS.
        max_detections: the best that are kept for an image.
        box_voting: overlap from which suppressed boxes move the one that is kept, see `postprocess.select`; None for
            none. Not used after a detector's own NMS, nor for candidates that are fused or taught.
    """

    score_threshold: float = 0.001
    nms_iou: float = 0.5
    max_detections: int = 100
    box_voting: float | None = None

    @classmethod
    def of(cls, config: BenchConfig) -> Selection:
        """What a recipe measures with."""
        return cls(config.score_threshold, config.nms_iou, config.max_detections, config.box_voting)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; stored in every exported file."""
        return asdict(self)

    def select(self, boxes_xyxy: FloatArray, scores: FloatArray) -> Detections:
        """`postprocess.select` so: boxes (P, 4), scores (P, K)."""
        return select(
            boxes_xyxy,
            scores,
            score_threshold=self.score_threshold,
            nms_iou=self.nms_iou,
            max_detections=self.max_detections,
            box_voting=self.box_voting,
        )

    def place(self, boxes_xyxy: FloatArray, scores: FloatArray, geometry: Geometry) -> Detections:
        """`select`, and in the source image's pixels; boxes that lie beside it are left out."""
        found = self.select(boxes_xyxy, scores)
        placed = geometry.to_source(found.boxes_xyxy)
        inside = have_extent(placed)
        return Detections(placed[inside], found.scores[inside], found.labels[inside])


DEFAULT_SELECTION = Selection()

OPTIONS = {
    "score_threshold": "--score",
    "nms_iou": "--iou",
    "max_detections": "--max-detections",
    "box_voting": "--box-voting",
}
"""What the command line calls them."""


def effective(selection: Selection, inside: Mapping[str, Any] | None, *, merges: bool = False) -> dict[str, Any]:
    """What really decides, as far as is known.

    Args:
        selection: what was asked for.
        inside: thresholds of the NMS inside the file, empty where it does not say them; None if it has none.
        merges: several of the file's classes count as one, so that NMS follows even its own.

    Returns:
        {"nms": "inside" | "after", "score_threshold", "nms_iou", "max_detections", "box_voting"}; an overlap of None is
        fixed inside the file, which does not say it.
    """
    asked = asdict(selection)
    if inside is None:
        return {"nms": "after", **asked}
    lowest, overlap, most = _numbers(inside)
    return {
        "nms": "inside",
        "score_threshold": selection.score_threshold if lowest is None else max(selection.score_threshold, lowest),
        "nms_iou": overlap,
        "max_detections": selection.max_detections if most is None else int(min(selection.max_detections, most)),
        "box_voting": selection.box_voting if merges else None,
    }


def idle(selection: Selection, inside: Mapping[str, Any] | None, *, merges: bool = False) -> str | None:
    """What was asked for and can have no effect, in words; None where there is nothing.

    A file that does not say its own thresholds is held against the usual ones: to ask for those is to ask for nothing.
    """
    if inside is None:
        return None
    lowest, overlap, most = _numbers(inside)
    usual = DEFAULT_SELECTION
    named = (
        (
            f"IoU {selection.nms_iou:g}",
            selection.nms_iou != (usual.nms_iou if overlap is None else overlap) and not merges,
        ),
        (f"at most {selection.max_detections}", selection.max_detections > (most or usual.max_detections)),
        (
            f"from {selection.score_threshold:g}",
            selection.score_threshold < (usual.score_threshold if lowest is None else lowest),
        ),
        (f"box voting from {selection.box_voting}", selection.box_voting is not None and not merges),
    )
    said = [text for text, vain in named if vain]
    if not said:
        return None
    known = (f"IoU {overlap:g}" if overlap is not None else "", f"at most {most:g}" if most is not None else "")
    own = ", ".join(filter(None, (*known, f"from {lowest:g}" if lowest is not None else "")))
    return f"NMS inside: {own or 'fixed there'}; {', '.join(said)} {'does' if len(said) == 1 else 'do'} not apply"


def _numbers(inside: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """(lowest score, overlap, most detections) that a file says; None for what is missing or no number."""
    found = (inside.get(key) for key in ("score_threshold", "nms_iou", "max_detections"))
    lowest, overlap, most = (value if isinstance(value, (int, float)) else None for value in found)
    return lowest, overlap, most
