"""Milliseconds of callables that take turns, so that what else runs falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["RUNS_A_TURN", "least", "take_turns", "timed"]

RUNS_A_TURN = 5


def take_turns(
    candidates: Mapping[str, Callable[[Any], Any]],
    input: Any,
    *,
    warmup_s: float,
    seconds: float,
) -> dict[str, list[float]]:
    """Return the milliseconds of each call of each callable.

    Args:
        candidates: callables by name; all are called on `input`.
        input: what each is called with.
        warmup_s: seconds of uncounted calls of each, at least two calls.
        seconds: seconds of counted calls of each, at least two turns of five calls. The first call
            of a turn, which refills the caches, is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for function in candidates.values():
        end = time.perf_counter() + warmup_s
        function(input)
        function(input)
        while time.perf_counter() < end:
            function(input)
    end = time.perf_counter() + seconds * len(candidates)
    turns = 0
    while turns < 2 or time.perf_counter() < end:
        for name, function in candidates.items():
            function(input)
            times[name].extend(timed(function, input) for _ in range(RUNS_A_TURN))
        turns += 1
    return times


def timed(function: Callable[[Any], Any], input: Any) -> float:
    """Return the milliseconds of one call."""
    start = time.perf_counter()
    function(input)
    return (time.perf_counter() - start) * 1e3


def least(function: Callable[[Any], Any], input: Any, rounds: int) -> float:
    """Return the least milliseconds of a few calls, which other processes disturb least.

    One call before them is not counted.
    """
    function(input)
    return min(timed(function, input) for _ in range(rounds))
