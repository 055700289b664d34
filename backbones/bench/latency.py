"""Latency of callables after warm-up, candidates in alternation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from backbones.bench.statistics import Times
from backbones.engines import take_turns, torch_threads
from backbones.errors import ConfigError

__all__ = ["Latency", "compare_latency", "measure"]


@dataclass(frozen=True)
class Latency:
    """Milliseconds a call: median, 90th percentile, and how many calls they are of."""

    median_ms: float
    p90_ms: float
    runs: int
    threads: int

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} ms (p90 {self.p90_ms:.2f} ms, {self.threads} threads)"


def measure(
    function: Callable[[Any], Any],
    input: Any,
    *,
    threads: int | None = None,
    warmup_s: float = 0.3,
    seconds: float = 1.5,
) -> Latency:
    """Measure one callable; see `compare_latency`."""
    return compare_latency(
        {"it": function}, input, threads=threads, warmup_s=warmup_s, seconds=seconds
    )["it"]


def compare_latency(
    candidates: Mapping[str, Callable[[Any], Any]],
    input: Any,
    *,
    threads: int | None = None,
    warmup_s: float = 0.3,
    seconds: float = 1.5,
) -> dict[str, Latency]:
    """Measure several callables on the same input, taking turns, so that disturbances fall on all.

    The first tenth of a second of a turn, which refills the caches, is not counted. The caller
    chooses eval mode.

    Args:
        candidates: callables by name.
        input: what each is called with.
        threads: PyTorch's threads meanwhile; other engines fix theirs when they are made.
        warmup_s: seconds of unmeasured calls of each candidate before the first turn.
        seconds: seconds of the turns of each candidate, at least two turns.

    Raises:
        ConfigError: no candidates, or fewer than one thread.
    """
    if not candidates:
        raise ConfigError("nothing to measure: no candidates")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    with torch_threads(threads), torch.inference_mode():
        times = take_turns(candidates, input, warmup_s=warmup_s, seconds=seconds)
        granted = torch.get_num_threads()
    found = {name: Times(turns) for name, turns in times.items()}
    return {
        name: Latency(times.median, times.p90, len(times.calls), granted)
        for name, times in found.items()
    }
