"""ConvNeXt V1 and V2, and the kernel-size and partial-convolution variants of InceptionNeXt's paper.

Sources: "A ConvNet for the 2020s" (arXiv 2201.03545), "ConvNeXt V2" (arXiv 2301.00808) and, for
`kernel_sizes` and `conv_ratio`, section 3.1 of "InceptionNeXt" (arXiv 2303.16900).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, create_conv2d
from torch import Tensor, nn

from backbones.config import PerStage
from backbones.layers import ChannelMlp, Head, norm_conv_downsample
from backbones.skeleton import StagedBackbone, StagePlan, per_stage

EPS = 1e-6


class PartialConv(nn.Module):
    """A depthwise convolution on the last `conv_dim` of `dim` channels; the others pass through."""

    def __init__(self, dim: int, conv_dim: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.split = (dim - conv_dim, conv_dim)
        self.conv = create_conv2d(
            conv_dim, conv_dim, kernel_size, dilation=dilation, depthwise=True, bias=True
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, mixed = x.split(self.split, dim=1)
        return torch.cat((kept, self.conv(mixed)), dim=1)


class Block(nn.Module):
    """``x + gamma * mlp(norm(conv_dw(x)))``, the norm over channels (arXiv 2201.03545, figure 4)."""

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int,
        conv_ratio: float,
        dilation: int,
        conv_mlp: bool,
        use_grn: bool,
        ls_init_value: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.channels_last = not conv_mlp
        if conv_ratio < 1:
            self.conv_dw: nn.Module = PartialConv(dim, int(dim * conv_ratio), kernel_size, dilation)
        else:
            self.conv_dw = create_conv2d(
                dim, dim, kernel_size, dilation=dilation, depthwise=True, bias=True
            )
        self.norm = LayerNorm2d(dim, eps=EPS) if conv_mlp else LayerNorm(dim, eps=EPS)
        self.mlp = ChannelMlp(dim, 4 * dim, use_conv=conv_mlp, use_grn=use_grn)
        self.gamma = (
            nn.Parameter(torch.full((dim,), ls_init_value)) if ls_init_value is not None else None
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x)
        if self.channels_last:
            y = self.mlp(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        else:
            y = self.mlp(self.norm(y))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)


class ConvNeXt(StagedBackbone):
    """ConvNeXt; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        kernel_sizes: depthwise kernel size.
        conv_ratio: share of the channels that the depthwise convolution sees (the last ones).
        conv_mlp: pointwise layers as 1x1 convolutions instead of linear layers.
        use_grn: global response norm in the MLP (V2).
        ls_init_value: initial layer scale; None for no layer scale (V2).
        stem_type: ``patch`` (4x4 stride 4), or two 3x3 convolutions of stride 2 with equal widths
            (``overlap``) or half the width first (``overlap_tiered``).
    """

    dilatable = True
    layouts = {
        "authors": (
            (r"^downsample_layers\.0\.", "stem."),
            (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
            (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.dwconv\.", ".conv_dw."),
            (r"\.pwconv(\d)\.", r".mlp.fc\1."),
            (r"\.grn\.gamma$", ".mlp.grn.weight"),
            (r"\.grn\.beta$", ".mlp.grn.bias"),
            (r"^norm\.", "head.norm."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        )
    }

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        kernel_sizes: PerStage[int] = 7,
        conv_ratio: float = 1.0,
        conv_mlp: bool = False,
        use_grn: bool = False,
        ls_init_value: float | None = 1e-6,
        stem_type: Literal["patch", "overlap", "overlap_tiered"] = "patch",
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.stem_type = stem_type
        self.kernel_sizes = per_stage(kernel_sizes, len(dims), "kernel_sizes")
        self.block = partial(
            Block,
            conv_ratio=conv_ratio,
            conv_mlp=conv_mlp,
            use_grn=use_grn,
            ls_init_value=ls_init_value,
        )
        self.assemble()

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        if self.stem_type == "patch":
            convs = [nn.Conv2d(self.in_chans, dim, 4, stride=4)]
        else:
            inner = dim // 2 if self.stem_type == "overlap_tiered" else dim
            convs = [
                nn.Conv2d(self.in_chans, inner, 3, stride=2, padding=1),
                nn.Conv2d(inner, dim, 3, stride=2, padding=1),
            ]
        return nn.Sequential(*convs, LayerNorm2d(dim, eps=EPS))

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        if plan.index == 0:
            return None
        norm = LayerNorm2d(plan.in_dim, eps=EPS)
        return norm_conv_downsample(
            norm, plan.in_dim, plan.dim, stride=plan.stride, first_dilation=plan.first_dilation
        )

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        return self.block(
            plan.dim,
            kernel_size=self.kernel_sizes[plan.index],
            dilation=plan.dilation,
            drop_path=drop_path,
        )

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        return Head(dim, vectors={"norm": LayerNorm(dim, eps=EPS)}, **common)
