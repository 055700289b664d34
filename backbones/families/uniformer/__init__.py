"""UniFormer."""

from backbones.families.uniformer.blocks import AttentionBlock, ConvBlock
from backbones.families.uniformer.light import PrunedBlock
from backbones.families.uniformer.model import UniFormer

__all__ = ["AttentionBlock", "ConvBlock", "PrunedBlock", "UniFormer"]
