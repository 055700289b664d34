"""From a user's model to what is converted or run: a copy in eval mode on the CPU."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backbones.engines.preparation.preprocessing import Preprocessed
from backbones.errors import UnsupportedError
from backbones.reparameterization import backbones_in, reparameterize

__all__ = [
    "DTYPES",
    "HALVES",
    "PRECISIONS",
    "InPrecision",
    "contiguous_copy",
    "plain_copy",
    "prepared",
    "reparameterized_copy",
]

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of PyTorch
HALVES = ("bf16", "fp16")


class InPrecision(nn.Module):
    """A model that computes in half precision behind float32 inputs and outputs."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.model = model.to(self.dtype)

    def forward(self, x: Tensor) -> Any:
        result = self.model(x.to(self.dtype))
        if isinstance(result, Tensor):
            return result.float()
        return [output.float() for output in result]


class _Pyramid(nn.Module):
    """A classifier as the feature maps of all its stages, strides ascending."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        model: Any = self.model
        return model.forward_intermediates(x, intermediates_only=True)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy in float32, in eval mode on the CPU."""
    return copy.deepcopy(model).cpu().float().eval()


def reparameterized_copy(model: nn.Module) -> nn.Module:
    """Return a re-parameterized copy in float32, in eval mode on the CPU.

    A model that is none of this package's nor timm's has nothing to merge and is copied.
    """
    clone = plain_copy(model)
    known = any(backbones_in(clone)) or getattr(clone, "pretrained_cfg", None) is not None
    return reparameterize(clone) if known else clone


def prepared(
    model: nn.Module,
    data_config: Mapping[str, Any],
    *,
    precision: str,
    preprocess: bool,
    features: bool,
) -> nn.Module:
    """Wrap a model in float32, which becomes a part of the result, in what the file shall contain.

    With `precision` ``bf16`` or ``fp16`` it computes in that type; `preprocess` puts resizing and
    normalization by `data_config` before it; `features` returns the feature maps of the stages.
    """
    if features:
        if not hasattr(model, "forward_intermediates"):
            raise UnsupportedError(
                f"{type(model).__name__} has no stages to export; create it with"
                " features_only=True instead"
            )
        model = _Pyramid(model)
    if precision in HALVES:
        model = InPrecision(model, precision)
    return (Preprocessed(model, data_config) if preprocess else model).eval()


def contiguous_copy(model: nn.Module) -> nn.Module:
    """Return a copy with contiguous weights, for converters that take memory as it lies.

    Of weights in channels last or other views they would make wrong numbers, without a word.
    """
    model = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
    return model
