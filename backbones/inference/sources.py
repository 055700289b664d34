"""Where images come from: files, folders, patterns, lists, archives, and images in memory."""

import csv
import glob
import hashlib
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, Union

import numpy as np
from PIL import Image

from backbones.errors import DataError
from backbones.images import ImageFiles, convert_image, list_images, open_image, read_text

__all__ = ["Item", "Source", "SourceLike", "open_source"]

SourceLike = Union[str, Path, ImageFiles, Image.Image, np.ndarray, Iterable[Any]]
_LISTS = (".txt", ".csv", ".tsv", ".lst")
_COLUMNS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class _Group(Protocol):
    """Images of one kind, by number."""

    def __len__(self) -> int: ...
    def name(self, i: int) -> str: ...
    def folder(self, i: int) -> str | None: ...
    def relative(self, i: int) -> str: ...
    def open(self, i: int, mode: str, **options: Any) -> Image.Image: ...


@dataclass(frozen=True)
class Item:
    """One image, not yet decoded: its name, and the class folder that it lies in, if any."""

    group: _Group
    number: int

    @property
    def name(self) -> str:
        """Its path, or its number for an image in memory."""
        return self.group.name(self.number)

    @property
    def folder(self) -> str | None:
        """The uppermost folder below the source."""
        return self.group.folder(self.number)

    @property
    def relative(self) -> str:
        """Its path below the source, with forward slashes."""
        return self.group.relative(self.number)

    def open(self, mode: str, **options: Any) -> Image.Image:
        """Decode it; arguments are those of `backbones.images.open_image`."""
        return self.group.open(self.number, mode, **options)


class Source(Sequence[Item]):
    """Images in a fixed order.

    `left_out` has lines on files that are no images.
    """

    def __init__(self, groups: Sequence[_Group], left_out: Sequence[str] = ()) -> None:
        self.groups = groups
        self.left_out = list(left_out)
        self._ends = list(accumulate(len(group) for group in groups))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        at = bisect_right(self._ends, i)
        return Item(self.groups[at], i - (self._ends[at - 1] if at else 0))

    def digest(self) -> str:
        """Return a digest of the names, in order."""
        digest = hashlib.sha256()
        for item in self:
            digest.update(item.name.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()[:32]


def open_source(source: SourceLike) -> Source | Iterator[Item]:
    """Find the images that are meant.

    Args:
        source: path of an image, folder (any depth), uncompressed tar archive, or list (``.txt``:
            a path a line; ``.csv``, ``.tsv``: a column of a usual name such as ``path``, else the
            first); ``-`` for a list on the standard input; a pattern (``photos/*/*.jpg``,
            ``shards-{000..009}.tar``); what `list_images` found; an image, or uint8 array (H, W) or
            (H, W, C); or an iterable of any of these. Paths in a list are those of the working
            directory, or of the list's folder where there are none.

    Returns:
        A sequence; or, for an iterable without a length, an iterator, which takes images and paths
        of images.

    Raises:
        DataError: no such file, nothing found, or a list or archive that cannot be read.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, str | Path | Image.Image | np.ndarray | ImageFiles):
        source = [source]
    if isinstance(source, Sequence):
        found = _groups(source)
        if not len(found):
            where = ", ".join(str(part) for part in source) or "the source"
            raise DataError("; ".join([f"{where}: no images in it", *found.left_out]))
        return found
    if hasattr(source, "shape"):
        raise DataError(
            f"a {type(source).__name__} is no image; give uint8 arrays (H, W, C) or PIL images, or"
            " call the model itself on normalized tensors"
        )
    return (_single(i, one) for i, one in enumerate(source))


def _groups(parts: Iterable[Any]) -> Source:
    groups: list[_Group] = []
    left_out: list[str] = []
    missing: list[str] = []
    for part in parts:
        try:
            if isinstance(part, Source):
                new, lines = list(part.groups), part.left_out
            elif isinstance(part, ImageFiles):
                new, lines = [_Files(part)], part.left_out()
            elif isinstance(part, str | Path):
                new, lines = _from_path(part)
            else:
                new, lines = [_InMemory([part], sum(map(len, groups)))], []
        except DataError as error:
            missing.append(str(error))
            continue
        groups += new
        left_out += lines
    if missing:
        raise DataError("\n       ".join(missing))
    return Source(groups, left_out)


def _from_path(part: str | Path) -> tuple[list[_Group], list[str]]:
    text, path = str(part), Path(part)
    if text == "-":
        return [_listed(sys.stdin.read().splitlines(), Path(), "the standard input")], []
    if not path.exists() and any(mark in text for mark in "*?[{"):
        matches = [m for p in _expanded(text) for m in sorted(glob.glob(p, recursive=True))]
        if not matches:
            raise DataError(f"{text}: nothing has such a name")
        several = [_from_path(match) for match in matches]
        return [g for gs, _ in several for g in gs], [line for _, ls in several for line in ls]
    if path.is_dir() or path.suffix.lower() == ".tar":
        files = list_images(path)
        return [_Files(files)], files.left_out()
    if path.suffix.lower() in _LISTS:
        return [_listed(_read_list(path), path.parent, str(path))], []
    if not path.is_file():
        raise DataError(f"{text}: no such file or folder; give an image")
    return [_Paths([text])], []


def _expanded(pattern: str) -> list[str]:
    """Return the patterns that ``{000..009}`` stands for."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last = found[1], found[2]
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    start, end = pattern[: found.start()], pattern[found.end() :]
    missing = [
        start + n + end for n in numbers if "*" not in end and not _is_there(start + n + end)
    ]
    if missing:
        raise DataError(f"{missing[0]}: no such file, and {pattern} names it")
    return [one for number in numbers for one in _expanded(start + number + end)]


def _is_there(path: str) -> bool:
    return bool(_BRACES.search(path)) or Path(path).exists()


def _read_list(path: Path) -> list[str]:
    """Return the paths in a list, as they stand there."""
    text = read_text(path, "a list is a text file of paths")
    if path.suffix.lower() not in (".csv", ".tsv"):
        return text.splitlines()
    rows = list(csv.reader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((head.index(name) for name in _COLUMNS if name in head), None)
    body = rows if column is None else rows[1:]
    return [row[column or 0] for row in body if row]


def _listed(lines: Iterable[str], folder: Path, where: str) -> "_Paths":
    names = [line.strip() for line in lines if line.strip()]
    paths = [
        name if Path(name).exists() or not (folder / name).exists() else str(folder / name)
        for name in names
    ]
    if not any(Path(path).exists() for path in paths):
        first = f", such as {names[0]}" if names else ""
        raise DataError(f"{where}: none of the {len(names)} files that it names is there{first}")
    return _Paths(paths)


@dataclass(frozen=True)
class _Files:
    files: ImageFiles

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return str(self.files.place / self.files.paths[i])

    def folder(self, i: int) -> str | None:
        first, slash, _ = self.files.paths[i].partition("/")
        return first if slash else None

    def relative(self, i: int) -> str:
        return self.files.paths[i]

    def open(self, i: int, mode: str, **options: Any) -> Image.Image:
        return self.files.open(self.files.paths[i], mode, **options)


@dataclass(frozen=True)
class _Paths:
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.paths[i]

    def folder(self, i: int) -> str | None:
        return Path(self.paths[i]).parent.name or None

    def relative(self, i: int) -> str:
        path = Path(self.paths[i])
        return "/".join([*([path.parent.name] if path.parent.name else []), path.name])

    def open(self, i: int, mode: str, **options: Any) -> Image.Image:
        return open_image(self.paths[i], mode, **options)


@dataclass(frozen=True)
class _InMemory:
    images: Sequence[Any]
    first: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return str(self.first + i)

    def folder(self, i: int) -> str | None:
        return None

    def relative(self, i: int) -> str:
        return self.name(i)

    def open(self, i: int, mode: str, **options: Any) -> Image.Image:
        image = self.images[i]
        if isinstance(image, np.ndarray):
            image = _of_array(image, self.name(i))
        if not isinstance(image, Image.Image):
            raise DataError(
                f"image {self.name(i)} is a {type(image).__name__}; give paths, PIL images or uint8"
                " arrays (H, W, C)"
            )
        return convert_image(image, mode)


def _of_array(array: np.ndarray, name: str) -> Image.Image:
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    good = squeezed.ndim == 2 or (squeezed.ndim == 3 and squeezed.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not good or not array.size:
        raise DataError(
            f"image {name} is an array of {array.dtype} {array.shape}; give uint8 (H, W) or"
            " (H, W, C) with 1, 3 or 4 channels"
        )
    return Image.fromarray(np.ascontiguousarray(squeezed))


def _single(i: int, one: Any) -> Item:
    return Item(_Paths([str(one)]) if isinstance(one, str | Path) else _InMemory([one], i), 0)
