"""Published accuracy against latency measured here: Pareto fronts and time budgets."""

from backbones.bench.pareto.files import draw_front, front_as_dict, write_front
from backbones.bench.pareto.rows import (
    BudgetChoice,
    ParetoFront,
    ParetoRow,
    mark_front,
    parse_budget,
    within,
)
from backbones.bench.pareto.sweep import front

__all__ = [
    "BudgetChoice",
    "ParetoFront",
    "ParetoRow",
    "draw_front",
    "front",
    "front_as_dict",
    "mark_front",
    "parse_budget",
    "within",
    "write_front",
]
