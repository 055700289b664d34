"""OverLoCK's focus net: image and context channels side by side.

Source: OverLoCK (arXiv 2502.20087), section 3.2 and figure 4b.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite
from timm.models import checkpoint_seq
from torch import Tensor, nn

from backbones import merge
from backbones.families.overlock.dynamic_conv import DynamicConv
from backbones.families.overlock.layers import ConvMlp, LayerScale
from backbones.layers import (
    BranchedConv,
    Chain,
    GlobalResponseNorm,
    Head,
    ResidualConv,
    conv_norm,
)
from backbones.skeleton import Stage

__all__ = ["FocusBlock", "FocusDownsample", "FocusNet", "FocusStage"]

EPS = 1e-6


class FocusBlock(nn.Module):
    """A block of the focus net: a dynamic convolution, then an MLP.

    Its feature map holds the image's channels, then the context's. Except in the very first block,
    where the two are equal, the context takes in the reference: what the overview said itself.

    Args:
        dim: channels of the image.
        context: channels of the context.
        kernel_size: the large kernel.
        branches: (kernel, dilation) of the branches beside it.
        groups: groups of channels with dynamic kernels of their own.
        first: whether this is the first block.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        context: int,
        kernel_size: int,
        branches: Sequence[tuple[int, int]],
        groups: int,
        first: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        both = dim + context
        self.split = (dim, context)
        self.first = first
        self.x_scale: nn.Module = nn.Identity() if first else LayerScale(context)
        self.h_scale: nn.Module = nn.Identity() if first else LayerScale(context)
        self.conv_dw1 = ResidualConv(both)
        self.norm1 = LayerNorm2d(both, eps=EPS)
        self.fusion = Chain(
            nn.Conv2d(both, both, 3, padding=1, groups=both),
            nn.BatchNorm2d(both),
            nn.GELU(),
            nn.Conv2d(both, dim, 1),
            GlobalResponseNorm(dim, channels_last=False),
        )
        self.gate = conv_norm(dim, dim, 1, act=nn.SiLU())
        self.lepe = Chain(BranchedConv(dim, kernel_size, branches), nn.BatchNorm2d(dim))
        self.mixer = DynamicConv(dim, context, kernel_size, groups)
        self.se = SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU)
        self.proj = Chain(OrderedDict(norm=nn.BatchNorm2d(dim), conv=nn.Conv2d(dim, both, 1)))
        self.ls1 = LayerScale(both)
        self.conv_dw2 = ResidualConv(both)
        self.norm2 = LayerNorm2d(both, eps=EPS)
        self.mlp = ConvMlp(both, 3 * dim)
        self.ls2 = LayerScale(both)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        if not self.first:
            image, context = x.split(self.split, dim=1)  # together B C H W
            context = self.x_scale(context) + self.h_scale(reference)
            x = torch.cat((image, context), dim=1)
        x = self.conv_dw1(x)
        guide = self.norm1(x)
        values = self.fusion(guide)  # B dim H W, without the context's channels
        y = self.mixer(values, guide) + self.lepe(values)
        y = self.proj(self.se(y) * self.gate(values))  # B C H W
        x = self.conv_dw2(self.ls1(x) + self.drop_path(y))
        return self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))

    def scale_context(self, scale: LayerScale) -> None:
        """Fold a layer scale on the context channels of the block's output."""
        context = slice(self.split[0], None)
        merge.scale_parameter(self.ls2.weight, scale.weight, context)
        self.ls2.shift_into(self.mlp.fc2)
        merge.scale_into_previous(self.mlp.fc2, scale.weight, context)
        merge.shift_into_previous(self.mlp.fc2, scale.bias, context)

    def reparameterize(self) -> None:
        merge.fold_chain(self, ("conv_dw1",))
        merge.fold_chain(self, ("conv_dw2",))
        merge.fold_chain(self.proj)
        self.mlp.reparameterize()
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)
        self.ls1.shift_into(self.proj.conv)
        self.ls2.shift_into(self.mlp.fc2)
        if isinstance(self.x_scale, LayerScale) and isinstance(self.h_scale, LayerScale):
            merge.shift_together(self.x_scale.bias, self.h_scale.bias)
            self.h_scale.bias = None


class FocusDownsample(nn.Module):
    """Halve the image and the context of a feature map, each with its own convolution."""

    def __init__(self, in_dim: int, dim: int, context: int) -> None:
        super().__init__()
        self.split = (in_dim, context)
        self.image = conv_norm(in_dim, dim, 3, stride=2)
        self.context = conv_norm(context, context, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        image, context = x.split(self.split, dim=1)
        return torch.cat((self.image(image), self.context(context)), dim=1)  # B C' H/2 W/2

    def scale_context(self, scale: LayerScale) -> None:
        """Fold a layer scale on the context channels of the output."""
        merge.fold_chain(self.context)
        merge.scale_into_previous(self.context.conv, scale.weight)
        merge.shift_into_previous(self.context.conv, scale.bias)


class FocusStage(Stage):
    """A stage of the focus net, whose blocks take the reference too."""

    def reparameterize(self) -> None:
        """Fold the scale of each block's context into what computes that context."""
        before: Any = self.downsample
        block: Any
        for block in self.blocks:
            block.reparameterize()
            if isinstance(block.x_scale, LayerScale):
                before.scale_context(block.x_scale)
                block.x_scale = nn.Identity()
            before = block


class FocusNet(nn.Module):
    """The close look: two stages, at stride 16 and 32, guided by the overview (section 3.2)."""

    def __init__(self, overview_dim: int, context: int, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.project = nn.Conv2d(overview_dim, context, 1)
        self.stages = nn.ModuleList(stages)
        self.aux_head: Head | None = None  # on the overview

    def reparameterize(self) -> None:
        """Drop the auxiliary head, which only training uses."""
        self.aux_head = None

    def run_stages(self, base: Tensor, overview: Tensor, checkpointing: bool) -> Iterator[Tensor]:
        """Yield the output of each stage, image and context channels together."""
        context = self.project(overview)
        wide = F.interpolate(context, size=base.shape[-2:], mode="bilinear", align_corners=False)
        x = torch.cat((base, wide), dim=1)  # image and context channels at stride 16
        stage: Any  # a Stage, whose blocks take the reference too
        for stage, reference in zip(self.stages, (wide, context)):
            x = stage.downsample(x)
            if checkpointing:
                blocks = [partial(block, reference=reference) for block in stage.blocks]
                x = checkpoint_seq(blocks, x, use_reentrant=False)
            else:
                for block in stage.blocks:
                    x = block(x, reference)
            yield x
