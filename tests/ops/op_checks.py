"""What the tests of the operators share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backbones import ops


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between them and the last two axes swapped in memory."""
    wide = x.new_zeros(*x.shape[:-2], x.shape[-1] + 1, 2 * x.shape[-2])
    view = wide[..., 1:, ::2].transpose(-1, -2)
    return view.copy_(x)


def channels_last(x: Tensor) -> Tensor:
    return (
        x.to(memory_format=torch.channels_last)
        if x.ndim == 4
        else x.movedim(1, -1).contiguous().movedim(-1, 1)
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "strided": strided,
}


def value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).to(out).view(out.shape).cos()
    return [out, *torch.autograd.grad(out, leaves, weights)]


def assert_matches_reference(
    function: Callable[..., Tensor], inputs: list[Tensor], tolerance: float = 1e-12
) -> Tensor:
    """Values and gradients equal those of the reference, relative to each one's largest entry."""
    found = value_and_gradients(function, inputs)
    with ops.use_reference():
        expected = value_and_gradients(function, inputs)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)
    assert found[0].std() > 0 or found[0].numel() == 1
    return found[0]
