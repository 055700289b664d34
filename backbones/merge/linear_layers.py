"""Linear layers one after the other and side by side, into one."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from backbones.merge.recording import record
from backbones.merge.values import (
    EVERY,
    bias_of,
    conv_like,
    float64,
    is_unpadded,
    require,
    store,
    weight_of,
)

__all__ = [
    "average_linear_layers",
    "branches_into_kernel",
    "constant_query_into_keys",
    "contrast_into_next",
    "linear_into_next",
    "mean_as_output",
    "pass_outputs_into_kernel",
    "rotation_into_next",
    "split_contrast",
    "stack_linear_layers",
    "sum_linear_layers",
]

Linear = TypeVar("Linear", nn.Conv2d, nn.Linear)


def linear_into_next(first: nn.Module, after: nn.Module, columns: slice = EVERY) -> nn.Module:
    """Fold a linear layer into the one after it: ``W' = W V``, ``b' = b + W c``.

    An average, weighted by weights whose sum is one, may stand between them.

    Args:
        first: ``V x + c``, an ``nn.Linear`` or a 1x1 convolution, with as many inputs as outputs.
        after: the layer of the same kind that reads it.
        columns: which of the inputs of `after` are the outputs of `first`.

    Returns:
        What takes the place of `first`: an identity.

    Raises:
        ValueError: a convolution that is padded, strided, grouped or wider than 1x1, or a first
            layer with another number of outputs than inputs.
    """
    for one in (first, after):
        plain = isinstance(one, nn.Linear) or (
            isinstance(one, nn.Conv2d)
            and one.kernel_size == one.stride == (1, 1)
            and one.groups == 1
            and is_unpadded(one)
        )
        require(plain, "only nn.Linear and dense 1x1 convolutions become one", one)
    inner, weight = weight_of(first).flatten(1), weight_of(after).clone()
    require(len(inner) == inner.shape[1], "as many outputs as inputs are needed", first)
    part = weight.flatten(1)[:, columns]
    shift = None if first.bias is None else bias_of(after) + part @ bias_of(first)
    weight.view(len(weight), -1)[:, columns] = part @ inner
    store(after, weight, shift)
    record("linear layer into the linear layer after")
    return nn.Identity()


def constant_query_into_keys(vectors: Tensor, query: nn.Linear, keys: nn.Linear) -> nn.Parameter:
    """Turn an attention's queries that no input changes into what they read of the inputs of keys.

    ``(W_q c + b_q) . (W_k x + b_k)`` is ``m . x`` with ``m = W_k^T (W_q c + b_q)``, but for what
    is the same for all x, which the softmax over keys takes out.

    Args:
        vectors: c, (K, C), what the queries are made of.
        query: the layer W_q, which the caller removes.
        keys: the layer W_k, which the caller removes.

    Returns:
        One vector m for each query, (K, C).
    """
    asked = float64(vectors) @ weight_of(query).mT + bias_of(query)
    record("constant query into the linear layer of keys")
    return nn.Parameter(
        (asked @ weight_of(keys)).to(vectors.device, vectors.dtype), vectors.requires_grad
    )


def branches_into_kernel(
    conv: nn.Conv2d, branches: Sequence[nn.Conv2d] = (), identity: bool = False
) -> None:
    """Add depthwise convolutions of the same input, and the input itself, to a depthwise kernel.

    A kernel at a dilation is a larger one with zeros between its taps; a kernel that reaches less
    far is one with zeros around it; the identity is a one in the center. All are centered, of odd
    size and stride 1, keep the feature map's size, and reach no further than `conv`.

    Raises:
        ValueError: `conv` itself is dilated, strided or not square.
    """
    plain = conv.stride == conv.dilation == (1, 1) and len(set(conv.kernel_size)) == 1
    require(plain, "branches join a square kernel of stride and dilation 1", conv)
    weight, bias = weight_of(conv), bias_of(conv)
    side = weight.shape[-1]
    for branch in branches:
        dilation, taps = int(branch.dilation[0]), branch.weight.shape[-1]
        edge = (side - dilation * (taps - 1) - 1) // 2
        inner = slice(edge, side - edge, dilation)
        weight[:, :, inner, inner] += weight_of(branch)
        bias = bias + bias_of(branch)
        record("parallel branch into a kernel")
    if identity:
        weight[:, :, side // 2, side // 2] += 1
        record("identity into a kernel")
    has_bias = conv.bias is not None or any(branch.bias is not None for branch in branches)
    store(conv, weight, bias if has_bias else None)


def pass_outputs_into_kernel(conv: nn.Conv2d, passed: int) -> nn.Conv2d:
    """Return a depthwise convolution whose first `passed` channels come out as they are."""
    dim, weight, bias = conv.out_channels + passed, weight_of(conv), bias_of(conv)
    kernel = weight.new_zeros(dim, *weight.shape[1:])
    kernel[:passed, :, weight.shape[-2] // 2, weight.shape[-1] // 2] = 1
    kernel[passed:] = weight
    full = conv_like(conv, dim, dim, groups=dim)
    offset = None if conv.bias is None else torch.cat((bias.new_zeros(passed), bias))
    store(full, kernel, offset)
    record("identity into a kernel")
    return full


def split_contrast(conv: nn.Conv2d, gain: Tensor) -> nn.Conv2d:
    """Turn ``y + g (y - mean(y))`` of a 1x1 convolution's outputs ``y`` into two convolutions.

    With ``y = W x + b`` that is ``(1 + g) W x + b - g W mean(x)``, the mean over positions: `conv`
    takes the first factor, its bias stays.

    Returns:
        The convolution for mean(x), ``-g W``, without bias.
    """
    wide = float64(gain).flatten().view(-1, 1, 1, 1)
    weight = weight_of(conv)
    mean = conv_like(conv, conv.in_channels, conv.out_channels, conv.groups)
    store(mean, -wide * weight, None)
    store(conv, (1 + wide) * weight, None)
    record("contrast with the mean into linear layers")
    return mean


def contrast_into_next(gain: Tensor, conv: nn.Conv2d) -> nn.Parameter:
    """Move ``y + g (y - d)``, one map d for all channels, behind the 1x1 convolution after it.

    With the layer ``W y + b`` that is ``W (1 + g) y + b - (W g) d``: it takes the factor.

    Returns:
        What d is multiplied by for each output, ``-W g``, (outputs,).

    Raises:
        ValueError: a layer that is padded or grouped.
    """
    dense = conv.groups == 1 and is_unpadded(conv)
    require(dense, "a contrast moves through unpadded dense layers only", conv)
    wide, weight = float64(gain).flatten().view(1, -1, 1, 1), weight_of(conv)
    store(conv, weight * (1 + wide), None)
    record("contrast with a map into the linear layer after")
    along = -(weight * wide).flatten(1).sum(1)
    return nn.Parameter(along.to(gain.device, gain.dtype), gain.requires_grad)


def stack_linear_layers(first: Linear, second: Linear) -> Linear:
    """Return one layer with the outputs of two of the same kind and input, the first's in front.

    Raises:
        ValueError: grouped convolutions, whose outputs see different inputs.
    """
    if isinstance(first, nn.Conv2d):
        same = first.groups == second.groups == 1
        require(same, "grouped convolutions cannot be stacked", first)
        outputs = first.out_channels + second.out_channels
        both = conv_like(first, first.in_channels, outputs, first.groups)
    else:
        both = copy.deepcopy(first)
        both.out_features += second.out_features
        both.weight = nn.Parameter(
            first.weight.new_empty(both.out_features, both.in_features), first.weight.requires_grad
        )
        both.register_parameter("bias", None)
    weight = torch.cat((weight_of(first), weight_of(second)))
    store(both, weight, torch.cat((bias_of(first), bias_of(second))))
    record("linear layers of one input into one")
    return both


def sum_linear_layers(layers: Sequence[nn.Conv2d], factors: Sequence[float]) -> nn.Conv2d:
    """Return one 1x1 convolution for the sum of several, each of a factor times its own inputs.

    With ``sum of W_i (f_i x_i) + b_i`` that is ``[f_1 W_1 | f_2 W_2 | ...] x + sum of b_i``, where
    x holds the inputs side by side.

    Raises:
        ValueError: a layer that is padded, strided or grouped.
    """
    for layer in layers:
        dense = layer.groups == 1 and layer.stride == (1, 1) and is_unpadded(layer)
        require(dense, "only plain dense layers of shares can be added to one", layer)
    first, channels = layers[0], sum(layer.in_channels for layer in layers)
    whole = conv_like(first, channels, first.out_channels, groups=1)
    weight = torch.cat([weight_of(one) * factor for one, factor in zip(layers, factors)], dim=1)
    store(whole, weight, torch.stack([bias_of(layer) for layer in layers]).sum(0))
    record("sum of linear layers into one")
    return whole


def average_linear_layers(first: nn.Linear, second: nn.Linear) -> None:
    """Turn `first` into the mean of two linear layers of the same input."""
    store(first, (weight_of(first) + weight_of(second)) / 2, (bias_of(first) + bias_of(second)) / 2)
    record("averaged linear layers")


def mean_as_output(linear: nn.Linear) -> nn.Linear:
    """Return a linear layer with one output more, the mean of the others, as the last."""
    weight, bias = weight_of(linear), bias_of(linear)
    with torch.device("meta"):
        fresh = nn.Linear(linear.in_features, linear.out_features + 1, bias=False)
    fresh = fresh.to_empty(device=linear.weight.device).to(linear.weight.dtype)
    fresh.requires_grad_(linear.weight.requires_grad).train(linear.training)
    row = weight.mean(0, keepdim=True)
    offset = None if linear.bias is None else torch.cat((bias, bias.mean(0, keepdim=True)))
    store(fresh, torch.cat((weight, row)), offset)
    record("mean of outputs into the linear layer before")
    return fresh


def rotation_into_next(rotation: Tensor, conv: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution that takes what comes before a rotation of channel pairs.

    Row k of `rotation` (K, 2) is a complex number r + i*s that multiplies channels 2k and 2k + 1 as
    real and imaginary part. The rotation has no offset and maps the zeros of a padded border to
    zeros. A depthwise convolution becomes one with a group per pair.

    Raises:
        ValueError: pairs cross the groups of the convolution.
    """
    real, imaginary = float64(rotation).unbind(1)
    weight = weight_of(conv)
    size, inputs = weight.shape[2:], weight.shape[1]
    depthwise = inputs == 1 and len(weight) == conv.in_channels
    require(depthwise or inputs % 2 == 0, "pairs of channels would cross groups", conv)
    if inputs == 1:
        inputs = 2
        wide = weight.new_zeros(len(weight), 2, *size)
        wide[0::2, 0], wide[1::2, 1] = weight[0::2, 0], weight[1::2, 0]
        weight = wide
    groups = conv.in_channels // inputs
    # (groups, outputs of a group, pairs of a group, 2, k, k)
    pairs = weight.view(groups, -1, inputs // 2, 2, *size)
    r, s = (part.view(groups, 1, -1, 1, 1) for part in (real, imaginary))
    a, b = pairs.unbind(3)
    turned = torch.stack((a * r + b * s, b * r - a * s), 3).view(weight.shape)
    full = conv_like(conv, conv.in_channels, conv.out_channels, groups)
    store(full, turned, None if conv.bias is None else bias_of(conv))
    record("rotation into the linear layer after")
    return full
