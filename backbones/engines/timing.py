"""Milliseconds of callables that take turns, so that what else runs falls on all alike.

A callable that has just got its turn is slow at first: it has to fill the caches with its weights
again, and threads of the engine before it may still spin, waiting for more work. A turn therefore
begins with calls that are not counted.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["SETTLE_S", "least", "settle", "take_turns", "timed", "timed_for", "torch_threads"]

SETTLE_S = 0.1  # about twice what small models need to reach their speed again
TURN_S, CALLS = 0.1, 5  # counted seconds and calls of a turn, at least


def take_turns(
    candidates: Mapping[str, Callable[[Any], Any]],
    input: Any,
    *,
    warmup_s: float,
    seconds: float,
) -> dict[str, list[list[float]]]:
    """Return the milliseconds of each call of each callable, turn by turn.

    Args:
        candidates: callables by name; all are called on `input`.
        input: what each is called with.
        warmup_s: seconds of uncounted calls of each before the first turn.
        seconds: seconds of turns of each, at least two turns; half of a turn is not counted.
    """
    turns: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for function in candidates.values():
        function(input)
        settle(function, input, warmup_s)
    end = time.perf_counter() + seconds * len(candidates)
    rounds = 0
    while rounds < 2 or time.perf_counter() < end:
        for name, function in candidates.items():
            settle(function, input)
            turns[name].append(timed_for(function, input, TURN_S, CALLS))
        rounds += 1
    return turns


def settle(function: Callable[[Any], Any], input: Any, seconds: float = SETTLE_S) -> list[float]:
    """Call for some seconds, once at least, and return the milliseconds of the calls."""
    return timed_for(function, input, seconds, 1)


def timed_for(
    function: Callable[[Any], Any], input: Any, seconds: float, calls: int
) -> list[float]:
    """Return the milliseconds of calls, for so many seconds and so many calls at least."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < calls or time.perf_counter() - start < seconds:
        times.append(timed(function, input))
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


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set PyTorch's number of threads in this thread of the process; None leaves it."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
