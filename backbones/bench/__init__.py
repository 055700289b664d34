"""Measured latency: of callables, of a model in every engine, of many models."""

from backbones.bench.benchmarking import benchmark
from backbones.bench.child import ChildError
from backbones.bench.latency import Latency, compare_latency, measure
from backbones.bench.machine import Machine, examine
from backbones.bench.pareto import (
    BudgetChoice,
    ParetoFront,
    ParetoRow,
    draw_front,
    front,
    front_as_dict,
    parse_budget,
    within,
    write_front,
)
from backbones.bench.report import BenchReport, Row
from backbones.bench.statistics import Times, certain
from backbones.bench.throughput import ThroughputReport, ThroughputRow, throughput

__all__ = [
    "BenchReport",
    "BudgetChoice",
    "ChildError",
    "Latency",
    "Machine",
    "ParetoFront",
    "ParetoRow",
    "Row",
    "ThroughputReport",
    "ThroughputRow",
    "Times",
    "benchmark",
    "certain",
    "compare_latency",
    "draw_front",
    "examine",
    "front",
    "front_as_dict",
    "measure",
    "parse_budget",
    "throughput",
    "within",
    "write_front",
]
