"""A pair of heads behind one pooled feature map, for models that also learned from a teacher."""

from typing import Any

from torch import Tensor, nn

from backbones import merge
from backbones.layers import Head, VectorBatchNorm

__all__ = ["DistilledHead"]


class DistilledHead(Head):
    """Two heads, trained by labels and by a teacher; the result is the mean of both.

    With `distilled_training` set, the training forward returns (logits, logits of the second).
    """

    def __init__(self, dim: int, **common: Any) -> None:
        super().__init__(dim, vectors={"norm": VectorBatchNorm(dim)}, **common)
        self.dist: Head | None = Head(dim, vectors={"norm": VectorBatchNorm(dim)}, **common)
        self.distilled_training = False

    def reset(self, *args: Any, **options: Any) -> None:
        super().reset(*args, **options)
        if self.dist is not None:
            self.dist.reset(*args, **options)

    def classifiers(self) -> dict[str, nn.Module]:
        if self.dist is None:
            return super().classifiers()
        return {**super().classifiers(), "dist.fc": self.dist.get_classifier()}

    def forward(self, x: Tensor, pre_logits: bool = False) -> Any:
        ours = super().forward(x, pre_logits)
        if self.dist is None:
            return ours
        theirs = self.dist(x, pre_logits)
        if self.training and self.distilled_training and not pre_logits:
            return ours, theirs
        return (ours + theirs) / 2

    def reparameterize(self) -> None:
        """Fold the norms, and replace two classifiers by their mean."""
        super().reparameterize()
        if self.dist is None:
            return
        self.dist.reparameterize()
        ours, theirs = self.get_classifier(), self.dist.get_classifier()
        if isinstance(ours, nn.Linear) and isinstance(theirs, nn.Linear):
            merge.average_linear_layers(ours, theirs)
            self.dist = None
