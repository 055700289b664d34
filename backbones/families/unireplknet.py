"""UniRepLKNet: large depthwise kernels helped by dilated ones, squeeze and excitation, GRN.

Source: "UniRepLKNet: A Universal Perception Large-Kernel ConvNet" (arXiv 2311.15599), section 3.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, SqueezeExcite
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.errors import ConfigError
from backbones.layers import (
    BRANCHED_CONV_LAYOUT,
    CONVNEXT_LAYOUT,
    BranchedConv,
    Chain,
    ChannelMlp,
    Head,
    bias_as_norm,
    split_merged_kernels,
    statistics_dtype,
)
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, per_stage

EPS = 1e-6

# (kernel, dilation) of the branches beside each large kernel; smaller kernels have none.
BRANCHES = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
}
SMALL_KERNELS = (3, 5)


class Block(nn.Module):
    """``x + gamma * norm_out(mlp(se(norm(conv_dw(x)))))``, the norms batch norms (section 3.1)."""

    def __init__(self, dim: int, conv_dw: nn.Module, ls_init_value: float, drop_path: float):
        super().__init__()
        self.conv_dw = conv_dw
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, rd_channels=dim // 4)
        self.mlp = ChannelMlp(dim, 4 * dim, use_conv=True, use_grn=True, out_bias=False)
        self.norm_out: nn.Module = nn.BatchNorm2d(dim)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((dim,), ls_init_value))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_out(self.mlp(self.se(self.norm(self.conv_dw(x)))))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        if isinstance(self.conv_dw, BranchedConv):
            self.conv_dw = self.conv_dw.merged()
        self.norm = merge.norm_into_previous(self.conv_dw, self.norm)
        self.norm_out = merge.norm_into_previous(self.mlp.fc2, self.norm_out)
        self.mlp.reparameterize()
        merge.scale_into_previous(self.mlp.fc2, self.gamma)
        self.gamma = None


class CenteringChain(Chain):
    """A chain that also takes over the mean of layer norms after convolutions.

    It pays where what follows wants channels first: the layer norm leaves channels last.
    """

    def reparameterize(self) -> None:
        """Fold norms, and center the outputs of convolutions in front of a layer norm."""
        super().reparameterize()
        for (_, before), (name, norm) in pairwise(list(self.named_children())):
            if type(before) is nn.Conv2d and isinstance(norm, LayerNorm2d):
                merge.center_outputs(before)
                setattr(self, name, CenteredNorm2d(norm))


class CenteredNorm2d(nn.Module):
    """Layer norm over the channels of feature maps (B, C, H, W) whose mean over channels is zero.

    It takes over the parameters of the layer norm `norm`.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return to_unit_variance(x, self.mean, self.eps, self.weight, self.bias)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over channels, (B, 1, H, W)."""
        return x.mean(1, keepdim=True)


def to_unit_variance(
    x: Tensor,
    mean: Callable[[Tensor], Tensor],
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Scale feature maps (B, C, H, W) whose `mean` is zero to variance 1, then each channel."""
    variance = mean(x.to(statistics_dtype(x)).square())
    return scaled(x * (variance + eps).rsqrt().to(x.dtype), weight, bias)


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply each channel of feature maps (B, C, H, W) by its weight and add its bias."""
    if weight is not None:
        x = x * weight.view(1, -1, 1, 1)
    return x if bias is None else x + bias.view(1, -1, 1, 1)


class UniRepLKNet(StagedBackbone):
    """UniRepLKNet; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        kernel_sizes: depthwise kernel: 3, 5 or a large one of 7 to 17; a list inside the list is
            repeated over the stage's blocks.
        ls_init_value: initial layer scale.

    Raises:
        ConfigError: a kernel of another size, or a stage without any.
    """

    layouts = {
        "authors": (
            *CONVNEXT_LAYOUT,
            (r"\.dwconv\.", ".conv_dw."),
            *BRANCHED_CONV_LAYOUT,
            (r"\.se\.down\.", ".se.fc1."),
            (r"\.se\.up\.", ".se.fc2."),
            (r"\.pwconv1\.1\.", ".mlp.fc1."),
            (r"\.act\.1\.gamma$", ".mlp.grn.weight"),
            (r"\.act\.1\.beta$", ".mlp.grn.bias"),
            (r"\.pwconv2\.0\.", ".mlp.fc2."),
            (r"\.pwconv2\.2\.", ".norm_out."),
        )
    }

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        kernel_sizes: PerStage[int] = (3, 13, 13, 13),
        ls_init_value: float = 1e-6,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        sizes = per_stage(kernel_sizes, len(dims), "kernel_sizes")
        self.kernel_sizes = [[size] if isinstance(size, int) else list(size) for size in sizes]
        if not all(self.kernel_sizes):
            raise ConfigError(f"kernel_sizes: a stage has none in {sizes}")
        self.ls_init_value = ls_init_value
        self.assemble()

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return CenteringChain(
            nn.Conv2d(self.in_chans, dim // 2, 3, stride=2, padding=1),
            LayerNorm2d(dim // 2, eps=EPS),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            LayerNorm2d(dim, eps=EPS),
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        if plan.index == 0:
            return None
        return CenteringChain(
            nn.Conv2d(plan.in_dim, plan.dim, 3, stride=2, padding=1),
            LayerNorm2d(plan.dim, eps=EPS),
        )

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        sizes = self.kernel_sizes[plan.index]
        conv_dw = depthwise(plan.dim, sizes[index % len(sizes)])
        return Block(plan.dim, conv_dw, self.ls_init_value, drop_path)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        return Head(dim, vectors={"norm": LayerNorm(dim, eps=EPS)}, **common)

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Bring the authors' re-parameterized form into the training form."""
        split_merged_kernels(tensors, self.state_dict())
        suffix = ".mlp.fc2.bias"  # what the norm after it has become
        for key in [key for key in tensors if key.endswith(suffix)]:
            block, bias = key.removesuffix(suffix), tensors.pop(key)
            tensors.update(bias_as_norm(f"{block}.norm_out", bias))
            tensors[f"{block}.gamma"] = torch.ones_like(bias)
            tensors[f"{block}.mlp.grn.bias"] = torch.zeros_like(tensors[f"{block}.mlp.fc1.bias"])
            small = tensors.pop(f"{block}.conv_dw.bias", torch.zeros_like(bias))
            tensors.update(bias_as_norm(f"{block}.norm", small))
        return tensors


def depthwise(dim: int, kernel_size: int) -> nn.Module:
    """Return the depthwise convolution of a kernel size: a plain one or one with branches."""
    if kernel_size in BRANCHES:
        return BranchedConv(dim, kernel_size, BRANCHES[kernel_size])
    if kernel_size in SMALL_KERNELS:
        return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
    raise ConfigError(
        f"kernel_sizes: no kernel of {kernel_size}; possible: {sorted((*SMALL_KERNELS, *BRANCHES))}"
    )
