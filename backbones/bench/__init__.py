"""Honest measurement of latency: of callables, of a model in every engine, of many models."""

from __future__ import annotations

from backbones.bench.benchmarking import benchmark
from backbones.bench.budgets import Choice, parse_budget, within
from backbones.bench.child import ChildError
from backbones.bench.files import write_json
from backbones.bench.latency import Latency, compare_latency, measure
from backbones.bench.machine import Machine
from backbones.bench.pareto import front
from backbones.bench.pareto_files import describe, draw_front, front_table, write_front
from backbones.bench.pareto_rows import Front, FrontRow
from backbones.bench.report import BenchReport, Row
from backbones.bench.statistics import Times, certain

__all__ = [
    "BenchReport",
    "ChildError",
    "Choice",
    "Front",
    "FrontRow",
    "Latency",
    "Machine",
    "Row",
    "Times",
    "benchmark",
    "certain",
    "compare_latency",
    "describe",
    "draw_front",
    "front",
    "front_table",
    "measure",
    "parse_budget",
    "within",
    "write_front",
    "write_json",
]
