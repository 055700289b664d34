"""Models with norm statistics and scales that are not those of a fresh model."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms random statistics and every factor and offset a random value, in place.

    A fresh model hides wrong merges: its norms have mean 0 and variance 1, its offsets are 0 and
    its layer scales so small that branches vanish.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith("radius"):
            tensor.copy_(0.1 + 0.4 * torch.rand(tensor.shape, generator=generator))
        elif tensor.ndim < 2 or name.endswith(("bias", "gamma", "grn.weight", "rotation")):
            tensor.copy_((0.3 if name.endswith("bias") else 0.7) * normal(tensor.shape))
        elif name.endswith(("positions", "attention_biases")):
            tensor.copy_(normal(tensor.shape))
        elif min(tensor.shape) > 0:
            fan_in = tensor[0].numel()
            tensor.copy_(normal(tensor.shape) / fan_in**0.5)
        if ".involution.predict." in name:  # involutions square what comes in, block after block
            tensor.mul_(0.15)
    return model
