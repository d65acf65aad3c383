"""Find out what a foreign detector's outputs mean: from what is declared, from their names and shapes, and from one run.

What is declared wins. What is left is settled by the outputs of a probe image, where they leave one reading only; where
they leave two, the error says which key of the recipe decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgekd.errors import UserError
from edgekd.labels import NAMED_LABEL_SETS
from edgekd.recipe import OnnxTeacher
from edgekd.runtimes.boxes_scores import box_and_score, boxes_scores, tables_of
from edgekd.runtimes.finished import finished
from edgekd.runtimes.grids import is_map
from edgekd.runtimes.heads import levels, yolo
from edgekd.runtimes.outputs import Arrays, item_of
from edgekd.runtimes.probe import Probe, Recognised

_BACKGROUND_NAMES = (("background", "bg", "noobject"), ("n/a",))
"""Where none of the former is there, the latter: DETR's label files have it for a column that is never used as well."""

_DETR = (("logits", "pred_boxes"), ("pred_logits", "pred_boxes"))
"""What Hugging Face and DETR's authors call their outputs, beside which stand those of inner layers."""


def recognise(probe: Probe, declared: OnnxTeacher, found_names: Sequence[str] | None = None) -> Recognised:
    """The output format of a foreign detector.

    Args:
        probe: the outputs of one run on a picture.
        declared: what the recipe says; "auto" leaves a question to the outputs.
        found_names: class names from the file's metadata, if it has any.

    Raises:
        UserError: the outputs leave more than one reading or none; the message lists them and says what to declare. Or the
            declared class names are the file's own in another order.
    """
    names = _names(probe, _declared_names(declared), found_names)
    objects, objects_declared = _without_background(names, declared)
    arrays = {
        name: array
        for name, array in probe.arrays.items()
        if array.dtype.kind in "fiub"  # labels may be text, as Core ML's are
        and (array.ndim < 3 or len(array) > 0)  # masks or keypoints of detections, of which the probe has none
        and (array.ndim < 2 or item_of(array, 0, 2).ndim <= 2)
        and not is_map(array.shape, probe.input_hw)
    }
    arrays = next(({n: arrays[n] for n in own} for own in _DETR if set(own) <= set(arrays)), arrays)
    kind = declared.output
    if kind in ("auto", "detections"):
        found = finished(probe, arrays, objects_declared, objects, certain=kind == "detections")
        if found is not None:
            return found
    heads = [name for name, array in arrays.items() if array.ndim > 1 and min(item_of(array, 0, 2).shape) >= 5]
    pair = box_and_score(probe, arrays, objects) if kind in ("auto", "boxes-scores") else None
    if pair is not None:
        if objects != names and names is not None and tables_of(probe, pair)[1].shape[1] == len(names) + 1:
            found = boxes_scores(probe, pair, declared, names)
            # the name is of a column never used, as DETR's "N/A"
            if found.form.background != objects_declared.background:
                return found
        return boxes_scores(probe, pair, objects_declared, objects)
    if not heads or (len(heads) > 1 and kind != "boxes-scores"):
        in_levels = levels(probe, declared, names)
        if in_levels is not None:
            return in_levels
    if kind != "boxes-scores" and (head := _head(arrays, heads, names)) is not None:
        _refuse_labels_beside(probe, arrays, head)
        found = yolo(probe, [head], declared, names)
        one_more = found_names is not None and len(found_names) == found.form.num_classes + 1
        if found.form.kind == "yolo-objectness" and kind == "auto" and one_more:
            raise probe.unclear(
                f"{found.form.num_classes} class names are declared, the file itself names {len(found_names or ())}, and the "
                "value between would be an objectness with the former and a class with the latter",
                "leave `class_names` out, or declare `output` too",
            )
        return found
    if kind in ("yolo", "yolo-objectness"):
        raise probe.unclear(f"output: {kind} needs one array of candidates", "declare another `output`")
    if len(heads) > 1 and len({arrays[name].shape for name in heads}) == 1:
        raise probe.unclear(
            f"several outputs may be the head: {', '.join(heads)}",
            "export it with the one that counts, without auxiliary heads",
        )
    raise probe.unclear(
        "no pair of boxes (N, 4) and scores (N, classes) among the outputs",
        "export the detector with decoded boxes and class scores, or declare `output`",
    )


def _head(arrays: Arrays, heads: Sequence[str], names: Sequence[str] | None) -> str | None:
    """The one output that may be a raw head; beside others, the one whose width fits the classes."""
    if len(arrays) == 1:
        return next(iter(arrays))
    if len(heads) > 1:
        classes = 80 if names is None else len(names)
        wanted = (classes + 4, classes + 5)
        heads = [name for name in heads if any(extent in wanted for extent in item_of(arrays[name], 0, 2).shape)]
    return heads[0] if len(heads) == 1 else None


def _refuse_labels_beside(probe: Probe, arrays: Arrays, head: str) -> None:
    """Raise where rows have labels in another output: finished detections, with more values than a box and a score."""
    shape = item_of(arrays[head], 0, 2).shape
    labels = [name for name, array in arrays.items() if array.dtype.kind in "iu" and array.size in shape]
    if labels and probe.has_too_few_for_raw(max(shape)):
        raise probe.unclear(
            f"{labels[0]!r} has a label for each row of {head!r}, whose {min(shape)} values are not a box and a score: an "
            "angle among them, perhaps",
            "export it with boxes (N, 4), upright around rotated ones, scores (N) and labels (N)",
        )


def _names(probe: Probe, declared: tuple[str, ...] | None, found: Sequence[str] | None) -> tuple[str, ...] | None:
    if declared is None or found is None:
        return declared or (tuple(found) if found else None)
    said, own = ([name.casefold() for name in names] for names in (declared, found))
    if said != own and sorted(said) == sorted(own):
        raise UserError(
            f"{probe.source}: the declared class names are those in the file itself, in another order",
            got=", ".join(declared),
            expected=", ".join(found),
            fix="leave them out for this file; where they are meant for another one, declare them for that one in the recipe",
        )
    return declared


def _declared_names(declared: OnnxTeacher) -> tuple[str, ...] | None:
    if isinstance(declared.class_names, str):
        return NAMED_LABEL_SETS.get(declared.class_names)
    return tuple(declared.class_names)


def _without_background(
    names: tuple[str, ...] | None, declared: OnnxTeacher
) -> tuple[tuple[str, ...] | None, OnnxTeacher]:
    """Names without one for background at either end, as the label files of SSDs have it, which is then as good as declared."""
    if names is None or len(names) < 2 or declared.background != "auto":
        return names, declared
    for words in _BACKGROUND_NAMES:
        for end, rest, place in ((names[0], names[1:], "first"), (names[-1], names[:-1], "last")):
            if re.sub(r"[\s_-]", "", end.lower()) in words:
                return rest, declared.model_copy(update={"background": place})
    return names, declared
