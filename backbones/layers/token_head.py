"""Heads with a norm before pooling, and for token labelling with a classifier of tokens."""

from typing import Any

from torch import Tensor, nn

from backbones import merge
from backbones.layers.head import AVERAGES, Head

__all__ = ["NormHead", "TokenHead"]


class NormHead(Head):
    """Batch norm of the feature map, pooling, and a classifier."""

    norm: nn.Module
    fc: nn.Module

    def __init__(self, dim: int, **common: Any) -> None:
        super().__init__(dim, maps={"norm": nn.BatchNorm2d(dim)}, **common)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Any:
        # Attention leaves maps token by token in memory, for which the forward-mode derivative of
        # the gradient of PyTorch's batch norm is wrong (2.14).
        return super().forward(x.contiguous(), pre_logits)

    def reparameterize(self) -> None:
        """Fold the norm into what reads the averages of its outputs."""
        if self.map_parts and self.pool_type in AVERAGES:
            self.norm = merge.map_norm_into_next(self.norm, tuple(self.classifiers().values()))
        self.deployed = True


class TokenHead(NormHead):
    """The head of models trained by token labelling: half the best token's logits are added.

    ``fc(mean(norm(x))) + 0.5 * max over tokens of token_fc(norm(x))``. Source: the code of "All
    Tokens Matter: Token Labeling for Training Better Vision Transformers" (arXiv 2104.10858).
    A map that is left unpooled, and what enters the classifier, know the first part only.

    With `token_training` set, the training forward returns (logits of the mean, logits of each
    token), (B, num_classes) and (B, N, num_classes).
    """

    def __init__(self, dim: int, num_classes: int, **common: Any) -> None:
        super().__init__(dim, num_classes=num_classes, **common)
        self.token_weight = 0.5
        self.token_training = False
        self.set_token_classifier(num_classes)

    def set_token_classifier(self, num_classes: int, **factory: Any) -> None:
        """Put a fresh classifier of tokens in place, or an identity for ``num_classes == 0``."""
        fresh: nn.Module = nn.Identity()
        if num_classes > 0:
            fresh = nn.Linear(self.num_features, num_classes, **factory)
        self.token_fc = fresh.train(self.training)

    def classifiers(self) -> dict[str, nn.Module]:
        return {**super().classifiers(), "token_fc": self.token_fc}

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        *,
        reset_other: bool = False,
        in_features: int | None = None,
        **factory: Any,
    ) -> None:
        super().reset(
            num_classes, pool_type, reset_other=reset_other, in_features=in_features, **factory
        )
        self.set_token_classifier(num_classes, **factory)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Any:
        if pre_logits or not self.pool_type or isinstance(self.token_fc, nn.Identity):
            return super().forward(x, pre_logits)
        logits, tokens = self.both(x)
        if self.training and self.token_training:
            return logits, tokens
        best = tokens.amax(1)
        return logits + (best if self.token_weight == 1 else self.token_weight * best)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the logits of the mean and of each token, (B, N, num_classes)."""
        x = x.contiguous()  # as above
        for name in self.map_parts:
            x = getattr(self, name)(x)  # B C H W
        logits = self.fc(self.drop(self.global_pool(x)))  # B num_classes
        return logits, self.token_fc(x.flatten(2).transpose(1, 2))

    def reparameterize(self) -> None:
        super().reparameterize()
        if isinstance(self.token_fc, nn.Linear):
            self.token_weight = merge.factor_into_outputs(self.token_fc, self.token_weight)
