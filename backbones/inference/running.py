"""A model over a source: threads that each decode a batch and run it, rows in the source's order.

Where each thread decodes and then runs its batch, instead of some threads for each, the processor's
cores need not be divided between the two: whatever is the more work gets them.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.errors import DataError
from backbones.inference.decoding import Decoder
from backbones.inference.models import OpenModel
from backbones.inference.rows import Row
from backbones.inference.sources import Item

__all__ = ["Meter", "batches_of", "run_batches"]

_AHEAD = 2  # batches beyond one a thread that may wait to be taken


class Meter:
    """Seconds of decoding and of the engine, summed over threads, and where it was busy at all."""

    def __init__(self) -> None:
        self.decoding = self.engine = self.busy = 0.0
        self._running = 0
        self._since = 0.0
        self._lock = threading.Lock()

    def enter(self) -> float:
        """Begin a call of the engine."""
        now = time.perf_counter()
        with self._lock:
            if self._running == 0:
                self._since = now
            self._running += 1
        return now

    def leave(self, began: float) -> None:
        """End a call of the engine."""
        now = time.perf_counter()
        with self._lock:
            self._running -= 1
            self.engine += now - began
            if self._running == 0:
                self.busy += now - self._since

    def decoded(self, began: float) -> None:
        """Count a batch that was decoded."""
        with self._lock:
            self.decoding += time.perf_counter() - began


def batches_of(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one shorter."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def run_batches(
    batches: Iterable[Sequence[Item]],
    model: OpenModel,
    decoder: Decoder,
    finish: Callable[[Tensor], Sequence[dict[str, Any]]],
    meter: Meter,
    *,
    workers: int | None = None,
    strict: bool = False,
) -> Generator[list[Row], None, None]:
    """Yield the rows of each batch, in order; only so many batches are in memory at a time.

    `finish` makes the fields of rows from a batch's outputs. See `predict` for the others.
    """
    setting = model.setting
    workers = workers or max(setting.streams * setting.threads, 1)
    slots = threading.Semaphore(setting.streams)

    def work(items: Sequence[Item]) -> list[Row]:
        began = time.perf_counter()
        images: list[np.ndarray | None] = []
        errors: list[str | None] = []
        for item in items:
            try:
                images.append(decoder.decode(item))
                errors.append(None)
            except DataError as error:
                if strict:
                    raise
                images.append(None)
                errors.append(str(error))
        found: list[dict[str, Any]] = [{} for _ in items]
        if any(image is not None for image in images):
            if model.raw:
                inputs = [None if one is None else torch.from_numpy(one)[None] for one in images]
            else:
                inputs = [decoder.batch(images, setting.batch_size)]
            meter.decoded(began)
            with slots:
                began = meter.enter()
                try:
                    outputs = [None if x is None else model.call(x) for x in inputs]
                finally:
                    meter.leave(began)
            found = [one for out in outputs for one in ([{}] if out is None else finish(out))]
        return [
            Row(item.name, folder=item.folder, error=error, **({} if error else fields))
            for item, error, fields in zip(items, errors, found)
        ]

    pending: deque[Future[list[Row]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="inference")
    try:
        for items in batches:
            pending.append(pool.submit(work, items))
            if len(pending) >= workers + _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
