"""Files of rows: CSV, JSON lines, Parquet and NumPy's npz, in parts and as a whole."""

import csv
import json
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbones.errors import UnsupportedError, nearest
from backbones.inference.rows import Row
from backbones.optional import optional_import

__all__ = ["FORMATS", "RowFormat", "row_format"]


class RowFormat(ABC):
    """How rows are written. What a part holds, and a whole file, can be read by any program.

    Args:
        features: rows hold embeddings, otherwise predictions.
        top_k: predictions of a row.
        include_index: also the index of each class, where columns are few.
    """

    suffix = ""

    def __init__(self, *, features: bool, top_k: int, include_index: bool = False) -> None:
        self.features, self.top_k, self.include_index = features, top_k, include_index

    @abstractmethod
    def write(self, path: Path, rows: Sequence[Row]) -> None:
        """Write a part."""

    @abstractmethod
    def join(self, parts: Sequence[Path], path: Path) -> None:
        """Write all parts as one file, a part in memory at a time."""


class _Lines(RowFormat):
    """JSON lines: an object a row."""

    suffix = ".jsonl"

    def write(self, path: Path, rows: Sequence[Row]) -> None:
        with path.open("w", encoding="utf-8", errors="surrogateescape") as stream:
            for row in rows:
                stream.write(json.dumps(row.as_dict(), ensure_ascii=False) + "\n")

    def join(self, parts: Sequence[Path], path: Path) -> None:
        with path.open("wb") as stream:
            for part in parts:
                with part.open("rb") as one:
                    shutil.copyfileobj(one, stream)


class _Csv(RowFormat):
    """CSV: path, then class and probability of each rank, then the error, if any."""

    suffix = ".csv"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.features:
            raise UnsupportedError(
                "a CSV file has no place for embeddings; name the output .npz, .parquet or .jsonl"
            )

    def write(self, path: Path, rows: Sequence[Row]) -> None:
        kinds = ("class", *(["index"] if self.include_index else []), "probability")
        ranks = range(1, self.top_k + 1)
        names = [kind if self.top_k == 1 else f"{kind}_{i}" for i in ranks for kind in kinds]
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(["path", *names, "error"])
            for row in rows:
                cells: list[Any] = []
                for one in row.predictions:
                    index = [one.index] if self.include_index else []
                    cells += [one.name, *index, f"{one.probability:.6g}"]
                cells += [""] * (len(names) - len(cells))
                table.writerow([row.path, *cells, row.error or ""])

    def join(self, parts: Sequence[Path], path: Path) -> None:
        with path.open("wb") as stream:
            for number, part in enumerate(parts):
                with part.open("rb") as one:
                    if number:
                        one.readline()  # column names, which hold no line ends
                    shutil.copyfileobj(one, stream)


class _Parquet(RowFormat):
    """Parquet: path, lists of class, index and probability (or embedding), error."""

    suffix = ".parquet"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._arrow = optional_import("pyarrow", "parquet")
        self._parquet = optional_import("pyarrow.parquet", "parquet")

    def write(self, path: Path, rows: Sequence[Row]) -> None:
        pa = self._arrow
        if self.features:
            values = [None if row.embedding is None else row.embedding for row in rows]
            columns = {"embedding": pa.array(values, pa.list_(pa.float32()))}
        else:
            kinds = {
                "class": ("name", pa.string()),
                "index": ("index", pa.int32()),
                "probability": ("probability", pa.float32()),
            }
            columns = {
                column: pa.array(
                    [[getattr(one, field) for one in row.predictions] for row in rows],
                    pa.list_(kind),
                )
                for column, (field, kind) in kinds.items()
            }
        paths = pa.array([row.path for row in rows], pa.string())
        errors = pa.array([row.error for row in rows], pa.string())
        self._parquet.write_table(pa.table({"path": paths, **columns, "error": errors}), path)

    def join(self, parts: Sequence[Path], path: Path) -> None:
        schema = self._parquet.read_schema(parts[0])
        with self._parquet.ParquetWriter(path, schema) as writer:
            for part in parts:
                writer.write_table(self._parquet.read_table(part))


class _Npz(RowFormat):
    """npz: ``paths`` (N,) with ``embeddings`` (N, C), or ``indices``, ``probabilities`` and
    ``classes`` (N, K); ``bad_paths`` and ``errors`` of images that could not be read."""

    suffix = ".npz"

    def write(self, path: Path, rows: Sequence[Row]) -> None:
        good = [row for row in rows if row.error is None]
        bad = [row for row in rows if row.error is not None]
        arrays: dict[str, np.ndarray] = {"paths": _texts([row.path for row in good])}
        if self.features:
            found = [row.embedding for row in good if row.embedding is not None]
            arrays["embeddings"] = np.stack(found) if found else np.zeros((0, 0), np.float32)
        else:
            several = [row.predictions for row in good]
            indices = [[one.index for one in each] for each in several]
            values = [[one.probability for one in each] for each in several]
            names = [[one.name for one in each] for each in several]
            arrays["indices"] = np.array(indices, np.int32).reshape(len(good), -1)
            arrays["probabilities"] = np.array(values, np.float32).reshape(len(good), -1)
            arrays["classes"] = _texts(names)
        arrays["bad_paths"] = _texts([row.path for row in bad])
        arrays["errors"] = _texts([row.error for row in bad])
        with path.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    def join(self, parts: Sequence[Path], path: Path) -> None:
        with np.load(parts[0]) as first:
            names = list(first)
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                heads = [(one.dtype, one.shape) for one in _each(parts, name) if len(one)]
                kind = max((dtype for dtype, _ in heads), key=lambda d: d.itemsize, default=None)
                shape = (sum(s[0] for _, s in heads), *(heads[0][1][1:] if heads else ()))
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    described = {
                        "descr": np.lib.format.dtype_to_descr(kind or np.dtype("<U1")),
                        "fortran_order": False,
                        "shape": shape,
                    }
                    np.lib.format.write_array_header_1_0(stream, described)
                    for one in _each(parts, name):
                        if len(one):
                            stream.write(one.astype(kind).tobytes())


def _texts(texts: Any) -> np.ndarray:
    return np.array(texts, dtype=np.str_) if texts else np.zeros(0, "<U1")


def _each(parts: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    for part in parts:
        with np.load(part) as arrays:
            yield arrays[name]


FORMATS: dict[str, type[RowFormat]] = {one.suffix: one for one in (_Csv, _Lines, _Parquet, _Npz)}


def row_format(path: Path, **options: Any) -> RowFormat:
    """Return the format that a path's suffix names; options are those of :class:`RowFormat`.

    Raises:
        UnsupportedError: no format has this suffix, or it has no place for embeddings.
        MissingDependencyError: its package is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UnsupportedError(
            f"{path}: the suffix names no kind of file{nearest(suffix, FORMATS)}; use"
            f" {', '.join(FORMATS)}"
        )
    return FORMATS[suffix](**options)
