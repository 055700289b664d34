"""OverLoCK."""

from backbones.families.overlock.dynamic_conv import DynamicConv
from backbones.families.overlock.model import OverLoCK

__all__ = ["DynamicConv", "OverLoCK"]
