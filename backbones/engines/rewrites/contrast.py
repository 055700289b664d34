"""Contrasts with means, after a projection instead of before it."""

import torch
from torch import Tensor, nn

from backbones.engines.rewrites.convolutions import with_values

__all__ = ["ContrastAfter", "ContrastedProjection", "contrast_after"]

LEAST = 0.1  # of |1 + k|, by which a bias is divided


class ContrastedProjection(nn.Module):
    """``proj(x) + contrast(mean(x))``; where that is exact, a contrast of the projected map.

    It takes over the two convolutions.
    """

    def __init__(self, proj: nn.Conv2d, contrast: nn.Module) -> None:
        super().__init__()
        if not isinstance(contrast, nn.Conv2d):
            raise TypeError("the contrast is not re-parameterized")
        after = contrast_after(proj, contrast)
        self.proj: nn.Module = proj
        self.contrast: nn.Module = contrast
        if after is not None:
            self.proj, self.contrast = after

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        if isinstance(self.contrast, ContrastAfter):
            return self.contrast(y)
        return y + self.contrast(x.mean((2, 3), keepdim=True))


class ContrastAfter(nn.Module):
    """``y + gain * mean(y)``, the mean over positions and the gain (C,) of each channel."""

    gain: Tensor

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain.view(1, -1, 1, 1))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.gain * y.mean((2, 3), keepdim=True)


@torch.no_grad()
def contrast_after(proj: nn.Conv2d, contrast: nn.Conv2d) -> tuple[nn.Conv2d, ContrastAfter] | None:
    """Split ``proj(x) + contrast(mean(x))`` into a projection and what comes after it.

    With ``contrast = k proj`` for each row but for the bias b, that is ``y + k mean(y)`` of
    ``y = proj(x) - b + b / (1 + k)``: the mean of fewer channels, and no product with it. None if
    the rows are no multiples of each other, up to rounding.
    """
    rows, others = (conv.weight.flatten(1).double() for conv in (proj, contrast))
    gain = (rows * others).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
    few = 32 * torch.finfo(proj.weight.dtype).eps
    scale = others.abs().amax(1, keepdim=True)
    # A row of zeros gives NaN, for which this does not hold; near k = -1 the quotient is rough.
    fits = ((others - gain * rows).abs() <= few * scale) & ((1 + gain).abs() > LEAST)
    if not bool(fits.all()):
        return None
    gain = gain.flatten()
    bias = None if proj.bias is None else (proj.bias / (1 + gain)).to(proj.weight.dtype)
    return with_values(proj, proj.weight, bias), ContrastAfter(gain.to(proj.weight.dtype))
