"""Help for torch.fx, whose symbolic tracing cannot branch on shapes and types."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["fx_leaf"]

F = TypeVar("F", bound=Callable[..., Any])


def fx_leaf(function: F) -> F:
    """Make a function of a tensor one node of a traced graph, wherever it is imported.

    ``torch.fx.wrap`` does so only for the module that calls it. Eager mode, ``torch.compile`` and
    ``torch.export`` see the plain function.
    """

    @functools.wraps(function)
    def leaf(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, torch.fx.Proxy):
            return x.tracer.create_proxy("call_function", leaf, (x, *args), kwargs)
        return function(x, *args, **kwargs)

    return leaf  # type: ignore[return-value]
