"""TransNeXt: aggregated attention, and an MLP gated by a depthwise convolution.

Source: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers" (arXiv 2311.17132).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import DropPath, LayerNorm, LayerNorm2d
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.errors import ConfigError
from backbones.families.transnext.attention import HEAD_DIM, AggregatedAttention, CosineAttention
from backbones.layers import Chain, Head, init_by_fan_out
from backbones.skeleton import StagedBackbone, StagePlan, per_stage

EPS = 1e-6  # of the layer norms in blocks and after stages; all others have PyTorch's
AUTHORS = (
    (r"^head\.", "head.fc."),
    (r"^norm4\.", "head.norm."),
    *((rf"^norm{i}\.", f"stages.{i}.downsample.0.") for i in (1, 2, 3)),
    (r"^patch_embed1\.proj\.", "stem.0."),
    (r"^patch_embed1\.norm\.", "stem.1."),
    *((rf"^patch_embed{i + 1}\.proj\.", f"stages.{i}.downsample.1.") for i in (1, 2, 3)),
    *((rf"^patch_embed{i + 1}\.norm\.", f"stages.{i}.downsample.2.") for i in (1, 2, 3)),
    *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"\.attn\.cpb_fc(\d)\.", r".attn.cpb.fc\1."),
    (r"\.dwconv\.dwconv\.", ".conv_dw."),
)


class ConvGlu(nn.Module):
    """Convolutional GLU: ``fc2(GELU(conv_dw(u)) * g)`` with ``u, g = fc1(x)`` (section 3).

    Args:
        dim: channels in and out.
        hidden_dim: channels of each half.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim)
        self.conv_dw = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.fc1(x).chunk(2, -1)  # B H W D
        x = self.act(self.conv_dw(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # by way of B D H W
        return self.fc2(x * gate)  # B H W C


class Block(nn.Module):
    """``x += attn(norm1(x))``, ``x += mlp(norm2(x))`` on feature maps (B, C, H, W)."""

    def __init__(self, dim: int, attn: CosineAttention, mlp: ConvGlu, drop_path: float) -> None:
        super().__init__()
        self.norm1: nn.Module = LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.norm2: nn.Module = LayerNorm(dim, eps=EPS)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # B H W C
        # The branch first: a sum lies in memory as its first term, and all that follows wants
        # channels last.
        x = self.drop_path(self.attn(self.norm1(x))) + x
        x = self.drop_path(self.mlp(self.norm2(x))) + x
        return x.permute(0, 3, 1, 2)

    def reparameterize(self) -> None:
        self.attn.stack_readers()
        self.norm1 = merge.norm_into_next(self.norm1, self.attn.qkv)
        self.attn.reparameterize()
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)


class TransNeXt(StagedBackbone):
    """TransNeXt; see :class:`StagedBackbone` for the common arguments.

    It takes any size: positions and pooling follow from that of the input.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, multiples of 24.
        sr_ratios: by how much each stage's maps are pooled for attention, on each axis; 1 is
            attention to every position.
        mlp_ratios: expansion of the MLPs, of which two thirds are taken.
        pretrain_size: side of the images of the first training, by which distances are scaled, a
            multiple of 32 from 64; it stays as it is for images of another size, also in
            fine-tuning. No weight shows it or `sr_ratios`: what a checkpoint needs is known from
            its source.

    Raises:
        ConfigError: channels that are no multiples of 24, a ratio below 1, or another
            `pretrain_size`.
    """

    layouts = {"authors": AUTHORS}
    invisible_arguments = ("pretrain_size", "sr_ratios")
    no_decay_patterns = (
        r"\.query_embedding$",
        r"\.relative_pos_bias_local$",
        r"\.cpb\.",
        r"\.temperature$",
    )
    fixed_size_reason = "its position biases are computed for the size of the map"

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        sr_ratios: Sequence[int],
        mlp_ratios: PerStage[float] = (8, 8, 4, 4),
        pretrain_size: int = 224,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        if any(dim % HEAD_DIM for dim in dims):
            raise ConfigError(f"dims: {list(dims)} must be multiples of {HEAD_DIM}")
        if len(sr_ratios) != len(dims) or min(sr_ratios) < 1:
            raise ConfigError(f"sr_ratios: {list(sr_ratios)} must be {len(dims)} integers from 1")
        if pretrain_size < 64 or pretrain_size % 32:
            raise ConfigError(f"pretrain_size: {pretrain_size} must be a multiple of 32 from 64")
        self.sr_ratios = list(sr_ratios)
        self.mlp_ratios = per_stage(mlp_ratios, len(dims), "mlp_ratios")
        self.pretrain_size = pretrain_size
        self.assemble()

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return Chain(nn.Conv2d(self.in_chans, dim, 7, 4, 3), LayerNorm2d(dim, eps=1e-5))

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        """Return the norm of the stage before, which is on the path, a convolution and its norm."""
        if plan.index == 0:
            return None
        return Chain(
            LayerNorm2d(plan.in_dim, eps=EPS),
            nn.Conv2d(plan.in_dim, plan.dim, 3, plan.stride, 1),
            LayerNorm2d(plan.dim, eps=1e-5),
        )

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        dim, ratio = plan.dim, self.sr_ratios[plan.index]
        pretrain = self.pretrain_size // plan.reduction
        if ratio == 1:
            attn = CosineAttention(dim, pretrain)
        else:
            attn = AggregatedAttention(dim, ratio, pretrain)
        mlp = ConvGlu(dim, 2 * int(dim * self.mlp_ratios[plan.index]) // 3)
        return Block(dim, attn, mlp, drop_path)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        return Head(dim, maps={"norm": LayerNorm2d(dim, eps=EPS)}, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Initialize convolutions by their fan-out; `sr`, too, is one for the authors."""
        if isinstance(module, nn.Conv2d):
            init_by_fan_out(module)
        elif isinstance(module, CosineAttention):
            module.init_parameters()
        else:
            super().init_layer(module, name)
        if isinstance(module, nn.Linear) and name.endswith(".sr"):
            nn.init.normal_(module.weight, std=(2 / module.out_features) ** 0.5)

    @classmethod
    def named_arguments(cls, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the authors' model of this name."""
        found = re.search(r"transnext[_-](micro|tiny|small|base)([_-]aaaa)?", name.lower())
        if found is None:
            return {}
        if found[2]:
            return {"pretrain_size": 256, "sr_ratios": [16, 8, 4, 2]}
        return {"pretrain_size": 224, "sr_ratios": [8, 4, 2, 1]}
