"""The head's contract, written once: feature maps -> pool -> vectors -> dropout -> classifier."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from backbones import merge
from backbones.errors import UnsupportedError

__all__ = ["Head"]

AVERAGES = ("", "avg", "fast", "fastavg")  # poolings that a norm per channel may change places with
POOL_TYPES = ("avg", "max", "avgmax", "fast", "fastavg", "fastmax", "fastavgmax", "")


class Head(nn.Module):
    """Pools the last feature map and classifies it; a family only names its parts.

    Args:
        in_features: channels of the feature map (B, C, H, W) that comes in.
        num_classes: width of the classifier; 0 for none.
        pool_type: timm's name of the pooling; ``""`` keeps the feature map, and every part then
            acts at each position of it.
        drop_rate: dropout before the classifier.
        maps: parts before pooling, by name; they take (B, C, H, W).
        vectors: parts after pooling, by name; they take (..., C).
        hidden_features: channels that reach the classifier, where a part changes them.
        classifier: path of the classifier inside the head, ``"fc"`` or ``"classifier.linear"``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        maps: Mapping[str, nn.Module] | None = None,
        vectors: Mapping[str, nn.Module] | None = None,
        hidden_features: int | None = None,
        classifier: str = "fc",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_features = hidden_features or in_features
        self.classifier_name = classifier
        self.map_parts = tuple(maps or ())
        self.vector_parts = tuple(vectors or ())
        for name, part in (maps or {}).items():
            self.add_module(name, part)
        self.set_pool(pool_type)
        for name, part in (vectors or {}).items():
            self.add_module(name, part)
        self.drop = nn.Dropout(drop_rate)
        self.set_classifier(num_classes)
        # The mark of the re-parameterized form. It stands in the head because the model has no
        # `reparameterize()` that could set it: timm's walker, which should give the same model,
        # skips the root. Every model has a head, also a pruned one.
        self.deployed = False

    def set_pool(self, pool_type: str) -> None:
        """Replace the pooling.

        Raises:
            UnsupportedError: for an unknown type, or one that changes the number of channels.
        """
        if pool_type not in POOL_TYPES:
            raise UnsupportedError(
                f"global_pool={pool_type!r} is not supported; choose one of {POOL_TYPES}"
            )
        self.pool_type = pool_type
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.global_pool.train(self.training)

    def set_classifier(self, num_classes: int, **factory: Any) -> None:
        """Put a fresh classifier in place, or an identity for ``num_classes == 0``."""
        fresh: nn.Module = nn.Identity()
        if num_classes > 0:
            fresh = nn.Linear(self.num_features, num_classes, **factory)
        first, *rest = self.classifier_name.split(".")
        for name in reversed(rest):
            fresh = nn.Sequential(OrderedDict([(name, fresh)]))
        self.add_module(first, fresh)
        fresh.train(self.training)

    def get_classifier(self) -> nn.Module:
        """Return the classifier layer, an ``Identity`` where there is none."""
        return self.get_submodule(self.classifier_name)

    def classifiers(self) -> dict[str, nn.Module]:
        """Return the layers as long as there are classes, by name; the classifier first."""
        return {self.classifier_name: self.get_classifier()}

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        *,
        reset_other: bool = False,
        in_features: int | None = None,
        **factory: Any,
    ) -> None:
        """Replace the classifier and optionally the pooling.

        Args:
            num_classes: width of the new classifier; 0 for none.
            pool_type: new pooling; None keeps the current one.
            reset_other: also remove the parts before the classifier.
            in_features: channels that come in, where the body has been cut; needs `reset_other`.
            factory: device and dtype of the new parameters.
        """
        if reset_other:
            for name in (*self.map_parts, *self.vector_parts):
                delattr(self, name)
            self.map_parts = self.vector_parts = ()
            self.in_features = in_features or self.in_features
            self.num_features = self.in_features
        if pool_type is not None:
            self.set_pool(pool_type)
        self.set_classifier(num_classes, **factory)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, C, H, W) to logits (B, num_classes), or to (B, num_features) before them."""
        for name in self.map_parts:
            x = getattr(self, name)(x)
        x = self.global_pool(x)  # B C
        if not self.pool_type:
            x = x.permute(0, 2, 3, 1)  # B H W C
        for name in self.vector_parts:
            x = getattr(self, name)(x)
        x = self.drop(x)
        if not pre_logits:
            # By attribute: strict torch.export of PyTorch 2.6 records no call of get_submodule.
            x = getattr(self, self.classifier_name.split(".")[0])(x)  # B num_classes
        return x if self.pool_type else x.permute(0, 3, 1, 2)

    def reparameterize(self) -> None:
        """Fold the norms before and after pooling into the linear layers beside them."""
        merge.fold_chain(self, self.map_parts)
        if self.map_parts and not self.vector_parts and self.pool_type in AVERAGES:
            norm = getattr(self, self.map_parts[-1])
            norm = merge.map_norm_into_next(norm, (self.get_classifier(),))
            setattr(self, self.map_parts[-1], norm)
        merge.fold_chain(self, (*self.vector_parts, self.classifier_name.split(".")[0]))
        self.deployed = True
