"""Core ML's own package of tools, without what it says beside its answers."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from backbones.optional import optional_import

__all__ = ["quiet_tools"]

# The first says that parts for macOS are missing and which versions it has not been tested with,
# the second is of a package that it imports.
_TALKERS = ("coremltools", "torch.utils._pytree")


@contextmanager
def quiet_tools() -> Iterator[Any]:
    """Give ``coremltools``; in the block it prints no warnings and no progress.

    Raises:
        MissingDependencyError: it is not installed.
    """
    with ExitStack() as stack:
        for name in _TALKERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield optional_import("coremltools", "coreml")
