"""HorNet: recursive gated convolutions, with large depthwise kernels or learned global filters.

Source: "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions"
(arXiv 2207.14284), section 3.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.errors import ConfigError
from backbones.layers import (
    CONVNEXT_LAYOUT,
    PYRAMID_LAYOUT,
    Chain,
    ChannelMlp,
    Head,
    fx_leaf,
    norm_conv_downsample,
    statistics_dtype,
)
from backbones.ops import resize_filter, spectral_filter
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, per_stage

EPS = 1e-6
# With a scale of 1/3 the features' size stays about the same through the gates (section 3.1).
GATE_SCALE = 1 / 3

BLOCK = (
    (r"\.gnconv\.dwconv\.dw\.", ".gnconv.mixer.conv_dw."),
    (r"\.gnconv\.dwconv\.", ".gnconv.mixer."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
)
AUTHORS = (*CONVNEXT_LAYOUT, *BLOCK)
MMPRETRAIN = (
    (r"^backbone\.", ""),
    *PYRAMID_LAYOUT,
    (r"^norm3\.", "head.norm."),
    (r"\.gnconv\.projs\.", ".gnconv.pws."),
    (r"\.gamma(\d)\.weight$", r".gamma\1"),
    *BLOCK,
)

apply_spectral_filter = fx_leaf(spectral_filter)


def of_block(value: Any, index: int) -> Any:
    """Return a block's share of its stage's value: the value itself, or a list's next item."""
    return value[index % len(value)] if isinstance(value, (list, tuple)) else value


class GlobalLocalFilter(nn.Module):
    """Half of the channels through a 3x3 convolution, half through a global filter (section 3.2).

    The global filter multiplies the spectrum over height and width, that is, it convolves with a
    learned kernel as large as the feature map, circularly. The halves come out interleaved: local
    0, global 0, local 1, ...

    Args:
        dim: number of channels.
        filter_size: rows and columns of the filter: those of ``rfft2`` of the feature map it is
            made for. It is resized to the spectrum of any other.
    """

    def __init__(self, dim: int, filter_size: Sequence[int]) -> None:
        super().__init__()
        half = dim // 2
        self.pre_norm = LayerNorm2d(dim, eps=EPS)
        self.conv_dw = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(half, *filter_size, 2))
        self.post_norm = LayerNorm2d(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        local, spread = self.pre_norm(x).chunk(2, dim=1)  # torch.fx unpacks into names only
        return self.mix(local, spread)  # B C H W, of two times B C/2 H W

    def mix(self, local: Tensor, spread: Tensor) -> Tensor:
        """Return the output for the halves of the normalized input."""
        spread = apply_spectral_filter(spread, self.complex_weight)
        local = self.conv_dw(local).to(spread.dtype)  # autocast may leave them in two types
        pairs = torch.stack((local, spread), dim=2)  # B C/2 2 H W
        return self.post_norm(pairs.flatten(1, 2))  # B C H W


class GatedConv(nn.Module):
    """The recursive gated convolution ("gnConv", section 3.1, equations 3.4 and 3.5).

    A projection gives a first factor and `order` gates of doubling width; the gates see their
    neighborhood through the mixer. Each step multiplies with the next gate and projects to the
    width of the one after it.

    Args:
        dim: number of channels.
        order: number of gates; the last is `dim` wide.
        filter_size: see :class:`GlobalLocalFilter`; None for a 7x7 depthwise convolution.
    """

    def __init__(self, dim: int, order: int, filter_size: Sequence[int] | None) -> None:
        super().__init__()
        self.dims = [dim // 2**i for i in reversed(range(order))]
        gates = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, self.dims[0] + gates, 1)
        if filter_size is None:
            self.mixer: nn.Conv2d | GlobalLocalFilter = nn.Conv2d(
                gates, gates, 7, padding=3, groups=gates
            )
        else:
            self.mixer = GlobalLocalFilter(gates, filter_size)
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.dims, self.dims[1:]))
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.scale = GATE_SCALE

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.proj_in(x).split((self.dims[0], sum(self.dims)), dim=1)
        gates = self.mixer(rest)
        if self.scale != 1:
            gates = gates * self.scale
        gates = gates.split(self.dims, dim=1)  # B C/4 H W, B C/2 H W, B C H W for order 3
        y = first * gates[0]
        for i, project in enumerate(self.pws):
            y = project(y) * gates[i + 1]  # twice the channels, at last B C H W
        return self.proj_out(y)

    def reparameterize(self) -> None:
        """Fold the gates' scale into what computes them."""
        if isinstance(self.mixer, nn.Conv2d):
            self.scale = merge.factor_into_outputs(self.mixer, self.scale)
        else:
            self.scale = merge.factor_into_norm(self.mixer.post_norm, self.scale)


class Block(nn.Module):
    """``x + gamma1 * gnconv(norm1(x))``, then ``x + gamma2 * mlp(norm2(x))`` (figure 2)."""

    def __init__(self, dim: int, gnconv: GatedConv, ls_init_value: float, drop_path: float) -> None:
        super().__init__()
        self.norm1: nn.Module = LayerNorm2d(dim, eps=EPS)
        self.gnconv = gnconv
        self.gamma1: nn.Parameter | None = nn.Parameter(torch.full((dim,), ls_init_value))
        self.norm2: nn.Module = LayerNorm(dim, eps=EPS)
        self.mlp = ChannelMlp(dim, 4 * dim)
        self.gamma2: nn.Parameter | None = nn.Parameter(torch.full((dim,), ls_init_value))
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.gnconv(self.norm1(x))
        if self.gamma1 is not None:
            y = y * self.gamma1.view(1, -1, 1, 1)
        x = x + self.drop_path1(y)
        y = self.mlp(self.norm2(x.permute(0, 2, 3, 1)))  # B H W C
        if self.gamma2 is not None:
            y = y * self.gamma2
        return x + self.drop_path2(y.permute(0, 3, 1, 2))  # B C H W

    def reparameterize(self) -> None:
        self.gnconv.reparameterize()
        self.norm1 = merge.norm_into_next(self.norm1, self.gnconv.proj_in)
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)
        merge.scale_into_previous(self.gnconv.proj_out, self.gamma1)
        merge.scale_into_previous(self.mlp.fc2, self.gamma2)
        self.gamma1 = self.gamma2 = None


class HorNet(StagedBackbone):
    """HorNet; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        orders: gates of the gated convolution.
        mixers: what the gates see their neighborhood with: a 7x7 depthwise convolution
            (``dwconv``) or the global and local filter (``gf``).
        filter_sizes: (rows, columns) of the global filters of each stage, None without one. The
            spectrum of an h x w map has h rows and w // 2 + 1 columns.
        ls_init_value: initial layer scale.

    Raises:
        ConfigError: an unknown mixer, a ``gf`` stage without filter size, or more gates than the
            width allows.
    """

    layouts = {"authors": AUTHORS, "mmpretrain": MMPRETRAIN}

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        orders: PerStage[int] = (2, 3, 4, 5),
        mixers: PerStage[Literal["dwconv", "gf"]] = "dwconv",
        filter_sizes: Sequence[Sequence[int] | None] = (None, None, (14, 8), (7, 4)),
        ls_init_value: float = 1e-6,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.orders = per_stage(orders, len(dims), "orders")
        self.mixers = per_stage(mixers, len(dims), "mixers")
        self.filter_sizes = per_stage(filter_sizes, len(dims), "filter_sizes")
        self.ls_init_value = ls_init_value
        self.assemble()
        if any(isinstance(module, GlobalLocalFilter) for module in self.modules()):
            self.fixed_size_reason = "its filters are resized to the spectrum of the map"

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return Chain(nn.Conv2d(self.in_chans, dim, 4, stride=4), LayerNorm2d(dim, eps=EPS))

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        if plan.index == 0:
            return None
        return norm_conv_downsample(LayerNorm2d(plan.in_dim, eps=EPS), plan.in_dim, plan.dim)

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        order = of_block(self.orders[plan.index], index)
        mixer = of_block(self.mixers[plan.index], index)
        filter_size = self.filter_sizes[plan.index] if mixer == "gf" else None
        if mixer not in ("dwconv", "gf"):
            raise ConfigError(f"mixers: no mixer {mixer!r}; possible: 'dwconv' and 'gf'")
        if mixer == "gf" and (filter_size is None or len(filter_size) != 2):
            raise ConfigError(
                f"filter_sizes: stage {plan.index} has the mixer 'gf' and needs (rows, columns),"
                f" not {filter_size}"
            )
        if order < 1 or plan.dim % 2**order:
            raise ConfigError(
                f"orders: {plan.dim} channels of stage {plan.index} cannot be halved {order} times"
            )
        gnconv = GatedConv(plan.dim, order, filter_size)
        return Block(plan.dim, gnconv, self.ls_init_value, drop_path)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        return Head(dim, vectors={"norm": LayerNorm(dim, eps=EPS)}, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        super().init_layer(module, name)
        if isinstance(module, GlobalLocalFilter):
            trunc_normal_(module.complex_weight, std=0.02)

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Resize global filters that were trained at another input size, as the authors do."""
        filters = {k: p for k, p in self.named_parameters() if k.endswith(".complex_weight")}
        for key in filters.keys() & tensors.keys():
            given, (rows, columns) = tensors[key], filters[key].shape[1:3]
            if given.ndim == 4:
                # the narrowest map whose half spectrum has that many columns
                given = given.to(statistics_dtype(given))
                tensors[key] = resize_filter(given, (rows, 2 * columns - 2))
        return tensors
