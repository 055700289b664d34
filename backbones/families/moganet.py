"""MogaNet: a gate over depthwise convolutions of three reaches, and contrasts with means.

Source: "MogaNet: Multi-order Gated Aggregation Network" (arXiv 2211.03295), section 4.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.errors import ConfigError
from backbones.layers import Chain, Head, VectorBatchNorm, init_by_fan_out
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, per_stage

SHARES = 8  # of the channels: one stays, three see 5x5 at dilation 2, four 7x7 at dilation 3

AUTHORS = (
    (r"^head\.(?!fc\.)", "head.fc."),
    (r"^patch_embed1\.projection\.", "stem."),
    (r"^norm4\.", "head.norm."),
    *((rf"^norm{i}\.", f"stages.{i}.downsample.0.") for i in (1, 2, 3)),
    *((rf"^patch_embed{i + 1}\.projection\.", f"stages.{i}.downsample.1.") for i in (1, 2, 3)),
    *((rf"^patch_embed{i + 1}\.norm\.", f"stages.{i}.downsample.2.") for i in (1, 2, 3)),
    *((rf"^blocks{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"\.layer_scale_(\d)$", r".gamma\1"),
    (r"\.sigma\.scale$", ".sigma"),
    (r"\.DW_conv(\d)\.", r".conv_dw\1."),
    (r"\.PW_conv\.", ".proj."),
    (r"\.dwconv\.", ".conv_dw."),
)

_logger = logging.getLogger(__name__)


def depthwise(dim: int, kernel_size: int, dilation: int) -> nn.Conv2d:
    """Return a depthwise convolution that keeps the size of the feature map."""
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim)


class MultiOrderConv(nn.Module):
    """A depthwise 5x5, dilated ones after it on shares of its channels, a 1x1 (equation 6)."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        near, far = 3 * dim // SHARES, 4 * dim // SHARES
        self.split = (dim - near - far, near, far)
        self.conv_dw0 = depthwise(dim, 5, dilation)
        self.conv_dw1 = depthwise(near, 5, 2 * dilation)
        self.conv_dw2 = depthwise(far, 7, 3 * dilation)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, near, far = self.conv_dw0(x).split(self.split, dim=1)
        return self.proj(torch.cat((kept, self.conv_dw1(near), self.conv_dw2(far)), dim=1))

    def reparameterize(self) -> None:
        """Move the biases in front of the 1x1 into its own."""
        dilated = (self.conv_dw1, self.conv_dw2)
        merge.biases_into_next(self.conv_dw0, slice(self.split[0]), dilated, self.proj)


class GatedAggregation(nn.Module):
    """``proj_2(act(gate(y)) * act(value(y)))`` of a projection y in contrast with its mean.

    Equations 4 to 7, without the shortcut, which is the block's.
    """

    def __init__(self, dim: int, dilation: int, init_value: float, silu_twice: bool) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.sigma: nn.Parameter | None = nn.Parameter(torch.full((dim,), init_value))
        self.contrast: nn.Module = nn.Identity()  # `sigma` as a convolution, once merged
        self.gate = nn.Conv2d(dim, dim, 1)
        self.value = MultiOrderConv(dim, dilation)
        self.act: nn.Module = nn.SiLU()
        self.act_gate: nn.Module = nn.Sequential(nn.SiLU(), nn.SiLU()) if silu_twice else nn.SiLU()
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj_1(x)  # B C H W
        if self.sigma is not None:
            y = y + self.sigma.view(1, -1, 1, 1) * (y - y.mean((2, 3), keepdim=True))
        else:
            y = y + self.contrast(x.mean((2, 3), keepdim=True))
        y = self.act(y)
        return self.proj_2(self.act_gate(self.gate(y)) * self.act_gate(self.value(y)))

    def reparameterize(self) -> None:
        """Make the contrast two convolutions."""
        if self.sigma is not None:
            self.contrast = merge.split_contrast(self.proj_1, self.sigma)
            self.sigma = None


class ContrastMlp(nn.Module):
    """An MLP with a depthwise 3x3 whose features stand in contrast with one map (equation 8).

    Once merged, `fc2` computes that map too, as its last channel, and `direction` is what it adds
    to each output.
    """

    def __init__(self, dim: int, hidden_dim: int, dilation: int, init_value: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.conv_dw = depthwise(hidden_dim, 3, dilation)
        self.act = nn.GELU()
        self.decompose: nn.Module = nn.Conv2d(hidden_dim, 1, 1)
        self.sigma: nn.Parameter | None = nn.Parameter(torch.full((hidden_dim,), init_value))
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        self.direction: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv_dw(self.fc1(x)))  # B rC H W
        if self.sigma is not None:
            x = x + self.sigma.view(1, -1, 1, 1) * (x - self.act(self.decompose(x)))
        x = self.fc2(x)
        if self.direction is not None:
            x = x[:, :-1] + self.direction.view(1, -1, 1, 1) * self.act(x[:, -1:])
        return x  # B C H W

    def reparameterize(self) -> None:
        """Move the contrast behind `fc2`, which also takes in `decompose`."""
        if self.sigma is not None and isinstance(self.decompose, nn.Conv2d):
            self.direction = merge.contrast_into_next(self.sigma, self.fc2)
            self.fc2 = merge.stack_linear_layers(self.fc2, self.decompose)
            self.decompose, self.sigma = nn.Identity(), None


class Block(nn.Module):
    """``h = norm1(x)``, ``x += gamma1 * (attn(h) + h)``, ``x += gamma2 * mlp(norm2(x))``.

    The inner shortcut is the normalized map.
    """

    def __init__(
        self, attn: GatedAggregation, mlp: ContrastMlp, dim: int, init_value: float, rate: float
    ) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.BatchNorm2d(dim)
        self.attn = attn
        self.gamma1: nn.Parameter | None = nn.Parameter(torch.full((dim,), init_value))
        self.shortcut: nn.Parameter | None = None  # factor of x, once merged
        self.norm2: nn.Module = nn.BatchNorm2d(dim)
        self.mlp = mlp
        self.gamma2: nn.Parameter | None = nn.Parameter(torch.full((dim,), init_value))
        self.drop_path = DropPath(rate) if rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        y = self.attn(h)
        if self.gamma1 is not None:
            y = (y + h) * self.gamma1.view(1, -1, 1, 1)
        if self.shortcut is not None:
            x = x * self.shortcut.view(1, -1, 1, 1)
        x = x + self.drop_path(y)
        y = self.mlp(self.norm2(x))
        if self.gamma2 is not None:
            y = y * self.gamma2.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        attn, mlp = self.attn, self.mlp
        if self.gamma1 is not None:
            merge.scale_into_previous(attn.proj_2, self.gamma1)
            self.shortcut = merge.norm_into_shortcut(self.norm1, self.gamma1, attn.proj_2)
        self.norm1 = merge.norm_into_next(self.norm1, attn.proj_1)
        attn.reparameterize()
        self.norm2 = merge.norm_into_next(self.norm2, mlp.fc1)
        merge.scale_into_previous(mlp.fc2, self.gamma2)
        mlp.reparameterize()
        self.gamma1 = self.gamma2 = None


def from_openmixup(tensors: Tensors, model: Any) -> Tensors:
    """Rename OpenMixup's keys; say so where the model has one SiLU and its files want two."""
    if not any(key.startswith("backbone.patch_embed1.") for key in tensors):
        return tensors
    if not model.silu_twice:
        _logger.warning(
            "This checkpoint has OpenMixup's names. All of its files but"
            " moga_small_ema_sz224_8xb128_no_forcefp32_ep300.pth were trained with two SiLUs in the"
            " gate, which leaves no trace in them, and this model has one. Unless you know that the"
            " file wants one, load it into the variant of the same name with _silu2, or give"
            " silu_twice=True."
        )
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("backbone.")
        for pattern, replacement in AUTHORS:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


class MogaNet(StagedBackbone):
    """MogaNet; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, multiples of 8.
        mlp_ratios: expansion of the MLP.
        silu_twice: gate and value pass SiLU twice, as in OpenMixup with `attn_force_fp32`. No
            weight tells the forms apart: which one a checkpoint needs is known from its source.
        ls_init_value: initial layer scales and contrasts.

    Raises:
        ConfigError: channels that are no multiples of 8.
    """

    dilatable = True
    layouts = {"authors": AUTHORS, "openmixup": from_openmixup}
    invisible_arguments = ("silu_twice",)

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        mlp_ratios: PerStage[float] = (8, 8, 4, 4),
        silu_twice: bool = False,
        ls_init_value: float = 1e-5,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        if any(dim % SHARES for dim in dims):
            raise ConfigError(f"dims: {list(dims)} must be multiples of {SHARES}")
        self.mlp_ratios = per_stage(mlp_ratios, len(dims), "mlp_ratios")
        self.silu_twice = silu_twice
        self.ls_init_value = ls_init_value
        self.assemble()

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return Chain(
            nn.Conv2d(self.in_chans, dim // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        """Return the norm of the stage before, which is on the path, and a convolution."""
        if plan.index == 0:
            return None
        reach = plan.first_dilation
        conv = nn.Conv2d(plan.in_dim, plan.dim, 3, plan.stride, padding=reach, dilation=reach)
        return Chain(nn.BatchNorm2d(plan.in_dim), conv, nn.BatchNorm2d(plan.dim))

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        value, dim = self.ls_init_value, plan.dim
        attn = GatedAggregation(dim, plan.dilation, value, self.silu_twice)
        mlp = ContrastMlp(dim, int(self.mlp_ratios[plan.index] * dim), plan.dilation, value)
        return Block(attn, mlp, dim, value, drop_path)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        return Head(dim, vectors={"norm": VectorBatchNorm(dim)}, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Initialize convolutions by their fan-out."""
        if isinstance(module, nn.Conv2d):
            init_by_fan_out(module)
        else:
            super().init_layer(module, name)
