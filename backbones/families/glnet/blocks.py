"""GLNet's blocks: attention of all positions, and GLMix, attention among slots (section 3)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d
from torch import Tensor, nn

from backbones import merge
from backbones.layers import ChannelMlp, ResidualConv, SelfAttention, statistics_dtype
from backbones.ops import adaptive_mean

__all__ = ["HEAD_DIM", "AttentionBlock", "Block", "LocalMlp", "SlotBlock", "pooled"]

EPS = 1e-6  # of the layer norms
GRID = 8  # slots along each side of the map
HEAD_DIM = 32


def pooled(x: Tensor) -> Tensor:
    """Return the means over an 8x8 grid of windows of a map (B, C, H, W), (B, 64, C)."""
    return adaptive_mean(x, (GRID, GRID)).flatten(2).mT


class LocalMlp(ChannelMlp):
    """``fc2(GELU(conv_dw(fc1(x))))`` on (B, C, H, W), `conv_dw` a residual convolution or none."""

    def __init__(self, dim: int, hidden_dim: int, local_conv: bool) -> None:
        super().__init__(dim, hidden_dim, use_conv=True)
        self.conv_dw: nn.Module = ResidualConv(hidden_dim) if local_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.conv_dw(self.fc1(x))))  # B C H W

    def reparameterize(self) -> None:
        """Fold the residual into the depthwise kernel."""
        merge.fold_chain(self, ("conv_dw",))


class Block(nn.Module):
    """What both blocks have: a convolution for the position, an attention, and an MLP.

    Args:
        dim: channels, a multiple of 32.
        mlp_ratio: expansion of the MLP.
        local_convs: depthwise 3x3 convolutions, for the position and in the MLP.
        init_value: initial layer scale; None for none.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        local_convs: bool,
        init_value: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pos_conv: nn.Module = ResidualConv(dim) if local_convs else nn.Identity()
        self.attn = SelfAttention(dim, HEAD_DIM)
        self.norm2: nn.Module = LayerNorm2d(dim, eps=EPS)
        self.mlp = LocalMlp(dim, int(dim * mlp_ratio), local_convs)
        self.gamma1, self.gamma2 = (
            None if init_value is None else nn.Parameter(torch.full((dim,), init_value))
            for _ in range(2)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def add_branches(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add to a map (B, C, H, W) what mixes its positions, and then the MLP."""
        if self.gamma1 is not None:
            mixed = mixed * self.gamma1.view(1, -1, 1, 1)
        x = x + self.drop_path(mixed)
        y = self.mlp(self.norm2(x))
        if self.gamma2 is not None:
            y = y * self.gamma2.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        merge.fold_chain(self, ("pos_conv",))
        self.attn.reparameterize()
        merge.scale_into_previous(self.attn.proj, self.gamma1)
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)
        merge.scale_into_previous(self.mlp.fc2, self.gamma2)
        self.gamma1 = self.gamma2 = None


class AttentionBlock(Block):
    """Attention of all positions to all (section 3.1), for stages of low resolution."""

    def __init__(self, dim: int, *options: Any) -> None:
        super().__init__(dim, *options)
        self.norm1: nn.Module = LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_conv(x)  # B C H W
        y = self.attn(self.norm1(x.flatten(2).mT))  # B N C
        return self.add_branches(x, y.mT.unflatten(2, x.shape[-2:]))

    def reparameterize(self) -> None:
        self.norm1 = merge.norm_into_next(self.norm1, self.attn.qkv)
        super().reparameterize()


class SlotBlock(Block):
    """GLMix (section 3.2): attention of 8x8 slots and a depthwise 5x5 of the map, side by side.

    A slot is at first the mean of its part of the block's input, or a parameter. The softmax over
    positions of ``scale * cos(slot, position)`` gathers the slots, that over slots dispatches them.

    Args:
        dim: channels, a multiple of 32.
        options: as of `Block`.
        param_slots: the first slots are a parameter.
    """

    def __init__(self, dim: int, *options: Any, param_slots: bool = False) -> None:
        super().__init__(dim, *options)
        slots = nn.Parameter(0.02 * torch.randn(1, GRID**2, dim)) if param_slots else None
        self.init_slots = slots
        self.norm1 = LayerNorm2d(dim, eps=EPS)
        self.slot_scale: nn.Parameter | None = nn.Parameter(torch.full((), dim**-0.5))
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv_dw = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.first_slots(x)
        x = self.pos_conv(x)  # B C H W
        y = self.norm1(x)
        local = self.conv2(self.conv_dw(self.conv1(y)))
        return self.add_branches(x, local + self.mix_slots(y, slots))

    def first_slots(self, x: Tensor) -> Tensor:
        """Return the slots' directions times the scale, (B, 64, C), or (1, 64, C) if learned."""
        slots = self.init_slots if self.init_slots is not None else pooled(x)
        if self.slot_scale is None:
            return slots
        wide = slots.to(statistics_dtype(x))  # whose squares overflow in float16
        return (F.normalize(wide, dim=-1) * self.slot_scale).to(slots.dtype)

    def mix_slots(self, x: Tensor, slots: Tensor) -> Tensor:
        """Gather a map (B, C, H, W) in slots, let these attend to each other, and dispatch them."""
        positions = x.flatten(2)  # B C N
        length = torch.linalg.vector_norm(
            positions, dim=1, keepdim=True, dtype=statistics_dtype(x)
        )  # B 1 N
        logits = slots @ positions / length.clamp_min(1e-12)  # B 64 N
        slots = self.attn(logits.softmax(2).to(x.dtype) @ positions.mT)  # B 64 C
        return (slots.mT @ logits.softmax(1).to(x.dtype)).unflatten(2, x.shape[-2:])

    def reparameterize(self) -> None:
        """Fold all but the norm, whose outputs are compared with the slots and make them."""
        self.attn.reparameterize()
        # What all slots have in common reaches every position: dispatching weights sum to one.
        merge.shift_into_previous(self.conv2, self.attn.proj.bias)
        merge.shift_into_next(self.conv_dw.bias, self.conv2)
        self.attn.proj.register_parameter("bias", None)
        self.conv_dw.bias = None
        merge.scale_into_previous(self.conv2, self.gamma1)
        if self.init_slots is not None and self.slot_scale is not None:
            merge.scale_into_directions(self.init_slots, self.slot_scale)
            self.slot_scale = None
        super().reparameterize()
