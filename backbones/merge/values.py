"""Values of linear layers: read in float64, written in the layer's own type and layout."""

from typing import Union

import torch
from torch import Tensor, nn

__all__ = [
    "EVERY",
    "Rows",
    "as_column",
    "bias_of",
    "conv_like",
    "float64",
    "input_values",
    "is_linear_layer",
    "is_unpadded",
    "require",
    "scale_outputs",
    "shift_inputs",
    "store",
    "take_bias",
    "weight_of",
]

Rows = Union[slice, Tensor]
EVERY = slice(None)


def is_linear_layer(module: object) -> bool:
    """Whether a module is a linear layer. Subclasses may pad or add something of their own."""
    return type(module) in (nn.Conv2d, nn.Linear)


def is_unpadded(module: object) -> bool:
    """Whether outputs of a linear layer see inputs only, no zeros from beyond the border."""
    if type(module) is nn.Conv2d:
        return module.padding in ("valid", (0, 0))
    return type(module) is nn.Linear


def float64(tensor: Tensor) -> Tensor:
    """Return a copy in float64; devices without that type compute on the CPU."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device, torch.float64, copy=True)


def weight_of(linear: nn.Module) -> Tensor:
    return float64(linear.get_parameter("weight"))


def bias_of(linear: nn.Module) -> Tensor:
    weight = linear.get_parameter("weight")
    bias = linear.bias
    return float64(bias) if isinstance(bias, Tensor) else float64(weight.new_zeros(len(weight)))


def as_column(values: Tensor, ndim: int) -> Tensor:
    """`values` as a factor on the first of `ndim` dimensions."""
    return values.view(-1, *[1] * (ndim - 1))


def scale_outputs(linear: nn.Module, scale: Tensor, rows: Rows) -> None:
    """Multiply some outputs by a factor each, or by one for all of them."""
    weight, bias = weight_of(linear), bias_of(linear)
    weight[rows] *= as_column(scale, weight.ndim)
    bias[rows] *= scale
    store(linear, weight, None if linear.bias is None else bias)


def shift_inputs(linear: nn.Module, shift: Tensor) -> None:
    """Add to the bias what an offset on the inputs, (inputs,), comes to behind the weight."""
    moved = weight_of(linear) * input_values(linear, shift)
    store(linear, None, bias_of(linear) + moved.flatten(1).sum(1))


def take_bias(linear: nn.Module, rows: Rows) -> Tensor | None:
    """Set some biases to zero; return what they were, (rows,), or None where they were zero."""
    bias = bias_of(linear)
    taken = bias[rows].clone()
    if linear.bias is None or not (taken.is_meta or taken.any()):
        return None
    bias[rows] = 0
    store(linear, None, bias)
    return taken


def input_values(linear: nn.Module, values: Tensor) -> Tensor:
    """Values of the input channels where the weight (out, in per group, ...) reads them."""
    weight = linear.get_parameter("weight")
    groups = linear.groups if isinstance(linear, nn.Conv2d) else 1
    per_group = values.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
    return per_group.reshape(len(weight), -1, *[1] * (weight.ndim - 2))


@torch.no_grad()
def store(linear: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
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


def conv_like(conv: nn.Conv2d, in_channels: int, out_channels: int, groups: int) -> nn.Conv2d:
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


def require(condition: bool, rule: str, linear: nn.Module) -> None:
    if not condition:
        raise ValueError(f"{rule}: {linear}")
