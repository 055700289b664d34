"""PatchConvNet's head: class tokens that attend to the last map, a norm, and a classifier."""

from typing import Any

import torch
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn

from backbones import merge
from backbones.errors import UnsupportedError
from backbones.layers import Head, attend

__all__ = ["EPS", "TOKEN", "ClassTokenHead", "RowwiseLinear", "TokenPool", "Vectors"]

EPS = 1e-6
TOKEN = "token"  # the pooling of the family, by timm's name for pooling by a class token
TOKEN_MLP_RATIO = 3


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


class ClassTokenHead(Head):
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

    def classifiers(self) -> dict[str, nn.Module]:
        if not self.is_per_class:
            return super().classifiers()
        tokens: Any = self.global_pool
        return {**super().classifiers(), "global_pool.cls_token": tokens.cls_token}

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
