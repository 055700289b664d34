"""predict() and embed(): a model over a collection of images; save_predictions(): into a file."""

import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import count
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from backbones.engines import Setting
from backbones.errors import ConfigError, DataError
from backbones.inference.decoding import Decoder
from backbones.inference.formats import row_format
from backbones.inference.journal import Journal, partial_of
from backbones.inference.models import ModelLike, OpenModel, open_inference_model
from backbones.inference.rows import Row, embedding_rows, prediction_rows
from backbones.inference.running import Meter, batches_of, run_batches
from backbones.inference.sources import Item, Source, SourceLike, open_source

__all__ = ["Summary", "embed", "predict", "save_predictions", "share_of"]


def predict(
    source: SourceLike,
    model: ModelLike,
    *,
    batch_size: int | None = None,
    top_k: int = 5,
    engine: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    workers: int | None = None,
    input_size: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    calibration: Any = None,
    reduce: bool = False,
    strict: bool = False,
    full_paths: bool = False,
    cache_dir: str | PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Generator[Row, None, None]:
    """Yield the likeliest classes of each image of a collection, in its order.

    Each image is decoded once. Below 2,000 images the model runs as it is, or in the engine that
    is named; for more, the fastest engine, batch size, streams and threads are found by a short
    measurement, which is remembered. However many images there are, only a few batches are in
    memory.

    Args:
        source: an image, folder, tar archive, list or pattern, images in memory, or an iterable of
            these; see `backbones.inference.open_source`.
        model: a name, whose released weights are taken; a checkpoint; an exported file; a module;
            or a runner.
        batch_size: images of a call; None for the best.
        top_k: classes of a row.
        engine: ``auto``, or one of those of `deploy`.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        threads: for all the work together; None for PyTorch's number.
        workers: threads that decode and wait for the engine; None for as many as `threads`.
        input_size: ([channels,] height, width); None for the model's.
        classes: names of the classes; None for those that the model knows.
        calibration: images for int8, as for `deploy`.
        reduce: decode large JPEGs at a half, a quarter or an eighth of their size, where that is
            still 1.5 times the size that they are resized to; faster, and nearly the same.
        strict: an image that cannot be read is an error instead of a row with `error`.
        full_paths: absolute paths.
        cache_dir: where engine files are kept, as for `deploy`.
        progress: takes a line before each step of the preparation.

    Raises:
        DataError: nothing found, or with `strict` an image that cannot be read.
        ConfigError: class names of another number, or arguments that do not fit the model.
        BackbonesError: the model cannot be had or does not run.
    """
    return _Run(
        source,
        model,
        features=False,
        top_k=top_k,
        batch_size=batch_size,
        engine=engine,
        precision=precision,
        threads=threads,
        workers=workers,
        input_size=input_size,
        classes=classes,
        calibration=calibration,
        reduce=reduce,
        strict=strict,
        full_paths=full_paths,
        cache_dir=cache_dir,
        progress=progress,
    ).rows()


def embed(source: SourceLike, model: ModelLike, **options: Any) -> Generator[Row, None, None]:
    """Yield the embedding of each image: what goes into the classifier, (C,) in float32.

    Args:
        source, model, options: as for :func:`predict`; not an exported file, which has the
            classifier in it.

    Raises:
        UnsupportedError: a re-parameterized model or an exported file.
        BackbonesError: as for :func:`predict`.
    """
    return _Run(source, model, features=True, **options).rows()


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
    run = _Run(
        source,
        model,
        features=features,
        top_k=top_k,
        job=journal.job,
        **options,
    )
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


class _Run:
    """A source, a model that is ready, and what is made of its outputs."""

    def __init__(
        self,
        source: SourceLike,
        model: ModelLike,
        *,
        features: bool,
        top_k: int = 5,
        batch_size: int | None = None,
        engine: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        workers: int | None = None,
        input_size: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        calibration: Any = None,
        reduce: bool = False,
        strict: bool = False,
        full_paths: bool = False,
        cache_dir: str | PathLike[str] | None = None,
        progress: Callable[[str], None] | None = None,
        job: Mapping[str, Any] | None = None,
    ) -> None:
        numbers = {"batch_size": batch_size, "top_k": top_k, "threads": threads, "workers": workers}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.source = open_source(source)
        self.features, self.top_k, self.workers, self.strict = features, top_k, workers, strict
        self.reduce, self.full_paths, self._asked = reduce, full_paths, (engine, batch_size)

        def open_model(setting: Setting | None) -> OpenModel:
            return open_inference_model(
                model,
                features=features,
                count=len(self.source) if isinstance(self.source, Source) else None,
                engine=engine,
                precision=precision,
                threads=threads,
                batch_size=batch_size,
                input_size=input_size,
                calibration=calibration,
                cache_dir=cache_dir,
                setting=setting,
                progress=progress,
            )

        self._open = open_model
        self.model = open_model(Setting(**job["setting"]) if job else None)
        self.classes = self.model.classes if classes is None else classes
        self._check_classes(self.model.num_classes)
        self.decoder = Decoder(self.model.data_config, raw=self.model.raw, reduce=reduce)
        self.meter = Meter()

    @property
    def job(self) -> dict[str, Any]:
        """What rows depend on; those of the same job may stand in one file."""
        assert isinstance(self.source, Source)
        engine, batch_size = self._asked
        return {
            "images": len(self.source),
            "names": self.source.digest(),
            "model": self.model.key(),
            "classes": _digest(self.classes),
            "features": self.features,
            "top_k": None if self.features else self.top_k,
            "input_size": list(self.decoder.size),
            "engine": engine,
            "precision": self.model.setting.precision,
            "batch_size": batch_size,
            "reduce": self.reduce,
            "full_paths": self.full_paths,
            "setting": asdict(self.model.setting),
        }

    def adopt(self, job: Mapping[str, Any]) -> None:
        """Run as another process of the same job does."""
        setting = Setting(**job["setting"])
        if setting != self.model.setting:
            self.model = self._open(setting)

    def batches(
        self, spans: Sequence[tuple[int, int]] | None = None
    ) -> Generator[tuple[int, list[Row]], None, None]:
        """Yield the number of the first row and the rows of each batch, of all without `spans`."""
        step = self.model.setting.batch_size
        source: Any = self.source
        items: Iterable[Sequence[Item]] = batches_of(source, step)
        firsts: Iterator[int] = count(0, step)
        if spans is not None:
            items, firsts = (source[a:b] for a, b in spans), (a for a, _ in spans)
        found = run_batches(
            items,
            self.model,
            self.decoder,
            self._fields,
            workers=self.workers,
            strict=self.strict,
            meter=self.meter,
        )
        with closing(found):
            for rows in found:
                if self.full_paths:
                    rows = [replace(row, path=os.path.abspath(row.path)) for row in rows]
                yield next(firsts), rows

    def rows(self) -> Generator[Row, None, None]:
        """Yield all rows."""
        with closing(self.batches()) as batches:
            for _, rows in batches:
                yield from rows

    def _check_classes(self, count: int | None) -> None:
        if (
            not self.features
            and self.classes is not None
            and count not in (None, len(self.classes))
        ):
            raise ConfigError(f"{len(self.classes)} names of classes, and the model has {count}")

    def _fields(self, outputs: Tensor) -> list[dict[str, Any]]:
        if outputs.ndim != 2:
            raise ConfigError(
                f"the model gives outputs of shape {tuple(outputs.shape)}; (B, classes) is needed"
            )
        if self.features:
            return [{"embedding": one} for one in embedding_rows(outputs)]
        self._check_classes(outputs.shape[1])
        return [{"predictions": p} for p in prediction_rows(outputs, self.top_k, self.classes)]


def _left(
    done: Sequence[tuple[int, int]], count: int, step: int, rank: int, size: int
) -> list[tuple[int, int]]:
    """Return first and end of the batches that are this process's and in no part yet."""
    batches = -(-count // step)
    mine = range(rank * batches // size, (rank + 1) * batches // size)
    covered = {i for first, end in done for i in range(first // step, -(-end // step))}
    return [(i * step, min(count, (i + 1) * step)) for i in mine if i not in covered]


def _digest(names: Sequence[str] | None) -> str | None:
    return None if names is None else hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
