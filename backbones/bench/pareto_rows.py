"""The rows of a front, and which of them are on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backbones.bench.machine import Machine

__all__ = ["Front", "FrontRow", "mark_front"]


@dataclass(frozen=True)
class FrontRow:
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
class Front:
    """Models by latency, those without one last. `complete` is False after an interruption."""

    engine: str
    precision: str
    batch_size: int
    machine: Machine
    rows: tuple[FrontRow, ...]
    complete: bool
    left_out: tuple[str, ...]
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the front as JSON values."""
        return dataclasses.asdict(self)


def mark_front(rows: Sequence[FrontRow]) -> tuple[FrontRow, ...]:
    """Return the rows by latency, each told whether it is on the front."""
    rivals = [_scores(row) for row in rows if _counts(row)]

    def beaten(row: FrontRow) -> bool:
        slow, weak = _scores(row)
        return any(a <= slow and b <= weak and (a, b) != (slow, weak) for a, b in rivals)

    marked = [dataclasses.replace(row, on_front=_counts(row) and not beaten(row)) for row in rows]
    return tuple(sorted(marked, key=lambda row: (*_scores(row), row.model)))


def _counts(row: FrontRow) -> bool:
    return row.measured and row.top1 is not None


def _scores(row: FrontRow) -> tuple[float, float]:
    """Latency and negative accuracy: less is better."""
    return (
        math.inf if row.median_ms is None else row.median_ms,
        math.inf if row.top1 is None else -row.top1,
    )
