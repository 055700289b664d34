"""Factors per channel, into linear layers, parameters and norms."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backbones.merge.recording import record
from backbones.merge.values import EVERY, Rows, bias_of, float64, scale_outputs

__all__ = [
    "factor_into_norm",
    "factor_into_outputs",
    "function_into_parameter",
    "scale_into_directions",
    "scale_into_previous",
    "scale_parameter",
]


def scale_into_previous(linear: nn.Module, scale: Tensor | None, rows: slice = EVERY) -> None:
    """Fold a factor per channel on some outputs into the linear layer before it.

    ``W' = s W``, ``b' = s b``. The caller removes the factor; None is nothing to fold.
    """
    if scale is None:
        return
    scale_outputs(linear, float64(scale).flatten(), rows)
    record("layer scale into the linear layer before")


@torch.no_grad()
def scale_parameter(parameter: Tensor, scale: Tensor, rows: slice = EVERY) -> None:
    """Fold a factor per channel into some entries of a factor or offset before it."""
    parameter[rows] = (float64(parameter[rows]) * float64(scale)).to(parameter.dtype)


def function_into_parameter(
    parameter: nn.Parameter, function: Callable[[Tensor], Tensor]
) -> nn.Parameter:
    """Return what a function makes of a parameter, as a parameter that takes its place."""
    record("function of a parameter into a parameter")
    value = function(float64(parameter)).to(parameter.device, parameter.dtype)
    return nn.Parameter(value, parameter.requires_grad)


@torch.no_grad()
def scale_into_directions(vectors: Tensor, scale: Tensor) -> None:
    """Turn vectors (..., C), of which only directions count, into ``scale * v / ||v||``.

    A vector of zeros stays one. The caller removes the factor, and no longer divides by lengths.
    """
    wide = float64(vectors)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    vectors.copy_(wide / length * float64(scale))
    record("factor into directions")


def factor_into_outputs(linear: nn.Module, factor: float, rows: Rows = EVERY) -> float:
    """Fold a constant factor on some outputs into their rows. Returns 1.0, its replacement."""
    if factor != 1.0:
        scale_outputs(linear, bias_of(linear).new_full((1,), factor), rows)
        record("constant factor into the linear layer before")
    return 1.0


def factor_into_norm(norm: nn.LayerNorm, factor: float) -> float:
    """Fold a constant factor into the parameters of the norm before it. Returns 1.0."""
    if factor != 1.0:
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(float64(parameter) * factor)
        record("constant factor into the norm before")
    return 1.0
