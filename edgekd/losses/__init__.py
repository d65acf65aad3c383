"""Distillation terms, one module a method. `TERMS` has what a recipe may name, as `recipe.LOSSES` says without torch."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, get_type_hints

from edgekd.errors import DistillationSetupError
from edgekd.losses.adversarial import AdversarialTerm
from edgekd.losses.base import DistillBatch, Pair, TeacherView, Term
from edgekd.losses.cwd import CWDTerm
from edgekd.losses.decoupled import DecoupledTerm
from edgekd.losses.feature import FeatureTerm
from edgekd.losses.fgd import FGDTerm
from edgekd.losses.gkd import GKDTerm
from edgekd.losses.information_map import InformationMapTerm
from edgekd.losses.masked import AMDTerm, MGDTerm
from edgekd.losses.pkd import PKDTerm
from edgekd.losses.response import ResponseTerm
from edgekd.recipe import TermConfig

__all__ = ["TERMS", "DistillBatch", "Pair", "TeacherView", "Term", "build_term"]


@dataclass(frozen=True)
class TermEntry:
    """A term's class, the weight it gets when a recipe gives none, and whether its pull fades unless a recipe says so."""

    build: type[Term]
    default_weight: float
    fades: bool = False


TERMS: dict[str, TermEntry] = {
    "response": TermEntry(ResponseTerm, 1.0),
    "feature": TermEntry(FeatureTerm, 1.0),
    # The five published systems.
    "adversarial": TermEntry(AdversarialTerm, 1.0),
    "information_map": TermEntry(InformationMapTerm, 1.0),
    "amd": TermEntry(AMDTerm, 2e-5),
    "gkd": TermEntry(GKDTerm, 1.0, fades=True),  # as published
    "decoupled": TermEntry(DecoupledTerm, 1.0),
    # Baselines that the field compares with.
    "cwd": TermEntry(CWDTerm, 1.0),
    "mgd": TermEntry(MGDTerm, 2e-5),
    "fgd": TermEntry(FGDTerm, 1.0),
    "pkd": TermEntry(PKDTerm, 1.0),
}


def build_term(config: TermConfig, pair: Pair) -> Term:
    """The term that a recipe asks for, checked against the pair.

    Raises:
        DistillationSetupError: an unknown term or parameter, a value that a parameter cannot take, or a pair that cannot
            meet the term's needs.
    """
    entry = TERMS.get(config.loss)
    if entry is None:
        raise DistillationSetupError(f"unknown distillation term {config.loss!r}", expected=", ".join(sorted(TERMS)))
    accepted = {
        name
        for name, parameter in inspect.signature(entry.build).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    arguments = dict(config.params)
    for key in ("student_taps", "teacher_taps"):
        value = getattr(config, key)
        if value != "auto":
            arguments[key] = value
    unknown = sorted(set(arguments) - accepted)
    if unknown:
        raise DistillationSetupError(
            f"term {config.loss}: unknown parameter {', '.join(unknown)}", expected=", ".join(sorted(accepted))
        )
    hints = get_type_hints(entry.build.__init__)
    arguments = {name: _checked(config.loss, name, value, hints[name]) for name, value in arguments.items()}
    try:
        return entry.build(pair, **arguments)
    except (TypeError, ValueError) as error:
        raise DistillationSetupError(f"term {config.loss}: a parameter does not fit", got=error) from error


def _checked(loss: str, name: str, value: object, hint: Any) -> Any:
    """A parameter's value as the type that the term declares: finite and not negative if it is a number."""
    from pydantic import TypeAdapter, ValidationError

    try:
        found = TypeAdapter(hint).validate_python(value)
        detail = None
    except ValidationError as error:
        found, detail = None, error.errors(include_url=False)[0]["msg"]
    if isinstance(found, float | int):
        positive = name.endswith("temperature")
        if not math.isfinite(found) or found < 0 or (positive and found == 0):
            detail = f"a number {'above 0' if positive else 'of at least 0'}"
    if detail is not None:
        raise DistillationSetupError(f"term {loss}: {name} cannot be this", got=repr(value), expected=detail)
    return found
