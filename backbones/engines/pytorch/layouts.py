"""Memory layout of convolutions, chosen by measurement.

PyTorch's convolutions on CPUs are fast in one layout or the other, by shape: dense ones and most
depthwise ones in channels_last, medium depthwise ones in NCHW, and large dilated ones in NCHW are
thirty times slower than in channels_last. No rule holds over processors and versions, so each shape
is measured once, with the conversions that changing the layout there would cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backbones.engines.timing import least

__all__ = ["InOtherLayout", "choose_layout"]

ROUNDS = 5


class InOtherLayout(nn.Conv2d):
    """A convolution that runs in NCHW within a channels_last model, or the other way round."""

    inner: torch.memory_format
    outer: torch.memory_format

    @classmethod
    def of(cls, conv: nn.Conv2d, outer: torch.memory_format) -> InOtherLayout:
        """Return the twin of a convolution, with the same values, for a model laid out `outer`."""
        geometry: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        sizes = (conv.in_channels, conv.out_channels, *geometry, conv.bias is not None)
        with torch.device("meta"):
            twin = cls(*sizes)
        last = torch.channels_last
        twin.outer, twin.inner = outer, torch.contiguous_format if outer == last else last
        twin.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=twin.inner))
        if conv.bias is not None:
            twin.bias = nn.Parameter(conv.bias.detach())
        return twin.train(conv.training).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.contiguous(memory_format=self.inner))
        return x.contiguous(memory_format=self.outer)


def choose_layout(model: nn.Module, x: Tensor) -> tuple[nn.Module, str]:
    """Lay out a model's weights so that it is fastest on inputs like `x` (B, C, H, W), in place.

    The depthwise convolutions whose shapes are faster in the other layout are wrapped, within the
    whole model in NCHW and within the whole model in channels_last; the fastest of the plain and
    mixed forms is kept: ``nchw``, ``channels_last``, ``nchw, mixed`` or ``channels_last, mixed``.
    """
    shapes = _depthwise_shapes(model, x)
    results: list[tuple[float, torch.memory_format, set[tuple[Any, ...]]]] = []
    for outer in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=outer)  # type: ignore[call-overload]
        results.append((_milliseconds(model, x), outer, set()))
        wrapped = {key for key, name in shapes.items() if _other_is_faster(model, name, key, outer)}
        if wrapped:
            undo = _wrap(model, shapes, wrapped, outer)
            results.append((_milliseconds(model, x), outer, wrapped))
            undo()
    _, outer, wrapped = min(results, key=lambda result: result[0])
    model.to(memory_format=outer)  # type: ignore[call-overload]
    _wrap(model, shapes, wrapped, outer)
    name = "channels_last" if outer == torch.channels_last else "nchw"
    return model, f"{name}, mixed" if wrapped else name


Key = tuple[Any, ...]
Shapes = dict[Key, list[str]]


def _depthwise_shapes(model: nn.Module, x: Tensor) -> Shapes:
    """Return the names of the depthwise convolutions by what decides their speed."""
    found: Shapes = defaultdict(list)

    def note(name: str, conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        shape = tuple(inputs[0].shape)
        key = (shape, conv.kernel_size, conv.stride, conv.dilation, conv.padding)
        if name not in found[key]:
            found[key].append(name)

    hooks = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    ]
    try:
        with torch.inference_mode():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(found)


def _other_is_faster(
    model: nn.Module, names: list[str], key: Key, outer: torch.memory_format
) -> bool:
    conv: Any = model.get_submodule(names[0])
    x = torch.randn(key[0]).to(conv.weight.dtype).contiguous(memory_format=outer)
    # By a tenth at least, as it is measured alone, with warm caches.
    return _milliseconds(InOtherLayout.of(conv, outer), x) < 0.9 * _milliseconds(conv, x)


def _wrap(
    model: nn.Module, shapes: Shapes, wrapped: set[Key], outer: torch.memory_format
) -> Callable[[], None]:
    """Change the layout of the convolutions of some shapes; return what undoes it."""
    before = {name: model.get_submodule(name) for key in wrapped for name in shapes[key]}
    for name, conv in before.items():
        model.set_submodule(name, InOtherLayout.of(conv, outer))  # type: ignore[arg-type]

    def undo() -> None:
        for name, conv in before.items():
            model.set_submodule(name, conv)

    return undo


def _milliseconds(function: Callable[[Tensor], Any], x: Tensor) -> float:
    with torch.inference_mode():
        return least(function, x, ROUNDS)
