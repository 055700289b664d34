"""Honest latency measurement."""

from __future__ import annotations

from backbones.bench.latency import Latency, compare_latency, measure

__all__ = ["Latency", "compare_latency", "measure"]
