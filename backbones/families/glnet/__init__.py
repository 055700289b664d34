"""GLNet."""

from backbones.families.glnet.blocks import AttentionBlock, SlotBlock, pooled
from backbones.families.glnet.model import GLNet

__all__ = ["AttentionBlock", "GLNet", "SlotBlock", "pooled"]
