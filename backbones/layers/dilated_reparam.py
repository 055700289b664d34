"""A large depthwise kernel with parallel dilated ones, each under its own norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from backbones.layers.conv_norm import conv_norm

__all__ = ["DILATED_REPARAM_LAYOUT", "DilatedReparamConv"]

# Renames from the keys that the authors of UniRepLKNet and OverLoCK give these parts.
DILATED_REPARAM_LAYOUT = (
    (r"\.lk_origin\.", ".large.conv."),
    (r"\.origin_bn\.", ".large.norm."),
    (r"\.dil_conv_k(\d+)_(\d+)\.", r".branches.k\1_d\2.conv."),
    (r"\.dil_bn_k(\d+)_(\d+)\.", r".branches.k\1_d\2.norm."),
)


class DilatedReparamConv(nn.Module):
    """The sum of a large depthwise convolution and smaller dilated ones, (B, C, H, W) to the same.

    Every one has no bias and a batch norm of its own; a dilated kernel is a sparse large one, so
    all of them add up to one large kernel. Source: UniRepLKNet (arXiv 2311.15599), section 3.1.

    Parts: ``large`` and ``branches.k{kernel}_d{dilation}``, each with ``conv`` and ``norm``.

    Args:
        dim: channels.
        kernel_size: the large kernel, odd.
        branches: (kernel, dilation) of each further branch; odd kernels that reach no further than
            the large one.

    Raises:
        ValueError: a branch that reaches further than the large kernel.
    """

    def __init__(self, dim: int, kernel_size: int, branches: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.large = conv_norm(dim, dim, kernel_size, groups=dim)
        self.branches = nn.ModuleDict()
        for kernel, dilation in branches:
            if dilation * (kernel - 1) + 1 > kernel_size:
                raise ValueError(
                    f"kernel {kernel} at dilation {dilation} reaches beyond {kernel_size}"
                )
            self.branches[f"k{kernel}_d{dilation}"] = conv_norm(
                dim, dim, kernel, dilation=dilation, groups=dim
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x)
        for branch in self.branches.values():
            y = y + branch(x)
        return y
