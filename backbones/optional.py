"""Packages that only some features need."""

import importlib
import importlib.util
from typing import Any

from backbones.errors import MissingDependencyError

__all__ = ["is_installed", "optional_import"]


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


def is_installed(name: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(name) is not None
