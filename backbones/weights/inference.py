"""Building a model from nothing but its checkpoint.

What a file says of its model is data from a stranger, like its tensors: a few bytes of metadata
could ask for a model of terabytes, or for one that takes forever to build.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from backbones.errors import CheckpointError
from backbones.weights.prefixes import prefixes, strip
from backbones.weights.untrusted.reading import read_checkpoint, read_metadata, read_shapes

__all__ = ["inferred_arguments", "saved_arguments"]

# A merged file holds fewer numbers than the training form of its model: parallel branches and
# norms are gone. No family merges away more than a third.
_MOST_MERGED = 4
_SLACK = 1 << 20


def saved_arguments(path: str | PathLike[str], name: str, model_class: Any) -> dict[str, Any]:
    """Return the constructor arguments in a file that `save_checkpoint` wrote for model `name`.

    Empty for files of any other origin.

    Args:
        path: a file of any format.
        name: the variant, or the family.
        model_class: the `StagedBackbone` that takes the arguments.

    Raises:
        CheckpointError: the arguments make no model that the file could hold.
    """
    try:
        ours = read_metadata(path).get("backbones") or {}
    except CheckpointError:
        return {}  # no safetensors file; whether it is a checkpoint at all is seen when it is read
    arguments = ours.get("arguments")
    if ours.get("name") != name or not arguments:
        return {}
    _require_plausible(path, model_class, arguments, read_shapes(path))
    return dict(arguments)


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
        try:
            arguments = model_class.arguments_from_checkpoint(stripped or {})
        except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{source}: its tensors have shapes of no {model_class.__name__} ({error!r})"
            ) from error
        if arguments is not None:
            shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            _require_plausible(source, model_class, arguments, shapes)
            return arguments
    raise CheckpointError(
        f"{source}: {model_class.__name__} cannot tell its arguments from this file; name the"
        " variant that the file was made for"
    )


def _require_plausible(
    path: object,
    model_class: Any,
    arguments: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Refuse arguments of a model much larger than the file, before anything is allocated."""

    def refusal(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: describes {what}; the file is damaged or forged, do not use it"
        )

    depths = arguments.get("depths")
    counts = depths if isinstance(depths, list) else [depths]
    blocks = sum(count for count in counts if isinstance(count, int))
    if blocks > len(shapes):
        raise refusal(f"a model of {blocks} blocks and holds {len(shapes)} tensors")
    placed = {key: value for key, value in arguments.items() if key not in ("device", "dtype")}
    try:
        model = model_class(**placed, device="meta")
    except Exception as error:  # a family's constructor on foreign values
        raise refusal(f"no {model_class.__name__} ({error})") from error
    needed = sum(tensor.numel() for tensor in model.state_dict().values())
    stored = sum(math.prod(shape) for shape in shapes.values())
    if needed > _MOST_MERGED * stored + _SLACK:
        raise refusal(f"a model of {needed} numbers and holds {stored}")
