"""Counts the merges that are made, by rule."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = [
    "record",
    "recorded",
]

_recorder: ContextVar[Counter[str] | None] = ContextVar("merges", default=None)


@contextmanager
def recorded() -> Iterator[Counter[str]]:
    """Count the merges that are made inside the ``with`` block, by rule."""
    counter: Counter[str] = Counter()
    token = _recorder.set(counter)
    try:
        yield counter
    finally:
        _recorder.reset(token)


def record(rule: str) -> None:
    """Count one merge by `rule`; for rules that live with the layer they are about."""
    counter = _recorder.get()
    if counter is not None:
        counter[rule] += 1
