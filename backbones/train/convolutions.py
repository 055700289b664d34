"""Convolutions in training on CPUs, where PyTorch's gradients are slow, or wrong in bf16."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

from backbones.ops import depthwise_conv2d, gradients_are_ours, is_recorded, is_slow_kernel

__all__ = ["cpu_convolutions"]


def cpu_convolutions(model: nn.Module) -> AbstractContextManager[object]:
    """Let the gradients of a model's convolutions on CPUs be fast, and right in bf16.

    The context is to be open in the forward pass of a training step. Depthwise convolutions go by
    :func:`backbones.ops.depthwise_conv2d`. In bf16, other dilated grouped ones are computed in
    float32: with channels last, oneDNN leaves their weight gradients partly unset (PyTorch 2.14):
    what was in memory before, from small errors to 1e35 and NaN. All else is PyTorch's, and models
    without such convolutions or on other devices are left alone. One context may be opened for step
    after step.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    pays = on_cpu and any(map(_is_slow, model.modules()))
    return _Convolutions() if pays else nullcontext()


def _is_slow(module: nn.Module) -> bool:
    """Whether a module is a grouped convolution with a large or a dilated kernel, or built so."""
    kernel, groups = getattr(module, "kernel_size", None), getattr(module, "groups", None)
    if not isinstance(kernel, int | tuple) or groups == 1:
        return False
    return is_slow_kernel(_pair(kernel), _pair(getattr(module, "dilation", 1)))


class _Convolutions(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.conv2d:
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    options = (stride, padding, dilation, groups)
    if groups == 1 or input.device.type != "cpu" or isinstance(padding, str):
        return torch.conv2d(input, weight, bias, *options)
    cast = input.dtype
    if torch.is_autocast_enabled("cpu") and cast is not torch.float64:  # which it leaves alone
        cast = torch.get_autocast_dtype("cpu")
    reach = _pair(padding), _pair(dilation)
    wrong = cast is torch.bfloat16 and reach[1] != (1, 1)
    depthwise = weight.shape[:2] == (groups, 1) and input.dim() == 4 and _pair(stride) == (1, 1)
    slow = depthwise and is_slow_kernel(weight.shape[2:], reach[1])
    if wrong or slow:  # of no others a copy is made in another type
        with torch.autocast("cpu", enabled=False):
            tensors = _all_in(cast, input, weight, bias)
            if slow and gradients_are_ours(*tensors, *reach):
                return depthwise_conv2d(*tensors, *reach)
            if wrong and is_recorded():
                return torch.conv2d(*_all_in(torch.float32, input, weight, bias), *options).to(cast)
            if wrong:
                out: Tensor = _InFloat32.apply(*tensors, *options)
                return out
    return torch.conv2d(input, weight, bias, *options)


class _InFloat32(torch.autograd.Function):
    """A convolution of bf16 that is computed in float32, as are its gradients.

    It keeps what PyTorch's keeps, so that gradient checkpointing may compute that by PyTorch's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return torch.conv2d(*_all_in(torch.float32, x, weight, bias), *options).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        dtype, (x, weight, grad) = x.dtype, (one.float() for one in (x, weight, *grads))
        options = ctx.options
        return (
            conv2d_input(x.shape, weight, grad, *options).to(dtype) if of_x else None,
            conv2d_weight(x, weight.shape, grad, *options).to(dtype) if of_weight else None,
            grad.sum((0, 2, 3)).to(dtype) if of_bias else None,
            *[None] * len(options),
        )


def _all_in(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _pair(value: Any) -> tuple[int, int]:
    """Return a size that was given once, or once for height and once for width."""
    if isinstance(value, int):
        return value, value
    first, *others = value
    return first, others[0] if others else first
