"""How far two computations of the same logits are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.errors import ExportError

__all__ = ["Agreement", "compare"]


@dataclass(frozen=True)
class Agreement:
    """Differences of two outputs (N, classes).

    `max_error` and `mean_error` are absolute; `relative_error` is the largest difference over the
    reference's largest magnitude; `top1_agreement` is the share of rows (0 to 1) whose highest
    logit is the same; `worst` is the index of the largest difference.
    """

    count: int
    max_error: float
    mean_error: float
    relative_error: float
    top1_agreement: float
    worst: tuple[int, ...]


def compare(reference: Tensor, output: Tensor) -> Agreement:
    """Compare two outputs (N, classes) of the same inputs, in float64.

    Raises:
        ExportError: other shapes, or values that are not finite.
    """
    if reference.shape != output.shape:
        raise ExportError(
            f"the outputs have shapes {tuple(reference.shape)} and {tuple(output.shape)}"
        )
    for name, values in (("model's", reference), ("exported file's", output)):
        if not torch.isfinite(values).all():
            raise ExportError(f"the {name} output has values that are not finite")
    a, b = reference.detach().double().cpu(), output.detach().double().cpu()
    difference = (a - b).abs()
    worst = torch.unravel_index(difference.argmax(), difference.shape)
    largest = float(difference.max())
    scale = float(a.abs().max())
    return Agreement(
        count=len(a),
        max_error=largest,
        mean_error=float(difference.mean()),
        relative_error=largest / scale if scale else largest,
        top1_agreement=float((a.argmax(dim=1) == b.argmax(dim=1)).double().mean()),
        worst=tuple(int(i) for i in worst),
    )
