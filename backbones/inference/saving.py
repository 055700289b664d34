"""save_predictions(): the rows of a collection in a file, by one process or several."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from backbones.engines import Setting
from backbones.errors import ConfigError, DataError
from backbones.inference.formats import row_format
from backbones.inference.journal import Journal, partial_of
from backbones.inference.models import ModelLike
from backbones.inference.options import Options
from backbones.inference.prediction import Run
from backbones.inference.rows import Row
from backbones.inference.sources import Source, SourceLike, open_source

__all__ = ["Summary", "save_predictions", "share_of"]


@dataclass(frozen=True)
class Summary:
    """What a run has done.

    `images` are those of this process in this run, of which `bad` could not be read; `missing` are
    rows of the output that other processes still owe. `decoding` is its share of the work (0 to 1);
    `engine_busy` the share of the time in which the engine ran.
    """

    images: int
    bad: int
    missing: int
    seconds: float
    decoding: float
    engine_busy: float
    setting: Setting | None
    output: Path
    complete: bool

    @property
    def images_per_second(self) -> float:
        """Images a second, without the preparation of the engine."""
        return self.images / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        facts = {**asdict(self), "output": str(self.output)}
        return facts | {"images_per_second": self.images_per_second}

    def __str__(self) -> str:
        if self.setting is None:
            return f"{self.output} is complete; nothing was left to do"
        lines = [
            f"{self.images} images in {self.seconds:.1f} s: {self.images_per_second:.1f} images/s,"
            f" {self.decoding:.0%} of the work decoding ({self.setting})"
        ]
        if self.bad:
            lines.append(f"{self.bad} could not be read; their rows say why")
        if self.complete:
            lines.append(f"{self.output} is complete")
        else:
            lines.append(f"{self.output}.partial lacks {self.missing} rows; --resume goes on")
        return "\n".join(lines)


def save_predictions(
    source: SourceLike,
    model: ModelLike,
    output: str | PathLike[str],
    *,
    features: bool = False,
    top_k: int = 5,
    include_index: bool = False,
    resume: bool = False,
    parts: bool = False,
    share: tuple[int, int] | None = None,
    each: Callable[[int, Sequence[Row], int], None] | None = None,
    **options: Any,
) -> Summary:
    """Write the rows of :func:`predict` (or :func:`embed`) to a file.

    Whole parts are written on the way, into ``<output>.partial``; the output appears when all rows
    are there. Several processes that are given the same arguments (started by torchrun, SLURM or
    MPI, or told their `share`) write a share each, and the last one joins them in the order of the
    source.

    Args:
        source, model, options: as for `predict`.
        output: ``.csv``, ``.jsonl``, ``.parquet`` or ``.npz``.
        features: embeddings instead of predictions.
        include_index: in CSV, also the index of each class.
        resume: go on after the rows that an earlier run left.
        parts: leave the parts as they are: the output is a folder of them.
        share: (number of this process from 0, number of processes); None for what the environment
            says.
        each: takes the number of a row, it and those after it, and how many are left after these.

    Raises:
        ConfigError: an earlier run left rows and `resume` is not said, or they are of another job.
        BackbonesError: as for `predict`.
    """
    path, source = Path(output), open_source(source)
    if not isinstance(source, Source):
        raise ConfigError("an output needs a source whose length is known; give a list")
    if resume and path.is_file() and not partial_of(path).exists():
        return Summary(0, 0, 0, 0.0, 0.0, 0.0, None, path, True)
    rank, size = share or share_of(os.environ)
    journal = Journal(
        path,
        row_format(path, features=features, top_k=top_k, include_index=include_index),
        resume=resume,
        shared=size > 1,
    )
    as_written = {"parts": parts, "include_index": include_index}
    asked = Options(features=features, top_k=top_k, **options)
    run = Run(source, model, asked, journal.job)
    run.adopt(journal.begin(run.job | as_written))
    whole, step = len(source), run.model.setting.batch_size
    spans = _left(journal.done(), whole, step, rank, size)
    total = sum(end - first for first, end in spans)
    bad, done, first_error = 0, 0, ""
    began = time.perf_counter()
    try:
        # Closing them ends the threads, before what is waiting is written.
        with closing(run.batches(spans)) as batches:
            for first, rows in batches:
                journal.add(first, rows)
                done += len(rows)
                errors = [row.error for row in rows if row.error is not None]
                bad += len(errors)
                first_error = first_error or "".join(errors[:1])
                if each is not None:
                    each(first, rows, total - done)
    finally:
        journal.flush()
        if size == 1 and not journal.done():
            journal.discard()
    seconds = time.perf_counter() - began
    if bad == done == whole:
        journal.discard()
        raise DataError(f"none of the {whole} images could be read; the first: {first_error}")
    complete = journal.finish(whole, parts=parts)
    work = run.meter.decoding + run.meter.engine
    return Summary(
        images=done,
        bad=bad,
        missing=0 if complete else journal.missing(whole),
        seconds=seconds,
        decoding=run.meter.decoding / work if work else 0.0,
        engine_busy=run.meter.busy / seconds,
        setting=run.model.setting,
        output=path,
        complete=complete,
    )


def share_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return which process this is, and of how many, as torchrun, SLURM or MPI say it."""
    for rank, size in (
        ("RANK", "WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ):
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 1


def _left(
    done: Sequence[tuple[int, int]], count: int, step: int, rank: int, size: int
) -> list[tuple[int, int]]:
    """Return first and end of the batches that are this process's and in no part yet."""
    batches = -(-count // step)
    mine = range(rank * batches // size, (rank + 1) * batches // size)
    covered = {i for first, end in done for i in range(first // step, -(-end // step))}
    return [(i * step, min(count, (i + 1) * step)) for i in mine if i not in covered]
