"""predict() and embed(): a model over a collection of images, row by row."""

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import count
from os import PathLike
from typing import Any

from torch import Tensor

from backbones.engines import Setting
from backbones.errors import ConfigError
from backbones.inference.decoding import Decoder
from backbones.inference.models import ModelLike, OpenModel, open_inference_model
from backbones.inference.options import Options
from backbones.inference.rows import Row, embedding_rows, prediction_rows
from backbones.inference.running import Meter, batches_of, run_batches
from backbones.inference.sources import Item, Source, SourceLike, open_source

__all__ = ["Run", "embed", "predict"]


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
    options = Options(
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
    )
    return Run(source, model, options).rows()


def embed(source: SourceLike, model: ModelLike, **options: Any) -> Generator[Row, None, None]:
    """Yield the embedding of each image: what goes into the classifier, (C,) in float32.

    Args:
        source, model, options: as for :func:`predict`; not an exported file, which has the
            classifier in it.

    Raises:
        UnsupportedError: a re-parameterized model or an exported file.
        BackbonesError: as for :func:`predict`.
    """
    return Run(source, model, Options(features=True, **options)).rows()


class Run:
    """A source, a model that is ready, and what is made of its outputs.

    `job` is what an earlier run, or another process, said of its own, whose setting holds.
    """

    def __init__(
        self,
        source: SourceLike,
        model: ModelLike,
        options: Options,
        job: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.options, self._given = open_source(source), options, model
        self.model = self._open(Setting(**job["setting"]) if job else None)
        self.classes = self.model.classes if options.classes is None else options.classes
        self._check_classes(self.model.num_classes)
        self.decoder = Decoder(self.model.data_config, raw=self.model.raw, reduce=options.reduce)
        self.meter = Meter()

    def _open(self, setting: Setting | None) -> OpenModel:
        count = len(self.source) if isinstance(self.source, Source) else None
        return open_inference_model(self._given, self.options, count, setting)

    @property
    def job(self) -> dict[str, Any]:
        """What rows depend on; those of the same job may stand in one file."""
        assert isinstance(self.source, Source)
        options = self.options
        return {
            "images": len(self.source),
            "names": self.source.digest(),
            "model": self.model.key(),
            "classes": _digest(self.classes),
            "features": options.features,
            "top_k": None if options.features else options.top_k,
            "input_size": list(self.decoder.size),
            "engine": options.engine,
            "precision": self.model.setting.precision,
            "batch_size": options.batch_size,
            "reduce": options.reduce,
            "full_paths": options.full_paths,
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
            self.meter,
            workers=self.options.workers,
            strict=self.options.strict,
        )
        with closing(found):
            for rows in found:
                if self.options.full_paths:
                    rows = [replace(row, path=os.path.abspath(row.path)) for row in rows]
                yield next(firsts), rows

    def rows(self) -> Generator[Row, None, None]:
        """Yield all rows."""
        with closing(self.batches()) as batches:
            for _, rows in batches:
                yield from rows

    def _check_classes(self, count: int | None) -> None:
        if self.options.features or self.classes is None:
            return
        if count not in (None, len(self.classes)):
            raise ConfigError(f"{len(self.classes)} names of classes, and the model has {count}")

    def _fields(self, outputs: Tensor) -> list[dict[str, Any]]:
        if outputs.ndim != 2:
            raise ConfigError(
                f"the model gives outputs of shape {tuple(outputs.shape)}; (B, classes) is needed"
            )
        if self.options.features:
            return [{"embedding": one} for one in embedding_rows(outputs)]
        self._check_classes(outputs.shape[1])
        top_k = self.options.top_k
        return [{"predictions": p} for p in prediction_rows(outputs, top_k, self.classes)]


def _digest(names: Sequence[str] | None) -> str | None:
    return None if names is None else hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
