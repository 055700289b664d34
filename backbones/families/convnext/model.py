"""ConvNeXt V1 and V2, the convolution variants of InceptionNeXt's paper, and ConvNeXt-DCLS.

Sources: "A ConvNet for the 2020s" (arXiv 2201.03545), "ConvNeXt V2" (arXiv 2301.00808), for
`kernel_sizes` and `conv_ratio` section 3.1 of "InceptionNeXt" (arXiv 2303.16900), and for `points`
"Dilated convolution with learnable spacings" (arXiv 2112.03740), section 4.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import (
    DropPath,
    LayerNorm,
    LayerNorm2d,
    create_conv2d,
    make_divisible,
    trunc_normal_,
)
from timm.models import checkpoint_seq
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.errors import CheckpointError, ConfigError
from backbones.families.convnext.dcls import SpacedConv
from backbones.families.convnext.layouts import LAYOUTS
from backbones.layers import Chain, ChannelMlp, Head, norm_conv_downsample
from backbones.skeleton import Stage, StagedBackbone, StagePlan, Tensors, per_stage

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
        passed, mixed = x.split(self.split, dim=1)
        return torch.cat((passed, self.conv(mixed)), dim=1)

    def merged(self) -> nn.Conv2d:
        """Return the depthwise convolution on all channels that computes the same."""
        return merge.pass_outputs_into_kernel(self.conv, self.split[0])


class Block(nn.Module):
    """``x + gamma * mlp(norm(conv_dw(x)))``, the norm over channels (2201.03545, figure 4)."""

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int,
        conv_ratio: float,
        points: int | None,
        dilation: int,
        conv_mlp: bool,
        use_grn: bool,
        ls_init_value: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.channels_last = not conv_mlp
        if points:
            self.conv_dw: nn.Module = SpacedConv(dim, kernel_size, points, dilation)
        elif conv_ratio < 1:
            self.conv_dw = PartialConv(dim, int(dim * conv_ratio), kernel_size, dilation)
        else:
            self.conv_dw = create_conv2d(
                dim, dim, kernel_size, dilation=dilation, depthwise=True, bias=True
            )
        self.norm: nn.Module = LayerNorm2d(dim, eps=EPS) if conv_mlp else LayerNorm(dim, eps=EPS)
        self.mlp = ChannelMlp(dim, 4 * dim, use_conv=conv_mlp, use_grn=use_grn)
        self.gamma = (
            nn.Parameter(torch.full((dim,), ls_init_value)) if ls_init_value is not None else None
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        y = self.conv_dw(x) if positions is None else self.conv_dw(x, positions)
        if self.channels_last:
            y = self.norm(y.permute(0, 2, 3, 1))  # B H W C
            y = self.mlp(y).permute(0, 3, 1, 2)  # B C H W
        else:
            y = self.mlp(self.norm(y))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        if isinstance(self.conv_dw, PartialConv):
            self.conv_dw = self.conv_dw.merged()
        self.mlp.reparameterize()
        self.norm = merge.norm_into_next(self.norm, self.mlp.fc1)
        merge.scale_into_previous(self.mlp.fc2, self.gamma)
        self.gamma = None


class SpacedStage(Stage):
    """A stage whose blocks share the positions of their kernels' points, (2, C, n)."""

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[nn.Module], dim: int, points: int
    ) -> None:
        super().__init__(downsample, blocks)
        self.positions: nn.Parameter | None = nn.Parameter(torch.empty(2, dim, points))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x, self.positions)
        return x

    def reparameterize(self) -> None:
        block: Any
        for block in self.blocks if self.positions is not None else ():
            block.conv_dw = block.conv_dw.merged(self.positions)
        self.positions = None


class ConvNeXt(StagedBackbone):
    """ConvNeXt; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        kernel_sizes: depthwise kernel size.
        conv_ratio: share of the channels that the depthwise convolution sees (the last ones).
        points: make each kernel of this many points whose positions are learned, shared by the
            stage's blocks (DCLS); None for dense kernels. Training wants no weight decay and five
            times the learning rate for positions, and :meth:`clamp_parameters` after each step.
        conv_mlp: pointwise layers as 1x1 convolutions instead of linear layers.
        use_grn: global response norm in the MLP (V2).
        ls_init_value: initial layer scale; None for no layer scale (V2).
        stem_type: ``patch`` (4x4 stride 4), or two 3x3 convolutions of stride 2 with equal widths
            (``overlap``) or half the width first, in multiples of 8 (``overlap_tiered``).

    Raises:
        ConfigError: `points` below one, with an even kernel size or with `conv_ratio`.
    """

    dilatable = True
    no_decay_patterns = (r"\.positions$",)
    layouts = LAYOUTS

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        kernel_sizes: PerStage[int] = 7,
        conv_ratio: float = 1.0,
        points: int | None = None,
        conv_mlp: bool = False,
        use_grn: bool = False,
        ls_init_value: float | None = 1e-6,
        stem_type: Literal["patch", "overlap", "overlap_tiered"] = "patch",
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.stem_type = stem_type
        self.kernel_sizes = per_stage(kernel_sizes, len(dims), "kernel_sizes")
        self.points = points
        if points is not None:
            odd = all(size % 2 for size in self.kernel_sizes)
            if points < 1 or conv_ratio < 1 or not odd:
                raise ConfigError(
                    f"points={points} must be positive and needs odd kernel_sizes (got"
                    f" {self.kernel_sizes}) and conv_ratio=1 (got {conv_ratio})"
                )
        self.block = partial(
            Block,
            conv_ratio=conv_ratio,
            points=points,
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
            inner = make_divisible(dim // 2) if self.stem_type == "overlap_tiered" else dim
            convs = [
                nn.Conv2d(self.in_chans, inner, 3, stride=2, padding=1),
                nn.Conv2d(inner, dim, 3, stride=2, padding=1),
            ]
        return Chain(*convs, LayerNorm2d(dim, eps=EPS))

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

    def build_stage(self, plan: StagePlan, drop_path: Sequence[float]) -> nn.Module:
        stage = super().build_stage(plan, drop_path)
        if not self.points or not isinstance(stage, Stage):
            return stage
        return SpacedStage(stage.downsample, list(stage.blocks), plan.dim, self.points)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        return Head(dim, vectors={"norm": LayerNorm(dim, eps=EPS)}, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        super().init_layer(module, name)
        if isinstance(module, SpacedConv):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, SpacedStage):
            nn.init.normal_(module.get_parameter("positions"), std=0.5)
            self.clamp_parameters()

    def run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and isinstance(stage, SpacedStage)):
            return super().run_stage(stage, x)
        blocks = [partial(block, positions=stage.positions) for block in stage.blocks]
        return checkpoint_seq(blocks, stage.downsample(x))

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Move points that left their kernels back to the border."""
        for stage, size in zip(self.stages, self.kernel_sizes):
            if isinstance(stage, SpacedStage) and stage.positions is not None:
                stage.positions.clamp_(-(size // 2), size // 2)

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Bring the positions that the authors' layout repeats in every block to their stage.

        Raises:
            CheckpointError: blocks of one stage disagree.
        """
        for key in list(tensors):
            match = re.fullmatch(r"(stages\.\d+)\.blocks\.\d+\.conv_dw\.P", key)
            if match is None:
                continue
            shared, positions = f"{match[1]}.positions", tensors.pop(key)
            if not torch.equal(tensors.setdefault(shared, positions), positions):
                raise CheckpointError(
                    f"{key!r} differs from the positions of another block of its stage; the blocks"
                    " of a ConvNeXt-DCLS stage share theirs, so this is no checkpoint of one"
                )
        return tensors
