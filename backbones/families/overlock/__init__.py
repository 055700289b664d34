"""OverLoCK."""

from backbones.families.overlock.model import OverLoCK

__all__ = ["OverLoCK"]
