"""A pair of heads behind one pooled feature map, for models that also learned from a teacher."""

from typing import Any

from torch import Tensor, nn

from backbones import merge
from backbones.layers import Head, VectorBatchNorm

<<<<<<< HEAD
__all__ = ["DistilledHead"]
=======
__all__ = ["DistilledHead", "VectorBatchNorm"]


class VectorBatchNorm(nn.BatchNorm1d):
    """Batch norm over the last axis of (..., C), so that feature maps may be left unpooled."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of axes."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 2:  # the older ONNX exporter makes a wrong transposition of moving nothing
            return super().forward(input)
        return super().forward(input.movedim(-1, 1)).movedim(1, -1)  # over B C ..., then B ... C
>>>>>>> main


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
