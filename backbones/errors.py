"""Exceptions of the package.

Every error derives from :class:`BackbonesError` and from the builtin that fits, so that callers may
catch either. None of them derives from ``TypeError``: timm's loader retries on that type and would
hide the message.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BackbonesError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EquivalenceError",
    "ExportError",
    "InputSizeError",
    "MissingDependencyError",
    "UnknownModelError",
    "UnsafeCheckpointError",
    "UnsupportedError",
    "WeightsUnavailableError",
    "first_line",
    "nearest",
]


class BackbonesError(Exception):
    """Base class of all errors raised by this package."""


class ConfigError(BackbonesError, ValueError):
    """A YAML file or a model argument is wrong; the message names file, line and key."""


class DataError(BackbonesError, ValueError):
    """Images or image folders that cannot be used; the message names them."""


class UnknownModelError(BackbonesError, KeyError):
    """A model, tag, alias or family that is not registered."""

    # KeyError shows repr(message); people should read the message itself.
    __str__ = Exception.__str__


class CheckpointError(BackbonesError, RuntimeError):
    """A checkpoint cannot be read, or does not fit the model. The model is left unchanged."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint asks to run code when it is read; it was refused and nothing was run."""


class WeightsUnavailableError(BackbonesError, FileNotFoundError):
    """The weights asked for cannot be had from here: never released, web page only, or offline."""

    __str__ = Exception.__str__


class InputSizeError(BackbonesError, ValueError):
    """An input is smaller than the model's total stride or has the wrong number of channels."""


class UnsupportedError(BackbonesError, NotImplementedError):
    """A combination that this model or format cannot do."""


class EquivalenceError(BackbonesError, RuntimeError):
    """A re-parameterized model does not compute what the model computes; it was discarded."""


class ExportError(BackbonesError, RuntimeError):
    """An exported file could not be made or does not compute what the model computes."""


class MissingDependencyError(BackbonesError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


def nearest(word: str, choices: Iterable[str], count: int = 1) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of `choices`, or an empty string."""
    close = difflib.get_close_matches(str(word), dict.fromkeys(choices), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
