"""Validation of a model, or of anything that maps images to logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.train.images import DataError

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Results on a whole split: `top1` and `top5` in percent, one row a sample in its order."""

    top1: float
    top5: float
    loss: float
    seconds: float
    logits: Tensor
    targets: Tensor

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.targets)

    @property
    def predictions(self) -> Tensor:
        """Index of the highest logit of each sample, (N,)."""
        return self.logits.argmax(dim=1)

    @property
    def correct(self) -> int:
        """Number of samples whose highest logit is the target's."""
        return int((self.predictions == self.targets).sum())


def evaluate(
    model: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]]
) -> Evaluation:
    """Run a model or an engine's runner over a split.

    Args:
        model: an `nn.Module` (run in eval mode, its mode restored) or any callable from images
            (B, C, H, W) to logits (B, classes).
        loader: batches in a fixed order, such as those of `eval_loader`.

    Raises:
        DataError: the loader is empty.
    """
    module = model if isinstance(model, nn.Module) else None
    first = next(module.parameters(), None) if module is not None else None
    device = first.device if first is not None else torch.device("cpu")
    was_training = module is not None and module.training
    if module is not None:
        module.eval()
    start = time.perf_counter()
    logits, targets = [], []
    try:
        with torch.inference_mode():
            for images, target in loader:
                logits.append(model(images.to(device)).float().cpu())
                targets.append(target)
    finally:
        if module is not None:
            module.train(was_training)
    if not logits:
        raise DataError("nothing to evaluate: the loader gave no batch")
    seconds = time.perf_counter() - start
    # Out of inference mode, so that callers may compute with the result as they like.
    scores, labels = torch.cat(logits).clone(), torch.cat(targets).clone()
    top1, top5 = accuracy(scores, labels, topk=(1, 5))
    loss = F.cross_entropy(scores, labels)
    return Evaluation(float(top1), float(top5), float(loss), seconds, scores, labels)
