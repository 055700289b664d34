"""Values computed from parameters and cached until a parameter changes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backbones.ops import is_recorded

__all__ = ["CachedTensor"]


class CachedTensor:
    """A tensor computed from parameters, cached for the next forward while none of them changes.

    What is cached belongs to the very parameters, memory and version (PyTorch's count of in-place
    changes) it was computed from, so that optimizer steps, loading, ``.to()`` and replaced
    parameters all lead to a fresh computation. Only a write through ``parameter.data`` goes
    unnoticed, as it does by autograd. Nothing is cached where gradients flow into the parameters,
    while operations are being recorded, or in copies and files of the model.
    """

    def __init__(self) -> None:
        self._cached: tuple[Tensor, list[tuple[Tensor, Tensor, int]]] | None = None

    def get(self, compute: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
        """Return ``compute(*parameters)``, from an earlier call where that is right."""
        if not _can_be_cached(parameters):
            return compute(*parameters)
        if self._cached is not None:
            tensor, sources = self._cached
            if all(_unchanged(*pair) for pair in zip(parameters, sources)):
                return tensor
        # A tensor made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            tensor = compute(*parameters)
            # The alias keeps the memory from being given to another tensor.
            self._cached = tensor, [(p, p.detach(), p._version) for p in parameters]
        return tensor

    def __getstate__(self) -> dict[str, object]:
        return {"_cached": None}


def _unchanged(parameter: Tensor, source: tuple[Tensor, Tensor, int]) -> bool:
    same, alias, version = source
    if parameter is not same or parameter._version != version:
        return False
    return parameter.data_ptr() == alias.data_ptr()


def _can_be_cached(parameters: tuple[Tensor, ...]) -> bool:
    if is_recorded():
        return False
    for parameter in parameters:
        if not isinstance(parameter, nn.Parameter) or parameter.is_meta:
            return False
        if parameter.is_inference() or (torch.is_grad_enabled() and parameter.requires_grad):
            return False
    return True
