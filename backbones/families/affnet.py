"""AFFNet: convolutions, and filters in the frequency domain that depend on the input.

Source: "Adaptive Frequency Filters As Efficient Global Token Mixers" (arXiv 2307.14008).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import DropPath, GroupNorm1, LayerNorm2d, make_divisible
from timm.models import checkpoint_seq
from torch import Tensor, nn

from backbones import merge
from backbones.errors import CheckpointError, ConfigError
from backbones.layers import Chain, Head, conv_norm, fx_leaf
from backbones.ops import adaptive_spectral_filter
from backbones.skeleton import Stage, StagedBackbone, StagePlan

GROUPS = 8  # of channels that a filter mixes
FILTERED = (2, 3, 4)  # stages with filters
HEAD_WIDTH = 960  # at most

AUTHORS = (
    (r"^conv_1\.", "stem."),
    (r"^conv_1x1_exp\.", "head.expand."),
    (r"^classifier\.", "head."),
    *((rf"^layer_{i + 1}\.", f"stages.{i}.blocks.") for i in (0, 1)),
    *((rf"^layer_{i + 1}\.0\.", f"stages.{i}.downsample.") for i in FILTERED),
    *((rf"^layer_{i + 1}\.1\.", f"stages.{i}.") for i in FILTERED),
    (r"\.global_rep\.\d+\.(weight|bias)$", r".norm.\1"),
    (r"\.global_rep\.", ".blocks."),
    (r"\.conv_proj\.", ".proj."),
    (r"\.exp_1x1\.", ".conv_pw."),
    (r"\.conv_3x3\.", ".conv_dw."),
    (r"\.red_1x1\.", ".conv_pwl."),
    (r"\.block\.", "."),
)

Layer = Callable[..., nn.Module]


class PixelNorm(LayerNorm2d):
    """``(x - mean) / (std + eps)`` over the channels of each position; factor and offset each."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.std(1, correction=0, keepdim=True) + self.eps)
        if self.weight is not None:
            x = x * self.weight.view(-1, 1, 1)
        return x if self.bias is None else x + self.bias.view(-1, 1, 1)


ACTS: Mapping[str, Layer] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}
NORMS: Mapping[str, Layer] = {"group": GroupNorm1, "pixel": partial(PixelNorm, eps=1e-5)}


class InvertedResidual(nn.Module):
    """Expand, convolve by channels, reduce; with a shortcut where the shape stays."""

    def __init__(
        self, in_dim: int, dim: int, ratio: float, act: Layer, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        hidden = make_divisible(round(in_dim * ratio), 8)
        self.has_shortcut = stride == 1 and in_dim == dim
        self.conv_pw = conv_norm(in_dim, hidden, 1, act=act())
        self.conv_dw = conv_norm(
            hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden, act=act()
        )
        self.conv_pwl = conv_norm(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_pwl(self.conv_dw(self.conv_pw(x)))  # B C' H' W'
        return x + y if self.has_shortcut else y


def real_weight(weight: Tensor) -> Tensor:
    """Return complex matrices (2, G, in, out) as a convolution of both parts (2G out, 2 in, 1, 1).

    The first axis of `weight` holds real and imaginary part.
    """
    real, imaginary = weight.transpose(-1, -2).unbind(0)  # G out in
    rows = torch.cat((real, -imaginary), -1), torch.cat((imaginary, real), -1)  # G out 2in
    return torch.cat(rows, 1).flatten(0, 1)[..., None, None]


def real_bias(bias: Tensor) -> Tensor:
    """Return complex numbers (2, G, out) as the bias of such a convolution, (2G out,)."""
    return bias.transpose(0, 1).flatten()


@fx_leaf
def filtered(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, act: str, threshold: float
) -> Tensor:
    """Return `x` through the filter, whose layers have complex numbers or are real convolutions."""
    if b1.ndim > 1:
        w1, w2, b1, b2 = real_weight(w1), real_weight(w2), real_bias(b1), real_bias(b2)
    return adaptive_spectral_filter(x, w1, b1, w2, b2, act, threshold)


class AdaptiveFilter(nn.Module):
    """The token mixer: ``irfft2(mask(F) * F) + x`` with ``F = rfft2(x)``.

    The mask is a perceptron of complex numbers in groups of channels, with the activation on real
    and imaginary parts and a soft threshold on what comes out.
    """

    def __init__(self, dim: int, act_layer: str, threshold: float) -> None:
        super().__init__()
        width = dim // GROUPS
        self.act_layer, self.threshold = act_layer, threshold
        self.w1 = nn.Parameter(torch.empty(2, GROUPS, width, width))
        self.b1 = nn.Parameter(torch.empty(2, GROUPS, width))
        self.w2 = nn.Parameter(torch.empty(2, GROUPS, width, width))
        self.b2 = nn.Parameter(torch.empty(2, GROUPS, width))

    def forward(self, x: Tensor) -> Tensor:
        layers = self.w1, self.b1, self.w2, self.b2
        return filtered(x, *layers, self.act_layer, self.threshold) + x  # B C H W

    def reparameterize(self) -> None:
        """Make the layers of complex numbers real convolutions."""
        if self.b1.ndim > 1:
            self.w1 = merge.function_into_parameter(self.w1, real_weight)
            self.b1 = merge.function_into_parameter(self.b1, real_bias)
            self.w2 = merge.function_into_parameter(self.w2, real_weight)
            self.b2 = merge.function_into_parameter(self.b2, real_bias)


class Block(nn.Module):
    """``x + filter(norm2(mlp(norm1(x))))``; the inner shortcuts add what the norms return."""

    def __init__(
        self, mlp: nn.Module, filter: nn.Module, norms: Sequence[nn.Module], drop_path: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.mlp, self.filter = mlp, filter
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.filter(self.norm2(self.mlp(self.norm1(x))))  # B C H W
        return x + self.drop_path(y)


class FusedStage(Stage):
    """Downsampling and blocks, then a fusion of what goes into the blocks and what comes out."""

    def __init__(
        self,
        downsample: nn.Module | None,
        blocks: Sequence[nn.Module],
        norm: Layer,
        act: Layer,
        dim: int,
    ) -> None:
        super().__init__(downsample, blocks)
        self.norm = norm(dim)
        self.proj: nn.Module = conv_norm(dim, dim, 1)
        self.fusion = conv_norm(2 * dim, dim, 1, act=act())

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        return self.join(x, self.blocks(x))

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the stage's output for what goes into the blocks and what comes out."""
        return self.fusion(torch.cat((x, self.proj(self.norm(y))), 1))  # B C H W

    def reparameterize(self) -> None:
        """Fold norm and projection into the columns of the fusion that read them."""
        merge.fold_chain(self, ("norm", "proj"))
        if isinstance(self.proj, Chain):
            conv = self.proj.conv
            self.proj = merge.linear_into_next(
                conv, self.fusion.conv, slice(conv.out_channels, None)
            )


class AFFNet(StagedBackbone):
    """AFFNet; see :class:`StagedBackbone` for the common arguments.

    Of activation, norm and threshold no weight tells anything, and the authors' code takes them
    from a configuration. That of AFFNet-ET is known at second hand, and taken for all variants.

    Args:
        depths: blocks of each stage: inverted residuals in the first two, then those with filters,
            behind one inverted residual that is not counted.
        dims: channels of each stage; multiples of 8 in the last three.
        stem_dim: channels of the stem.
        expand_ratio: expansion of the inverted residuals between and in front of stages.
        mlp_ratio: expansion of those in the blocks with filters.
        act_layer: activation of convolutions and filters.
        norm_layer: norm of the blocks with filters: over the whole map (``group``), or over the
            channels of each position (``pixel``).
        threshold: the soft threshold on filters.

    Raises:
        ConfigError: an unknown activation or norm, or channels that no 8 groups divide.
    """

    strides = (2, 2, 2, 2, 2)
    first_conv = "stem.conv"
    dilatable = True
    layouts = {"authors": AUTHORS}
    invisible_arguments = ("act_layer", "norm_layer", "threshold")
    fixed_size_reason = "its filters' transforms are those of maps of one size"

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        stem_dim: int = 16,
        expand_ratio: float = 4.0,
        mlp_ratio: float = 2.0,
        act_layer: Literal["silu", "relu", "gelu"] = "silu",
        norm_layer: Literal["group", "pixel"] = "group",
        threshold: float = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        for name, value, known in (
            ("act_layer", act_layer, ACTS),
            ("norm_layer", norm_layer, NORMS),
        ):
            if value not in known:
                raise ConfigError(f"{name}: {value!r}; possible: {', '.join(known)}")
        if any(dims[i] % GROUPS for i in FILTERED):
            raise ConfigError(
                f"dims: {list(dims)} must be multiples of {GROUPS} in stages {FILTERED}"
            )
        self.stem_dim = stem_dim
        self.expand_ratio = expand_ratio
        self.mlp_ratio = mlp_ratio
        self.act_layer, self.norm_layer, self.threshold = act_layer, norm_layer, threshold
        self._act, self._norm = ACTS[act_layer], NORMS[norm_layer]
        self.assemble()

    def build_stem(self) -> nn.Module:
        return conv_norm(self.in_chans, self.stem_dim, 3, stride=2, act=self._act())

    def build_inverted_residual(self, plan: StagePlan, first: bool) -> InvertedResidual:
        """Return an inverted residual; the first of a stage changes width and size."""
        if not first:
            return InvertedResidual(plan.dim, plan.dim, self.expand_ratio, self._act)
        in_dim, stride = (plan.in_dim, plan.stride) if plan.index else (self.stem_dim, 1)
        return InvertedResidual(
            in_dim, plan.dim, self.expand_ratio, self._act, stride, plan.first_dilation
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        return self.build_inverted_residual(plan, True) if plan.index in FILTERED else None

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        if plan.index not in FILTERED:
            return self.build_inverted_residual(plan, index == 0)
        mlp = InvertedResidual(plan.dim, plan.dim, self.mlp_ratio, self._act)
        mixer = AdaptiveFilter(plan.dim, self.act_layer, self.threshold)
        return Block(mlp, mixer, [self._norm(plan.dim) for _ in range(2)], drop_path)

    def build_stage(self, plan: StagePlan, drop_path: Sequence[float]) -> nn.Module:
        stage: Any = super().build_stage(plan, drop_path)
        if plan.index not in FILTERED:
            return stage
        return FusedStage(stage.downsample, list(stage.blocks), self._norm, self._act, plan.dim)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        width = min(4 * dim, HEAD_WIDTH)
        expand = conv_norm(dim, width, 1, act=self._act())
        return Head(dim, maps={"expand": expand}, hidden_features=width, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Keep PyTorch's convolutions, as the authors do."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, AdaptiveFilter):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.02)

    def run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and isinstance(stage, FusedStage)):
            return super().run_stage(stage, x)
        x = stage.downsample(x)
        return stage.join(x, checkpoint_seq(stage.blocks, x))

    def execution_order(self, coarse: bool = False) -> list[str]:
        patterns = super().execution_order(coarse)
        if coarse:
            return patterns
        fusion = r"(?:norm|proj|fusion)\."
        patterns = [p.replace(r"(?!blocks\.)", rf"(?!blocks\.|{fusion})") for p in patterns]
        for i, stage in enumerate(self.stages):
            if isinstance(stage, FusedStage):
                own = [j for j, p in enumerate(patterns) if p.startswith(rf"^stages\.{i}\.")]
                patterns.insert(own[-1] + 1, rf"^stages\.{i}\.{fusion}")
        return patterns

    @classmethod
    def named_arguments(cls, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return nothing, since no name tells, but refuse what no form of the model computes.

        Raises:
            CheckpointError: a file whose activations have weights: PReLU, which the authors' code
                takes where no configuration is given.
        """
        slopes = [key for key in tensors if re.search(r"\.act2?\.weight$", key)]
        if slopes:
            raise CheckpointError(
                f"{name}: {slopes[0]!r} is the slope of a PReLU, so the file is of no published"
                " model; train one with act_layer='silu', as those have it, or 'relu' or 'gelu'"
            )
        return {}
