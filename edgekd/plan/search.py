"""Which candidates to measure next, so that a few measurements find the largest ones within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from statistics import median

from edgekd.plan.candidates import Candidate

EXPONENT = 0.9
"""Latency grows a little more slowly than MACs, since each layer costs something by itself."""

_SAFETY = 0.8
"""The first guess of a family aims at this share of the budget."""
_MARGIN = 1.08
"""Candidates are worth measuring that are expected to take up to so many budgets."""
_HOPELESS = 5.0
_WORTH = 0.6
"""Among those within the budget, what has less than this share of its family's most MACs is left unmeasured."""
_INT8_RATIO = 0.6


class Search:
    """Expects latencies of what is not measured from what is, and says what to measure next.

    Args:
        candidates: all there are.
        budget_ms: the most that a candidate may take.
        rate: MACs a millisecond to begin with.
    """

    def __init__(self, candidates: Sequence[Candidate], budget_ms: float, rate: float) -> None:
        self.budget_ms, self._rate = budget_ms, rate
        self._lines: dict[tuple[str, str], list[Candidate]] = {}
        for candidate in candidates:
            self._lines.setdefault(candidate.line, []).append(candidate)

    def next_round(self, measured: Mapping[Candidate, float | None]) -> list[Candidate]:
        """What to measure now: at most one of each family and precision; nothing when all that matter are known.

        Args:
            measured: milliseconds; None for what could not be measured.
        """
        chosen = [self._next_of(line, measured) for line in self._lines]
        return [candidate for candidate in chosen if candidate is not None]

    def left(self, measured: Mapping[Candidate, float | None]) -> int:
        """Candidates near the budget that are still unmeasured."""
        return sum(len(self._wanted(line, measured)) for line in self._lines)

    def expected_ms(self, candidate: Candidate, measured: Mapping[Candidate, float | None]) -> float:
        """Milliseconds, from the nearest measured candidate of the family, or from the other families."""
        known = {c: ms for c, ms in measured.items() if ms is not None}
        if candidate in known:
            return known[candidate]
        model, precision = candidate.line
        for line in ((model, precision), *((model, other) for other in ("fp32", "fp16", "int8"))):
            points = [(c, ms) for c, ms in known.items() if c.line == line]
            if points:
                near = min(points, key=lambda point: abs(log(candidate.macs / point[0].macs)))
                return _scaled(near[1], near[0].macs, candidate.macs) * _between(line[1], precision)
        others = [_scaled(ms, c.macs, candidate.macs) * _between(c.precision, precision) for c, ms in known.items()]
        return median(others) if others else candidate.macs / self._rate * _between("fp32", precision)

    def _next_of(self, line: tuple[str, str], measured: Mapping[Candidate, float | None]) -> Candidate | None:
        wanted = self._wanted(line, measured)
        return max(wanted, key=lambda candidate: candidate.macs) if wanted else None

    def _wanted(self, line: tuple[str, str], measured: Mapping[Candidate, float | None]) -> list[Candidate]:
        expected = {c: self.expected_ms(c, measured) for c in self._lines[line]}
        tried = [c for c in expected if c in measured]
        if not tried:
            return [self._first(expected)] if min(expected.values()) <= _HOPELESS * self.budget_ms else []
        fitting = [c for c, ms in expected.items() if self._fits(c, ms, measured)]
        edge = [c for c in fitting if not any(c.within(other) for other in fitting)]
        most = max((c.macs for c in edge), default=0.0)
        return [c for c in edge if c not in measured and c.macs >= _WORTH * most]

    def _fits(self, candidate: Candidate, ms: float, measured: Mapping[Candidate, float | None]) -> bool:
        if candidate in measured:
            return measured[candidate] is not None and ms <= self.budget_ms
        return ms <= _MARGIN * self.budget_ms

    def _first(self, expected: Mapping[Candidate, float]) -> Candidate:
        """The largest that is expected well within the budget, or else the smallest there is."""
        fitting = [c for c, ms in expected.items() if ms <= _SAFETY * self.budget_ms]
        if fitting:
            return max(fitting, key=lambda c: c.macs)
        return min(expected, key=lambda c: c.macs)


def _between(known: str, wanted: str) -> float:
    """A first guess of one precision's time by another's."""
    ratios = {"fp32": 1.0, "fp16": 1.0, "int8": _INT8_RATIO}
    return ratios[wanted] / ratios[known]


def _scaled(ms: float, macs: float, wanted: float) -> float:
    return float(ms * (wanted / macs) ** EXPONENT)
