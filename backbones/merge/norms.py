"""Norms, into the linear layers beside them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, RmsNorm2d
from torch import Tensor, nn

from backbones.merge.recording import record
from backbones.merge.values import (
    as_column,
    bias_of,
    float64,
    input_values,
    is_linear_layer,
    is_unpadded,
    require,
    shift_inputs,
    store,
    weight_of,
)

__all__ = [
    "center_outputs",
    "fold_chain",
    "map_norm_into_next",
    "norm_into_next",
    "norm_into_previous",
    "norm_into_shortcut",
    "norm_of_constant",
]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def norm_into_previous(linear: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold a batch norm into the linear layer before it: ``W' = s W``, ``b' = s b + t``.

    Holds with any padding, since the norm acts on the layer's outputs. A one-dimensional norm must
    act on the features of an ``nn.Linear``, not on another axis of (B, C, L).

    Returns:
        What takes the norm's place: an identity, or the norm where it was not folded.
    """
    if not _acts_on_outputs(norm, linear) or not isinstance(norm, BATCH_NORMS):
        return norm
    scale, shift = _affine(norm)
    weight, bias = weight_of(linear), bias_of(linear)
    store(linear, weight * as_column(scale, weight.ndim), bias * scale + shift)
    record("norm into the linear layer before")
    return nn.Identity()


def norm_into_next(norm: nn.Module, *linears: nn.Module) -> nn.Module:
    """Fold a norm's factor and offset into the layers after it: ``W' = W s``, ``b' = b + W t``.

    Holds for an ``nn.Linear`` and for a convolution without padding: zeros around the normalized
    feature map are not what the layer before the norm would have there. The layers are all that
    read the norm; averages over positions may stand between, since an offset passes them.

    Returns:
        What takes the norm's place: an identity for a batch norm, the norm without parameters for
        a layer, group or root mean square norm, or the norm where it was not folded.
    """
    if not all(_acts_on_outputs(norm, one) and is_unpadded(one) for one in linears):
        return norm
    batch = isinstance(norm, BATCH_NORMS)
    if not batch and norm.weight is None and getattr(norm, "bias", None) is None:
        return norm
    record("norm into the linear layer after")
    return _fold_into_all(norm, linears)


def map_norm_into_next(norm: nn.Module, linears: Sequence[nn.Module]) -> nn.Module:
    """Fold a norm of a feature map (B, C, H, W) into what reads the map by positions.

    The layers act on its channels at every position, or on their average over positions, with which
    a factor and an offset per channel may change places: ``W' = W s``, ``b' = b + W t`` in each.

    Returns:
        An identity for a batch norm, the norm without parameters for a layer or group norm; or the
        norm, where it is none of these or not all that reads it is an ``nn.Linear``.
    """
    batch = isinstance(norm, nn.BatchNorm2d)
    if (not batch and not isinstance(norm, (LayerNorm2d, nn.GroupNorm))) or _has_activation(norm):
        return norm
    if any(type(one) is not nn.Linear for one in linears):
        return norm
    if not batch and norm.weight is None and norm.bias is None:
        return norm
    record("norm of a feature map into the linear layers after")
    return _fold_into_all(norm, linears)


def norm_into_shortcut(norm: nn.Module, scale: Tensor, branch: nn.Module) -> nn.Parameter:
    """Turn ``x + g n(x)`` into one factor on x: ``k = 1 + g s``; ``g t`` goes into a bias.

    Args:
        norm: the batch norm n; it stays for what else reads it.
        scale: the layer scale g, (C,).
        branch: a linear layer whose outputs are added to the sum.

    Returns:
        The factor k, (C,).
    """
    factor, shift = _affine(norm)
    wide = float64(scale).flatten()
    store(branch, None, bias_of(branch) + wide * shift)
    record("norm on a shortcut into a factor")
    return nn.Parameter((1 + wide * factor).to(scale.device, scale.dtype), scale.requires_grad)


def norm_of_constant(norm: nn.LayerNorm, vectors: Tensor) -> nn.Parameter:
    """Return the layer norm of vectors (..., C) that are the same for every input."""
    normalized = F.layer_norm(float64(vectors), norm.normalized_shape, eps=norm.eps)
    if norm.weight is not None or norm.bias is not None:
        scale, shift = _affine(norm)
        normalized = normalized * scale + shift
    record("norm of a constant")
    return nn.Parameter(normalized.to(vectors.device, vectors.dtype), vectors.requires_grad)


def fold_chain(owner: nn.Module, names: Sequence[str] | None = None) -> None:
    """Fold the norms in a chain of modules that run one after the other.

    A batch norm goes into an unpadded linear layer after it (which spares the one before it a
    bias), else into the one before it; a layer or group norm's factor and offset into an unpadded
    one after it. Parts that merge into one layer (they have a method ``merged``) are replaced by it
    first. Nested ``nn.Sequential`` belong to the chain; any other module interrupts it.

    Args:
        owner: the module that holds the chain.
        names: its children that form the chain, in order; all of them for None.
    """
    chain = list(_places(owner, names))
    for i, (parent, name) in enumerate(chain):
        module = getattr(*chain[i])
        before = getattr(*chain[i - 1]) if i else None
        after = getattr(*chain[i + 1]) if i + 1 < len(chain) else None
        fresh = norm_into_next(module, after) if after is not None else module
        if fresh is module and before is not None:
            fresh = norm_into_previous(before, module)
        if fresh is not module:
            setattr(parent, name, fresh)


def center_outputs(conv: nn.Conv2d) -> None:
    """Make the outputs' mean over channels zero: ``W' = W - mean(W)``, ``b' = b - mean(b)``.

    A layer norm over channels after it gives the same and need not subtract the mean any more.

    Raises:
        ValueError: a grouped convolution, whose outputs see different inputs.
    """
    require(conv.groups == 1, "only outputs that see the same inputs can be centered", conv)
    weight, bias = weight_of(conv), bias_of(conv)
    store(conv, weight - weight.mean(0, keepdim=True), bias - bias.mean())
    record("mean of a layer norm into the linear layer before")


def _fold_into_all(norm: nn.Module, linears: Sequence[nn.Module]) -> nn.Module:
    """Let layers take a norm's factor and offset on their inputs; return what is left of it."""
    scale, shift = _affine(norm)
    for linear in linears:
        shift_inputs(linear, shift)
        store(linear, weight_of(linear) * input_values(linear, scale), None)
    if isinstance(norm, BATCH_NORMS):
        return nn.Identity()
    norm.weight = norm.bias = None  # type: ignore[assignment]
    return norm


def _acts_on_outputs(norm: Any, linear: nn.Module) -> bool:
    """Whether a norm is one, without an activation inside, over the channels of a linear layer."""
    if not is_linear_layer(linear) or _has_activation(norm):
        return False
    spatial = (nn.BatchNorm2d, LayerNorm2d, nn.GroupNorm, RmsNorm2d)
    if isinstance(linear, nn.Conv2d):
        return isinstance(norm, spatial)
    return isinstance(norm, (nn.BatchNorm1d, nn.LayerNorm)) and not isinstance(norm, spatial)


def _has_activation(norm: Any) -> bool:
    """Whether a norm is one of timm's that activate too."""
    return not isinstance(getattr(norm, "act", None), (nn.Identity, type(None)))


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor s and offset t of a norm in evaluation mode."""
    if isinstance(norm, BATCH_NORMS):
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            raise ValueError("a batch norm without running statistics has no fixed factors")
        scale = (float64(variance) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * float64(norm.weight)
        shift = -float64(mean) * scale
        return scale, shift if norm.bias is None else shift + float64(norm.bias)
    given: Tensor = norm.weight if norm.weight is not None else norm.bias  # type: ignore[assignment]
    scale = torch.ones_like(float64(given)) if norm.weight is None else float64(given)
    bias = getattr(norm, "bias", None)
    return scale, float64(bias) if isinstance(bias, Tensor) else torch.zeros_like(scale)


def _places(owner: nn.Module, names: Sequence[str] | None) -> Iterator[tuple[nn.Module, str]]:
    """The single modules of a chain but identities, by their parent and name."""
    if names is None:  # every child, also one that is there twice
        every = owner.named_modules(remove_duplicate=False)
        names = [name for name, _ in every if name and "." not in name]
    for name in names:
        child = getattr(owner, name)
        if callable(merged := getattr(child, "merged", None)):
            child = merged()
            setattr(owner, name, child)
        if isinstance(child, nn.Sequential) and type(child).forward is nn.Sequential.forward:
            yield from _places(child, None)
        elif not isinstance(child, nn.Identity):
            yield owner, name
