"""The most accurate model within a time budget."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from backbones.bench.pareto.rows import ParetoRow
from backbones.bench.statistics import NOISY
from backbones.errors import ConfigError

__all__ = ["BudgetChoice", "parse_budget", "within"]

UNITS = {"": 1.0, "ms": 1.0, "s": 1000.0}


@dataclass(frozen=True)
class BudgetChoice:
    """What a budget allows.

    Attributes:
        budget_ms: what the *median* call may take; `doubts` says where the 90th percentile does
            not keep to it.
        best: the most accurate model within the budget; None where there is none.
        others: the rest within the budget, the most accurate first.
        fastest: the fastest model of all that were measured.
        doubts: sentences on how sure this is.
    """

    budget_ms: float
    best: ParetoRow | None
    others: tuple[ParetoRow, ...]
    fastest: ParetoRow | None
    doubts: tuple[str, ...]

    def __str__(self) -> str:
        if self.best is None:
            found = "none with a published top-1 was measured"
            if self.fastest is not None:
                found = f"the fastest is {_facts(self.fastest)}"
            return f"no model answers within {self.budget_ms:g} ms here; {found}"
        lines = [f"within {self.budget_ms:g} ms: {_facts(self.best)}", *self.doubts]
        return "\n".join([*lines, *(f"  next: {_facts(row)}" for row in self.others[:3])])


def parse_budget(text: str) -> float:
    """Return the milliseconds of ``10ms``, ``10`` or ``0.01s``.

    Raises:
        ConfigError: it is none of these, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(ms|s|)\s*", text.lower())
    try:
        value = float(found[1]) * UNITS[found[2]] if found else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"budget {text!r} is no time; write 10ms, 10 or 0.01s")
    return value


def within(rows: Sequence[ParetoRow], budget_ms: float) -> BudgetChoice:
    """Choose among measured rows by published top-1; rows without one do not count.

    Args:
        rows: those of a `ParetoFront`.
        budget_ms: milliseconds that the median call may take.
    """
    known = [row for row in rows if row.measured and row.top1 is not None]
    inside = sorted(
        (row for row in known if _median(row) <= budget_ms),
        key=lambda row: (-(row.top1 or 0.0), _median(row)),
    )
    best = inside[0] if inside else None
    return BudgetChoice(
        budget_ms=budget_ms,
        best=best,
        others=tuple(inside[1:]),
        fastest=min(known, key=_median, default=None),
        doubts=_doubts(best, known, budget_ms),
    )


def _doubts(
    best: ParetoRow | None, known: Sequence[ParetoRow], budget_ms: float
) -> tuple[str, ...]:
    doubts = []
    if best is not None and best.p90_ms is not None and best.p90_ms > budget_ms:
        doubts.append(f"one call in ten takes longer than that (p90 {best.p90_ms:.2f} ms)")
    top1 = -math.inf if best is None or best.top1 is None else best.top1
    for row in known:
        # Either side of the budget: the choice itself, and better models that just missed it.
        spread = row.spread or 0.0
        near = abs(_median(row) - budget_ms) < spread * _median(row)
        if spread > NOISY and near and (row.top1 or 0.0) >= top1:
            doubts.append(
                f"too noisy to tell whether {row.model} keeps within {budget_ms:g} ms: median"
                f" {_median(row):.2f} ms, calls spread by {spread:.0%}"
            )
    return tuple(doubts)


def _median(row: ParetoRow) -> float:
    return math.inf if row.median_ms is None else row.median_ms


def _facts(row: ParetoRow) -> str:
    return f"{row.model}, {row.top1:g} % top-1, {_median(row):.2f} ms ({row.engine})"
