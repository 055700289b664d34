"""Operations that pnnx does not know, in the words of those that it does."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Respelled"]


class Respelled(TorchFunctionMode):
    """While it is active, operations outside pnnx's vocabulary are called by others, exactly."""

    def __torch_function__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _SPELLINGS.get(operation, operation)(*args, **(kwargs or {}))


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


def _in_shape_of(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(other.shape)


def _at_least(x: Tensor, min: float) -> Tensor:
    return x.clamp(min=min)


def _unflattened(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    dim = dim % x.ndim
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _unbound(x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    return tuple(x.select(dim, place) for place in range(x.shape[dim]))


def _normalized(
    x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    if p != 2 or out is not None:
        return F.normalize(x, p, dim, eps, out)
    return x / (x * x).sum(dim, keepdim=True).sqrt().clamp(min=eps)


def _product(x: Any, other: Any, **options: Any) -> Tensor:
    """Return a square where both are one: of a selected part with further uses pnnx crashes."""
    return x.square() if x is other and not options else torch.mul(x, other, **options)


def _equal(x: Tensor, other: Tensor) -> Tensor:
    """Return 1 where values are equal and 0 elsewhere: ncnn knows no truth values."""
    return 1 - (x - other).abs().clamp(max=1).ceil()


def _chosen(condition: Tensor, yes: Any, no: Any) -> Tensor:
    """Return values by a condition of `_equal`; both must be finite."""
    return condition * yes + (1 - condition) * no


_MT: Any = torch.Tensor.mT
_SPELLINGS: Mapping[Any, Callable[..., Any]] = {
    _MT.__get__: _transposed,
    torch.Tensor.view_as: _in_shape_of,
    torch.Tensor.clamp_min: _at_least,
    torch.clamp_min: _at_least,
    torch.Tensor.unflatten: _unflattened,
    torch.unflatten: _unflattened,
    torch.Tensor.unbind: _unbound,
    torch.unbind: _unbound,
    F.normalize: _normalized,
    torch.mul: _product,
    torch.Tensor.mul: _product,
    torch.eq: _equal,
    torch.Tensor.__eq__: _equal,
    torch.where: _chosen,
}
