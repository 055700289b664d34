"""CPUBone: grouped fused convolutions and cheap attention, for processors with little parallelism.

Source: "CPUBone: Efficient Vision Backbone Design for Devices with Low Parallelization
Capabilities" (arXiv 2603.26425). The state dict is key for key that of timm's class.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from timm.layers import DropPath, GroupNorm1, calculate_drop_path_rates
from torch import Tensor, nn

from backbones.config import PerStage
from backbones.families.cpubone.attention import ConvAttention
from backbones.layers import Chain, Head
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, per_stage

# Where the unfused local block has norms: after expansion, after the depthwise convolution.
LocalNorms = Literal["proj", "depth_proj", "all"]
FUSED_BELOW = 256  # channels from which on a block's local branch is unfused
LOCAL_BIAS = re.compile(r"\.(?:inverted_conv|depth_conv)\.conv(?:\.1)?\.bias$")


def conv_layer(
    in_dim: int,
    dim: int,
    kernel_size: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    norm: bool = True,
    act: bool = True,
) -> Chain:
    """Return ``conv``, ``norm`` and ``act`` under these names, the latter two where asked for.

    A 3x3 kernel is padded all around. A 2x2 kernel of stride 1 sees one row of zeros on top and
    one column on the left, one of stride 2 no padding at all.
    """
    padding = kernel_size // 2 if kernel_size % 2 else 0
    conv: nn.Module = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, groups=groups, bias=bias)
    if kernel_size == 2 and stride == 1:
        conv = nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), conv)
    parts = {"conv": conv}
    if norm:
        parts["norm"] = nn.BatchNorm2d(dim)
    if act:
        parts["act"] = nn.Hardswish()
    return Chain(OrderedDict(parts))


def fused_conv(
    in_dim: int, dim: int, kernel_size: int, ratio: float, *, stride: int = 1, bias: bool = False
) -> Chain:
    """Return a spatial convolution in two groups that expands, and a pointwise projection."""
    hidden = round(in_dim * ratio)
    spatial = conv_layer(in_dim, hidden, kernel_size, stride=stride, groups=2, bias=bias)
    point = conv_layer(hidden, dim, act=False)
    return Chain(OrderedDict(spatial_conv=spatial, point_conv=point))


def unfused_conv(dim: int, ratio: float, norms: LocalNorms) -> Chain:
    """Return expansion in two groups, a depthwise 2x2 convolution and projection.

    A convolution that no norm follows has a bias instead.
    """
    hidden = round(dim * ratio)
    after_expand, after_depth = norms == "all", norms != "proj"
    return Chain(
        OrderedDict(
            inverted_conv=conv_layer(
                dim, hidden, groups=2, bias=not after_expand, norm=after_expand
            ),
            depth_conv=conv_layer(
                hidden, hidden, 2, groups=hidden, bias=not after_depth, norm=after_depth
            ),
            point_conv=conv_layer(hidden, dim, act=False),
        )
    )


class Residual(nn.Module):
    """``x + main(x)``, or ``main(x)`` alone where the shape changes."""

    def __init__(self, main: nn.Sequential, drop_path: float = 0.0, shortcut: bool = True) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return x + self.drop_path(y) if self.shortcut else y


class Block(nn.Module):
    """Attention, MLP and local convolution, each a residual branch (the CPUBone block).

    The three share one drop path rate, as in timm.
    """

    def __init__(
        self,
        dim: int,
        *,
        ratio: float,
        stride: int,
        norms: LocalNorms,
        proj_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        conv_proj = conv_layer(dim, dim, 2, stride=stride, groups=dim, act=False)
        attention = nn.Sequential(GroupNorm1(dim), ConvAttention(dim, conv_proj, stride))
        hidden = round(dim * ratio)
        mlp = Chain(
            GroupNorm1(dim),
            nn.Conv2d(dim, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, dim, 1),
            nn.Dropout(proj_drop),
        )
        if dim < FUSED_BELOW:
            local = fused_conv(dim, dim, 2, ratio, bias=True)
        else:
            local = unfused_conv(dim, ratio, norms)
        context = nn.Sequential(Residual(attention, drop_path), Residual(mlp, drop_path))
        self.total = nn.Sequential(context, Residual(local, drop_path))

    def forward(self, x: Tensor) -> Tensor:
        return self.total(x)


class CPUBone(StagedBackbone):
    """CPUBone; see :class:`StagedBackbone` for the common arguments.

    Every stage begins with a fused convolution of stride 2. The first two stages go on with fused
    convolutions, the last two with blocks of attention; the stem has half the first stage's width.

    Args:
        depths: blocks of each stage; the downsampling counts in the first two stages only.
        dims: channels of each stage.
        stem_depth: fused convolutions in the stem.
        head_dims: widths of the head's two hidden layers.
        expand_ratio: expansion of all blocks but the downsampling ones.
        downsample_ratios: expansion of each stage's downsampling.
        local_norms: norms of the unfused local branches (from 256 channels on): after projection
            only, after the depthwise convolution too, or after all three. Without the latter two
            a trained model loses its accuracy in bfloat16.
        proj_drop_rate: dropout after the MLPs.
    """

    first_conv = "stem.0.conv"
    classifier_names = ("head.classifier.linear",)
    layouts = {
        "authors": (
            (r"\.conv_proj\.0\.", ".conv_proj.conv."),
            (r"\.conv_proj\.1\.", ".conv_proj.norm."),
            (r"\.pwise\.0\.", ".pwise."),
            (r"^head\.op_list\.0\.", "head.in_conv."),
            (r"^head\.op_list\.2\.", "head.pre_classifier."),
            (r"^head\.op_list\.3\.", "head.classifier."),
            (r"^(?:backbone\.)?input_stem\.op_list\.", "stem."),
            (r"^(?:backbone\.)?stages\.(\d+)\.op_list\.", r"stages.\1."),
        )
    }

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        stem_depth: int = 0,
        head_dims: Sequence[int] = (1536, 1600),
        expand_ratio: float = 4,
        downsample_ratios: PerStage[float] = 4,
        local_norms: LocalNorms = "proj",
        proj_drop_rate: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.stem_depth = stem_depth
        self.head_dims = tuple(head_dims)
        self.expand_ratio = expand_ratio
        self.downsample_ratios = per_stage(downsample_ratios, len(dims), "downsample_ratios")
        self.block_arguments: dict[str, Any] = {
            "ratio": expand_ratio,
            "norms": local_norms,
            "proj_drop": proj_drop_rate,
        }
        rates = calculate_drop_path_rates(
            self.drop_path_rate, [stem_depth, *depths], stagewise=True
        )
        self.stem_rates, self.stage_rates = rates[0], rates[1:]
        self.assemble()

    def drop_path_rates(self) -> list[list[float]]:
        return self.stage_rates

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim // 2
        blocks = [self.build_fused(dim, rate) for rate in self.stem_rates]
        return nn.Sequential(conv_layer(self.in_chans, dim, 3, stride=2), *blocks)

    def build_stage(self, plan: StagePlan, drop_path: Sequence[float]) -> nn.Module:
        in_dim = plan.in_dim if plan.index else plan.dim // 2
        first = fused_conv(in_dim, plan.dim, 3, self.downsample_ratios[plan.index], stride=2)
        blocks: list[nn.Module] = [Residual(first, shortcut=False)]
        if plan.index < 2:
            blocks += [self.build_fused(plan.dim, rate) for rate in drop_path[1:]]
        else:
            blocks += [self.build_block(plan, j, rate) for j, rate in enumerate(drop_path)]
        return nn.Sequential(*blocks)

    def build_fused(self, dim: int, drop_path: float) -> nn.Module:
        """Return a residual fused convolution."""
        return Residual(fused_conv(dim, dim, 3, self.expand_ratio), drop_path)

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        stride = 2 if plan.index == 2 else 1
        return Block(plan.dim, stride=stride, drop_path=drop_path, **self.block_arguments)

    def build_head(self, **common: Any) -> Head:
        dim, (inner, hidden) = self.plans[-1].dim, self.head_dims
        pre_classifier = OrderedDict(
            linear=nn.Linear(inner, hidden, bias=False),
            norm=nn.LayerNorm(hidden),
            act=nn.Hardswish(),
        )
        return Head(
            dim,
            maps={"in_conv": conv_layer(dim, inner)},
            vectors={"pre_classifier": nn.Sequential(pre_classifier)},
            hidden_features=hidden,
            classifier="classifier.linear",
            **common,
        )

    def init_layer(self, module: nn.Module, name: str) -> None:
        super().init_layer(module, name)
        # As the authors train: every residual local branch begins as the identity.
        if isinstance(module, Residual) and module.shortcut and hasattr(module.main, "point_conv"):
            nn.init.zeros_(module.main.get_parameter("point_conv.norm.weight"))

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Fold the biases that the authors' bf16-robust checkpoints keep in front of a norm."""
        for bias in [key for key in tensors if LOCAL_BIAS.search(key)]:
            mean = re.sub(r"\.conv(?:\.1)?\.bias$", ".norm.running_mean", bias)
            if mean in tensors:
                tensors[mean] = tensors[mean] - tensors.pop(bias)
        return tensors
