"""Mixed precision, in which convolutions stay in float32 whose bf16 gradients are wrong."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["autocast"]


@contextmanager
def autocast(device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """Compute as ``torch.autocast`` does, but dilated grouped convolutions on CPUs in float32.

    In bf16 with channels last, oneDNN leaves their weight gradients partly unset (PyTorch 2.14):
    what was in memory before, from small errors to 1e35 and NaN. In float32 they are right, and
    not slower.
    """
    whole = device_type == "cpu" and dtype is torch.bfloat16
    with torch.autocast(device_type, dtype=dtype), _DilatedInFloat32() if whole else nullcontext():
        yield


class _DilatedInFloat32(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.conv2d or not _dilated_and_grouped(*args, **kwargs):
            return func(*args, **kwargs)
        kwargs = {name: _whole(value) for name, value in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*map(_whole, args), **kwargs).bfloat16()


def _dilated_and_grouped(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    return groups > 1 and dilation not in (1, [1], (1,), [1, 1], (1, 1))


def _whole(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
