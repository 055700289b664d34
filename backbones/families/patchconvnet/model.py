"""PatchConvNet: blocks of one size, and pooling by a class token that attends to the last map.

Source: "Augmenting Convolutional networks with attention-based aggregation" (arXiv 2112.13692)
and the authors' code.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, trunc_normal_
from torch import Tensor, nn

from backbones import merge
from backbones.errors import CheckpointError, ConfigError
from backbones.families.patchconvnet.head import EPS, TOKEN, ClassTokenHead, RowwiseLinear, Vectors
from backbones.layers import Head
from backbones.skeleton import StagedBackbone, StagePlan, Tensors


class Block(nn.Module):
    """``x + gamma * conv_pwl(se(act(conv_dw(act(conv_pw(norm(x)))))))``, all of equal width.

    It has no second branch. Source: the paper's column of blocks, and the authors' code.
    """

    def __init__(self, dim: int, init_value: float, drop_path: float) -> None:
        super().__init__()
        self.norm: nn.Module = LayerNorm2d(dim, eps=EPS)
        self.conv_pw = nn.Conv2d(dim, dim, 1)
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.se = SqueezeExcite(dim, rd_channels=dim // 4)
        self.conv_pwl = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((dim,), init_value))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv_dw(self.act(self.conv_pw(self.norm(x)))))
        y = self.conv_pwl(self.se(y))  # B C H W
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        self.norm = merge.norm_into_next(self.norm, self.conv_pw)
        merge.scale_into_previous(self.conv_pwl, self.gamma)
        self.gamma = None


def from_authors(tensors: Tensors, model: Any) -> Tensors:
    """Rename the authors' keys; they count blocks through, and have a layer for each class."""
    rules = (
        (r"^patch_embed\.proj\.(\d)\.0\.", r"stem.\1."),
        (r"^blocks_token_only\.0\.(?:attn\.(?=[qkvp]))?", "head.global_pool."),
        (r"^cls_token$", "head.global_pool.cls_token.weight"),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        (r"^(stages\..*)\.gamma_1$", r"\1.gamma"),
        (r"^(stages\..*)\.norm1\.", r"\1.norm."),
        (r"\.attn\.qkv_pos\.0\.", ".conv_pw."),
        (r"\.attn\.qkv_pos\.2\.", ".conv_dw."),
        (r"\.attn\.qkv_pos\.4\.conv_reduce\.", ".se.fc1."),
        (r"\.attn\.qkv_pos\.4\.conv_expand\.", ".se.fc2."),
        (r"\.attn\.qkv_pos\.5\.", ".conv_pwl."),
        (r"\.gamma_(\d)$", r".gamma\1"),
    )
    ends = list(accumulate(plan.depth for plan in model.plans))

    def place(match: re.Match[str]) -> str:
        index = int(match[1])
        stage = bisect_right(ends, index)
        if stage == len(ends):
            return match[0]  # of a deeper model
        start = ends[stage - 1] if stage else 0
        return f"stages.{stage}.blocks.{index - start}."

    renamed: Tensors = {}
    for key, tensor in tensors.items():
        key = re.sub(r"^blocks\.(\d+)\.", place, key)
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        is_token = key == "head.global_pool.cls_token.weight" and tensor.ndim == 3
        renamed[key] = tensor.flatten(0, 1) if is_token else tensor
    for part in ("weight", "bias"):
        keys = [key for key in renamed if re.fullmatch(rf"head\.\d+\.{part}", key)]
        in_order = [f"head.{i}.{part}" for i in range(len(keys))]
        if keys and set(keys) == set(in_order):
            renamed[f"head.fc.{part}"] = torch.cat([renamed.pop(key) for key in in_order])
    return renamed


class PatchConvNet(StagedBackbone):
    """PatchConvNet; see :class:`StagedBackbone` for the common arguments.

    All feature maps have stride 16 and the same channels. The four stages are depths, not
    resolutions: `out_indices` 0 to 3 are the maps after the blocks of the first, of the first two,
    three and all four of `depths`. The last is what the authors pool.

    Args:
        depths: blocks of each of four stages.
        dims: channels of each stage: four times the same multiple of 8.
        ls_init_value: initial layer scales.
        token_per_class: a class token for each class instead of one; see :class:`ClassTokenHead`.
        global_pool: ``"token"`` for the learned pooling; timm's other names drop it.

    Raises:
        ConfigError: channels that are no multiple of 8, or differ.
    """

    strides = (16, 1, 1, 1)
    layouts = {"authors": from_authors}
    no_decay_patterns = (r"\.cls_token\.weight$",)

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        ls_init_value: float = 1e-6,
        token_per_class: bool = False,
        global_pool: str = TOKEN,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, global_pool=global_pool, **common)
        if len({*dims}) > 1 or dims[0] < 8 or dims[0] % 8:
            raise ConfigError(f"dims: {list(dims)} must be one multiple of 8 for all stages")
        self.ls_init_value = ls_init_value
        self.token_per_class = token_per_class
        self.assemble()
        self.name_classifiers()

    @classmethod
    def classifiers(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        by_token = arguments.get("global_pool", TOKEN) == TOKEN
        tokens = by_token and arguments.get("token_per_class")
        return ("head.fc", "head.global_pool.cls_token") if tokens else ("head.fc",)

    def name_classifiers(self) -> None:
        """Name the layers of the head as it is now that are as long as there are classes."""
        now = {"token_per_class": self.token_per_class, "global_pool": self.head.pool_type}
        self.classifier_names = self.classifiers(now)

    def build_stem(self) -> nn.Module:
        """Return four convolutions of stride 2, without biases or norms."""
        dims = [self.in_chans, *(self.plans[0].dim // factor for factor in (8, 4, 2, 1))]
        parts: list[nn.Module] = []
        for in_dim, dim in pairwise(dims):
            parts += [nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False), nn.GELU()]
        return nn.Sequential(*parts[:-1])

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        return None

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        return Block(plan.dim, self.ls_init_value, drop_path)

    def build_head(self, **common: Any) -> Head:
        dim, init_value = self.plans[-1].dim, self.ls_init_value
        return ClassTokenHead(dim, init_value=init_value, per_class=self.token_per_class, **common)

    def drop_path_rates(self) -> list[list[float]]:
        """Return the same rate for every block, by stage."""
        return [[self.drop_path_rate] * plan.depth for plan in self.plans]

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Keep PyTorch's convolutions, as the authors do."""
        if isinstance(module, nn.Linear):
            super().init_layer(module, name)
        elif isinstance(module, (Vectors, RowwiseLinear)):
            trunc_normal_(module.weight, std=0.02)

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        super().reset_classifier(num_classes, global_pool, reset_other)
        self.name_classifiers()

    def expected_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the whole model, which pools by tokens."""
        whole = {**self.arguments, "global_pool": TOKEN}
        if self.token_per_class:
            whole["num_classes"] = self.num_classes or 1
        twin = type(self)(**whole, device="meta")
        return {key: value.shape for key, value in twin.state_dict().items()}

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Refuse a file with one class token for a model with one per class.

        Raises:
            CheckpointError: it is one.
        """
        names = ("head.global_pool.cls_token.weight", "head.fc.weight")
        tokens, classes = (len(tensors[name]) if name in tensors else 0 for name in names)
        if self.token_per_class and tokens == 1 < classes:
            raise CheckpointError(
                "the file has one class token and the model one per class; create the variant"
                " without _multi"
            )
        return tensors
