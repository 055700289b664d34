"""Modules one after the other that fold the norms between them."""

from collections import OrderedDict

import torch
from timm.layers import create_conv2d
from torch import Tensor, nn

from backbones import merge

__all__ = ["Chain", "bias_as_norm", "conv_norm", "norm_conv_downsample"]


class Chain(nn.Sequential):
    """An ``nn.Sequential`` that can be re-parameterized; names and keys are those of the parent."""

    conv: nn.Conv2d  # where the chain has a part of this name

    def reparameterize(self) -> None:
        """Fold norms into the linear layers beside them; see :func:`backbones.merge.fold_chain`."""
        merge.fold_chain(self)


def conv_norm(
    in_dim: int,
    dim: int,
    kernel_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding: int | None = None,
    eps: float = 1e-5,
    act: nn.Module | None = None,
) -> Chain:
    """Return a convolution without bias and its batch norm, as `conv`, `norm` and, if given, `act`.

    The default padding keeps the size at stride 1 for odd kernels.
    """
    if padding is None:
        padding = dilation * (kernel_size - 1) // 2
    conv = nn.Conv2d(
        in_dim, dim, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False
    )
    parts: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", nn.BatchNorm2d(dim, eps=eps))]
    if act is not None:
        parts.append(("act", act))
    return Chain(OrderedDict(parts))


def norm_conv_downsample(
    norm: nn.Module, in_dim: int, dim: int, *, stride: int = 2, first_dilation: int = 1
) -> Chain:
    """Return `norm` followed by an unpadded 2x2 convolution of stride 2, with bias.

    So do the models of the ConvNeXt line go from stage to stage. Where a stride is traded for
    dilation (``stride=1``) the convolution keeps the size instead.
    """
    padding = 0 if stride > 1 else "same"
    conv = create_conv2d(
        in_dim, dim, 2, stride=stride, dilation=first_dilation, padding=padding, bias=True
    )
    return Chain(norm, conv)


def bias_as_norm(prefix: str, bias: Tensor, eps: float = 1e-5) -> dict[str, Tensor]:
    """Return the entries of a batch norm `prefix` that only adds a bias.

    With them, a checkpoint whose norm has been merged into the convolution before it loads into
    the training form.
    """
    return {
        f"{prefix}.weight": torch.ones_like(bias),
        f"{prefix}.bias": bias,
        f"{prefix}.running_mean": torch.zeros_like(bias),
        f"{prefix}.running_var": torch.full_like(bias, 1 - eps),  # eps is added to it
    }
