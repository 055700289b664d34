"""How far two computations of the same outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbones.errors import ExportError

__all__ = ["Agreement", "compare", "outputs_of"]


@dataclass(frozen=True)
class Agreement:
    """Differences of two outputs (N, ...).

    `max_error` and `mean_error` are absolute; `relative_error` is the largest difference over the
    reference's largest magnitude; `top1_agreement` is the share of rows (0 to 1) whose highest
    logit is the same; `worst` is the index of the largest difference. Of several outputs (maps of
    a pyramid) the one with the largest relative error is described; `output` is its number.
    """

    count: int
    max_error: float
    mean_error: float
    relative_error: float
    top1_agreement: float
    worst: tuple[int, ...]
    output: int = 0


def outputs_of(result: Any) -> list[Tensor]:
    """Return what a model gave, a tensor or a list of them, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def compare(reference: Tensor | Sequence[Tensor], output: Tensor | Sequence[Tensor]) -> Agreement:
    """Compare the outputs of the same inputs, in float64.

    Raises:
        ExportError: another number of outputs, other shapes, or values that are not finite.
    """
    expected, found = outputs_of(reference), outputs_of(output)
    if len(expected) != len(found):
        raise ExportError(f"there are {len(expected)} outputs and {len(found)}")
    several = [_compare(a, b, i) for i, (a, b) in enumerate(zip(expected, found))]
    return max(several, key=lambda one: one.relative_error)


def _compare(reference: Tensor, output: Tensor, number: int) -> Agreement:
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
        output=number,
    )
