"""Building a model from nothing but its checkpoint."""

from __future__ import annotations

from os import PathLike
from typing import Any

from backbones.errors import CheckpointError
from backbones.weights.prefixes import prefixes, strip
from backbones.weights.reading import read_checkpoint

__all__ = ["inferred_arguments"]


def inferred_arguments(source: str | PathLike[str], model_class: Any) -> dict[str, Any]:
    """Return the constructor arguments that follow from a checkpoint's names and shapes.

    Args:
        source: a file in any wrapper and with any prefix.
        model_class: the `StagedBackbone` whose `arguments_from_checkpoint` reads them.

    Raises:
        CheckpointError: the file cannot be read, is of another family, or the family's arguments
            do not follow from shapes.
    """
    tensors = read_checkpoint(source).tensors
    for prefix in prefixes(tensors):
        stripped, _ = strip(tensors, prefix)
        arguments = model_class.arguments_from_checkpoint(stripped or {})
        if arguments is not None:
            return arguments
    raise CheckpointError(
        f"{source}: {model_class.__name__} cannot tell its arguments from this file; name the"
        " variant that the file was made for"
    )
