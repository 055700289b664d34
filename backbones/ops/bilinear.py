"""Autograd functions of operators that are linear in each of two tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Bilinear(torch.autograd.Function):
    """An operator of two tensors (B, ...) and its kernel, linear in each of the tensors.

    The kernel is its size, or its size and stride, and no tensor.

    A subclass has `forward` and, for a plain backward pass, `gradients`, each the fastest way. What
    is to be differentiated further goes by `recorded`, the same in out-of-place operations that
    autograd and ``torch.func`` know; what ``torch.func.vmap`` maps becomes part of the batch.
    """

    recorded: Callable[[Tensor, Tensor, Any], Tensor]

    @staticmethod
    def gradients(
        first: Tensor, second: Tensor, kernel: Any, grad: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of both tensors, or None where one is not `needed`."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Any], output: Tensor) -> None:
        first, second, ctx.kernel = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        first, second = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradients
            kernel = ctx.kernel
            pull_back = torch.func.vjp(lambda x, y: cls.recorded(x, y, kernel), first, second)[1]
            of_first, of_second = pull_back(grad)
        else:
            needed = ctx.needs_input_grad
            of_first, of_second = cls.gradients(first, second, ctx.kernel, grad, needed)
        return of_first, of_second, None

    @classmethod
    def jvp(cls, ctx: Any, first_tangent: Tensor, second_tangent: Tensor, _: None) -> Tensor:
        first, second = ctx.saved_tensors
        out: Tensor = cls.apply(first_tangent, second, ctx.kernel)
        return out + cls.apply(first, second_tangent, ctx.kernel)

    @classmethod
    def vmap(
        cls, info: Any, in_dims: tuple[int | None, ...], first: Tensor, second: Tensor, kernel: Any
    ) -> tuple[Tensor, int]:
        batches = []
        for tensor, dim in zip((first, second), in_dims):
            if dim is None:
                tensor, dim = tensor.expand(info.batch_size, *tensor.shape), 0
            batches.append(tensor.movedim(dim, 0).flatten(0, 1))
        out = cls.apply(*batches, kernel)
        return out.unflatten(0, (info.batch_size, -1)), 0
