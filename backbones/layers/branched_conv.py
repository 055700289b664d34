"""A depthwise kernel with parallel smaller ones, each under its own norm."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from backbones import merge
from backbones.layers.chain import bias_as_norm, conv_norm

__all__ = ["BRANCHED_CONV_LAYOUT", "BranchedConv", "split_merged_kernels"]

# Renames from the keys that the authors of UniRepLKNet and OverLoCK give these parts.
BRANCHED_CONV_LAYOUT = (
    (r"\.lk_origin\.", ".large.conv."),
    (r"\.origin_bn\.", ".large.norm."),
    (r"\.dil_conv_k(\d+)_(\d+)\.", r".branches.k\1_d\2.conv."),
    (r"\.dil_bn_k(\d+)_(\d+)\.", r".branches.k\1_d\2.norm."),
)


class BranchedConv(nn.Module):
    """The sum of a large depthwise convolution and smaller ones, (B, C, H, W) to the same.

    Every one has no bias and a batch norm of its own. A dilated kernel is a sparse large one, so
    all of them add up to one large kernel. Sources: UniRepLKNet (arXiv 2311.15599), section 3.1,
    for dilated branches; RepVGG (arXiv 2101.03697), section 3.3, for a 1x1 branch and the identity.

    Parts: ``large`` and ``branches.k{kernel}_d{dilation}``, each with ``conv`` and ``norm``.

    Args:
        dim: channels.
        kernel_size: the large kernel, odd.
        branches: (kernel, dilation) of each further branch; odd kernels that reach no further than
            the large one.
        identity: also add the input.

    Raises:
        ValueError: a branch that reaches further than the large kernel.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        branches: Sequence[tuple[int, int]],
        identity: bool = False,
    ) -> None:
        super().__init__()
        self.identity = identity
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
        return y + x if self.identity else y

    def merged(self) -> nn.Conv2d:
        """Return the one convolution that computes the same in evaluation mode."""
        for chain in (self.large, *self.branches.values()):
            merge.fold_chain(chain)
        conv: nn.Conv2d = self.large.get_submodule("conv")  # type: ignore[assignment]
        branches = [branch.get_submodule("conv") for branch in self.branches.values()]
        merge.branches_into_kernel(conv, branches, self.identity)  # type: ignore[arg-type]
        return conv


def split_merged_kernels(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Bring large kernels that the authors have merged into the training form, in place.

    The norm after the large kernel then only adds its bias, and the branches are zero.

    Args:
        tensors: a checkpoint under our names; merged kernels have a ``large.conv.bias``.
        own: the model's state dict, for the branches' names and shapes.
    """
    suffix = ".large.conv.bias"
    for key in [key for key in tensors if key.endswith(suffix)]:
        name, bias = key.removesuffix(suffix), tensors.pop(key)
        tensors.update(bias_as_norm(f"{name}.large.norm", bias))
        for other, value in own.items():
            if other.startswith(f"{name}.branches.") and other.endswith(".conv.weight"):
                tensors[other] = torch.zeros(value.shape, dtype=bias.dtype)
                norm = bias_as_norm(other.replace(".conv.weight", ".norm"), torch.zeros_like(bias))
                tensors.update(norm)
