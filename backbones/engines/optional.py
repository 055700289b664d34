"""Packages that only some formats need."""

from __future__ import annotations

import importlib
from typing import Any

from backbones.errors import MissingDependencyError

__all__ = ["optional_import"]


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
            f' pip install "backbones[{extra}]"'
        ) from error
