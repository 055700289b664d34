"""Offsets per channel and biases, into the layers before or after them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backbones.merge.recording import record
from backbones.merge.values import (
    EVERY,
    Rows,
    bias_of,
    float64,
    is_unpadded,
    shift_inputs,
    store,
    take_bias,
)

__all__ = [
    "biases_into_next",
    "drop_softmax_bias",
    "shift_into_next",
    "shift_into_previous",
    "shift_together",
    "uniform_bias_into_next",
]


@torch.no_grad()
def shift_together(offset: Tensor | None, other: Tensor | None) -> None:
    """Add one of two offsets of a sum to the other. The caller removes the one added."""
    if offset is None or other is None:
        return
    offset.copy_(float64(offset) + float64(other))
    record("offset into an offset")


def shift_into_previous(linear: nn.Module, shift: Tensor | None, rows: slice = EVERY) -> None:
    """Add an offset per channel of some outputs to the bias: ``b' = b + t``.

    The offset may also stand on a sibling branch that is added to the outputs. The caller removes
    it; None is nothing to add.
    """
    if shift is None:
        return
    bias = bias_of(linear)
    bias[rows] += float64(shift).flatten()
    store(linear, None, bias)
    record("offset into a bias")


def shift_into_next(shift: Tensor | None, linear: nn.Module) -> None:
    """Fold an offset per channel into the linear layer after it: ``b' = b + W t``.

    The caller removes it; None is nothing to fold.

    Raises:
        ValueError: the layer is padded; zeros around its input would have to be shifted too.
    """
    if shift is None:
        return
    if not is_unpadded(linear):
        raise ValueError(f"an offset cannot move through {linear}: it is no unpadded linear layer")
    shift_inputs(linear, float64(shift).flatten())
    record("offset into a bias")


def drop_softmax_bias(linear: nn.Module, rows: Rows) -> None:
    """Set the bias of attention keys, or of position biases of all keys alike, to zero.

    It adds the same, ``q . b`` of keys, to all logits of a query, which the softmax takes out.
    """
    if take_bias(linear, rows) is not None:
        record("bias that softmax ignores")


def uniform_bias_into_next(linear: nn.Module, rows: Rows, after: nn.Module) -> None:
    """Move the bias of attention values into the linear layer after: ``b' = b + W t``.

    The weights of an attention sum to one, so that a constant passes through unchanged. The layer
    after it must not be padded.
    """
    if is_unpadded(after) and (taken := take_bias(linear, rows)) is not None:
        shift_inputs(after, taken)
        record("bias of attention values into the linear layer after")


def biases_into_next(
    linear: nn.Module, rows: slice, others: Sequence[nn.Module], after: nn.Module
) -> None:
    """Move biases into the layer after those whose outputs it reads side by side: ``b' = b + W t``.

    Args:
        linear: the first; what else reads its outputs keeps the other biases.
        rows: which of its outputs enter `after`.
        others: the layers whose outputs follow; they lose their biases.
        after: an unpadded linear layer; nothing is moved where it is padded.
    """
    parts = (linear, *others)
    if not is_unpadded(after) or any(part.bias is None for part in parts):
        return
    shift_inputs(after, torch.cat((bias_of(linear)[rows], *map(bias_of, others))))
    take_bias(linear, rows)
    for part in others:
        part.register_parameter("bias", None)
    record("biases into the linear layer after")
