"""A convolution without bias and the batch norm after it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from backbones.layers.chain import Chain

__all__ = ["bias_as_norm", "conv_norm"]


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
    """Return `conv` (no bias), `norm` and, where given, `act`, under these names.

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
