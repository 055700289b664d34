"""AttNet: depthwise convolutions with a kernel for each image and channel, and gated MLPs.

Source: "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional
Efficiency" (arXiv 2510.20092) and the authors' code.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d
from timm.layers import RmsNorm2d as TimmRmsNorm2d
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.layers import CONVNEXT_LAYOUT, Chain, Head, conv_norm, fx_leaf, statistics_dtype
from backbones.ops import attentive_convolution, is_recorded, mean_matrix
from backbones.skeleton import StagedBackbone, StagePlan, per_stage

KERNEL_SIZE = 3
TAPS = KERNEL_SIZE**2
LS_INIT_VALUE = 1e-6  # of layer scales

AUTHORS = (
    (r"^downsample_layers\.0\.2\.", "downsample_layers.0.1."),
    (r"^(downsample_layers\.(?:0\.[01]|[1-3]))\.0\.", r"\1.conv."),
    (r"^(downsample_layers\.(?:0\.[01]|[1-3]))\.1\.", r"\1.norm."),
    *CONVNEXT_LAYOUT,
    (r"\.norm_(\d)\.", r".norm\1."),
    (r"\.layer_scale_(\d)\.gamma$", r".gamma\1"),
    (r"\.token_mixer\.difference_control$", ".mixer.difference"),
    (r"\.token_mixer\.x_proj\.", ".mixer.value_proj."),
    (r"\.token_mixer\.", ".mixer."),
    (r"\.channel_mixer\.dwconv\.", ".mlp.conv_dw."),
    (r"\.channel_mixer\.norm_layer\.", ".mlp.norm."),
    (r"\.channel_mixer\.", ".mlp."),
)

attend_by_convolution = fx_leaf(attentive_convolution)


class RmsNorm2d(TimmRmsNorm2d):
    """timm's, with squares in float32 for the half types, where those of a product overflow."""

    def forward(self, x: Tensor) -> Tensor:
        square = x.to(statistics_dtype(x)).square().mean(1, keepdim=True)  # B 1 H W
        x = x * torch.rsqrt(square + self.eps).to(x.dtype)
        return x if self.weight is None else x * self.weight.view(1, -1, 1, 1)


@fx_leaf
def strip_means(x: Tensor, count: int) -> Tensor:
    """Average a map (B, C, H, W) over `count` runs of consecutive positions, (B, C, count).

    Positions are taken row by row. Of N = H * W positions, run i is those from
    ``floor(i N / count)`` to below ``ceil((i + 1) N / count)``; runs may share a position.
    """
    flat = x.flatten(2)  # B C N
    if not is_recorded():
        return F.adaptive_avg_pool1d(flat, count)
    # Engines have no such pooling where the count is no divisor of N.
    means = flat.to(statistics_dtype(x)) @ mean_matrix(flat.shape[2], count, x)
    return means.to(x.dtype)


class AttentiveConv(nn.Module):
    """A depthwise 3x3 of the projected map, with kernels made of means of the map itself.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.kernel_proj = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.kernel_gen = nn.Linear(TAPS, TAPS)
        # How much of each kernel's mean is taken off it: the sigmoid of this; once merged, this.
        self.difference = nn.Parameter(torch.zeros(dim))
        self.value_proj = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend_by_convolution(self.value_proj(x), self.kernels(x)))

    def kernels(self, x: Tensor) -> Tensor:
        """Return the kernels for maps (B, C, H, W), (B, C, 3, 3)."""
        # The authors project first. Means change places with a projection.
        means = self.kernel_proj(strip_means(x, TAPS).unsqueeze(-1)).squeeze(-1)  # B C K
        kernels = self.kernel_gen(self.act(means))  # B C K, and their mean as one more if merged
        if self.kernel_gen.out_features == TAPS:
            share = self.difference.sigmoid().view(-1, 1)
            kernels = kernels - share * kernels.mean(-1, keepdim=True)
        else:
            kernels = kernels[..., :TAPS] - self.difference.view(-1, 1) * kernels[..., TAPS:]
        return kernels.unflatten(-1, (KERNEL_SIZE, KERNEL_SIZE))

    def reparameterize(self) -> None:
        """Let `kernel_gen` compute the kernels' mean too; make its share a constant."""
        if self.kernel_gen.out_features == TAPS:
            self.kernel_gen = merge.mean_as_output(self.kernel_gen)
            self.difference = merge.function_into_parameter(self.difference, torch.sigmoid)


class GatedMlp(nn.Module):
    """``fc2(norm(GELU(conv_dw(a)) * b))`` of the halves a and b of ``fc1(x)``.

    Args:
        dim: channels.
        hidden_dim: channels of each half.
        use_norm: whether there is the norm.
    """

    def __init__(self, dim: int, hidden_dim: int, use_norm: bool) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 2 * hidden_dim, 1)
        self.conv_dw = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.norm: nn.Module = RmsNorm2d(hidden_dim) if use_norm else nn.Identity()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=1)  # B D H W each
        return self.fc2(self.norm(self.act(self.conv_dw(gate)) * value))  # B C H W

    def reparameterize(self) -> None:
        """Fold the norm's factor into `fc2`."""
        self.norm = merge.norm_into_next(self.norm, self.fc2)


class Block(nn.Module):
    """``x += gamma1 * mixer(norm1(x))``, ``x += gamma2 * mlp(norm2(x))``.

    Args:
        dim: channels.
        hidden_dim: channels of each half of the MLP.
        use_norm: whether the MLP has a norm.
        init_value: initial layer scale; None for no layer scales.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        use_norm: bool,
        init_value: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1: nn.Module = LayerNorm2d(dim, eps=1e-6)
        self.mixer = AttentiveConv(dim)
        self.gamma1: nn.Parameter | None = None
        self.norm2: nn.Module = LayerNorm2d(dim, eps=1e-6)
        self.mlp = GatedMlp(dim, hidden_dim, use_norm)
        self.gamma2: nn.Parameter | None = None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.set_layer_scales(init_value)

    def set_layer_scales(self, init_value: float | None) -> None:
        """Give the block fresh layer scales, or none for None."""
        dim, weight = self.mixer.proj.out_channels, self.mixer.proj.weight
        for name in ("gamma1", "gamma2"):
            fresh = (
                None if init_value is None else nn.Parameter(weight.new_full((dim,), init_value))
            )
            setattr(self, name, fresh)

    def set_mlp_norm(self, use_norm: bool, affine: bool) -> None:
        """Give the MLP a fresh norm, or none."""
        weight = self.mlp.fc2.weight
        fresh: nn.Module = nn.Identity()
        if use_norm:
            fresh = RmsNorm2d(weight.shape[1], affine=affine).to(weight.device, weight.dtype)
        self.mlp.norm = fresh.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(self.norm1(x))
        if self.gamma1 is not None:
            y = y * self.gamma1.view(1, -1, 1, 1)
        x = x + self.drop_path(y)
        y = self.mlp(self.norm2(x))
        if self.gamma2 is not None:
            y = y * self.gamma2.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        mixer, mlp = self.mixer, self.mlp
        self.norm1 = merge.norm_into_next(self.norm1, mixer.kernel_proj, mixer.value_proj)
        merge.scale_into_previous(mixer.proj, self.gamma1)
        self.norm2 = merge.norm_into_next(self.norm2, mlp.fc1)
        merge.scale_into_previous(mlp.fc2, self.gamma2)
        self.gamma1 = self.gamma2 = None


class AttNet(StagedBackbone):
    """AttNet; see :class:`StagedBackbone` for the common arguments.

    A checkpoint of the training form shows whether it has layer scales and norms in the MLPs;
    a model that loads it follows it.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        mlp_ratios: expansion of the MLPs, of whose channels two thirds are taken, rounded down.
        mlp_norm: a root mean square norm before the second layer of each MLP.
        ls_init_value: initial layer scale; None for no layer scales.
    """

    first_conv = "stem.0.conv"
    layouts = {"authors": AUTHORS}
    invisible_arguments = ("mlp_norm",)  # in the re-parameterized form, whose norm has no weight

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        mlp_ratios: PerStage[float] = (8, 8, 4, 4),
        mlp_norm: bool = True,
        ls_init_value: float | None = LS_INIT_VALUE,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.mlp_ratios = per_stage(mlp_ratios, len(dims), "mlp_ratios")
        self.mlp_norm = mlp_norm
        self.ls_init_value = ls_init_value
        self.assemble()

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return Chain(
            conv_norm(self.in_chans, dim // 2, 3, stride=2, act=nn.GELU()),
            conv_norm(dim // 2, dim, 3, stride=2),
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        return conv_norm(plan.in_dim, plan.dim, 3, stride=plan.stride) if plan.index else None

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        hidden_dim = 2 * int(plan.dim * self.mlp_ratios[plan.index]) // 3
        return Block(plan.dim, hidden_dim, self.mlp_norm, self.ls_init_value, drop_path)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        return Head(dim, vectors={"norm": LayerNorm(dim, eps=1e-5)}, **common)

    def shown_arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return whether a checkpoint has norms in the MLPs, and layer scales.

        The norms of blocks show that it holds any, and in the training form.
        """

        def has(pattern: str) -> bool:
            return any(re.search(pattern, key) for key in tensors)

        if not has(r"\.norm_?2\.weight$"):
            return {}
        own = self.ls_init_value
        own = LS_INIT_VALUE if own is None else own
        return {
            "mlp_norm": has(r"\.(channel_mixer\.norm_layer|mlp\.norm)\.weight$"),
            "ls_init_value": own if has(r"\.(layer_scale_\d\.gamma|gamma\d)$") else None,
        }

    def follow(self, arguments: Mapping[str, Any]) -> None:
        super().follow(arguments)
        for block in self.modules():
            if isinstance(block, Block) and "mlp_norm" in arguments:
                block.set_mlp_norm(self.mlp_norm, affine=not self.deployed)
            if isinstance(block, Block) and "ls_init_value" in arguments and not self.deployed:
                block.set_layer_scales(self.ls_init_value)
