"""LSNet's attention without a split."""

from torch import Tensor, nn

from backbones.engines.rewrites.convolutions import select_outputs
from backbones.families.lsnet import DistanceAttention, attend

__all__ = ["SeparateProjections"]


class SeparateProjections(nn.Module):
    """Re-parameterized attention with a projection each for queries, keys and values.

    It takes over the other parts of `attention`.
    """

    def __init__(self, attention: DistanceAttention) -> None:
        super().__init__()
        conv = attention.qkv.conv
        queries, keys, _ = attention.split
        self.q = nn.Sequential(select_outputs(conv, slice(0, queries)), attention.q_dw)
        self.k = select_outputs(conv, slice(queries, queries + keys))
        self.v = select_outputs(conv, slice(queries + keys, None))
        self.scale, self.attention_biases = attention.scale, attention.attention_biases
        self.act, self.proj = attention.act, attention.proj

    def forward(self, x: Tensor) -> Tensor:
        mixed = attend(self.q(x), self.k(x), self.v(x), self.attention_biases, self.scale)
        return x + self.proj(self.act(mixed))
