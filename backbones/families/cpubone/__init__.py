"""CPUBone."""

from backbones.families.cpubone.attention import ConvAttention, padded
from backbones.families.cpubone.model import CPUBone

__all__ = ["CPUBone", "ConvAttention", "padded"]
