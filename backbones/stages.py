"""Stages: what a builder needs to know of one, the default module, and the input's check."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import InputSizeError, UnsupportedError
from backbones.layers import fx_leaf

__all__ = ["Stage", "StagePlan", "check_input", "per_stage", "plan_stages"]


@dataclass(frozen=True)
class StagePlan:
    """What a builder needs to know of a stage.

    `stride` is the stage's own stride (1 where `output_stride` asks for dilation instead),
    `first_dilation` that of its downsampling and `dilation` that of its blocks.
    """

    index: int
    in_dim: int
    dim: int
    depth: int
    stride: int
    reduction: int
    first_dilation: int = 1
    dilation: int = 1


class Stage(nn.Module):
    """The default stage: an optional downsampling, then blocks one after the other."""

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


def per_stage(value: Any, count: int, name: str) -> list[Any]:
    """Spread a value given once, or once a stage, over `count` stages.

    Raises:
        ValueError: a sequence of another length.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} needs one value or {count}, one a stage; got {list(value)}")
    return list(value)


@fx_leaf
def check_input(x: Tensor, in_chans: int, smallest: int) -> None:
    """Refuse an input that the model cannot take, with words instead of a kernel's message."""
    if torch.compiler.is_compiling():
        return  # a guard here would pin the sizes of an exported graph
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise InputSizeError(
            f"expected an input of shape (batch, {in_chans}, height, width), got {tuple(x.shape)};"
            " create the model with in_chans=... for another number of channels"
        )
    if min(x.shape[-2:]) < smallest:
        raise InputSizeError(
            f"input of {x.shape[-2]}x{x.shape[-1]} is smaller than the model's total stride;"
            f" height and width must be at least {smallest}"
        )


def plan_stages(
    name: str,
    strides: Sequence[int],
    dims: Sequence[int],
    depths: Sequence[int],
    output_stride: int,
    dilatable: bool,
) -> list[StagePlan]:
    """Plan the stages of a model, trading strides for dilation beyond `output_stride`.

    Args:
        name: the model's name, for messages.
        strides: own stride of each stage, the stem's in the first.
        dims: channels of each stage.
        depths: blocks of each stage.
        output_stride: largest stride; timm's default of 32 means "no dilation" for every family.
        dilatable: whether 8 and 16 are possible.

    Raises:
        ValueError: another number of dims or depths than of stages.
        UnsupportedError: an output stride that the family cannot run at.
    """
    if len(dims) != len(strides) or len(depths) != len(strides):
        raise ValueError(
            f"{name} has {len(strides)} stages; got dims {list(dims)} and depths {list(depths)}"
        )
    natural = math.prod(strides)
    allowed = (8, 16, natural) if dilatable else (natural,)
    if output_stride not in (*allowed, 32):
        raise UnsupportedError(
            f"{name} cannot run at output_stride={output_stride};"
            f" possible: {', '.join(map(str, allowed))}"
        )
    limit = output_stride if output_stride in allowed else natural
    plans, reduction, dilation = [], 1, 1
    for i, stride in enumerate(strides):
        if reduction * stride > limit:
            dilation *= stride
            stride = 1
        reduction *= stride
        first_dilation = 1 if dilation in (1, 2) else 2
        in_dim = dims[max(i - 1, 0)]
        plans.append(
            StagePlan(i, in_dim, dims[i], depths[i], stride, reduction, first_dilation, dilation)
        )
    return plans
