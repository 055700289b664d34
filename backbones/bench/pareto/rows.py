"""Models by published accuracy and measured latency: the Pareto front, and what a budget allows."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from backbones.bench.machine import Machine
from backbones.bench.report import markdown, number
from backbones.bench.statistics import NOISY
from backbones.errors import ConfigError

__all__ = ["BudgetChoice", "ParetoFront", "ParetoRow", "mark_front", "parse_budget", "within"]

UNITS = {"": 1.0, "ms": 1.0, "s": 1000.0}


@dataclass(frozen=True)
class ParetoRow:
    """A model: published top-1 (percent) and measured latency; None where there is none.

    `input_size` is what it was measured at, `top1_input_size` what `top1` is published for.
    `spread` is the interquartile range of the calls over their median. `on_front`: no other model
    is at least as good in both and better in one. `reason` says why there is no latency, or that it
    is that of a warm-up (`stopped`).
    """

    model: str
    tag: str | None = None
    top1: float | None = None
    top1_input_size: tuple[int, ...] | None = None
    params: int | None = None
    macs: int | None = None
    input_size: tuple[int, ...] | None = None
    median_ms: float | None = None
    p90_ms: float | None = None
    spread: float | None = None
    engine: str | None = None
    precision: str = "fp32"
    layout: str | None = None
    weights: str | None = None
    on_front: bool = False
    stopped: bool = False
    reason: str | None = None
    problems: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether the latency is that of a whole measurement."""
        return self.median_ms is not None and not self.stopped

    @property
    def counts(self) -> bool:
        """Whether it has both latency and accuracy."""
        return self.measured and self.top1 is not None

    @property
    def scores(self) -> tuple[float, float]:
        """Latency and negative accuracy: less is better, infinite where unknown."""
        return (
            math.inf if self.median_ms is None else self.median_ms,
            math.inf if self.top1 is None else -self.top1,
        )

    @property
    def summary(self) -> str:
        """A measured model in one line."""
        return f"{self.model}, {self.top1:g} % top-1, {self.median_ms:.2f} ms ({self.engine})"


@dataclass(frozen=True)
class ParetoFront:
    """Models by latency, those without one last; its text is a Markdown table with remarks.

    `complete` is False after an interruption.
    """

    engine: str
    precision: str
    batch_size: int
    machine: Machine
    rows: tuple[ParetoRow, ...]
    complete: bool
    left_out: tuple[str, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        rows = [row for row in self.rows if row.median_ms is not None]
        lines = [str(self.machine), ""]
        lines += [markdown([_cells(row) for row in rows])] if rows else []
        lines += ["", *(f"{row.model}: {row.reason}" for row in self.rows if row.reason)]
        lines += self.problems
        other = [
            row for row in rows if row.top1_input_size and row.input_size != row.top1_input_size
        ]
        if other:
            sizes = sorted({" x ".join(map(str, row.top1_input_size or ())) for row in other})
            lines.append(
                f"top-1 is published for another size than was measured: {', '.join(sizes)}"
            )
        if self.precision != "fp32":
            lines.append(f"top-1 is the published one, of fp32; {self.precision} may have less")
        if not self.complete:
            lines.append(f"incomplete: interrupted before {', '.join(self.left_out)}")
        return "\n".join(lines)


def mark_front(rows: Sequence[ParetoRow]) -> tuple[ParetoRow, ...]:
    """Return the rows by latency, each marked whether it is on the front."""
    rivals = [row.scores for row in rows if row.counts]

    def beaten(row: ParetoRow) -> bool:
        slow, weak = row.scores
        return any(a <= slow and b <= weak and (a, b) != (slow, weak) for a, b in rivals)

    marked = [dataclasses.replace(row, on_front=row.counts and not beaten(row)) for row in rows]
    return tuple(sorted(marked, key=lambda row: (*row.scores, row.model)))


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
                found = f"the fastest is {self.fastest.summary}"
            return f"no model answers within {self.budget_ms:g} ms here; {found}"
        lines = [f"within {self.budget_ms:g} ms: {self.best.summary}", *self.doubts]
        return "\n".join([*lines, *(f"  next: {row.summary}" for row in self.others[:3])])


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
    known = sorted((row for row in rows if row.counts), key=lambda row: row.scores)
    inside = [row for row in known if row.scores[0] <= budget_ms]
    inside.sort(key=lambda row: row.scores[::-1])  # by accuracy
    best = inside[0] if inside else None
    return BudgetChoice(
        budget_ms=budget_ms,
        best=best,
        others=tuple(inside[1:]),
        fastest=known[0] if known else None,
        doubts=_doubts(best, known, budget_ms),
    )


def _doubts(
    best: ParetoRow | None, known: Sequence[ParetoRow], budget_ms: float
) -> tuple[str, ...]:
    doubts = []
    if best is not None and best.p90_ms is not None and best.p90_ms > budget_ms:
        doubts.append(f"one call in ten takes longer than that (p90 {best.p90_ms:.2f} ms)")
    for row in known:
        # Either side of the budget: the choice itself, and better models that just missed it.
        (median, weak), spread = row.scores, row.spread or 0.0
        near = abs(median - budget_ms) < spread * median
        if spread > NOISY and near and (best is None or weak <= best.scores[1]):
            doubts.append(
                f"too noisy to tell whether {row.model} keeps within {budget_ms:g} ms: median"
                f" {median:.2f} ms, calls spread by {spread:.0%}"
            )
    return tuple(doubts)


def _cells(row: ParetoRow) -> dict[str, str]:
    return {
        "model": row.model,
        "tag": row.tag or "",
        "top-1 %": number(row.top1, ".2f"),
        "M params": number(row.params, ".2f", 1e6),
        "GMACs": number(row.macs, ".3f", 1e9),
        "median ms": (">" if row.stopped else "") + number(row.median_ms, ".2f"),
        "p90 ms": number(row.p90_ms, ".2f"),
        "spread": number(row.spread, ".0%"),
        "engine": row.engine or "",
        "front": "*" if row.on_front else "",
    }
