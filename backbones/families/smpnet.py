"""SMPNet: RepLKNet with depthwise kernels that are made of points, which move in training.

Sources: "SMPConv: Self-moving Point Representations for Continuous Convolution" (arXiv 2304.02330),
section 3; for all around the kernels "Scaling Up Your Kernels to 31x31" (arXiv 2203.06717), section
4.1.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.errors import ConfigError
from backbones.layers import BranchedConv, CachedTensor, Chain, Head, conv_norm, fx_leaf
from backbones.ops import at_least_float32, without_autocast
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, per_stage

SMALL_KERNEL = 5  # beside each kernel of points
RADII = (1e-3, 1.0)  # a radius that turned negative would make its point grow with the distance

AUTHORS = (
    *((rf"^transitions\.{i}\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"\.large_kernel\.smp\.conv\.weights$", ".conv_dw.large.conv.weight"),
    (r"\.weight_coord$", ".positions"),
    (r"\.large_kernel\.smp\.", ".conv_dw.large."),
    (r"\.large_kernel\.small_conv\.", f".conv_dw.branches.k{SMALL_KERNEL}_d1."),
    (r"\.mixer\.pw", ".mixer.conv"),
    (r"\.mlp\.pw", ".mlp.fc"),
    (r"\.(prelkb_|preffn_)?bn\.", ".norm."),
)


@fx_leaf
def kernel_from_points(weight: Tensor, positions: Tensor, radius: Tensor, size: int) -> Tensor:
    """Return the dense kernel of points, each the top of a tent of its own radius (section 3).

    ``kernel[c, i, j] = sum over n of weight[c, n] * relu(1 - (|x_n - x_j| + |y_n - y_i|) / r_n)``:
    the sum, as the authors' code for ImageNet has it, where the paper takes the average over the
    points in reach. A point outside of the kernel may reach into it. Differentiable in all three;
    half types are computed in float32.

    Args:
        weight: (C, n), the points' weights.
        positions: (n, 2), the points' x, to the right, and y, upwards. -1 and 1 are the centers of
            the outermost cells.
        radius: (n,), positive; L1 distance at which a tent ends.
        size: side k of the kernel, odd and more than 1.

    Returns:
        (C, 1, k, k), of `weight`'s type.
    """
    dtype = at_least_float32(weight, positions, radius)
    with without_autocast(weight):
        cells = torch.arange(1 - size, size, 2, dtype=dtype, device=weight.device) / (size - 1)
        x, y = positions.to(dtype).unsqueeze(-1).unbind(1)  # each n 1
        across, up = (x - cells).abs(), (y + cells).abs()  # each n k; y of row i is -cells[i]
        distance = up.unsqueeze(2) + across.unsqueeze(1)  # n k k
        tents = F.relu(1 - distance / radius.to(dtype).view(-1, 1, 1))
        kernel = weight.to(dtype) @ tents.flatten(1)  # C kk
        return kernel.unflatten(1, (1, size, size)).to(weight.dtype)


class PointConv(nn.Module):
    """A depthwise convolution whose kernel is made of points that all channels share.

    They have a weight in each channel. Without gradients the dense kernel is built once and cached
    until a parameter changes. The convolution keeps the feature map's size and has no bias. On CPUs
    large depthwise convolutions run far faster in the channels_last memory format.

    Args:
        dim: number of channels.
        kernel_size: side of the dense kernel, odd; it has a quarter as many points as cells.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        points = kernel_size**2 // 4
        self.dim, self.kernel_size = dim, kernel_size
        self.weight = nn.Parameter(torch.empty(dim, points))
        self.positions = nn.Parameter(torch.empty(points, 2))
        self.radius = nn.Parameter(torch.empty(points))
        self.cached = CachedTensor()

    def kernel(self) -> Tensor:
        """Return the dense kernel (C, 1, k, k)."""
        build = partial(kernel_from_points, size=self.kernel_size)
        return self.cached.get(build, self.weight, self.positions, self.radius)

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """Return the plain convolution with the dense kernel."""
        dim, size = self.dim, self.kernel_size
        points = (self.weight.double(), self.positions.double(), self.radius.double())
        kernel = kernel_from_points(*points, size).to(self.weight.dtype)
        plain = nn.Conv2d(
            dim, dim, size, padding=size // 2, groups=dim, bias=False, device="meta"
        ).train(self.training)
        plain.weight = nn.Parameter(kernel, self.weight.requires_grad)
        merge.record("points into a dense kernel")
        return plain

    def forward(self, x: Tensor) -> Tensor:
        padding = self.kernel_size // 2
        return F.conv2d(x, self.kernel(), padding=padding, groups=self.dim)


def large_conv(dim: int, kernel_size: int) -> BranchedConv:
    """Return a kernel of points and a small dense one beside it, each under its own batch norm."""
    both = BranchedConv(dim, kernel_size, [(SMALL_KERNEL, 1)])
    both.large.add_module("conv", PointConv(dim, kernel_size))
    return both


class Block(nn.Module):
    """``x += mixer(x)``, ``x += mlp(x)``; the norms of both are batch norms.

    The authors count the two halves as two blocks.
    """

    def __init__(self, dim: int, kernel_size: int, drop_path: float) -> None:
        super().__init__()
        self.mixer = Chain(
            OrderedDict(
                norm=nn.BatchNorm2d(dim),
                conv1=conv_norm(dim, dim, 1, act=nn.ReLU()),
                conv_dw=large_conv(dim, kernel_size),
                act=nn.ReLU(),
                conv2=conv_norm(dim, dim, 1),
            )
        )
        self.mlp = Chain(
            OrderedDict(
                norm=nn.BatchNorm2d(dim),
                fc1=conv_norm(dim, 4 * dim, 1, act=nn.GELU()),
                fc2=conv_norm(4 * dim, dim, 1),
            )
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(x))


def from_authors(tensors: Tensors, model: Any) -> Tensors:
    """Rename the authors' keys, whose blocks 2i and 2i + 1 are the halves of our block i."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        key = re.sub(
            r"^(stages\.\d+\.blocks)\.(\d+)\.",
            lambda at: f"{at[1]}.{int(at[2]) // 2}.{('mixer', 'mlp')[int(at[2]) % 2]}.",
            name,
        )
        for pattern, replacement in AUTHORS:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


class SMPNet(StagedBackbone):
    """SMPNet; see :class:`StagedBackbone` for the common arguments.

    Training wants a tenth of the learning rate for radii, no weight decay for radii and positions,
    and :meth:`clamp_parameters` after each step.

    Args:
        depths: blocks of each stage; the authors count each as two.
        dims: channels of each stage.
        kernel_sizes: side of the large depthwise kernels.

    Raises:
        ConfigError: a kernel that is even or smaller than the small one beside it.
    """

    first_conv = "stem.0.conv"
    layouts = {"authors": from_authors}
    derived_keys = (r"\.kernel_coord$",)
    no_decay_patterns = (r"\.positions$",)

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        kernel_sizes: PerStage[int] = (31, 29, 27, 13),
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.kernel_sizes = per_stage(kernel_sizes, len(dims), "kernel_sizes")
        if any(size % 2 == 0 or size < SMALL_KERNEL for size in self.kernel_sizes):
            raise ConfigError(
                f"kernel_sizes: {self.kernel_sizes} must be odd and at least {SMALL_KERNEL}"
            )
        self.assemble()

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return Chain(
            conv_norm(self.in_chans, dim, 3, stride=2, act=nn.ReLU()),
            conv_norm(dim, dim, 3, groups=dim, act=nn.ReLU()),
            conv_norm(dim, dim, 1, act=nn.ReLU()),
            conv_norm(dim, dim, 3, stride=2, groups=dim, act=nn.ReLU()),
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        if plan.index == 0:
            return None
        return Chain(
            conv_norm(plan.in_dim, plan.dim, 1, act=nn.ReLU()),
            conv_norm(plan.dim, plan.dim, 3, stride=2, groups=plan.dim, act=nn.ReLU()),
        )

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        return Block(plan.dim, self.kernel_sizes[plan.index], drop_path)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        return Head(dim, maps={"norm": nn.BatchNorm2d(dim)}, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        super().init_layer(module, name)
        if isinstance(module, PointConv):
            trunc_normal_(module.weight, std=0.02)
            trunc_normal_(module.positions, std=0.2, a=-1.0, b=1.0)
            nn.init.constant_(module.radius, 4 / module.kernel_size)

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Keep radii between 0.001 and 1, as the authors' training does."""
        for module in self.modules():
            if isinstance(module, PointConv):
                module.radius.clamp_(*RADII)
