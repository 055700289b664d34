"""The algebra of exact merges: what follows from a layer being linear, written once.

A linear layer is an ``nn.Conv2d`` or ``nn.Linear``: ``y = W x + b``, with zeros around the input of
a padded convolution. A norm in evaluation mode is ``s * n(x) + t`` per channel, where `n` has no
parameters (for a batch norm it is the identity). Each rule moves one such factor or offset into a
linear layer, which is changed in place; it holds for every parameter value and at every input size,
borders included, and does nothing where nothing is left to move or where it would not hold.

Values are computed in float64 and stored in the layer's own type, device and memory layout. Rules
work on the meta device too. Modules must be in evaluation mode (`reparameterize` checks).
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, Union

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, RmsNorm2d
from torch import Tensor, nn

__all__ = [
    "average_linear_layers",
    "biases_into_next",
    "branches_into_kernel",
    "center_outputs",
    "constant_query_into_keys",
    "contrast_into_next",
    "drop_softmax_bias",
    "factor_into_norm",
    "factor_into_outputs",
    "fold_chain",
    "function_into_parameter",
    "is_linear_layer",
    "linear_into_next",
    "map_norm_into_next",
    "mean_as_output",
    "norm_into_next",
    "norm_into_previous",
    "norm_into_shortcut",
    "norm_of_constant",
    "pass_outputs_into_kernel",
    "record",
    "recorded",
    "rotation_into_next",
    "scale_into_directions",
    "scale_into_previous",
    "scale_parameter",
    "shift_into_next",
    "shift_into_previous",
    "shift_together",
    "split_contrast",
    "stack_linear_layers",
    "sum_linear_layers",
    "uniform_bias_into_next",
]

Linear = TypeVar("Linear", nn.Conv2d, nn.Linear)
Rows = Union[slice, Tensor]
EVERY = slice(None)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

_recorder: ContextVar[Counter[str] | None] = ContextVar("merges", default=None)


@contextmanager
def recorded() -> Iterator[Counter[str]]:
    """Count the merges that are made inside the ``with`` block, by rule."""
    counter: Counter[str] = Counter()
    token = _recorder.set(counter)
    try:
        yield counter
    finally:
        _recorder.reset(token)


def record(rule: str) -> None:
    """Count one merge by `rule`; for rules that live with the layer they are about."""
    counter = _recorder.get()
    if counter is not None:
        counter[rule] += 1


def is_linear_layer(module: object) -> bool:
    """Whether a module is a linear layer. Subclasses may pad or add something of their own."""
    return type(module) in (nn.Conv2d, nn.Linear)


def _is_unpadded(module: object) -> bool:
    """Whether outputs of a linear layer see inputs only, no zeros from beyond the border."""
    if type(module) is nn.Conv2d:
        return module.padding in ("valid", (0, 0))
    return type(module) is nn.Linear


# Norms.


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
    weight, bias = _weight(linear), _bias(linear)
    _store(linear, weight * _column(scale, weight.ndim), bias * scale + shift)
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
    if not all(_acts_on_outputs(norm, one) and _is_unpadded(one) for one in linears):
        return norm
    batch = isinstance(norm, BATCH_NORMS)
    if not batch and norm.weight is None and getattr(norm, "bias", None) is None:
        return norm
    for linear in linears:
        _fold_into_next(norm, linear)
    record("norm into the linear layer after")
    if batch:
        return nn.Identity()
    norm.weight = norm.bias = None  # type: ignore[assignment]
    return norm


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
    for linear in linears:
        _fold_into_next(norm, linear)
    record("norm of a feature map into the linear layers after")
    if batch:
        return nn.Identity()
    norm.weight = norm.bias = None  # type: ignore[assignment]
    return norm


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
    wide = _wide(scale).flatten()
    _store(branch, None, _bias(branch) + wide * shift)
    record("norm on a shortcut into a factor")
    return nn.Parameter((1 + wide * factor).to(scale.device, scale.dtype), scale.requires_grad)


def norm_of_constant(norm: nn.LayerNorm, vectors: Tensor) -> nn.Parameter:
    """Return the layer norm of vectors (..., C) that are the same for every input."""
    normalized = F.layer_norm(_wide(vectors), norm.normalized_shape, eps=norm.eps)
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
    _require(conv.groups == 1, "only outputs that see the same inputs can be centered", conv)
    weight, bias = _weight(conv), _bias(conv)
    _store(conv, weight - weight.mean(0, keepdim=True), bias - bias.mean())
    record("mean of a layer norm into the linear layer before")


# Factors and offsets.


def scale_into_previous(linear: nn.Module, scale: Tensor | None, rows: slice = EVERY) -> None:
    """Fold a factor per channel on some outputs into the linear layer before it.

    ``W' = s W``, ``b' = s b``. The caller removes the factor; None is nothing to fold.
    """
    if scale is None:
        return
    _scale_outputs(linear, _wide(scale).flatten(), rows)
    record("layer scale into the linear layer before")


@torch.no_grad()
def scale_parameter(parameter: Tensor, scale: Tensor, rows: slice = EVERY) -> None:
    """Fold a factor per channel into some entries of a factor or offset before it."""
    parameter[rows] = (_wide(parameter[rows]) * _wide(scale)).to(parameter.dtype)


def function_into_parameter(
    parameter: nn.Parameter, function: Callable[[Tensor], Tensor]
) -> nn.Parameter:
    """Return what a function makes of a parameter, as a parameter that takes its place."""
    record("function of a parameter into a parameter")
    value = function(_wide(parameter)).to(parameter.device, parameter.dtype)
    return nn.Parameter(value, parameter.requires_grad)


@torch.no_grad()
def scale_into_directions(vectors: Tensor, scale: Tensor) -> None:
    """Turn vectors (..., C), of which only directions count, into ``scale * v / ||v||``.

    A vector of zeros stays one. The caller removes the factor, and no longer divides by lengths.
    """
    wide = _wide(vectors)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    vectors.copy_(wide / length * _wide(scale))
    record("factor into directions")


@torch.no_grad()
def shift_together(offset: Tensor | None, other: Tensor | None) -> None:
    """Add one of two offsets of a sum to the other. The caller removes the one added."""
    if offset is None or other is None:
        return
    offset.copy_(_wide(offset) + _wide(other))
    record("offset into an offset")


def factor_into_outputs(linear: nn.Module, factor: float, rows: Rows = EVERY) -> float:
    """Fold a constant factor on some outputs into their rows. Returns 1.0, its replacement."""
    if factor != 1.0:
        _scale_outputs(linear, _bias(linear).new_full((1,), factor), rows)
        record("constant factor into the linear layer before")
    return 1.0


def factor_into_norm(norm: nn.LayerNorm, factor: float) -> float:
    """Fold a constant factor into the parameters of the norm before it. Returns 1.0."""
    if factor != 1.0:
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(_wide(parameter) * factor)
        record("constant factor into the norm before")
    return 1.0


def shift_into_previous(linear: nn.Module, shift: Tensor | None, rows: slice = EVERY) -> None:
    """Add an offset per channel of some outputs to the bias: ``b' = b + t``.

    The offset may also stand on a sibling branch that is added to the outputs. The caller removes
    it; None is nothing to add.
    """
    if shift is None:
        return
    bias = _bias(linear)
    bias[rows] += _wide(shift).flatten()
    _store(linear, None, bias)
    record("offset into a bias")


def shift_into_next(shift: Tensor | None, linear: nn.Module) -> None:
    """Fold an offset per channel into the linear layer after it: ``b' = b + W t``.

    The caller removes it; None is nothing to fold.

    Raises:
        ValueError: the layer is padded; zeros around its input would have to be shifted too.
    """
    if shift is None:
        return
    if not _is_unpadded(linear):
        raise ValueError(f"an offset cannot move through {linear}: it is no unpadded linear layer")
    _shift_inputs(linear, _wide(shift).flatten())
    record("offset into a bias")


def drop_softmax_bias(linear: nn.Module, rows: Rows) -> None:
    """Set the bias of attention keys, or of position biases of all keys alike, to zero.

    It adds the same, ``q . b`` of keys, to all logits of a query, which the softmax takes out.
    """
    if _take_bias(linear, rows) is not None:
        record("bias that softmax ignores")


def uniform_bias_into_next(linear: nn.Module, rows: Rows, after: nn.Module) -> None:
    """Move the bias of attention values into the linear layer after: ``b' = b + W t``.

    The weights of an attention sum to one, so that a constant passes through unchanged. The layer
    after it must not be padded.
    """
    if _is_unpadded(after) and (taken := _take_bias(linear, rows)) is not None:
        _shift_inputs(after, taken)
        record("bias of attention values into the linear layer after")


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
    asked = _wide(vectors) @ _weight(query).mT + _bias(query)
    record("constant query into the linear layer of keys")
    return nn.Parameter(
        (asked @ _weight(keys)).to(vectors.device, vectors.dtype), vectors.requires_grad
    )


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
    if not _is_unpadded(after) or any(part.bias is None for part in parts):
        return
    _shift_inputs(after, torch.cat((_bias(linear)[rows], *map(_bias, others))))
    _take_bias(linear, rows)
    for part in others:
        part.register_parameter("bias", None)
    record("biases into the linear layer after")


# Linear layers one after the other, and side by side.


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
            and _is_unpadded(one)
        )
        _require(plain, "only nn.Linear and dense 1x1 convolutions become one", one)
    inner, weight = _weight(first).flatten(1), _weight(after).clone()
    _require(len(inner) == inner.shape[1], "as many outputs as inputs are needed", first)
    part = weight.flatten(1)[:, columns]
    shift = None if first.bias is None else _bias(after) + part @ _bias(first)
    weight.view(len(weight), -1)[:, columns] = part @ inner
    _store(after, weight, shift)
    record("linear layer into the linear layer after")
    return nn.Identity()


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
    _require(plain, "branches join a square kernel of stride and dilation 1", conv)
    weight, bias = _weight(conv), _bias(conv)
    side = weight.shape[-1]
    for branch in branches:
        dilation, taps = int(branch.dilation[0]), branch.weight.shape[-1]
        edge = (side - dilation * (taps - 1) - 1) // 2
        inner = slice(edge, side - edge, dilation)
        weight[:, :, inner, inner] += _weight(branch)
        bias = bias + _bias(branch)
        record("parallel branch into a kernel")
    if identity:
        weight[:, :, side // 2, side // 2] += 1
        record("identity into a kernel")
    has_bias = conv.bias is not None or any(branch.bias is not None for branch in branches)
    _store(conv, weight, bias if has_bias else None)


def pass_outputs_into_kernel(conv: nn.Conv2d, passed: int) -> nn.Conv2d:
    """Return a depthwise convolution whose first `passed` channels come out as they are."""
    dim, weight, bias = conv.out_channels + passed, _weight(conv), _bias(conv)
    kernel = weight.new_zeros(dim, *weight.shape[1:])
    kernel[:passed, :, weight.shape[-2] // 2, weight.shape[-1] // 2] = 1
    kernel[passed:] = weight
    full = _like(conv, dim, dim, groups=dim)
    offset = None if conv.bias is None else torch.cat((bias.new_zeros(passed), bias))
    _store(full, kernel, offset)
    record("identity into a kernel")
    return full


def split_contrast(conv: nn.Conv2d, gain: Tensor) -> nn.Conv2d:
    """Turn ``y + g (y - mean(y))`` of a 1x1 convolution's outputs ``y`` into two convolutions.

    With ``y = W x + b`` that is ``(1 + g) W x + b - g W mean(x)``, the mean over positions: `conv`
    takes the first factor, its bias stays.

    Returns:
        The convolution for mean(x), ``-g W``, without bias.
    """
    wide = _wide(gain).flatten().view(-1, 1, 1, 1)
    weight = _weight(conv)
    mean = _like(conv, conv.in_channels, conv.out_channels, conv.groups)
    _store(mean, -wide * weight, None)
    _store(conv, (1 + wide) * weight, None)
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
    dense = conv.groups == 1 and _is_unpadded(conv)
    _require(dense, "a contrast moves through unpadded dense layers only", conv)
    wide, weight = _wide(gain).flatten().view(1, -1, 1, 1), _weight(conv)
    _store(conv, weight * (1 + wide), None)
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
        _require(same, "grouped convolutions cannot be stacked", first)
        outputs = first.out_channels + second.out_channels
        both = _like(first, first.in_channels, outputs, first.groups)
    else:
        both = copy.deepcopy(first)
        both.out_features += second.out_features
        both.weight = nn.Parameter(
            first.weight.new_empty(both.out_features, both.in_features), first.weight.requires_grad
        )
        both.register_parameter("bias", None)
    weight = torch.cat((_weight(first), _weight(second)))
    _store(both, weight, torch.cat((_bias(first), _bias(second))))
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
        dense = layer.groups == 1 and layer.stride == (1, 1) and _is_unpadded(layer)
        _require(dense, "only plain dense layers of shares can be added to one", layer)
    first, channels = layers[0], sum(layer.in_channels for layer in layers)
    whole = _like(first, channels, first.out_channels, groups=1)
    weight = torch.cat([_weight(one) * factor for one, factor in zip(layers, factors)], dim=1)
    _store(whole, weight, torch.stack([_bias(layer) for layer in layers]).sum(0))
    record("sum of linear layers into one")
    return whole


def average_linear_layers(first: nn.Linear, second: nn.Linear) -> None:
    """Turn `first` into the mean of two linear layers of the same input."""
    _store(first, (_weight(first) + _weight(second)) / 2, (_bias(first) + _bias(second)) / 2)
    record("averaged linear layers")


def mean_as_output(linear: nn.Linear) -> nn.Linear:
    """Return a linear layer with one output more, the mean of the others, as the last."""
    weight, bias = _weight(linear), _bias(linear)
    with torch.device("meta"):
        fresh = nn.Linear(linear.in_features, linear.out_features + 1, bias=False)
    fresh = fresh.to_empty(device=linear.weight.device).to(linear.weight.dtype)
    fresh.requires_grad_(linear.weight.requires_grad).train(linear.training)
    row = weight.mean(0, keepdim=True)
    offset = None if linear.bias is None else torch.cat((bias, bias.mean(0, keepdim=True)))
    _store(fresh, torch.cat((weight, row)), offset)
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
    real, imaginary = _wide(rotation).unbind(1)
    weight = _weight(conv)
    size, inputs = weight.shape[2:], weight.shape[1]
    depthwise = inputs == 1 and len(weight) == conv.in_channels
    _require(depthwise or inputs % 2 == 0, "pairs of channels would cross groups", conv)
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
    full = _like(conv, conv.in_channels, conv.out_channels, groups)
    _store(full, turned, None if conv.bias is None else _bias(conv))
    record("rotation into the linear layer after")
    return full


# Numbers.


def _wide(tensor: Tensor) -> Tensor:
    """Return a copy in float64; devices without that type compute on the CPU."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device, torch.float64, copy=True)


def _weight(linear: nn.Module) -> Tensor:
    return _wide(linear.get_parameter("weight"))


def _bias(linear: nn.Module) -> Tensor:
    weight = linear.get_parameter("weight")
    bias = linear.bias
    return _wide(bias) if isinstance(bias, Tensor) else _wide(weight.new_zeros(len(weight)))


def _column(values: Tensor, ndim: int) -> Tensor:
    """`values` as a factor on the first of `ndim` dimensions."""
    return values.view(-1, *[1] * (ndim - 1))


def _scale_outputs(linear: nn.Module, scale: Tensor, rows: Rows) -> None:
    """Multiply some outputs by a factor each, or by one for all of them."""
    weight, bias = _weight(linear), _bias(linear)
    weight[rows] *= _column(scale, weight.ndim)
    bias[rows] *= scale
    _store(linear, weight, None if linear.bias is None else bias)


def _shift_inputs(linear: nn.Module, shift: Tensor) -> None:
    """Add to the bias what an offset on the inputs, (inputs,), comes to behind the weight."""
    moved = _weight(linear) * _input_values(linear, shift)
    _store(linear, None, _bias(linear) + moved.flatten(1).sum(1))


def _take_bias(linear: nn.Module, rows: Rows) -> Tensor | None:
    """Set some biases to zero; return what they were, (rows,), or None where they were zero."""
    bias = _bias(linear)
    taken = bias[rows].clone()
    if linear.bias is None or not (taken.is_meta or taken.any()):
        return None
    bias[rows] = 0
    _store(linear, None, bias)
    return taken


def _input_values(linear: nn.Module, values: Tensor) -> Tensor:
    """Values of the input channels where the weight (out, in per group, ...) reads them."""
    weight = linear.get_parameter("weight")
    groups = linear.groups if isinstance(linear, nn.Conv2d) else 1
    per_group = values.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
    return per_group.reshape(len(weight), -1, *[1] * (weight.ndim - 2))


def _fold_into_next(norm: nn.Module, linear: nn.Module) -> None:
    """Let a layer take a norm's factor and offset on its inputs."""
    scale, shift = _affine(norm)
    _shift_inputs(linear, shift)
    _store(linear, _weight(linear) * _input_values(linear, scale), None)


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


def _require(condition: bool, rule: str, linear: nn.Module) -> None:
    if not condition:
        raise ValueError(f"{rule}: {linear}")


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor s and offset t of a norm in evaluation mode."""
    if isinstance(norm, BATCH_NORMS):
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            raise ValueError("a batch norm without running statistics has no fixed factors")
        scale = (_wide(variance) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * _wide(norm.weight)
        shift = -_wide(mean) * scale
        return scale, shift if norm.bias is None else shift + _wide(norm.bias)
    given: Tensor = norm.weight if norm.weight is not None else norm.bias  # type: ignore[assignment]
    scale = torch.ones_like(_wide(given)) if norm.weight is None else _wide(given)
    bias = getattr(norm, "bias", None)
    return scale, _wide(bias) if isinstance(bias, Tensor) else torch.zeros_like(scale)


@torch.no_grad()
def _store(linear: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
    """Write float64 values into a linear layer; None leaves the old value."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        old = getattr(linear, name)
        if old is not None:
            old.copy_(value)  # keeps type, device and memory layout
            continue
        other = linear.get_parameter("weight")
        fresh = value.to(other.device, other.dtype)
        linear.register_parameter(name, nn.Parameter(fresh, other.requires_grad))


def _like(conv: nn.Conv2d, in_channels: int, out_channels: int, groups: int) -> nn.Conv2d:
    """A convolution without bias, uninitialized, otherwise like `conv` but for its channels."""
    with torch.device("meta"):
        fresh = nn.Conv2d(
            in_channels,
            out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            groups,
            bias=False,
            padding_mode=conv.padding_mode,
        )
    fresh = fresh.to_empty(device=conv.weight.device).to(conv.weight.dtype).train(conv.training)
    if not conv.weight.is_contiguous():
        fresh = fresh.to(memory_format=torch.channels_last)
    return fresh.requires_grad_(conv.weight.requires_grad)


# Chains.


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
