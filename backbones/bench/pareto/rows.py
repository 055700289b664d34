"""Models by published accuracy and measured latency, and which of them are on the Pareto front."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backbones.bench.machine import Machine
from backbones.bench.report import markdown, number

__all__ = ["ParetoFront", "ParetoRow", "mark_front"]

HEADS = ["model", "tag", "top-1 %", "M params", "GMACs", "median ms", "p90 ms", "spread"]
HEADS += ["engine", "front"]


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
        lines += [markdown(HEADS, [_cells(row) for row in rows])] if rows else []
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

    def as_dict(self) -> dict[str, Any]:
        """Return the front as JSON values."""
        return dataclasses.asdict(self)


def mark_front(rows: Sequence[ParetoRow]) -> tuple[ParetoRow, ...]:
    """Return the rows by latency, each marked whether it is on the front."""
    rivals = [_scores(row) for row in rows if _counts(row)]

    def beaten(row: ParetoRow) -> bool:
        slow, weak = _scores(row)
        return any(a <= slow and b <= weak and (a, b) != (slow, weak) for a, b in rivals)

    marked = [dataclasses.replace(row, on_front=_counts(row) and not beaten(row)) for row in rows]
    return tuple(sorted(marked, key=lambda row: (*_scores(row), row.model)))


def _counts(row: ParetoRow) -> bool:
    return row.measured and row.top1 is not None


def _scores(row: ParetoRow) -> tuple[float, float]:
    """Latency and negative accuracy: less is better."""
    return (
        math.inf if row.median_ms is None else row.median_ms,
        math.inf if row.top1 is None else -row.top1,
    )


def _cells(row: ParetoRow) -> list[str]:
    over = ">" if row.stopped else ""
    return [
        row.model,
        row.tag or "",
        number(row.top1, ".2f"),
        number(row.params, ".2f", 1e6),
        number(row.macs, ".3f", 1e9),
        over + number(row.median_ms, ".2f"),
        number(row.p90_ms, ".2f"),
        number(row.spread, ".0%"),
        row.engine or "",
        "*" if row.on_front else "",
    ]
