"""The one way to write: files and folders appear whole, or not at all.

What is written goes to a hidden folder on the same disk first, is flushed, and is then moved to its
place. If anything fails, what was there before is there again and nothing else is left behind.
"""

import csv
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["new_bundle", "new_file", "new_folder", "write_csv", "write_json", "write_text"]


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path to write a file to; it appears at `path` when the block ends without error.

    Files written beside it (OpenVINO's ``.bin``, ONNX's ``.data``) come along and are moved first,
    so that the file never stands without what it needs.

    Args:
        path: its place, in a folder that exists; an old file is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file", str(path))
    with _hidden_folder(path.parent) as folder:
        file = folder / path.name
        yield file
        companions = sorted(one for one in folder.iterdir() if one.is_file() and one != file)
        _move([*companions, file], path.parent)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a folder to write files to; they appear in `path` when the block ends without error.

    Args:
        path: a new folder, which appears as a whole, or one that exists, whose files of the same
            names are replaced. Its parent must exist.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    exists = path.is_dir()
    with _hidden_folder(path if exists else path.parent) as folder:
        yield folder
        if exists:
            _move(sorted(one for one in folder.iterdir() if one.is_file()), path)
        else:
            for one in folder.iterdir():
                _flush(one)
            folder.rename(path)
            _flush(path.parent)


@contextmanager
def new_bundle(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path to write a folder to that stands for one file (``.mlpackage``).

    It appears at `path`, as a whole, when the block ends without error.

    Args:
        path: its place, in a folder that exists; an old bundle is replaced with all that it holds.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file; name a folder", str(path))
    with _hidden_folder(path.parent) as folder:
        bundle, before = folder / path.name, folder / f"{path.name}.before"
        yield bundle
        for one in (bundle, *bundle.rglob("*")):
            _flush(one)
        if path.exists():
            path.rename(before)  # no system moves a folder over a full one
        try:
            bundle.rename(path)
        except BaseException:
            if before.exists():
                before.rename(path)
            raise
        _flush(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file in UTF-8 and return its path."""
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write a value as indented JSON and return the file's path."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: str | os.PathLike[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write rows of cells as CSV, the heads first, and return the file's path."""
    with new_file(path) as file, file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)
    return Path(path)


@contextmanager
def _hidden_folder(parent: Path) -> Iterator[Path]:
    if not parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(parent))
    folder = parent / f".{secrets.token_hex(8)}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(files: list[Path], target: Path) -> None:
    """Move files of one folder to another on the same disk, all of them or none."""
    for file in files:
        _flush(file)
    before = files[0].parent / "before"
    before.mkdir()
    moved: list[Path] = []
    try:
        for file in files:
            place = target / file.name
            moved.append(place)
            if place.is_file():
                os.replace(place, before / place.name)
            os.replace(file, place)
    except BaseException:
        for place in reversed(moved):
            if (before / place.name).exists():
                os.replace(before / place.name, place)
            elif not (files[0].parent / place.name).exists():
                place.unlink(missing_ok=True)
        raise
    _flush(target)


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, from the system's memory to the disk."""
    if path.is_dir():
        with suppress(OSError):  # folders can be flushed on POSIX systems only
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
