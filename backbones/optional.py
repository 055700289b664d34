"""Packages that only some features need."""

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from backbones.errors import MissingDependencyError
from backbones.files import new_file

__all__ = ["new_figure", "optional_import", "quiet_nncf"]


def optional_import(name: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        MissingDependencyError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is needed for this and cannot be imported ({error});"
            f' pip install ".[{extra}]" in the source tree brings it'
        ) from error


@contextmanager
def new_figure(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Any]:
    """Give a matplotlib figure, of inches, to draw on; it is at `path` when the block ends."""
    # Made without pyplot it needs no display, and leaves pyplot's state alone.
    make = optional_import("matplotlib.figure", "plot").Figure
    figure = make(figsize=(width, height), layout="constrained")
    yield figure
    with new_file(path) as file:
        figure.savefig(file, dpi=110, format=file.suffix[1:] or "png")


@contextmanager
def quiet_nncf() -> Iterator[Any]:
    """Give NNCF, which in the block logs errors alone, and draws its progress on stderr."""
    nncf = optional_import("nncf", "openvino")
    # Its own `set_log_level` changes the handlers of the whole program.
    logger = logging.getLogger("nncf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield nncf
    finally:
        logger.setLevel(before)
