"""InceptionNeXt: a large depthwise kernel split into a square, two bands and an identity.

Source: "InceptionNeXt: When Inception Meets ConvNeXt" (arXiv 2303.16900), section 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.layers import Chain, ChannelMlp, Head, norm_conv_downsample
from backbones.skeleton import StagedBackbone, StagePlan, per_stage


class InceptionConv(nn.Module):
    """Depthwise 3x3, 1xB and Bx1 convolutions on a share of the channels each (equation 4).

    The channels are, in this order: untouched, square, horizontal band, vertical band.
    """

    def __init__(self, dim: int, band_kernel: int, branch_ratio: float, dilation: int) -> None:
        super().__init__()
        branch = int(dim * branch_ratio)
        reach = band_kernel // 2 * dilation
        self.split = (dim - 3 * branch, branch, branch, branch)
        common: dict[str, Any] = {"groups": branch, "dilation": dilation}
        self.dwconv_hw = nn.Conv2d(branch, branch, 3, padding=dilation, **common)
        self.dwconv_w = nn.Conv2d(branch, branch, (1, band_kernel), padding=(0, reach), **common)
        self.dwconv_h = nn.Conv2d(branch, branch, (band_kernel, 1), padding=(reach, 0), **common)

    def forward(self, x: Tensor) -> Tensor:
        passed, square, horizontal, vertical = x.split(self.split, dim=1)
        mixed = self.dwconv_hw(square), self.dwconv_w(horizontal), self.dwconv_h(vertical)
        return torch.cat((passed, *mixed), dim=1)


class Block(nn.Module):
    """``x + gamma * mlp(norm(token_mixer(x)))``, the MetaNeXt block (equation 2)."""

    def __init__(
        self, dim: int, token_mixer: nn.Module, mlp_ratio: float, ls: float, drop_path: float
    ) -> None:
        super().__init__()
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((dim,), ls))
        self.token_mixer = token_mixer
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.mlp = ChannelMlp(dim, int(mlp_ratio * dim), use_conv=True)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.token_mixer(x)))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        self.norm = merge.norm_into_next(self.norm, self.mlp.fc1)
        merge.scale_into_previous(self.mlp.fc2, self.gamma)
        self.gamma = None


class InceptionNeXt(StagedBackbone):
    """InceptionNeXt; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        band_kernel: length of the band kernels.
        branch_ratio: share of the channels in each of the three branches.
        mlp_ratios: expansion of the MLP.
        ls_init_value: initial layer scale.
        head_ratio: expansion of the head's hidden layer.
    """

    dilatable = True
    classifier_names = ("head.fc2",)

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        band_kernel: int = 11,
        branch_ratio: float = 0.125,
        mlp_ratios: PerStage[float] = (4, 4, 4, 3),
        ls_init_value: float = 1e-6,
        head_ratio: float = 3,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.mixer_arguments = (band_kernel, branch_ratio)
        self.mlp_ratios = per_stage(mlp_ratios, len(dims), "mlp_ratios")
        self.ls_init_value = ls_init_value
        self.head_ratio = head_ratio
        self.assemble()

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return Chain(nn.Conv2d(self.in_chans, dim, 4, stride=4), nn.BatchNorm2d(dim))

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        if plan.index == 0:
            return None
        norm = nn.BatchNorm2d(plan.in_dim)
        return norm_conv_downsample(
            norm, plan.in_dim, plan.dim, stride=plan.stride, first_dilation=plan.first_dilation
        )

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        mixer = InceptionConv(plan.dim, *self.mixer_arguments, plan.dilation)
        ratio = self.mlp_ratios[plan.index]
        return Block(plan.dim, mixer, ratio, self.ls_init_value, drop_path)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        hidden = int(self.head_ratio * dim)
        vectors = {
            "fc1": nn.Linear(dim, hidden),
            "act": nn.GELU(),
            "norm": nn.LayerNorm(hidden, eps=1e-6),
        }
        return Head(dim, vectors=vectors, hidden_features=hidden, classifier="fc2", **common)
