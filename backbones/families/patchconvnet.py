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
from timm.layers import DropPath, LayerNorm, LayerNorm2d, Mlp, SqueezeExcite, trunc_normal_
from torch import Tensor, nn

from backbones import merge
from backbones.errors import CheckpointError, ConfigError, UnsupportedError
from backbones.layers import Head, attend
from backbones.skeleton import StagedBackbone, StagePlan, Tensors

EPS = 1e-6
TOKEN = "token"  # the pooling of the family, by timm's name for pooling by a class token
TOKEN_MLP_RATIO = 3


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


class Vectors(nn.Module):
    """Learned vectors, ``weight`` (K, C)."""

    def __init__(self, count: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, dim, **factory))


class TokenPool(nn.Module):
    """Class tokens that attend to a feature map once and pass an MLP, (B, C, H, W) to (B, C).

    Source: the paper's attention-based aggregation, and the authors' code. Attention has one head
    of all channels. A single token is among its own keys. With a token per class (K classes) the
    keys are the map alone, and the result is (B, K, C).

    Once merged, the tokens do not pass `norm1` and `q` any more: what they ask for is `query`, and
    the key of the single token is `row`; keys and values are the normalized map itself.

    Args:
        dim: channels C.
        init_value: initial layer scales.
        per_class: a token per class; :meth:`set_classes` says how many.
        drop_rate: dropout after `proj`, and after both layers of the MLP.
    """

    def __init__(self, dim: int, init_value: float, per_class: bool, drop_rate: float) -> None:
        super().__init__()
        self.per_class = per_class
        self.scale = dim**-0.5
        self.cls_token: Any = nn.Identity() if per_class else Vectors(1, dim)
        self.norm1: Any = LayerNorm(dim, eps=EPS)
        self.q: Any = nn.Linear(dim, dim)
        self.k: Any = nn.Linear(dim, dim)
        self.v: Any = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)
        self.gamma1: nn.Parameter | None = nn.Parameter(torch.full((dim,), init_value))
        self.norm2: nn.Module = LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, TOKEN_MLP_RATIO * dim, drop=drop_rate)
        self.gamma2: nn.Parameter | None = nn.Parameter(torch.full((dim,), init_value))
        self.query: nn.Parameter | None = None  # K C
        self.row: nn.Parameter | None = None  # 1 C

    def set_classes(self, count: int, **factory: Any) -> None:
        """Put a fresh token for each class in place; none for a count of 0.

        Raises:
            UnsupportedError: the tokens have been merged into the attention.
        """
        if self.query is not None and count:
            raise UnsupportedError(
                "the class tokens are merged into the attention; set the number of classes first"
                " and re-parameterize afterwards"
            )
        dim = self.proj.in_features
        fresh = Vectors(count, dim, **factory) if count else nn.Identity()
        self.cls_token = fresh.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x.flatten(2).transpose(1, 2))  # B C H W to B N C
        token = self.cls_token.weight  # K C
        query: Any = self.query
        row: Any = self.row
        if query is None:
            row = self.norm1(token)
            query = self.q(row)  # K C
        if not self.per_class:
            x = torch.cat((row.expand(x.shape[0], -1, -1), x), dim=1)  # B 1+N C
        query = query.expand(x.shape[0], 1, -1, -1)  # B 1 K C
        mixed = attend(query, self.k(x).unsqueeze(1), self.v(x).unsqueeze(1), self.scale)
        y = self.proj_drop(self.proj(mixed.squeeze(1)))  # B K C
        token = token + (y if self.gamma1 is None else y * self.gamma1)
        y = self.mlp(self.norm2(token))
        token = token + (y if self.gamma2 is None else y * self.gamma2)
        return token if self.per_class else token.squeeze(1)

    def reparameterize(self) -> None:
        """Make the constant query one vector a token, and project the values after averaging."""
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)
        merge.scale_into_previous(self.mlp.fc2, self.gamma2)
        self.gamma2 = None
        if self.query is not None or isinstance(self.cls_token, nn.Identity):
            return
        token = self.cls_token.weight
        self.norm1 = merge.norm_into_next(self.norm1, self.q, self.k, self.v)
        self.scale = merge.factor_into_outputs(self.q, self.scale)
        # The weights of an attention sum to one: it averages.
        merge.linear_into_next(self.v, self.proj)
        merge.scale_into_previous(self.proj, self.gamma1)
        row = merge.norm_of_constant(self.norm1, token)
        self.query = merge.constant_query_into_keys(row, self.q, self.k)
        self.row = None if self.per_class else row
        merge.shift_together(token, self.proj.bias)
        self.q = self.k = self.v = nn.Identity()
        self.gamma1 = None
        self.proj.register_parameter("bias", None)


class RowwiseLinear(nn.Module):
    """A classifier that gives each class a vector of its own, (B, K, C) to logits (B, K)."""

    def __init__(self, dim: int, num_classes: int, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = dim, num_classes
        self.weight = nn.Parameter(torch.zeros(num_classes, dim, **factory))
        self.bias = nn.Parameter(torch.zeros(num_classes, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1) + self.bias

    def as_linear(self) -> nn.Linear:
        """Return a linear layer with the same parameters, which merges in the same way."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


class TokenHead(Head):
    """Pooling by class tokens, a layer norm and the classifier; or any other pooling before these.

    With a token per class there is no one vector that enters the classifier. What stands for it,
    also where there are no classes, is the norm of the map's mean.

    Args:
        dim: channels of the feature map (B, C, H, W) that comes in.
        num_classes: width of the classifier; 0 for none.
        pool_type: ``"token"``, or timm's name of a pooling without parameters.
        init_value: initial layer scales.
        per_class: a token per class.
        drop_rate: dropout inside of pooling by tokens; before the classifier with any other.
    """

    norm: nn.Module

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        pool_type: str,
        init_value: float,
        per_class: bool,
        drop_rate: float,
    ) -> None:
        norm = LayerNorm(dim, eps=EPS)
        by_token = pool_type == TOKEN
        rate = 0.0 if by_token else drop_rate
        plain = "avg" if by_token else pool_type
        super().__init__(dim, num_classes, pool_type=plain, drop_rate=rate, vectors={"norm": norm})
        if by_token:
            self.global_pool: nn.Module = TokenPool(dim, init_value, per_class, drop_rate)
            self.pool_type = TOKEN
            self.set_classifier(num_classes)

    @property
    def is_per_class(self) -> bool:
        """Whether each class has a vector of its own."""
        return isinstance(self.global_pool, TokenPool) and self.global_pool.per_class

    def set_pool(self, pool_type: str) -> None:
        if pool_type != TOKEN:
            super().set_pool(pool_type)
        elif self.pool_type != TOKEN:
            raise UnsupportedError(
                "global_pool='token': the head has no class token any more, since another pooling"
                " was chosen; create the model with global_pool='token'"
            )

    def set_classifier(self, num_classes: int, **factory: Any) -> None:
        if not self.is_per_class:
            super().set_classifier(num_classes, **factory)
            return
        pool: Any = self.global_pool
        pool.set_classes(num_classes, **factory)
        fresh: nn.Module = nn.Identity()
        if num_classes:
            fresh = RowwiseLinear(self.num_features, num_classes, **factory)
        self.fc = fresh.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.is_per_class:
            return super().forward(x, pre_logits)
        if pre_logits or isinstance(self.fc, nn.Identity):
            return self.norm(x.mean((2, 3)))  # B C
        return self.fc(self.norm(self.global_pool(x)))  # B K C to B K

    def reparameterize(self) -> None:
        super().reparameterize()
        if isinstance(self.fc, RowwiseLinear):
            self.norm = merge.norm_into_next(self.norm, self.fc.as_linear())


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
        token_per_class: a class token for each class instead of one; see :class:`TokenHead`.
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
        return TokenHead(dim, init_value=init_value, per_class=self.token_per_class, **common)

    def drop_path_rates(self) -> list[list[float]]:
        """Return the same rate for every block, by stage."""
        return [[self.drop_path_rate] * plan.depth for plan in self.plans]

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Keep PyTorch's convolutions, as the authors do."""
        if isinstance(module, nn.Linear):
            super().init_layer(module, name)
        elif isinstance(module, (Vectors, RowwiseLinear)):
            trunc_normal_(module.weight, std=0.02)

    def get_classifier(self) -> Any:
        """Return the classifier layer; with a token per class a pair, the tokens second."""
        layers = tuple(map(self.get_submodule, self.classifier_names))
        return layers if len(layers) > 1 else layers[0]

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        super().reset_classifier(num_classes, global_pool, reset_other)
        self.name_classifiers()
        for name in self.classifier_names[1:]:
            self.init_layer(self.get_submodule(name), name)

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
