"""SpaRTAN's spatial mixer: the contrast after the projection, and one squeeze and excitation."""

import copy

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from backbones.engines.rewrites.convolutions import with_values
from backbones.families.spartan import SpatialMixer

__all__ = ["ContrastAfter", "JoinedMixer", "contrast_after", "side_by_side"]

LEAST = 0.1  # of |1 + k|, by which a bias is divided


class JoinedMixer(nn.Module):
    """A re-parameterized spatial mixer with one squeeze and excitation for both branches.

    Where that is exact, its contrast is taken from the projected map instead of the input. It takes
    over the parts of `mixer`.
    """

    def __init__(self, mixer: SpatialMixer) -> None:
        super().__init__()
        if not isinstance(mixer.contrast, nn.Conv2d):
            raise TypeError("the spatial mixer is not re-parameterized")
        self.proj_in = mixer.proj_in
        self.contrast: nn.Module = mixer.contrast
        if after := contrast_after(mixer.proj_in, mixer.contrast):
            self.proj_in, self.contrast = after
        self.conv_h, self.conv_l = mixer.conv_h, mixer.conv_l
        self.se = side_by_side(mixer.se_h, mixer.se_l)
        self.proj_out = mixer.proj_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj_in(x)
        if isinstance(self.contrast, ContrastAfter):
            y = self.contrast(y)
        else:
            y = y + self.contrast(x.mean((2, 3), keepdim=True))
        return self.proj_out(self.se(torch.cat((self.conv_h(y), self.conv_l(y)), dim=1)))


class ContrastAfter(nn.Module):
    """``y + gain * mean(y)``, the mean over positions.

    Args:
        gain: of each channel, (C,).
    """

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
    ``y = proj(x) - b + b / (1 + k)``: the mean of fewer channels, and no product with it.

    Returns:
        The two parts; None if the rows are no multiples of each other, up to rounding.
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


def side_by_side(first: SqueezeExcite, second: SqueezeExcite) -> SqueezeExcite:
    """Return the one that does to two maps, one after the other in the channels, what two do."""
    twin = copy.deepcopy(first)
    twin.fc1 = _block_diagonal(first.fc1, second.fc1)
    twin.fc2 = _block_diagonal(first.fc2, second.fc2)
    return twin


def _block_diagonal(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Return the dense 1x1 convolution that applies one to each part of the channels."""
    weight = torch.block_diag(first.weight.flatten(1), second.weight.flatten(1))
    bias = torch.cat((_bias_of(first), _bias_of(second)))
    return with_values(first, weight[..., None, None], bias)


def _bias_of(conv: nn.Conv2d) -> Tensor:
    """Return a convolution's bias, zeros where it has none."""
    return conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias
