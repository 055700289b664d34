"""Checking that a checkpoint's numbers are ones a model can hold."""

import torch
from torch import Tensor

from backbones.errors import CheckpointError

__all__ = ["check_values"]


def check_values(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Refuse tensors that the model's `own` of the same names cannot hold, by CheckpointError:
    of another kind of number, not finite, too large for the model's type (rounding, also to zero,
    is no error), or different where the model shares one parameter."""
    shared: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for key, tensor in tensors.items():
        mine = own[key]
        if problem := _problem(tensor, mine):
            raise CheckpointError(f"entry {key!r} holds {problem}")
        if mine.numel() and not (mine.is_meta or tensor.is_meta) and _kind(mine) != "integer":
            place = (mine.data_ptr(), mine.shape, mine.stride())
            first = shared.setdefault(place, key)
            if first != key and not torch.equal(tensor, tensors[first]):
                raise CheckpointError(
                    f"entries {first!r} and {key!r} differ, but the model shares one parameter "
                    "between them; the file is of another model"
                )


def _problem(tensor: Tensor, mine: Tensor) -> str | None:
    """Return what is wrong with a tensor that an entry is to hold."""
    damaged = "the file is damaged or of another model"
    if _kind(tensor) != _kind(mine):
        return f"{tensor.dtype}, the model needs {mine.dtype}; {damaged}"
    if tensor.is_meta:
        return None
    if _kind(tensor) == "integer":
        fits = mine.dtype == tensor.dtype or _survives(tensor, mine.dtype)
        return None if fits else f"numbers too large for {mine.dtype}; {damaged}"
    if not _is_finite(tensor):
        return (
            "values that are not finite; the training that made the file diverged, or it is"
            " damaged: take another checkpoint"
        )
    if mine.dtype != tensor.dtype and not _is_finite(tensor.to(mine.dtype)):
        return f"values too large for {mine.dtype}; load it into a float32 model"
    return None


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "integer"


def _survives(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether whole numbers are the same in another type."""
    converted = tensor.to(dtype)
    wrapped = not tensor.dtype.is_signed and converted.dtype.is_signed and (converted < 0).any()
    return torch.equal(converted.to(tensor.dtype), tensor) and not wrapped


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # no arithmetic is defined on the 8-bit types
    # The sum is ten times cheaper. It is finite only if all are, but may overflow by itself.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
