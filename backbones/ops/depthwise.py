"""Depthwise convolution whose gradients take as long on CPUs as the convolution does.

PyTorch leaves the gradient of the weight to a kernel of oneDNN that takes 10 to 80 times as long as
the forward pass, for kernels of 5x5 and more and for dilated ones. It is a convolution itself: of
each channel's map, with the gradient of the output as the kernel.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.dispatch import is_recorded, is_transformed, reference_active

Pair = tuple[int, int]

_LEAST_TAPS = 25  # of kernels, below which PyTorch's gradient is fast, unless they are dilated
_MOST = 13  # of those that oneDNN has a kernel for without channels last
# Positions of a map from which images are taken one by one: where it has channels last and where
# not, and where the convolution needs channels last.
_SINGLY = {True: 196, False: 1024}
_SINGLY_LAST = 49
_DTYPES = (torch.float32, torch.bfloat16)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """Convolve every channel with a kernel of its own, at every position.

    In float32 and bf16 on x86 processors, gradients are convolutions too; that of the weight is
    summed over images in float32. Everywhere else this is PyTorch's convolution.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, kh, kw).
        bias: (C,).
        padding: zeros at each end of height and width.
        dilation: steps between the kernel's taps, in height and width.

    Returns:
        (B, C, H', W'), where H' is H + 2 padding - dilation (kh - 1), and W' likewise.
    """
    if gradients_are_ours(x, weight, bias, padding, dilation):
        out: Tensor = _Depthwise.apply(x, weight, bias, padding, dilation)
        return out
    return F.conv2d(x, weight, bias, 1, padding, dilation, len(weight))


def is_slow_kernel(kernel: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether PyTorch's gradient of a depthwise weight with such a kernel is slow on CPUs."""
    return math.prod(kernel) >= _LEAST_TAPS or max(dilation) > 1


def gradients_are_ours(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, dilation: Pair
) -> bool:
    """Whether :func:`depthwise_conv2d` computes the gradients of such a call, not PyTorch."""
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return False
    if reference_active() or is_recorded() or not _by_onednn():
        return False
    kernel = weight.shape[2:]
    inside = all(p <= d * (k - 1) for p, d, k in zip(padding, dilation, kernel))
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        is_slow_kernel(kernel, dilation)
        and inside
        and math.prod(x.shape[2:]) > 1  # of one position PyTorch's is fast
        and x.numel() > 0
        and all(one.device.type == "cpu" and one.dtype == x.dtype for one in tensors)
        and x.dtype in _DTYPES
        and not is_transformed(*tensors)
    )


@cache
def _by_onednn() -> bool:
    """Whether convolutions are oneDNN's of x86 processors, for which this was measured."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and torch.backends.mkldnn.is_available()


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, dilation: Pair
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.dilation = padding, dilation
        return _convolved(x, weight, bias, padding, dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        (p, q), (d, e), (kh, kw) = ctx.padding, ctx.dilation, weight.shape[2:]
        around = (d * (kh - 1) - p, e * (kw - 1) - q)
        to_weight = None
        if of_weight:
            to_weight = _gradient_of_weight(x, grad, (kh, kw), (p, q), (d, e)).to(weight.dtype)
        return (
            _convolved(grad, weight.flip(2, 3), None, around, (d, e)) if of_x else None,
            to_weight,
            grad.sum((0, 2, 3)) if of_bias else None,
            None,
            None,
        )


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, dilation: Pair
) -> Tensor:
    """Convolve in the layout of `x`, or where that is slow by way of channels last."""
    if x.is_contiguous() and _needs_channels_last(x, weight.shape[2:], padding, dilation):
        last = x.contiguous(memory_format=torch.channels_last)
        return F.conv2d(last, weight, bias, 1, padding, dilation, len(weight)).contiguous()
    return F.conv2d(x, weight, bias, 1, padding, dilation, len(weight))


def _needs_channels_last(x: Tensor, kernel: Sequence[int], padding: Pair, dilation: Pair) -> bool:
    """Whether oneDNN has a kernel for a convolution with channels last alone."""
    reach = max(d * (k - 1) + 1 for d, k in zip(dilation, kernel))
    return reach > _MOST or any(p >= side for p, side in zip(padding, x.shape[2:]))


def _gradient_of_weight(
    x: Tensor, grad: Tensor, kernel: Sequence[int], padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient of the weight (C, 1, kh, kw) in float32.

    The kernel's taps are as far apart as its dilation, hence the stride. Large maps are taken image
    by image, with channels last; small ones all at once, every image's channels beside each other.
    """
    batch, channels = x.shape[:2]
    last = _needs_channels_last(x, kernel, padding, dilation)
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    if math.prod(x.shape[2:]) >= (_SINGLY_LAST if last else _SINGLY[is_last]):
        images = x.contiguous(memory_format=torch.channels_last).split(1)
        total = torch.zeros((), dtype=torch.float32)
        for image, kernels in zip(images, grad):  # 1 C H W; C H' W'
            part = F.conv2d(image, kernels.unsqueeze(1), None, dilation, padding, 1, channels)
            total = total + part.float()  # 1 C kh kw
        return total.transpose(0, 1)
    maps = x.reshape(1, batch * channels, *x.shape[2:])
    if last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    kernels = grad.reshape(batch * channels, 1, *grad.shape[2:])
    parts = F.conv2d(maps, kernels, None, dilation, padding, 1, batch * channels)  # 1 BC kh kw
    return parts.float().unflatten(1, (batch, channels)).sum(1).transpose(0, 1)
