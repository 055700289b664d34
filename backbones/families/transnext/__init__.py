"""TransNeXt."""

from backbones.families.transnext.attention import AggregatedAttention, CosineAttention
from backbones.families.transnext.model import Block, TransNeXt

__all__ = ["AggregatedAttention", "Block", "CosineAttention", "TransNeXt"]
