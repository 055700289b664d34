"""Putting finished files in place: all of them or none."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["put_in_place"]


def put_in_place(file: Path, path: Path) -> int:
    """Move a finished file, and those that were written beside it, to where they belong.

    The file goes last, so that it never stands without what it needs; if something fails, what was
    there before is there again.

    Args:
        file: the file, alone with its companions in a folder on the same disk as `path`.
        path: its place; a companion named after the file is named after the place.

    Returns:
        Bytes of all files.

    Raises:
        OSError: a file cannot be moved.
    """
    pairs = []
    for source in sorted(file.parent.iterdir(), key=lambda one: (one == file, one.name)):
        if source.is_dir():
            continue
        pairs.append((source, path.with_name(source.name)))
    size = sum(source.stat().st_size for source, _ in pairs)
    kept = file.parent / "before"
    kept.mkdir()
    undo: list[tuple[Path, Path]] = []
    try:
        for source, place in pairs:
            if place.exists():
                os.replace(place, kept / place.name)
                undo.append((kept / place.name, place))
            else:
                undo.append((source, place))
            os.replace(source, place)
    except BaseException:
        for before, place in reversed(undo):
            if before.parent == kept:
                os.replace(before, place)
            else:
                place.unlink(missing_ok=True)
        raise
    return size
